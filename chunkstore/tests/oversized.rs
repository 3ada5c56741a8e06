//! Objects far larger than any of their kind may be: whoever can write a bucket can put one there. They are named, and
//! cost the process no more than what its kind may take.
#![allow(clippy::unwrap_used)]

mod common;

use std::{path::PathBuf, time::Duration};

use common::{Machine, files_below, store_in};
use dormouse_chunkstore::{
    GcOptions, NoProgress, Resume, Store, StoreError, TouchedRun, VerifyDepth, VerifyReport,
};
use dormouse_core::Name;

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };
/// Sparse: it takes up no room, and reading it all takes up the machine's.
const HUGE: u64 = 1 << 40;

struct Scene {
    dir: tempfile::TempDir,
    store: Store,
    machine: Machine,
}

fn a() -> Name {
    Name::new("a").unwrap()
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = store_in(dir.path());
        let machine = Machine::new(60, 8);
        machine.import(&store, "a", None).unwrap();
        let first = TouchedRun { image: 0, pages: 0..20 };
        store.build_stream(&store.open_snapshot(&a()).unwrap(), &[first]).unwrap();
        Scene { dir, store, machine }
    }

    fn blow_up(&self, kind: &str) -> Vec<PathBuf> {
        let files = files_below(&self.dir.path().join("store/plain").join(kind));
        assert!(!files.is_empty(), "{kind}");
        for file in &files {
            std::fs::File::options().write(true).open(file).unwrap().set_len(HUGE).unwrap();
        }
        files
    }

    fn verify(&self) -> VerifyReport {
        self.store.verify(None, VerifyDepth::Content, &NoProgress).unwrap()
    }

    fn resume(&self) -> Resume {
        self.store.open_resume(&a()).unwrap()
    }
}

fn names(error: StoreError, kind: &str) -> bool {
    matches!(&error, StoreError::Damaged { key, .. } if key.contains(kind))
}

#[test]
fn a_reference_or_root_of_a_terabyte_is_named_by_whoever_reads_it() {
    for kind in ["refs", "roots"] {
        let scene = Scene::new();
        scene.blow_up(kind);
        let store = &scene.store;
        assert!(names(store.open_snapshot(&a()).unwrap_err(), kind), "{kind}");
        assert!(names(store.gc(AT_ONCE).unwrap_err(), kind), "{kind}");
        assert!(names(store.repack(Default::default(), &NoProgress).unwrap_err(), kind), "{kind}");
        assert!(store.list().unwrap().iter().all(|s| s.damaged.is_some()), "{kind}");
        let report = scene.verify();
        assert!(report.damages.iter().any(|d| d.object.contains(kind)), "{kind}: {report:?}");
        // Even then it can be removed.
        store.remove(&a()).unwrap();
        store.gc(AT_ONCE).unwrap();
        assert!(scene.verify().is_clean());
    }
}

#[test]
fn a_pack_of_a_terabyte_is_damaged_and_its_frames_are_not() {
    let scene = Scene::new();
    let packs = scene.blow_up("packs").len();
    let report = scene.verify();
    let damaged = report.damages.iter().filter(|d| d.object.contains("packs")).count();
    assert_eq!(damaged, packs, "{report:?}");
    scene.machine.remember().check(&scene.store, "a").unwrap();
    // Repaired from what is whole in it, which is all.
    let report = scene.store.repair(None, &Default::default(), &NoProgress).unwrap();
    assert!(report.left.is_clean(), "{report:?}");
    scene.store.gc(AT_ONCE).unwrap();
    scene.machine.remember().check(&scene.store, "a").unwrap();
}

#[test]
fn what_follows_a_stream_is_not_read_and_a_mark_or_announcement_of_a_terabyte_is_named() {
    let scene = Scene::new();
    scene.blow_up("streams");
    let mut pages = 0;
    scene.resume().stream.unwrap().for_each_run(1, &|_, _, _| Ok(())).unwrap();
    pages += scene.store.stream_info(&a()).unwrap().unwrap().head.pages();
    assert_eq!(pages, 20);
    let below = |kind: &str| scene.dir.path().join("store/plain").join(kind);
    for kind in ["condemned", "announced"] {
        std::fs::create_dir_all(below(kind)).unwrap();
        std::fs::write(below(kind).join("7".repeat(64)), b"x").unwrap();
        scene.blow_up(kind);
    }
    assert!(names(scene.store.gc(AT_ONCE).unwrap_err(), "announced"));
    std::fs::remove_dir_all(below("announced")).unwrap();
    scene.store.gc(AT_ONCE).unwrap();
    scene.machine.remember().check(&scene.store, "a").unwrap();
}

/// As a cloud's store would be read: the body is not, beyond what any name may have.
#[test]
fn a_name_that_is_too_large_in_an_object_store_is_damaged_and_can_be_removed() {
    let backend = common::memory_backend();
    let store = common::fresh(&backend, None);
    Machine::new(20, 2).import(&store, "a", None).unwrap();
    let mut object = backend.get("plain/refs/a", None).unwrap().unwrap().to_vec();
    object.resize(8 << 20, 0);
    backend.put_again("plain/refs/a", object.into()).unwrap();
    let (read, version) = backend.get_versioned("plain/refs/a").unwrap();
    assert!(read.unwrap().len() < 100_000 && version.is_some());
    assert!(names(store.open_snapshot(&a()).unwrap_err(), "refs"));
    store.remove(&a()).unwrap();
    assert!(matches!(store.open_snapshot(&a()), Err(StoreError::NoSuchSnapshot { .. })));
}
