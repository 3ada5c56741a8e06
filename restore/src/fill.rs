//! Installs runs of pages: claims what is absent, and acts on each of the kernel's answers.

use std::sync::Arc;
use std::time::Duration;

use dormouse_core::page::PageIndex;

use crate::core::{Core, lock};
use crate::error::RestoreError;
use crate::outcome::Outcome;
use crate::plan::Span;
use crate::state::{Action, PageEvent, PageState};
use crate::sys::staging::Staging;

/// Retries of an install for lack of host memory before it counts as refused: about 20 s.
const NO_MEMORY_RETRIES: u32 = 200;

/// What to install.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bytes<'a> {
    /// Zeros.
    Zero,
    /// These bytes, as long as the span.
    Of(&'a [u8]),
}

impl<'a> Bytes<'a> {
    /// The part for `cells` cells from the `skip`-th on.
    fn part(self, skip: u64, cells: u64, cell_bytes: u64) -> Option<Bytes<'a>> {
        match self {
            Bytes::Zero => Some(Bytes::Zero),
            Bytes::Of(all) => {
                let from = usize::try_from(skip * cell_bytes).ok()?;
                let to = usize::try_from((skip + cells) * cell_bytes).ok()?;
                all.get(from..to).map(Bytes::Of)
            }
        }
    }
}

impl Core {
    /// Installs `bytes` on those cells of `span` that are absent; how many were. Cells that others install
    /// at the same time, or that were installed or removed before, are left alone.
    pub(crate) fn fill(&self, span: Span, bytes: Bytes<'_>) -> Result<u64, RestoreError> {
        self.fill_or(span, bytes, PageEvent::Released)
    }

    /// [`fill`](Self::fill) for a vCPU that waits for `cell` of `span`. That a neighbour is refused is none of its
    /// business; if `cell` is, alone, the caller has to say so, and the vCPU waits on.
    pub(crate) fn fill_for(&self, cell: Span, span: Span, bytes: Bytes<'_>) -> Result<u64, RestoreError> {
        let refused =
            |e: &RestoreError| matches!(e, RestoreError::Install { .. } | RestoreError::RegionGone { .. });
        if span.cells() > 1 {
            match self.fill(span, bytes) {
                Err(error) if refused(&error) => {
                    tracing::debug!(%error, "only the page waited for is tried again")
                }
                done => return done,
            }
        }
        match bytes.part(cell.first().0 - span.first().0, 1, self.cell_bytes(cell)) {
            Some(bytes) => self.fill_or(cell, bytes, PageEvent::Withheld),
            None => Err(self.refused(cell, libc::EINVAL)),
        }
    }

    /// [`fill`](Self::fill), with what becomes of cells that are refused.
    fn fill_or(&self, span: Span, bytes: Bytes<'_>, or: PageEvent) -> Result<u64, RestoreError> {
        let cell_bytes = self.cell_bytes(span);
        let step = (self.step_pages() * 4096 / cell_bytes).max(1);
        let (mut at, mut installed) = (0, 0);
        while at < span.cells() {
            let (skipped, claimed) = self.table.claim(span.part(at, step));
            if claimed == 0 {
                at += step;
                continue;
            }
            at += skipped;
            match bytes.part(at, claimed, cell_bytes) {
                Some(bytes) => {
                    installed += self.fill_claimed(span.part(at, claimed), bytes, cell_bytes, or)?
                }
                None => {
                    let error = self.refused(span.part(at, claimed), libc::EINVAL);
                    self.release(span.part(at, claimed), or, &error);
                    return Err(error);
                }
            }
            at += claimed;
        }
        self.timeline.mark("first page installed");
        Ok(installed)
    }

    /// Installs the 2 MiB of small pages in `block` as one if nothing is there yet; otherwise as [`fill`](Self::fill).
    pub(crate) fn fill_block(&self, span: Span, block: &mut Staging) -> Result<u64, RestoreError> {
        // Where a page came before, the kernel would have to take the block apart.
        let untouched = self.table.find(span, |s| s != PageState::Absent).is_none();
        if !untouched || !self.installer.moves() {
            return self.fill(span, Bytes::Of(block.bytes()));
        }
        let (skipped, claimed) = self.table.claim(span);
        let mut moved = 0;
        if claimed == span.cells() {
            let _inside = self.gate.enter();
            // A cell removed since it was claimed stays out.
            if self.table.find(span, |s| s != PageState::Copying).is_none() {
                moved = match self.installer.move_block(span, block) {
                    Outcome::Done => claimed,
                    Outcome::Partial(pages) => pages.min(claimed),
                    Outcome::Again => {
                        // An event has to be read first; it is copied, then, as far as it is still wanted.
                        self.counters.again.add(1);
                        0
                    }
                    _ => 0,
                };
                self.table.apply_all(span.part(0, moved), PageEvent::Copied, Action::None);
                self.counters.moved_pages.add(moved);
                self.counters.pages_copied.add(moved);
            }
        }
        // What the kernel would not move, or what somebody else was faster with a part of.
        let mut installed = moved;
        let cell_bytes = self.cell_bytes(span);
        let claimed = span.part(skipped + moved, claimed - moved);
        if let Some(bytes) = Bytes::Of(block.bytes()).part(skipped + moved, claimed.cells(), cell_bytes) {
            installed += self.fill_claimed(claimed, bytes, cell_bytes, PageEvent::Released)?;
        }
        if moved < span.cells() {
            let left = span.part(moved, u64::MAX);
            if let Some(bytes) = Bytes::Of(block.bytes()).part(moved, left.cells(), cell_bytes) {
                installed += self.fill(left, bytes)?;
            }
        }
        self.timeline.mark("first page installed");
        Ok(installed)
    }

    /// Installs on cells this thread has claimed.
    fn fill_claimed(
        &self,
        span: Span,
        bytes: Bytes<'_>,
        cell_bytes: u64,
        or: PageEvent,
    ) -> Result<u64, RestoreError> {
        let (mut at, mut installed, mut tries, mut most) = (0, 0, 0u32, span.cells());
        while at < span.cells() {
            let inside = self.gate.enter();
            // Cells removed since they were claimed stay out.
            let left = span.part(at, u64::MAX);
            let Some(skip) = self.table.find(left, |s| s == PageState::Copying) else { break };
            let left = left.part(skip, u64::MAX);
            let run = self.table.find(left, |s| s != PageState::Copying).unwrap_or(left.cells()).min(most);
            let now = left.part(0, run);
            at += skip;
            let outcome = match bytes.part(at, run, cell_bytes) {
                None => Outcome::Refused(libc::EINVAL),
                Some(Bytes::Zero) => self.installer.zero(now),
                Some(Bytes::Of(bytes)) => self.installer.copy(now, bytes),
            };
            let done = match outcome {
                Outcome::Done => run,
                Outcome::Partial(n) => n.min(run),
                _ => 0,
            };
            if done > 0 {
                self.table.apply_all(now.part(0, done), PageEvent::Copied, Action::None);
                self.counted(bytes, done);
                (at, installed, tries) = (at + done, installed + done, 0);
            }
            drop(inside);
            match outcome {
                Outcome::Done => most = most.saturating_mul(2),
                Outcome::Partial(_) => self.counters.partial.add(1),
                Outcome::AlreadyThere => {
                    self.counters.exists.add(1);
                    self.table.apply(now.first(), PageEvent::AlreadyThere);
                    self.installer.wake(now.part(0, 1));
                    at += 1;
                }
                // Only a single cell without a mapping is gone: more of them may lie in several mappings, since a VMM that
                // changes a part of guest memory, such as its protection, splits it for the kernel.
                Outcome::RegionGone if run > 1 => most = run / 2,
                other => {
                    // A fill that was told to have failed need not wait for memory page by page.
                    let hopeless = or == PageEvent::Released && self.is_short_of_memory();
                    tries =
                        if hopeless && other == Outcome::NoMemory { NO_MEMORY_RETRIES } else { tries + 1 };
                    if let Err(error) = self.again(other, now, tries) {
                        self.release(span.part(at, u64::MAX), or, &error);
                        return Err(error);
                    }
                }
            }
        }
        Ok(installed)
    }

    fn counted(&self, bytes: Bytes<'_>, cells: u64) {
        match bytes {
            Bytes::Zero => self.counters.zero_pages.add(cells),
            Bytes::Of(_) => self.counters.pages_copied.add(cells),
        }
    }

    /// Installs zeros for a page that the guest gave back and now touches again, and for removed pages behind
    /// it. Needs no claim: whoever is first, it is zeros.
    pub(crate) fn fill_removed(&self, cell: Span) -> Result<(), RestoreError> {
        let behind = self.plan.from(cell, self.policy.zero_step_pages / (self.cell_bytes(cell) / 4096));
        let run = self.table.find(behind, |s| s != PageState::Removed).unwrap_or(behind.cells());
        let (mut at, mut tries, mut most) = (0, 0, run);
        while at < run {
            let left = behind.part(at, (run - at).min(most));
            match self.installer.zero(left) {
                Outcome::Done => {
                    self.counters.zero_pages.add(left.cells());
                    at += left.cells();
                    most = most.saturating_mul(2);
                }
                Outcome::Partial(n) => {
                    self.counters.zero_pages.add(n);
                    at += n.max(1);
                }
                Outcome::AlreadyThere => {
                    self.counters.exists.add(1);
                    self.installer.wake(left.part(0, 1));
                    at += 1;
                }
                // As in `fill_claimed`.
                Outcome::RegionGone if left.cells() > 1 => most = left.cells() / 2,
                other => {
                    tries += 1;
                    self.again(other, left, tries)?;
                }
            }
        }
        Ok(())
    }

    /// Prepares for another try after `outcome`, or says why there cannot be one. Not inside the gate.
    pub(crate) fn again(&self, outcome: Outcome, at: Span, tries: u32) -> Result<(), RestoreError> {
        match outcome {
            Outcome::Again => {
                self.counters.again.add(1);
                // The event is drained by whoever comes first; the kernel then lets installs pass once the
                // thread that removed has been scheduled.
                if self.pump()? > 0 {
                    self.ring();
                }
                match tries {
                    0..64 => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(50)),
                }
                if self.is_stopping() { Err(RestoreError::Stopped) } else { Ok(()) }
            }
            Outcome::NoMemory if tries < NO_MEMORY_RETRIES => {
                if self.queue.pause(Duration::from_millis(100)) { Err(RestoreError::Stopped) } else { Ok(()) }
            }
            Outcome::VmGone => Err(RestoreError::VmGone),
            // Whoever waited for this page, which can only be one that was given back, the kernel has answered with zeros.
            Outcome::RegionGone if self.is_let_go(at.region()) => Err(RestoreError::Stopped),
            Outcome::RegionGone => Err(RestoreError::RegionGone { region: at.region() }),
            Outcome::NoMemory => Err(self.refused(at, libc::ENOMEM)),
            Outcome::Unsupported(e) | Outcome::Refused(e) => Err(self.refused(at, e)),
            Outcome::Done | Outcome::Partial(_) | Outcome::AlreadyThere => Ok(()),
        }
    }

    fn refused(&self, at: Span, errno: i32) -> RestoreError {
        let page = self.plan.pages_of(at.first()).map_or(PageIndex(u64::MAX), |run| run.first);
        RestoreError::Install { page, error: std::io::Error::from_raw_os_error(errno) }
    }

    /// Whether a fill was told before that pages were refused.
    fn is_short_of_memory(&self) -> bool {
        let refused = |e: &Arc<RestoreError>| matches!(**e, RestoreError::Install { .. });
        lock(&self.fill_failure).as_ref().is_some_and(refused)
    }

    /// Gives claims back, as released or withheld. Of released cells, whoever came to wait meanwhile is woken, so as to
    /// fault again; but for those withheld before, and only those. A fill may have passed over all of them, so that
    /// whoever waits for it is told.
    fn release(&self, span: Span, how: PageEvent, error: &RestoreError) {
        match error {
            RestoreError::Install { page, error } => {
                let error = std::io::Error::from_raw_os_error(error.raw_os_error().unwrap_or_default());
                self.unfilled(Arc::new(RestoreError::Install { page: *page, error }));
            }
            RestoreError::RegionGone { region } => {
                self.unfilled(Arc::new(RestoreError::RegionGone { region: *region }));
            }
            _ => {}
        }
        let mut to_wake = Vec::new();
        let mut withheld = lock(&self.withheld);
        for offset in 0..span.cells() {
            let cell = span.part(offset, 1).first();
            if how == PageEvent::Withheld {
                withheld.insert(cell);
            }
            let how = if withheld.contains(&cell) { PageEvent::Withheld } else { how };
            if self.table.apply(cell, how) == Action::Wake {
                to_wake.push(offset);
            }
        }
        drop(withheld);
        for run in to_wake.chunk_by(|a, b| a + 1 == *b) {
            self.installer.wake(span.part(run[0], run.len() as u64));
        }
    }

    /// Bytes in one cell of `span`'s region.
    pub(crate) fn cell_bytes(&self, span: Span) -> u64 {
        self.plan.region(span.region()).map_or(4096, |r| r.spec.page_size.bytes())
    }
}
