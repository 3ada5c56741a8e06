//! Frames of a remote store that this host has on disk: faults are answered from them, on the fault thread, and what is
//! damaged is fetched.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

#[path = "../../restore/tests/common/mod.rs"]
mod common;

use std::{path::PathBuf, sync::Arc};

use common::{Rng, uffd_or_skip};
use dormouse_chunkstore::{
    ImageSource, ImportRequest, NoProgress, Store, StoreOptions,
    backend::{faulty::FaultyBackend, open_url},
};
use dormouse_core::{
    ImageId, ImageKind, Name,
    page::{PAGE_BYTES, PageCount, PageIndex},
};
use dormouse_restore::{
    CountersSnapshot, Mapping, Memory, PageSize, PageSource, Plan, Policy, RegionSpec, Restore, VmStopped,
};
use dormouse_wake::StoredImage;

const PAGES: u64 = 1024;

struct Scene {
    dir: tempfile::TempDir,
    remote: Arc<FaultyBackend>,
    memory: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        // In the build's own directory: a file system in memory may not say what is in memory.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut memory = vec![0; PAGES as usize * PAGE_BYTES];
        for (page, bytes) in memory.chunks_mut(PAGE_BYTES).enumerate() {
            // A quarter of a page compresses to nothing.
            let noisy = bytes.chunks_mut(8).skip(128);
            let mut rng = Rng(page as u64);
            noisy.for_each(|w| w.copy_from_slice(&rng.next().to_ne_bytes()));
        }
        let path = dir.path().join("memory");
        std::fs::write(&path, &memory).unwrap();
        let remote = Arc::new(FaultyBackend::counting(open_url("memory://").unwrap()));
        let scene = Scene { dir, remote, memory };
        let mut request = ImportRequest::new(name());
        let id = ImageId::new("memory").unwrap();
        request.images.push(ImageSource { id, kind: ImageKind::Memory, path, dirty: None });
        scene.store().import(&request, &NoProgress).unwrap();
        scene
    }

    /// The host, with what it has on disk and nothing in memory.
    fn store(&self) -> Store {
        let cache_dir = Some(self.dir.path().join("cache"));
        Store::with_backend(self.remote.clone(), StoreOptions { cache_dir, ..Default::default() })
    }

    fn image(&self) -> Arc<StoredImage> {
        let snapshot = self.store().open_snapshot(&name()).unwrap();
        Arc::new(StoredImage::new(snapshot.image(ImageKind::Memory, "memory").unwrap()))
    }

    /// Reads everything until no frame is asked of the store.
    fn warm(&self) {
        loop {
            let store = self.store();
            let snapshot = store.open_snapshot(&name()).unwrap();
            self.remote.counts().take();
            let into = tempfile::tempfile().unwrap();
            snapshot.image(ImageKind::Memory, "memory").unwrap().export_into(&into, &NoProgress).unwrap();
            store.flush_caches();
            if self.remote.counts().take().gets == 0 {
                return;
            }
        }
    }

    fn frames_on_disk(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.dir.path().join("cache")];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                let is_frame = path.parent().and_then(|p| p.file_name()).is_some_and(|n| n.len() == 2);
                if path.is_dir() {
                    folders.push(path);
                } else if is_frame {
                    files.push(path);
                }
            }
        }
        files
    }

    /// Touches every page in random order, and checks it.
    fn touch_all(&self) -> Option<CountersSnapshot> {
        let uffd = uffd_or_skip()?;
        let image = self.image();
        image.locate(PageIndex(0)).unwrap();
        let region =
            RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
        let plan = Plan::new(image, &[region]).unwrap();
        let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
        let own = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
        let handle = Restore::start(plan, own, Policy::default()).unwrap();
        for page in Rng(3).shuffled(PAGES) {
            let mut found = [0; PAGE_BYTES];
            assert!(mapping.read_page(page, &mut found));
            let at = page as usize * PAGE_BYTES;
            assert!(found == self.memory[at..at + PAGE_BYTES], "page {page} is wrong");
        }
        assert!(handle.failures().is_empty());
        Some(handle.stop(VmStopped::attest()))
    }
}

fn name() -> Name {
    Name::new("m").unwrap()
}

#[test]
fn a_frame_on_local_disk_is_taken_by_the_fault_thread_and_not_asked_of_the_store() {
    let scene = Scene::new();
    scene.warm();
    let Some(counts) = scene.touch_all() else { return };
    assert!(counts.inline_hits > 0, "{counts:?}");
    assert_eq!((counts.handed_over, scene.remote.counts().take().gets), (0, 2), "{counts:?}");
}

#[test]
fn a_frame_that_is_damaged_on_local_disk_is_fetched_and_right() {
    let scene = Scene::new();
    scene.warm();
    let files = scene.frames_on_disk();
    assert!(files.len() > 8);
    for (n, file) in files.iter().enumerate() {
        let mut bytes = std::fs::read(file).unwrap();
        let at = (n * 997) % bytes.len();
        bytes[at] ^= 0x10;
        if n % 3 == 0 {
            bytes.truncate(at);
        }
        std::fs::write(file, bytes).unwrap();
    }
    let Some(counts) = scene.touch_all() else { return };
    assert!(counts.handed_over > 0, "{counts:?}");
    assert!(scene.remote.counts().take().gets > 8, "what was damaged came from the store");
}
