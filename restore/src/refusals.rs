//! A store that refuses, told in the log: at once, then now and then, and when it is over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::core::lock;
use crate::source::SourceError;

/// Between two lines about the same refusal.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Whether a store refuses one VM's pages, and when that was told last.
#[derive(Debug, Default)]
pub struct Refusals {
    refused: AtomicBool,
    told: Mutex<Option<Instant>>,
}

impl Refusals {
    /// The store has refused.
    pub fn tell(&self, error: &SourceError) {
        self.refused.store(true, Ordering::Release);
        let mut told = lock(&self.told);
        if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            *told = Some(Instant::now());
            tracing::warn!(
                %error,
                "the store refuses this VM's pages; the VM waits, and is not ended for it: renew the credentials, or permit it"
            );
        }
    }

    /// It has not.
    pub fn over(&self) {
        if self.refused.load(Ordering::Relaxed) && self.refused.swap(false, Ordering::AcqRel) {
            *lock(&self.told) = None;
            tracing::info!("the store gives this VM's pages again");
        }
    }
}
