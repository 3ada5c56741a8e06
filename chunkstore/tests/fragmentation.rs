//! How scattered a snapshot is, as the usage report says it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, fresh, store_in_memory};
use dormouse_chunkstore::{
    GcOptions, ImportReport, NoProgress, RepackOptions, SECTION_PACKS_MAX, Scatter, Store, VerifyDepth,
};
use dormouse_core::Name;

const AT_ONCE: GcOptions = GcOptions { grace: std::time::Duration::ZERO, dry_run: false };

fn scattered(store: &Store, name: &str) -> (f64, f64) {
    let report = store.usage().unwrap();
    let row = report.snapshots.iter().find(|s| s.name == name).unwrap();
    (row.scatter.packs_per_64_mib, row.scatter.reads_per_64_mib)
}

#[test]
fn generations_scatter_a_machine_and_repacking_gathers_it() {
    let store = store_in_memory();
    let mut machine = Machine::new(400, 30);
    machine.import(&store, "g0", None).unwrap();
    assert_eq!(scattered(&store, "g0"), (1.0, 1.0), "one pack, read at once");
    for generation in 1..=5u64 {
        machine.change(generation, 20);
        let (me, parent) = (format!("g{generation}"), format!("g{}", generation - 1));
        machine.import(&store, &me, Some(&parent)).unwrap();
    }
    let (packs, reads) = scattered(&store, "g5");
    assert_eq!(packs, 6.0, "a pack of each generation");
    assert!(reads >= packs);
    store.repack(Default::default(), &NoProgress).unwrap();
    store.gc(AT_ONCE).unwrap();
    assert_eq!(scattered(&store, "g5").0, 1.0);
}

/// Generations of a machine of which each changes `dirty` pages elsewhere; what each import said, and how scattered the
/// snapshot then was.
fn scatter_generations(
    store: &Store,
    generations: u64,
    pages: u64,
    dirty: u64,
) -> Vec<(ImportReport, Scatter)> {
    let mut machine = Machine::new(pages, 8);
    machine.import(store, "g0", None).unwrap();
    let mut all = Vec::new();
    for generation in 1..=generations {
        let changed: Vec<u64> = (0..dirty).map(|i| (i * 61 + generation * 7) % pages).collect();
        machine.rewrite_memory_pages(generation, &changed);
        let (me, parent) = (format!("g{generation}"), format!("g{}", generation - 1));
        let dirty = changed.iter().map(|p| *p..*p + 1).collect();
        let report = machine.import_dirty(store, &me, &parent, dirty).unwrap();
        let scatter = store.open_snapshot(&Name::new(&me).unwrap()).unwrap().scatter().unwrap();
        all.push((report, scatter));
    }
    machine.remember().check(store, &format!("g{generations}")).unwrap();
    all
}

#[test]
fn two_hundred_generations_stay_within_the_packs_a_section_may_lie_in() {
    for (pages, dirty) in [(3_000, 50), (10_000, 16)] {
        let store = store_in_memory();
        let all = scatter_generations(&store, 200, pages, dirty);
        let most = all.iter().map(|(_, s)| s.most_packs_in_a_section).max().unwrap();
        assert!(most <= SECTION_PACKS_MAX as u64, "a section in {most} packs");
        let sum = |of: fn(&ImportReport) -> u64| all.iter().map(|(report, _)| of(report)).sum::<u64>();
        let (new, gathered) = (sum(|r| r.new_bytes), sum(|r| r.gathered_bytes));
        assert!(gathered > new / 2, "without it a section would be in {pages} packs or a pack a generation");
        assert!(gathered < new, "{gathered} bytes stored again for {new} new ones");
        // Pages take half of what they are, and page maps come on top.
        let stored = sum(|r| r.stored_bytes);
        assert!(stored < new * 115 / 100, "{stored} bytes stored for {new} new ones");
        for (report, _) in &all {
            let most = report.new_bytes * 8 + (4 << 20);
            assert!(report.gathered_bytes <= most, "an import stays within its budget: {report:?}");
        }
        // Repacking leaves one of each page again, whichever generation refers to which copy.
        store.repack(RepackOptions { level: 3, ..Default::default() }, &NoProgress).unwrap();
        store.gc(AT_ONCE).unwrap();
        let total = store.usage().unwrap().total;
        let first = (pages + 8) * 4096;
        assert!(total.unique_bytes <= new + first, "{total:?}");
        let times = all.iter().filter(|(report, _)| report.gathered_bytes > 0).count();
        assert!((10..=200 / 8).contains(&times), "eight generations or more share the cost: {times}");
        assert!(store.verify(None, VerifyDepth::Content, &NoProgress).unwrap().is_clean());
    }
}

#[test]
fn stragglers_that_are_damaged_stay_where_they_are() {
    let backend = common::memory_backend();
    let store = fresh(&backend, None);
    scatter_generations(&store, 31, 3_000, 50);
    let packs: Vec<_> =
        common::objects(&*backend).into_iter().filter(|(key, _)| key.contains("/packs/")).collect();
    let mut machine = Machine::new(3_000, 8);
    let ranges = machine.change_memory_pages(&[5, 9]);
    let undamaged = fresh(&common::copy_of(&*backend), None);
    let report = machine.import_dirty(&undamaged, "next", "g31", ranges.clone()).unwrap();
    assert!(report.gathered_bytes > 0);
    // The first frame of each pack of pages. Those of page maps are much smaller.
    for (key, bytes) in packs.iter().filter(|(_, bytes)| bytes.len() > 60_000) {
        let mut damaged = bytes.to_vec();
        damaged[40] ^= 1;
        backend.put_again(key, damaged.into()).unwrap();
    }
    let report = machine.import_dirty(&fresh(&backend, None), "next", "g31", ranges).unwrap();
    assert_eq!(report.gathered_bytes, 0);
}

#[test]
fn an_encrypted_machine_is_gathered_as_well_and_keeps_its_identity() {
    let [plain, encrypted] = [None, Some(7)].map(|key| {
        let backend = common::memory_backend();
        let store = fresh(&backend, key);
        let all = scatter_generations(&store, 40, 3_000, 50);
        assert!(all.iter().any(|(report, _)| report.gathered_bytes > 0));
        all.iter().map(|(report, _)| report.gathered_bytes).collect::<Vec<_>>()
    });
    assert_eq!(plain, encrypted);
}
