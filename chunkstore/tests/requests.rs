//! Requests are counted: a fast path that silently stops being taken fails a test.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Machine, memory_backend};
use dormouse_chunkstore::{
    NoProgress, Store, StoreOptions,
    backend::{
        Backend,
        faulty::{Counted, FaultyBackend},
        modelled::{FirstByte, ModelledBackend, StoreModel},
    },
};
use dormouse_core::{ImageKind, Name, PageIndex};

struct Host {
    counting: Arc<FaultyBackend>,
    store: Store,
    _cache: tempfile::TempDir,
}

/// A host of its own on a store: caches are its own and begin empty.
fn host(backend: &Arc<dyn Backend>) -> Host {
    let counting = Arc::new(FaultyBackend::counting(backend.clone()));
    let cache = tempfile::tempdir().unwrap();
    let options = StoreOptions { cache_dir: Some(cache.path().to_owned()), ..Default::default() };
    let store = Store::with_backend(counting.clone(), options);
    Host { counting, store, _cache: cache }
}

/// Names of the same length, so that references are too.
fn name(generation: u64) -> String {
    format!("generation-{generation:04}")
}

/// What one generation asked of the store.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    opened: Counted,
    read: Counted,
    stored_same_host: Counted,
    stored_new_host: Counted,
}

/// Makes generations whose dirty pages are those `dirty` says, and counts what the `probed` ones ask for: opening
/// one and reading a page, and storing its child, by the host that stored all before and by one that knows nothing.
fn generations(probed: [u64; 2], dirty: impl Fn(u64) -> Vec<u64>) -> [Asked; 2] {
    let backend = memory_backend();
    let home = host(&backend);
    let mut machine = Machine::new(2_000, 8);
    machine.import(&home.store, &name(0), None).unwrap();
    let import = |host: &Host, machine: &Machine, from: u64, pages: &[u64]| {
        let mut request = machine.request(&name(from + 1), Some(&name(from)));
        let ranges = pages.iter().map(|p| *p..*p + 1).collect();
        request.images[0].dirty = Some(dormouse_chunkstore::Dirty::Ranges(ranges));
        request.images[1].dirty = Some(dormouse_chunkstore::Dirty::Ranges(Vec::new()));
        host.counting.counts().take();
        host.store.import(&request, &NoProgress).unwrap();
        host.counting.counts().take()
    };
    let mut asked = Vec::new();
    for generation in 0..=probed[1] {
        let pages = dirty(generation + 1);
        machine.rewrite_memory_pages(generation + 1, &pages);
        if probed.contains(&generation) {
            let stranger = host(&common::copy_of(&*backend));
            let snapshot = stranger.store.open_snapshot(&Name::new(name(generation)).unwrap()).unwrap();
            let opened = stranger.counting.counts().take();
            let image = snapshot.image(ImageKind::Memory, "memory").unwrap();
            image.locate(PageIndex(0)).unwrap();
            let read = stranger.counting.counts().take();
            let other = host(&common::copy_of(&*backend));
            let stored_new_host = import(&other, &machine, generation, &pages);
            let stored_same_host = import(&home, &machine, generation, &pages);
            asked.push(Asked { opened, read, stored_same_host, stored_new_host });
        } else {
            import(&home, &machine, generation, &pages);
        }
    }
    let asked: [Asked; 2] = asked.try_into().unwrap();
    machine.remember().check(&home.store, &name(probed[1] + 1)).unwrap();
    asked
}

#[test]
fn opening_a_snapshot_is_two_reads() {
    let backend = memory_backend();
    let home = host(&backend);
    Machine::new(100, 10).import(&home.store, "a", None).unwrap();
    home.counting.counts().take();
    home.store.open_snapshot(&Name::new("a").unwrap()).unwrap();
    let asked = home.counting.counts().take();
    assert_eq!(asked, Counted { gets: 2, get_bytes: asked.get_bytes, ..Default::default() });
}

#[test]
fn generation_1000_asks_for_what_generation_2_did() {
    let [early, late] = generations([2, 1_000], |_| (0..50).map(|i| i * 17).collect());
    assert_eq!(early, late);
}

#[test]
fn pages_dirtied_all_over_do_not_make_later_generations_dearer() {
    // Every generation dirties other pages, so that each section is soon made of pages of many generations. Its
    // page map lists more frames then, until all of its pages were dirtied; requests do not grow with it. Of these
    // generations neither gathers stragglers; what those ask for that do is counted below.
    let [early, late] = generations([30, 60], |g| (0..50).map(|i| (i * 61 + g * 7) % 3_000).collect());
    let requests = |c: &Counted| Counted { get_bytes: 0, put_bytes: 0, ..*c };
    let all = |a: &Asked| [a.opened, a.read, a.stored_same_host, a.stored_new_host];
    assert_eq!(all(&early).map(|c| requests(&c)), all(&late).map(|c| requests(&c)));
    assert_eq!(early.opened, late.opened);
    let (before, after) = (early.stored_same_host.put_bytes, late.stored_same_host.put_bytes);
    assert!(after < before + before / 20, "{before} bytes, then {after}");
}

#[test]
fn a_generation_that_gathers_stragglers_asks_for_them_and_nothing_else() {
    let home = host(&memory_backend());
    let mut machine = Machine::new(3_000, 8);
    machine.import(&home.store, &name(0), None).unwrap();
    let (mut others, mut gathered) = (Vec::new(), Vec::new());
    for generation in 1..=120 {
        let pages: Vec<u64> = (0..50).map(|i| (i * 61 + generation * 7) % 3_000).collect();
        machine.rewrite_memory_pages(generation, &pages);
        let mut request = machine.request(&name(generation), Some(&name(generation - 1)));
        let ranges = pages.iter().map(|p| *p..*p + 1).collect();
        request.images[0].dirty = Some(dormouse_chunkstore::Dirty::Ranges(ranges));
        request.images[1].dirty = Some(dormouse_chunkstore::Dirty::Ranges(Vec::new()));
        home.counting.counts().take();
        let report = home.store.import(&request, &NoProgress).unwrap();
        let asked = home.counting.counts().take();
        others.push(Counted {
            gets: asked.gets - report.gathered_reads,
            get_bytes: 0,
            put_bytes: 0,
            ..asked
        });
        gathered.push(report.gathered_reads);
    }
    assert!(others[1..].iter().all(|asked| *asked == others[1]), "{others:?}");
    // One request for each pack that is emptied, and no pack is emptied that no generation filled.
    let gathered_in = |range: std::ops::Range<usize>| gathered[range].iter().sum::<u64>();
    assert!(gathered.iter().all(|reads| [0, 9].contains(reads)), "{gathered:?}");
    assert_eq!(gathered_in(0..31), 0);
    assert!((81..=99).contains(&gathered_in(31..120)), "{gathered:?}");
    machine.remember().check(&home.store, &name(120)).unwrap();
}

/// A store whose first bytes are late enough for whoever is to ask at the same time to have done so.
fn far_away(backend: &Arc<dyn Backend>) -> Arc<ModelledBackend> {
    let late = FirstByte::Fixed(std::time::Duration::from_millis(60));
    Arc::new(ModelledBackend::new(backend.clone(), Some(StoreModel { first_byte: late, ..StoreModel::NEAR })))
}

#[test]
fn a_collection_reads_side_by_side_what_it_used_to_read_in_a_row() {
    let backend = memory_backend();
    let store = common::fresh(&backend, None);
    let mut machine = Machine::new(20, 2);
    for generation in 0..100u64 {
        machine.rewrite_memory_pages(generation + 1, &[3]);
        machine.import(&store, &name(generation), None).unwrap();
    }
    let modelled = far_away(&backend);
    Store::with_backend(modelled.clone(), StoreOptions::default()).gc(Default::default()).unwrap();
    // Expiry and both rounds of marking read the references, the first also roots and page maps, of memory and disk, and the
    // disk's is the same in all. The lease is read three times.
    let (reads, _) = modelled.take_reads();
    assert!((3 * 100 + 100 + 101 + 3..=3 * 100 + 100 + 200 + 3).contains(&reads), "{reads}");
    let most = modelled.take_most_in_flight();
    assert!((32..=64).contains(&most), "{most} at a time");
}

#[test]
fn a_host_that_knows_nothing_reads_footers_side_by_side() {
    let backend = memory_backend();
    let store = common::fresh(&backend, None);
    let mut machine = Machine::new(20, 2);
    for generation in 0..50u64 {
        machine.rewrite_memory_pages(generation + 1, &[3]);
        machine.import(&store, &name(generation), None).unwrap();
    }
    let packs = common::objects(&*backend).keys().filter(|key| key.contains("/packs/")).count() as u64;
    assert!(packs >= 100, "{packs}: pages and page maps of each");
    let modelled = far_away(&backend);
    let stranger = Store::with_backend(modelled.clone(), StoreOptions::default());
    let report = machine.import(&stranger, "again", None).unwrap();
    assert_eq!(report.new_bytes, 0, "all of it is known");
    let looked_up = modelled.take_reads().0 - 2 * packs;
    assert!(looked_up < 20, "two reads a footer, and {looked_up} others");
    let most = modelled.take_most_in_flight();
    assert!((32..=64).contains(&most), "{most} at a time");
}
