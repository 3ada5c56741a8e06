//! The state of every page of a restore, shared by all its threads without locks.

use std::sync::OnceLock;

use crate::plan::{Cell, Span};
use crate::state::{Action, PageEvent, PageState, step};

#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Cells in one lazily made leaf: 64 MiB of 4 KiB pages.
const LEAF_CELLS: u64 = 16 * 1024;

/// The state of one page; the only place where [`step`] meets memory.
#[derive(Debug)]
pub struct StateCell(AtomicU8);

impl StateCell {
    /// A page nobody asked for.
    pub fn new() -> Self {
        StateCell(AtomicU8::new(PageState::Absent as u8))
    }

    /// The state now.
    pub fn get(&self) -> PageState {
        PageState::from_u8(self.0.load(Ordering::Acquire))
    }

    /// Applies `event`: the state it met, the state it left and what the caller has to do.
    pub fn apply(&self, event: PageEvent) -> (PageState, PageState, Action) {
        let mut byte = self.0.load(Ordering::Acquire);
        loop {
            let state = PageState::from_u8(byte);
            let (next, action) = step(state, event);
            if next == state {
                return (state, next, action);
            }
            match self.0.compare_exchange_weak(byte, next as u8, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (state, next, action),
                Err(seen) => byte = seen,
            }
        }
    }
}

impl Default for StateCell {
    fn default() -> Self {
        Self::new()
    }
}

/// The states of all cells of a plan.
///
/// Leaves are made when first written, so that a large, mostly untouched machine costs nothing up front.
#[derive(Debug)]
pub struct PageTable {
    leaves: Box<[OnceLock<Box<[StateCell]>>]>,
    cells: u64,
    settled: AtomicU64,
}

impl PageTable {
    /// A table of `cells` absent pages.
    pub fn new(cells: u64) -> Self {
        let leaves = (0..cells.div_ceil(LEAF_CELLS)).map(|_| OnceLock::new()).collect();
        PageTable { leaves, cells, settled: AtomicU64::new(0) }
    }

    fn cell(&self, cell: Cell) -> Option<&StateCell> {
        if cell.0 >= self.cells {
            return None;
        }
        let leaf = self.leaves.get((cell.0 / LEAF_CELLS) as usize)?;
        let leaf = leaf.get_or_init(|| (0..LEAF_CELLS).map(|_| StateCell::new()).collect());
        leaf.get((cell.0 % LEAF_CELLS) as usize)
    }

    /// The state of `cell`; outside the table, [`PageState::Poisoned`].
    pub fn get(&self, cell: Cell) -> PageState {
        if cell.0 >= self.cells {
            return PageState::Poisoned;
        }
        match self.leaves.get((cell.0 / LEAF_CELLS) as usize).and_then(OnceLock::get) {
            None => PageState::Absent,
            Some(leaf) => {
                leaf.get((cell.0 % LEAF_CELLS) as usize).map_or(PageState::Poisoned, StateCell::get)
            }
        }
    }

    /// Applies `event` to `cell`. Outside the table nothing happens.
    pub fn apply(&self, cell: Cell, event: PageEvent) -> Action {
        let Some(state) = self.cell(cell) else { return Action::None };
        let (before, after, action) = state.apply(event);
        if !before.is_settled() && after.is_settled() {
            self.settled.fetch_add(1, Ordering::AcqRel);
        }
        action
    }

    /// Applies `event` to each cell of `span`; whether any of them answered `wanted`.
    pub fn apply_all(&self, span: Span, event: PageEvent, wanted: Action) -> bool {
        let first = span.first().0;
        (first..first + span.cells()).fold(false, |any, c| (self.apply(Cell(c), event) == wanted) | any)
    }

    /// Claims the first run of claimable cells in `span`: how many cells come before it, and its length.
    ///
    /// Length zero means that nothing in `span` was claimable.
    pub fn claim(&self, span: Span) -> (u64, u64) {
        let first = span.first().0;
        let (mut skipped, mut claimed) = (0, 0);
        for cell in first..first + span.cells() {
            match (self.apply(Cell(cell), PageEvent::Claim), claimed) {
                (Action::Install, _) => claimed += 1,
                (_, 0) => skipped += 1,
                _ => break,
            }
        }
        (skipped, claimed)
    }

    /// Whether any cell of `span` still needs its bytes and nobody is installing it.
    pub fn any_wanted(&self, span: Span) -> bool {
        self.find(span, |s| matches!(s, PageState::Absent | PageState::Awaited)).is_some()
    }

    /// The first cell of `span` whose state is as asked, counted from the span's start.
    pub fn find(&self, span: Span, is: impl Fn(PageState) -> bool) -> Option<u64> {
        let first = span.first().0;
        (0..span.cells()).find(|c| is(self.get(Cell(first + c))))
    }

    /// Cells that need nothing from the image any more.
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Acquire)
    }

    /// Whether every cell is settled.
    pub fn all_settled(&self) -> bool {
        self.settled() >= self.cells
    }
}

#[cfg(test)]
mod tests;
