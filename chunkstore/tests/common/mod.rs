//! Generated machines for tests.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use dormouse_chunkstore::{
    BlobBytes, BlobSource, Dirty, ImageSource, ImportReport, ImportRequest, NoProgress, Result, Store,
    StoreOptions,
    backend::{Backend, open_url},
};
use dormouse_core::{DomainKey, ImageId, ImageKind, Name};

pub const PAGE: usize = 4096;

pub fn store_in(dir: &Path) -> Store {
    store_with_cache(dir, "cache")
}

/// The same store from another host: one with a cache of its own.
pub fn store_with_cache(dir: &Path, cache: &str) -> Store {
    let options = StoreOptions { cache_dir: Some(dir.join(cache)), ..Default::default() };
    Store::open(dir.join("store").to_str().unwrap(), options).unwrap()
}

pub fn encrypted_store_in(dir: &Path, key: u8) -> Store {
    let options = StoreOptions {
        cache_dir: Some(dir.join("cache")),
        key: Some(DomainKey::new([key; 32])),
        ..Default::default()
    };
    Store::open(dir.join("store").to_str().unwrap(), options).unwrap()
}

pub fn store_in_memory() -> Store {
    Store::open("memory://", StoreOptions::default()).unwrap()
}

/// A page whose content follows from its seed; half of it compresses.
pub fn page(seed: u64) -> Vec<u8> {
    let mut page = vec![0u8; PAGE];
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in page[..PAGE / 2].chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes());
    }
    page
}

/// A memory and a disk in files, with device state.
pub struct Machine {
    dir: tempfile::TempDir,
    pub state: Vec<u8>,
    memory_pages: u64,
}

impl Machine {
    /// Every third page is a hole.
    pub fn new(memory_pages: u64, disk_pages: u64) -> Self {
        Self::unlike(0, memory_pages, disk_pages)
    }

    /// Machines of different `salt` have no page in common.
    pub fn unlike(salt: u64, memory_pages: u64, disk_pages: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine { dir, state: b"device state".repeat(300), memory_pages };
        let salt = salt << 42;
        for (file, pages, salt) in
            [("memory", memory_pages, salt + (1u64 << 40)), ("root", disk_pages, salt + (2 << 40))]
        {
            let f = fs::File::create(machine.path(file)).unwrap();
            let stored = if memory_pages > 10_000 { pages.min(500) } else { pages };
            f.set_len(pages * 3 / 2 * PAGE as u64 + PAGE as u64).unwrap();
            for i in 0..stored {
                f.write_all_at(&page(salt + i), i * 3 / 2 * PAGE as u64).unwrap();
            }
        }
        machine
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    pub fn files(&self) -> [(&'static str, ImageKind, PathBuf); 2] {
        [("memory", ImageKind::Memory, self.path("memory")), ("root", ImageKind::Disk, self.path("root"))]
            .map(|(id, kind, path)| (id, kind, path))
    }

    pub fn set_memory(&mut self, bytes: &[u8]) {
        fs::write(self.path("memory"), bytes).unwrap();
    }

    pub fn copy_disk_to_memory(&mut self) {
        fs::copy(self.path("root"), self.path("memory")).unwrap();
    }

    /// Rewrites `pages` pages of memory.
    pub fn change(&mut self, generation: u64, pages: u64) {
        let f = fs::File::options().write(true).open(self.path("memory")).unwrap();
        for i in 0..pages {
            let at = (i * 7 + generation * 13) % self.memory_pages;
            f.write_all_at(&page((generation << 50) + i), at * PAGE as u64).unwrap();
        }
        self.state = format!("state of generation {generation}").repeat(100).into_bytes();
    }

    pub fn rewrite_memory_pages(&mut self, generation: u64, pages: &[u64]) {
        let f = fs::File::options().write(true).open(self.path("memory")).unwrap();
        for p in pages {
            f.write_all_at(&page((generation << 50) + p), p * PAGE as u64).unwrap();
        }
    }

    pub fn change_memory_pages(&mut self, pages: &[u64]) -> Vec<Range<u64>> {
        let f = fs::File::options().write(true).open(self.path("memory")).unwrap();
        for p in pages {
            f.write_all_at(&page((9 << 50) + p), p * PAGE as u64).unwrap();
        }
        pages.iter().map(|p| *p..*p + 1).collect()
    }

    pub fn request(&self, name: &str, parent: Option<&str>) -> ImportRequest {
        let mut request = ImportRequest::new(Name::new(name).unwrap());
        request.parent = parent.map(|p| Name::new(p).unwrap());
        request.images = self
            .files()
            .into_iter()
            .map(|(id, kind, path)| ImageSource { id: ImageId::new(id).unwrap(), kind, path, dirty: None })
            .collect();
        let id = ImageId::new("vmstate").unwrap();
        request.blobs = vec![BlobSource { id, bytes: BlobBytes::Memory(self.state.clone()) }];
        request
    }

    pub fn import(&self, store: &Store, name: &str, parent: Option<&str>) -> Result<ImportReport> {
        store.import(&self.request(name, parent), &NoProgress)
    }

    pub fn import_dirty(
        &self,
        store: &Store,
        name: &str,
        parent: &str,
        dirty: Vec<Range<u64>>,
    ) -> Result<ImportReport> {
        let mut request = self.request(name, Some(parent));
        request.images[0].dirty = Some(Dirty::Ranges(dirty));
        store.import(&request, &NoProgress)
    }
}

/// A machine's files and state as they were at one moment.
#[derive(Clone)]
pub struct Remembered {
    images: Vec<(&'static str, ImageKind, Vec<u8>)>,
    state: Vec<u8>,
}

impl Machine {
    pub fn remember(&self) -> Remembered {
        let images = self.files().map(|(id, kind, path)| (id, kind, fs::read(path).unwrap()));
        Remembered { images: images.into(), state: self.state.clone() }
    }
}

impl Remembered {
    /// Exports everything. An error is given back, a wrong byte fails the test.
    pub fn check(&self, store: &Store, name: &str) -> Result<()> {
        let snapshot = store.open_snapshot(&Name::new(name).unwrap())?;
        let out = tempfile::tempdir().unwrap();
        for (id, kind, bytes) in &self.images {
            let to = out.path().join(id);
            snapshot.image(*kind, id)?.export(&to, &NoProgress)?;
            assert!(fs::read(&to).unwrap() == *bytes, "wrong bytes in {id} of {name}");
        }
        assert!(snapshot.read_blob("vmstate")? == self.state, "wrong device state of {name}");
        Ok(())
    }
}

/// A store on this backend, with nothing cached, as another host would open it.
pub fn fresh(backend: &Arc<dyn Backend>, key: Option<u8>) -> Store {
    let key = key.map(|k| DomainKey::new([k; 32]));
    // In these tests, what is in the clear is meant to be.
    Store::with_backend(backend.clone(), StoreOptions { key, no_encryption: true, ..Default::default() })
}

pub fn memory_backend() -> Arc<dyn Backend> {
    open_url("memory://").unwrap()
}

/// Every object and its bytes.
pub fn objects(backend: &dyn Backend) -> BTreeMap<String, Bytes> {
    let mut keys = Vec::new();
    // A local store's lock file lies beside its domains, not in one.
    backend.list("", &mut |meta| keys.extend(Some(meta.key).filter(|k| k.contains('/')))).unwrap();
    keys.into_iter().map(|k| (k.clone(), backend.get(&k, None).unwrap().unwrap())).collect()
}

/// A new store in memory with the same objects.
pub fn copy_of(backend: &dyn Backend) -> Arc<dyn Backend> {
    let copy = memory_backend();
    for (key, bytes) in objects(backend) {
        copy.put_new(&key, bytes).unwrap();
    }
    copy
}

pub fn assert_same(a: impl AsRef<Path>, b: impl AsRef<Path>) {
    assert!(fs::read(a.as_ref()).unwrap() == fs::read(b.as_ref()).unwrap(), "{:?} differs", a.as_ref());
}

/// All files, but for the room that a store keeps back for a full disk.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().is_some_and(|name| name.starts_with("reserve-")) {
            continue;
        }
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}
