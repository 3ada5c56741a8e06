//! A host whose clock is wrong: what has expired is for the store's clock to say.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use common::{Machine, fresh, memory_backend};
use dormouse_chunkstore::{
    GcOptions, NoProgress, Result,
    backend::{Backend, ObjectMeta, PutOutcome, Version},
};

const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;

/// A store whose clock is a year behind this host's: to the store, this host is a year ahead.
#[derive(Debug)]
struct Behind(Arc<dyn Backend>);

impl Backend for Behind {
    fn url(&self) -> &str {
        self.0.url()
    }
    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        self.0.get(key, range)
    }
    fn head(&self, key: &str) -> Result<Option<u64>> {
        self.0.head(key)
    }
    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        self.0.put_new(key, bytes)
    }
    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.0.put_again(key, bytes)
    }
    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        self.0.get_versioned(key)
    }
    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        self.0.swap(key, expected, bytes)
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.0.delete(key)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        self.0.list(prefix, &mut |meta| {
            each(ObjectMeta { modified_unix_ms: meta.modified_unix_ms.saturating_sub(YEAR_MS), ..meta });
        })
    }
}

#[test]
fn a_collector_whose_clock_is_ahead_ends_no_snapshot_before_its_time() {
    let backend: Arc<dyn Backend> = Arc::new(Behind(memory_backend()));
    let store = fresh(&backend, None);
    let machine = Machine::new(20, 5);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let at_once = GcOptions { grace: Duration::ZERO, dry_run: false };
    // Half a year to go, and half a year past, by the store's clock; by this host's both are past.
    for (name, expires) in [("kept", now - YEAR_MS / 2), ("old", now - YEAR_MS * 3 / 2)] {
        let mut request = machine.request(name, None);
        request.expires_unix_ms = expires;
        store.import(&request, &NoProgress).unwrap();
    }
    assert_eq!(store.gc(at_once).unwrap().expired, ["old"]);
    machine.remember().check(&store, "kept").unwrap();
}
