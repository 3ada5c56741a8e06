//! Slow and silent stores on the path a machine waits on: requests are counted, and nothing waits for ever.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    ops::Range,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use common::Machine;
use dormouse_chunkstore::{
    Image, Pages, Result, Resume, Store, StoreError, StoreOptions, TouchedRun,
    backend::{
        Backend, ObjectMeta, PutOutcome, Version,
        faulty::{Fault, FaultyBackend},
        modelled::{ModelledBackend, StoreModel},
        open_url,
    },
};
use dormouse_core::{ImageKind, Name, PageIndex};

fn name() -> Name {
    Name::new("m").unwrap()
}

/// A machine with a stream, in a backend.
fn stored(backend: &Arc<dyn Backend>) -> Machine {
    let store = Store::with_backend(backend.clone(), StoreOptions::default());
    let machine = Machine::new(600, 10);
    machine.import(&store, "m", None).unwrap();
    let touched = [TouchedRun { image: 0, pages: 0..300 }];
    store.build_stream(&store.open_snapshot(&name()).unwrap(), &touched).unwrap();
    machine
}

type Silent = dyn Fn(&str, u64) -> bool + Send + Sync;

/// A store of which some reads never answer, until it is dropped.
struct SilentBackend {
    inner: Arc<dyn Backend>,
    /// By key, and the number of reads of it before.
    silent: Box<Silent>,
    reads: Mutex<Vec<String>>,
    open: Arc<(Mutex<bool>, Condvar)>,
}

impl std::fmt::Debug for SilentBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SilentBackend")
    }
}

impl SilentBackend {
    fn new(
        inner: &Arc<dyn Backend>,
        silent: impl Fn(&str, u64) -> bool + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (inner, silent, open) = (inner.clone(), Box::new(silent), Arc::default());
        Arc::new(SilentBackend { inner, silent, reads: Mutex::default(), open })
    }

    fn begin(&self, key: &str) -> Result<()> {
        let before = {
            let mut reads = self.reads.lock().unwrap();
            reads.push(key.to_owned());
            reads.iter().filter(|k| *k == key).count() as u64 - 1
        };
        if !(self.silent)(key, before) {
            return Ok(());
        }
        let mut open = self.open.0.lock().unwrap();
        while !*open {
            open = self.open.1.wait(open).unwrap();
        }
        let (doing, store) = (format!("reading {key}"), "silent".into());
        Err(StoreError::Unavailable { doing, store, why: "the test is over".into() })
    }

    fn reads_of(&self, part: &str) -> usize {
        self.reads.lock().unwrap().iter().filter(|key| key.contains(part)).count()
    }

    /// Lets the silent reads fail, so that their threads end.
    fn end(&self) {
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }
}

impl Backend for SilentBackend {
    fn url(&self) -> &str {
        "silent://"
    }
    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        self.begin(key)?;
        self.inner.get(key, range)
    }
    fn head(&self, key: &str) -> Result<Option<u64>> {
        self.inner.head(key)
    }
    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        self.inner.put_new(key, bytes)
    }
    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.inner.put_again(key, bytes)
    }
    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        self.begin(key)?;
        self.inner.get_versioned(key)
    }
    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        self.inner.swap(key, expected, bytes)
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        self.inner.list(prefix, each)
    }
}

/// Where the first page of the memory is, and its image.
fn first_frame(resume: &Resume) -> (Image, dormouse_chunkstore::FramePlace) {
    let image = resume.snapshot.image(ImageKind::Memory, "memory").unwrap();
    let mut page = 0;
    loop {
        match image.locate(PageIndex(page)).unwrap() {
            Pages::Stored { at, .. } => return (image, at),
            Pages::Zero { pages } => page += pages,
        }
    }
}

fn pages_of(resume: &Resume, machine: &Machine) -> u64 {
    let memory = std::fs::read(machine.path("memory")).unwrap();
    let pages = AtomicU64::new(0);
    let install = |_, first: PageIndex, bytes: &[u8]| {
        let at = first.byte_offset() as usize;
        assert!(bytes == &memory[at..at + bytes.len()], "a wrong page");
        pages.fetch_add(bytes.len() as u64 / 4096, Ordering::Relaxed);
        Ok(())
    };
    resume.stream.as_ref().unwrap().for_each_run(2, &install).unwrap();
    pages.into_inner()
}

#[test]
fn a_request_that_never_answers_is_asked_for_again() {
    let backend = open_url("memory://").unwrap();
    let machine = stored(&backend);
    // The first request for each thing hangs: reference, every piece of the stream, frames.
    let silent =
        SilentBackend::new(&backend, |key, before| before == 0 || key.contains("streams") && before < 8);
    let store = Store::with_backend(silent.clone(), StoreOptions::default());
    let resume = store.open_resume(&name()).unwrap();
    assert_eq!(pages_of(&resume, &machine), 300);
    // One that hung and one more, or two where this host stood still for a moment.
    assert!((2..=4).contains(&silent.reads_of("refs")));
    let (image, at) = first_frame(&resume);
    let before = silent.reads_of("packs");
    image.frame(&at).unwrap();
    assert!((2..=4).contains(&(silent.reads_of("packs") - before)));
    silent.end();
}

#[test]
fn a_stream_that_never_comes_is_given_up_and_the_machine_wakes_without_it() {
    let backend = open_url("memory://").unwrap();
    let machine = stored(&backend);
    let silent = SilentBackend::new(&backend, |key, _| key.contains("streams"));
    let store = Store::with_backend(silent.clone(), StoreOptions::default());
    let resume = store.open_resume(&name()).unwrap();
    assert!(resume.stream.is_none());
    assert_eq!(resume.snapshot.read_blob("vmstate").unwrap(), machine.state);
    // Eight pieces at once, and the first of them three more times.
    assert_eq!(silent.reads_of("streams"), 8 + 3);
    silent.end();
}

#[test]
fn a_frame_that_never_comes_is_unavailable_after_four_requests() {
    let backend = open_url("memory://").unwrap();
    stored(&backend);
    let silenced = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = silenced.clone();
    let silent =
        SilentBackend::new(&backend, move |key, _| key.contains("packs") && flag.load(Ordering::SeqCst));
    let store = Store::with_backend(silent.clone(), StoreOptions::default());
    let resume = store.open_resume(&name()).unwrap();
    let (image, at) = first_frame(&resume);
    silenced.store(true, Ordering::SeqCst);
    let before = silent.reads_of("packs");
    let error = image.frame(&at).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "whoever waits decides: {error}");
    assert_eq!(silent.reads_of("packs") - before, 4);
    // It is there again: so is the frame.
    silenced.store(false, Ordering::SeqCst);
    image.frame(&at).unwrap();
    silent.end();
}

#[test]
fn a_frame_that_fails_is_asked_for_four_times_and_a_refusal_once() {
    let faulty = Arc::new(FaultyBackend::counting(open_url("memory://").unwrap()));
    let backend: Arc<dyn Backend> = faulty.clone();
    stored(&backend);
    let store = Store::with_backend(backend, StoreOptions::default());
    let resume = store.open_resume(&name()).unwrap();
    let (image, at) = first_frame(&resume);
    drop(resume);
    let gets = || faulty.counts().gets.load(Ordering::SeqCst);
    faulty.set_plan(|_, op, key| (op == "get" && key.contains("packs")).then_some(Fault::Fail));
    let before = gets();
    assert!(matches!(image.frame(&at).unwrap_err(), StoreError::Unavailable { .. }));
    assert_eq!(gets() - before, 4);
    // Damage is not mended by asking again here; that is for whoever waits.
    faulty.set_plan(|_, op, key| (op == "get" && key.contains("packs")).then_some(Fault::FlipBit));
    let before = gets();
    assert!(matches!(image.frame(&at).unwrap_err(), StoreError::Damaged { .. }));
    assert!(gets() - before < 4);
}

#[test]
fn a_store_with_a_heavy_tail_brings_every_page_with_few_requests_more() {
    let inner = open_url("memory://").unwrap();
    let machine = stored(&inner);
    let modelled = Arc::new(ModelledBackend::new(inner, Some(StoreModel::TAILED)));
    let store = Store::with_backend(modelled.clone(), StoreOptions::default());
    let resume = store.open_resume(&name()).unwrap();
    assert_eq!(pages_of(&resume, &machine), 300);
    let (reads, _) = modelled.take_reads();
    // Reference and eight pieces, each asked for at most four times; nearly always once.
    assert!((2..=36).contains(&reads), "{reads}");
}
