//! Who may read what: domains and the keys that open them.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    sync::{Arc, Barrier},
};

use common::{Machine, copy_of, fresh, memory_backend, objects};
use dormouse_chunkstore::{
    GcOptions, NoProgress, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{
        Backend,
        faulty::{Counted, Fault, FaultyBackend},
    },
};
use dormouse_core::{DomainKey, FormatError, Name};

fn key(k: u8) -> DomainKey {
    DomainKey::new([k; 32])
}

fn keyring_of(k: u8) -> String {
    format!("keys/{}", key(k).id())
}

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

/// The objects of a domain without its prefix.
fn folder(backend: &Arc<dyn Backend>, store: &Store) -> BTreeSet<String> {
    let prefix = format!("{}/", store.domain().id());
    let objects = objects(&**backend);
    let names = objects.keys().filter_map(|k| k.strip_prefix(&prefix).map(str::to_owned));
    // That each has one of these is no secret.
    names.filter(|name| name != "identity").collect()
}

#[test]
fn a_key_is_rotated_without_rewriting_data() {
    let backend = memory_backend();
    let machine = Machine::new(200, 20);
    let remembered = machine.remember();
    let old = fresh(&backend, Some(1));
    machine.import(&old, "a", None).unwrap();
    let before = objects(&*backend);
    let report = old.rotate_key(&key(2), false).unwrap();
    assert!(!report.dropped_old);
    let after = objects(&*backend);
    let added: Vec<_> = after.keys().filter(|k| !before.contains_key(*k)).collect();
    assert_eq!(added, [&keyring_of(2)], "one small object and nothing else");
    assert!(before.iter().all(|(k, bytes)| after[k] == *bytes));
    for k in [1, 2] {
        let store = fresh(&backend, Some(k));
        remembered.check(&store, "a").unwrap();
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    }
    // What either key stores, the other shares and reads.
    let report = machine.import(&fresh(&backend, Some(2)), "b", None).unwrap();
    assert_eq!(report.new_bytes, 0);
    remembered.check(&fresh(&backend, Some(1)), "b").unwrap();
}

#[test]
fn a_dropped_key_opens_nothing_and_names_its_successor() {
    let backend = memory_backend();
    let machine = Machine::new(50, 5);
    let old = fresh(&backend, Some(1));
    machine.import(&old, "a", None).unwrap();
    assert!(old.rotate_key(&key(2), true).unwrap().dropped_old);
    let stale = fresh(&backend, Some(1));
    let is_retired = |e: StoreError| {
        let expected = key(2).id().to_string();
        assert!(matches!(&e, StoreError::KeyRetired { successor, .. } if *successor == expected), "{e}");
    };
    is_retired(stale.open_snapshot(&name("a")).unwrap_err());
    is_retired(stale.list().unwrap_err());
    is_retired(machine.import(&stale, "c", None).unwrap_err());
    is_retired(stale.gc(GcOptions::default()).unwrap_err());
    is_retired(fresh(&backend, Some(2)).rotate_key(&key(1), false).unwrap_err());
    machine.remember().check(&fresh(&backend, Some(2)), "a").unwrap();
    // The old key's holder learns nothing from the note, and what they had open goes on working.
    machine.remember().check(&old, "a").unwrap();
}

#[test]
fn rotation_is_done_wholly_or_can_be_done_again() {
    for fault in [Fault::Fail, Fault::LoseAnswer, Fault::Dead] {
        for n in 0..6 {
            let backend = memory_backend();
            let machine = Machine::new(20, 5);
            machine.import(&fresh(&backend, Some(1)), "a", None).unwrap();
            let faulty = Arc::new(FaultyBackend::counting(backend.clone()));
            let options = StoreOptions { key: Some(key(1)), ..Default::default() };
            let store = Store::with_backend(faulty.clone(), options);
            faulty.set_plan(move |at, _, _| (at == n).then_some(fault));
            let done = store.rotate_key(&key(2), true);
            faulty.set_plan(|_, _, _| None);
            let opens = |k| machine.remember().check(&fresh(&backend, Some(k)), "a").is_ok();
            assert!(opens(1) || opens(2), "{fault:?} at {n} locked everybody out");
            if done.is_err() && opens(1) {
                store.rotate_key(&key(2), true).unwrap();
            }
            assert!(opens(2) && !opens(1), "{fault:?} at {n}");
        }
    }
}

#[test]
fn keys_of_two_domains_are_not_mixed_up() {
    let backend = memory_backend();
    let machine = Machine::new(20, 5);
    for k in [1, 2] {
        machine.import(&fresh(&backend, Some(k)), "a", None).unwrap();
    }
    let error = fresh(&backend, Some(1)).rotate_key(&key(2), true).unwrap_err();
    assert!(error.to_string().contains("another domain"), "{error}");
    machine.remember().check(&fresh(&backend, Some(1)), "a").unwrap();
    let same = fresh(&backend, Some(1)).rotate_key(&key(1), true).unwrap_err();
    assert!(matches!(same, StoreError::Usage(_)), "{same}");
    assert!(matches!(
        fresh(&backend, Some(9)).rotate_key(&key(8), false),
        Err(StoreError::UnknownKey { .. })
    ));
    assert!(matches!(fresh(&backend, None).rotate_key(&key(8), false), Err(StoreError::Usage(_))));
}

#[test]
fn a_wrong_key_is_told_which_keys_there_are() {
    let backend = memory_backend();
    let machine = Machine::new(20, 5);
    machine.import(&fresh(&backend, Some(1)), "a", None).unwrap();
    let before = objects(&*backend);
    let wrong = fresh(&backend, Some(2));
    let failures = [
        wrong.open_snapshot(&name("a")).map(drop).unwrap_err(),
        wrong.list().map(drop).unwrap_err(),
        wrong.usage().map(drop).unwrap_err(),
        wrong.remove(&name("a")).unwrap_err(),
        wrong.gc(GcOptions::default()).map(drop).unwrap_err(),
        wrong.repack(Default::default(), &NoProgress).map(drop).unwrap_err(),
        wrong.verify(None, VerifyDepth::Structure, &NoProgress).map(drop).unwrap_err(),
        machine.import(&wrong, "b", Some("a")).map(drop).unwrap_err(),
    ];
    for error in failures {
        assert!(matches!(error, StoreError::UnknownKey { .. }), "{error}");
        assert!(error.to_string().contains(&key(1).id().to_string()), "{error}");
    }
    let objects_now = objects(&*backend);
    assert!(before.keys().all(|k| objects_now.contains_key(k)), "nothing was touched");
}

#[test]
fn without_a_key_one_is_told_that_everything_is_encrypted() {
    let backend = memory_backend();
    Machine::new(20, 5).import(&fresh(&backend, Some(1)), "a", None).unwrap();
    let plain = fresh(&backend, None);
    for error in [plain.open_snapshot(&name("a")).map(drop), plain.list().map(drop)].map(Result::unwrap_err) {
        assert!(matches!(error, StoreError::KeyNeeded { .. }), "{error}");
        assert!(error.to_string().contains("--key-file"), "{error}");
    }
    // As soon as there is something without encryption, a name that is not there is just that.
    Machine::new(20, 5).import(&plain, "b", None).unwrap();
    assert!(matches!(plain.open_snapshot(&name("a")), Err(StoreError::NoSuchSnapshot { .. })));
}

#[test]
fn an_empty_store_is_none_with_any_key() {
    let backend = memory_backend();
    for key in [None, Some(1)] {
        let store = fresh(&backend, key);
        assert!(matches!(store.list(), Err(StoreError::NothingStored { .. })));
        assert!(matches!(store.open_snapshot(&name("a")), Err(StoreError::NoSuchSnapshot { .. })));
        let repacked = store.repack(Default::default(), &NoProgress);
        assert!(matches!(repacked, Err(StoreError::NothingStored { .. })));
    }
    let collected = fresh(&backend, Some(1)).gc(GcOptions::default());
    assert!(matches!(collected, Err(StoreError::NothingStored { .. })));
    assert!(objects(&*backend).is_empty(), "looking leaves nothing behind");
}

#[test]
fn opening_with_a_key_is_one_read_and_without_one_none() {
    let backend = memory_backend();
    let machine = Machine::new(20, 5);
    for (k, gets) in [(None, 0), (Some(1), 1)] {
        machine.import(&fresh(&backend, k), "a", None).unwrap();
        let counting = Arc::new(FaultyBackend::counting(backend.clone()));
        let options = StoreOptions { key: k.map(key), ..Default::default() };
        let store = Store::with_backend(counting.clone(), options);
        let asked = counting.counts().take();
        assert_eq!(asked, Counted { gets, get_bytes: asked.get_bytes, ..Default::default() });
        store.open_snapshot(&name("a")).unwrap();
        let asked = counting.counts().take();
        assert_eq!(asked, Counted { gets: 2, get_bytes: asked.get_bytes, ..Default::default() });
    }
}

#[test]
fn hosts_that_found_a_domain_at_the_same_moment_agree_on_one() {
    for _ in 0..10 {
        let backend = memory_backend();
        let barrier = Barrier::new(4);
        std::thread::scope(|scope| {
            for w in 0..4 {
                let (backend, barrier) = (&backend, &barrier);
                scope.spawn(move || {
                    let store = fresh(backend, Some(1));
                    let machine = Machine::new(30, 5);
                    barrier.wait();
                    machine.import(&store, &format!("w{w}"), None).unwrap();
                });
            }
        });
        let store = fresh(&backend, Some(1));
        assert_eq!(store.list().unwrap().len(), 4);
        let prefix = format!("{}/", store.domain().id());
        assert!(objects(&*backend).keys().all(|k| k.starts_with(&prefix) || *k == keyring_of(1)));
    }
}

#[test]
fn a_lost_answer_while_founding_founds_one_domain() {
    for fault in [Fault::Fail, Fault::LoseAnswer] {
        let backend = memory_backend();
        let faulty = Arc::new(FaultyBackend::new(backend.clone(), move |_, op, key| {
            (op == "put" && key.starts_with("keys/")).then_some(fault)
        }));
        let options = StoreOptions { key: Some(key(1)), ..Default::default() };
        let store = Store::with_backend(faulty.clone(), options);
        let machine = Machine::new(20, 5);
        let done = machine.import(&store, "a", None);
        assert_eq!(done.is_ok(), fault == Fault::LoseAnswer, "{done:?}");
        faulty.set_plan(|_, _, _| None);
        machine.import(&store, "b", None).unwrap();
        machine.remember().check(&fresh(&backend, Some(1)), "b").unwrap();
    }
}

#[test]
fn two_domains_share_nothing_and_learn_nothing_of_each_other() {
    let backend = memory_backend();
    let machine = Machine::new(300, 30);
    let (one, two) = (fresh(&backend, Some(1)), fresh(&backend, Some(2)));
    let first = machine.import(&one, "same-name", None).unwrap();
    let second = machine.import(&two, "same-name", None).unwrap();
    // The second stores all of it again: how much is new says nothing of what the first has.
    assert_eq!((first.new_bytes, first.objects), (second.new_bytes, second.objects));
    // Keyed ids and times are other bytes in each, and compress to a byte more or less; one shared page would be 2 KiB.
    assert!(first.stored_bytes.abs_diff(second.stored_bytes) < 64, "{first:?} {second:?}");
    assert_ne!(first.snapshot, second.snapshot, "identities are keyed");
    let (ours, theirs) = (folder(&backend, &one), folder(&backend, &two));
    assert!(!ours.is_empty() && ours.is_disjoint(&theirs), "not one name in common");
    let all = objects(&*backend);
    let text = all.keys().cloned().collect::<String>();
    assert!(!text.contains("same-name"), "names are not in keys");
    // Nor is any sealed value the same, though the content is.
    let bodies = |store: &Store| -> BTreeSet<Vec<u8>> {
        let prefix = format!("{}/", store.domain().id());
        let mine = all.iter().filter(|(k, _)| k.starts_with(&prefix));
        mine.flat_map(|(_, bytes)| bytes[32..].chunks_exact(64).map(<[u8]>::to_vec).collect::<Vec<_>>())
            .collect()
    };
    assert!(bodies(&one).is_disjoint(&bodies(&two)));
    // And neither key opens the other's keyring, wherever it is put.
    let swapped = copy_of(&*backend);
    swapped.put_again(&keyring_of(1), all[&keyring_of(2)].clone()).unwrap();
    let error = fresh(&swapped, Some(1)).list().unwrap_err();
    assert!(matches!(error, StoreError::Damaged { why: FormatError::WrongKey(_), .. }), "{error}");
}

#[test]
fn a_damaged_keyring_is_named_and_never_replaced() {
    let backend = memory_backend();
    let machine = Machine::new(20, 5);
    machine.import(&fresh(&backend, Some(1)), "a", None).unwrap();
    let whole = objects(&*backend)[&keyring_of(1)].clone();
    for at in 0..whole.len() {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 0x10;
        backend.put_again(&keyring_of(1), bytes.clone().into()).unwrap();
        let store = fresh(&backend, Some(1));
        for error in [
            store.list().map(drop).unwrap_err(),
            machine.import(&store, "b", None).map(drop).unwrap_err(),
            store.rotate_key(&key(2), true).map(drop).unwrap_err(),
        ] {
            assert!(matches!(&error, StoreError::Damaged { key, .. } if *key == keyring_of(1)), "{error}");
        }
        assert_eq!(objects(&*backend)[&keyring_of(1)], bytes);
    }
    for cut in 0..whole.len() {
        backend.put_again(&keyring_of(1), whole.slice(..cut)).unwrap();
        assert!(matches!(fresh(&backend, Some(1)).list(), Err(StoreError::Damaged { .. })), "{cut}");
    }
    backend.put_again(&keyring_of(1), whole).unwrap();
    machine.remember().check(&fresh(&backend, Some(1)), "a").unwrap();
}

#[test]
fn the_list_of_keys_says_which_is_in_use() {
    let backend = memory_backend();
    Machine::new(20, 5).import(&fresh(&backend, Some(1)), "a", None).unwrap();
    let store = fresh(&backend, Some(1));
    store.rotate_key(&key(2), false).unwrap();
    let list = store.key_list().unwrap();
    assert_eq!(list.domain, Some(store.domain().id().to_string()));
    let mut in_use: Vec<_> = list.keys.iter().map(|k| (k.key_id.clone(), k.in_use)).collect();
    in_use.sort();
    let mut expected = vec![(key(1).id().to_string(), true), (key(2).id().to_string(), false)];
    expected.sort();
    assert_eq!(in_use, expected);
    let without = fresh(&backend, None).key_list().unwrap();
    assert_eq!((without.domain, without.keys.len()), (None, 2));
}
