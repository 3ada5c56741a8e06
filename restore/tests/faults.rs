//! Pages on demand, in our own process, by the real kernel.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Rng, TestImage, own, uffd_or_skip, verify};
use dormouse_core::page::PageIndex;
use dormouse_restore::{PageSize, Policy, Restore, VmStopped};

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
    assert_eq!(counts.copy_ioctls, image.frames(), "a frame's pages were not installed in one ioctl");
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
    assert_eq!(counts.inline_hits, image.frames());
    assert_eq!(counts.fetches, 0);
    assert_eq!(counts.copy_ioctls, image.frames());
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
    for page in [70, 5, 200, 6, 130] {
        verify(&image, &mapping, page);
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
