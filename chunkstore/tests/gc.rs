//! Garbage collection takes what nobody needs and nothing else.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use common::{Machine, assert_same, files_below, store_in};
use dormouse_chunkstore::{GcOptions, NoProgress, Store, StoreError, VerifyDepth};
use dormouse_core::{ImageKind, Name};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

fn memory_is(store: &Store, snapshot: &str, machine: &Machine) {
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("memory");
    let opened = store.open_snapshot(&name(snapshot)).unwrap();
    opened.image(ImageKind::Memory, "memory").unwrap().export(&to, &NoProgress).unwrap();
    assert_same(machine.path("memory"), to);
}

#[test]
fn what_only_a_removed_snapshot_used_is_deleted_and_the_rest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(300, 20);
    machine.import(&store, "a", None).unwrap();
    machine.change(1, 30);
    machine.import(&store, "b", Some("a")).unwrap();
    store.remove(&name("a")).unwrap();
    let report = store.gc(AT_ONCE).unwrap();
    assert!(report.deleted_objects >= 1, "{report:?}");
    memory_is(&store, "b", &machine);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    store.remove(&name("b")).unwrap();
    store.gc(AT_ONCE).unwrap();
    let left: Vec<_> = files_below(&dir.path().join("store"));
    let kept = |p: &std::path::PathBuf| {
        p.ends_with("lock") || p.ends_with("identity") || p.parent().unwrap().ends_with("refs")
    };
    assert!(left.len() <= 4 && left.iter().all(kept), "the lock, the identity and two tombstones: {left:?}");
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_dry_run_says_what_it_would_do_and_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    Machine::new(50, 5).import(&store, "a", None).unwrap();
    store.remove(&name("a")).unwrap();
    let before = files_below(&dir.path().join("store"));
    let dry = store.gc(GcOptions { dry_run: true, ..AT_ONCE }).unwrap();
    assert_eq!(before, files_below(&dir.path().join("store")));
    let real = store.gc(AT_ONCE).unwrap();
    assert_eq!((dry.deleted_objects, dry.deleted_bytes), (real.deleted_objects, real.deleted_bytes));
}

#[test]
fn page_maps_that_generations_share_are_read_once() {
    use dormouse_chunkstore::backend::faulty::FaultyBackend;
    let counting = std::sync::Arc::new(FaultyBackend::counting(common::memory_backend()));
    let store = Store::with_backend(counting.clone(), Default::default());
    // Nine sections of memory and one of disk.
    let mut machine = Machine::new(98_304, 20);
    machine.import(&store, "g0", None).unwrap();
    for generation in 1..=5u64 {
        let dirty = machine.change_memory_pages(&[generation * 7]);
        machine
            .import_dirty(&store, &format!("g{generation}"), &format!("g{}", generation - 1), dirty)
            .unwrap();
    }
    let sections = store.open_snapshot(&name("g0")).unwrap();
    let sections: usize = sections.root().images.iter().flat_map(|i| &i.sections).flatten().count();
    counting.counts().take();
    store.gc(GcOptions::default()).unwrap();
    // Expiry and both rounds read the 6 references, the first also 6 roots; all maps of g0, then one a generation. The
    // lease is read three times.
    assert_eq!(counting.counts().take().gets, 3 * 6 + 6 + sections as u64 + 5 + 3);
}

#[test]
fn the_grace_time_keeps_young_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    Machine::new(50, 5).import(&store, "a", None).unwrap();
    store.remove(&name("a")).unwrap();
    let report = store.gc(GcOptions::default()).unwrap();
    assert_eq!((report.condemned_objects, report.deleted_objects), (0, 0));
}

#[test]
fn a_damaged_reference_stops_collection() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    Machine::new(50, 5).import(&store, "a", None).unwrap();
    let key = dir.path().join("store/plain/refs/a");
    let mut bytes = std::fs::read(&key).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&key, bytes).unwrap();
    assert!(matches!(store.gc(AT_ONCE), Err(StoreError::Damaged { .. })));
    assert!(files_below(&dir.path().join("store")).len() >= 4);
}

#[test]
fn an_expired_snapshot_goes_and_one_without_expiry_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(20, 5);
    let mut request = machine.request("old", None);
    request.expires_unix_ms = 1;
    store.import(&request, &NoProgress).unwrap();
    machine.import(&store, "kept", None).unwrap();
    assert_eq!(store.gc(AT_ONCE).unwrap().expired, ["old"]);
    memory_is(&store, "kept", &machine);
}

/// Eight hosts import and remove while a collector deletes at once, all the time.
#[test]
fn eight_writers_and_a_collector_lose_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    let (acknowledged, lost_races) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8u64)
            .map(|w| {
                let (dir, acknowledged, lost_races) = (dir.path(), &acknowledged, &lost_races);
                scope.spawn(move || {
                    // All writers store much the same pages, so that they share what others are dropping.
                    let store = common::store_with_cache(dir, &format!("cache{w}"));
                    let mut machine = Machine::new(60, 5);
                    for generation in 0..6 {
                        machine.change(generation, 20);
                        let me = format!("w{w}");
                        let mut request = machine.request(&me, (generation > 0).then_some(me.as_str()));
                        request.replace = true;
                        match store.import(&request, &NoProgress) {
                            Ok(_) => {
                                acknowledged.fetch_add(1, Ordering::SeqCst);
                                memory_is(&store, &me, &machine);
                            }
                            Err(StoreError::LostRace { .. }) => {
                                lost_races.fetch_add(1, Ordering::SeqCst);
                                let _ = store.remove(&name(&me));
                                request.parent = None;
                                while store.import(&request, &NoProgress).is_err() {}
                            }
                            Err(e) => panic!("writer {w}: {e}"),
                        }
                        memory_is(&store, &me, &machine);
                    }
                    machine
                })
            })
            .collect();
        let collector = scope.spawn(|| {
            let store = common::store_with_cache(dir.path(), "collector");
            let mut deleted = 0;
            while !done.load(Ordering::SeqCst) {
                match store.gc(AT_ONCE) {
                    // The first writer is not there yet.
                    Err(StoreError::NothingStored { .. }) => {}
                    report => deleted += report.unwrap().deleted_objects,
                }
            }
            deleted
        });
        let machines: Vec<Machine> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        done.store(true, Ordering::SeqCst);
        assert!(collector.join().unwrap() > 0, "the collector had work");
        let store = store_in(dir.path());
        for (w, machine) in machines.iter().enumerate() {
            memory_is(&store, &format!("w{w}"), machine);
        }
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    });
    assert!(acknowledged.load(Ordering::SeqCst) > 0);
}

#[test]
fn repacking_keeps_identities_and_content_and_collects_what_was_wasteful() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(400, 30);
    machine.import(&store, "g0", None).unwrap();
    for generation in 1..5u64 {
        machine.change(generation, 60);
        machine.import(&store, &format!("g{generation}"), Some(&format!("g{}", generation - 1))).unwrap();
    }
    let ids =
        |store: &Store| store.list().unwrap().into_iter().map(|s| (s.name, s.snapshot)).collect::<Vec<_>>();
    let packs = || files_below(&dir.path().join("store/plain/packs")).len();
    let (before, used, packs_before) = (ids(&store), store.usage().unwrap().total.stored_bytes, packs());
    let report = store.repack(Default::default(), &NoProgress).unwrap();
    assert_eq!(report.moved_snapshots, 5, "{report:?}");
    store.gc(AT_ONCE).unwrap();
    assert_eq!(before, ids(&store));
    let now = store.usage().unwrap().total.stored_bytes;
    // Random pages do not become denser, and what marks a pack as a new one takes up some forty bytes in each.
    assert!(now < used + used / 1000 && packs() < packs_before, "{now} of {used}, {} packs", packs());
    memory_is(&store, "g4", &machine);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    let again = store.repack(Default::default(), &NoProgress).unwrap();
    assert_eq!((again.rewritten_packs, again.new_bytes), (0, 0), "dense packs are left alone");
    // Most of what the packs hold dies: they are worth rewriting again.
    for generation in 0..4 {
        store.remove(&name(&format!("g{generation}"))).unwrap();
    }
    machine.change(9, 300);
    machine.import(&store, "g9", Some("g4")).unwrap();
    store.remove(&name("g4")).unwrap();
    assert!(store.repack(Default::default(), &NoProgress).unwrap().rewritten_packs >= 2);
    store.gc(AT_ONCE).unwrap();
    memory_is(&store, "g9", &machine);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

/// An hour passes for the file of an object.
fn grow_old(path: &std::path::Path) {
    let an_hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(an_hour_ago).unwrap();
}

/// A put that is killed leaves the file it was writing, under a name that no listing shows.
#[test]
fn what_a_killed_put_left_half_written_is_swept_when_its_writer_is_dead_for_sure() {
    let dir = tempfile::tempdir().unwrap();
    let store = common::encrypted_store_in(dir.path(), 3);
    let machine = Machine::new(50, 5);
    machine.import(&store, "a", None).unwrap();
    let root = dir.path().join("store");
    let whole = files_below(&root);
    // As it happens to objects of every kind: each has one that its writer never finished, and one being written.
    let (mut old, mut young) = (Vec::new(), Vec::new());
    for object in whole.iter().filter(|p| !p.ends_with("lock")) {
        let staged = |number: u32| {
            object.with_file_name(format!("{}#{number}", object.file_name().unwrap().to_str().unwrap()))
        };
        old.push(staged(1));
        young.push(staged(23));
        for path in [staged(1), staged(23)] {
            std::fs::write(path, b"half of it").unwrap();
        }
        grow_old(&staged(1));
    }
    assert!(old.len() >= 5, "a keyring, a reference, a root, packs: {old:?}");
    let dry = store.gc(GcOptions { dry_run: true, ..AT_ONCE }).unwrap();
    assert!(old.iter().chain(&young).all(|p| p.exists()));
    let report = store.gc(AT_ONCE).unwrap();
    for report in [dry, report] {
        assert_eq!((report.leftover_files, report.leftover_bytes), (old.len() as u64, 10 * old.len() as u64));
        assert_eq!((report.deleted_objects, report.condemned_objects), (0, 0));
    }
    assert!(old.iter().all(|p| !p.exists()) && young.iter().all(|p| p.exists()));
    machine.remember().check(&store, "a").unwrap();
    // Whoever takes a silent writer for dead at once sweeps at once.
    drop(store);
    young.iter().for_each(|path| grow_old(path));
    let options = dormouse_chunkstore::StoreOptions {
        key: Some(dormouse_core::DomainKey::new([3; 32])),
        lease: Duration::ZERO,
        ..Default::default()
    };
    let hasty = Store::open(root.to_str().unwrap(), options).unwrap();
    assert_eq!(hasty.gc(AT_ONCE).unwrap().leftover_files, young.len() as u64);
    assert_eq!(hasty.gc(AT_ONCE).unwrap().leftover_files, 0);
    hasty.remove(&name("a")).unwrap();
    hasty.gc(AT_ONCE).unwrap();
    let left = files_below(&root);
    let folder = |p: &std::path::PathBuf, name: &str| p.parent().unwrap().ends_with(name);
    let kept = |p: &std::path::PathBuf| {
        p.ends_with("lock") || p.ends_with("identity") || folder(p, "keys") || folder(p, "refs")
    };
    assert!(left.iter().all(kept), "the lock, the identity, the keyring and a tombstone: {left:?}");
}

#[test]
fn repacking_a_little_at_a_time_ends_where_repacking_at_once_does() {
    use dormouse_chunkstore::RepackOptions;
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(400, 30);
    machine.import(&store, "g0", None).unwrap();
    for generation in 1..6u64 {
        machine.change(generation, 60);
        machine.import(&store, &format!("g{generation}"), Some(&format!("g{}", generation - 1))).unwrap();
    }
    let ids = |store: &Store| -> Vec<_> {
        store.list().unwrap().into_iter().map(|s| (s.name, s.snapshot)).collect()
    };
    let (before, used) = (ids(&store), store.usage().unwrap().total);
    let options = RepackOptions { level: 3, max_bytes: Some(150_000), ..Default::default() };
    let dry = store.repack(RepackOptions { dry_run: true, ..options }, &NoProgress).unwrap();
    let (mut rounds, mut left) = (0, 6);
    loop {
        let report = store.repack(options, &NoProgress).unwrap();
        if report.rewritten_packs == 0 {
            assert_eq!((left, report.new_bytes), (0, 0));
            break;
        }
        if rounds == 0 {
            assert_eq!((dry.rewritten_packs, dry.left_packs), (report.rewritten_packs, report.left_packs));
            assert_eq!(
                report.rewritten_packs, 1,
                "the first is larger than the bound, and one there must be"
            );
        } else {
            assert!(report.rewritten_bytes <= 150_000, "{report:?}");
        }
        assert_eq!(report.left_packs, left - report.rewritten_packs, "{report:?}");
        left = report.left_packs;
        rounds += 1;
        store.gc(AT_ONCE).unwrap();
        memory_is(&store, "g5", &machine);
    }
    assert!((3..=6).contains(&rounds), "{rounds}");
    assert_eq!(ids(&store), before);
    assert!(store.usage().unwrap().total.unique_bytes <= used.unique_bytes);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

#[test]
fn what_is_condemned_and_not_yet_deleted_is_not_shared_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(50, 5);
    machine.import(&store, "a", None).unwrap();
    store.remove(&name("a")).unwrap();
    files_below(&dir.path().join("store")).iter().for_each(|path| grow_old(path));
    let soon = GcOptions { grace: Duration::from_millis(1), dry_run: false };
    assert!(store.gc(soon).unwrap().condemned_objects >= 2);
    // The same pages, by the host that knows them and by one that finds them in the listing.
    let stranger = common::store_with_cache(dir.path(), "stranger");
    for (name, store) in [("b", &store), ("c", &stranger)] {
        machine.import(store, name, None).unwrap();
        memory_is(store, name, &machine);
    }
    store.gc(AT_ONCE).unwrap();
    store.gc(AT_ONCE).unwrap();
    memory_is(&store, "b", &machine);
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}
