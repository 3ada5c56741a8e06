//! Decisions about a page that cannot be had, as every layer passes them on: pure values.

use std::time::Duration;

/// How often and how patiently a failing fetch is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Repetitions after the first try.
    pub limit: u32,
    /// The wait before the first repetition; it doubles from there.
    pub first: Duration,
    /// The longest wait between two tries.
    pub longest: Duration,
}

impl Default for Retry {
    /// About two minutes in all: longer than a load balancer takes to notice, shorter than a person.
    fn default() -> Self {
        Retry { limit: 64, first: Duration::from_millis(10), longest: Duration::from_secs(2) }
    }
}

impl Retry {
    /// The wait before repetition `n`, counted from zero.
    pub fn wait(&self, n: u32) -> Duration {
        self.first.saturating_mul(1u32.checked_shl(n).unwrap_or(u32::MAX)).min(self.longest)
    }
}

/// What is done when a page cannot be had correctly.
///
/// Poisoning is not among it: an access that KVM emulates takes a poisoned page for a device, the VMM
/// answers for a device that is not there, and the guest goes on with bytes that nobody stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Kill the VMM.
    #[default]
    Kill,
    /// Leave the vCPU waiting, for somebody to look at.
    Hold,
}
