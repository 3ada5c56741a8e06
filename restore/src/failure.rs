//! Failing closed: what is done about pages that cannot be had, and about a VM that cannot be served.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Builder;
use std::time::Instant;

use dormouse_core::page::PageIndex;

use crate::core::{Core, lock};
use crate::error::RestoreError;
use crate::outcome::Outcome;
use crate::plan::Span;
use crate::policy::{FailClosed, KillVm};
use crate::source::{SourceError, SourceErrorKind};
use crate::state::{Action, PageEvent, PageState};

/// Most errors remembered for the owner and logged.
const FAILURES_MAX: usize = 16;

impl Core {
    /// Withholds the awaited cells of `span` by policy; but not while stopping, when a try that was broken off says
    /// nothing of its page, and nobody is to be ended for it.
    ///
    /// A store that refuses ends nobody: whoever may lift that may do so at any time, and until then the vCPU waits.
    pub(crate) fn fail_cells(&self, span: Span, error: &SourceError) {
        if self.is_stopping() {
            return;
        }
        for offset in 0..span.cells() {
            let cell = span.part(offset, 1);
            if self.table.get(cell.first()) != PageState::Awaited {
                continue;
            }
            if error.kind == SourceErrorKind::Denied {
                self.queue.demand(cell, Instant::now());
                continue;
            }
            let Some(run) = self.plan.pages_of(cell.first()) else { continue };
            let why = Arc::new(RestoreError::Page { page: run.first, error: error.clone() });
            self.note(why.clone());
            if !matches!(self.policy.fail_closed, FailClosed::Poison { .. }) {
                self.fill_failed(run.first, error);
            }
            match &self.policy.fail_closed {
                FailClosed::Hold => {}
                FailClosed::Kill(kill) => self.kill(kill, why),
                FailClosed::Poison { .. } => {
                    if let Err(why) = self.poison(cell) {
                        self.fail_with(why);
                    }
                }
            }
        }
    }

    /// Poisons an awaited cell. Where that is not possible it is awaited again, and so keeps detach from letting its
    /// vCPU go on with zeros.
    fn poison(&self, cell: Span) -> Result<(), RestoreError> {
        let (at, mut tries) = (cell.first(), 0);
        if self.table.apply(at, PageEvent::Failed) != Action::Poison {
            return Ok(());
        }
        loop {
            let inside = self.gate.enter();
            // A page given back meanwhile is zero by right, and must not be poisoned. Whoever waited was woken.
            if self.table.get(at) != PageState::Copying {
                return Ok(());
            }
            let outcome = self.installer.poison(cell);
            let done = match outcome {
                Outcome::Done | Outcome::Partial(_) => Some(PageEvent::Poisoned),
                Outcome::AlreadyThere => Some(PageEvent::AlreadyThere),
                _ => None,
            };
            let action = done.map(|event| self.table.apply(at, event));
            drop(inside);
            if let Some(action) = action {
                self.counters.poisoned.add(u64::from(done == Some(PageEvent::Poisoned)));
                // A vCPU that came to wait meanwhile must see it too.
                if action == Action::Wake {
                    self.installer.wake(cell);
                }
                return Ok(());
            }
            tries += 1;
            let again = match outcome {
                Outcome::Unsupported(e) | Outcome::Refused(e) => Err(RestoreError::CannotPoison {
                    page: self.plan.pages_of(at).map_or(PageIndex(u64::MAX), |run| run.first),
                    error: std::io::Error::from_raw_os_error(e),
                }),
                other => self.again(other, cell, tries),
            };
            if let Err(why) = again {
                self.table.apply(at, PageEvent::Withheld);
                return Err(why);
            }
        }
    }

    /// Acts on an error that concerns the whole VM, not one page.
    pub(crate) fn fail_with(&self, error: RestoreError) {
        match error {
            RestoreError::Stopped => {}
            RestoreError::VmGone => {
                tracing::info!("the VM is gone; its restore ends");
                lock(&self.ended).get_or_insert_with(|| Arc::new(error));
                self.stop();
            }
            error => self.fail_vm(error),
        }
    }

    /// The VM cannot be served any further: end it if the policy can, else leave its vCPUs waiting.
    pub(crate) fn fail_vm(&self, error: RestoreError) {
        // Whoever stops a restore has seen to its VM.
        if self.is_stopping() {
            return;
        }
        let kill = match &self.policy.fail_closed {
            FailClosed::Hold => None,
            FailClosed::Kill(kill) => Some(kill),
            FailClosed::Poison { or_kill } => or_kill.as_ref(),
        };
        let error = Arc::new(error);
        if let Some(kill) = kill {
            self.kill(kill, error.clone());
        }
        self.note(error);
    }

    /// Ends the VM on a thread of its own: what the embedder does takes as long as it takes, and until the VM has ended
    /// its faults are answered and its removals seen to, which may be what its end waits for.
    fn kill(&self, kill: &KillVm, error: Arc<RestoreError>) {
        if self.kill_called.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(%error, "ending the VM");
        let run = {
            let (kill, error) = (kill.clone(), error.clone());
            move || call(&kill, &error)
        };
        match Builder::new().name("dm-kill".into()).spawn(run) {
            Ok(thread) => drop(lock(&self.killing).insert(thread)),
            Err(_) => call(kill, &error),
        }
    }

    /// Remembers for whoever waits for a fill that nobody is on the way to some pages of it.
    pub(crate) fn unfilled(&self, error: Arc<RestoreError>) {
        lock(&self.fill_failure).get_or_insert(error);
    }

    /// Remembers an error for the owner. Of a VM that fails at every page only the first are told, or it would fill the
    /// log of all the others.
    fn note(&self, error: Arc<RestoreError>) {
        let mut failures = lock(&self.failures);
        if failures.len() < FAILURES_MAX {
            tracing::error!(%error, "restore failed closed");
            failures.push(error);
            if failures.len() == FAILURES_MAX {
                tracing::error!("this VM's further failures are not told");
            }
        }
    }
}

fn call(kill: &KillVm, error: &RestoreError) {
    if catch_unwind(AssertUnwindSafe(|| kill(error))).is_err() {
        tracing::error!("what was to end the VM panicked; the VM waits");
    }
}
