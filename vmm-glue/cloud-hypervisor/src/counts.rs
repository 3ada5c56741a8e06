//! What a VM that woke on demand asked for, and what was done for it.

use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_restore::{CountersSnapshot, TimelineReport};

/// What befell an image.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ImageReport {
    /// Its name in the snapshot.
    pub image: String,
    /// What was done.
    pub counters: CountersSnapshot,
    /// When.
    pub timeline: TimelineReport,
    /// Errors for which pages were withheld.
    pub failures: Vec<String>,
}

/// What the VMM asked for, in counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) requests: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) present: AtomicU64,
    pub(super) given_back: AtomicU64,
    pub(super) fetches: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) withheld: AtomicU64,
    pub(super) shown: AtomicU64,
}

/// What the VMM asked for, in counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct FaultCounts {
    /// `PageFault` requests.
    pub requests: u64,
    /// Pages of 4 KiB in them.
    pub pages: u64,
    /// Of these, there already.
    pub present: u64,
    /// Of these, given back by the guest since, so that they are zero now.
    pub given_back: u64,
    /// Frames fetched for requests, retries included; those prefetched are counted with their image.
    pub fetches: u64,
    /// Locates and fetches repeated after an error.
    pub retries: u64,
    /// Requests that could not be answered, for which the VM was ended or waits.
    #[serde(skip)]
    pub withheld: u64,
    /// Pages that the VMM showed its guest before it asked for any: none of these is waited for.
    pub shown: u64,
}

impl Counts {
    /// The counts now. They are read one by one, not all at one instant.
    pub(super) fn now(&self) -> FaultCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Acquire);
        FaultCounts {
            requests: get(&self.requests),
            pages: get(&self.pages),
            present: get(&self.present),
            given_back: get(&self.given_back),
            fetches: get(&self.fetches),
            retries: get(&self.retries),
            withheld: get(&self.withheld),
            shown: get(&self.shown),
        }
    }
}
