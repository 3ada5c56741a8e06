//! Installs that the kernel refuses, in part or for a while.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::scripted::{Ask, counted_kill, scripted};
use common::{TestImage, own, uffd_or_skip, until, verify};
use dormouse_core::page::PageIndex;
use dormouse_restore::outcome::Outcome;
use dormouse_restore::plan::Span;
use dormouse_restore::state::PageState;
use dormouse_restore::{
    FrameToken, Mapping, PageSize, Policy, Restore, RestoreError, RestoreHandle, SourceError,
    SourceErrorKind, Uffd, UffdOptions, VmStopped,
};

fn settled(handle: &RestoreHandle, mut pages: std::ops::Range<u64>) -> bool {
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

/// What whoever waits for a fill that cannot be had is told; given up once `enough`.
fn refused_fill(handle: &Arc<RestoreHandle>, enough: impl Fn() -> bool) -> Arc<RestoreError> {
    let filler = std::thread::spawn({
        let handle = handle.clone();
        move || handle.wait_filled()
    });
    until("the fill", || filler.is_finished() || enough());
    assert!(!enough(), "the VM was ended");
    filler.join().unwrap().unwrap_err()
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

/// A stream's install fails for once. The pages it had claimed counted as on their way, and whoever touched one later
/// waited for ever.
#[test]
fn pages_of_an_install_that_failed_come_when_they_are_touched() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let failed = AtomicBool::new(false);
    let once = move |ask, at: Span| {
        let first = ask == Ask::Copy && at.cells() > 1 && !failed.swap(true, Ordering::SeqCst);
        first.then_some(Outcome::Refused(libc::EIO))
    };
    let handle = Restore::start_with(plan, memory, Policy::default(), scripted(once)).unwrap();
    let refused = handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap_err();
    assert!(matches!(refused, RestoreError::Install { page: PageIndex(0), .. }), "{refused}");
    let reader = read(&image, &mapping, 3);
    until("page 3", || reader.is_finished());
    reader.join().unwrap();
    assert!(handle.failures().is_empty(), "nobody waited for what failed");
    handle.detach().unwrap();
}

/// As above, and a vCPU came to wait while the install that then failed was under way.
#[test]
fn a_fault_during_an_install_that_fails_is_answered() {
    if uffd_or_skip().is_none() {
        return;
    }
    // With reports of removals, faults are not read during an install.
    let uffd = Uffd::create(UffdOptions { remove_events: false, ..UffdOptions::default() }).unwrap();
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (asked, is_asked) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let first = std::sync::Mutex::new(Some((asked, may_go)));
    let once = move |ask, at: Span| {
        let (asked, may_go) = first.lock().unwrap().take_if(|_| ask == Ask::Copy && at.cells() > 1)?;
        asked.send(()).unwrap();
        may_go.recv_timeout(Duration::from_secs(60)).unwrap();
        Some(Outcome::Refused(libc::EIO))
    };
    let handle = Restore::start_with(plan, memory, Policy::default(), scripted(once)).unwrap();
    let installer = handle.installer();
    let bytes = image.bytes(0, 64);
    let stream = std::thread::spawn(move || installer.install_run(PageIndex(0), &bytes));
    is_asked.recv().unwrap();
    let reader = read(&image, &mapping, 3);
    until("the fault", || handle.counters().faults > 0);
    go.send(()).unwrap();
    stream.join().unwrap().unwrap_err();
    until("page 3", || reader.is_finished());
    reader.join().unwrap();
    handle.detach().unwrap();
}

/// Pages that no try installs are told and waited for, each of them; nobody is woken just to fault again.
#[test]
fn faults_whose_installs_are_refused_are_held_and_do_not_go_round_in_circles() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = mended.clone();
    let refusing = move |ask, at: Span| {
        let bad = at.first_in_region()..at.first_in_region() + at.cells();
        let refused = !is_mended.load(Ordering::SeqCst) && [3, 7].iter().any(|page| bad.contains(page));
        (ask == Ask::Copy && refused).then_some(Outcome::Refused(libc::EIO))
    };
    let handle = Restore::start_with(plan, memory, Policy::default(), scripted(refusing)).unwrap();
    let readers = [3, 7].map(|page| read(&image, &mapping, page));
    let told = |page| {
        let is = |e: &Arc<RestoreError>| matches!(**e, RestoreError::Install { page: PageIndex(p), .. } if p == page);
        handle.failures().iter().any(is)
    };
    until("both failures", || told(3) && told(7));
    // Their neighbours come all the same, and do not set them going again.
    for page in [4, 5, 6, 8, 40] {
        let reader = read(&image, &mapping, page);
        until("a neighbour", || reader.is_finished());
        reader.join().unwrap();
    }
    for page in [3, 7] {
        assert_eq!(handle.page_state(PageIndex(page)), Some(PageState::Awaited));
    }
    let counts = handle.counters();
    assert!(counts.faults < 20, "{counts:?}");
    mended.store(true, Ordering::SeqCst);
    handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    handle.stop(VmStopped::attest());
}

/// The host has no memory for pages that nobody waits for. That ended the VM; with nothing to end it by, whoever waited
/// for the fill waited for ever.
#[test]
fn a_fill_that_is_refused_ends_nothing_and_is_told() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (fail_closed, killed) = counted_kill();
    let policy = Policy { fail_closed, ..Policy::default() };
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = mended.clone();
    let refusing = move |_, at: Span| {
        let refused = at.first_in_region() + at.cells() > 32 && !is_mended.load(Ordering::SeqCst);
        refused.then_some(Outcome::Refused(libc::ENOMEM))
    };
    let handle = Restore::start_with(plan, memory, policy, scripted(refusing)).unwrap();
    let handle = Arc::new(handle);
    handle.fill_all();
    let refused = refused_fill(&handle, || killed.load(Ordering::SeqCst) > 0);
    assert!(matches!(*refused, RestoreError::Install { page: PageIndex(32), .. }), "{refused}");
    assert!(handle.failures().is_empty(), "nothing was withheld");
    mended.store(true, Ordering::SeqCst);
    let reader = read(&image, &mapping, 40);
    until("page 40", || reader.is_finished());
    reader.join().unwrap();
    (0..64).for_each(|p| verify(&image, &mapping, p));
    let handle = Arc::into_inner(handle).unwrap();
    handle.detach().unwrap();
}

/// What a fill passes over, because it is being installed, may fail after that. Whoever waited for the fill waited for
/// ever for somebody to come back to it.
#[test]
fn a_fill_that_passed_over_pages_that_then_fail_is_told() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let failed = AtomicBool::new(false);
    let once = move |_, _| (!failed.swap(true, Ordering::SeqCst)).then_some(Outcome::Refused(libc::EIO));
    let handle = Restore::start_with(plan, memory, Policy::default(), scripted(once)).unwrap();
    handle.install_run(PageIndex(0), &image.bytes(0, 8)).unwrap_err();
    handle.install_run(PageIndex(8), &image.bytes(8, 56)).unwrap();
    let handle = Arc::new(handle);
    let refused = refused_fill(&handle, || false);
    assert!(matches!(*refused, RestoreError::Install { page: PageIndex(0), .. }), "{refused}");
    let handle = Arc::into_inner(handle).unwrap();
    handle.detach().unwrap();
    (0..64).for_each(|p| verify(&image, &mapping, p));
}

/// A vCPU holds out for a page that cannot be had, and all else is there: nobody comes for that page any more.
#[test]
fn a_fill_that_lacks_a_withheld_page_is_told() {
    let Some(uffd) = uffd_or_skip() else { return };
    let mut image = TestImage::full(64);
    let gone = |frame: FrameToken, _| (frame.0 == 0).then(|| SourceError::new(SourceErrorKind::Gone, "gone"));
    image.fail = Some(Box::new(gone));
    let image = Arc::new(image);
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Arc::new(Restore::start(plan, memory, Policy::default()).unwrap());
    let reader = read(&image, &mapping, 3);
    until("the failure", || !handle.failures().is_empty());
    for (first, pages) in [(0, 3), (4, 60)] {
        handle.install_run(PageIndex(first), &image.bytes(first, pages)).unwrap();
    }
    let refused = refused_fill(&handle, || false);
    assert!(matches!(*refused, RestoreError::Page { page: PageIndex(3), .. }), "{refused}");
    handle.install_run(PageIndex(3), &image.bytes(3, 1)).unwrap();
    reader.join().unwrap();
    Arc::into_inner(handle).unwrap().detach().unwrap();
}
