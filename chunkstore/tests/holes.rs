//! Images with holes cost what they have data for, however large they are.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use common::store_in;
use dormouse_chunkstore::{ImageSource, ImportRequest, NoProgress, Progress, Store};
use dormouse_core::{ImageId, ImageKind, Name, PageIndex};

const SIZE: u64 = 256 << 30;

/// Blocks of 1 MiB that an import looked at.
#[derive(Default)]
struct Blocks(AtomicU64);

impl Progress for Blocks {
    fn advance(&self, _bytes: u64) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn import(store: &Store, path: &Path, name: &str, parent: Option<&str>) -> u64 {
    let mut request = ImportRequest::new(Name::new(name).unwrap());
    request.parent = parent.map(|parent| Name::new(parent).unwrap());
    let id = ImageId::new("root").unwrap();
    request.images = vec![ImageSource { id, kind: ImageKind::Disk, path: path.into(), dirty: None }];
    let blocks = Blocks::default();
    store.import(&request, &blocks).unwrap();
    blocks.0.into_inner()
}

/// The bytes of a page; `None` if it is zero.
fn page(store: &Store, name: &str, at: u64) -> Option<Vec<u8>> {
    let snapshot = store.open_snapshot(&Name::new(name).unwrap()).unwrap();
    let image = snapshot.image(ImageKind::Disk, "root").unwrap();
    assert_eq!(image.entry().bytes, SIZE);
    match image.locate(PageIndex(at / 4096)).unwrap() {
        dormouse_chunkstore::Pages::Zero { .. } => None,
        dormouse_chunkstore::Pages::Stored { at, slot, .. } => {
            Some(image.frame(&at).unwrap().pages(slot, 1).unwrap().to_vec())
        }
    }
}

#[test]
fn an_import_looks_at_what_an_image_has_data_for_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let path = dir.path().join("disk");
    let file = File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    // In the first section, in the last page, and at two places in the middle.
    let places = [8192, SIZE / 2, SIZE / 2 + (5 << 20), SIZE - 4096];
    for (n, at) in places.into_iter().enumerate() {
        file.write_all_at(&[n as u8 + 1; 4096], at).unwrap();
    }
    let blocks = import(&store, &path, "a", None);
    // A file system may round what is data up to more than a block.
    assert!((4..=12).contains(&blocks), "{blocks} blocks");
    for (n, at) in places.into_iter().enumerate() {
        assert_eq!(page(&store, "a", at), Some(vec![n as u8 + 1; 4096]));
        assert_eq!(page(&store, "a", at ^ (32 << 20)), None);
    }
    // A child that lost one page to a hole, all of it compared: sections that its parent has are looked at whole.
    let child = dir.path().join("child");
    let file = File::create(&child).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[1; 4096], places[0]).unwrap();
    file.write_all_at(&[9; 4096], SIZE / 4).unwrap();
    let blocks = import(&store, &child, "b", Some("a"));
    assert!((3 * 64..=3 * 64 + 8).contains(&blocks), "{blocks} blocks");
    assert_eq!(page(&store, "b", places[0]), Some(vec![1; 4096]));
    assert_eq!(page(&store, "b", SIZE / 4), Some(vec![9; 4096]));
    for gone in &places[1..] {
        assert_eq!(page(&store, "b", *gone), None, "a hole is zero, whatever the parent has there");
    }
    let report = store.verify(None, dormouse_chunkstore::VerifyDepth::Content, &NoProgress).unwrap();
    assert!(report.is_clean(), "{report:?}");
}
