//! Installs bytes that come by other ways than a fault.

use std::sync::Arc;
use std::time::Duration;

use dormouse_core::page::{PAGE_BYTES, PageIndex};

use crate::core::Core;
use crate::error::RestoreError;
use crate::fill::Bytes;
use crate::plan::{PageRun, PageSize, Span};
use crate::sys::region::RegisteredRegion;
use crate::sys::staging::Staging;

/// Pages in a block.
pub const BLOCK_PAGES: u64 = PageSize::Huge.pages();

/// Installs verified bytes that arrive by other ways than a fault, such as a working-set stream. Clones may
/// be used from any number of threads at once.
#[derive(Clone)]
pub struct BulkInstaller {
    core: Arc<Core>,
}

impl std::fmt::Debug for BulkInstaller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BulkInstaller").finish_non_exhaustive()
    }
}

impl BulkInstaller {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        BulkInstaller { core }
    }

    /// Installs the decoded, verified `bytes` of the image pages from `first` on, and returns how many pages
    /// (of their region's size) that put in place. Pages that are there already, are being installed, or were
    /// given back by the guest are left alone. Of a huge page, only the whole is installed.
    pub fn install_run(&self, first: PageIndex, bytes: &[u8]) -> Result<u64, RestoreError> {
        if !bytes.len().is_multiple_of(PAGE_BYTES) {
            return Err(RestoreError::NotPages { bytes: bytes.len() });
        }
        let done = self.each(PageRun { first, pages: (bytes.len() / PAGE_BYTES) as u64 }, |span, skip| {
            let from = skip as usize * PAGE_BYTES;
            let len = (span.cells() * self.core.cell_bytes(span)) as usize;
            self.core.fill(span, Bytes::Of(&bytes[from..from + len]))
        })?;
        self.core.counters.streamed_pages.add(done);
        Ok(done)
    }

    /// [`RestoreHandle::mark`](crate::RestoreHandle::mark).
    pub fn mark(&self, phase: &str) {
        self.core.timeline.mark(phase);
    }

    /// Whether there are blocks at all, for [`block_at`](Self::block_at).
    pub fn gathers(&self) -> bool {
        let huge = |region: &RegisteredRegion| region.page_size() == PageSize::Huge;
        self.core.installer.moves() || self.core.memory.regions().iter().any(huge)
    }

    /// The 2 MiB that `page` lies in, if they are better put together first and installed as one: a page of 2 MiB
    /// cannot be installed otherwise, and small ones may be moved.
    pub fn block_at(&self, page: PageIndex) -> Option<PageRun> {
        let region = self.core.plan.region_of_page(page)?;
        let spec = self.core.plan.region(region)?.spec;
        let at = page.0 - spec.image_first.0;
        let start = match spec.page_size {
            PageSize::Huge => at / BLOCK_PAGES * BLOCK_PAGES,
            PageSize::Small if self.core.installer.moves() => {
                // Where it begins is a matter of addresses, and not of the image.
                let before =
                    self.core.memory.regions().get(region)?.start() / PAGE_BYTES as u64 % BLOCK_PAGES;
                ((at + before) / BLOCK_PAGES * BLOCK_PAGES).checked_sub(before)?
            }
            PageSize::Small => return None,
        };
        let whole = start.checked_add(BLOCK_PAGES)? <= spec.pages.0;
        whole.then(|| PageRun { first: PageIndex(spec.image_first.0 + start), pages: BLOCK_PAGES })
    }

    /// The page size of the region that shows `page`.
    pub fn page_size(&self, page: PageIndex) -> Option<PageSize> {
        Some(self.core.plan.region(self.core.plan.region_of_page(page)?)?.spec.page_size)
    }

    /// Whether nothing is left to be installed of the block that begins with `first`.
    pub fn is_settled(&self, first: PageIndex) -> bool {
        let span = self.core.plan.span_within(PageRun { first, pages: BLOCK_PAGES });
        span.is_none_or(|span| self.core.table.find(span, |state| !state.is_settled()).is_none())
    }

    /// Whether a vCPU waits for something that has to be fetched.
    pub fn is_demanded(&self) -> bool {
        self.core.queue.demand_waiting()
    }

    /// Waits a little; whether the restore was stopped.
    pub fn pause(&self) -> bool {
        self.core.queue.pause(Duration::from_millis(1))
    }

    /// Installs the block that begins with `first`, whose verified bytes are in `block`. Returns as
    /// [`install_run`](Self::install_run).
    pub fn install_block(&self, first: PageIndex, block: &mut Staging) -> Result<u64, RestoreError> {
        let span = self.core.plan.span_within(PageRun { first, pages: BLOCK_PAGES });
        let span = span.ok_or(RestoreError::NotShown { page: first })?;
        if span.cells() != BLOCK_PAGES {
            return self.install_run(first, block.bytes());
        }
        let done = self.core.fill_block(span, block)?;
        self.core.counters.prefetched_pages.add(done);
        self.core.counters.streamed_pages.add(done);
        Ok(done)
    }

    /// Installs zeros on `run`, which the image holds as zeros. Returns as [`install_run`](Self::install_run).
    pub fn install_zeros(&self, run: PageRun) -> Result<u64, RestoreError> {
        self.each(run, |span, _| self.core.fill(span, Bytes::Zero))
    }

    fn each(
        &self,
        run: PageRun,
        install: impl Fn(Span, u64) -> Result<u64, RestoreError>,
    ) -> Result<u64, RestoreError> {
        let (mut installed, mut page) = (0, run.first.0);
        let end = run.first.0.saturating_add(run.pages);
        while page < end {
            let left = PageRun { first: PageIndex(page), pages: end - page };
            let not_shown = RestoreError::NotShown { page: left.first };
            let Some((span, next)) = self.core.span_and_next(left) else { return Err(not_shown) };
            if let Some(start) = self.core.plan.pages_of(span.first()).filter(|_| span.cells() > 0) {
                let done = install(span, start.first.0 - run.first.0)?;
                self.core.counters.prefetched_pages.add(done);
                installed += done;
            }
            page = next;
        }
        Ok(installed)
    }
}

impl Core {
    /// The cells wholly inside `run` in the region that shows its first page, and the page after that region
    /// or run.
    fn span_and_next(&self, run: PageRun) -> Option<(Span, u64)> {
        let region = self.plan.region_of_page(run.first)?;
        let spec = self.plan.region(region)?.spec;
        let next = run.first.0.saturating_add(run.pages).min(spec.image_first.0 + spec.pages.0);
        Some((self.plan.span_within(run)?, next))
    }

    /// The cells of all regions wholly inside `run`.
    pub(crate) fn spans(&self, run: PageRun) -> Vec<Span> {
        let end = run.first.0.saturating_add(run.pages);
        let clipped = self.plan.regions().filter_map(|r| {
            let first = r.image_first.0.max(run.first.0);
            let to = end.min(r.image_first.0 + r.pages.0);
            self.plan.span_within(PageRun { first: PageIndex(first), pages: to.checked_sub(first)? })
        });
        clipped.filter(|s| s.cells() > 0).collect()
    }
}
