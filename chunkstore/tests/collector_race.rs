//! Eight writers, a collector and a repacker race, each on a host of its own, and nothing acknowledged is lost.
//!
//! For `DORMOUSE_RACE_SECONDS` on each kind of store; a few seconds unless told otherwise.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{Machine, Remembered, fresh, memory_backend};
use dormouse_chunkstore::{
    GcOptions, NoProgress, RepackOptions, Result, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{Backend, open_url},
};
use dormouse_core::Name;

const WRITERS: u64 = 8;
/// Names that one writer keeps.
const NAMES: u64 = 3;
const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

fn seconds() -> Duration {
    let told = std::env::var("DORMOUSE_RACE_SECONDS").ok().map(|s| s.parse().unwrap());
    Duration::from_secs(told.unwrap_or(4))
}

#[derive(Default)]
struct Counts {
    acknowledged: AtomicU64,
    children: AtomicU64,
    removed: AtomicU64,
    again: AtomicU64,
    checked: AtomicU64,
    collections: AtomicU64,
    deleted: AtomicU64,
    repackings: AtomicU64,
    moved: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::SeqCst);
}

/// With no grace, who opened a snapshot that is repacked and collected meanwhile has to open it anew: so says
/// [`StoreError::Missing`]. Whatever else happens is an error.
fn until_undisturbed<T>(counts: &Counts, act: impl Fn() -> Result<T>) -> T {
    for _ in 0..50 {
        match act() {
            Ok(done) => return done,
            Err(StoreError::Missing { .. } | StoreError::LostRace { .. } | StoreError::Conflict { .. }) => {
                add(&counts.again, 1);
            }
            Err(e) => panic!("{e:?}"),
        }
    }
    panic!("never undisturbed");
}

/// Imports, removes and reads its own names until `end`; gives what was acknowledged last of each.
fn write(writer: u64, store: &Store, end: Instant, counts: &Counts) -> BTreeMap<String, Remembered> {
    // All writers store much the same pages, so that they share what others are dropping.
    let mut machine = Machine::new(60, 5);
    let mut acknowledged: BTreeMap<String, Remembered> = BTreeMap::new();
    for round in 0.. {
        if Instant::now() >= end && round > NAMES {
            break;
        }
        machine.change(round % 40, 20);
        let me = format!("w{writer}-{}", round % NAMES);
        let parent = format!("w{writer}-{}", (round + NAMES - 1) % NAMES);
        match round % 7 {
            3 if acknowledged.remove(&me).is_some() => {
                until_undisturbed(counts, || store.remove(&Name::new(&me).unwrap()));
                add(&counts.removed, 1);
                continue;
            }
            5 => {
                for (name, machine) in &acknowledged {
                    until_undisturbed(counts, || machine.check(store, name));
                    add(&counts.checked, 1);
                }
            }
            _ => {}
        }
        let parent = (round % 4 != 0).then_some(parent).filter(|p| acknowledged.contains_key(p));
        let mut request = machine.request(&me, parent.as_deref());
        request.replace = true;
        until_undisturbed(counts, || store.import(&request, &NoProgress));
        add(&counts.acknowledged, 1);
        add(&counts.children, u64::from(parent.is_some()));
        acknowledged.insert(me, machine.remember());
    }
    acknowledged
}

/// Somebody else has the lease, or has just taken it.
fn is_busy(error: &StoreError) -> bool {
    match error {
        StoreError::Busy { .. } => true,
        StoreError::Conflict { name } => name.contains("lease"),
        _ => false,
    }
}

fn race(backend: &Arc<dyn Backend>, caches: &std::path::Path, what: &str) {
    let host = |name: &str| {
        let options = StoreOptions { cache_dir: Some(caches.join(name)), ..Default::default() };
        Store::with_backend(backend.clone(), options)
    };
    let counts = Counts::default();
    let end = Instant::now() + seconds();
    let acknowledged: Vec<BTreeMap<String, Remembered>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|w| {
                let (store, counts) = (host(&format!("writer{w}")), &counts);
                scope.spawn(move || write(w, &store, end, counts))
            })
            .collect();
        let collector = scope.spawn(|| {
            let store = host("collector");
            while Instant::now() < end || counts.deleted.load(Ordering::SeqCst) == 0 {
                match store.gc(AT_ONCE) {
                    Ok(report) => {
                        add(&counts.collections, 1);
                        add(&counts.deleted, report.deleted_objects);
                    }
                    // No writer has come that far yet.
                    Err(StoreError::NothingStored { .. }) => {}
                    Err(e) if is_busy(&e) => {}
                    Err(e) => panic!("collecting: {e:?}"),
                }
                // The lease is for the other as well.
                thread::sleep(Duration::from_millis(10));
            }
        });
        let repacker = scope.spawn(|| {
            let store = host("repacker");
            let mut round = 0;
            while Instant::now() < end || counts.moved.load(Ordering::SeqCst) == 0 {
                round += 1;
                let max_bytes = (round % 2 == 0).then_some(200_000);
                match store.repack(RepackOptions { level: 1, max_bytes, ..Default::default() }, &NoProgress) {
                    Ok(report) => {
                        add(&counts.repackings, 1);
                        add(&counts.moved, report.moved_snapshots);
                    }
                    // A snapshot that a writer replaced while it was looked at, and whose objects are gone already.
                    Err(StoreError::Missing { .. }) => add(&counts.again, 1),
                    Err(StoreError::NothingStored { .. }) => {}
                    Err(e) if is_busy(&e) => {}
                    Err(e) => panic!("repacking: {e:?}"),
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let all = writers.into_iter().map(|w| w.join().unwrap()).collect();
        collector.join().unwrap();
        repacker.join().unwrap();
        all
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    println!(
        "{what}, {} s: {} imports acknowledged ({} of a parent), {} removals, {} read back meanwhile, {} collections deleted {} \
         objects, {} repackings moved {} snapshots, {} times again",
        seconds().as_secs(),
        count(&counts.acknowledged),
        count(&counts.children),
        count(&counts.removed),
        count(&counts.checked),
        count(&counts.collections),
        count(&counts.deleted),
        count(&counts.repackings),
        count(&counts.moved),
        count(&counts.again),
    );
    for counter in [&counts.children, &counts.deleted, &counts.moved] {
        assert!(count(counter) > 0, "everybody had work");
    }
    let store = fresh(backend, None);
    let names: Vec<String> = store.list().unwrap().into_iter().map(|s| s.name).collect();
    assert!(acknowledged.iter().flat_map(BTreeMap::keys).eq(&names), "what was acknowledged, and no more");
    let check = |how: &str| {
        for (name, machine) in acknowledged.iter().flatten() {
            machine.check(&fresh(backend, None), name).unwrap_or_else(|e| panic!("{how}: {name}: {e}"));
        }
        let report = fresh(backend, None).verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(report.is_clean(), "{how}: {report:?}");
    };
    check("after the race");
    store.gc(AT_ONCE).unwrap();
    check("after a last collection");
    let nothing = store.gc(AT_ONCE).unwrap();
    assert_eq!((nothing.live_objects, nothing.deleted_objects), (nothing.objects, 0), "{nothing:?}");
}

#[test]
fn nothing_acknowledged_is_lost_in_a_local_directory() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open_url(dir.path().join("store").to_str().unwrap()).unwrap();
    race(&backend, &dir.path().join("caches"), "a local directory");
}

#[test]
fn nothing_acknowledged_is_lost_in_an_object_store() {
    let dir = tempfile::tempdir().unwrap();
    race(&memory_backend(), dir.path(), "objects in memory");
}
