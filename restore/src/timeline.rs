//! Where the time of a resume went: phases and fault latencies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Most phases kept; later ones are dropped.
const PHASES_MAX: usize = 64;

/// A named instant of a resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// What had happened.
    pub name: String,
    /// When, in microseconds from the timeline's start.
    pub at_us: u64,
}

/// Counts by powers of two: bucket `i` counts values of `2^(i-1) .. 2^i` microseconds, bucket 0 those below 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Histogram {
    /// The buckets, cut off after the last that is not empty.
    pub log2_us: Vec<u64>,
    /// All values together, in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    /// Values counted.
    pub fn count(&self) -> u64 {
        self.log2_us.iter().sum()
    }

    /// An upper bound, in microseconds, of the value below which `share` (0 to 1) of all values lie.
    pub fn quantile_us(&self, share: f64) -> Option<u64> {
        let total = self.count();
        let rank = ((total as f64 * share.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, n) in self.log2_us.iter().enumerate() {
            seen += n;
            if total > 0 && seen >= rank {
                return Some(1 << bucket);
            }
        }
        None
    }
}

/// A restore's phases and latencies at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TimelineReport {
    /// Phases in the order they were reached.
    pub phases: Vec<Phase>,
    /// From reading a fault to having installed its page.
    pub fault_latency: Histogram,
}

/// Collects phases and latencies while a resume runs.
#[derive(Debug)]
pub(crate) struct Timeline {
    start: Instant,
    phases: Mutex<Vec<Phase>>,
    faults: [AtomicU64; 40],
    faults_us: AtomicU64,
}

impl Timeline {
    pub(crate) fn new() -> Self {
        Timeline {
            start: Instant::now(),
            phases: Mutex::new(Vec::new()),
            faults: [const { AtomicU64::new(0) }; 40],
            faults_us: AtomicU64::new(0),
        }
    }

    /// Notes the first time `name` is reached; repetitions do not count.
    pub(crate) fn mark(&self, name: &str) {
        let at_us = self.start.elapsed().as_micros() as u64;
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        if phases.len() < PHASES_MAX && phases.iter().all(|p| p.name != name) {
            phases.push(Phase { name: name.to_owned(), at_us });
        }
    }

    pub(crate) fn fault_took(&self, time: Duration) {
        let us = time.as_micros() as u64;
        let bucket = (u64::BITS - us.leading_zeros()) as usize;
        self.faults[bucket.min(self.faults.len() - 1)].fetch_add(1, Ordering::Relaxed);
        self.faults_us.fetch_add(us, Ordering::Relaxed);
    }

    pub(crate) fn report(&self) -> TimelineReport {
        let mut log2_us: Vec<u64> = self.faults.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        while log2_us.last() == Some(&0) {
            log2_us.pop();
        }
        let phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone();
        TimelineReport {
            phases,
            fault_latency: Histogram { log2_us, sum_us: self.faults_us.load(Ordering::Relaxed) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_their_power_of_two() {
        let timeline = Timeline::new();
        for us in [0, 1, 3, 100, 100, u64::MAX / 2000] {
            timeline.fault_took(Duration::from_micros(us));
        }
        let faults = timeline.report().fault_latency;
        assert_eq!((faults.count(), faults.sum_us), (6, 204 + u64::MAX / 2000));
        assert_eq!(
            (faults.log2_us[0], faults.log2_us[1], faults.log2_us[2], faults.log2_us[7]),
            (1, 1, 1, 2)
        );
        assert_eq!(faults.quantile_us(0.5), Some(4));
        assert_eq!(Histogram::default().quantile_us(0.5), None);
    }

    #[test]
    fn a_phase_is_noted_once() {
        let timeline = Timeline::new();
        timeline.mark("first fault");
        timeline.mark("first fault");
        assert_eq!(timeline.report().phases.len(), 1);
    }
}
