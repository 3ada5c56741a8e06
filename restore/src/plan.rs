//! What a restore executes: an image and the VMM's regions, validated once, immutable.

use std::sync::Arc;

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};

use crate::source::PageSource;

/// Most regions a plan may have. VMMs use one to four; a larger number is a mistake or an attack.
pub const REGIONS_MAX: usize = 1024;

/// The page size the VMM's region is backed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB, from hugetlb.
    Huge,
}

impl PageSize {
    /// Image pages in one page of this size.
    pub const fn pages(self) -> u64 {
        match self {
            PageSize::Small => 1,
            PageSize::Huge => 512,
        }
    }

    /// Bytes in one page of this size.
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_BYTES as u64
    }

    /// The size with this many bytes, if it is one of them.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(PageSize::Small),
            0x20_0000 => Some(PageSize::Huge),
            _ => None,
        }
    }
}

/// A range of image pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u64,
}

/// One region of the VMM's guest memory and the image pages it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// The image page at the region's start.
    pub image_first: PageIndex,
    /// The region's size, in pages of 4 KiB whatever its page size.
    pub pages: PageCount,
    /// What backs it.
    pub page_size: PageSize,
}

/// Why a plan was refused. Regions are counted from zero, in the order given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No region at all.
    #[error("the plan has no regions: give at least one region of guest memory")]
    NoRegions,
    /// More than [`REGIONS_MAX`].
    #[error("the plan has {0} regions, more than the {REGIONS_MAX} allowed: merge neighbouring regions")]
    TooManyRegions(usize),
    /// A region without pages.
    #[error("region {0} is empty: leave it out")]
    Empty(usize),
    /// A region of huge pages whose image range does not start and end on one.
    #[error(
        "region {region} has 2 MiB pages but covers image pages {first}..{end}: both must be multiples of 512"
    )]
    Unaligned {
        /// Which region.
        region: usize,
        /// Its first image page.
        first: u64,
        /// The image page after its last.
        end: u64,
    },
    /// A region reaches beyond the image.
    #[error(
        "region {region} ends at image page {end} but the image has {image}: is this the snapshot of another machine?"
    )]
    OutsideImage {
        /// Which region.
        region: usize,
        /// The image page after its last.
        end: u64,
        /// Pages in the image.
        image: u64,
    },
    /// Two regions show the same image page.
    #[error("regions {first} and {second} overlap at image page {page}: each image page may be shown once")]
    Overlap {
        /// One region.
        first: usize,
        /// The other.
        second: usize,
        /// The first page both show.
        page: u64,
    },
}

/// The number of a page of a plan in units of its region's page size, counted over all regions.
///
/// It is what page states are kept for: a 2 MiB page comes and goes as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell(pub u64);

/// Consecutive cells of one region. Only a [`Plan`] makes these, so they are always inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    region: usize,
    first: u64,
    cells: u64,
    base: u64,
}

impl Span {
    /// The region, in the plan's order.
    pub fn region(&self) -> usize {
        self.region
    }
    /// The first cell, counted from the region's start.
    pub fn first_in_region(&self) -> u64 {
        self.first
    }
    /// How many cells.
    pub fn cells(&self) -> u64 {
        self.cells
    }
    /// The first cell, counted over the plan.
    pub fn first(&self) -> Cell {
        Cell(self.base + self.first)
    }
    /// `cells` cells of this span from its `skip`-th on, cut off at its end.
    pub fn part(&self, skip: u64, cells: u64) -> Span {
        let skip = skip.min(self.cells);
        Span { first: self.first + skip, cells: cells.min(self.cells - skip), ..*self }
    }
}

/// A region of a validated plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedRegion {
    pub(crate) spec: RegionSpec,
    pub(crate) first_cell: u64,
}

impl PlannedRegion {
    pub(crate) fn cells(&self) -> u64 {
        self.spec.pages.0 / self.spec.page_size.pages()
    }
    fn end(&self) -> u64 {
        self.spec.image_first.0 + self.spec.pages.0
    }
}

/// An image and the regions that show it. Cheap to clone.
#[derive(Clone)]
pub struct Plan {
    source: Arc<dyn PageSource>,
    regions: Arc<[PlannedRegion]>,
    by_image: Arc<[usize]>,
    cells: u64,
}

impl Plan {
    /// Validates `regions`, which are in the VMM's order, against the image of `source`.
    pub fn new(source: Arc<dyn PageSource>, regions: &[RegionSpec]) -> Result<Self, PlanError> {
        let image = source.page_count().0;
        if regions.is_empty() {
            return Err(PlanError::NoRegions);
        }
        if regions.len() > REGIONS_MAX {
            return Err(PlanError::TooManyRegions(regions.len()));
        }
        let mut planned = Vec::with_capacity(regions.len());
        let mut cells = 0;
        for (region, &spec) in regions.iter().enumerate() {
            let first = spec.image_first.0;
            let end = first.saturating_add(spec.pages.0);
            if spec.pages.0 == 0 {
                return Err(PlanError::Empty(region));
            }
            if end > image {
                return Err(PlanError::OutsideImage { region, end, image });
            }
            if !first.is_multiple_of(spec.page_size.pages()) || !end.is_multiple_of(spec.page_size.pages()) {
                return Err(PlanError::Unaligned { region, first, end });
            }
            let one = PlannedRegion { spec, first_cell: cells };
            cells += one.cells();
            planned.push(one);
        }
        let mut by_image: Vec<usize> = (0..planned.len()).collect();
        by_image.sort_by_key(|&r| planned[r].spec.image_first);
        for pair in by_image.windows(2) {
            if let [first, second] = *pair {
                let page = planned[second].spec.image_first.0;
                if planned[first].end() > page {
                    return Err(PlanError::Overlap { first, second, page });
                }
            }
        }
        Ok(Plan { source, regions: planned.into(), by_image: by_image.into(), cells })
    }

    /// The regions, in the VMM's order.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = RegionSpec> + '_ {
        self.regions.iter().map(|r| r.spec)
    }

    /// The image's pages.
    pub fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// Cells in all regions together.
    pub fn cells(&self) -> u64 {
        self.cells
    }

    /// The cell that shows `page`, if a region does.
    pub fn cell_of(&self, page: PageIndex) -> Option<Cell> {
        let region = &self.regions[self.region_of_page(page)?];
        let inside = (page.0 - region.spec.image_first.0) / region.spec.page_size.pages();
        Some(Cell(region.first_cell + inside))
    }

    /// The region that shows `page`.
    pub(crate) fn region_of_page(&self, page: PageIndex) -> Option<usize> {
        let after = self.by_image.partition_point(|&r| self.regions[r].spec.image_first <= page);
        let region = self.by_image[after.checked_sub(1)?];
        (page.0 < self.regions[region].end()).then_some(region)
    }

    pub(crate) fn region(&self, region: usize) -> Option<&PlannedRegion> {
        self.regions.get(region)
    }

    /// The image pages `cell` shows.
    pub fn pages_of(&self, cell: Cell) -> Option<PageRun> {
        let region = self.regions[..].partition_point(|r| r.first_cell <= cell.0).checked_sub(1)?;
        let region = &self.regions[region];
        let inside = cell.0 - region.first_cell;
        let unit = region.spec.page_size.pages();
        (inside < region.cells())
            .then(|| PageRun { first: PageIndex(region.spec.image_first.0 + inside * unit), pages: unit })
    }

    /// `cells` cells of `region` from its `first`-th on, or `None` if they are not all inside it.
    pub fn span(&self, region: usize, first: u64, cells: u64) -> Option<Span> {
        let planned = self.regions.get(region)?;
        (first.checked_add(cells)? <= planned.cells()).then_some(Span {
            region,
            first,
            cells,
            base: planned.first_cell,
        })
    }

    /// Up to `cells` cells, at least one, from the start of `span` on, as far as its region goes.
    pub(crate) fn from(&self, span: Span, cells: u64) -> Span {
        let room = self.regions.get(span.region).map_or(span.cells, |r| r.cells() - span.first);
        Span { cells: cells.max(1).min(room), ..span }
    }

    /// The cells of `region` that show pages of `first..end`, cut off at the region's ends. Small pages only.
    pub(crate) fn clip(&self, region: usize, first: u64, end: u64) -> Option<Span> {
        let planned = self.regions.get(region)?;
        let start = planned.spec.image_first.0;
        let (from, to) = (first.max(start), end.min(planned.end()));
        self.span(region, from.checked_sub(start)?, to.checked_sub(from)?)
    }

    /// The whole cells of the region showing `run.first` that lie inside `run`.
    ///
    /// `None` if no region shows that page. The span is empty if a huge page is covered in part only.
    pub(crate) fn span_within(&self, run: PageRun) -> Option<Span> {
        let index = self.region_of_page(run.first)?;
        let region = &self.regions[index];
        let unit = region.spec.page_size.pages();
        let from = run.first.0 - region.spec.image_first.0;
        let to = run.first.0.saturating_add(run.pages).min(region.end()) - region.spec.image_first.0;
        let first = from.div_ceil(unit).min(region.cells());
        self.span(index, first, (to / unit).saturating_sub(first))
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("regions", &self.regions).field("cells", &self.cells).finish()
    }
}

#[cfg(test)]
mod tests;
