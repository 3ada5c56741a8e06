//! The state of every page of a restore, shared by all its threads without locks.

use std::sync::OnceLock;

use crate::kept::KeptStates;
use crate::plan::{Cell, Span};
use crate::state::{Action, PageEvent, PageState, step};

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Cells in one lazily made leaf: 64 MiB of 4 KiB pages.
const LEAF_CELLS: u64 = if cfg!(miri) { 64 } else { 16 * 1024 };

/// A byte that holds a page's state: the real one, or a model's.
trait StateByte {
    fn load(&self) -> u8;
    fn exchange(&self, seen: u8, new: u8) -> Result<u8, u8>;
}

impl StateByte for AtomicU8 {
    fn load(&self) -> u8 {
        self.load(Ordering::Acquire)
    }
    fn exchange(&self, seen: u8, new: u8) -> Result<u8, u8> {
        self.compare_exchange_weak(seen, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

/// Applies `event` to the page whose state is `byte`, the only place where [`step`] meets memory: the state it met,
/// the state it left and what the caller has to do.
fn apply(byte: &impl StateByte, event: PageEvent) -> (PageState, PageState, Action) {
    let mut seen = byte.load();
    loop {
        let state = PageState::from_u8(seen);
        let (next, action) = step(state, event);
        if next == state {
            return (state, next, action);
        }
        match byte.exchange(seen, next as u8) {
            Ok(_) => return (state, next, action),
            Err(now) => seen = now,
        }
    }
}

/// Where states are.
#[derive(Debug)]
enum States {
    /// In this process, in leaves made when first written.
    Own(Box<[OnceLock<Box<[AtomicU8]>>]>),
    /// In a file that outlives it.
    Kept(KeptStates),
}

/// The states of all cells of a plan.
///
/// A large, mostly untouched machine costs nothing up front, wherever they are.
#[derive(Debug)]
pub struct PageTable {
    states: States,
    cells: u64,
    settled: AtomicU64,
}

impl PageTable {
    /// A table of `cells` absent pages.
    pub fn new(cells: u64) -> Self {
        let leaves = (0..cells.div_ceil(LEAF_CELLS)).map(|_| OnceLock::new()).collect();
        PageTable { states: States::Own(leaves), cells, settled: AtomicU64::new(0) }
    }

    /// A table in a file that outlives this process, with the states it holds.
    pub fn kept(states: KeptStates) -> Self {
        let (cells, settled) = (states.cells(), AtomicU64::new(states.settled()));
        PageTable { states: States::Kept(states), cells, settled }
    }

    fn cell(&self, cell: Cell) -> Option<&AtomicU8> {
        if cell.0 >= self.cells {
            return None;
        }
        match &self.states {
            States::Own(leaves) => {
                let leaf = leaves.get((cell.0 / LEAF_CELLS) as usize)?;
                let absent = || (0..LEAF_CELLS).map(|_| AtomicU8::new(PageState::Absent as u8)).collect();
                leaf.get_or_init(absent).get((cell.0 % LEAF_CELLS) as usize)
            }
            States::Kept(states) => states.cell(cell.0),
        }
    }

    /// The state of `cell`; outside the table, [`PageState::Poisoned`].
    pub fn get(&self, cell: Cell) -> PageState {
        let untouched = |leaves: &[OnceLock<_>]| {
            leaves.get((cell.0 / LEAF_CELLS) as usize).is_some_and(|leaf| leaf.get().is_none())
        };
        match &self.states {
            States::Own(leaves) if cell.0 < self.cells && untouched(leaves) => PageState::Absent,
            _ => self
                .cell(cell)
                .map_or(PageState::Poisoned, |byte| PageState::from_u8(byte.load(Ordering::Acquire))),
        }
    }

    /// Applies `event` to `cell`. Outside the table nothing happens.
    pub fn apply(&self, cell: Cell, event: PageEvent) -> Action {
        let Some(byte) = self.cell(cell) else { return Action::None };
        let (before, after, action) = apply(byte, event);
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
