//! The damage matrix: every kind of object, damaged in every way, in plain and encrypted stores.
//!
//! Whatever is done to an object, each snapshot either comes out byte for byte or fails with an error that names
//! the object, and `verify` names the object and exactly the snapshots that fail.
#![allow(clippy::unwrap_used)]

mod common;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use common::{Machine, Remembered, fresh, memory_backend, objects};
use dormouse_chunkstore::{
    NoProgress, Store, StoreError, VerifyDepth,
    backend::{Backend, open_url},
};
use dormouse_core::{
    Name, PackFooter, PackId,
    pack::{FrameKind, HEADER_BYTES, TRAILER_BYTES, parse_trailer},
};

/// `b` is a child of `a` and shares packs with it; `c` shares nothing with either.
struct Scene {
    backend: Arc<dyn Backend>,
    key: Option<u8>,
    machines: [(&'static str, Remembered); 3],
    objects: Vec<Object>,
}

struct Object {
    key: String,
    bytes: Bytes,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Reference,
    Root,
    PagePack,
    MetadataPack,
}

impl Scene {
    fn new(backend: Arc<dyn Backend>, key: Option<u8>) -> Self {
        let store = fresh(&backend, key);
        let mut ab = Machine::new(40, 12);
        let c = Machine::unlike(5, 34, 3);
        ab.import(&store, "a", None).unwrap();
        let a = ab.remember();
        ab.change(1, 9);
        ab.import(&store, "b", Some("a")).unwrap();
        c.import(&store, "c", None).unwrap();
        let machines = [("a", a), ("b", ab.remember()), ("c", c.remember())];
        // The keyring is another matter: without it there is no domain at all. It has a test of its own, and so has the
        // identity, which no snapshot needs.
        let is_of_snapshots = |key: &str| !key.starts_with("keys/") && !key.ends_with("/identity");
        let of_domain = objects(&*backend).into_iter().filter(|(key, _)| is_of_snapshots(key));
        let objects = of_domain.map(|(key, bytes)| {
            let kind = kind_of(&store, &key, &bytes);
            Object { key, bytes, kind }
        });
        let scene = Scene { key, machines, objects: objects.collect(), backend };
        let count = |kind| scene.objects.iter().filter(|o| o.kind == kind).count();
        use Kind::{MetadataPack, PagePack, Reference, Root};
        assert_eq!([Reference, Root, PagePack, MetadataPack].map(count), [3, 3, 3, 3]);
        assert!(scene.judge(&scene.objects[0], "no damage").is_empty());
        scene
    }

    fn store(&self) -> Store {
        fresh(&self.backend, self.key)
    }

    /// The snapshots that cannot be exported. Any wrong byte fails the test, and so does an error or a report by
    /// `verify` that does not name `object`, or a report that differs from what exports find.
    fn judge(&self, object: &Object, how: &str) -> BTreeSet<&str> {
        let mut failed = BTreeSet::new();
        for (name, machine) in &self.machines {
            let Err(error) = machine.check(&self.store(), name) else { continue };
            let expected = match &error {
                StoreError::Missing { key, .. } | StoreError::Damaged { key, .. } => *key == object.key,
                StoreError::NoSuchSnapshot { .. } => object.kind == Kind::Reference,
                _ => false,
            };
            assert!(expected, "{how} of {}: export of {name} says {error:?}", object.key);
            failed.insert(*name);
        }
        let report = self.store().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        let mut hurt = BTreeSet::new();
        for damage in &report.damages {
            assert_eq!(damage.object, object.key, "{how}: {damage:?}");
            hurt.extend(damage.hurts.iter().map(|h| self.name_of(h)));
        }
        // A reference that is gone, or emptied, is a snapshot that was removed.
        let gone = object.kind == Kind::Reference && report.is_clean();
        if gone {
            assert_eq!(report.snapshots, self.machines.len() as u64 - failed.len() as u64);
        } else {
            assert_eq!(hurt, failed, "{how} of {}: {report:?}", object.key);
        }
        failed
    }

    /// A damaged reference cannot say whose it is; its key, which is the name or stands for it, does.
    fn name_of(&self, reported: &str) -> &str {
        let domain = self.store().domain().clone();
        let names = self.machines.iter().map(|(name, _)| *name);
        names.into_iter().find(|n| *n == reported || domain.name_key(n) == reported).unwrap()
    }

    fn put(&self, key: &str, bytes: Bytes) {
        self.backend.put_again(key, bytes).unwrap();
    }

    /// Does something to an object, judges, and undoes it.
    fn with(&self, object: &Object, bytes: Option<Bytes>, how: &str) -> BTreeSet<&str> {
        match bytes {
            Some(bytes) => self.put(&object.key, bytes),
            None => self.backend.delete(&object.key).unwrap(),
        }
        let failed = self.judge(object, how);
        self.put(&object.key, object.bytes.clone());
        failed
    }

    /// What of an object is worth a cut or a flip of its own: the edges of each part of a pack, and a stride that
    /// is dense (each byte at the densest) for what is small.
    fn offsets(&self, object: &Object, stride: usize) -> Vec<usize> {
        let len = object.bytes.len();
        if object.kind != Kind::PagePack {
            // Every byte of the first of each kind is enough; the others are built alike.
            let first =
                self.objects.iter().find(|o| o.kind == object.kind).is_some_and(|o| o.key == object.key);
            return (0..len)
                .step_by(if first { stride.div_ceil(1_500) } else { 29.max(stride / 40) })
                .collect();
        }
        let (frames_end, footer) = footer_of(&self.store(), &object.key, &object.bytes);
        let mut edges = vec![0, HEADER_BYTES, frames_end, len - TRAILER_BYTES, len];
        edges.extend(footer.frames.iter().map(|f| f.at.offset as usize));
        let near = edges.iter().flat_map(|e| e.saturating_sub(3)..e + 3);
        let around = (0..HEADER_BYTES).chain(len - TRAILER_BYTES..len);
        let all: BTreeSet<_> = near.chain(around).chain((0..len).step_by(stride)).collect();
        all.into_iter().filter(|at| *at < len).collect()
    }
}

fn kind_of(store: &Store, key: &str, bytes: &[u8]) -> Kind {
    if key.contains("/refs/") {
        Kind::Reference
    } else if key.contains("/roots/") {
        Kind::Root
    } else {
        let (_, footer) = footer_of(store, key, bytes);
        let pages = footer.frames.iter().all(|f| f.kind == FrameKind::Pages);
        assert!(pages || footer.frames.iter().all(|f| f.kind != FrameKind::Pages));
        if pages { Kind::PagePack } else { Kind::MetadataPack }
    }
}

fn footer_of(store: &Store, key: &str, bytes: &[u8]) -> (usize, PackFooter) {
    let id = PackId::from_hex(key.rsplit('/').next().unwrap()).unwrap();
    let trailer = &bytes[bytes.len() - TRAILER_BYTES..];
    let pack = parse_trailer(store.domain(), id, bytes.len() as u64, trailer).unwrap();
    let range = pack.footer_range();
    let footer =
        PackFooter::decode(store.domain(), id, &bytes[range.start as usize..range.end as usize]).unwrap();
    (pack.footer_offset as usize, footer)
}

fn missing_and_emptied(scene: &Scene) {
    for object in &scene.objects {
        for (bytes, how) in [(None, "absence"), (Some(Bytes::new()), "emptying")] {
            let failed = scene.with(object, bytes, how);
            assert!(!failed.is_empty(), "{how} of {} went unnoticed", object.key);
        }
    }
}

fn truncated(scene: &Scene, stride: usize) {
    for object in &scene.objects {
        for at in scene.offsets(object, stride) {
            let failed = scene.with(object, Some(object.bytes.slice(..at)), &format!("a cut at {at}"));
            if object.kind == Kind::Reference || object.kind == Kind::Root {
                assert_eq!(failed.len(), 1, "{}", object.key);
            }
        }
        // Longer than it should be: what is right is used, and what is too much is reported.
        let longer = Bytes::from([&object.bytes[..], b"more"].concat());
        scene.put(&object.key, longer);
        let report = scene.store().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(!report.is_clean(), "{} is too long", object.key);
        scene.judge(object, "lengthening");
        scene.put(&object.key, object.bytes.clone());
    }
}

fn flipped(scene: &Scene, stride: usize) {
    for object in &scene.objects {
        for at in scene.offsets(object, stride) {
            let mut bytes = object.bytes.to_vec();
            bytes[at] ^= 1 << (at % 8);
            scene.put(&object.key, bytes.into());
            let how = format!("a flip in byte {at} of {}", object.bytes.len());
            let failed = scene.judge(object, &how);
            match object.kind {
                Kind::Reference | Kind::Root => assert_eq!(failed.len(), 1, "{how} of {}", object.key),
                // What is damaged around the frames hurts nobody yet, but it is damage.
                _ if failed.is_empty() => {
                    let report = scene.store().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
                    assert!(!report.is_clean(), "{how} of {} went unnoticed", object.key);
                }
                _ => {}
            }
            scene.put(&object.key, object.bytes.clone());
        }
    }
}

fn replaced(scene: &Scene) {
    for object in &scene.objects {
        for other in scene.objects.iter().filter(|o| o.kind == object.kind && o.key != object.key) {
            let how = format!("replacement by {}", other.key);
            let failed = scene.with(object, Some(other.bytes.clone()), &how);
            assert!(!failed.is_empty(), "{how} of {} went unnoticed", object.key);
        }
    }
}

fn scenes() -> [Scene; 2] {
    [None, Some(7)].map(|key| Scene::new(memory_backend(), key))
}

#[test]
fn a_missing_or_emptied_object_is_named_and_whom_it_hurts() {
    scenes().iter().for_each(missing_and_emptied);
}

#[test]
fn a_truncated_object_is_named_and_whom_it_hurts() {
    scenes().iter().for_each(|s| truncated(s, 2_503));
}

#[test]
fn a_flipped_bit_is_named_and_whom_it_hurts() {
    flipped(&Scene::new(memory_backend(), None), 1_499);
}

#[test]
fn a_flipped_bit_in_an_encrypted_store_is_named_and_whom_it_hurts() {
    flipped(&Scene::new(memory_backend(), Some(7)), 4_499);
}

#[test]
fn an_object_replaced_by_another_valid_one_is_named_and_whom_it_hurts() {
    scenes().iter().for_each(replaced);
}

#[test]
fn a_local_directory_is_no_different() {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::new(open_url(dir.path().join("store").to_str().unwrap()).unwrap(), None);
    missing_and_emptied(&scene);
    truncated(&scene, 20_011);
    flipped(&scene, 5_003);
    replaced(&scene);
}

#[test]
fn the_references_of_two_names_swapped_are_both_found() {
    for scene in scenes() {
        let references: Vec<_> = scene.objects.iter().filter(|o| o.kind == Kind::Reference).collect();
        scene.put(&references[0].key, references[1].bytes.clone());
        scene.put(&references[1].key, references[0].bytes.clone());
        let report = scene.store().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        let named: Vec<_> = report.damages.iter().map(|d| &d.object).collect();
        assert_eq!(named, [&references[0].key, &references[1].key]);
        let failed = scene.machines.iter().filter(|(name, m)| m.check(&scene.store(), name).is_err());
        assert_eq!(failed.count(), 2);
    }
}

#[test]
fn verifying_one_snapshot_says_nothing_of_others() {
    for scene in scenes() {
        let verify = |name: &str| {
            scene.store().verify(Some(&Name::new(name).unwrap()), VerifyDepth::Content, &NoProgress)
        };
        for object in &scene.objects {
            let mut bytes = object.bytes.to_vec();
            bytes.truncate(bytes.len() / 3);
            let failed = scene.with(object, Some(bytes.clone().into()), "a cut");
            scene.put(&object.key, bytes.into());
            for (name, _) in &scene.machines {
                let report = verify(name).unwrap();
                assert_eq!(report.is_clean(), !failed.contains(name), "{name}: {report:?}");
                assert!(report.damages.iter().all(|d| d.hurts == [*name]), "{report:?}");
            }
            scene.put(&object.key, object.bytes.clone());
        }
    }
}

#[test]
fn a_quick_look_finds_packs_that_are_gone_or_of_another_size() {
    for scene in scenes() {
        let packs = scene.objects.iter().filter(|o| matches!(o.kind, Kind::PagePack | Kind::MetadataPack));
        for object in packs {
            for bytes in [None, Some(object.bytes.slice(..object.bytes.len() - 1))] {
                match bytes {
                    None => scene.backend.delete(&object.key).unwrap(),
                    Some(bytes) => scene.put(&object.key, bytes),
                }
                let report = scene.store().verify(None, VerifyDepth::Structure, &NoProgress).unwrap();
                assert!(!report.is_clean(), "{}", object.key);
                assert!(report.damages.iter().all(|d| d.object == object.key), "{report:?}");
                scene.put(&object.key, object.bytes.clone());
            }
        }
    }
}

#[test]
fn a_damaged_keyring_is_named_and_nothing_is_founded_anew() {
    let scene = Scene::new(memory_backend(), Some(7));
    let keyrings = || -> Vec<_> {
        objects(&*scene.backend).into_iter().filter(|(key, _)| key.starts_with("keys/")).collect()
    };
    let (key, bytes) = keyrings().remove(0);
    Machine::new(3, 1).import(&fresh(&scene.backend, Some(8)), "of-another-key", None).unwrap();
    let other = keyrings().into_iter().find(|(k, _)| *k != key).unwrap().1;
    let cuts = (0..bytes.len()).map(|at| bytes.slice(..at));
    let flips = (0..bytes.len()).map(|at| {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << (at % 8);
        Bytes::from(flipped)
    });
    for damaged in cuts.chain(flips).chain([other]) {
        scene.put(&key, damaged);
        let before = objects(&*scene.backend);
        let store = scene.store();
        let errors = [
            scene.machines[0].1.check(&store, "a").unwrap_err(),
            store.verify(None, VerifyDepth::Content, &NoProgress).map(drop).unwrap_err(),
            store.list().map(drop).unwrap_err(),
            store.remove(&Name::new("a").unwrap()).unwrap_err(),
            Machine::new(3, 1).import(&store, "new", None).map(drop).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(&error, StoreError::Damaged { key: k, .. } if *k == key), "{error:?}");
        }
        assert_eq!(objects(&*scene.backend), before);
    }
    // One that is gone cannot be told from a key that was never used here, but for the other keys that were.
    scene.backend.delete(&key).unwrap();
    let error = scene.machines[0].1.check(&scene.store(), "a").unwrap_err();
    assert!(matches!(error, StoreError::UnknownKey { .. }), "{error:?}");
    scene.put(&key, bytes);
    assert!(scene.judge(&scene.objects[0], "no damage").is_empty());
}
