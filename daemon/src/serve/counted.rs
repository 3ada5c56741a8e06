//! A store whose requests are counted and timed.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;

use dormouse_chunkstore::{
    Result,
    backend::{Backend, ObjectMeta, PutOutcome, Version},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Bounds of what a store takes, from a local disk's to a bucket's, in seconds.
const BOUNDS_S: [f64; 13] = [0.0001, 0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0];

#[derive(Clone, Copy, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ByRequest {
    request: &'static str,
    result: &'static str,
}

#[derive(Clone, Copy, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ByKind {
    request: &'static str,
}

/// What a store was asked.
#[derive(Clone, Debug)]
pub(super) struct StoreMetrics {
    requests: Family<ByRequest, Counter>,
    seconds: Family<ByKind, Histogram, fn() -> Histogram>,
    read_bytes: Counter,
    written_bytes: Counter,
}

impl Default for StoreMetrics {
    fn default() -> Self {
        StoreMetrics {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BOUNDS_S)),
            read_bytes: Counter::default(),
            written_bytes: Counter::default(),
        }
    }
}

impl StoreMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("store_requests", "Requests to the store", self.requests.clone());
        registry.register_with_unit(
            "store_request",
            "What requests to the store took",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register_with_unit(
            "store_read",
            "Bytes read from the store",
            Unit::Bytes,
            self.read_bytes.clone(),
        );
        registry.register_with_unit(
            "store_written",
            "Bytes written to the store",
            Unit::Bytes,
            self.written_bytes.clone(),
        );
    }

    fn time<T>(&self, request: &'static str, ask: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let answer = ask();
        let result = if answer.is_ok() { "ok" } else { "error" };
        self.requests.get_or_create(&ByRequest { request, result }).inc();
        self.seconds.get_or_create(&ByKind { request }).observe(begun.elapsed().as_secs_f64());
        answer
    }

    fn read(&self, bytes: usize) {
        self.read_bytes.inc_by(bytes as u64);
    }

    fn write<T>(&self, request: &'static str, bytes: usize, ask: impl FnOnce() -> Result<T>) -> Result<T> {
        let answer = self.time(request, ask);
        if answer.is_ok() {
            self.written_bytes.inc_by(bytes as u64);
        }
        answer
    }
}

/// A backend, counted.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) inner: Arc<dyn Backend>,
    pub(super) metrics: StoreMetrics,
}

impl Backend for Counted {
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
        let got = self.metrics.time("get", || self.inner.get(key, range))?;
        self.metrics.read(got.as_ref().map_or(0, Bytes::len));
        Ok(got)
    }

    fn get_parts(&self, key: &str, range: Range<u64>, each: &mut dyn FnMut(Bytes) -> bool) -> Result<bool> {
        let mut counted = |part: Bytes| {
            self.metrics.read(part.len());
            each(part)
        };
        self.metrics.time("get", || self.inner.get_parts(key, range, &mut counted))
    }

    fn get_at_hand(&self, key: &str, range: Range<u64>, into: &mut Vec<u8>) -> bool {
        let here = self.inner.get_at_hand(key, range, into);
        if here {
            self.metrics.read(into.len());
        }
        here
    }

    fn file(&self, key: &str) -> Option<std::fs::File> {
        self.inner.file(key)
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        self.metrics.time("head", || self.inner.head(key))
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        let len = bytes.len();
        self.metrics.write("put", len, || self.inner.put_new(key, bytes))
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        let len = bytes.len();
        self.metrics.write("put", len, || self.inner.put_again(key, bytes))
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        let got = self.metrics.time("get", || self.inner.get_versioned(key))?;
        self.metrics.read(got.0.as_ref().map_or(0, Bytes::len));
        Ok(got)
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let len = bytes.len();
        self.metrics.write("swap", len, || self.inner.swap(key, expected, bytes))
    }

    fn swap_without_room(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let len = bytes.len();
        self.metrics.write("swap", len, || self.inner.swap_without_room(key, expected, bytes))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.metrics.time("delete", || self.inner.delete(key))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        self.metrics.time("list", || self.inner.list(prefix, each))
    }

    fn keep_reserve(&self) {
        self.inner.keep_reserve();
    }

    fn release_reserve(&self) -> bool {
        self.inner.release_reserve()
    }
}
