//! A backend that answers as late as an object store would: for benchmarks, where the wire must not be the machine's.
//!
//! The model is the usual one: each request waits for its first byte, then its bytes come at a stream's bandwidth,
//! and streams do not slow each other. It says nothing of throttling, lost connections or the client's own work.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Backend, Leftovers, ObjectMeta, PutOutcome, Version};
use crate::error::Result;

/// Bytes handed over at once, as a network client would.
const PART_BYTES: usize = 64 << 10;

/// How long the first byte of a request takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FirstByte {
    /// Always this long.
    Fixed(Duration),
    /// Lognormal: half of all requests take less than the median, one in a thousand longer than `p999`.
    Tailed {
        /// The median.
        median: Duration,
        /// The 99.9th percentile.
        p999: Duration,
    },
}

/// How a modelled store behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoreModel {
    /// How long the first byte of a request takes.
    pub first_byte: FirstByte,
    /// Bytes per second of one request.
    pub stream_bytes_per_s: f64,
    /// Where the random numbers begin; the same seed waits the same times.
    pub seed: u64,
}

impl StoreModel {
    /// 20 ms to the first byte and 100 MB/s a stream: a store in the same region on a good day.
    pub const NEAR: StoreModel = Self::fixed(20);
    /// 5 ms: a store made to be fast, in the same zone.
    pub const FAST: StoreModel = Self::fixed(5);
    /// A median of 36 ms with 175 ms at 99.9 %: what a general-purpose store shows to a client with many requests.
    pub const TAILED: StoreModel = StoreModel {
        first_byte: FirstByte::Tailed { median: Duration::from_millis(36), p999: Duration::from_millis(175) },
        stream_bytes_per_s: 100e6,
        seed: 1,
    };

    const fn fixed(ms: u64) -> Self {
        StoreModel {
            first_byte: FirstByte::Fixed(Duration::from_millis(ms)),
            stream_bytes_per_s: 100e6,
            seed: 1,
        }
    }

    /// The wait of request number `n`.
    pub fn wait(&self, n: u64) -> Duration {
        match self.first_byte {
            FirstByte::Fixed(wait) => wait,
            FirstByte::Tailed { median, p999 } => {
                // 3.0902 is the 99.9 % quantile of the normal distribution.
                let sigma = (p999.as_secs_f64() / median.as_secs_f64()).ln() / 3.0902;
                median.mul_f64((sigma * normal(self.seed, n)).exp())
            }
        }
    }
}

/// A sample of the normal distribution (Box and Muller), the same for the same arguments.
fn normal(seed: u64, n: u64) -> f64 {
    let uniform = |salt: u64| (mix(seed ^ mix(n * 2 + salt)) >> 11) as f64 / (1u64 << 53) as f64;
    (-2.0 * (1.0 - uniform(0)).ln()).sqrt() * (std::f64::consts::TAU * uniform(1)).cos()
}

/// The finaliser of splitmix64.
fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Wraps a backend whose answers take no time worth mentioning.
#[derive(Debug)]
pub struct ModelledBackend {
    inner: Arc<dyn Backend>,
    model: Mutex<Option<StoreModel>>,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
}

/// A read that was begun.
struct InFlight<'a>(&'a ModelledBackend);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ModelledBackend {
    /// Behaves as `model` says from the first request on; with `None`, as the backend itself.
    pub fn new(inner: Arc<dyn Backend>, model: Option<StoreModel>) -> Self {
        let zero = AtomicU64::default;
        ModelledBackend {
            inner,
            model: Mutex::new(model),
            reads: zero(),
            read_bytes: zero(),
            in_flight: zero(),
            most_in_flight: zero(),
        }
    }

    /// Behaves otherwise from here on.
    pub fn set_model(&self, model: Option<StoreModel>) {
        *self.model.lock().unwrap_or_else(PoisonError::into_inner) = model;
    }

    /// Reads, and the bytes they returned, since the last call.
    pub fn take_reads(&self) -> (u64, u64) {
        (self.reads.swap(0, Ordering::SeqCst), self.read_bytes.swap(0, Ordering::SeqCst))
    }

    /// Most reads that were under way at the same moment since the last call.
    pub fn take_most_in_flight(&self) -> u64 {
        self.most_in_flight.swap(0, Ordering::SeqCst)
    }

    /// Waits for a first byte; the model to go on by, and what ends with the read.
    fn begin(&self) -> (Option<StoreModel>, InFlight<'_>) {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let in_flight = InFlight(self);
        let n = self.reads.fetch_add(1, Ordering::SeqCst);
        let model = *self.model.lock().unwrap_or_else(PoisonError::into_inner);
        (model.inspect(|m| thread::sleep(m.wait(n))), in_flight)
    }

    fn whole(&self, model: Option<StoreModel>, bytes: Option<Bytes>) -> Option<Bytes> {
        let len = bytes.as_ref().map_or(0, Bytes::len);
        self.read_bytes.fetch_add(len as u64, Ordering::SeqCst);
        if let Some(model) = model {
            thread::sleep(Duration::from_secs_f64(len as f64 / model.stream_bytes_per_s));
        }
        bytes
    }
}

impl Backend for ModelledBackend {
    fn url(&self) -> &str {
        self.inner.url()
    }

    fn keeps_conditions(&self) -> bool {
        self.inner.keeps_conditions()
    }

    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        let (model, _in_flight) = self.begin();
        Ok(self.whole(model, self.inner.get(key, range)?))
    }

    fn get_parts(&self, key: &str, range: Range<u64>, each: &mut dyn FnMut(Bytes) -> bool) -> Result<bool> {
        let (model, _in_flight) = self.begin();
        let Some(mut left) = self.inner.get(key, Some(range))? else { return Ok(false) };
        let (start, mut sent) = (Instant::now(), 0);
        while !left.is_empty() {
            let part = left.split_to(left.len().min(PART_BYTES));
            sent += part.len();
            if let Some(model) = model {
                // By the clock, so that late wakes do not add up.
                let due = start + Duration::from_secs_f64(sent as f64 / model.stream_bytes_per_s);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            self.read_bytes.fetch_add(part.len() as u64, Ordering::SeqCst);
            if !each(part) {
                break;
            }
        }
        Ok(true)
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        let _in_flight = self.begin();
        self.inner.head(key)
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        self.inner.put_new(key, bytes)
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.inner.put_again(key, bytes)
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        let (model, _in_flight) = self.begin();
        let (bytes, version) = self.inner.get_versioned(key)?;
        Ok((self.whole(model, bytes), version))
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        self.inner.swap(key, expected, bytes)
    }

    fn swap_without_room(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        self.inner.swap_without_room(key, expected, bytes)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        self.inner.list(prefix, each)
    }

    fn folders(&self) -> Result<Vec<String>> {
        self.inner.folders()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tailed_model_has_the_median_and_the_tail_it_names() {
        let mut waits: Vec<_> =
            (0..100_000).map(|n| StoreModel::TAILED.wait(n).as_secs_f64() * 1e3).collect();
        waits.sort_by(f64::total_cmp);
        let (median, p999) = (waits[50_000], waits[99_900]);
        assert!((35.0..37.0).contains(&median), "{median} ms");
        assert!((160.0..190.0).contains(&p999), "{p999} ms");
    }

    #[test]
    fn parts_are_the_bytes_and_reads_are_counted() {
        let inner = super::super::open_url("memory://").unwrap();
        let bytes: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        inner.put_new("key", bytes.clone().into()).unwrap();
        let store = ModelledBackend::new(inner, None);
        let mut got = Vec::new();
        let mut take = |part: Bytes| {
            got.extend_from_slice(&part);
            true
        };
        assert!(store.get_parts("key", 1_000..150_000, &mut take).unwrap());
        assert_eq!(got, bytes[1_000..150_000]);
        assert!(!store.get_parts("other", 0..1, &mut |_| true).unwrap());
        assert_eq!(store.take_reads(), (2, 149_000));
    }
}
