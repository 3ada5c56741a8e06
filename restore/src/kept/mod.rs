//! Page states that outlive the process: in a file in memory that somebody else holds open as well.
//!
//! A process that serves a VM may be killed at any instant. Whoever then has the VM's userfaultfd and this file can
//! go on: [`Restore::adopt`](crate::Restore::adopt).
//!
//! Why no removal is lost on the way: the kernel lets a thread that gives memory back go on once its event was *read*.
//! The events are therefore read straight into this file. A system call that has begun runs to its end even in a
//! process that is being killed, so an event is either still the kernel's or in the file; and acting on it twice
//! changes nothing.

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

pub mod layout;

use self::layout::{EVENTS, EVENTS_AT, EVENTS_BYTES, HEADER_BYTES, Header, LayoutError, STATES_AT};
use crate::plan::{Cell, Plan};
use crate::state::PageState;
use crate::sys::memory::Memory;
use crate::sys::shared_file::{SharedFile, SharedFileError};
use crate::sys::uffd::EventBuffer;
use crate::working_set::WORKING_SET_PAGES_MAX;

/// The states of all pages of one restore, in a file that outlives this process if somebody keeps it.
///
/// One process at a time uses it, which the kernel sees to: while it is used, nobody else gets hold of the VM.
#[derive(Clone, Debug)]
pub struct KeptStates {
    file: Arc<SharedFile>,
    cells: u64,
    left: Arc<Left>,
}

/// What was found in them.
#[derive(Debug, Default)]
struct Left {
    settled: u64,
    /// Cells that were installed, ascending; none if they are too many to be of interest.
    installed: Vec<Range<u64>>,
}

/// Why kept states cannot be made or taken up.
#[derive(Debug, thiserror::Error)]
pub enum KeptStatesError {
    /// The file is not theirs.
    #[error("the file of kept page states cannot be taken up: {0}")]
    Layout(#[from] LayoutError),
    /// The file cannot be used.
    #[error("the file of kept page states cannot be used: {0}")]
    File(#[from] SharedFileError),
    /// The plan has more pages than such a file may have.
    #[error("{0} pages are more than can be kept")]
    TooMany(u64),
}

impl KeptStates {
    /// New ones, all absent, for `plan` on `memory`. `image` says whose pages they are, such as a snapshot's id: who
    /// takes them up must name the same.
    pub fn create(plan: &Plan, memory: &Memory, image: [u8; 32]) -> Result<Self, KeptStatesError> {
        let header = Header::of(plan, memory, image);
        let bytes = header.file_bytes().ok_or(KeptStatesError::TooMany(header.cells))?;
        let file = SharedFile::create("dormouse-page-states", bytes)?;
        let written = file.write(0, &header.encode());
        debug_assert!(written);
        Ok(Self::in_memory(file, header.cells, Left::default()))
    }

    /// Takes up those that a process which is gone, or about to be, has left in `file`. Waits up to `patience` for its
    /// last threads to be gone.
    pub fn open(
        file: OwnedFd,
        plan: &Plan,
        memory: &Memory,
        image: [u8; 32],
        patience: Duration,
    ) -> Result<Self, KeptStatesError> {
        let file = SharedFile::open(file, patience)?;
        let mut header = [0; HEADER_BYTES];
        if !file.read(0, &mut header) {
            return Err(LayoutError::NotStates.into());
        }
        let header = Header::decode(&header, file.bytes())?;
        header.check(&Header::of(plan, memory, image))?;
        let left = recover(&file, header.cells)?;
        Ok(Self::in_memory(file, header.cells, left))
    }

    fn in_memory(file: SharedFile, cells: u64, left: Left) -> Self {
        // The kernel must be able to write there at any time, also on behalf of a process that is being killed.
        if let Err(error) = file.keep_in_memory(EVENTS_AT, EVENTS_BYTES as u64) {
            tracing::debug!(%error, "the page for events cannot be locked in memory");
        }
        KeptStates { file: Arc::new(file), cells, left: Arc::new(left) }
    }

    /// For whoever keeps them beyond this process.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The image pages that were installed when this was opened; none if they are more than a working set.
    pub fn installed(&self, plan: &Plan) -> Vec<Range<u64>> {
        let cells = self.left.installed.iter().cloned().flatten();
        cells
            .filter_map(|cell| plan.pages_of(Cell(cell)))
            .map(|run| run.first.0..run.first.0 + run.pages)
            .collect()
    }

    /// Pages.
    pub(crate) fn cells(&self) -> u64 {
        self.cells
    }

    /// Pages that needed nothing any more when this was opened.
    pub(crate) fn settled(&self) -> u64 {
        self.left.settled
    }

    pub(crate) fn cell(&self, cell: u64) -> Option<&AtomicU8> {
        if cell >= self.cells {
            return None;
        }
        self.file.byte(STATES_AT + cell)
    }

    /// A buffer whose content is kept as well.
    pub(crate) fn event_buffer(&self) -> EventBuffer {
        EventBuffer::kept(self.file.clone(), EVENTS_AT, EVENTS)
    }

    /// The address ranges given back, in events left behind.
    pub(crate) fn removed(&self) -> Vec<(u64, u64)> {
        let mut events = [0; EVENTS_BYTES];
        self.file.read(EVENTS_AT, &mut events);
        layout::removed(&events).collect()
    }
}

/// Brings all states to where they can be gone on from.
fn recover(file: &SharedFile, cells: u64) -> Result<Left, KeptStatesError> {
    let (mut left_behind, mut installed) = (Left::default(), 0);
    for range in file.written(STATES_AT)? {
        for at in range.start..range.end.min(STATES_AT + cells) {
            let Some(byte) = file.byte(at) else { break };
            let left = byte.load(Ordering::Acquire);
            let state = layout::recovered(at - STATES_AT, left)?;
            if state as u8 != left {
                byte.store(state as u8, Ordering::Release);
            }
            left_behind.settled += u64::from(state.is_settled());
            if state != PageState::Installed {
                continue;
            }
            installed += 1;
            let cell = at - STATES_AT;
            match left_behind.installed.last_mut() {
                Some(run) if run.end == cell => run.end = cell + 1,
                _ if installed <= WORKING_SET_PAGES_MAX => left_behind.installed.push(cell..cell + 1),
                _ => {}
            }
        }
    }
    if installed > WORKING_SET_PAGES_MAX {
        left_behind.installed.clear();
    }
    Ok(left_behind)
}

#[cfg(test)]
mod tests;
