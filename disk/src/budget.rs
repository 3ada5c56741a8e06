//! Local space that overlays share. A full one makes writes wait: a disk has no word for "no space".

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::error::{DiskError, Result};

/// Bytes that overlays may take up together.
#[derive(Debug)]
pub struct Budget {
    limit_bytes: u64,
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held_bytes: u64,
    waits: u64,
}

impl Budget {
    /// Room for `limit_bytes`.
    pub fn new(limit_bytes: u64) -> Self {
        Budget { limit_bytes, state: Mutex::default(), released: Condvar::new() }
    }

    /// No limit but the file system's.
    pub fn unlimited() -> Self {
        Self::new(u64::MAX)
    }

    /// Bytes held.
    pub fn held_bytes(&self) -> u64 {
        self.lock().held_bytes
    }

    /// How many writes have had to wait for space so far.
    pub fn waits(&self) -> u64 {
        self.lock().waits
    }

    /// Whether sealed overlays should not become more: three quarters are taken.
    pub(crate) fn refuses_seals(&self) -> bool {
        self.limit_bytes != u64::MAX && self.held_bytes() > self.limit_bytes / 4 * 3
    }

    /// Takes `bytes`, waiting until others give some back, at most for `wait_max`.
    pub(crate) fn take(&self, bytes: u64, wait_max: Duration) -> Result<()> {
        let mut state = self.lock();
        let fits =
            |state: &State| state.held_bytes.checked_add(bytes).is_some_and(|all| all <= self.limit_bytes);
        if !fits(&state) {
            state.waits += 1;
            tracing::warn!(
                held_bytes = state.held_bytes,
                limit_bytes = self.limit_bytes,
                "the overlays' local space is full: writes wait"
            );
            let deadline = Instant::now() + wait_max;
            while !fits(&state) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(DiskError::Full { waited: wait_max });
                }
                (state, _) = self.released.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.held_bytes += bytes;
        Ok(())
    }

    /// Counts what is there already, whatever the limit.
    pub(crate) fn charge(&self, bytes: u64) {
        let mut state = self.lock();
        state.held_bytes = state.held_bytes.saturating_add(bytes);
    }

    /// Gives back.
    pub(crate) fn give_back(&self, bytes: u64) {
        if bytes > 0 {
            let mut state = self.lock();
            state.held_bytes = state.held_bytes.saturating_sub(bytes);
            self.released.notify_all();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
