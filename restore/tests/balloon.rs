//! Pages the guest gives back read as zero, whatever is under way for them.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use common::scripted::counted_kill;
use common::{Rng, TestImage, own, uffd_or_skip, verify};
use dormouse_core::page::{PAGE_BYTES, PageIndex};
use dormouse_restore::install::Installer;
use dormouse_restore::outcome::Outcome;
use dormouse_restore::plan::Span;
use dormouse_restore::state::PageState;
use dormouse_restore::{Mapping, PageSize, Policy, Restore, VmStopped};

#[track_caller]
fn verify_zero(mapping: &Mapping, page: u64) {
    let mut found = [1; PAGE_BYTES];
    assert!(mapping.read_page(page, &mut found));
    assert!(found.iter().all(|b| *b == 0), "page {page} was given back and shows old bytes");
}

#[test]
fn pages_given_back_are_zero_before_and_after_their_install() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(256));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    verify(&image, &mapping, 0);
    mapping.discard(10, 100).unwrap();
    // The event has been read, and is acted on before the next install or fault; not before this line.
    while handle.page_state(PageIndex(109)) != Some(PageState::Removed) {
        std::thread::yield_now();
    }
    (10..110).for_each(|p| verify_zero(&mapping, p));
    (0..10).chain(110..256).for_each(|p| verify(&image, &mapping, p));
    // Given back again after it was used again.
    mapping.store(50 * PAGE_BYTES, 77);
    mapping.discard(50, 1).unwrap();
    verify_zero(&mapping, 50);
    assert_eq!(handle.install_run(PageIndex(0), &image.bytes(0, 256)).unwrap(), 0);
    let counts = handle.stop(VmStopped::attest());
    assert_eq!(counts.removes, 2);
}

#[test]
fn what_was_given_back_stays_zero_after_detach() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(2048));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let handle = Restore::start(plan, memory, Policy::default()).unwrap();
    mapping.discard(500, 1000).unwrap();
    let counts = handle.detach().unwrap();
    assert_eq!(counts.pages_copied, 1048);
    (500..1500).for_each(|p| verify_zero(&mapping, p));
    (0..500).chain(1500..2048).for_each(|p| verify(&image, &mapping, p));
}

/// One thread gives pages back while others fault, prefetch and install in bulk. A page seen given back must
/// be zero from then on; one never given back must be the image's.
#[test]
fn removal_beats_every_install_in_flight() {
    const PAGES: u64 = 4096;
    for seed in 0..4 {
        let Some(uffd) = uffd_or_skip() else { return };
        let image = Arc::new(TestImage::full(PAGES));
        let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
        let handle = Restore::start(plan, memory, Policy::default()).unwrap();
        // 0: kept, 1: being given back, 2: given back.
        let given: Vec<AtomicU8> = (0..PAGES).map(|_| AtomicU8::new(0)).collect();
        std::thread::scope(|s| {
            let (image, mapping, given) = (&image, &mapping, &given);
            s.spawn(move || {
                let mut rng = Rng(seed);
                for _ in 0..400 {
                    let (first, pages) = (rng.below(PAGES - 8), 1 + rng.below(8));
                    (first..first + pages).for_each(|p| given[p as usize].store(1, Ordering::SeqCst));
                    mapping.discard(first, pages).unwrap();
                    (first..first + pages).for_each(|p| given[p as usize].store(2, Ordering::SeqCst));
                }
            });
            for t in 0..2 {
                s.spawn(move || {
                    for page in Rng(100 + t).shuffled(PAGES) {
                        let before = given[page as usize].load(Ordering::SeqCst);
                        let mut found = [0; PAGE_BYTES];
                        mapping.read_page(page, &mut found);
                        let after = given[page as usize].load(Ordering::SeqCst);
                        match (before, after) {
                            (0, 0) => assert!(found == image.page(page), "page {page} is wrong"),
                            (2, _) => assert!(found.iter().all(|b| *b == 0), "page {page} came back"),
                            _ => {} // Given back while it was read.
                        }
                    }
                });
            }
            let installer = handle.installer();
            s.spawn(move || {
                for first in (0..PAGES).step_by(512) {
                    installer.install_run(PageIndex(first), &image.bytes(first, 512)).unwrap();
                }
            });
            handle.fill_all();
        });
        let counts = handle.detach().unwrap();
        assert_eq!(counts.removes, 400);
        for (page, given) in (0..PAGES).zip(&given) {
            match given.load(Ordering::SeqCst) {
                0 => verify(&image, &mapping, page),
                _ => verify_zero(&mapping, page),
            }
        }
    }
}

/// Lets a removal begin between the look at a page's state and its install, the moment it is most tempting to
/// put the image's bytes where zeros belong.
struct Hesitant {
    inner: dormouse_restore::install::UffdCopy,
    memory: Arc<dormouse_restore::Memory>,
    hesitated: AtomicU8,
    begin: std::sync::mpsc::Sender<()>,
}

impl Installer for Hesitant {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        if self.hesitated.fetch_add(1, Ordering::SeqCst) == 0 {
            self.begin.send(()).unwrap();
            let uffd = self.memory.uffd().as_fd();
            let mut fds = [rustix::event::PollFd::new(&uffd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            rustix::event::poll(&mut fds, Some(&limit)).unwrap();
            // Time for another thread to read the event and for the page to go, if that were possible.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        self.inner.copy(at, bytes)
    }
    fn zero(&self, at: Span) -> Outcome {
        self.inner.zero(at)
    }
    fn poison(&self, at: Span) -> Outcome {
        self.inner.poison(at)
    }
    fn wake(&self, at: Span) {
        self.inner.wake(at)
    }
}

/// Is asked for zeros, and does not get to it before it is told that nobody waits for them any more.
struct Late {
    inner: dormouse_restore::install::UffdCopy,
    asked: std::sync::mpsc::Sender<()>,
    over: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Installer for Late {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        self.inner.copy(at, bytes)
    }
    fn zero(&self, at: Span) -> Outcome {
        self.asked.send(()).unwrap();
        self.over.lock().unwrap().recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        let outcome = self.inner.zero(at);
        assert_eq!(outcome, Outcome::RegionGone, "what this test is about did not happen");
        outcome
    }
    fn poison(&self, at: Span) -> Outcome {
        self.inner.poison(at)
    }
    fn wake(&self, at: Span) {
        self.inner.wake(at)
    }
}

/// A vCPU touches a page it gave back while its machine is let go: the kernel answers it, and the fault thread, which was
/// about to, finds the region gone. That ended the VM.
#[test]
fn a_fault_that_is_overtaken_by_detach_does_not_end_the_vm() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (asked, is_asked) = std::sync::mpsc::channel();
    let (answered, over) = std::sync::mpsc::channel();
    let (fail_closed, killed) = counted_kill();
    let policy = Policy { fail_closed, ..Policy::default() };
    let handle = Restore::start_with(plan, memory, policy, |memory, counters| {
        let inner = dormouse_restore::install::UffdCopy::new(memory, counters);
        Box::new(Late { inner, asked, over: std::sync::Mutex::new(over) })
    })
    .unwrap();
    mapping.discard(10, 1).unwrap();
    let vcpu = std::thread::spawn({
        let mapping = mapping.clone();
        move || {
            verify_zero(&mapping, 10);
            answered.send(()).unwrap();
        }
    });
    is_asked.recv().unwrap();
    let counts = handle.detach().unwrap();
    vcpu.join().unwrap();
    assert_eq!((counts.pages_copied, counts.zero_pages), (63, 0));
    assert_eq!(killed.load(Ordering::SeqCst), 0, "the VM was ended");
    (0..10).chain(11..64).for_each(|p| verify(&image, &mapping, p));
}

#[test]
fn a_removal_that_begins_within_an_install_wins() {
    let Some(uffd) = uffd_or_skip() else { return };
    let image = Arc::new(TestImage::full(64));
    let (plan, memory, mapping) = own(&image, PageSize::Small, uffd);
    let (begin, begun) = std::sync::mpsc::channel();
    let handle = Restore::start_with(plan, memory, Policy::default(), |memory, counters| {
        let inner = dormouse_restore::install::UffdCopy::new(memory.clone(), counters);
        Box::new(Hesitant { inner, memory, hesitated: AtomicU8::new(0), begin })
    })
    .unwrap();
    let giving = mapping.clone();
    let installed = std::thread::scope(|s| {
        s.spawn(move || {
            begun.recv().unwrap();
            giving.discard(4, 8).unwrap();
        });
        handle.install_run(PageIndex(0), &image.bytes(0, 32)).unwrap()
    });
    assert_eq!(installed, 24, "a page was installed after it was given back");
    (4..12).for_each(|p| verify_zero(&mapping, p));
    (0..4).chain(12..64).for_each(|p| verify(&image, &mapping, p));
    let counts = handle.stop(VmStopped::attest());
    assert!(counts.again > 0, "the kernel's EAGAIN was never met");
}
