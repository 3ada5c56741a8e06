//! How verification goes about it: what it reads, how often, and what it does at the same time.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Condvar, Mutex};

use common::{Machine, memory_backend, objects};
use dormouse_chunkstore::{NoProgress, Store, VerifyDepth, backend::faulty::FaultyBackend};
use dormouse_core::Name;

#[test]
fn each_page_map_and_each_pack_is_read_once_however_many_generations_share_it() {
    let memory = memory_backend();
    let counting = Arc::new(FaultyBackend::counting(memory.clone()));
    let store = Store::with_backend(counting.clone(), Default::default());
    // Nine sections of memory and one of disk.
    let mut machine = Machine::new(98_304, 20);
    machine.import(&store, "g0", None).unwrap();
    for generation in 1..=5u64 {
        let dirty = machine.change_memory_pages(&[generation * 7]);
        machine
            .import_dirty(&store, &format!("g{generation}"), &format!("g{}", generation - 1), dirty)
            .unwrap();
    }
    let sections = store.open_snapshot(&Name::new("g0").unwrap()).unwrap();
    let sections = sections.root().images.iter().flat_map(|i| &i.sections).flatten().count() as u64;
    let packs = objects(&*memory).keys().filter(|key| key.contains("/packs/")).count() as u64;
    counting.counts().take();
    assert!(store.verify(None, VerifyDepth::Structure, &NoProgress).unwrap().is_clean());
    let asked = counting.counts().take();
    // The identity; references and roots of six; all maps of g0, then one a generation. Domains and references are listed.
    assert_eq!((asked.gets, asked.heads, asked.lists), (1 + 6 + 6 + sections + 5, packs, 2));
    assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    let asked = counting.counts().take();
    assert_eq!((asked.gets, asked.heads, asked.lists), (1 + 6 + 6 + sections + 5 + packs, 0, 2));
}

/// Packs of pages that are being read at this moment, and the most there ever were.
#[derive(Default)]
struct Reading {
    now: Mutex<(usize, usize)>,
    changed: Condvar,
}

#[test]
fn packs_are_checked_side_by_side_and_no_more_of_them_than_fit_into_memory() {
    let memory = memory_backend();
    let store = Store::with_backend(memory.clone(), Default::default());
    for salt in 0..20 {
        Machine::unlike(salt, 20, 2).import(&store, &format!("m{salt}"), None).unwrap();
    }
    // Those of pages are read for their own sake alone; those of page maps are read before.
    let mut packs: Vec<_> =
        objects(&*memory).into_iter().filter(|(key, _)| key.contains("/packs/")).collect();
    packs.sort_by_key(|(_, bytes)| std::cmp::Reverse(bytes.len()));
    let pages: Vec<String> = packs.into_iter().take(20).map(|(key, _)| key).collect();
    let reading = Arc::new(Reading::default());
    let at_read = reading.clone();
    // The first reads wait until there are eight: one after the other, this would never end.
    let slow = FaultyBackend::new(memory, move |_, op, key| {
        if op == "get" && pages.iter().any(|page| page == key) {
            let mut now = at_read.now.lock().unwrap();
            now.0 += 1;
            now.1 = now.1.max(now.0);
            at_read.changed.notify_all();
            now = at_read.changed.wait_while(now, |now| now.1 < 8).unwrap();
            now.0 -= 1;
        }
        None
    });
    let slow = Store::with_backend(Arc::new(slow), Default::default());
    assert!(slow.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    assert_eq!(reading.now.lock().unwrap().1, 8);
}
