//! What a session tells about what its machine needs first: faults, and the pages that were held out for that.

use std::{ops::Range, sync::Arc};

use dormouse_core::page::PageIndex;
use serde::{Deserialize, Serialize};

use crate::{
    coverage::{Coverage, HeldOut},
    first_pages::FirstPages,
    page_set::PageSet,
};
use dormouse_restore::{
    Content, Extent, FrameToken, PageSize, PageSource, RestoreHandle, SourceError, state::PageState,
};

/// Pages taken for a touch of a page that was zero: as many as come with the fault, now or a little later.
const ZERO_PAGES: u64 = PageSize::Huge.pages();

/// A run of image pages, as (first page, pages): short in JSON, too.
pub type Run = (u64, u64);

/// What was seen in one session inside its window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionRecord {
    /// What the resume stream brought, in its order.
    pub streamed: Vec<Run>,
    /// What faults brought beyond that, in the order of first touch.
    pub missed: Vec<Run>,
    /// Pages of the stream that were held out, and that nobody touched.
    pub unneeded: Vec<u64>,
    /// What that says of the stream.
    pub coverage: Coverage,
    /// Where the choice of the pages held out began.
    pub seed: u32,
    /// First touches that were not recorded because there were too many.
    pub dropped: u64,
}

/// Turns a running restore's faults into a [`SessionRecord`].
#[derive(Clone)]
pub struct Recording {
    image: Arc<dyn PageSource>,
    list: Vec<Range<u64>>,
    set: PageSet,
    held: HeldOut,
    seed: u32,
    page_size: PageSize,
    page_by_page: bool,
    earlier: Option<SessionRecord>,
}

impl Recording {
    /// The record of a machine that wakes from `image` without a stream.
    pub fn new(image: Arc<dyn PageSource>, page_size: PageSize) -> Self {
        let (list, set, held) = (Vec::new(), PageSet::default(), HeldOut::NONE);
        Recording { image, list, set, held, seed: 0, page_size, page_by_page: false, earlier: None }
    }

    /// The machine's pages come one by one, from [`PageByPage`].
    pub fn page_by_page(self) -> Self {
        Recording { page_by_page: true, ..self }
    }

    /// The machine is given `first`, but for those `held` (chosen by chance from `seed` on).
    pub fn with_stream(mut self, first: &FirstPages, held: HeldOut, seed: u32) -> Self {
        self.list = first.list().to_vec();
        let unit = self.page_size.pages();
        for run in &self.list {
            // A page of 2 MiB comes as one, whatever of it the stream holds.
            self.set.insert(run.start / unit * unit..run.end.div_ceil(unit) * unit);
        }
        (self.held, self.seed) = (held, seed);
        self
    }

    /// The machine has been awake before, in the hands of another process that saw `earlier`: this is the rest of it.
    /// Pages that were `installed` by then, and that neither its stream nor its faults account for, were brought by faults
    /// that it did not come to tell of; so nothing may have been filled in the background.
    pub fn after(mut self, mut earlier: SessionRecord, installed: &[Range<u64>]) -> Self {
        self.list = runs(&earlier.streamed);
        self.list.iter().for_each(|run| drop(self.set.insert(run.clone())));
        let mut known = self.set.clone();
        runs(&earlier.missed).into_iter().for_each(|run| drop(known.insert(run)));
        let untold = installed.iter().flat_map(|run| known.insert(run.clone()));
        earlier.missed.extend(untold.map(|run| (run.start, run.end - run.start)));
        Recording { earlier: Some(earlier), ..self }
    }

    /// What was seen so far.
    ///
    /// # Errors
    /// The store's, should a page map have to be read anew.
    pub fn so_far(&self, handle: &RestoreHandle) -> Result<SessionRecord, SourceError> {
        let recorded = handle.record();
        let mut record = self.earlier.clone().unwrap_or_else(|| self.begun());
        record.dropped = record.dropped.saturating_add(recorded.dropped);
        let (mut missed, mut touched) = (PageSet::default(), PageSet::default());
        runs(&record.missed).into_iter().for_each(|run| drop(missed.insert(run)));
        for page in recorded.pages {
            touched.insert(page.0..page.0 + 1);
            if self.set.contains(page.0) {
                continue;
            }
            record.coverage.missed = record.coverage.missed.saturating_add(1);
            for run in self.brought_by(page)? {
                let new = missed.insert(run);
                record.missed.extend(new.into_iter().map(|part| (part.start, part.end - part.start)));
            }
        }
        // Of those that the earlier process held out, the ones that nobody had touched by then.
        let held: Vec<u64> = match &self.earlier {
            Some(earlier) => earlier.unneeded.clone(),
            None => self.list.iter().cloned().flatten().filter(|p| self.held.holds(PageIndex(*p))).collect(),
        };
        record.unneeded.clear();
        record.coverage.sampled_untouched = 0;
        for page in held {
            if touched.contains(page) {
                record.coverage.sampled_touched = record.coverage.sampled_touched.saturating_add(1);
            } else if handle.page_state(PageIndex(page)) == Some(PageState::Absent) {
                record.coverage.sampled_untouched += 1;
                record.unneeded.push(page);
            } else {
                record.coverage.sampled_lost = record.coverage.sampled_lost.saturating_add(1);
            }
        }
        Ok(record)
    }

    /// The record of a machine that has touched nothing yet.
    fn begun(&self) -> SessionRecord {
        let mut record = SessionRecord {
            streamed: self.list.iter().map(|r| (r.start, r.end - r.start)).collect(),
            seed: self.seed,
            ..Default::default()
        };
        record.coverage.set_pages = self.set.pages();
        record.coverage.one_in = self.held.one_in();
        record
    }

    /// What came with a fault on `page`, now or a little later, and then did not fault: its run first.
    fn brought_by(&self, page: PageIndex) -> Result<Vec<Range<u64>>, SourceError> {
        if self.page_size == PageSize::Huge || self.page_by_page {
            let run = page.0..page.0 + self.page_size.pages();
            return Ok(vec![run]);
        }
        let extent = self.image.locate(page)?;
        let mut run = extent.first.0..extent.end();
        let Content::Frame { frame, .. } = extent.content else {
            let block = page.0 / ZERO_PAGES * ZERO_PAGES;
            run = run.start.max(block)..run.end.min(block + ZERO_PAGES);
            return Ok(vec![run]);
        };
        let others = self.image.runs_of(frame).unwrap_or_default();
        Ok(std::iter::once(run).chain(others.iter().map(|e| e.first.0..e.end())).collect())
    }
}

/// Runs from a file may be any numbers.
fn runs(runs: &[Run]) -> Vec<Range<u64>> {
    runs.iter().map(|(first, pages)| *first..first.saturating_add(*pages)).collect()
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").field("held", &self.held).finish_non_exhaustive()
    }
}

/// An image whose every page faults by itself: slow, and the record is of pages touched and not of their neighbours.
pub struct PageByPage(pub Arc<dyn PageSource>);

fn alone(page: PageIndex, extent: Extent) -> Extent {
    let Content::Frame { frame, slot } = extent.content else { return Extent::zero(page, 1) };
    let slot = dormouse_core::page::Slot::new(slot.get() + (page.0 - extent.first.0) as usize);
    slot.map_or(extent, |slot| Extent::frame(page, 1, frame, slot))
}

impl PageSource for PageByPage {
    fn page_count(&self) -> dormouse_core::page::PageCount {
        self.0.page_count()
    }

    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        self.0.locate(page).map(|extent| alone(page, extent))
    }

    fn fetch(&self, frame: FrameToken) -> Result<dormouse_restore::DecodedFrame, SourceError> {
        self.0.fetch(frame)
    }

    fn try_locate(&self, page: PageIndex) -> Option<Extent> {
        self.0.try_locate(page).map(|extent| alone(page, extent))
    }

    fn try_fetch(&self, frame: FrameToken) -> Option<dormouse_restore::DecodedFrame> {
        self.0.try_fetch(frame)
    }

    fn fetch_at_hand(&self, frame: FrameToken) -> Option<dormouse_restore::DecodedFrame> {
        self.0.fetch_at_hand(frame)
    }

    // Not `runs_of`: nothing comes with a fault but its page.
}
