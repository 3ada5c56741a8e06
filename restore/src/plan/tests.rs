use proptest::prelude::*;

use super::*;
use crate::source::{DecodedFrame, Extent, FrameToken, SourceError};

struct Zeros(u64);

impl PageSource for Zeros {
    fn page_count(&self) -> PageCount {
        PageCount(self.0)
    }
    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        Ok(Extent::zero(page, 1))
    }
    fn fetch(&self, _: FrameToken) -> Result<DecodedFrame, SourceError> {
        Ok(vec![].into())
    }
}

fn small(first: u64, pages: u64) -> RegionSpec {
    RegionSpec { image_first: PageIndex(first), pages: PageCount(pages), page_size: PageSize::Small }
}

fn huge(first: u64, pages: u64) -> RegionSpec {
    RegionSpec { page_size: PageSize::Huge, ..small(first, pages) }
}

fn plan(regions: &[RegionSpec]) -> Result<Plan, PlanError> {
    Plan::new(Arc::new(Zeros(4096)), regions)
}

#[test]
fn every_mistake_has_its_name() {
    assert_eq!(plan(&[]).err(), Some(PlanError::NoRegions));
    assert_eq!(plan(&vec![small(0, 1); 1025]).err(), Some(PlanError::TooManyRegions(1025)));
    assert_eq!(plan(&[small(0, 4), small(9, 0)]).err(), Some(PlanError::Empty(1)));
    assert_eq!(
        plan(&[small(4000, 97)]).err(),
        Some(PlanError::OutsideImage { region: 0, end: 4097, image: 4096 })
    );
    assert_eq!(
        plan(&[small(u64::MAX, 2)]).err(),
        Some(PlanError::OutsideImage { region: 0, end: u64::MAX, image: 4096 })
    );
    assert_eq!(plan(&[huge(1, 512)]).err(), Some(PlanError::Unaligned { region: 0, first: 1, end: 513 }));
    assert_eq!(
        plan(&[small(10, 10), small(0, 11)]).err(),
        Some(PlanError::Overlap { first: 1, second: 0, page: 10 })
    );
}

#[test]
fn cells_count_pages_in_their_regions_size() {
    let plan = plan(&[small(1024, 100), huge(0, 1024)]).expect("valid");
    assert_eq!(plan.cells(), 102);
    assert_eq!(plan.cell_of(PageIndex(1025)), Some(Cell(1)));
    assert_eq!(plan.cell_of(PageIndex(511)), Some(Cell(100)));
    assert_eq!(plan.cell_of(PageIndex(512)), Some(Cell(101)));
    assert_eq!(plan.cell_of(PageIndex(1124)), None);
    assert_eq!(plan.pages_of(Cell(101)), Some(PageRun { first: PageIndex(512), pages: 512 }));
    assert_eq!(plan.pages_of(Cell(102)), None);
    let part = plan.span_within(PageRun { first: PageIndex(1), pages: 1022 }).expect("shown");
    assert_eq!((part.region(), part.first_in_region(), part.cells()), (1, 1, 0));
    assert!(plan.span(0, 99, 2).is_none());
    assert!(plan.span(0, u64::MAX, 2).is_none());
}

proptest! {
    #[test]
    fn cells_and_pages_agree(first in 0u64..100, pages in 1u64..200, gap in 0u64..50, more in 1u64..100) {
        let plan = plan(&[small(first + pages + gap, more), small(first, pages)]).expect("valid");
        for cell in 0..plan.cells() {
            let run = plan.pages_of(Cell(cell)).expect("inside");
            prop_assert_eq!(plan.cell_of(run.first), Some(Cell(cell)));
        }
    }
}
