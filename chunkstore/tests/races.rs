//! Many writers at once, on one host and on two: who was acknowledged has what was acknowledged.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    sync::{Arc, Barrier},
    thread,
};

use common::{Machine, Remembered, fresh, memory_backend};
use dormouse_chunkstore::{
    NoProgress, Result, Store, StoreError, StoreOptions, VerifyDepth,
    backend::{Backend, open_url},
};
use dormouse_core::Name;

const WRITERS: u64 = 8;

/// Two hosts with a cache of their own each, on one store.
fn two_hosts(backend: &Arc<dyn Backend>, caches: &std::path::Path) -> [Store; 2] {
    ["one", "two"].map(|host| {
        let options = StoreOptions { cache_dir: Some(caches.join(host)), ..Default::default() };
        Store::with_backend(backend.clone(), options)
    })
}

fn on_both_backends(race: impl Fn(&Arc<dyn Backend>, [Store; 2])) {
    let dir = tempfile::tempdir().unwrap();
    let local = open_url(dir.path().join("store").to_str().unwrap()).unwrap();
    race(&local, two_hosts(&local, &dir.path().join("caches-of-local")));
    let memory = memory_backend();
    race(&memory, two_hosts(&memory, &dir.path().join("caches-of-memory")));
}

/// A machine like all others but for a few pages.
fn machine(writer: u64, round: u64) -> Machine {
    let mut machine = Machine::new(60, 8);
    machine.rewrite_memory_pages(writer + 10, &[3, 7, round]);
    machine.state = format!("writer {writer}, round {round}").into_bytes();
    machine
}

/// Lets all writers begin at once and gives what each returned.
fn race<T: Send>(hosts: &[Store; 2], write: impl Fn(u64, &Store) -> T + Sync) -> Vec<T> {
    let start = Barrier::new(WRITERS as usize);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (host, start, write) = (&hosts[(writer % 2) as usize], &start, &write);
                scope.spawn(move || {
                    start.wait();
                    write(writer, host)
                })
            })
            .collect();
        writers.into_iter().map(|w| w.join().unwrap()).collect()
    })
}

#[test]
fn writers_of_different_names_do_not_disturb_each_other() {
    on_both_backends(|backend, hosts| {
        let stored: Vec<Vec<(String, Remembered)>> = race(&hosts, |writer, host| {
            let stored = (0..3).map(|round| {
                let machine = machine(writer, round);
                let name = format!("w{writer}-{round}");
                let parent = (round > 0).then(|| format!("w{writer}-{}", round - 1));
                machine.import(host, &name, parent.as_deref()).unwrap();
                (name, machine.remember())
            });
            stored.collect()
        });
        let store = fresh(backend, None);
        for (name, machine) in stored.iter().flatten() {
            machine.check(&store, name).unwrap();
        }
        assert_eq!(store.list().unwrap().len(), stored.iter().flatten().count());
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    });
}

#[test]
fn of_writers_of_one_new_name_exactly_one_wins() {
    on_both_backends(|backend, hosts| {
        for round in 0..4 {
            let name = format!("contested-{round}");
            let results: Vec<(Remembered, Result<_>)> = race(&hosts, |writer, host| {
                let machine = machine(writer, round);
                (machine.remember(), machine.import(host, &name, None))
            });
            let mut winners = 0;
            for (machine, result) in &results {
                match result {
                    Ok(_) => {
                        winners += 1;
                        machine.check(&fresh(backend, None), &name).unwrap();
                    }
                    // Who came later saw the name taken before it began, or when it was to move it.
                    Err(StoreError::Conflict { .. } | StoreError::Exists { .. }) => {}
                    Err(e) => panic!("{e:?}"),
                }
            }
            assert_eq!(winners, 1);
        }
        let store = fresh(backend, None);
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    });
}

#[test]
fn every_sequence_number_of_a_contested_name_has_one_winner() {
    on_both_backends(|backend, hosts| {
        let name = Name::new("contested").unwrap();
        machine(99, 0).import(&hosts[0], "contested", None).unwrap();
        // Acknowledged snapshots, by what they are.
        let acknowledged: Vec<Vec<(String, Remembered)>> = race(&hosts, |writer, host| {
            let mut won = Vec::new();
            for round in 0..4 {
                let machine = machine(writer, round);
                let mut request = machine.request("contested", Some("contested"));
                request.labels = vec![("writer".into(), format!("{writer}-{round}"))];
                match host.import(&request, &NoProgress) {
                    Ok(report) => won.push((report.snapshot, machine.remember())),
                    Err(StoreError::Conflict { .. }) => {}
                    Err(e) => panic!("{e:?}"),
                }
            }
            won
        });
        let all: BTreeMap<_, _> = acknowledged.into_iter().flatten().collect();
        assert!(!all.is_empty(), "somebody wins every time");
        let store = fresh(backend, None);
        let last = store.open_snapshot(&name).unwrap();
        assert_eq!(last.reference().sequence, 1 + all.len() as u64, "a win for each sequence number");
        all[&last.reference().snapshot.to_string()].check(&store, "contested").unwrap();
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    });
}

#[test]
fn removals_and_imports_of_one_name_leave_it_whole_or_gone() {
    on_both_backends(|backend, hosts| {
        let name = Name::new("contested").unwrap();
        race(&hosts, |writer, host| {
            for round in 0..4 {
                let machine = machine(writer, round);
                let result = if writer % 4 == 3 {
                    host.remove(&name)
                } else {
                    let mut request = machine.request("contested", None);
                    request.replace = true;
                    host.import(&request, &NoProgress).map(drop)
                };
                match result {
                    Ok(()) | Err(StoreError::Conflict { .. } | StoreError::NoSuchSnapshot { .. }) => {}
                    Err(e) => panic!("{e:?}"),
                }
            }
        });
        let store = fresh(backend, None);
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
        if let Ok(snapshot) = store.open_snapshot(&name) {
            let state = String::from_utf8(snapshot.read_blob("vmstate").unwrap()).unwrap();
            let numbers: Vec<u64> =
                state.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
            machine(numbers[0], numbers[1]).remember().check(&store, "contested").unwrap();
        }
    });
}

/// An index remembers what a footer said, not what became of its pack.
#[test]
fn a_pack_that_was_cut_short_is_not_shared_though_its_footer_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let backend = memory_backend();
    let [host, _] = two_hosts(&backend, dir.path());
    let before = Machine::new(60, 8);
    before.import(&host, "before", None).unwrap();
    let packs = common::objects(&*backend).into_iter().filter(|(key, _)| key.contains("/packs/"));
    let (key, bytes) = packs.max_by_key(|(_, bytes)| bytes.len()).unwrap();
    backend.put_again(&key, bytes.slice(..bytes.len() - 100)).unwrap();
    // The same pages: without the check, none of them would be stored.
    let report = before.import(&host, "after", None).unwrap();
    assert!(report.new_bytes > 0, "{report:?}");
    before.remember().check(&fresh(&backend, None), "after").unwrap();
    let name = Name::new("after").unwrap();
    let report = fresh(&backend, None).verify(Some(&name), VerifyDepth::Content, &NoProgress).unwrap();
    assert!(report.is_clean(), "{report:?}");
}
