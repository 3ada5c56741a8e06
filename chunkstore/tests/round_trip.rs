//! What goes in comes out, byte for byte.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsRawFd;

use common::{Machine, assert_same, store_in, store_in_memory};
use dormouse_chunkstore::{NoProgress, Store, VerifyDepth};
use dormouse_core::{ImageId, ImageKind, Name};

fn round_trip(store: &Store, machine: &Machine, name: &str) {
    let snapshot = store.open_snapshot(&Name::new(name).unwrap()).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (id, kind, path) in machine.files() {
        let to = out.path().join(id);
        snapshot.image(kind, id).unwrap().export(&to, &NoProgress).unwrap();
        assert_same(path, &to);
    }
    assert_eq!(snapshot.read_blob("vmstate").unwrap(), machine.state);
}

#[test]
fn images_and_state_come_back_byte_for_byte_through_a_chain_of_children() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(700, 90);
    machine.import(&store, "g0", None).unwrap();
    for generation in 1..6 {
        machine.change(generation, 40);
        let parent = format!("g{}", generation - 1);
        let report = machine.import(&store, &format!("g{generation}"), Some(&parent)).unwrap();
        assert!(report.new_bytes <= 41 * 4096, "only what changed is new: {report:?}");
        round_trip(&store, &machine, &format!("g{generation}"));
    }
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

#[test]
fn an_unchanged_child_shares_every_page_map() {
    let store = store_in_memory();
    let machine = Machine::new(300, 20);
    machine.import(&store, "a", None).unwrap();
    let report = machine.import(&store, "b", Some("a")).unwrap();
    assert_eq!(report.new_bytes, 0);
    // One pack with the device state, the root and the reference.
    assert_eq!(report.objects, 3);
    round_trip(&store, &machine, "b");
}

#[test]
fn sizes_that_are_no_multiple_of_a_page_survive() {
    let store = store_in_memory();
    for bytes in [1usize, 4095, 4096, 4097, 3 * 1024 * 1024 + 17] {
        let mut machine = Machine::new(4, 2);
        machine.set_memory(&vec![7u8; bytes]);
        let name = format!("n{bytes}");
        machine.import(&store, &name, None).unwrap();
        round_trip(&store, &machine, &name);
        let image = store.open_snapshot(&Name::new(name).unwrap()).unwrap();
        assert_eq!(image.image(ImageKind::Memory, "memory").unwrap().entry().bytes, bytes as u64);
    }
}

#[test]
fn zero_pages_cost_nothing() {
    let store = store_in_memory();
    let mut machine = Machine::new(1, 1);
    machine.set_memory(&vec![0u8; 80 << 20]);
    let report = machine.import(&store, "zeros", None).unwrap();
    assert!(report.stored_bytes < 20_000, "{report:?}");
    round_trip(&store, &machine, "zeros");
}

#[test]
fn memory_and_disk_share_pages() {
    let store = store_in_memory();
    let mut machine = Machine::new(200, 200);
    machine.copy_disk_to_memory();
    let report = machine.import(&store, "cache", None).unwrap();
    assert_eq!(report.new_bytes, 200 * 4096);
    assert_eq!(report.nonzero_bytes, 400 * 4096);
}

#[test]
fn everything_survives_the_loss_of_the_local_index() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(500, 50);
    machine.import(&store_in(dir.path()), "a", None).unwrap();
    std::fs::remove_dir_all(dir.path().join("cache")).unwrap();
    machine.change(1, 10);
    let store = store_in(dir.path());
    let report = machine.import(&store, "b", None).unwrap();
    assert!(report.new_bytes <= 11 * 4096, "the footers say what is there: {report:?}");
    std::fs::remove_dir_all(dir.path().join("cache")).unwrap();
    round_trip(&store_in(dir.path()), &machine, "b");
}

#[test]
fn a_damaged_local_index_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(100, 10);
    machine.import(&store_in(dir.path()), "a", None).unwrap();
    for entry in common::files_below(&dir.path().join("cache")) {
        std::fs::write(entry, b"this is not a database").unwrap();
    }
    machine.change(1, 5);
    let store = store_in(dir.path());
    machine.import(&store, "b", Some("a")).unwrap();
    round_trip(&store, &machine, "b");
}

#[test]
fn an_encrypted_domain_shares_nothing_with_the_plain_one() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(100, 10);
    let plain = store_in(dir.path());
    machine.import(&plain, "a", None).unwrap();
    let secret = common::encrypted_store_in(dir.path(), 7);
    let report = machine.import(&secret, "a", None).unwrap();
    assert_eq!(report.new_bytes, 110 * 4096);
    round_trip(&secret, &machine, "a");
    assert!(secret.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    let other = common::encrypted_store_in(dir.path(), 8);
    let error = other.list().unwrap_err();
    assert!(matches!(error, dormouse_chunkstore::StoreError::UnknownKey { .. }), "{error:?}");
}

#[test]
fn a_child_of_dirty_ranges_reads_only_those() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(40_000, 10);
    machine.import(&store, "a", None).unwrap();
    let dirty = machine.change_memory_pages(&[3, 4, 5, 20_000, 39_999]);
    let report = machine.import_dirty(&store, "b", "a", dirty).unwrap();
    assert_eq!(report.read_bytes, 5 * 4096 + 16 * 4096, "five dirty pages and all of the disk");
    assert_eq!(report.new_bytes, 5 * 4096);
    round_trip(&store, &machine, "b");
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

#[test]
fn a_request_that_no_reader_could_read_back_is_refused() {
    let store = store_in_memory();
    let machine = Machine::new(10, 2);
    let refused = |change: &dyn Fn(&mut dormouse_chunkstore::ImportRequest)| {
        let mut request = machine.request("n", None);
        change(&mut request);
        let error = store.import(&request, &NoProgress).unwrap_err();
        assert!(matches!(error, dormouse_chunkstore::StoreError::Usage(_)), "{error:?}");
        assert!(matches!(store.list(), Err(dormouse_chunkstore::StoreError::NothingStored { .. })));
    };
    refused(&|r| r.images[1].id = r.images[0].id.clone());
    refused(&|r| r.labels = vec![("k".into(), "1".into()), ("k".into(), "2".into())]);
    refused(&|r| r.blobs.push(r.blobs[0].clone()));
}

/// A sparse file may be of any size, and costs nothing to make.
#[test]
fn images_larger_than_the_format_holds_are_refused_before_anything_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(10, 2);
    let refused = |count: usize, bytes: u64, why: &str| {
        let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let mut request = machine.request("n", None);
        for i in 0..count {
            let mut image = request.images[0].clone();
            image.id = ImageId::new(format!("large{i}")).unwrap();
            image.path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
            request.images.push(image);
        }
        let error = store.import(&request, &NoProgress).unwrap_err();
        let named = error.to_string().contains(why);
        assert!(matches!(error, dormouse_chunkstore::StoreError::Usage(_)) && named, "{error:?}");
        let domain = dir.path().join("store/plain");
        assert!(!domain.exists() || common::files_below(&domain).is_empty());
    };
    refused(1, (16 << 40) + 1, "16 TiB");
    refused(1, 1 << 60, "16 TiB");
    refused(4, 16 << 40, "64 TiB");
}

#[test]
fn an_empty_image_and_an_empty_state_survive() {
    let store = store_in_memory();
    let mut machine = Machine::new(4, 2);
    machine.set_memory(&[]);
    machine.state = Vec::new();
    machine.import(&store, "n", None).unwrap();
    round_trip(&store, &machine, "n");
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}
