//! Frames on local disk, seen through a store: what is warm is not fetched, and damage is.
#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, path::Path, sync::Arc};

use common::{Machine, Remembered, files_below, memory_backend};
use dormouse_chunkstore::{
    Store, StoreOptions,
    backend::{Backend, faulty::FaultyBackend},
};
use dormouse_core::DomainKey;

struct Scene {
    backend: Arc<dyn Backend>,
    machine: Remembered,
    key: Option<DomainKey>,
    cache: tempfile::TempDir,
}

impl Scene {
    fn new(key: Option<DomainKey>) -> Self {
        let backend = memory_backend();
        let machine = Machine::new(600, 60);
        let options = StoreOptions { key: key.clone(), ..Default::default() };
        machine.import(&Store::with_backend(backend.clone(), options), "a", None).unwrap();
        Scene { backend, machine: machine.remember(), key, cache: tempfile::tempdir().unwrap() }
    }

    /// The host after a restart: nothing in memory, what was on disk still there.
    fn host(&self, disk_cache_bytes: u64) -> (Store, Arc<FaultyBackend>) {
        let counting = Arc::new(FaultyBackend::counting(self.backend.clone()));
        let cache_dir = Some(self.cache.path().to_owned());
        // Memory holds next to nothing, so that what is read twice is read from disk.
        let (key, frame_cache_bytes) = (self.key.clone(), 1);
        let options =
            StoreOptions { key, cache_dir, frame_cache_bytes, disk_cache_bytes, ..Default::default() };
        let store = Store::with_backend(counting.clone(), options);
        counting.counts().take();
        (store, counting)
    }

    /// Reads everything; how many reads the store was asked for, beside reference and root.
    fn read(&self, (store, counting): &(Store, Arc<FaultyBackend>)) -> u64 {
        self.machine.check(store, "a").unwrap();
        store.flush_caches();
        let asked = counting.counts().take();
        assert_eq!((asked.heads, asked.lists, asked.puts), (0, 0, 0));
        asked.gets - 2
    }

    /// Reads until all of it is on disk: what the disk had no time for is not there yet.
    fn warm(&self) {
        while self.read(&self.host(1 << 30)) > 0 {}
    }

    fn cached(&self) -> Vec<std::path::PathBuf> {
        let mut files = files_below(self.cache.path());
        files.retain(|f| f.parent().and_then(Path::file_name).is_some_and(|d| d.len() == 2));
        files
    }
}

#[test]
fn what_is_on_disk_is_not_fetched_even_after_a_restart() {
    for key in [None, Some(DomainKey::new([1; 32]))] {
        let scene = Scene::new(key);
        assert!(scene.read(&scene.host(1 << 30)) > 5, "a cold cache fetches");
        scene.warm();
        assert_eq!(scene.read(&scene.host(1 << 30)), 0);
        let host = scene.host(1 << 30);
        assert_eq!((scene.read(&host), scene.read(&host)), (0, 0));
    }
}

#[test]
fn no_plain_text_of_an_encrypted_domain_is_on_disk() {
    let scene = Scene::new(Some(DomainKey::new([1; 32])));
    scene.warm();
    let state = b"device state";
    for file in scene.cached() {
        let bytes = fs::read(&file).unwrap();
        assert!(!bytes.windows(state.len()).any(|w| w == state), "{file:?}");
        // Pages are half zeros; frames of them in the clear would show it.
        assert!(!bytes.windows(32).any(|w| w == [0; 32]), "{file:?}");
    }
    let before = scene.cached().len();
    assert!(before > 5);
}

#[test]
fn damaged_and_torn_files_are_fetched_again_and_never_believed() {
    let scene = Scene::new(None);
    scene.warm();
    for region in [0, 9, 13, 20, 40, 64, 100] {
        let files = scene.cached();
        for file in &files {
            let mut bytes = fs::read(file).unwrap();
            let at = region.min(bytes.len() - 1);
            bytes[at] ^= 1;
            fs::write(file, bytes).unwrap();
        }
        assert!(scene.read(&scene.host(1 << 30)) >= files.len() as u64, "byte {region}");
        scene.warm();
        for file in &files {
            let whole = fs::read(file).unwrap();
            fs::write(file, &whole[..whole.len() * region / 128]).unwrap();
        }
        assert!(scene.read(&scene.host(1 << 30)) >= files.len() as u64, "cut at {region}/128");
        scene.warm();
    }
    // Another frame's whole file in the place of one.
    let files = scene.cached();
    fs::copy(&files[0], &files[1]).unwrap();
    assert!(scene.read(&scene.host(1 << 30)) >= 1);
}

#[test]
fn the_bound_holds_and_no_cache_is_no_cache() {
    let scene = Scene::new(None);
    let host = scene.host(100_000);
    scene.read(&host);
    let bytes: u64 = scene.cached().iter().map(|f| f.metadata().unwrap().len()).sum();
    assert!(bytes > 0 && bytes <= 100_000, "{bytes}");
    drop(host);
    let scene = Scene::new(None);
    assert!(scene.read(&scene.host(0)) > 5);
    assert!(scene.cached().is_empty());
}

#[test]
fn a_local_store_is_not_cached() {
    let dir = tempfile::tempdir().unwrap();
    let store = common::store_in(dir.path());
    let machine = Machine::new(100, 10);
    machine.import(&store, "a", None).unwrap();
    machine.remember().check(&store, "a").unwrap();
    store.flush_caches();
    let caches = files_below(&dir.path().join("cache"));
    assert!(caches.iter().all(|f| !f.to_string_lossy().contains("frames")), "{caches:?}");
}

#[test]
fn a_cache_that_cannot_be_written_costs_nothing_but_requests() {
    let scene = Scene::new(None);
    let blocked = scene.host(1 << 30);
    // A file where the folder should be.
    let place = blake3::hash(scene.backend.url().as_bytes()).to_hex();
    let folder = scene.cache.path().join(&place[..16]).join("plain");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("frames"), b"in the way").unwrap();
    assert!(scene.read(&blocked) > 5);
}
