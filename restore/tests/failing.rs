//! Pages that cannot be had: retried, then withheld; never zeros.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::scripted::{Ask, counted_kill, scripted};
use common::{TestImage, own, skip, uffd_or_skip, until, verify};
use dormouse_core::page::{PageCount, PageIndex};
use dormouse_restore::outcome::Outcome;
use dormouse_restore::state::PageState;
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::{
    FailClosed, Mapping, Memory, PageSize, Plan, Policy, RegionSpec, Restore, RestoreError, Retry,
    SourceError, SourceErrorKind, VmStopped,
};
use userfaultfd::{FeatureFlags, RegisterMode, UffdBuilder};

fn quick(limit: u32) -> Retry {
    Retry { limit, first: Duration::from_millis(1), longest: Duration::from_millis(2) }
}

fn failing(
    pages: u64,
    fail: impl Fn(u64, u64) -> Option<SourceErrorKind> + Send + Sync + 'static,
) -> Arc<TestImage> {
    let mut image = TestImage::full(pages);
    image.fail = Some(Box::new(move |frame, n| Some(SourceError::new(fail(frame.0, n)?, "made to fail"))));
    Arc::new(image)
}

#[test]
fn two_errors_then_success_is_success() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(32, |_, n| (n < 2).then_some(SourceErrorKind::Retryable));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy { retry: quick(5), ..Policy::default() }).unwrap();
    (0..32).for_each(|p| verify(&image, &mapping, p));
    let counts = handle.stop(VmStopped::attest());
    assert_eq!((counts.fetches, counts.retries, counts.poisoned), (3, 2, 0));
}

/// Runs the ignored test `name` of this binary as a process of its own; the signal that ended it.
fn signal_of_child(name: &str) -> Option<i32> {
    let exe = std::env::current_exe().unwrap();
    let child = Command::new(exe).args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
    eprintln!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() || child.status.signal().is_some(), "the child failed otherwise");
    child.status.signal()
}

fn poisoning() -> Policy {
    Policy { fail_closed: FailClosed::Poison { or_kill: None }, ..Policy::default() }
}

#[test]
fn by_default_a_vcpu_waits_for_a_page_that_cannot_be_had_and_gets_it_when_it_comes() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |_, _| Some(SourceErrorKind::Gone));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    std::thread::scope(|s| {
        s.spawn(|| verify(&image, &mapping, 3));
        while handle.failures().is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(handle.page_state(PageIndex(3)), Some(PageState::Awaited));
        handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap();
    });
    let counts = handle.stop(VmStopped::attest());
    assert_eq!((counts.poisoned, counts.zero_pages), (0, 0));
}

#[test]
fn a_page_that_cannot_be_had_raises_sigbus() {
    if uffd_or_skip().is_some() {
        assert_eq!(signal_of_child("child_touches_a_page_of_a_dead_store"), Some(7));
    }
}

#[test]
#[ignore = "run by a_page_that_cannot_be_had_raises_sigbus as a process of its own"]
fn child_touches_a_page_of_a_dead_store() {
    let image = failing(64, |frame, _| (frame == 1).then_some(SourceErrorKind::Retryable));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd_or_skip().unwrap());
    let _handle = Restore::start(plan, memory, Policy { retry: quick(3), ..poisoning() }).unwrap();
    (0..32).for_each(|p| verify(&image, &mapping, p));
    let zero = mapping.load(40 * 4096);
    panic!("a page that cannot be had was read as {zero:?}");
}

#[test]
fn damage_is_fetched_once_more_and_then_withheld() {
    if uffd_or_skip().is_some() {
        assert_eq!(signal_of_child("child_touches_a_damaged_page"), Some(7));
    }
}

#[test]
#[ignore = "run by damage_is_fetched_once_more_and_then_withheld as a process of its own"]
fn child_touches_a_damaged_page() {
    let image = failing(64, |frame, n| {
        assert!(n < 2, "damage was fetched {n} times");
        (frame == 0).then_some(SourceErrorKind::Damaged)
    });
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd_or_skip().unwrap());
    let _handle = Restore::start(plan, memory, poisoning()).unwrap();
    mapping.load(0);
    panic!("a damaged page was read");
}

#[test]
fn the_kill_policy_calls_once_and_leaves_the_vcpu_waiting() {
    let Some(uffd) = uffd_or_skip() else { return };
    // Fails until told to stop failing, so that the waiting threads can end in the end.
    let image = failing(64, |_, _| Some(SourceErrorKind::Gone));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (tell, told) = mpsc::channel();
    let calls = Arc::new(AtomicU64::new(0));
    let counted = calls.clone();
    let kill = FailClosed::Kill(Arc::new(move |error: &RestoreError| {
        counted.fetch_add(1, Ordering::SeqCst);
        tell.send(error.to_string()).unwrap();
    }));
    let handle = Restore::start(plan, memory, Policy { fail_closed: kill, ..Policy::default() }).unwrap();
    std::thread::scope(|s| {
        for page in [3, 40] {
            let (image, mapping) = (&image, &mapping);
            s.spawn(move || verify(image, mapping, page));
        }
        let why = told.recv().unwrap();
        assert!(why.contains("made to fail") && why.contains("image page"), "{why}");
        while handle.failures().len() < 2 {
            std::thread::yield_now();
        }
        for page in [3, 40] {
            assert_eq!(handle.page_state(PageIndex(page)), Some(PageState::Awaited));
        }
        // The bytes turn up by another way; whoever waits gets them, not zeros.
        handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap();
    });
    let counts = handle.stop(VmStopped::attest());
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!((counts.poisoned, counts.zero_pages), (0, 0));
}

#[test]
fn a_fill_that_fails_is_told_and_poisons_nothing() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(256, |frame, n| (frame == 3 && n < 100).then_some(SourceErrorKind::Gone));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    let refused = *handle.detach().unwrap_err();
    assert!(matches!(*refused.error, RestoreError::Page { .. }), "{refused}");
    let handle = refused.handle;
    assert_eq!(handle.counters().poisoned, 0);
    assert_eq!(handle.page_state(PageIndex(96)), Some(PageState::Absent));
    (0..96).chain(128..256).for_each(|p| verify(&image, &mapping, p));
    handle.stop(VmStopped::attest());
}

#[test]
fn a_source_that_panics_counts_as_damaged() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |_, n| if n == 0 { panic!("a bug in the source") } else { None });
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    (0..64).for_each(|p| verify(&image, &mapping, p));
    assert_eq!(handle.stop(VmStopped::attest()).retries, 1);
}

/// A restore is stopped while a page is being tried again: that it did not come says nothing, and ended the VM.
#[test]
fn a_fetch_that_is_stopped_between_two_tries_is_no_failure() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |_, _| Some(SourceErrorKind::Retryable));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (fail_closed, killed) = counted_kill();
    let wait = Duration::from_secs(600);
    let retry = Retry { limit: 5, first: wait, longest: wait };
    let handle = Restore::start(plan, memory, Policy { fail_closed, retry, ..Policy::default() }).unwrap();
    // Its page is gone with the restore, and it never comes back from there.
    std::thread::spawn(move || mapping.load(3 * 4096));
    until("the first try", || image.fetches.load(Ordering::SeqCst) == 1);
    handle.stop(VmStopped::attest());
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
}

/// Where a page can neither be had nor poisoned its vCPU waits. The page counted as done, so that detach let the vCPU
/// go on with zeros.
#[test]
fn a_page_that_could_not_be_poisoned_holds_up_detach() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |frame, _| (frame == 0).then_some(SourceErrorKind::Damaged));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let old_kernel = |ask, _| (ask == Ask::Poison).then_some(Outcome::Unsupported(libc::EINVAL));
    let handle = Restore::start_with(plan, memory, poisoning(), scripted(old_kernel)).unwrap();
    let reader = std::thread::spawn({
        let (image, mapping) = (image.clone(), mapping.clone());
        move || verify(&image, &mapping, 3)
    });
    // That it cannot be had, and that it cannot be poisoned.
    until("both failures", || handle.failures().len() == 2);
    for (first, pages) in [(0, 3), (4, 60)] {
        handle.install_run(PageIndex(first), &image.bytes(first, pages)).unwrap();
    }
    let refused = *handle.detach().expect_err("a vCPU still waits for page 3");
    assert!(matches!(*refused.error, RestoreError::Page { page: PageIndex(3), .. }), "{refused}");
    let handle = refused.handle;
    assert_eq!(handle.page_state(PageIndex(3)), Some(PageState::Awaited));
    handle.install_run(PageIndex(3), &image.bytes(3, 1)).unwrap();
    reader.join().unwrap();
    handle.detach().unwrap();
}

/// A page is settled once it is poisoned, not when that begins: detach would let its vCPU go on with zeros between.
#[test]
fn a_page_that_is_being_poisoned_is_not_settled() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |frame, _| (frame == 0).then_some(SourceErrorKind::Damaged));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (asked, is_asked) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let waits = std::sync::Mutex::new((asked, may_go));
    let slow = move |ask, _| {
        if ask == Ask::Poison {
            let (asked, may_go) = &*waits.lock().unwrap();
            asked.send(()).unwrap();
            may_go.recv_timeout(Duration::from_secs(60)).unwrap();
            return Some(Outcome::Unsupported(libc::EINVAL));
        }
        None
    };
    let handle = Restore::start_with(plan, memory, poisoning(), scripted(slow)).unwrap();
    let reader = std::thread::spawn({
        let (image, mapping) = (image.clone(), mapping.clone());
        move || verify(&image, &mapping, 3)
    });
    is_asked.recv().unwrap();
    assert!(!handle.page_state(PageIndex(3)).unwrap().is_settled(), "it is not poisoned yet");
    go.send(()).unwrap();
    until("both failures", || handle.failures().len() == 2);
    handle.install_run(PageIndex(0), &image.bytes(0, 64)).unwrap();
    reader.join().unwrap();
    handle.detach().unwrap();
}

/// Credentials that expire are renewed by somebody, sooner or later. The VM was ended before.
#[test]
fn a_vm_whose_store_refuses_waits_and_is_not_ended() {
    let Some(uffd) = uffd_or_skip() else { return };
    // Far more often than a page is tried again.
    let image = failing(64, |frame, n| (frame == 0 && n < 50).then_some(SourceErrorKind::Denied));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (fail_closed, killed) = counted_kill();
    let policy = Policy { fail_closed, retry: quick(3), ..Policy::default() };
    let handle = Restore::start(plan, memory, policy).unwrap();
    let reader = std::thread::spawn({
        let image = image.clone();
        move || (0..64).for_each(|p| verify(&image, &mapping, p))
    });
    until("its pages, or an end", || reader.is_finished() || !handle.failures().is_empty());
    assert!(handle.failures().is_empty(), "{:?}", handle.failures());
    reader.join().unwrap();
    handle.stop(VmStopped::attest());
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    assert!(image.fetches.load(Ordering::SeqCst) > 50);
}

/// A fill that nobody's life depends on comes to its end, and says why.
#[test]
fn a_fill_that_the_store_refuses_ends_and_is_told() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = failing(64, |_, _| Some(SourceErrorKind::Denied));
    let (plan, memory, _mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy { retry: quick(3), ..Policy::default() }).unwrap();
    let refused = *handle.detach().unwrap_err();
    assert!(matches!(*refused.error, RestoreError::Page { .. }), "{refused}");
    refused.handle.stop(VmStopped::attest());
}

/// What ends the VM may take its time, or wait for a thread of the VM that gives memory back or waits for a page. It was
/// called by the thread that answers faults, with all installs locked out.
#[test]
fn faults_are_answered_while_the_vm_is_being_ended() {
    let Some(features) = write_protecting() else { return };
    let image = Arc::new(TestImage::full(64));
    let region = RegionSpec { image_first: PageIndex(0), pages: PageCount(64), page_size: PageSize::Small };
    let plan = Plan::new(image.clone(), &[region]).unwrap();
    let mapping = Arc::new(Mapping::new(64, PageSize::Small).unwrap());
    let both = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
    features.register_with_mode(mapping.addr() as *mut _, mapping.bytes(), both).unwrap();
    let announced = AnnouncedRegion {
        address: mapping.addr(),
        bytes: mapping.bytes() as u64,
        page_size: PageSize::Small,
    };
    let memory = Memory::adopt(features.as_fd().try_clone_to_owned().unwrap(), &[announced]).unwrap();
    let (tell, told) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let waits = std::sync::Mutex::new((tell, may_go));
    let kill = FailClosed::Kill(Arc::new(move |why: &RestoreError| {
        let (tell, may_go) = &*waits.lock().unwrap();
        tell.send(matches!(why, RestoreError::StrayFault { .. })).unwrap();
        may_go.recv_timeout(Duration::from_secs(60)).unwrap();
    }));
    let handle = Restore::start(plan, memory, Policy { fail_closed: kill, ..Policy::default() }).unwrap();
    verify(&image, &mapping, 3);
    // A fault that nobody here can answer, told in an event.
    features.write_protect((mapping.addr() + 3 * 4096) as *mut _, 4096).unwrap();
    let writer = std::thread::spawn({
        let mapping = mapping.clone();
        move || mapping.store(3 * 4096, 1)
    });
    assert!(told.recv_timeout(Duration::from_secs(60)).unwrap());
    let (read, is_read) = mpsc::channel();
    std::thread::spawn({
        let (image, mapping) = (image.clone(), mapping.clone());
        move || {
            mapping.discard(0, 1).unwrap();
            verify(&image, &mapping, 40);
            read.send(()).unwrap();
        }
    });
    is_read.recv_timeout(Duration::from_secs(30)).expect("a page comes, and one can be given back");
    go.send(()).unwrap();
    features.remove_write_protection((mapping.addr() + 3 * 4096) as *mut _, 4096, true).unwrap();
    writer.join().unwrap();
    handle.stop(VmStopped::attest());
}

/// A userfaultfd as some VMM may make it, one for write-protection, too.
fn write_protecting() -> Option<userfaultfd::Uffd> {
    uffd_or_skip()?;
    let features = FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::EVENT_REMOVE;
    let made = UffdBuilder::new().close_on_exec(true).non_blocking(true).require_features(features).create();
    made.map_or_else(|why| skip(&format!("no write-protection here: {why}")), Some)
}
