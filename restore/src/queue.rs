//! Work for the fetch workers: faults strictly before prefetch.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::core::lock;
use crate::plan::{PageSize, Span};
use crate::rest::Rest;
use crate::source::FrameToken;

/// Cells of small pages a worker prefetches before it looks for something more urgent: 2 MiB.
pub(crate) const PREFETCH_STEP_PAGES: u64 = PageSize::Huge.pages();

/// Frames whose other pages wait when a worker is roused for them: the fault thread has had no time.
const RESTS_SHARED: usize = 32;

/// Frames whose other pages may wait to be installed. Beyond that the oldest are left to faults and prefetch.
const RESTS_MAX: usize = 64;

/// One piece of work.
#[derive(Debug)]
pub(crate) enum Job {
    /// A vCPU waits for this cell, since then.
    Demand(Span, Instant),
    /// vCPUs wait for this frame, whose fetch has begun.
    DemandFrame(FrameToken),
    /// What a fault left.
    Rest(Rest),
    /// These cells will be wanted. At most 2 MiB.
    Prefetch(Span),
}

/// The work to be done. Spans are cut into steps as they are taken, so that workers share them.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    lanes: Mutex<Lanes>,
    ready: Condvar,
    idle: Condvar,
    demand_waiting: AtomicUsize,
    rests: AtomicUsize,
}

#[derive(Debug)]
enum Demand {
    Cell(Span, Instant),
    Frame(FrameToken),
}

#[derive(Debug, Default)]
struct Lanes {
    demand: VecDeque<Demand>,
    rest: VecDeque<Rest>,
    prefetch: VecDeque<(Span, PageSize)>,
    prefetching: usize,
    stopped: bool,
}

impl Queue {
    pub(crate) fn demand(&self, cell: Span, since: Instant) {
        self.push(Demand::Cell(cell, since));
    }

    /// A frame that is waited for and has to be fetched by a worker.
    pub(crate) fn demand_frame(&self, frame: FrameToken) {
        self.push(Demand::Frame(frame));
    }

    fn push(&self, demand: Demand) {
        lock(&self.lanes).demand.push_back(demand);
        self.demand_waiting.fetch_add(1, Ordering::Relaxed);
        self.ready.notify_one();
    }

    /// Leaves `rest` for later. Rouses no worker: that is for [`Queue::share_rests`].
    pub(crate) fn leave(&self, rest: Rest) {
        let mut lanes = lock(&self.lanes);
        if lanes.rest.iter().any(|other| other.is_same(&rest)) {
            return;
        }
        if lanes.rest.len() >= RESTS_MAX {
            lanes.rest.pop_front();
        }
        lanes.rest.push_back(rest);
        self.rests.store(lanes.rest.len(), Ordering::Relaxed);
    }

    /// The oldest of what faults left.
    pub(crate) fn take_rest(&self) -> Option<Rest> {
        if self.rests.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut lanes = lock(&self.lanes);
        let rest = lanes.rest.pop_front();
        self.rests.store(lanes.rest.len(), Ordering::Relaxed);
        rest
    }

    /// Has a worker see to what faults left, if much of it has gathered.
    pub(crate) fn share_rests(&self) {
        if self.rests.load(Ordering::Relaxed) >= RESTS_SHARED {
            self.ready.notify_one();
        }
    }

    pub(crate) fn prefetch(&self, spans: impl IntoIterator<Item = (Span, PageSize)>) {
        lock(&self.lanes).prefetch.extend(spans.into_iter().filter(|(s, _)| s.cells() > 0));
        self.ready.notify_all();
    }

    /// The rest of a prefetch that gave way to a fault.
    pub(crate) fn put_back(&self, rest: Span, size: PageSize) {
        if rest.cells() > 0 {
            lock(&self.lanes).prefetch.push_front((rest, size));
            self.ready.notify_one();
        }
    }

    /// Whether a fault waits for a worker.
    pub(crate) fn demand_waiting(&self) -> bool {
        self.demand_waiting.load(Ordering::Relaxed) > 0
    }

    /// The next piece of work; waits for one. `None` when the restore stops.
    pub(crate) fn next(&self, demand_only: bool) -> Option<Job> {
        let mut lanes = lock(&self.lanes);
        loop {
            if lanes.stopped {
                return None;
            }
            if let Some(demand) = lanes.demand.pop_front() {
                self.demand_waiting.fetch_sub(1, Ordering::Relaxed);
                return Some(match demand {
                    Demand::Cell(span, since) => Job::Demand(span, since),
                    Demand::Frame(frame) => Job::DemandFrame(frame),
                });
            }
            if let Some(rest) = lanes.rest.pop_front() {
                self.rests.store(lanes.rest.len(), Ordering::Relaxed);
                return Some(Job::Rest(rest));
            }
            if !demand_only && let Some((span, size)) = lanes.prefetch.pop_front() {
                let step = PREFETCH_STEP_PAGES / size.pages();
                let rest = span.part(step, u64::MAX);
                if rest.cells() > 0 {
                    lanes.prefetch.push_front((rest, size));
                }
                lanes.prefetching += 1;
                return Some(Job::Prefetch(span.part(0, step)));
            }
            lanes = self.ready.wait(lanes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A prefetch taken from the queue is over, done or not.
    pub(crate) fn prefetch_over(&self) {
        let mut lanes = lock(&self.lanes);
        lanes.prefetching = lanes.prefetching.saturating_sub(1);
        self.idle.notify_all();
    }

    /// Waits a little, or until a prefetch is over; whether no prefetch is left then.
    pub(crate) fn wait_idle(&self, at_most: Duration) -> bool {
        let lanes = lock(&self.lanes);
        let idle = |l: &Lanes| l.prefetching == 0 && l.prefetch.is_empty();
        if idle(&lanes) {
            return true;
        }
        let (lanes, _) = self.idle.wait_timeout(lanes, at_most).unwrap_or_else(PoisonError::into_inner);
        idle(&lanes)
    }

    /// Waits `time`, or until the restore stops; whether it does.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut lanes = lock(&self.lanes);
        while !lanes.stopped {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            lanes = self.idle.wait_timeout(lanes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(crate) fn stop(&self) {
        lock(&self.lanes).stopped = true;
        self.ready.notify_all();
        self.idle.notify_all();
    }
}
