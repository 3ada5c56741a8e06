//! Resume streams: right, current, optional, and one round trip.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex, atomic::Ordering};

use common::{Machine, store_in};
use dormouse_chunkstore::{
    GcOptions, NoProgress, Resume, Store, StoreError, StoreOptions, Tier, TouchedRun,
    backend::{faulty::FaultyBackend, open_url},
};
use dormouse_core::{ImageKind, Name};

fn name(n: &str) -> Name {
    Name::new(n).unwrap()
}

fn touched(pages: &[std::ops::Range<u64>]) -> Vec<TouchedRun> {
    pages.iter().map(|pages| TouchedRun { image: 0, pages: pages.clone() }).collect()
}

fn first_pages(pages: u64) -> Vec<TouchedRun> {
    vec![TouchedRun { image: 0, pages: 0..pages }]
}

/// The pages a stream brings, checked against the machine's memory file.
fn streamed_pages(resume: &Resume, machine: &Machine) -> Vec<u64> {
    let memory = std::fs::read(machine.path("memory")).unwrap();
    let pages = Mutex::new(Vec::new());
    let install = |image: u32, first: dormouse_core::PageIndex, bytes: &[u8]| {
        assert_eq!(image, 0);
        let at = first.byte_offset() as usize;
        assert!(bytes == &memory[at..at + bytes.len()], "pages from {} on", first.0);
        pages.lock().unwrap().extend((0..bytes.len() / 4096).map(|i| first.0 + i as u64));
        Ok(())
    };
    resume.stream.as_ref().unwrap().for_each_run(3, &install).unwrap();
    let mut pages = pages.into_inner().unwrap();
    pages.sort_unstable();
    pages
}

#[test]
fn a_stream_brings_state_and_first_pages_in_both_kinds_of_store() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Store::open("memory://", StoreOptions::default()).unwrap();
    for store in [store_in(dir.path()), common::encrypted_store_in(dir.path(), 5), memory] {
        let machine = Machine::new(600, 10);
        machine.import(&store, "m", None).unwrap();
        let snapshot = store.open_snapshot(&name("m")).unwrap();
        let set = touched(&[500..620, 0..70, 510..515, 300..301]);
        let report = store.build_stream(&snapshot, &set).unwrap();
        assert_eq!(report.pages, 120 + 70 + 1, "each page once");
        let resume = store.open_resume(&name("m")).unwrap();
        let want: Vec<u64> = (0..70).chain([300]).chain(500..620).collect();
        assert_eq!(streamed_pages(&resume, &machine), want);
        let stream = resume.stream.as_ref().unwrap();
        assert_eq!(stream.state("vmstate").unwrap().unwrap(), machine.state);
        assert_eq!(stream.state("other").unwrap(), None);
    }
}

#[test]
fn a_stream_of_an_older_snapshot_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let mut machine = Machine::new(100, 10);
    machine.import(&store, "m", None).unwrap();
    store.build_stream(&store.open_snapshot(&name("m")).unwrap(), &first_pages(50)).unwrap();
    machine.change(1, 20);
    machine.import(&store, "m", Some("m")).unwrap();
    let resume = store.open_resume(&name("m")).unwrap();
    assert!(resume.stream.is_none());
    assert_eq!(resume.snapshot.read_blob("vmstate").unwrap(), machine.state);
}

#[test]
fn a_stream_survives_repacking() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(100, 10);
    machine.import(&store, "m", None).unwrap();
    store.build_stream(&store.open_snapshot(&name("m")).unwrap(), &first_pages(50)).unwrap();
    store.repack(Default::default(), &NoProgress).unwrap();
    let gc = dormouse_chunkstore::GcOptions { grace: std::time::Duration::ZERO, ..Default::default() };
    store.gc(gc).unwrap();
    let resume = store.open_resume(&name("m")).unwrap();
    assert_eq!(streamed_pages(&resume, &machine).len(), 50);
    assert!(resume.snapshot.image(ImageKind::Memory, "memory").is_ok());
}

#[test]
fn a_damaged_stream_costs_time_and_never_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(100, 10);
    machine.import(&store, "m", None).unwrap();
    let file = dir.path().join("store/plain/streams/m");
    store.build_stream(&store.open_snapshot(&name("m")).unwrap(), &first_pages(80)).unwrap();
    let good = std::fs::read(&file).unwrap();
    for at in (0..good.len()).step_by(97) {
        let mut damaged = good.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&file, damaged).unwrap();
        let resume = store.open_resume(&name("m")).unwrap();
        if let Some(stream) = &resume.stream {
            let memory = std::fs::read(machine.path("memory")).unwrap();
            let checked = stream.for_each_run(1, &|_, first, bytes| {
                let at = first.byte_offset() as usize;
                assert!(bytes == &memory[at..at + bytes.len()], "a wrong page");
                Ok(())
            });
            let state = stream.state("vmstate");
            assert!(checked.is_err() || state.is_err(), "the damage at {at} was not noticed");
        }
        assert_eq!(resume.snapshot.read_blob("vmstate").unwrap(), machine.state);
    }
}

#[test]
fn a_cold_resume_asks_for_reference_and_stream_only() {
    let counting = Arc::new(FaultyBackend::counting(open_url("memory://").unwrap()));
    let store = Store::with_backend(counting.clone(), StoreOptions::default());
    let machine = Machine::new(600, 10);
    machine.import(&store, "m", None).unwrap();
    store.build_stream(&store.open_snapshot(&name("m")).unwrap(), &first_pages(500)).unwrap();
    let cold = Store::with_backend(counting.clone(), StoreOptions::default());
    let before = counting.counts().gets.load(Ordering::SeqCst);
    let resume = cold.open_resume(&name("m")).unwrap();
    assert_eq!(streamed_pages(&resume, &machine).len(), 500);
    drop(resume);
    let gets = counting.counts().gets.load(Ordering::SeqCst) - before;
    // The reference, and at most one request for each of the pieces that go out before the size is known.
    assert!((2..=9).contains(&gets), "{gets} requests");
}

#[test]
fn removing_a_snapshot_removes_its_stream() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    Machine::new(20, 5).import(&store, "m", None).unwrap();
    store.build_stream(&store.open_snapshot(&name("m")).unwrap(), &first_pages(5)).unwrap();
    store.remove(&name("m")).unwrap();
    assert!(!dir.path().join("store/plain/streams/m").exists());
}

#[test]
fn garbage_collection_takes_a_stream_whose_name_is_gone_and_leaves_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let machine = Machine::new(20, 5);
    for n in ["kept", "gone"] {
        machine.import(&store, n, None).unwrap();
        store.build_stream(&store.open_snapshot(&name(n)).unwrap(), &first_pages(5)).unwrap();
    }
    // As if the process had died between the two deletions.
    std::fs::remove_file(dir.path().join("store/plain/refs/gone")).unwrap();
    store.gc(Default::default()).unwrap();
    let left = std::fs::read_dir(dir.path().join("store/plain/streams")).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["kept"]);
}

/// A remote store that counts, and hosts with disks of their own.
struct Hosts {
    dir: tempfile::TempDir,
    backend: Arc<FaultyBackend>,
}

impl Hosts {
    fn new() -> Self {
        let backend = Arc::new(FaultyBackend::counting(open_url("memory://").unwrap()));
        Hosts { dir: tempfile::tempdir().unwrap(), backend }
    }

    /// A new process on that host.
    fn on(&self, host: &str) -> Store {
        self.with_room(host, StoreOptions::default().disk_cache_bytes)
    }

    fn with_room(&self, host: &str, disk_cache_bytes: u64) -> Store {
        let cache_dir = Some(self.dir.path().join(host));
        Store::with_backend(
            self.backend.clone(),
            StoreOptions { cache_dir, disk_cache_bytes, ..Default::default() },
        )
    }

    /// Resumes `m`, checks every page of the stream, and gives the reads that took and whether it was warm.
    fn resume(&self, host: &str, machine: &Machine, pages: usize) -> (u64, bool) {
        let before = self.backend.counts().gets.load(Ordering::SeqCst);
        let resume = self.on(host).open_resume(&name("m")).unwrap();
        let stream = resume.stream.as_ref().unwrap();
        assert_eq!(stream.state("vmstate").unwrap().unwrap(), machine.state);
        assert_eq!(streamed_pages(&resume, machine).len(), pages);
        stream.keep();
        (self.backend.counts().gets.load(Ordering::SeqCst) - before, stream.is_warm())
    }

    fn files(&self, host: &str) -> Vec<std::path::PathBuf> {
        let store = self.on(host);
        let dir = store.cache_dir().unwrap().join("streams");
        let mut files: Vec<_> =
            std::fs::read_dir(dir).into_iter().flatten().map(|f| f.unwrap().path()).collect();
        files.sort();
        files
    }
}

#[test]
fn a_warm_resume_asks_for_the_reference_only() {
    let hosts = Hosts::new();
    let machine = Machine::new(600, 10);
    let far = hosts.on("far");
    machine.import(&far, "m", None).unwrap();
    let snapshot = far.open_snapshot(&name("m")).unwrap();
    far.build_stream(&snapshot, &first_pages(500)).unwrap();
    let id = snapshot.reference().snapshot;
    assert_eq!(far.tier(&name("m"), id), Tier::Warm, "who made it has it");
    assert_eq!(hosts.on("near").tier(&name("m"), id), Tier::Cold);
    let (gets, warm) = hosts.resume("near", &machine, 500);
    assert!(gets > 1 && !warm, "{gets}");
    assert_eq!(hosts.on("near").tier(&name("m"), id), Tier::Warm);
    assert_eq!(hosts.resume("near", &machine, 500), (1, true), "one read: the reference");
    assert!(hosts.on("near").cool(&name("m")) && !hosts.on("near").cool(&name("m")));
    assert_eq!(hosts.on("near").tier(&name("m"), id), Tier::Cold);
    // Brought by hand, from a stream and from nothing.
    let near = hosts.on("near");
    assert!(near.warm(&name("m")).unwrap().unwrap() > 0 && near.is_pinned(&name("m")));
    assert_eq!(hosts.resume("near", &machine, 500), (1, true));
    near.remove_stream(&name("m")).unwrap();
    assert!(!near.is_pinned(&name("m")));
    assert_eq!(near.warm(&name("m")).unwrap(), None);
}

#[test]
fn a_stream_on_disk_of_an_older_snapshot_is_not_used_and_goes() {
    let hosts = Hosts::new();
    let mut machine = Machine::new(100, 10);
    let far = hosts.on("far");
    machine.import(&far, "m", None).unwrap();
    far.build_stream(&far.open_snapshot(&name("m")).unwrap(), &first_pages(50)).unwrap();
    hosts.resume("near", &machine, 50);
    machine.change(1, 20);
    machine.import(&far, "m", Some("m")).unwrap();
    assert!(hosts.on("near").open_resume(&name("m")).unwrap().stream.is_none());
    assert!(hosts.files("near").is_empty());
    far.build_stream(&far.open_snapshot(&name("m")).unwrap(), &first_pages(60)).unwrap();
    assert!(!hosts.resume("near", &machine, 60).1, "the new one comes from the store");
    assert_eq!(hosts.resume("near", &machine, 60), (1, true));
}

#[test]
fn a_damaged_stream_on_disk_is_read_from_the_store_instead() {
    let hosts = Hosts::new();
    let machine = Machine::new(100, 10);
    let far = hosts.on("far");
    machine.import(&far, "m", None).unwrap();
    far.build_stream(&far.open_snapshot(&name("m")).unwrap(), &first_pages(80)).unwrap();
    hosts.resume("near", &machine, 80);
    let [file] = &hosts.files("near")[..] else { panic!("one stream") };
    let good = std::fs::read(file).unwrap();
    for at in (0..good.len()).step_by(97) {
        let mut damaged = good.clone();
        damaged[at] ^= 0x10;
        std::fs::write(file, damaged).unwrap();
        // Every page and the state are right all the same.
        let (gets, _) = hosts.resume("near", &machine, 80);
        assert!(gets > 1 || std::fs::read(file).unwrap() == good, "the damage at {at} was not noticed");
    }
    for cut in [0, 10, 71, good.len() / 2, good.len() - 1] {
        std::fs::write(file, &good[..cut]).unwrap();
        assert!(!hosts.resume("near", &machine, 80).1, "cut at {cut}");
    }
}

#[test]
fn streams_on_disk_keep_their_bound_and_pinned_ones_stay() {
    let hosts = Hosts::new();
    let far = hosts.on("far");
    let mut bytes = 0;
    for n in ["a", "b.x", "b"] {
        let machine = Machine::new(200, 10);
        machine.import(&far, n, None).unwrap();
        let report = far.build_stream(&far.open_snapshot(&name(n)).unwrap(), &first_pages(150)).unwrap();
        bytes = report.stored_bytes.max(bytes);
    }
    // Room for one, and a pinned one beside.
    let near = hosts.with_room("near", 4 * (bytes + bytes / 2));
    near.warm(&name("a")).unwrap().unwrap();
    for n in ["b.x", "b", "b.x"] {
        let resume = near.open_resume(&name(n)).unwrap();
        let stream = resume.stream.unwrap();
        stream.for_each_run(1, &|_, _, _| Ok(())).unwrap();
        stream.keep();
        let names: Vec<_> = hosts.files("near").iter().map(|f| f.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["a", n, "~pin-a"]);
    }
}

/// What is kept of a guest's memory, and that it is to be kept whatever the bound, goes with the name.
#[test]
fn nothing_stays_on_disk_of_a_name_that_is_gone() {
    let hosts = Hosts::new();
    let machine = Machine::new(100, 10);
    let store = hosts.on("host");
    let warm = |store: &Store, n: &str| {
        let mut request = machine.request(n, None);
        request.expires_unix_ms = 1;
        store.import(&request, &NoProgress).unwrap();
        store.build_stream(&store.open_snapshot(&name(n)).unwrap(), &first_pages(50)).unwrap();
        store.warm(&name(n)).unwrap().unwrap();
        assert_eq!(hosts.files("host").len(), 2, "a stream and a pin");
    };
    warm(&store, "m");
    store.remove(&name("m")).unwrap();
    assert!(hosts.files("host").is_empty(), "removed: {:?}", hosts.files("host"));
    warm(&store, "m");
    assert_eq!(store.gc(GcOptions::default()).unwrap().expired, ["m"]);
    assert!(hosts.files("host").is_empty(), "expired: {:?}", hosts.files("host"));
    // Removed by another host.
    warm(&store, "m");
    hosts.on("another").remove(&name("m")).unwrap();
    assert!(matches!(store.open_resume(&name("m")), Err(StoreError::NoSuchSnapshot { .. })));
    assert!(hosts.files("host").is_empty(), "found gone: {:?}", hosts.files("host"));
    warm(&store, "m");
    hosts.on("another").remove(&name("m")).unwrap();
    store.gc(GcOptions::default()).unwrap();
    assert!(hosts.files("host").is_empty(), "collected: {:?}", hosts.files("host"));
}

#[test]
fn a_stream_that_is_not_kept_is_not_said_to_be_warm_and_leaves_no_pin() {
    let hosts = Hosts::new();
    let machine = Machine::new(200, 10);
    let far = hosts.on("far");
    machine.import(&far, "m", None).unwrap();
    let report = far.build_stream(&far.open_snapshot(&name("m")).unwrap(), &first_pages(150)).unwrap();
    let near = hosts.with_room("near", 4 * report.stored_bytes - 4);
    let why = near.warm(&name("m")).unwrap_err();
    assert!(matches!(why, StoreError::Usage(_)) && why.to_string().contains("cache"), "{why}");
    assert!(!near.is_pinned(&name("m")) && hosts.files("near").is_empty());
    // Where the file would be there is something else.
    let near = hosts.on("blocked");
    std::fs::create_dir_all(near.cache_dir().unwrap().join("streams/m/x")).unwrap();
    let why = near.warm(&name("m")).unwrap_err();
    assert!(matches!(why, StoreError::File { .. }) && why.to_string().contains("streams/m"), "{why}");
    assert!(!near.is_pinned(&name("m")));
    assert_eq!(hosts.files("blocked").len(), 1);
}
