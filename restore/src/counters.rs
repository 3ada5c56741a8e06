//! What a restore did, in counts: tests assert on these, never on time.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// Counts of one restore, shared by its threads.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[doc = $doc])+ pub $name: Count,)+ }

        /// [`Counters`] at one instant.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct CountersSnapshot { $($(#[doc = $doc])+ pub $name: u64,)+ }

        impl Counters {
            /// The counts now. They are read one by one, not all at one instant.
            pub fn snapshot(&self) -> CountersSnapshot {
                CountersSnapshot { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Page faults read from the kernel.
    faults,
    /// Faults for pages that had come by the time the fault was looked at.
    stale_faults,
    /// Messages of any kind read from the kernel.
    events,
    /// REMOVE events: ranges the guest gave back.
    removes,
    /// UFFDIO_COPY calls, or what the installer uses in its place.
    copy_ioctls,
    /// Pages (of their region's size) installed with bytes.
    pages_copied,
    /// UFFDIO_MOVE calls.
    move_ioctls,
    /// Of the pages installed with bytes, those that were moved there and not copied.
    moved_pages,
    /// UFFDIO_ZEROPAGE calls.
    zero_ioctls,
    /// Pages installed as zeros.
    zero_pages,
    /// UFFDIO_WAKE calls.
    wake_ioctls,
    /// Frames asked of the source, retries included.
    fetches,
    /// Faults answered on the fault thread itself, without a worker.
    inline_hits,
    /// Faults given to a worker, because answering them may take waiting.
    handed_over,
    /// Pages installed by prefetch, fill or a working-set stream before anybody faulted on them.
    prefetched_pages,
    /// Of those, pages installed from a resume stream.
    streamed_pages,
    /// Installs that met a page already there (EEXIST).
    exists,
    /// Installs put off because an event had to be read first (EAGAIN).
    again,
    /// Installs that went through in part and were continued.
    partial,
    /// Locates and fetches repeated after an error.
    retries,
    /// Pages poisoned because they could not be had correctly.
    poisoned,
}

/// One count.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
