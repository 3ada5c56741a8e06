//! Doubt about the write of a reference is settled by a write: what is late fails, and what is said is true.
//!
//! The local backend tells versions apart by their bytes, as S3 does: equal bytes are an equal version.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use common::Machine;
use dormouse_chunkstore::{
    GcOptions, ImportRequest, NoProgress, Result, Settled, Standing, Store, StoreError, StoreOptions,
    VerifyDepth,
    backend::{
        Backend, ObjectMeta, PutOutcome, Version,
        faulty::{Fault, FaultyBackend},
        open_url,
    },
};
use dormouse_core::Name;

fn name() -> Name {
    Name::new("a").unwrap()
}

/// Swaps of references do not arrive while `holds` is set, and are not answered; they do when they are let go.
#[derive(Debug)]
struct OnItsWay {
    inner: Arc<dyn Backend>,
    holds: AtomicBool,
    held: Mutex<Vec<(String, Option<Version>, Bytes)>>,
}

impl OnItsWay {
    fn at(dir: &Path) -> Arc<Self> {
        let inner = open_url(dir.to_str().unwrap()).unwrap();
        Arc::new(OnItsWay { inner, holds: false.into(), held: Mutex::default() })
    }

    fn store(self: &Arc<Self>) -> Store {
        Store::with_backend(self.clone(), StoreOptions::default())
    }

    /// An import whose reference is on its way for as long as the caller likes.
    fn doubtful_import(self: &Arc<Self>, machine: &Machine, parent: Option<&str>) {
        self.holds.store(true, Ordering::SeqCst);
        let doubt = machine.import(&self.store(), "a", parent);
        assert!(matches!(doubt, Err(StoreError::InDoubt { .. })), "{doubt:?}");
        self.holds.store(false, Ordering::SeqCst);
    }

    /// What was on its way arrives; how much of it takes effect.
    fn arrive(&self) -> usize {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        assert!(!held.is_empty());
        let landed = held
            .into_iter()
            .filter(|(key, expected, bytes)| self.inner.swap(key, expected.as_ref(), bytes.clone()).unwrap());
        landed.count()
    }
}

impl Backend for OnItsWay {
    fn url(&self) -> &str {
        self.inner.url()
    }
    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        self.inner.get(key, range)
    }
    fn head(&self, key: &str) -> Result<Option<u64>> {
        self.inner.head(key)
    }
    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        self.inner.put_new(key, bytes)
    }
    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.inner.put_again(key, bytes)
    }
    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        self.inner.get_versioned(key)
    }
    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        if !key.contains("/refs/") || !self.holds.load(Ordering::SeqCst) {
            return self.inner.swap(key, expected, bytes);
        }
        self.held.lock().unwrap().push((key.to_owned(), expected.cloned(), bytes));
        let (doing, store) = (format!("swap {key}"), self.url().to_owned());
        Err(StoreError::Unavailable { doing, store, why: "no answer".into() })
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        self.inner.list(prefix, each)
    }
}

fn before(store: &Store) -> Standing {
    store.standing(&name()).unwrap()
}

fn settle(store: &Store, before: &Standing) -> Settled {
    store.settle_reference(&name(), before).unwrap()
}

#[test]
fn a_late_write_of_a_new_name_fails() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    let before = before(&store);
    backend.doubtful_import(&machine, None);
    assert_eq!(settle(&store, &before), Settled::Undone);
    assert_eq!(backend.arrive(), 0, "it came too late");
    assert!(matches!(store.open_snapshot(&name()), Err(StoreError::NoSuchSnapshot { .. })));
    assert!(store.list().unwrap().is_empty());
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

#[test]
fn a_late_write_of_a_name_that_was_removed_fails() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    machine.import(&store, "a", None).unwrap();
    store.remove(&name()).unwrap();
    let before = before(&store);
    backend.doubtful_import(&machine, None);
    assert_eq!(settle(&store, &before), Settled::Undone);
    assert_eq!(backend.arrive(), 0, "it came too late");
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_late_write_of_a_name_that_stands_fails() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, mut machine) = (backend.store(), Machine::new(20, 2));
    machine.import(&store, "a", None).unwrap();
    let (before, first) = (before(&store), machine.remember());
    machine.change(1, 5);
    backend.doubtful_import(&machine, Some("a"));
    assert_eq!(settle(&store, &before), Settled::Undone);
    assert_eq!(backend.arrive(), 0, "it came too late");
    first.check(&store, "a").unwrap();
    assert_eq!(self::before(&store), before, "what it stands for is as it was");
    // As any reference, it is moved, listed and collected around.
    machine.import(&store, "a", Some("a")).unwrap();
    machine.remember().check(&store, "a").unwrap();
    store.gc(GcOptions { grace: std::time::Duration::ZERO, dry_run: false }).unwrap();
    machine.remember().check(&store, "a").unwrap();
}

#[test]
fn a_write_that_landed_is_told_with_what_it_made() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    let before = before(&store);
    backend.doubtful_import(&machine, None);
    assert_eq!(backend.arrive(), 1);
    let Settled::Moved(reference) = settle(&store, &before) else { panic!("it landed") };
    assert_eq!(reference, *store.open_snapshot(&name()).unwrap().reference());
}

#[test]
fn a_write_that_landed_and_was_removed_is_never_called_undone() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    for _ in 0..2 {
        let before = before(&store);
        backend.doubtful_import(&machine, None);
        assert_eq!(backend.arrive(), 1);
        store.remove(&name()).unwrap();
        assert_eq!(settle(&store, &before), Settled::Removed);
    }
}

#[test]
fn a_name_moved_back_to_the_same_snapshot_is_not_undone() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    machine.import(&store, "a", None).unwrap();
    let before = before(&store);
    store.remove(&name()).unwrap();
    machine.import(&store, "a", None).unwrap();
    let Settled::Moved(reference) = settle(&store, &before) else { panic!("it was moved") };
    assert_eq!(Some(reference.snapshot.to_string()), before.snapshot, "the same machine, another time");
}

#[test]
fn settling_again_gives_the_same_answer() {
    let dir = tempfile::tempdir().unwrap();
    let store = OnItsWay::at(dir.path()).store();
    for stands in [false, true] {
        if stands {
            Machine::new(20, 2).import(&store, "a", None).unwrap();
        }
        let before = before(&store);
        let bytes = || std::fs::read(dir.path().join("plain/refs/a")).unwrap();
        assert_eq!(settle(&store, &before), Settled::Undone);
        let first = bytes();
        assert_eq!(settle(&store, &before), Settled::Undone);
        assert_ne!(first, bytes(), "a settling write of another time is no longer expected by anybody");
    }
}

#[test]
fn a_settling_write_whose_answer_is_lost_is_found_by_its_nonce() {
    let dir = tempfile::tempdir().unwrap();
    let inner = open_url(dir.path().to_str().unwrap()).unwrap();
    let backend = Arc::new(FaultyBackend::counting(inner));
    let store = Store::with_backend(backend.clone(), StoreOptions::default());
    let before = before(&store);
    backend.set_plan(|_, op, _| (op == "swap").then_some(Fault::LoseAnswer));
    backend.counts().take();
    assert_eq!(settle(&store, &before), Settled::Undone);
    assert_eq!(backend.counts().take().swaps, 1, "its own bytes are there: it is not written again");
    // Nor is it believed where it did not land.
    backend.set_plan(|_, op, _| (op == "swap").then_some(Fault::Fail));
    let doubt = store.settle_reference(&name(), &before);
    assert!(matches!(doubt, Err(StoreError::InDoubt { .. })), "{doubt:?}");
}

#[test]
fn no_two_removals_of_a_name_leave_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, machine) = (OnItsWay::at(dir.path()).store(), Machine::new(20, 2));
    let mut seen = Vec::new();
    for _ in 0..3 {
        machine.import(&store, "a", None).unwrap();
        store.remove(&name()).unwrap();
        let left = std::fs::read(dir.path().join("plain/refs/a")).unwrap();
        assert!(!left.is_empty() && !seen.contains(&left), "{left:?}");
        seen.push(left);
        assert!(matches!(store.remove(&name()), Err(StoreError::NoSuchSnapshot { .. })));
    }
}

/// What `name()` stands for, as others see it.
fn newer(store: &Store) -> Option<String> {
    let snapshot = store.open_snapshot(&name()).unwrap();
    snapshot.reference().newer.as_ref().map(|newer| newer.host.clone())
}

#[test]
fn a_newer_guest_is_announced_and_withdrawn() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    store.import(&machine.request("a", None), &NoProgress).unwrap();
    let standing = before(&store);
    assert_eq!(newer(&store), None);
    store.announce_newer(&name(), &standing, "host-7").unwrap();
    assert_eq!(newer(&store).as_deref(), Some("host-7"));
    assert_eq!(before(&store), standing, "it stands for the same");
    assert_eq!(settle(&store, &standing), Settled::Undone);
    assert_eq!(newer(&store), None);
}

#[test]
fn a_newer_guest_is_forgotten_once_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let backend = OnItsWay::at(dir.path());
    let (store, machine) = (backend.store(), Machine::new(20, 2));
    store.import(&machine.request("a", None), &NoProgress).unwrap();
    let standing = before(&store);
    store.announce_newer(&name(), &standing, &"ü".repeat(1000)).unwrap();
    assert!(newer(&store).is_some_and(|host| host.starts_with("üü")));
    let replacing = ImportRequest { replace: true, ..machine.request("a", None) };
    store.import(&replacing, &NoProgress).unwrap();
    assert_eq!(newer(&store), None);
    let late = store.announce_newer(&name(), &standing, "host-7");
    assert!(matches!(late, Err(StoreError::Conflict { .. })), "{late:?}");
}
