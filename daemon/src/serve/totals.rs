//! What VMs count, added up over those there are and those there were.

use dormouse_firecracker::SessionReport;
use dormouse_restore::{CountersSnapshot, Histogram};

/// Sums of what VMs report.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    pub(super) counters: CountersSnapshot,
    pub(super) fault_latency: Histogram,
    pub(super) failures: u64,
    pub(super) killed: u64,
}

impl Totals {
    pub(super) fn add(&mut self, report: &SessionReport) {
        let (sum, c) = (&mut self.counters, &report.counters);
        for (sum, n) in [
            (&mut sum.faults, c.faults),
            (&mut sum.stale_faults, c.stale_faults),
            (&mut sum.removes, c.removes),
            (&mut sum.pages_copied, c.pages_copied),
            (&mut sum.zero_pages, c.zero_pages),
            (&mut sum.fetches, c.fetches),
            (&mut sum.prefetched_pages, c.prefetched_pages),
            (&mut sum.retries, c.retries),
        ] {
            *sum += n;
        }
        let faults = &report.timeline.fault_latency;
        let ours = &mut self.fault_latency;
        ours.log2_us.resize(ours.log2_us.len().max(faults.log2_us.len()), 0);
        for (sum, n) in ours.log2_us.iter_mut().zip(&faults.log2_us) {
            *sum += n;
        }
        ours.sum_us += faults.sum_us;
        self.failures += report.failures.len() as u64;
        self.killed += u64::from(report.killed_because.is_some());
    }
}
