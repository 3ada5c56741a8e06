//! Resume streams in front of a restore: what is at hand does not come from the store, and what is held out faults alone.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

#[path = "../../restore/tests/common/mod.rs"]
mod common;
#[path = "common/stored.rs"]
mod stored;

use std::sync::Arc;

use common::{Rng, uffd_or_skip};
use dormouse_chunkstore::Resume;
use dormouse_core::{
    ImageKind,
    page::{PAGE_BYTES, PageCount, PageIndex},
};
use dormouse_restore::{
    DecodedFrame, Extent, FrameToken, Mapping, Memory, PageSize, PageSource, Plan, Policy, RegionSpec,
    Restore, RestoreHandle, SourceError, VmStopped,
};
use dormouse_wake::{FirstPages, FirstPagesSource, HeldOut, Recording, StoredImage};
use stored::{PAGES, snapshot};

struct Awake {
    handle: RestoreHandle,
    mapping: Arc<Mapping>,
    recording: Recording,
    memory: Vec<u8>,
}

impl Awake {
    fn touch(&self, page: u64) {
        let mut found = [0; PAGE_BYTES];
        assert!(self.mapping.read_page(page, &mut found));
        let at = page as usize * PAGE_BYTES;
        assert!(found == self.memory[at..at + PAGE_BYTES], "page {page} is wrong");
    }
}

/// Wakes from `first`, waiting for it to be in place.
fn wake(resume: &Resume, memory: &[u8], first: &FirstPages, held: HeldOut) -> Option<Awake> {
    let uffd = uffd_or_skip()?;
    let image: Arc<dyn PageSource> =
        Arc::new(StoredImage::new(resume.snapshot.image(ImageKind::Memory, "memory").unwrap()));
    let source = FirstPagesSource::new(image.clone(), first.clone(), held);
    let region =
        RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
    let plan = Plan::new(Arc::new(source.clone()), &[region]).unwrap();
    let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
    let own = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let handle = Restore::start(plan, own, Policy::default()).unwrap();
    let recording = Recording::new(image, PageSize::Small).with_stream(first, held, 1);
    first.install(&handle, &source).unwrap().join().unwrap();
    Some(Awake { handle, mapping, recording, memory: memory.to_vec() })
}

#[test]
fn held_out_pages_fault_alone_and_from_memory_and_the_rest_does_not() {
    let (_dir, memory, mut resume) = snapshot(0..1200);
    let stream = Arc::new(resume.stream.take().unwrap());
    // For one machine, and kept for two.
    for keep in [false, true] {
        let first = FirstPages::decode(stream.clone(), 0, keep).unwrap();
        for seed in 1..=if keep { 2 } else { 1 } {
            let held = HeldOut::new(seed, 32);
            let Some(awake) = wake(&resume, &memory, &first, held) else { return };
            let sample: Vec<u64> = (0..1200).filter(|p| held.holds(PageIndex(*p))).collect();
            let counters = awake.handle.counters();
            assert_eq!(counters.streamed_pages, 1200 - sample.len() as u64);
            // All but the pages from 600 on are needed, and one far away.
            (0..600).chain([1999]).for_each(|p| awake.touch(p));
            let counters = awake.handle.counters();
            let needed = sample.iter().filter(|p| **p < 600).count() as u64;
            assert_eq!(counters.faults, needed + 1, "{counters:?}");
            assert_eq!((counters.fetches, counters.pages_copied), (0, counters.streamed_pages + needed));
            let seen = awake.recording.so_far(&awake.handle).unwrap();
            let c = seen.coverage;
            assert_eq!((c.set_pages, c.missed, c.sampled_lost), (1200, 1, 0));
            assert_eq!((c.sampled_touched, c.sampled_untouched), (needed, sample.len() as u64 - needed));
            assert!(seen.unneeded.iter().all(|p| *p >= 600 && held.holds(PageIndex(*p))));
            // A run of zeros counts as what a fault brings of it.
            assert!(seen.missed.iter().map(|(_, pages)| pages).sum::<u64>() <= 64, "{seen:?}");
            // What was held out is filled from memory, too.
            awake.handle.fill_all();
            awake.handle.wait_filled().unwrap();
            (0..PAGES).for_each(|p| awake.touch(p));
            awake.handle.stop(VmStopped::attest());
        }
    }
}

/// An image that tells whether anybody still has it.
struct Watched(StoredImage, #[expect(dead_code, reason = "held, and not read")] Arc<()>);

impl PageSource for Watched {
    fn page_count(&self) -> PageCount {
        self.0.page_count()
    }
    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        self.0.locate(page)
    }
    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        self.0.fetch(frame)
    }
}

#[test]
fn nothing_is_left_of_a_machine_that_has_ended() {
    let (_dir, _, mut resume) = snapshot(0..1024);
    let stream = Arc::new(resume.stream.take().unwrap());
    for keep in [false, true] {
        let Some(uffd) = uffd_or_skip() else { return };
        let alive = Arc::new(());
        let image = StoredImage::new(resume.snapshot.image(ImageKind::Memory, "memory").unwrap());
        let first = FirstPages::decode(stream.clone(), 0, keep).unwrap();
        let source =
            FirstPagesSource::new(Arc::new(Watched(image, alive.clone())), first.clone(), HeldOut::new(1, 8));
        let region =
            RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
        let plan = Plan::new(Arc::new(source.clone()), &[region]).unwrap();
        let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
        let own = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
        let handle = Restore::start(plan, own, Policy::default()).unwrap();
        first.install(&handle, &source).unwrap().join().unwrap();
        drop((first, source));
        handle.stop(VmStopped::attest());
        assert_eq!(
            Arc::strong_count(&alive),
            1,
            "the restore of an ended machine is still held (kept: {keep})"
        );
    }
}

#[test]
fn a_machine_that_touches_first_pages_before_they_are_installed_gets_them() {
    let (_dir, memory, mut resume) = snapshot(0..1024);
    let stream = Arc::new(resume.stream.take().unwrap());
    let first = FirstPages::decode(stream, 0, true).unwrap();
    first.wait_decoded();
    let Some(uffd) = uffd_or_skip() else { return };
    let image: Arc<dyn PageSource> =
        Arc::new(StoredImage::new(resume.snapshot.image(ImageKind::Memory, "memory").unwrap()));
    let source = FirstPagesSource::new(image, first.clone(), HeldOut::NONE);
    let region =
        RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
    let plan = Plan::new(Arc::new(source), &[region]).unwrap();
    let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
    let own = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let handle = Restore::start(plan, own, Policy::default()).unwrap();
    for page in Rng(3).shuffled(1024) {
        let mut found = [0; PAGE_BYTES];
        assert!(mapping.read_page(page, &mut found));
        let at = page as usize * PAGE_BYTES;
        assert!(found == memory[at..at + PAGE_BYTES], "page {page} is wrong");
    }
    // None asks the store, and each brings more than its page, now or a little later.
    let counters = handle.counters();
    assert_eq!((counters.fetches, counters.handed_over), (0, 0), "{counters:?}");
    assert!(counters.inline_hits > 0, "{counters:?}");
    assert!(counters.faults < 512, "{counters:?}");
    handle.stop(VmStopped::attest());
}

#[test]
fn decoding_ends_when_nobody_wants_it_any_more() {
    let (_dir, _, mut resume) = snapshot(0..PAGES);
    let stream = Arc::new(resume.stream.take().unwrap());
    drop(FirstPages::decode(stream.clone(), 0, false).unwrap());
    // The decoder lets go of the stream: this would hang if it waited for a machine.
    for _ in 0..1000 {
        if Arc::strong_count(&stream) == 1 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the decoder still runs");
}
