//! A machine in a store, with a resume stream.

use dormouse_chunkstore::{ImageSource, ImportRequest, NoProgress, Resume, Store, StoreOptions, TouchedRun};
use dormouse_core::{ImageId, ImageKind, Name, page::PAGE_BYTES};

use super::Rng;

/// Pages of the machine.
pub const PAGES: u64 = 2048;

/// A snapshot whose stream brings all of `first`; pages from 1024 on are zero but for every 16th.
pub fn snapshot(first: std::ops::Range<u64>) -> (tempfile::TempDir, Vec<u8>, Resume) {
    let dir = tempfile::tempdir().unwrap();
    let mut memory = vec![0; PAGES as usize * PAGE_BYTES];
    for (page, bytes) in memory.chunks_mut(PAGE_BYTES).enumerate() {
        if page < 1024 || page % 16 == 0 {
            bytes.chunks_mut(8).for_each(|w| w.copy_from_slice(&Rng(page as u64).next().to_ne_bytes()));
        }
    }
    let path = dir.path().join("memory");
    std::fs::write(&path, &memory).unwrap();
    let store = Store::open(dir.path().join("store").to_str().unwrap(), StoreOptions::default()).unwrap();
    let name = Name::new("m").unwrap();
    let mut request = ImportRequest::new(name.clone());
    let id = ImageId::new("memory").unwrap();
    request.images.push(ImageSource { id, kind: ImageKind::Memory, path, dirty: None });
    store.import(&request, &NoProgress).unwrap();
    let touched = TouchedRun { image: 0, pages: first };
    store.build_stream(&store.open_snapshot(&name).unwrap(), &[touched]).unwrap();
    let resume = store.open_resume(&name).unwrap();
    (dir, memory, resume)
}
