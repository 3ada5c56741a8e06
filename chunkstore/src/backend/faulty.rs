//! A backend that counts every operation and fails where it is told to: for tests, here and in other crates.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use super::{Backend, Leftovers, ObjectMeta, PutOutcome, Version};
use crate::error::{Result, StoreError};

/// What was asked of a backend.
#[derive(Debug, Default)]
pub struct Counts {
    /// Reads of objects or parts of them.
    pub gets: AtomicU64,
    /// Bytes those reads returned.
    pub get_bytes: AtomicU64,
    /// Look-ups of sizes.
    pub heads: AtomicU64,
    /// Writes of new objects.
    pub puts: AtomicU64,
    /// Bytes those writes carried.
    pub put_bytes: AtomicU64,
    /// Swaps of references.
    pub swaps: AtomicU64,
    /// Deletions.
    pub deletes: AtomicU64,
    /// Listings.
    pub lists: AtomicU64,
}

/// [`Counts`] at one moment, to be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Reads of objects or parts of them.
    pub gets: u64,
    /// Bytes those reads returned.
    pub get_bytes: u64,
    /// Look-ups of sizes.
    pub heads: u64,
    /// Writes of new objects.
    pub puts: u64,
    /// Bytes those writes carried.
    pub put_bytes: u64,
    /// Swaps of references.
    pub swaps: u64,
    /// Deletions.
    pub deletes: u64,
    /// Listings.
    pub lists: u64,
}

impl Counts {
    /// What was asked since the last call; counting begins anew.
    pub fn take(&self) -> Counted {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::SeqCst);
        Counted {
            gets: take(&self.gets),
            get_bytes: take(&self.get_bytes),
            heads: take(&self.heads),
            puts: take(&self.puts),
            put_bytes: take(&self.put_bytes),
            swaps: take(&self.swaps),
            deletes: take(&self.deletes),
            lists: take(&self.lists),
        }
    }
}

/// What happens to one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails and has no effect.
    Fail,
    /// It takes effect, and its answer is lost.
    LoseAnswer,
    /// From here on nothing works: the process or the store died.
    Dead,
    /// The disk is full.
    Full,
    /// The store does not permit it.
    Deny,
    /// The object lies in an archive tier, and cannot be read.
    Archive,
    /// A read returns half of its bytes.
    Truncate,
    /// A read returns its bytes with one bit flipped.
    FlipBit,
}

type Plan = dyn Fn(u64, &str, &str) -> Option<Fault> + Send + Sync;

/// Wraps a backend.
pub struct FaultyBackend {
    inner: Arc<dyn Backend>,
    counts: Arc<Counts>,
    operations: AtomicU64,
    dead: std::sync::atomic::AtomicBool,
    plan: Mutex<Arc<Plan>>,
}

impl std::fmt::Debug for FaultyBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyBackend").field("inner", &self.inner).field("counts", &self.counts).finish()
    }
}

impl FaultyBackend {
    /// A backend without faults, which only counts.
    pub fn counting(inner: Arc<dyn Backend>) -> Self {
        Self::new(inner, |_, _, _| None)
    }

    /// Asks `plan` at every operation with its number (from 0), its name (`get`, `head`, `put`, `swap`, `delete`,
    /// `list`) and its key.
    pub fn new(
        inner: Arc<dyn Backend>,
        plan: impl Fn(u64, &str, &str) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        FaultyBackend {
            inner,
            counts: Arc::default(),
            operations: AtomicU64::new(0),
            dead: false.into(),
            plan: Mutex::new(Arc::new(plan)),
        }
    }

    /// From here on `plan` is asked, operations are numbered from 0 again, and what was dead works.
    pub fn set_plan(&self, plan: impl Fn(u64, &str, &str) -> Option<Fault> + Send + Sync + 'static) {
        let mut current = self.plan.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *current = Arc::new(plan);
        self.operations.store(0, Ordering::SeqCst);
        self.dead.store(false, Ordering::SeqCst);
    }

    /// What was asked so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    fn fault(&self, op: &'static str, key: &str) -> Result<Option<Fault>> {
        let n = self.operations.fetch_add(1, Ordering::SeqCst);
        let plan = match self.plan.lock() {
            Ok(plan) => plan.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        let fault = plan(n, op, key);
        if fault == Some(Fault::Dead) {
            self.dead.store(true, Ordering::SeqCst);
        }
        if self.dead.load(Ordering::SeqCst) {
            return Err(self.gone(op, key));
        }
        let (doing, store) = (|| format!("{op} {key}"), || self.inner.url().to_owned());
        match fault {
            Some(Fault::Fail) => Err(self.gone(op, key)),
            Some(Fault::Full) if matches!(op, "put" | "swap") => Err(StoreError::Full { doing: doing() }),
            Some(Fault::Deny) => {
                Err(StoreError::Denied { doing: doing(), store: store(), why: "injected fault".into() })
            }
            Some(Fault::Archive) if op == "get" => {
                Err(StoreError::Archived { doing: doing(), store: store(), why: "injected fault".into() })
            }
            other => Ok(other),
        }
    }

    fn gone(&self, op: &str, key: &str) -> StoreError {
        StoreError::Unavailable {
            doing: format!("{op} {key}"),
            store: self.inner.url().to_owned(),
            why: "injected fault".into(),
        }
    }

    fn answer<T>(&self, fault: Option<Fault>, op: &str, key: &str, value: T) -> Result<T> {
        if fault == Some(Fault::LoseAnswer) { Err(self.gone(op, key)) } else { Ok(value) }
    }
}

fn spoil(fault: Option<Fault>, bytes: Bytes) -> Bytes {
    match fault {
        Some(Fault::Truncate) => bytes.slice(..bytes.len() / 2),
        Some(Fault::FlipBit) if !bytes.is_empty() => {
            let mut spoiled = bytes.to_vec();
            let middle = spoiled.len() / 2;
            spoiled[middle] ^= 1;
            spoiled.into()
        }
        _ => bytes,
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::SeqCst);
}

impl Backend for FaultyBackend {
    fn url(&self) -> &str {
        self.inner.url()
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn keeps_conditions(&self) -> bool {
        self.inner.keeps_conditions()
    }

    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        add(&self.counts.gets, 1);
        let fault = self.fault("get", key)?;
        let got = self.inner.get(key, range)?.map(|b| spoil(fault, b));
        add(&self.counts.get_bytes, got.as_ref().map_or(0, |b| b.len() as u64));
        self.answer(fault, "get", key, got)
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        add(&self.counts.heads, 1);
        let fault = self.fault("head", key)?;
        let got = self.inner.head(key)?;
        self.answer(fault, "head", key, got)
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        add(&self.counts.puts, 1);
        add(&self.counts.put_bytes, bytes.len() as u64);
        let fault = self.fault("put", key)?;
        let outcome = self.inner.put_new(key, bytes)?;
        self.answer(fault, "put", key, outcome)
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        add(&self.counts.puts, 1);
        add(&self.counts.put_bytes, bytes.len() as u64);
        let fault = self.fault("put", key)?;
        self.inner.put_again(key, bytes)?;
        self.answer(fault, "put", key, ())
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        add(&self.counts.gets, 1);
        let fault = self.fault("get", key)?;
        let (bytes, version) = self.inner.get_versioned(key)?;
        add(&self.counts.get_bytes, bytes.as_ref().map_or(0, |b| b.len() as u64));
        self.answer(fault, "get", key, (bytes.map(|b| spoil(fault, b)), version))
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        add(&self.counts.swaps, 1);
        let fault = self.fault("swap", key)?;
        let done = self.inner.swap(key, expected, bytes)?;
        self.answer(fault, "swap", key, done)
    }

    fn swap_without_room(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        self.inner.swap_without_room(key, expected, bytes)
    }

    fn delete(&self, key: &str) -> Result<()> {
        add(&self.counts.deletes, 1);
        let fault = self.fault("delete", key)?;
        self.inner.delete(key)?;
        self.answer(fault, "delete", key, ())
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        add(&self.counts.lists, 1);
        let fault = self.fault("list", prefix)?;
        self.inner.list(prefix, each)?;
        self.answer(fault, "list", prefix, ())
    }

    fn folders(&self) -> Result<Vec<String>> {
        add(&self.counts.lists, 1);
        let fault = self.fault("list", "")?;
        let folders = self.inner.folders()?;
        self.answer(fault, "list", "", folders)
    }

    fn sweep_leftovers(&self, prefix: &str, before_unix_ms: u64, dry_run: bool) -> Result<Leftovers> {
        self.inner.sweep_leftovers(prefix, before_unix_ms, dry_run)
    }

    fn keep_reserve(&self) {
        self.inner.keep_reserve();
    }

    fn release_reserve(&self) -> bool {
        self.inner.release_reserve()
    }
}
