//! Installs that the kernel refuses, in part or for a while.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::scripted::{counted_kill, scripted};
use common::{TestImage, own, uffd_or_skip, until, verify};
use dormouse_core::page::PageIndex;
use dormouse_restore::outcome::Outcome;
use dormouse_restore::plan::Span;
use dormouse_restore::state::PageState;
use dormouse_restore::{Mapping, PageSize, Policy, Restore};

fn settled(handle: &dormouse_restore::RestoreHandle, mut pages: std::ops::Range<u64>) -> bool {
    pages.all(|page| handle.page_state(PageIndex(page)).unwrap().is_settled())
}

fn verify_zero(mapping: &Mapping, pages: std::ops::Range<u64>) {
    for offset in pages.start * 512..pages.end * 512 {
        assert_eq!(mapping.load(offset as usize * 8), Some(0), "given back, and not zero: word {offset}");
    }
}

/// Reads a page on a thread of its own, which a test that fails does not wait for.
fn read(image: &Arc<TestImage>, mapping: &Arc<Mapping>, page: u64) -> std::thread::JoinHandle<()> {
    let (image, mapping) = (image.clone(), mapping.clone());
    std::thread::spawn(move || verify(&image, &mapping, page))
}

/// The VMM has changed the protection of a part of guest memory: the kernel installs nothing across the bound, and
/// answers as if the region were gone. That ended the VM.
#[test]
fn a_region_in_two_mappings_is_filled_on_both_sides_of_the_bound() {
    const BOUND: u64 = 40;
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (fail_closed, killed) = counted_kill();
    let policy = Policy { fail_closed, ..Policy::default() };
    let across = |_, at: Span| {
        let first = at.first_in_region();
        (first < BOUND && first + at.cells() > BOUND).then_some(Outcome::RegionGone)
    };
    let handle = Restore::start_with(plan, memory, policy, scripted(across)).unwrap();
    assert_eq!(handle.install_run(PageIndex(32), &image.bytes(32, 16)).unwrap(), 16);
    handle.fill_all();
    until("the fill", || settled(&handle, 0..64) || killed.load(Ordering::SeqCst) > 0);
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    (0..64).for_each(|p| verify(&image, &mapping, p));
    mapping.discard(36, 8).unwrap();
    until("the removal", || handle.page_state(PageIndex(43)) == Some(PageState::Removed));
    let touched = std::thread::spawn({
        let mapping = mapping.clone();
        move || verify_zero(&mapping, 36..44)
    });
    until("zeros", || touched.is_finished() || killed.load(Ordering::SeqCst) > 0);
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    touched.join().unwrap();
    assert!(handle.failures().is_empty());
    handle.detach().unwrap();
}

/// As above, by the kernel: a part of memory that is left out of core dumps is a mapping of its own.
#[test]
fn a_region_that_the_vmm_split_is_filled_and_let_go() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(1024));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (fail_closed, killed) = counted_kill();
    let policy = Policy { fail_closed, ..Policy::default() };
    let handle = Restore::start(plan, memory, policy).unwrap();
    [8, 40, 300].into_iter().for_each(|first| mapping.leave_out_of_dumps(first, 7).unwrap());
    let reader = read(&image, &mapping, 4);
    until("a fault next to the bound", || reader.is_finished() || killed.load(Ordering::SeqCst) > 0);
    mapping.discard(295, 8).unwrap();
    handle.fill_all();
    until("the fill", || settled(&handle, 0..1024) || killed.load(Ordering::SeqCst) > 0);
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    verify_zero(&mapping, 295..303);
    assert!(handle.failures().is_empty());
    let counts = handle.detach().unwrap();
    assert_eq!(counts.pages_copied, 1024 - 8);
    (0..295).chain(303..1024).for_each(|p| verify(&image, &mapping, p));
}
