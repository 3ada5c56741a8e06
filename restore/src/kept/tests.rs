use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex, Slot};

use super::*;
use crate::sys::mapping::Mapping;
use crate::{
    DecodedFrame, Extent, FrameToken, PageSize, PageSource, Policy, RegionSpec, Restore, SourceError, Uffd,
    UffdOptions, VmStopped,
};

const PAGES: u64 = 32;

/// All ones.
struct Ones;

impl PageSource for Ones {
    fn page_count(&self) -> PageCount {
        PageCount(PAGES)
    }
    fn locate(&self, _: PageIndex) -> Result<Extent, SourceError> {
        Ok(Extent::frame(PageIndex(0), PAGES, FrameToken(0), Slot::new(0).expect("small")))
    }
    fn fetch(&self, _: FrameToken) -> Result<DecodedFrame, SourceError> {
        Ok(vec![1; PAGES as usize * PAGE_BYTES].into())
    }
}

/// The kernel had handed the event over, so the guest went on and the page is gone; but nothing was done about it.
#[test]
fn a_removal_that_was_read_and_not_recorded_is_found() {
    let uffd = match Uffd::create(UffdOptions::default()) {
        Ok(uffd) => uffd,
        Err(why) => {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {why}");
            return dormouse_testkit::skipped!("{why}");
        }
    };
    let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).expect("memory"));
    let memory = || Memory::own(uffd.clone(), std::slice::from_ref(&mapping)).expect("registered");
    let region =
        RegionSpec { image_first: PageIndex(0), pages: PageCount(PAGES), page_size: PageSize::Small };
    let plan = Plan::new(Arc::new(Ones), &[region]).expect("a plan");

    let states = KeptStates::create(&plan, &memory(), [0; 32]).expect("states");
    let file = states.as_fd().try_clone_to_owned().expect("descriptor");
    let mut events = states.event_buffer();
    std::thread::scope(|s| {
        // Never installed: only the event tells.
        s.spawn(|| mapping.discard(3, 2).expect("given back"));
        while uffd.read_events(&mut events).expect("events").count() == 0 {
            std::thread::yield_now();
        }
    });
    drop((states, events));

    let states = KeptStates::open(file, &plan, &memory(), [0; 32], Duration::ZERO).expect("left behind");
    let handle = Restore::adopt(plan, memory(), states, Policy::default()).expect("taken up");
    let first_byte = |page: usize| mapping.load(page * PAGE_BYTES).expect("inside") & 0xFF;
    let found: Vec<u64> = (0..PAGES as usize).map(first_byte).collect();
    let expected: Vec<u64> = (0..PAGES).map(|p| u64::from(!(3..5).contains(&p))).collect();
    assert_eq!(found, expected);
    handle.stop(VmStopped::attest());
}
