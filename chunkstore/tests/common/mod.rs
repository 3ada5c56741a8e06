//! Generated machines for tests.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::{
    fs,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use dormouse_chunkstore::{
    BlobBytes, BlobSource, Dirty, ImageSource, ImportReport, ImportRequest, NoProgress, Result, Store,
    StoreOptions,
};
use dormouse_core::{DomainKey, ImageId, ImageKind, Name};

pub const PAGE: usize = 4096;

pub fn store_in(dir: &Path) -> Store {
    let options = StoreOptions { cache_dir: Some(dir.join("cache")), ..Default::default() };
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
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine { dir, state: b"device state".repeat(300), memory_pages };
        for (file, pages, salt) in [("memory", memory_pages, 1u64 << 40), ("root", disk_pages, 2 << 40)] {
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

pub fn assert_same(a: impl AsRef<Path>, b: impl AsRef<Path>) {
    assert!(fs::read(a.as_ref()).unwrap() == fs::read(b.as_ref()).unwrap(), "{:?} differs", a.as_ref());
}

pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}
