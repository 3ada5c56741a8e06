//! What the tests against the real kernel share: an image made up on the spot, and memory to restore it into.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, reason = "tests")]

pub mod scripted;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex, Slot};
use dormouse_restore::{
    DecodedFrame, Extent, FrameToken, Mapping, Memory, PageSize, PageSource, Plan, RegionSpec, SourceError,
    Uffd, UffdError, UffdOptions,
};

/// A small generator, the same on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn shuffled(&mut self, n: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..n).collect();
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }
}

/// The word at byte `offset` of page `page`: never zero, different everywhere.
pub fn word(page: u64, offset: usize) -> u64 {
    Rng(page << 20 | offset as u64).next() | 1
}

type Fail = dyn Fn(FrameToken, u64) -> Option<SourceError> + Send + Sync;

/// An image of zero runs and frames, each page with bytes of its own.
pub struct TestImage {
    pub extents: Vec<Extent>,
    pub fetches: AtomicU64,
    pub fetched: Mutex<HashSet<FrameToken>>,
    /// Answers fetch number `n` (from 0) of all with an error.
    pub fail: Option<Box<Fail>>,
    /// Offers its frames without waiting.
    pub at_hand: bool,
}

impl TestImage {
    /// `pages` pages, about a third of them zero, in runs and frames of up to 32 pages.
    pub fn mixed(pages: u64, seed: u64) -> Self {
        let (mut rng, mut extents, mut at) = (Rng(seed), Vec::new(), 0);
        while at < pages {
            let run = (1 + rng.below(32)).min(pages - at);
            let frame = FrameToken(at + 1_000_000);
            extents.push(match rng.below(3) {
                0 => Extent::zero(PageIndex(at), run),
                _ => Extent::frame(PageIndex(at), run, frame, Slot::new(0).unwrap()),
            });
            at += run;
        }
        Self::of(extents)
    }

    /// `pages` pages in full frames of 32.
    pub fn full(pages: u64) -> Self {
        let frames = (0..pages.div_ceil(32)).map(|f| {
            let pages = 32.min(pages - f * 32);
            Extent::frame(PageIndex(f * 32), pages, FrameToken(f), Slot::new(0).unwrap())
        });
        Self::of(frames.collect())
    }

    pub fn of(extents: Vec<Extent>) -> Self {
        TestImage {
            extents,
            fetches: AtomicU64::new(0),
            fetched: Mutex::default(),
            fail: None,
            at_hand: false,
        }
    }

    pub fn pages(&self) -> u64 {
        self.extents.last().map_or(0, |e| e.first.0 + e.pages)
    }

    pub fn frames(&self) -> u64 {
        self.extents.iter().filter(|e| e.content != dormouse_restore::Content::Zero).count() as u64
    }

    pub fn extent(&self, page: u64) -> Extent {
        let after = self.extents.partition_point(|e| e.first.0 <= page);
        self.extents[after - 1]
    }

    pub fn is_zero(&self, page: u64) -> bool {
        self.extent(page).content == dormouse_restore::Content::Zero
    }

    /// What page `page` must hold.
    pub fn page(&self, page: u64) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        if !self.is_zero(page) {
            for (i, w) in bytes.chunks_exact_mut(8).enumerate() {
                w.copy_from_slice(&word(page, i * 8).to_ne_bytes());
            }
        }
        bytes
    }

    pub fn bytes(&self, first: u64, pages: u64) -> Vec<u8> {
        (first..first + pages).flat_map(|p| self.page(p)).collect()
    }

    fn decoded(&self, frame: FrameToken) -> DecodedFrame {
        let of = |e: &&Extent| matches!(e.content, dormouse_restore::Content::Frame { frame: f, .. } if f == frame);
        let extent = self.extents.iter().find(of).unwrap();
        self.bytes(extent.first.0, extent.pages).into()
    }
}

impl PageSource for TestImage {
    fn page_count(&self) -> PageCount {
        PageCount(self.pages())
    }
    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        Ok(self.extent(page.0))
    }
    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        let n = self.fetches.fetch_add(1, Ordering::Relaxed);
        self.fetched.lock().unwrap().insert(frame);
        match self.fail.as_ref().and_then(|fail| fail(frame, n)) {
            Some(error) => Err(error),
            None => Ok(self.decoded(frame)),
        }
    }
    fn try_locate(&self, page: PageIndex) -> Option<Extent> {
        self.at_hand.then(|| self.extent(page.0))
    }
    fn try_fetch(&self, frame: FrameToken) -> Option<DecodedFrame> {
        self.at_hand.then(|| self.decoded(frame))
    }
}

/// A userfaultfd, or `None` after saying loudly that the test is skipped.
pub fn uffd_or_skip() -> Option<Uffd> {
    match Uffd::create(UffdOptions::default()) {
        Ok(uffd) => Some(uffd),
        Err(e @ (UffdError::NotPermitted(_) | UffdError::Missing(_))) => skip(&e.to_string()),
        Err(e) => panic!("{e}"),
    }
}

/// Says loudly that a test is skipped, or fails it where skipping is not allowed.
pub fn skip<T>(why: &str) -> Option<T> {
    assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {why}");
    dormouse_testkit::skipped!("{why}");
    None
}

/// One region that shows all of `image`, in own memory.
pub fn own(image: &Arc<TestImage>, page_size: PageSize, uffd: Uffd) -> (Plan, Memory, Arc<Mapping>) {
    let pages = image.page_count();
    let region = RegionSpec { image_first: PageIndex(0), pages, page_size };
    let plan = Plan::new(image.clone(), &[region]).unwrap();
    let mapping = Arc::new(Mapping::new(pages.0, page_size).unwrap());
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    (plan, memory, mapping)
}

/// Reads page `page` and compares every byte; waits for it if it is absent.
#[track_caller]
pub fn verify(image: &TestImage, mapping: &Mapping, page: u64) {
    let mut found = [0; PAGE_BYTES];
    assert!(mapping.read_page(page, &mut found));
    assert!(found == image.page(page), "page {page} is wrong (zero: {})", found.iter().all(|b| *b == 0));
}

/// Waits for what must come about, but not for ever: a test that hangs says less than one that fails.
pub fn until(what: &str, is: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !is() {
        assert!(start.elapsed().as_secs() < 60, "waited in vain for {what}");
        std::thread::yield_now();
    }
}
