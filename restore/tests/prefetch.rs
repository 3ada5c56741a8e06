//! Everything that installs pages before they fault, and faults in the middle of it.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::Arc;

use common::{Rng, TestImage, own, uffd_or_skip, verify};
use dormouse_core::page::PageIndex;
use dormouse_restore::{PageRun, PageSize, Policy, Restore, RestoreError, Uffd, UffdOptions, VmStopped};

#[test]
fn detach_fills_everything_and_lets_go() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::mixed(8192, 3));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    let counts = handle.detach().unwrap();
    assert_eq!(counts.faults, 0);
    assert_eq!(counts.fetches, image.frames());
    assert_eq!(counts.prefetched_pages, 8192);
    // Nobody serves faults any more: pages are there, or this hangs.
    (0..8192).for_each(|p| verify(&image, &mapping, p));
}

#[test]
fn faults_and_prefetch_together_fetch_each_frame_once() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::mixed(16384, 11));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    // Enough frames kept for a frame of which prefetch took a part.
    let handle = Restore::start(plan, memory, Policy { decoded_frames: 1024, ..Policy::default() }).unwrap();
    std::thread::scope(|s| {
        for t in 0..3 {
            let (image, mapping) = (&image, &mapping);
            s.spawn(move || Rng(t).shuffled(16384).into_iter().for_each(|p| verify(image, mapping, p)));
        }
        handle.fill_all();
    });
    let counts = handle.detach().unwrap();
    assert_eq!(counts.fetches, image.frames());
    assert_eq!(counts.pages_copied + counts.zero_pages, 16384);
    assert!(counts.prefetched_pages > 0);
}

#[test]
fn a_prefetched_page_does_not_fault_and_its_neighbour_does() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(256));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    handle.prefetch([
        PageRun { first: PageIndex(10), pages: 60 },
        PageRun { first: PageIndex(9999), pages: 5 },
    ]);
    while handle.counters().prefetched_pages < 60 {
        std::thread::yield_now();
    }
    (10..70).for_each(|p| verify(&image, &mapping, p));
    assert_eq!(handle.counters().faults, 0);
    assert_eq!(handle.counters().fetches, 3);
    verify(&image, &mapping, 9);
    assert_eq!(handle.counters().faults, 1);
    assert_eq!(handle.counters().fetches, 3, "a frame prefetched in part was fetched again");
    handle.stop(VmStopped::attest());
}

#[test]
fn bulk_installs_from_several_threads_move_in_full_steps() {
    let Some(_) = uffd_or_skip() else { return };
    let uffd = Uffd::create(UffdOptions { remove_events: false, ..UffdOptions::default() }).unwrap();
    let image = Arc::new(TestImage::full(4096));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    std::thread::scope(|s| {
        for t in 0..4 {
            let (image, installer) = (&image, handle.installer());
            s.spawn(move || {
                let bytes = image.bytes(t * 1024, 1024);
                assert_eq!(installer.install_run(PageIndex(t * 1024), &bytes).unwrap(), 1024);
            });
        }
    });
    (0..4096).for_each(|p| verify(&image, &mapping, p));
    let counts = handle.stop(VmStopped::attest());
    assert_eq!(counts.copy_ioctls, 8, "16 MiB go in steps of 2 MiB");
    assert_eq!((counts.faults, counts.fetches, counts.exists), (0, 0, 0));
}

#[test]
fn a_bulk_install_goes_around_what_is_there() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(1024));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    verify(&image, &mapping, 100);
    mapping.store(100 * 4096, 42);
    assert_eq!(handle.install_run(PageIndex(0), &image.bytes(0, 1024)).unwrap(), 1024 - 32);
    assert_eq!(mapping.load(100 * 4096), Some(42), "the guest's own write was overwritten");
    mapping.store(100 * 4096, common::word(100, 0));
    (0..1024).for_each(|p| verify(&image, &mapping, p));
    assert_eq!(handle.install_run(PageIndex(0), &image.bytes(0, 1024)).unwrap(), 0);
    handle.stop(VmStopped::attest());
}

#[test]
fn a_page_the_kernel_has_already_is_met_in_the_middle_of_a_run() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    // A page that came by other hands than ours: written before the memory was registered.
    let mapping = Arc::new(dormouse_restore::Mapping::new(64, PageSize::Small).unwrap());
    mapping.store(20 * 4096, 42);
    let memory = dormouse_restore::Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let (plan, _, _) = own(&image, PageSize::Small, Uffd::create(UffdOptions::default()).unwrap());
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    assert_eq!(handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap(), 63);
    assert_eq!(mapping.load(20 * 4096), Some(42));
    (21..64).chain(0..20).for_each(|p| verify(&image, &mapping, p));
    let counts = handle.stop(VmStopped::attest());
    assert_eq!((counts.partial, counts.exists, counts.faults), (1, 1, 0));
}

#[test]
fn bytes_that_belong_nowhere_are_refused_by_name() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, _mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    assert!(matches!(
        handle.install_run(PageIndex(60), &[1; 5 * 4096]),
        Err(RestoreError::NotShown { page: PageIndex(64) })
    ));
    assert!(matches!(
        handle.install_run(PageIndex(0), &[1; 100]),
        Err(RestoreError::NotPages { bytes: 100 })
    ));
    handle.stop(VmStopped::attest());
}
