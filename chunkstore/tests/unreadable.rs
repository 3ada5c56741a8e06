//! An object that the store does not give out is named, is not taken for lost, and hides nothing else.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{Machine, copy_of, memory_backend, objects};
use dormouse_chunkstore::{
    NoProgress, RepairOptions, RepairSource, Store, StoreError, StoreOptions, UnreadableKind, VerifyDepth,
    backend::{
        Backend,
        faulty::{Fault, FaultyBackend},
    },
};
use dormouse_core::Name;

const DEPTHS: [VerifyDepth; 2] = [VerifyDepth::Structure, VerifyDepth::Content];
const FAULTS: [(Fault, UnreadableKind); 2] =
    [(Fault::Archive, UnreadableKind::Archived), (Fault::Deny, UnreadableKind::Unreadable)];

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

fn flipped(bytes: &Bytes, at: usize) -> Bytes {
    let mut flipped = bytes.to_vec();
    flipped[at] ^= 1;
    flipped.into()
}

fn open(backend: Arc<dyn Backend>) -> Store {
    Store::with_backend(backend, StoreOptions::default())
}

/// Snapshots `a` and `b`, which share nothing.
struct Scene {
    backend: Arc<dyn Backend>,
    /// Objects that `a` alone needs.
    of_a: Vec<String>,
    /// The largest pack of `b`, whose footer is damaged.
    damaged: String,
}

impl Scene {
    fn new() -> Self {
        let backend = memory_backend();
        let store = open(backend.clone());
        Machine::unlike(3, 40, 3).import(&store, "a", None).unwrap();
        let of_a: Vec<String> =
            objects(&*backend).into_keys().filter(|key| !key.contains("/identity")).collect();
        let mut other = Machine::unlike(5, 40, 3);
        other.state = b"another machine's state".repeat(100);
        other.import(&store, "b", None).unwrap();
        let of_b = objects(&*backend).into_iter().filter(|(key, _)| !of_a.contains(key));
        let (damaged, bytes) = of_b.max_by_key(|(_, bytes)| bytes.len()).unwrap();
        backend.put_again(&damaged, flipped(&bytes, bytes.len() - 60)).unwrap();
        let mut of_a = of_a;
        of_a.retain(|key| ["/refs/", "/roots/", "/packs/"].iter().any(|part| key.contains(part)));
        assert!(of_a.len() >= 4, "a reference, a root, a pack of pages and one of maps: {of_a:?}");
        Scene { backend, of_a, damaged }
    }

    /// A store in which every use of `object` ends like this.
    fn without(backend: &Arc<dyn Backend>, object: &str, fault: Fault) -> Store {
        let object = object.to_owned();
        open(Arc::new(FaultyBackend::new(backend.clone(), move |_, _, key| (key == object).then_some(fault))))
    }
}

#[test]
fn verification_names_it_and_goes_on_with_the_rest() {
    let scene = Scene::new();
    for (fault, kind) in FAULTS {
        for object in &scene.of_a {
            let store = Scene::without(&scene.backend, object, fault);
            for depth in DEPTHS {
                let how = format!("{fault:?} of {object}, {depth:?}");
                let report = store.verify(None, depth, &NoProgress).unwrap();
                // The size of an archived object can be looked up. That of pages says nothing else.
                let is_seen =
                    depth == VerifyDepth::Content || fault == Fault::Deny || report.unreadable.len() == 1;
                assert!(is_seen || object.contains("/packs/"), "{how}: {report:?}");
                for unreadable in &report.unreadable {
                    assert_eq!((&unreadable.object, unreadable.kind), (object, kind), "{how}");
                    assert!(unreadable.why.contains(object.as_str()), "{how}: {}", unreadable.why);
                    assert_eq!(unreadable.hurts, ["a"], "{how}");
                }
                if depth == VerifyDepth::Content {
                    assert_eq!(report.unreadable.len(), 1, "{how}: {report:?}");
                    assert_eq!(report.damages.len(), 1, "{how}: {report:?}");
                    assert_eq!(report.damages[0].object, scene.damaged, "{how}");
                } else {
                    assert!(report.damages.is_empty(), "{how}: it is no damage: {report:?}");
                    assert_eq!(report.is_clean(), report.unreadable.is_empty(), "{how}");
                }
                let alone = store.verify(Some(&name("a")), depth, &NoProgress).unwrap();
                assert_eq!(alone.unreadable, report.unreadable, "{how}");
            }
        }
    }
}

#[test]
fn repair_leaves_it_alone_and_repairs_the_rest() {
    let scene = Scene::new();
    let identity = objects(&*scene.backend).into_keys().find(|key| key.contains("identity")).unwrap();
    for (fault, kind) in FAULTS {
        for object in scene.of_a.iter().chain([&identity]) {
            let how = format!("{fault:?} of {object}");
            let backend = copy_of(&*scene.backend);
            // A copy of everything is at hand, and still nothing is taken for lost.
            let before = objects(&*backend);
            let report = Scene::without(&backend, object, fault)
                .repair(None, &RepairOptions::default(), &NoProgress)
                .unwrap();
            assert_eq!(report.left.unreadable.len(), 1, "{how}: {report:?}");
            assert_eq!((&report.left.unreadable[0].object, report.left.unreadable[0].kind), (object, kind));
            assert!(report.left.damages.is_empty() && !report.left.is_clean(), "{how}: {report:?}");
            let repaired: Vec<_> = report.repaired.iter().map(|r| &r.object).collect();
            assert_eq!(repaired, [&scene.damaged], "{how}");
            let after = objects(&*backend);
            assert!(scene.of_a.iter().all(|key| before[key] == after[key]), "{how}");
            assert_eq!(before[&identity], after[&identity], "{how}");
            // Once it can be read, all is well.
            let report = open(backend).verify(None, VerifyDepth::Content, &NoProgress).unwrap();
            assert!(report.is_clean(), "{how}: {report:?}");
        }
    }
}

#[test]
fn a_store_that_permits_nothing_any_more_ends_it() {
    let scene = Scene::new();
    for part in ["/roots/", "/packs/"] {
        // Credentials run out in the midst.
        let gone = std::sync::atomic::AtomicBool::new(false);
        let expired = FaultyBackend::new(scene.backend.clone(), move |_, _, key| {
            let now = gone.fetch_or(key.contains(part), std::sync::atomic::Ordering::SeqCst);
            (now || key.contains(part)).then_some(Fault::Deny)
        });
        let error = open(Arc::new(expired)).verify(None, VerifyDepth::Content, &NoProgress).unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{part}: {error:?}");
    }
}

#[test]
fn a_root_with_bytes_behind_its_end_is_put_back() {
    let backend = memory_backend();
    let store = open(backend.clone());
    Machine::new(40, 3).import(&store, "a", None).unwrap();
    let (key, bytes) = objects(&*backend).into_iter().find(|(key, _)| key.contains("/roots/")).unwrap();
    // A few bytes, and more than any root has.
    for more in [1, 100, 80 << 20] {
        backend.put_again(&key, [&bytes[..], &vec![7; more]].concat().into()).unwrap();
        assert!(open(backend.clone()).open_snapshot(&name("a")).is_err());
        let report = open(backend.clone()).repair(None, &RepairOptions::default(), &NoProgress).unwrap();
        assert!(report.left.is_clean(), "{more} bytes more: {report:?}");
        assert_eq!(report.repaired[0].object, key);
        assert!(report.repaired[0].sources.iter().eq([&RepairSource::SameObject]));
        assert_eq!(backend.get(&key, None).unwrap().unwrap(), bytes);
    }
    // One whose start is damaged as well has no copy anywhere.
    let broken = [&flipped(&bytes, bytes.len() / 2)[..], &[7; 9]].concat();
    backend.put_again(&key, broken.clone().into()).unwrap();
    let report = open(backend.clone()).repair(None, &RepairOptions::default(), &NoProgress).unwrap();
    assert_eq!((report.left.damages.len(), report.repaired.len()), (1, 0), "{report:?}");
    assert_eq!(backend.get(&key, None).unwrap().unwrap(), broken);
}

/// What a page map that cannot be read needs of a damaged pack, nobody knows: it is found once the map can be read again.
#[test]
fn a_snapshot_whose_page_maps_are_archived_is_repaired_once_they_are_back() {
    let (backend, dir) = (memory_backend(), tempfile::tempdir().unwrap());
    let home = |backend: Arc<dyn Backend>| {
        let cache_dir = Some(dir.path().join("home"));
        Store::with_backend(backend, StoreOptions { cache_dir, ..Default::default() })
    };
    let mut machine = Machine::new(70, 12);
    machine.import(&home(backend.clone()), "a", None).unwrap();
    let of_a = objects(&*backend);
    let (first, files) =
        (machine.remember(), machine.files().map(|(id, _, path)| (dir.path().join(id), path)));
    files.iter().for_each(|(to, from)| assert!(std::fs::copy(from, to).is_ok()));
    machine.change(1, 9);
    machine.import(&home(backend.clone()), "b", Some("a")).unwrap();
    let second = machine.remember();
    let largest =
        of_a.iter().filter(|(key, _)| key.contains("/packs/")).max_by_key(|(_, b)| b.len()).unwrap();
    // The name alone is left of the pages that both share.
    backend.put_again(largest.0, Bytes::new()).unwrap();
    let archived: Vec<String> =
        objects(&*backend).into_keys().filter(|k| k.contains("/packs/") && !of_a.contains_key(k)).collect();
    let tier = Arc::new(FaultyBackend::new(backend.clone(), move |_, _, key| {
        archived.iter().any(|a| a == key).then_some(Fault::Archive)
    }));
    let from: Vec<_> = files.into_iter().map(|(to, _)| to).collect();
    let report = home(tier.clone()).repair(None, &RepairOptions { from }, &NoProgress).unwrap();
    let left = &report.left;
    assert!(!left.unreadable.is_empty() && left.unreadable.iter().all(|u| u.hurts == ["b"]), "{report:?}");
    assert!(left.damages.is_empty(), "all that is known to be damaged was had back: {report:?}");
    first.check(&open(backend.clone()), "a").unwrap();
    // What was had back for one is there for the other.
    tier.set_plan(|_, _, _| None);
    let report = home(tier).repair(None, &RepairOptions::default(), &NoProgress).unwrap();
    assert!(report.left.is_clean(), "{report:?}");
    first.check(&open(backend.clone()), "a").unwrap();
    second.check(&open(backend), "b").unwrap();
}
