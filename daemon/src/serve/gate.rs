//! What may still be begun: a daemon ends when nothing is under way, and nothing is begun once it has found that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::failure::Failure;

/// Operations pass it when they begin; it is closed when none is under way.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    under_way: usize,
    closed: bool,
}

/// An operation is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Pass(Arc<Gate>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// The daemon ends: whatever is begun now would be cut off.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Pass, Failure> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(stopping());
        }
        inner.under_way += 1;
        Ok(Pass(self.clone()))
    }

    /// Lets nothing through any more, unless something is under way. Whether it is closed.
    pub(super) fn close(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.under_way == 0;
        inner.closed
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.lock().under_way -= 1;
    }
}

/// The answer to what a daemon about to end does not begin.
pub(super) fn stopping() -> Failure {
    Failure { retryable: true, ..Failure::new("stopping", "the daemon takes nothing on any more") }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use super::*;

    #[test]
    fn a_gate_closes_once_nothing_is_under_way_and_stays_closed() {
        let gate = Arc::new(Gate::default());
        let passes = [gate.enter().unwrap(), gate.enter().unwrap()];
        for pass in passes {
            assert!(!gate.close());
            drop((gate.enter().unwrap(), pass));
        }
        assert!(gate.close() && gate.close());
        let refused = gate.enter().unwrap_err();
        assert_eq!((refused.kind, refused.retryable), ("stopping", true));
    }
}
