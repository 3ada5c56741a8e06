//! The thread that answers faults: reads them, and sends on what it cannot answer at once.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::core::{Core, Fault, lock};
use crate::locality::Locality;
use crate::plan::Span;
use crate::serve::Inline;
use crate::state::{Action, PageEvent};

/// How often a quiet VM is looked after: nothing else tells that its process has ended.
const LIFE_CHECK: Duration = Duration::from_secs(1);

/// Wakes of one page in a row without it appearing before it is taken for missing against all expectation.
const STALE_MAX: u32 = 1000;

/// How long after a fault nothing else is begun: a vCPU that was just woken may be about to fault again.
const GRACE: Duration = Duration::from_micros(40);

/// Answers faults until the restore stops.
pub(crate) fn run(core: &Core) {
    let mut last_fault = None;
    let (mut stale, mut locality) = (Stale::default(), Locality::default());
    let mut faults = Vec::new();
    while !core.is_stopping() {
        if let Err(error) = core.pump() {
            core.fail_with(error.into());
            // Without events nothing can be answered; do not burn a core over it.
            if core.queue.pause(LIFE_CHECK) {
                return;
            }
        }
        faults.extend(lock(&core.inbox).drain(..));
        if !faults.is_empty() {
            core.timeline.mark("first fault");
            answer(core, &mut faults, &mut stale, &mut locality);
            // From the answer on: that is when a vCPU may be about to fault again.
            last_fault = Some(Instant::now());
            core.queue.share_rests();
        } else if last_fault.is_none_or(|at| at.elapsed() > GRACE)
            && let Some(rest) = core.queue.take_rest()
        {
            core.work_off(rest, || core.event_waits());
        } else if last_fault.is_some_and(|at| at.elapsed() < core.policy.spin) {
            std::hint::spin_loop();
        } else {
            wait(core);
        }
    }
}

fn answer(core: &Core, faults: &mut Vec<Fault>, stale: &mut Stale, locality: &mut Locality) {
    let mut missing = None;
    for fault in faults.drain(..) {
        let found =
            core.memory.find(fault.address).and_then(|(region, page)| core.plan.span(region, page, 1));
        let Some(cell) = found else {
            core.stray(fault.address);
            continue;
        };
        match core.table.apply(cell.first(), PageEvent::Fault) {
            Action::Schedule => {
                if let Some(run) = core.plan.pages_of(cell.first()) {
                    lock(&core.recorder).touched(run.first, fault.at);
                }
                // Those whose bytes are there first. Of the others one is answered here, if it needs no waiting, the
                // rest by the workers meanwhile.
                match core.serve_hit(cell, fault.at, locality) {
                    Inline::Served => {}
                    Inline::Unknown => {
                        core.counters.handed_over.add(1);
                        core.queue.demand(cell, fault.at);
                    }
                    Inline::Missing(frame, waiter) => match missing {
                        None => missing = Some((frame, waiter)),
                        Some(_) => core.serve_far(frame, waiter),
                    },
                }
            }
            Action::InstallZero => {
                if let Err(error) = core.fill_removed(cell) {
                    core.fail_with(error);
                }
                core.timeline.fault_took(fault.at.elapsed());
            }
            Action::Wake => {
                core.counters.stale_faults.add(1);
                stale.woken(core, cell);
            }
            _ => {}
        }
    }
    if let Some((frame, waiter)) = missing {
        core.serve_near(frame, waiter);
    }
}

/// Tells late faults for a page that is there from faults for a page that should be there and is not.
#[derive(Default)]
struct Stale {
    cell: Option<Span>,
    wakes: u32,
}

impl Stale {
    fn woken(&mut self, core: &Core, cell: Span) {
        self.wakes = if self.cell == Some(cell) { self.wakes + 1 } else { 0 };
        self.cell = Some(cell);
        if self.wakes < STALE_MAX {
            core.installer.wake(cell);
            return;
        }
        // It vanished without an event, so nobody knows what it held. Poisoning spares pages that are there.
        self.wakes = 0;
        tracing::error!(?cell, "an installed page is missing");
        let outcome = core.installer.poison(cell);
        core.counters.poisoned.add(u64::from(outcome == crate::outcome::Outcome::Done));
        core.installer.wake(cell);
    }
}

impl Core {
    /// Whether the kernel, or another thread that read its messages, has something for the fault thread.
    fn event_waits(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.memory.uffd().as_fd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        !lock(&self.inbox).is_empty() || poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

fn wait(core: &Core) {
    let mut fds = [
        PollFd::from_borrowed_fd(core.memory.uffd().as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(core.bell(), PollFlags::IN),
    ];
    let timeout = Timespec { tv_sec: LIFE_CHECK.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) => {
            let others = core.memory.regions().iter().find(|r| !r.is_own());
            if others.is_some_and(|region| !region.is_alive()) {
                core.fail_with(crate::error::RestoreError::VmGone);
            }
        }
        _ => core.silence_bell(),
    }
}
