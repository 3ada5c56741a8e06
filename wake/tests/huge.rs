//! Regions of 2 MiB pages.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "a shared module of the tests")]

#[path = "../../restore/tests/common/mod.rs"]
mod common;
#[path = "common/stored.rs"]
mod stored;

use std::sync::Arc;
use std::time::Duration;

use common::{Rng, TestImage, own, skip, uffd_or_skip, verify};
use dormouse_core::ImageKind;
use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};
use dormouse_restore::state::PageState;
use dormouse_restore::sys::shared_file::SharedFile;
use dormouse_restore::{
    Extent, KeptStates, Mapping, Memory, PageRun, PageSize, PageSource, Plan, Policy, RegionSpec, Restore,
    VmStopped,
};
use dormouse_wake::{FirstPages, FirstPagesSource, HeldOut, Recording, StoredImage};
use stored::{PAGES, snapshot};

const NR: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0)
}

/// Puts back the number of huge pages. They are one pool: whoever else wants some waits.
struct Reserved(u64, #[expect(dead_code, reason = "locked until dropped")] std::fs::File);

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(NR, self.0.to_string());
    }
}

fn reserve(pages: u64) -> Option<Reserved> {
    let pool = std::fs::File::open(NR).ok()?;
    pool.lock().ok()?;
    let (before, free) = (number(NR), number(FREE));
    let _ = std::fs::write(NR, (before + pages.saturating_sub(free)).to_string());
    let reserved = Reserved(before, pool);
    if number(FREE) < pages {
        dormouse_testkit::skipped!(
            "{pages} huge pages needed, {} free; as root: echo {pages} > {NR}",
            number(FREE)
        );
        return None;
    }
    Some(reserved)
}

#[test]
fn huge_pages_are_installed_whole() {
    let Some(uffd) = uffd_or_skip() else { return };
    let Some(_reserved) = reserve(16) else { return };
    let Ok(_) = Mapping::new(512, PageSize::Huge) else { return skip("no huge pages").unwrap_or(()) };

    let mut extents = TestImage::mixed(512 * 6, 5).extents;
    extents.push(Extent::zero(PageIndex(512 * 6), 1024));
    let image = Arc::new(TestImage::of(extents));
    let (plan, memory, mapping) = own(&image, PageSize::Huge, uffd);
    let policy = Policy { decoded_frames: 512, ..Policy::default() };
    let handle = Restore::start(plan, memory, policy).unwrap();

    // Page 2 by bulk, with parts of 1 and 3 that cannot be installed alone.
    assert_eq!(handle.install_run(PageIndex(1000), &image.bytes(1000, 600)).unwrap(), 1);
    // Page 7 is given back before it came.
    mapping.discard(512 * 7, 512).unwrap();
    std::thread::scope(|s| {
        for t in 0..3 {
            let (image, mapping) = (&image, &mapping);
            s.spawn(move || Rng(t).shuffled(512 * 8).into_iter().for_each(|p| verify(image, mapping, p)));
        }
        handle.prefetch([PageRun { first: PageIndex(0), pages: 1024 }]);
    });
    let counts = handle.counters();
    // Two threads may fault on the page given back, and the second copy of zeros meets the first.
    assert_eq!(counts.copy_ioctls - counts.exists, 8, "2 MiB pages go one by one, whole: {counts:?}");
    assert!(counts.exists <= 2, "{counts:?}");
    assert_eq!(counts.pages_copied + counts.zero_pages, 8);
    assert_eq!(counts.zero_ioctls, 0);
    // Given back after it came.
    mapping.discard(0, 512).unwrap();
    assert_eq!(mapping.load(0), Some(0));
    assert_eq!(mapping.load(512 * 4096 - 8), Some(0));
    handle.wait_filled().unwrap();
    handle.stop(VmStopped::attest());
    drop(mapping);
    a_stream_is_put_together_into_whole_pages();
}

/// What is read in pages of 4 KiB is installed in pages of 2 MiB: those that come whole as they are, the others with what
/// the stream lacks of them.
fn a_stream_is_put_together_into_whole_pages() {
    for keep in [false, true] {
        let (_dir, bytes, mut resume) = snapshot(0..1200);
        let Some(uffd) = uffd_or_skip() else { return };
        let stream = Arc::new(resume.stream.take().unwrap());
        let first = FirstPages::decode(stream, 0, keep).unwrap();
        let image: Arc<dyn PageSource> =
            Arc::new(StoredImage::new(resume.snapshot.image(ImageKind::Memory, "memory").unwrap()));
        let source = FirstPagesSource::new(image.clone(), first.clone(), HeldOut::NONE);
        let pages = PageCount(PAGES);
        let region = RegionSpec { image_first: PageIndex(0), pages, page_size: PageSize::Huge };
        let plan = Plan::new(Arc::new(source.clone()), &[region]).unwrap();
        let mapping = Arc::new(Mapping::new(PAGES, PageSize::Huge).unwrap());
        let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
        let handle = Restore::start(plan, memory, Policy::default()).unwrap();
        let recording = Recording::new(image, PageSize::Huge).with_stream(&first, HeldOut::NONE, 0);
        first.install(&handle, &source).unwrap().join().unwrap();
        let counts = handle.counters();
        assert_eq!((counts.streamed_pages, counts.pages_copied, counts.copy_ioctls), (3, 3, 3), "{counts:?}");
        let verify = |pages: std::ops::Range<u64>| {
            for page in pages {
                let (mut found, at) = ([0; PAGE_BYTES], page as usize * PAGE_BYTES);
                assert!(mapping.read_page(page, &mut found));
                assert!(found == bytes[at..at + PAGE_BYTES], "page {page} is wrong");
            }
        };
        verify(0..1536);
        assert_eq!(handle.counters().faults, 0, "three pages were there");
        verify(1536..PAGES);
        assert_eq!(handle.counters().faults, 1);
        let seen = recording.so_far(&handle).unwrap();
        assert_eq!((seen.coverage.set_pages, seen.coverage.missed), (1536, 1), "{seen:?}");
        handle.stop(VmStopped::attest());
    }
}

/// Pages of 4 KiB in one of 2 MiB.
const HUGE: u64 = 512;

#[test]
fn huge_pages_left_in_every_state_are_right_for_the_next() {
    const IMAGE: [u8; 32] = [5; 32];
    const SOON: Duration = Duration::from_secs(10);
    let Some(uffd) = uffd_or_skip() else { return };
    let Some(_reserved) = reserve(8) else { return };
    let Ok(_) = Mapping::new(512, PageSize::Huge) else { return skip("no huge pages").unwrap_or(()) };
    let image = Arc::new(TestImage::of(TestImage::mixed(HUGE * 8, 6).extents));
    let (plan, memory, mapping) = own(&image, PageSize::Huge, uffd.clone());
    let states = KeptStates::create(&plan, &memory, IMAGE).unwrap();
    let kept = states.as_fd().try_clone_to_owned().unwrap();
    let handle = Restore::start_kept(plan.clone(), memory, states, Policy::default()).unwrap();
    let verify_all = |pages: std::ops::Range<u64>| pages.for_each(|p| verify(&image, &mapping, p));
    // The first two come; the third is given back before, the second after it came.
    verify_all(0..HUGE * 2);
    mapping.discard(HUGE, HUGE * 2).unwrap();
    while handle.page_state(PageIndex(HUGE * 2)) != Some(PageState::Removed) {
        std::thread::yield_now();
    }
    handle.stop(VmStopped::attest());
    // Killed after the copy of the first, before that of the fourth, and on the way to the fifth.
    let file = SharedFile::open(kept.try_clone().unwrap(), SOON).unwrap();
    let state = |page: u64, state| file.write(8192 + page, &[state as u8]);
    assert!(state(0, PageState::Copying) && state(3, PageState::Copying) && state(4, PageState::Awaited));
    drop(file);

    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    let states = KeptStates::open(kept, &plan, &memory, IMAGE, SOON).unwrap();
    let handle = Restore::adopt(plan, memory, states, Policy::default()).unwrap();
    for page in HUGE..HUGE * 3 {
        assert_eq!(mapping.load(page as usize * 4096), Some(0), "page {page} was given back");
    }
    verify_all(0..HUGE);
    verify_all(HUGE * 3..HUGE * 8);
    handle.fill_all();
    handle.wait_filled().unwrap();
    let counts = handle.detach().unwrap();
    assert_eq!(
        counts.pages_copied + counts.zero_pages,
        5 + 2,
        "what was there is not copied again: {counts:?}"
    );
    assert_eq!(counts.exists, 1, "one copy had happened: {counts:?}");
}
