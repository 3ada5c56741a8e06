//! What faults leave to be installed once nobody waits: the other pages of a frame that was decoded for one of them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use dormouse_core::page::PageIndex;

use crate::core::Core;
use crate::error::RestoreError;
use crate::fill::Bytes;
use crate::plan::{PageRun, PageSize, Span};
use crate::source::{Content, DecodedFrame, Extent, FrameToken};
use crate::state::PageState;

/// Pages installed between two looks whether something more urgent has come: about 10 us.
const STEP_PAGES: u64 = 16;

/// The same for zeros, of which eight cost what a page of bytes does.
const ZERO_STEP_PAGES: u64 = 64;

/// Pages of a run of zeros that are installed around a fault: 2 MiB.
const ZEROS_AROUND_PAGES: u64 = PageSize::Huge.pages();

/// Pages that no vCPU waits for, but whose bytes are at hand.
#[derive(Debug)]
pub(crate) struct Rest {
    /// The run of the fault, then, for a frame, all others.
    runs: VecDeque<Extent>,
    frame: Option<(FrameToken, DecodedFrame)>,
    /// Whether the frame's other runs have been looked up.
    complete: bool,
}

impl Rest {
    /// All that the image shows of a decoded frame, beginning with `run`.
    pub(crate) fn of_frame(run: Extent, frame: FrameToken, decoded: DecodedFrame) -> Self {
        Rest { runs: [run].into(), frame: Some((frame, decoded)), complete: false }
    }

    /// The run of zeros around `page`.
    pub(crate) fn of_zeros(extent: &Extent, page: PageIndex) -> Self {
        let block = page.0 / ZEROS_AROUND_PAGES * ZEROS_AROUND_PAGES;
        let first = extent.first.0.max(block);
        let end = extent.end().min(block + ZEROS_AROUND_PAGES);
        Rest { runs: [Extent::zero(PageIndex(first), end - first)].into(), frame: None, complete: true }
    }

    /// Whether both are about the same frame, or the same zeros.
    pub(crate) fn is_same(&self, other: &Rest) -> bool {
        match (&self.frame, &other.frame) {
            (Some((a, _)), Some((b, _))) => a == b,
            (None, None) => self.runs == other.runs,
            _ => false,
        }
    }
}

impl Core {
    /// Installs of `rest` what is absent, until `enough` says that something more urgent has come; whether all is done.
    ///
    /// What cannot be installed is left to the faults, which will say why.
    pub(crate) fn install_rest(
        &self,
        rest: &mut Rest,
        mut enough: impl FnMut() -> bool,
    ) -> Result<bool, RestoreError> {
        loop {
            let Some(extent) = rest.runs.pop_front() else {
                match self.others(rest) {
                    true => continue,
                    false => return Ok(true),
                }
            };
            let run = PageRun { first: extent.first, pages: extent.pages };
            for span in self.spans(run) {
                if self.page_size(span) == PageSize::Huge {
                    continue;
                }
                let mut at = 0;
                while let Some(absent) = self.table.find(span.part(at, u64::MAX), |s| s == PageState::Absent)
                {
                    at += absent;
                    if enough() {
                        // The spans of other regions that were done already cost a look each the next time.
                        rest.runs.push_front(extent);
                        return Ok(false);
                    }
                    at += self.install_step(
                        span.part(at, u64::MAX),
                        &extent,
                        rest.frame.as_ref().map(|f| &f.1),
                    )?;
                }
            }
        }
    }

    /// Looks up the other runs that show a frame; false if that was done.
    fn others(&self, rest: &mut Rest) -> bool {
        let Some((frame, _)) = rest.frame.as_ref().filter(|_| !rest.complete) else { return false };
        rest.complete = true;
        let source = self.plan.source();
        let runs = catch_unwind(AssertUnwindSafe(|| source.runs_of(*frame))).ok().flatten();
        rest.runs = runs.unwrap_or_default().into();
        true
    }

    /// Installs `rest`, and leaves what is left of it when `enough` says that something more urgent has come.
    pub(crate) fn work_off(&self, mut rest: Rest, enough: impl FnMut() -> bool) {
        match self.install_rest(&mut rest, enough) {
            Ok(true) => {}
            Ok(false) => self.queue.leave(rest),
            Err(error) => self.background_failed(error),
        }
    }

    /// Installs the first pages of `span`, which lies in `extent`; how many were looked at.
    fn install_step(
        &self,
        span: Span,
        extent: &Extent,
        decoded: Option<&DecodedFrame>,
    ) -> Result<u64, RestoreError> {
        let (step, bytes) = match (extent.content, decoded, self.plan.pages_of(span.first())) {
            (Content::Zero, None, _) => {
                let step = span.part(0, ZERO_STEP_PAGES);
                self.fill(step, Bytes::Zero)?;
                return Ok(step.cells());
            }
            (Content::Frame { slot, .. }, Some(decoded), Some(run)) => {
                let step = span.part(0, STEP_PAGES);
                let slot = slot.get() as u64 + (run.first.0 - extent.first.0);
                (step, decoded.slots(slot, step.cells()))
            }
            _ => (span, None),
        };
        // A frame that is shorter than its page map says is for a fault to report.
        let Some(bytes) = bytes else { return Ok(span.cells()) };
        self.fill(step, Bytes::Of(&bytes))?;
        Ok(step.cells())
    }
}
