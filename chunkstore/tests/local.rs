//! A local directory that is not as it should be: nothing is taken for absent that only cannot be looked at.
#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, os::unix::fs::symlink, time::Duration};

use common::{Machine, files_below, store_in};
use dormouse_chunkstore::{GcOptions, NoProgress, StoreError, VerifyDepth};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

/// What a store on a network or in user space answers for a moment (stale handle, endpoint not connected), here as a link
/// to itself: there is something, and nobody can say what.
#[test]
fn references_that_cannot_be_looked_at_stop_collection() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(50, 5);
    machine.import(&store, "a", None).unwrap();
    let before = files_below(&dir.path().join("store"));
    for broken in ["plain/refs", "plain/refs/a", "plain/roots", "plain/packs"] {
        for target in ["itself", "nowhere"] {
            let path = dir.path().join("store").join(broken);
            let aside = dir.path().join("aside");
            fs::rename(&path, &aside).unwrap();
            let target = if target == "itself" { path.clone() } else { dir.path().join("nowhere") };
            symlink(target, &path).unwrap();
            let collected = store.gc(AT_ONCE);
            assert!(
                matches!(collected, Err(StoreError::Unavailable { .. } | StoreError::Missing { .. })),
                "{broken}: {collected:?}"
            );
            if broken.starts_with("plain/refs") {
                let listed = store.list();
                assert!(listed.is_err(), "{broken}: {listed:?}");
            }
            fs::remove_file(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
    }
    assert_eq!(files_below(&dir.path().join("store")), before);
    machine.remember().check(&store, "a").unwrap();
}

#[test]
fn folders_of_a_store_may_be_links() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(50, 5);
    machine.import(&store, "a", None).unwrap();
    let packs = dir.path().join("store/plain/packs");
    fs::rename(&packs, dir.path().join("larger-disk")).unwrap();
    symlink(dir.path().join("larger-disk"), &packs).unwrap();
    machine.change(1, 20);
    machine.import(&store, "b", Some("a")).unwrap();
    store.gc(AT_ONCE).unwrap();
    machine.remember().check(&store, "b").unwrap();
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
}

/// The index says which pages are stored already, and what it says is not looked at again.
#[test]
fn a_damaged_index_gives_no_snapshot_a_wrong_page() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(300, 40);
    machine.import(&store_in(dir.path()), "a", None).unwrap();
    let index = files_below(dir.path()).into_iter().find(|p| p.ends_with("index.redb")).unwrap();
    let whole = fs::read(&index).unwrap();
    // Bits all over the file, one in each copy of it.
    for (copy, at) in (0..whole.len()).step_by(whole.len() / 97).enumerate() {
        let mut damaged = whole.clone();
        damaged[at + copy % 61] ^= 1 << (copy % 8);
        fs::write(&index, &damaged).unwrap();
        let store = store_in(dir.path());
        let mut request = machine.request("b", None);
        request.replace = true;
        store.import(&request, &NoProgress).unwrap_or_else(|e| panic!("byte {at}: {e}"));
        machine.remember().check(&store, "b").unwrap();
    }
}
