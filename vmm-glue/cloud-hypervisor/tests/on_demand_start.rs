//! Memory on demand of which a part cannot be served.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use dormouse_cloud_hypervisor::memory::StoredIn;
use dormouse_cloud_hypervisor::send::LaidOut;
use dormouse_cloud_hypervisor::{MemorySlot, OnDemand, OnDemandError, WakeOptions};
use dormouse_core::page::{PageCount, PageIndex};
use dormouse_restore::{DecodedFrame, Extent, FrameToken, PageSource, SourceError, SourceErrorKind};

const PAGES: u64 = 16;

/// That many pages of zeros.
#[derive(Debug)]
struct Zeros(u64);

impl PageSource for Zeros {
    fn page_count(&self) -> PageCount {
        PageCount(self.0)
    }
    fn locate(&self, _: PageIndex) -> Result<Extent, SourceError> {
        Ok(Extent::zero(PageIndex(0), self.0))
    }
    fn fetch(&self, _: FrameToken) -> Result<DecodedFrame, SourceError> {
        Err(SourceError::new(SourceErrorKind::Gone, "there are only zeros"))
    }
}

fn laid_out(slot: u32) -> LaidOut {
    let bytes = PAGES * 4096;
    let address = u64::from(slot) * bytes;
    let slot = MemorySlot { slot, address, bytes, file_offset: 0, pluggable: false };
    LaidOut { image: StoredIn::Slots(vec![slot.slot]), bytes, slots: vec![slot] }
}

/// The first of two images was served for ever by threads that nobody could end, for a VM that never came to be.
#[test]
fn where_one_image_cannot_be_served_those_before_it_are_not_either() {
    let (whole, short): (Arc<dyn PageSource>, Arc<dyn PageSource>) =
        (Arc::new(Zeros(PAGES)), Arc::new(Zeros(1)));
    let images = [(laid_out(0), whole.clone()), (laid_out(1), short)];
    match OnDemand::start(&images, WakeOptions::default()) {
        Err(OnDemandError::Plan(_)) => {}
        Err(OnDemandError::Uffd(why)) => {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {why}");
            return dormouse_testkit::skipped!("{why}");
        }
        other => panic!("the second image is too short: {other:?}"),
    }
    drop(images);
    assert_eq!(Arc::strong_count(&whole), 1, "somebody still serves the first image");
}
