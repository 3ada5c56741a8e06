//! Pages on demand, in our own process, by the real kernel.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Rng, TestImage, own, uffd_or_skip, until, verify};
use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex, Slot};
use dormouse_restore::{
    DecodedFrame, Extent, FrameToken, Mapping, Memory, PageSize, PageSource, Plan, Policy, RegionSpec,
    Restore, SourceError, VmStopped,
};

fn touch_all(
    image: &Arc<TestImage>,
    threads: u64,
    policy: Policy,
) -> Option<dormouse_restore::CountersSnapshot> {
    let (plan, memory, mapping) = own(image, PageSize::Small, uffd_or_skip()?);
    let handle = Restore::start(plan, memory, policy).unwrap();
    std::thread::scope(|s| {
        for t in 0..threads {
            let (image, mapping) = (&image, &mapping);
            s.spawn(move || {
                Rng(t).shuffled(image.pages()).into_iter().for_each(|p| verify(image, mapping, p))
            });
        }
    });
    handle.wait_filled().unwrap();
    assert!(handle.failures().is_empty());
    Some(handle.stop(VmStopped::attest()))
}

#[test]
fn every_byte_is_right_and_every_frame_is_fetched_once() {
    let image = Arc::new(TestImage::mixed(8192, 7));
    let Some(counts) = touch_all(&image, 4, Policy::default()) else { return };
    assert_eq!(counts.fetches, image.frames(), "a frame was fetched again, or not at all");
    assert_eq!(image.fetches.load(Ordering::Relaxed), image.frames());
    assert!(
        counts.copy_ioctls <= 5 * image.frames(),
        "a frame's pages were not installed in runs: {counts:?}"
    );
    assert_eq!(counts.pages_copied + counts.zero_pages, image.pages());
    assert_eq!(counts.exists, 0);
    assert_eq!(counts.again, 0);
    assert!(counts.faults < image.pages() / 2, "neighbours were not installed: {counts:?}");
}

#[test]
fn frames_at_hand_are_installed_by_the_fault_thread() {
    let mut image = TestImage::full(4096);
    image.at_hand = true;
    let image = Arc::new(image);
    let Some(counts) = touch_all(&image, 1, Policy::default()) else { return };
    // On a busy machine a page may come with the rest of its frame between its fault and the answer: then nobody
    // answers. No worker ever does.
    assert!(counts.inline_hits > 0, "{counts:?}");
    assert_eq!((counts.handed_over, counts.fetches), (0, 0), "{counts:?}");
    assert!(counts.faults < image.pages() / 2, "neighbours were not installed: {counts:?}");
}

#[test]
fn a_guest_that_jumps_gets_its_page_first_and_the_rest_of_the_frame_once_it_is_quiet() {
    let Some(uffd) = uffd_or_skip() else { return };
    let mut image = TestImage::full(32 * 64);
    image.at_hand = true;
    let image = Arc::new(image);
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    // Every other frame, so that none goes on from another.
    for (n, frame) in (0..64).step_by(2).enumerate() {
        verify(&image, &mapping, frame * 32);
        until("the rest of the frame", || handle.counters().pages_copied >= 32 * (n as u64 + 1));
        (0..32).for_each(|page| verify(&image, &mapping, frame * 32 + page));
    }
    let counts = handle.stop(VmStopped::attest());
    assert_eq!((counts.faults, counts.inline_hits, counts.fetches), (32, 32, 0));
    // The page, and twice sixteen behind it.
    assert_eq!(counts.copy_ioctls, 3 * 32);
}

#[test]
fn a_guest_that_walks_faults_once_a_frame() {
    let Some(uffd) = uffd_or_skip() else { return };
    let mut image = TestImage::full(32 * 64);
    image.at_hand = true;
    let image = Arc::new(image);
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    (0..32 * 64).for_each(|page| verify(&image, &mapping, page));
    let counts = handle.stop(VmStopped::attest());
    // That it walks is known from its second fault on.
    assert!(counts.faults <= 64 + 1, "{counts:?}");
    assert!(counts.copy_ioctls <= 64 + 4, "{counts:?}");
}

/// Two runs of pages that show the same frame, the second backwards, far apart.
struct Twice;

impl Twice {
    const FRAME: FrameToken = FrameToken(1);

    fn runs() -> Vec<Extent> {
        let forwards = Extent::frame(PageIndex(0), 32, Self::FRAME, Slot::new(0).unwrap());
        let single =
            |n: u64| Extent::frame(PageIndex(1000 + n), 1, Self::FRAME, Slot::new(31 - n as usize).unwrap());
        [forwards].into_iter().chain((0..32).map(single)).collect()
    }
}

impl PageSource for Twice {
    fn page_count(&self) -> PageCount {
        PageCount(2000)
    }
    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        let holds = |run: &Extent| (run.first.0..run.first.0 + run.pages).contains(&page.0);
        Ok(Self::runs().into_iter().find(holds).unwrap_or(Extent::zero(page, 1)))
    }
    fn fetch(&self, _: FrameToken) -> Result<DecodedFrame, SourceError> {
        let bytes: Vec<u8> = (1..=32).flat_map(|slot| [slot; PAGE_BYTES]).collect();
        Ok(bytes.into())
    }
    fn runs_of(&self, frame: FrameToken) -> Option<Vec<Extent>> {
        (frame == Self::FRAME).then(Self::runs)
    }
}

#[test]
fn one_fault_brings_all_that_the_image_shows_of_a_frame() {
    let Some(uffd) = uffd_or_skip() else { return };
    let mapping = Arc::new(Mapping::new(2000, PageSize::Small).unwrap());
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let region = RegionSpec { image_first: PageIndex(0), pages: PageCount(2000), page_size: PageSize::Small };
    let plan = Plan::new(Arc::new(Twice), &[region]).unwrap();
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    assert_eq!(mapping.load(7 * PAGE_BYTES), Some(u64::from_ne_bytes([8; 8])));
    until("the rest of the frame", || handle.counters().pages_copied >= 64);
    for slot in 0..32u8 {
        let word = u64::from_ne_bytes([slot + 1; 8]);
        assert_eq!(mapping.load(usize::from(slot) * PAGE_BYTES), Some(word));
        assert_eq!(mapping.load((1031 - usize::from(slot)) * PAGE_BYTES), Some(word));
    }
    let counts = handle.stop(VmStopped::attest());
    assert_eq!((counts.faults, counts.fetches), (1, 1));
}

#[test]
fn a_run_of_zeros_is_installed_in_bounded_steps() {
    let zeros = TestImage::of(vec![dormouse_restore::Extent::zero(PageIndex(0), 1000)]);
    let image = Arc::new(zeros);
    let Some(counts) = touch_all(&image, 1, Policy::default()) else { return };
    assert_eq!(counts.zero_ioctls, 1000u64.div_ceil(64));
    assert_eq!(counts.zero_pages, 1000);
    assert_eq!((counts.fetches, counts.copy_ioctls), (0, 0));
}

#[test]
fn the_record_holds_first_touches_in_order_and_is_bounded() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(32 * 8));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy { record_pages: 3, ..Policy::default() }).unwrap();
    for (n, page) in [70, 5, 200, 6, 130].into_iter().enumerate() {
        verify(&image, &mapping, page);
        // Page 6 comes with page 5, a moment later.
        until("the rest of the frame", || handle.counters().pages_copied >= [32, 64, 96, 96, 128][n]);
    }
    let record = handle.record();
    assert_eq!(record.pages, [70, 5, 200].map(PageIndex), "page 6 came with page 5 and must not fault");
    assert_eq!(record.dropped, 1);
    assert_eq!(handle.counters().faults, 4);
    // A latency is booked after the vCPU was woken.
    while handle.timeline().fault_latency.count() < 4 {
        std::thread::yield_now();
    }
    handle.stop(VmStopped::attest());
}

#[test]
fn many_machines_live_in_one_process() {
    let images: Vec<_> = (0..16).map(|seed| Arc::new(TestImage::mixed(512, seed))).collect();
    std::thread::scope(|s| {
        for image in &images {
            s.spawn(move || {
                if let Some(counts) = touch_all(image, 1, Policy::default()) {
                    assert_eq!(counts.fetches, image.frames());
                }
            });
        }
    });
}
