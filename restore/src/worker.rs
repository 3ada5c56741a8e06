//! The threads that fetch, decode and install.

use crate::core::Core;
use crate::queue::Job;

/// Works off the queue until the restore stops.
pub(crate) fn run(core: &Core, demand_only: bool) {
    while let Some(job) = core.queue.next(demand_only) {
        match job {
            Job::Demand(cell, since) => core.serve_demand(cell, since),
            Job::DemandFrame(frame) => core.fetch_and_install(frame),
            Job::Rest(rest) => core.work_off(rest, || core.queue.demand_waiting()),
            Job::Prefetch(span) => {
                core.serve_prefetch(span);
                core.queue.prefetch_over();
            }
        }
    }
}
