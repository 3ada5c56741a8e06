//! Frames being fetched: one fetch per frame, however many wait for it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;
use std::time::Instant;

use crate::core::lock;
use crate::plan::{Cell, Span};
use crate::source::{DecodedFrame, Extent, FrameToken};

/// Someone who wants pages of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    /// The cells wanted.
    pub(crate) wanted: Span,
    /// The run of the image they lie in.
    pub(crate) extent: Extent,
    /// When the fault was read; `None` for prefetch.
    pub(crate) since: Option<Instant>,
    /// How much of the run a fault is given before anything else is done.
    pub(crate) reach: Reach,
}

/// How much is installed at once for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The page that is waited for; all else once nobody waits.
    Page,
    /// The absent pages of its run too: the guest is on its way to them, or comes from far away anyhow.
    Run,
}

/// What to do for a [`Waiter`].
#[derive(Debug)]
pub(crate) enum Begin {
    /// Fetch the frame; this thread is the only one to.
    Fetch,
    /// Nothing: the thread that fetches it will serve this waiter too.
    Attached,
    /// Install from these bytes.
    AtHand(DecodedFrame),
    /// Nothing: the pages came meanwhile.
    Unneeded,
}

/// Frames being fetched and those just fetched.
#[derive(Debug)]
pub(crate) struct Frames {
    inner: Mutex<Inner>,
    keep: usize,
}

#[derive(Debug, Default)]
struct Inner {
    fetching: HashMap<FrameToken, Vec<Waiter>>,
    recent: VecDeque<(FrameToken, DecodedFrame)>,
}

impl Inner {
    fn recent(&self, frame: FrameToken) -> Option<DecodedFrame> {
        self.recent.iter().rev().find(|(f, _)| *f == frame).map(|(_, d)| d.clone())
    }
}

impl Frames {
    pub(crate) fn new(keep: usize) -> Self {
        Frames { inner: Mutex::default(), keep }
    }

    /// Registers `waiter` unless `needed` says that its pages came meanwhile.
    ///
    /// `needed` is asked under the lock: pages are marked installed before their frame stops being fetched,
    /// so a frame is never fetched again for pages that are there.
    pub(crate) fn begin(&self, frame: FrameToken, waiter: Waiter, needed: impl FnOnce() -> bool) -> Begin {
        let mut inner = lock(&self.inner);
        if !needed() {
            return Begin::Unneeded;
        }
        if let Some(decoded) = inner.recent(frame) {
            return Begin::AtHand(decoded);
        }
        match inner.fetching.entry(frame) {
            Entry::Occupied(mut waiters) => {
                waiters.get_mut().push(waiter);
                Begin::Attached
            }
            Entry::Vacant(slot) => {
                slot.insert(vec![waiter]);
                Begin::Fetch
            }
        }
    }

    /// Who waits for a fetched frame. To be called until it returns `None`, which ends the fetch.
    pub(crate) fn waiters(&self, frame: FrameToken) -> Option<Vec<Waiter>> {
        let mut inner = lock(&self.inner);
        let waiters = inner.fetching.get_mut(&frame).map(std::mem::take).filter(|w| !w.is_empty());
        if waiters.is_none() {
            inner.fetching.remove(&frame);
        }
        waiters
    }

    /// Keeps a frame which the image shows in other places too.
    pub(crate) fn keep(&self, frame: FrameToken, decoded: &DecodedFrame) {
        let mut inner = lock(&self.inner);
        if self.keep == 0 || inner.recent.iter().any(|(f, _)| *f == frame) {
            return;
        }
        if inner.recent.len() >= self.keep {
            inner.recent.pop_front();
        }
        inner.recent.push_back((frame, decoded.clone()));
    }

    /// A frame kept.
    pub(crate) fn kept(&self, frame: FrameToken) -> Option<DecodedFrame> {
        lock(&self.inner).recent(frame)
    }

    /// Ends a fetch that failed: who waited.
    pub(crate) fn abandon(&self, frame: FrameToken) -> Vec<Waiter> {
        lock(&self.inner).fetching.remove(&frame).unwrap_or_default()
    }
}

/// Huge pages being gathered, so that each is gathered once.
#[derive(Debug, Default)]
pub(crate) struct CellsUnderWay(Mutex<HashSet<Cell>>);

impl CellsUnderWay {
    /// Whether the caller is the one to gather `cell`.
    pub(crate) fn begin(&self, cell: Cell) -> bool {
        lock(&self.0).insert(cell)
    }
    pub(crate) fn end(&self, cell: Cell) {
        lock(&self.0).remove(&cell);
    }
}
