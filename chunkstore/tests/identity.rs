//! A store that lost what it stands on says so, and is not taken for an empty one.
#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, path::Path, time::Duration};

use common::{Machine, encrypted_store_in, files_below, store_in};
use dormouse_chunkstore::{
    GcOptions, NoProgress, RepairOptions, Store, StoreError, StoreOptions, VerifyDepth, VerifyReport,
};
use dormouse_core::{Domain, DomainKey, Name, Named};

const AT_ONCE: GcOptions = GcOptions { grace: Duration::ZERO, dry_run: false };

fn verify(store: &Store) -> VerifyReport {
    store.verify(None, VerifyDepth::Content, &NoProgress).unwrap()
}

fn names(store: &Store) -> Vec<String> {
    store.list().unwrap().into_iter().map(|s| s.name).collect()
}

fn empty(path: &Path) {
    fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
}

fn in_the_clear(dir: &Path, no_encryption: bool) -> Store {
    let options = StoreOptions { no_encryption, ..Default::default() };
    Store::open(dir.join("store").to_str().unwrap(), options).unwrap()
}

#[test]
fn an_empty_reference_is_damage_and_nothing_is_collected() {
    let dir = tempfile::tempdir().unwrap();
    let (store, machine) = (store_in(dir.path()), Machine::new(50, 5));
    machine.import(&store, "a", None).unwrap();
    machine.import(&store, "b", None).unwrap();
    empty(&dir.path().join("store/plain/refs/a"));
    let before = files_below(&dir.path().join("store"));
    // Also to another process.
    let store = store_in(dir.path());
    let refused = store.gc(AT_ONCE);
    assert!(matches!(&refused, Err(StoreError::Damaged { key, .. }) if key == "plain/refs/a"), "{refused:?}");
    let packs = |files: &[std::path::PathBuf]| {
        files.iter().filter(|f| f.to_str().unwrap().contains("/packs/")).count()
    };
    assert_eq!(packs(&before), packs(&files_below(&dir.path().join("store"))));
    let report = verify(&store);
    assert_eq!(report.damages.len(), 1, "{report:?}");
    assert_eq!(
        (report.damages[0].object.as_str(), &report.damages[0].hurts[..]),
        ("plain/refs/a", &["a".into()][..])
    );
    let listed = store.list().unwrap();
    assert_eq!(names(&store), ["a", "b"], "it is listed");
    assert!(listed[0].damaged.as_ref().is_some_and(|why| why.contains("plain/refs/a")), "and marked");
    assert!(listed[1].damaged.is_none());
    let name = Name::new("a").unwrap();
    assert!(matches!(store.open_snapshot(&name), Err(StoreError::Damaged { .. })));
    assert!(matches!(store.standing(&name), Err(StoreError::Damaged { .. })));
    // As any damaged reference it can be removed; then nobody needs what it stood for.
    store.remove(&name).unwrap();
    store.gc(AT_ONCE).unwrap();
    assert!(verify(&store).is_clean());
    assert_eq!(names(&store), ["b"]);
}

#[test]
fn empty_references_of_older_stores_become_tombstones_when_a_writer_comes() {
    for key in [None, Some(3)] {
        let dir = tempfile::tempdir().unwrap();
        let open = || match key {
            Some(key) => encrypted_store_in(dir.path(), key),
            None => store_in(dir.path()),
        };
        let machine = Machine::new(50, 5);
        machine.import(&open(), "a", None).unwrap();
        let (refs, identity) = {
            let files = files_below(&dir.path().join("store"));
            let end = |what: &str| files.iter().find(|f| f.to_str().unwrap().contains(what)).unwrap().clone();
            (end("/refs/").parent().unwrap().to_owned(), end("/identity"))
        };
        // What a removal by an earlier version left in a store without conditional deletes.
        let a = files_below(&refs).remove(0);
        machine.import(&open(), "b", None).unwrap();
        let b = files_below(&refs).into_iter().find(|f| *f != a).unwrap();
        fs::remove_file(&identity).unwrap();
        empty(&b);
        let store = open();
        assert_eq!(names(&store), ["a"]);
        assert!(verify(&store).is_clean());
        store.gc(AT_ONCE).unwrap();
        assert!(matches!(store.remove(&Name::new("b").unwrap()), Err(StoreError::NoSuchSnapshot { .. })));
        assert!(!identity.exists() && fs::metadata(&b).unwrap().len() == 0, "none of these is a writer");
        machine.import(&open(), "c", None).unwrap();
        assert!(identity.exists());
        if key.is_none() {
            let left =
                Named::decode(&Domain::plain(), Some(&Name::new("b").unwrap()), &fs::read(&b).unwrap());
            assert!(matches!(left, Ok(Named::Removed(_))), "{left:?}");
        }
        assert_eq!(names(&open()), ["a", "c"]);
        // Also if the name is the very one that is written.
        fs::remove_file(&identity).unwrap();
        empty(&b);
        machine.import(&open(), "b", None).unwrap();
        open().remove(&Name::new("b").unwrap()).unwrap();
        assert!(verify(&open()).is_clean());
        machine.import(&open(), "b", None).unwrap();
        empty(&b);
        assert!(open().gc(AT_ONCE).is_err(), "from now on it is damage");
        assert!(!verify(&open()).is_clean());
    }
}

#[test]
fn readers_of_a_store_that_does_not_exist_say_so_and_make_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for open in [store_in, |dir: &Path| encrypted_store_in(dir, 1)] {
        let store = open(dir.path());
        let none = [
            store.list().map(drop),
            store.usage().map(drop),
            store.gc(AT_ONCE).map(drop),
            store.gc(GcOptions { dry_run: true, ..AT_ONCE }).map(drop),
            store.verify(None, VerifyDepth::Structure, &NoProgress).map(drop),
            store.repair(None, &RepairOptions::default(), &NoProgress).map(drop),
            store.repack(Default::default(), &NoProgress).map(drop),
        ];
        for (i, none) in none.into_iter().enumerate() {
            assert!(matches!(none, Err(StoreError::NothingStored { .. })), "{i}: {none:?}");
        }
        let gone = store.open_snapshot(&Name::new("a").unwrap());
        assert!(matches!(gone, Err(StoreError::NoSuchSnapshot { .. } | StoreError::NothingStored { .. })));
        assert!(!dir.path().join("store").exists(), "a reader makes no store");
    }
    // A disk that is not mounted is an empty directory.
    fs::create_dir(dir.path().join("store")).unwrap();
    assert!(matches!(store_in(dir.path()).gc(AT_ONCE), Err(StoreError::NothingStored { .. })));
    assert_eq!(files_below(&dir.path().join("store")).len(), 0);
    Machine::new(20, 2).import(&store_in(dir.path()), "a", None).unwrap();
    assert_eq!(names(&store_in(dir.path())), ["a"]);
}

#[test]
fn lost_keyrings_are_named_and_no_second_domain_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(50, 5);
    machine.import(&encrypted_store_in(dir.path(), 1), "a", None).unwrap();
    assert!(verify(&encrypted_store_in(dir.path(), 1)).is_clean());
    let keys = dir.path().join("store/keys");
    let kept = files_below(&keys).remove(0);
    fs::rename(&kept, dir.path().join("keyring")).unwrap();
    let folders = || fs::read_dir(dir.path().join("store")).unwrap().count();
    let before = folders();
    let domain = encrypted_store_in(dir.path(), 1).unopened_domains().unwrap().remove(0);
    for store in [encrypted_store_in(dir.path(), 1), in_the_clear(dir.path(), false)] {
        let report = verify(&store);
        assert_eq!(report.damages.len(), 1, "{report:?}");
        assert_eq!(report.damages[0].object, domain);
        let listed = store.list();
        assert!(
            matches!(&listed, Err(StoreError::KeyringLost { domains, .. }) if *domains == domain),
            "{listed:?}"
        );
    }
    let second = machine.import(&encrypted_store_in(dir.path(), 1), "a", None);
    assert!(matches!(second, Err(StoreError::KeyringLost { .. })), "{second:?}");
    assert_eq!(folders(), before, "no second domain");
    // With the keyring back, all is well, and another key may have a domain of its own.
    fs::rename(dir.path().join("keyring"), &kept).unwrap();
    machine.remember().check(&encrypted_store_in(dir.path(), 1), "a").unwrap();
    machine.import(&encrypted_store_in(dir.path(), 2), "a", None).unwrap();
    assert!(encrypted_store_in(dir.path(), 2).unopened_domains().unwrap().is_empty());
    assert!(verify(&encrypted_store_in(dir.path(), 2)).is_clean());
}

#[test]
fn a_damaged_identity_is_named_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    Machine::new(50, 5).import(&store, "a", None).unwrap();
    let identity = dir.path().join("store/plain/identity");
    empty(&identity);
    let report = verify(&store);
    assert_eq!(report.damages.iter().map(|d| d.object.as_str()).collect::<Vec<_>>(), ["plain/identity"]);
    // That one was there is known, so nothing empty passes for removed.
    empty(&dir.path().join("store/plain/refs/a"));
    assert!(store_in(dir.path()).gc(AT_ONCE).is_err());
    store.remove(&Name::new("a").unwrap()).unwrap();
    let repaired = store.repair(None, &RepairOptions::default(), &NoProgress).unwrap();
    assert!(repaired.left.is_clean() && repaired.found.len() == 1, "{repaired:?}");
    assert!(verify(&store).is_clean());
}

#[test]
fn nothing_is_stored_in_the_clear_beside_keys_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(50, 5);
    machine.import(&in_the_clear(dir.path(), false), "open", None).unwrap();
    machine.import(&encrypted_store_in(dir.path(), 1), "closed", None).unwrap();
    let before = files_below(&dir.path().join("store"));
    let refused = machine.import(&in_the_clear(dir.path(), false), "leak", None);
    let Err(StoreError::InTheClear { known, .. }) = &refused else { panic!("{refused:?}") };
    assert!(known.contains(&DomainKey::new([1; 32]).id().to_string()));
    assert_eq!(files_below(&dir.path().join("store")), before, "not a byte of it");
    machine.import(&in_the_clear(dir.path(), true), "meant", None).unwrap();
    assert_eq!(names(&in_the_clear(dir.path(), false)), ["meant", "open"], "reading is no matter of keys");
}
