//! From a wanted page to its bytes: locate, fetch once, install.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use dormouse_core::page::{PAGE_BYTES, PageIndex};

use crate::core::Core;
use crate::error::RestoreError;
use crate::fill::Bytes;
use crate::frames::{Begin, Reach, Waiter};
use crate::locality::Locality;
use crate::plan::{PageSize, Span};
use crate::rest::Rest;
use crate::source::{Content, DecodedFrame, Extent, FrameToken, SourceError, SourceErrorKind};
use crate::state::PageState;

/// What the fault thread could do about a fault by itself.
pub(crate) enum Inline {
    /// All of it.
    Served,
    /// Its frame is not decoded.
    Missing(FrameToken, Waiter),
    /// Where its page is has to be looked up.
    Unknown,
}

impl Core {
    /// Answers a fault, waiting for the source as long as it takes.
    pub(crate) fn serve_demand(&self, cell: Span, since: Instant) {
        if self.page_size(cell) == PageSize::Huge {
            return self.serve_huge(cell, Some(since));
        }
        let Some(page) = self.awaited_page(cell) else { return };
        match self.located(page) {
            Ok(extent) => {
                self.serve_extent(Waiter { wanted: cell, extent, since: Some(since), reach: Reach::Run })
            }
            Err(error) => self.fail_cells(cell, &error),
        }
    }

    /// Answers a fault from what is decoded already. Otherwise says what is missing.
    pub(crate) fn serve_hit(&self, cell: Span, since: Instant, locality: &mut Locality) -> Inline {
        if self.page_size(cell) == PageSize::Huge {
            return Inline::Unknown;
        }
        let Some(page) = self.awaited_page(cell) else { return Inline::Served };
        let source = self.plan.source();
        let located = catch_unwind(AssertUnwindSafe(|| source.try_locate(page))).ok().flatten();
        let Some(extent) = located.filter(|e| e.contains(page)) else { return Inline::Unknown };
        let reach = if locality.walks(page.0, &extent) { Reach::Run } else { Reach::Page };
        let waiter = Waiter { wanted: cell, extent, since: Some(since), reach };
        let Content::Frame { frame, .. } = extent.content else {
            self.install_zeros(waiter);
            return Inline::Served;
        };
        let fetched = || catch_unwind(AssertUnwindSafe(|| source.try_fetch(frame))).ok().flatten();
        let Some(decoded) = self.frames.kept(frame).or_else(fetched) else {
            return Inline::Missing(frame, waiter);
        };
        self.counters.inline_hits.add(1);
        self.install(waiter, &decoded);
        self.leave_rest(frame, waiter.extent, &decoded);
        Inline::Served
    }

    /// Answers a fault by decoding its frame here, if its stored bytes are at hand; else by a worker.
    pub(crate) fn serve_near(&self, frame: FrameToken, waiter: Waiter) {
        match self.frames.begin(frame, waiter, || self.table.any_wanted(waiter.wanted)) {
            Begin::Fetch => {
                let source = self.plan.source();
                let near = catch_unwind(AssertUnwindSafe(|| source.fetch_at_hand(frame))).ok().flatten();
                match near {
                    Some(decoded) => {
                        self.counters.fetches.add(1);
                        self.counters.inline_hits.add(1);
                        self.deliver(frame, &decoded);
                    }
                    None => self.hand_over(frame),
                }
            }
            Begin::AtHand(decoded) => {
                self.install(waiter, &decoded);
                self.leave_rest(frame, waiter.extent, &decoded);
            }
            Begin::Attached | Begin::Unneeded => {}
        }
    }

    /// Answers a fault by a worker.
    pub(crate) fn serve_far(&self, frame: FrameToken, waiter: Waiter) {
        match self.frames.begin(frame, waiter, || self.table.any_wanted(waiter.wanted)) {
            Begin::Fetch => self.hand_over(frame),
            Begin::AtHand(decoded) => self.install(waiter, &decoded),
            Begin::Attached | Begin::Unneeded => {}
        }
    }

    fn hand_over(&self, frame: FrameToken) {
        self.counters.handed_over.add(1);
        self.queue.demand_frame(frame);
    }

    /// Prefetches `span`, at most 2 MiB, giving way to faults between frames.
    pub(crate) fn serve_prefetch(&self, span: Span) {
        let size = self.page_size(span);
        let mut at = 0;
        while at < span.cells() {
            let left = span.part(at, u64::MAX);
            if self.queue.demand_waiting() || self.is_stopping() {
                return self.queue.put_back(left, size);
            }
            let wanted = |s| matches!(s, PageState::Absent | PageState::Awaited);
            let Some(skip) = self.table.find(left, wanted) else { return };
            let left = left.part(skip, u64::MAX);
            at += skip;
            if size == PageSize::Huge {
                self.serve_huge(left.part(0, 1), None);
                at += 1;
                continue;
            }
            let Some(run) = self.plan.pages_of(left.first()) else { return };
            match self.located(run.first) {
                Ok(extent) => {
                    let here = left.part(0, extent.end() - run.first.0);
                    at += here.cells();
                    self.serve_extent(Waiter { wanted: here, extent, since: None, reach: Reach::Run });
                }
                Err(error) => {
                    self.fill_failed(run.first, &error);
                    return;
                }
            }
        }
    }

    /// Installs what `wanted` needs of `extent`, in which it lies.
    fn serve_extent(&self, waiter: Waiter) {
        match waiter.extent.content {
            Content::Zero => self.install_zeros(waiter),
            Content::Frame { frame, .. } => {
                match self.frames.begin(frame, waiter, || self.table.any_wanted(waiter.wanted)) {
                    Begin::Fetch => self.fetch_and_install(frame),
                    Begin::AtHand(decoded) => self.install(waiter, &decoded),
                    Begin::Attached | Begin::Unneeded => {}
                }
            }
        }
    }

    fn install_zeros(&self, waiter: Waiter) {
        let Waiter { wanted, extent, since, reach } = waiter;
        let mut span = wanted;
        if since.is_some()
            && reach == Reach::Run
            && let Some(run) = self.plan.pages_of(wanted.first())
        {
            // The block of that many pages around the fault, as far as the zeros go.
            let step = self.policy.zero_step_pages.max(1);
            let block = run.first.0 / step * step;
            let (first, end) = (extent.first.0.max(block), extent.end().min(block + step));
            span = self.plan.clip(wanted.region(), first, end).unwrap_or(wanted);
        }
        let done = match since {
            Some(_) => self.fill_for(wanted, span, Bytes::Zero),
            None => self.fill(span, Bytes::Zero),
        };
        self.filled(done, since);
        if since.is_some()
            && let Some(run) = self.plan.pages_of(wanted.first())
        {
            self.queue.leave(Rest::of_zeros(&extent, run.first));
        }
    }

    /// Serves all who wait for a frame, whose bytes have come.
    fn deliver(&self, frame: FrameToken, decoded: &DecodedFrame) {
        let (mut shown, mut fault) = (0, None);
        while let Some(waiters) = self.frames.waiters(frame) {
            for waiter in waiters {
                // A fault gets as much as it reaches of what the run shows of the frame; a prefetch what it asked for.
                shown += match (waiter.since, waiter.reach) {
                    (Some(_), Reach::Run) => waiter.extent.pages,
                    _ => waiter.wanted.cells(),
                };
                // Kept before the fetch ends, so that no other thread can start another in between.
                if shown < decoded.pages() {
                    self.frames.keep(frame, decoded);
                }
                self.install(waiter, decoded);
                fault = fault.or(waiter.since.map(|_| waiter));
            }
        }
        if let Some(waiter) = fault {
            self.leave_rest(frame, waiter.extent, decoded);
        }
    }

    /// Leaves the frame's other pages for when nobody waits. The image may show each of them in several places.
    fn leave_rest(&self, frame: FrameToken, run: Extent, decoded: &DecodedFrame) {
        self.queue.leave(Rest::of_frame(run, frame, decoded.clone()));
    }

    /// Fetches a frame, which this thread has begun, for all who wait for it.
    pub(crate) fn fetch_and_install(&self, frame: FrameToken) {
        match self.fetched(frame) {
            Ok(decoded) => self.deliver(frame, &decoded),
            Err(error) => {
                for waiter in self.frames.abandon(frame) {
                    self.withhold(&waiter, &error);
                }
            }
        }
    }

    /// Installs from a decoded frame: for a fault, as far as it reaches.
    fn install(&self, waiter: Waiter, decoded: &DecodedFrame) {
        let Waiter { wanted, extent, since, reach } = waiter;
        let span = match since {
            Some(_) if reach == Reach::Run => {
                self.plan.clip(wanted.region(), extent.first.0, extent.end()).unwrap_or(wanted)
            }
            _ => wanted,
        };
        let bytes = self.plan.pages_of(span.first()).and_then(|run| {
            let Content::Frame { slot, .. } = extent.content else { return None };
            decoded.slots(slot.get() as u64 + (run.first.0 - extent.first.0), span.cells())
        });
        match bytes {
            Some(bytes) => {
                let done = match since {
                    Some(_) => self.fill_for(wanted, span, Bytes::Of(&bytes)),
                    None => self.fill(span, Bytes::Of(&bytes)),
                };
                self.filled(done, since);
            }
            None => {
                let message = format!(
                    "its frame of {} pages holds fewer than its page map says, or is none; run `verify` on the snapshot",
                    decoded.pages()
                );
                self.withhold(&waiter, &SourceError::new(SourceErrorKind::Damaged, message));
            }
        }
    }

    /// Gathers a 2 MiB page from its frames and installs it whole.
    fn serve_huge(&self, cell: Span, since: Option<Instant>) {
        if !self.table.any_wanted(cell) || !self.huge_under_way.begin(cell.first()) {
            return;
        }
        let gathered = self.gather(cell);
        let mut left = false;
        if let Ok(bytes) = &gathered {
            let bytes = bytes.as_deref().map_or(Bytes::Zero, Bytes::Of);
            let done = match since {
                Some(_) => self.fill_for(cell, cell, bytes),
                None => self.fill(cell, bytes),
            };
            left = since.is_none() && done.is_err();
            self.filled(done, since);
        }
        // First out of the set, then look who waits: a fault that found it in the set was left to us.
        self.huge_under_way.end(cell.first());
        if left && self.awaited_page(cell).is_some() {
            self.queue.demand(cell, Instant::now());
        }
        if let Err(error) = gathered {
            if let Some(run) = self.plan.pages_of(cell.first()) {
                self.fill_failed(run.first, &error);
            }
            self.fail_cells(cell, &error);
        }
    }

    /// The bytes of a 2 MiB page; `None` if they are all zero.
    fn gather(&self, cell: Span) -> Result<Option<Box<[u8]>>, SourceError> {
        let Some(run) = self.plan.pages_of(cell.first()) else { return Ok(None) };
        let (mut bytes, end): (Option<Box<[u8]>>, u64) = (None, run.first.0 + run.pages);
        let mut page = run.first.0;
        while page < end {
            let extent = self.located(PageIndex(page))?;
            let pages = extent.end().min(end) - page;
            if let Content::Frame { frame, slot } = extent.content {
                let decoded = match self.frames.kept(frame) {
                    Some(decoded) => decoded,
                    None => self.fetched(frame)?,
                };
                if pages < decoded.pages() {
                    self.frames.keep(frame, &decoded);
                }
                let from = decoded.slots(slot.get() as u64 + (page - extent.first.0), pages);
                let at = (page - run.first.0) as usize * PAGE_BYTES;
                let into = bytes.get_or_insert_with(|| vec![0; run.pages as usize * PAGE_BYTES].into());
                match (from, into.get_mut(at..at + pages as usize * PAGE_BYTES)) {
                    (Some(from), Some(into)) => into.copy_from_slice(&from),
                    _ => {
                        return Err(SourceError::new(
                            SourceErrorKind::Damaged,
                            "a frame is shorter than its page map says",
                        ));
                    }
                }
            }
            page += pages;
        }
        Ok(bytes)
    }

    /// Books an install, or acts on its failure.
    pub(crate) fn filled(&self, done: Result<u64, RestoreError>, since: Option<Instant>) {
        match (done, since) {
            (Ok(_), Some(since)) => self.timeline.fault_took(since.elapsed()),
            (Ok(pages), None) => self.counters.prefetched_pages.add(pages),
            (Err(error), None) => self.background_failed(error),
            (Err(error), Some(_)) => self.fail_with(error),
        }
    }

    fn withhold(&self, waiter: &Waiter, error: &SourceError) {
        match (waiter.since, self.plan.pages_of(waiter.wanted.first())) {
            (None, Some(run)) => self.fill_failed(run.first, error),
            _ => self.fail_cells(waiter.wanted, error),
        }
    }

    pub(crate) fn fill_failed(&self, page: PageIndex, error: &SourceError) {
        if !self.is_stopping() {
            self.unfilled(Arc::new(RestoreError::Page { page, error: error.clone() }));
        }
    }

    /// Acts on an error of an install that no vCPU waits for. That pages were refused has been told to whoever waits for
    /// the fill; a vCPU that touches them has a try of its own.
    pub(crate) fn background_failed(&self, error: RestoreError) {
        match error {
            RestoreError::Install { .. } => tracing::debug!(%error, "not filled"),
            error => self.fail_with(error),
        }
    }

    /// The run that holds `page`, with retries.
    fn located(&self, page: PageIndex) -> Result<Extent, SourceError> {
        let source = self.plan.source();
        self.retrying(|| {
            let extent = source.try_locate(page).map_or_else(|| source.locate(page), Ok)?;
            if extent.contains(page) {
                return Ok(extent);
            }
            let message = format!("the page map answered for pages {}.. instead", extent.first.0);
            Err(SourceError::new(SourceErrorKind::Damaged, message))
        })
    }

    /// The frame, with retries.
    fn fetched(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        self.retrying(|| {
            self.counters.fetches.add(1);
            self.plan.source().fetch(frame)
        })
    }

    fn retrying<T>(&self, get: impl Fn() -> Result<T, SourceError>) -> Result<T, SourceError> {
        let (mut retries, mut damaged) = (0, false);
        loop {
            let got = catch_unwind(AssertUnwindSafe(&get)).unwrap_or_else(|_| {
                Err(SourceError::new(
                    SourceErrorKind::Damaged,
                    "the page source panicked; this is a bug in it",
                ))
            });
            let error = match got {
                Ok(got) => {
                    self.refusals.over();
                    return Ok(got);
                }
                Err(error) => error,
            };
            match error.kind {
                SourceErrorKind::Retryable | SourceErrorKind::Denied => {
                    if error.kind == SourceErrorKind::Denied {
                        self.refusals.tell(&error);
                    } else if retries >= self.policy.retry.limit {
                        return Err(error);
                    }
                    tracing::debug!(%error, retries, "retrying");
                    let stopped = self.queue.pause(self.policy.retry.wait(retries));
                    // Who is refused has a pause after the last try, too: whoever waits for the page asks again.
                    if stopped || retries >= self.policy.retry.limit {
                        return Err(error);
                    }
                    retries += 1;
                }
                SourceErrorKind::Damaged if !damaged => damaged = true,
                _ => return Err(error),
            }
            self.counters.retries.add(1);
        }
    }

    fn awaited_page(&self, cell: Span) -> Option<PageIndex> {
        let waits = self.table.get(cell.first()) == PageState::Awaited;
        waits.then(|| self.plan.pages_of(cell.first())).flatten().map(|run| run.first)
    }

    pub(crate) fn page_size(&self, span: Span) -> PageSize {
        self.plan.region(span.region()).map_or(PageSize::Small, |r| r.spec.page_size)
    }
}
