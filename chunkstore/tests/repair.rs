//! Repair brings back what any reachable copy allows, says what it could not, and changes nothing else.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use common::{Machine, Remembered, copy_of, fresh, memory_backend, objects};
use dormouse_chunkstore::{
    GcOptions, NoProgress, RepairOptions, RepairReport, RepairSource, Store, StoreOptions, TouchedRun,
    VerifyDepth,
    backend::{
        Backend,
        faulty::{Fault, FaultyBackend},
    },
};
use dormouse_core::{Domain, DomainKey, Name, Reference, RootId, envelope};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

/// `b` is a child of `a`; `c` shares nothing with either. Their images lie in files.
struct Scene {
    backend: Arc<dyn Backend>,
    key: Option<u8>,
    machines: [(&'static str, Remembered); 3],
    dir: tempfile::TempDir,
}

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

impl Scene {
    fn new(key: Option<u8>) -> Self {
        let (backend, dir) = (memory_backend(), tempfile::tempdir().unwrap());
        let scene_store = host(&backend, key, dir.path(), "home");
        let mut ab = Machine::new(70, 12);
        let mut c = Machine::unlike(5, 34, 3);
        c.state = b"another machine's state".repeat(100);
        let keep = |machine: &Machine, name: &str| {
            for (id, _, path) in machine.files() {
                std::fs::copy(path, dir.path().join(format!("{name}-{id}"))).unwrap();
            }
            machine.remember()
        };
        ab.import(&scene_store, "a", None).unwrap();
        let a = keep(&ab, "a");
        ab.change(1, 9);
        ab.import(&scene_store, "b", Some("a")).unwrap();
        let b = keep(&ab, "b");
        c.import(&scene_store, "c", None).unwrap();
        let machines = [("a", a), ("b", b), ("c", keep(&c, "c"))];
        Scene { backend, key, machines, dir }
    }

    /// The host that stored everything: its index knows all pages, its disk has no frames.
    fn home(&self) -> Store {
        host(&self.backend, self.key, self.dir.path(), "home")
    }

    fn stranger(&self) -> Store {
        fresh(&self.backend, self.key)
    }

    fn files(&self) -> RepairOptions {
        let files = ["a-memory", "a-root", "b-memory", "b-root", "c-memory", "c-root"];
        RepairOptions { from: files.map(|f| self.dir.path().join(f)).into() }
    }

    fn packs(&self) -> Vec<(String, Bytes)> {
        objects(&*self.backend).into_iter().filter(|(key, _)| key.contains("/packs/")).collect()
    }

    /// Packs of pages; those of page maps and device state are small.
    fn page_packs(&self) -> Vec<(String, Bytes)> {
        self.packs().into_iter().filter(|(_, bytes)| bytes.len() > 10_000).collect()
    }

    fn ids(&self) -> BTreeMap<String, String> {
        self.stranger().list().unwrap().into_iter().map(|s| (s.name, s.snapshot)).collect()
    }

    fn export_errors(&self) -> Vec<&str> {
        let failed = self.machines.iter().filter(|(name, m)| m.check(&self.stranger(), name).is_err());
        failed.map(|(name, _)| *name).collect()
    }

    /// All is well, and stays so when what nobody needs is gone.
    fn check_whole(&self, how: &str) {
        assert!(self.export_errors().is_empty(), "{how}");
        self.stranger().gc(AT_ONCE).unwrap();
        assert!(self.export_errors().is_empty(), "{how}, after collecting");
        let report = self.stranger().verify(None, VerifyDepth::Content, &NoProgress).unwrap();
        assert!(report.is_clean(), "{how}: {report:?}");
    }

    fn copy(&self) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(self.dir.path(), dir.path());
        Scene { backend: copy_of(&*self.backend), key: self.key, machines: self.machines.clone(), dir }
    }
}

fn copy_dir(from: &Path, to: &Path) {
    for file in common::files_below(from) {
        let to = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&file, to).unwrap();
    }
}

fn host(backend: &Arc<dyn Backend>, key: Option<u8>, dir: &Path, cache: &str) -> Store {
    let key = key.map(|k| DomainKey::new([k; 32]));
    let options = StoreOptions { key, cache_dir: Some(dir.join(cache)), ..Default::default() };
    Store::with_backend(backend.clone(), options)
}

fn repair(store: &Store, options: &RepairOptions) -> RepairReport {
    store.repair(None, options, &NoProgress).unwrap()
}

fn flipped(bytes: &Bytes, at: usize) -> Bytes {
    let mut flipped = bytes.to_vec();
    flipped[at] ^= 1;
    flipped.into()
}

fn scenes() -> [Scene; 2] {
    [None, Some(7)].map(Scene::new)
}

#[test]
fn an_undamaged_store_is_left_alone() {
    for scene in scenes() {
        let before = objects(&*scene.backend);
        let report = repair(&scene.stranger(), &scene.files());
        assert!(report.left.is_clean() && report.found.is_empty() && report.repaired.is_empty());
        let mut after = objects(&*scene.backend);
        after.retain(|key, _| !key.contains("/gc/lease"));
        assert_eq!(before, after);
    }
}

#[test]
fn damage_around_the_frames_is_repaired_from_the_object_itself() {
    for scene in scenes() {
        for (key, bytes) in scene.packs() {
            // Header, footer, trailer.
            for at in [9, bytes.len() - 60, bytes.len() - 10] {
                let scene = scene.copy();
                let ids = scene.ids();
                scene.backend.put_again(&key, flipped(&bytes, at)).unwrap();
                let report = repair(&scene.stranger(), &RepairOptions::default());
                assert!(report.left.is_clean(), "{at} of {key}: {report:?}");
                assert!(report.found.iter().all(|d| d.object == key) && !report.found.is_empty());
                assert_eq!(report.repaired.len(), 1);
                assert_eq!(report.repaired[0].object, key);
                assert!(report.repaired[0].sources.iter().eq([&RepairSource::SameObject]));
                assert_eq!(scene.ids(), ids, "no snapshot changes its identity");
                let there = scene.backend.get(&key, None).unwrap().unwrap();
                assert_eq!(there, flipped(&bytes, at), "nothing is overwritten");
                scene.check_whole(&format!("{at} of {key}"));
            }
        }
    }
}

type Harm = fn(&dyn Backend, &str, &Bytes);
const HARMS: [(&str, Harm); 4] = [
    ("missing", |b, key, _| b.delete(key).unwrap()),
    ("emptied", |b, key, _| b.put_again(key, Bytes::new()).unwrap()),
    ("truncated", |b, key, bytes| b.put_again(key, bytes.slice(..bytes.len() / 2)).unwrap()),
    ("flipped", |b, key, bytes| b.put_again(key, flipped(bytes, 50)).unwrap()),
];

#[test]
fn lost_pages_come_from_image_files_by_their_ids_or_else_by_the_hash_of_their_frame() {
    for scene in scenes() {
        for (key, bytes) in scene.page_packs() {
            for (how, harm) in HARMS {
                for known in [true, false] {
                    let scene = scene.copy();
                    harm(&*scene.backend, &key, &bytes);
                    assert!(!scene.export_errors().is_empty());
                    // The host that stored them has an index that lists them; to a stranger, a pack without its
                    // footer says nothing of what was in it.
                    let store = if known { scene.home() } else { scene.stranger() };
                    let nothing = repair(&store, &RepairOptions::default());
                    assert!(!nothing.left.is_clean());
                    let report = repair(&store, &scene.files());
                    assert!(report.left.is_clean(), "{how} {key}, known: {known}: {report:?}");
                    let sources: Vec<_> = report.repaired.iter().flat_map(|r| &r.sources).collect();
                    assert!(sources.contains(&&RepairSource::ImageFile), "{report:?}");
                    scene.check_whole(how);
                }
            }
        }
    }
}

#[test]
fn a_file_with_other_pages_is_no_help_and_does_no_harm() {
    for scene in scenes() {
        let (key, bytes) = scene.page_packs().remove(0);
        let hurt = {
            scene.backend.delete(&key).unwrap();
            scene.export_errors()
        };
        let wrong = scene.dir.path().join("wrong");
        // As large as every image, and of their pages but in another order.
        for id in ["a-memory", "b-memory", "a-root", "c-memory", "c-root"] {
            let mut file = std::fs::read(scene.dir.path().join(id)).unwrap();
            file.rotate_left(4096);
            std::fs::write(&wrong, file).unwrap();
            let report = repair(&scene.stranger(), &RepairOptions { from: vec![wrong.clone()] });
            assert_eq!((report.moved_snapshots, report.left.is_clean()), (0, false), "{report:?}");
            assert_eq!(scene.export_errors(), hurt);
        }
        scene.backend.put_again(&key, bytes).unwrap();
        assert!(scene.export_errors().is_empty(), "nothing refers elsewhere");
    }
}

#[test]
fn whatever_a_host_has_cached_comes_back_from_there() {
    for scene in scenes() {
        let reader = || host(&scene.backend, scene.key, scene.dir.path(), "reader");
        let store = reader();
        for (name, machine) in &scene.machines {
            machine.check(&store, name).unwrap();
        }
        store.flush_caches();
        drop(store);
        for (key, bytes) in scene.packs() {
            for (how, harm) in HARMS {
                let scene = scene.copy();
                harm(&*scene.backend, &key, &bytes);
                let store = host(&scene.backend, scene.key, scene.dir.path(), "reader");
                let report = repair(&store, &RepairOptions::default());
                assert!(report.left.is_clean(), "{how} {key}: {report:?}");
                assert!(report.repaired[0].sources.contains(&RepairSource::LocalCache), "{report:?}");
                scene.check_whole(how);
            }
        }
        // All of them at once: page maps come back first and say what is needed next.
        scene.packs().iter().for_each(|(key, _)| scene.backend.delete(key).unwrap());
        let report = repair(&reader(), &RepairOptions::default());
        assert!(report.left.is_clean(), "{report:?}");
        assert_eq!(report.moved_snapshots, 6, "once for its page maps, once for its pages");
        scene.check_whole("everything is missing");
    }
}

#[test]
fn roots_device_state_and_first_pages_come_back_from_resume_streams() {
    for scene in scenes() {
        let store = scene.stranger();
        for n in ["a", "b", "c"] {
            let snapshot = store.open_snapshot(&name(n)).unwrap();
            let images = snapshot.root().images.iter().zip(0..);
            let all = images.map(|(i, image)| TouchedRun { image, pages: 0..i.pages().0 });
            store.build_stream(&snapshot, &all.collect::<Vec<_>>()).unwrap();
        }
        let damaged = |key: &str, bytes: &Bytes| {
            let scene = scene.copy();
            scene.backend.put_again(key, flipped(bytes, bytes.len() / 2)).unwrap();
            let report = repair(&scene.home(), &RepairOptions::default());
            (report, scene)
        };
        for (key, bytes) in objects(&*scene.backend).into_iter().filter(|(key, _)| key.contains("/roots/")) {
            let (report, scene) = damaged(&key, &bytes);
            assert!(report.left.is_clean() && report.found[0].object == key, "{report:?}");
            assert_eq!(scene.backend.get(&key, None).unwrap().unwrap(), bytes);
            scene.check_whole("a root was damaged");
        }
        for (key, bytes) in scene.page_packs() {
            let (report, scene) = damaged(&key, &bytes);
            assert!(report.left.is_clean(), "{report:?}");
            assert!(report.repaired[0].sources.contains(&RepairSource::ResumeStream), "{report:?}");
            scene.check_whole("pages were damaged");
        }
        let mut states = 0;
        for (key, bytes) in scene.packs().into_iter().filter(|(_, bytes)| bytes.len() <= 10_000) {
            // The frame of the device state is the first.
            let scene = scene.copy();
            scene.backend.put_again(&key, flipped(&bytes, 40)).unwrap();
            let report = repair(&scene.stranger(), &RepairOptions::default());
            if report.left.is_clean() {
                states += report.repaired[0].state_pieces;
                assert!(report.repaired[0].sources.contains(&RepairSource::ResumeStream), "{report:?}");
                scene.check_whole("device state was damaged");
            }
        }
        assert_eq!(states, 3, "of each machine");
    }
}

/// Another version of zstd, or of Dormouse, makes other bytes of the same root. They have another hash.
#[test]
fn a_root_that_this_version_would_write_otherwise_comes_back_byte_for_byte() {
    let scene = Scene::new(None);
    let store = scene.stranger();
    let snapshot = store.open_snapshot(&name("a")).unwrap();
    let raw = snapshot.root().to_raw();
    // Not compressed at all: magic, a header with the size, and one raw block, the last.
    let bytes = (raw.len() as u32).to_le_bytes();
    let block = (raw.len() as u32 * 8 + 1).to_le_bytes();
    let body = [&bytes[..], &[0x28, 0xB5, 0x2F, 0xFD, 0xA0], &bytes, &block[..3], &raw].concat();
    let kind = envelope::Kind { magic: *b"DORMROOT", what: "root", body_bytes_max: 1 << 20 };
    let object = Bytes::from(envelope::wrap(kind, &Domain::plain(), body));
    let root = RootId::of(&object);
    assert_ne!(root, snapshot.reference().root, "other bytes");
    let key = format!("plain/roots/{root}");
    scene.backend.put_new(&key, object.clone()).unwrap();
    let reference = Reference { root, root_bytes: object.len() as u32, ..snapshot.reference().clone() };
    scene.backend.put_again("plain/refs/a", reference.encode(&Domain::plain()).into()).unwrap();
    let first = TouchedRun { image: 0, pages: 0..10 };
    store.build_stream(&store.open_snapshot(&name("a")).unwrap(), &[first]).unwrap();
    scene.backend.delete(&key).unwrap();
    let report = repair(&scene.stranger(), &RepairOptions::default());
    assert!(report.left.is_clean() && report.found[0].object == key, "{report:?}");
    assert_eq!(scene.backend.get(&key, None).unwrap().unwrap(), object);
    scene.check_whole("a root of another version was missing");
}

#[test]
fn lost_pages_come_from_another_pack_that_holds_them() {
    for scene in scenes() {
        // The same machine, stored by a host that did not know of the other, at another level.
        let machine = Machine::new(70, 12);
        let elsewhere = memory_backend();
        for (key, bytes) in objects(&*scene.backend).into_iter().filter(|(key, _)| key.starts_with("keys/")) {
            elsewhere.put_new(&key, bytes).unwrap();
        }
        let mut request = machine.request("twin", None);
        request.level = 1;
        fresh(&elsewhere, scene.key).import(&request, &NoProgress).unwrap();
        for (key, bytes) in objects(&*elsewhere) {
            scene.backend.put_new(&key, bytes).unwrap();
        }
        let (key, bytes) = {
            let all = scene.page_packs();
            let stored: Vec<String> = objects(&*elsewhere).into_keys().collect();
            let mut of_a = all.into_iter().filter(|(key, _)| !stored.contains(key));
            of_a.next().unwrap()
        };
        for (how, harm) in HARMS {
            let scene = scene.copy();
            harm(&*scene.backend, &key, &bytes);
            let hurt = scene.export_errors();
            let report = repair(&scene.home(), &RepairOptions::default());
            if hurt.contains(&"a") {
                assert!(report.left.is_clean(), "{how}: {report:?}");
                assert!(report.repaired[0].sources.contains(&RepairSource::OtherPack), "{report:?}");
                scene.check_whole(how);
            }
        }
    }
}

#[test]
fn what_cannot_be_had_back_is_named_and_the_rest_is_repaired() {
    for scene in scenes() {
        // Of the first pack of pages one frame is damaged; a file has some of its pages.
        let (key, bytes) = scene.page_packs().into_iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
        scene.backend.put_again(&key, flipped(&bytes, 40)).unwrap();
        let hurt = scene.export_errors();
        let part = scene.dir.path().join("part");
        let whole = std::fs::read(scene.dir.path().join("a-memory")).unwrap();
        std::fs::write(&part, &whole[..4096 * 5]).unwrap();
        let report = repair(&scene.stranger(), &RepairOptions { from: vec![part] });
        assert_eq!(report.left.damages.len(), 1, "{report:?}");
        assert_eq!(report.left.damages[0].object, key);
        assert_eq!(report.left.damages[0].hurts, hurt);
        let pages = report.repaired[0].pages;
        assert!(pages > 4, "the undamaged frames, and what the file had: {report:?}");
        assert_eq!(scene.export_errors(), hurt);
        // With the rest of the file, the rest follows.
        let report = repair(&scene.stranger(), &scene.files());
        assert!(report.left.is_clean(), "{report:?}");
        assert!(report.repaired[0].pages < pages);
        scene.check_whole("in two steps");
    }
}

#[test]
fn one_snapshot_can_be_repaired_alone() {
    let scene = Scene::new(None);
    let (key, bytes) = scene.page_packs().into_iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
    scene.backend.delete(&key).unwrap();
    assert_eq!(scene.export_errors(), ["a", "b"]);
    let report = scene.home().repair(Some(&name("b")), &scene.files(), &NoProgress).unwrap();
    assert!(report.left.is_clean() && report.moved_snapshots == 1, "{report:?}");
    assert_eq!(scene.export_errors(), ["a"]);
    scene.backend.put_new(&key, bytes).unwrap();
    scene.check_whole("the other one");
}

#[test]
fn faults_at_every_operation_of_a_repair_make_nothing_worse() {
    let before = Scene::new(None);
    let (key, bytes) = before.page_packs().into_iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
    before.backend.put_again(&key, bytes.slice(..bytes.len() - 50)).unwrap();
    let broken: Vec<PathBuf> = before.files().from;
    for fault in [Fault::Dead, Fault::Fail, Fault::LoseAnswer] {
        let mut hit = 0;
        for n in 0.. {
            let scene = before.copy();
            let faulty = FaultyBackend::new(scene.backend.clone(), move |i, _, _| (i == n).then_some(fault));
            let faulty = Arc::new(faulty);
            let options = || StoreOptions { lease: Duration::ZERO, ..Default::default() };
            let done = Store::with_backend(faulty.clone(), options()).repair(
                None,
                &RepairOptions { from: broken.clone() },
                &NoProgress,
            );
            if faulty.operations() <= n {
                done.unwrap();
                break;
            }
            hit += 1;
            // The footer alone is damaged, so nobody was hurt, and nobody may be now.
            assert!(scene.export_errors().is_empty(), "{fault:?} at operation {n}");
            let again = Store::with_backend(scene.backend.clone(), options());
            let report = again.repair(None, &RepairOptions::default(), &NoProgress).unwrap();
            assert!(report.left.is_clean(), "{fault:?} at operation {n}: {report:?}");
            again.gc(AT_ONCE).unwrap();
            let nothing = again.gc(AT_ONCE).unwrap();
            assert_eq!((nothing.live_objects, nothing.deleted_objects), (nothing.objects, 0));
            scene.check_whole(&format!("{fault:?} at operation {n}"));
        }
        assert!(hit > 10);
    }
}
