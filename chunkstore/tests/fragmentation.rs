//! How scattered a snapshot is, as the usage report says it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, store_in_memory};
use dormouse_chunkstore::{GcOptions, NoProgress, Store};

fn scattered(store: &Store, name: &str) -> (f64, f64) {
    let report = store.usage().unwrap();
    let row = report.snapshots.iter().find(|s| s.name == name).unwrap();
    (row.packs_per_64_mib, row.reads_per_64_mib)
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
    store.gc(GcOptions { grace: std::time::Duration::ZERO, dry_run: false }).unwrap();
    assert_eq!(scattered(&store, "g5").0, 1.0);
}
