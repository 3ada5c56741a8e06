//! Streams into memory of one's own process: blocks of 2 MiB that come whole are moved there as one.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

#[path = "../../restore/tests/common/mod.rs"]
mod common;
#[path = "common/stored.rs"]
mod stored;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use common::{Rng, uffd_or_skip, until};
use dormouse_chunkstore::{Resume, Store, StoreOptions};
use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};
use dormouse_core::{ImageKind, Name};
use dormouse_restore::install::{Installer, UffdCopy, UffdMove};
use dormouse_restore::outcome::Outcome;
use dormouse_restore::plan::Span;
use dormouse_restore::state::PageState;
use dormouse_restore::{
    Counters, Mapping, Memory, PageSize, Plan, Policy, RegionSpec, Restore, RestoreHandle, Staging, VmStopped,
};
use dormouse_wake::{FirstPages, FirstPagesSource, HeldOut, StoredImage};
use stored::{PAGES, snapshot};

struct Bed {
    first: FirstPages,
    source: FirstPagesSource,
    mapping: Arc<Mapping>,
    handle: RestoreHandle,
    bytes: Vec<u8>,
    _dir: tempfile::TempDir,
}

type Made = Box<dyn FnOnce(Arc<Memory>, Arc<Counters>) -> Box<dyn Installer>>;

fn moving() -> Made {
    Box::new(|memory, counters| Box::new(UffdMove::new(memory, counters)))
}

/// A machine whose stream is about to be installed.
fn bed(
    (dir, bytes, mut resume): (tempfile::TempDir, Vec<u8>, Resume),
    held: HeldOut,
    keep: bool,
    installer: Made,
) -> Option<Bed> {
    let uffd = uffd_or_skip()?;
    let first = FirstPages::decode(Arc::new(resume.stream.take().unwrap()), 0, keep).unwrap();
    let image = StoredImage::new(resume.snapshot.image(ImageKind::Memory, "memory").unwrap());
    let source = FirstPagesSource::new(Arc::new(image), first.clone(), held);
    let page_size = PageSize::Small;
    let region = RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size };
    let plan = Plan::new(Arc::new(source.clone()), &[region]).unwrap();
    let mapping = Arc::new(Mapping::new(PAGES, page_size).unwrap());
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let handle = Restore::start_with(plan, memory, Policy::default(), installer).unwrap();
    Some(Bed { first, source, mapping, handle, bytes, _dir: dir })
}

impl Bed {
    fn stream(&self) {
        self.first.install(&self.handle, &self.source).unwrap().join().unwrap();
    }

    fn is_right(&self, page: u64) -> bool {
        let mut found = [0; PAGE_BYTES];
        assert!(self.mapping.read_page(page, &mut found));
        let at = page as usize * PAGE_BYTES;
        found == self.bytes[at..at + PAGE_BYTES]
    }

    #[track_caller]
    fn verify(&self, mut pages: impl Iterator<Item = u64>) {
        assert_eq!(pages.find(|p| !self.is_right(*p)), None, "a page is wrong");
    }
}

/// Whether this kernel moves blocks; says so loudly if not.
fn moves(counters: &dormouse_restore::CountersSnapshot) -> bool {
    let lacks = if !Staging::may_be_one_page() {
        "no transparent huge pages for those who ask"
    } else if counters.move_ioctls == 1 && counters.moved_pages == 0 {
        "this kernel has no UFFDIO_MOVE (Linux 6.8)"
    } else {
        return true;
    };
    dormouse_testkit::skipped!("{lacks}: nothing is moved");
    false
}

#[test]
fn whole_blocks_of_a_stream_are_moved_and_what_is_left_is_copied() {
    for keep in [false, true] {
        let Some(bed) = bed(snapshot(0..1200), HeldOut::NONE, keep, moving()) else { return };
        bed.stream();
        let counters = bed.handle.counters();
        assert_eq!((counters.streamed_pages, counters.pages_copied), (1200, 1200), "{counters:?}");
        if moves(&counters) {
            assert_eq!((counters.move_ioctls, counters.moved_pages), (2, 1024), "{counters:?}");
        }
        bed.verify(0..1200);
        assert_eq!(bed.handle.counters().faults, 0, "all of it was there");
        bed.verify(1200..PAGES);
        assert_eq!(bed.handle.counters().exists, 0);
        bed.handle.stop(VmStopped::attest());
    }
}

#[test]
fn a_block_with_a_page_held_out_is_copied_and_the_page_still_faults() {
    let held = (0..).map(|seed| HeldOut::new(seed, 512)).find(|held| {
        let holds = |pages: std::ops::Range<u64>| pages.filter(|p| held.holds(PageIndex(*p))).count();
        holds(0..512) == 1 && holds(512..1024) == 0
    });
    let Some(bed) = bed(snapshot(0..1024), held.unwrap(), false, moving()) else { return };
    bed.stream();
    let counters = bed.handle.counters();
    assert_eq!(counters.streamed_pages, 1023, "{counters:?}");
    if moves(&counters) {
        assert_eq!(counters.moved_pages, 512, "{counters:?}");
    }
    bed.verify(0..1024);
    let counters = bed.handle.stop(VmStopped::attest());
    assert_eq!((counters.faults, counters.fetches), (1, 0), "{counters:?}");
}

#[test]
fn an_installer_that_copies_gathers_nothing() {
    let copying: Made = Box::new(|memory, counters| Box::new(UffdCopy::new(memory, counters)));
    let Some(bed) = bed(snapshot(0..1024), HeldOut::NONE, false, copying) else { return };
    bed.stream();
    bed.verify(0..1024);
    let counters = bed.handle.stop(VmStopped::attest());
    assert_eq!((counters.streamed_pages, counters.move_ioctls, counters.faults), (1024, 0, 0));
}

/// Says that its first block is about to be moved, and moves it once the kernel has an event for us.
struct Hesitant {
    inner: UffdMove,
    memory: Arc<Memory>,
    begin: Sender<()>,
    first: AtomicBool,
}

impl Installer for Hesitant {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        self.inner.copy(at, bytes)
    }
    fn zero(&self, at: Span) -> Outcome {
        self.inner.zero(at)
    }
    fn poison(&self, at: Span) -> Outcome {
        self.inner.poison(at)
    }
    fn wake(&self, at: Span) {
        self.inner.wake(at);
    }
    fn moves(&self) -> bool {
        self.inner.moves()
    }
    fn move_block(&self, at: Span, block: &mut Staging) -> Outcome {
        if self.first.swap(false, Ordering::SeqCst) {
            self.begin.send(()).unwrap();
            // It stays unread, since events are not read during an install.
            let uffd = self.memory.uffd().as_fd();
            let mut fds = [rustix::event::PollFd::new(&uffd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1), "nothing happened meanwhile");
        }
        self.inner.move_block(at, block)
    }
}

/// A machine of which `meanwhile` happens while its first block is being moved.
fn while_moving(meanwhile: impl FnOnce(&Mapping) + Send) -> Option<Bed> {
    if !Staging::may_be_one_page() {
        dormouse_testkit::skipped!("no transparent huge pages for those who ask: nothing is moved");
        return None;
    }
    let (begin, begun) = channel();
    let made: Made = Box::new(move |memory, counters| {
        let inner = UffdMove::new(memory.clone(), counters);
        Box::new(Hesitant { inner, memory, begin, first: AtomicBool::new(true) })
    });
    let bed = bed(snapshot(0..512), HeldOut::NONE, false, made)?;
    let mapping = bed.mapping.clone();
    std::thread::scope(|s| {
        s.spawn(move || {
            begun.recv().unwrap();
            meanwhile(&mapping);
        });
        bed.stream();
    });
    Some(bed)
}

#[test]
fn a_removal_that_begins_while_a_block_is_moved_wins() {
    let Some(bed) = while_moving(|mapping| mapping.discard(4, 8).unwrap()) else { return };
    until("the removal", || bed.handle.page_state(PageIndex(11)) == Some(PageState::Removed));
    let mut found = [1; PAGE_BYTES];
    for page in 4..12 {
        assert!(bed.mapping.read_page(page, &mut found) && found == [0; PAGE_BYTES], "page {page} came back");
    }
    bed.verify((0..4).chain(12..PAGES));
    let counters = bed.handle.stop(VmStopped::attest());
    assert_eq!((counters.removes, counters.moved_pages), (1, 0), "{counters:?}");
    assert!(counters.again > 0, "the kernel's EAGAIN was never met: {counters:?}");
}

#[test]
fn who_faults_while_a_block_is_moved_is_woken_with_its_page() {
    let Some(bed) = while_moving(|mapping| assert_ne!(mapping.load(77 * PAGE_BYTES), Some(0))) else {
        return;
    };
    bed.verify(0..PAGES);
    let counters = bed.handle.stop(VmStopped::attest());
    assert_eq!(counters.streamed_pages, 512, "{counters:?}");
}

/// A guest that touches everything while its stream is gathered, moved and copied never sees anything else than its
/// pages.
#[test]
fn faults_and_blocks_do_not_get_in_each_others_way() {
    for seed in 0..4 {
        let Some(bed) = bed(snapshot(0..1600), HeldOut::NONE, seed % 2 == 0, moving()) else { return };
        std::thread::scope(|s| {
            for t in 0..2 {
                let bed = &bed;
                s.spawn(move || bed.verify(Rng(seed * 2 + t).shuffled(PAGES).into_iter()));
            }
            bed.stream();
        });
        bed.handle.fill_all();
        bed.handle.wait_filled().unwrap();
        bed.verify(0..PAGES);
        bed.handle.stop(VmStopped::attest());
    }
}

fn files(path: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[test]
fn of_a_stream_that_breaks_off_only_whole_pages_are_ever_seen() {
    let (dir, bytes, resume) = snapshot(0..1024);
    drop(resume);
    let mut found = Vec::new();
    files(dir.path(), &mut found);
    let stream = found.iter().find(|path| path.to_string_lossy().contains("stream")).unwrap();
    let mut object = std::fs::read(stream).unwrap();
    // In its last frames: what comes before decodes.
    let at = object.len() - object.len() / 8;
    object[at] ^= 0x40;
    std::fs::write(stream, object).unwrap();

    let store = Store::open(dir.path().join("store").to_str().unwrap(), StoreOptions::default()).unwrap();
    let resume = store.open_resume(&Name::new("m").unwrap()).unwrap();
    let Some(bed) = bed((dir, bytes, resume), HeldOut::NONE, false, moving()) else { return };
    bed.stream();
    let counters = bed.handle.counters();
    assert!((512..1024).contains(&counters.streamed_pages), "it broke off in the second block: {counters:?}");
    if moves(&counters) {
        assert_eq!(counters.moved_pages, 512, "a block that is not whole is not moved: {counters:?}");
    }
    bed.verify(0..PAGES);
    assert!(bed.handle.failures().is_empty());
    bed.handle.stop(VmStopped::attest());
}
