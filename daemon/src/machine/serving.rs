//! How the memory of a woken VM is served, and what becomes of one that cannot be.

use std::{io, time::Duration};

use dormouse_chunkstore::Store;
use dormouse_core::{Name, OnFailure, Retry};
use dormouse_firecracker::{
    ListenError, Refusal, Session, SessionOptions, SessionReport, tracking::Tracking,
};
use dormouse_wake::Opened;
use serde::{Deserialize, Serialize};

use super::vmm::tracking;
use crate::failure::Failure;

/// How long a peer may take over its handshake.
pub(crate) const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Waits are cut into pieces of this length.
pub(crate) const A_WHILE: Duration = Duration::from_secs(3600);

/// How VMs are served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    /// What to do when a page a VM waits for cannot be had correctly.
    pub(crate) policy: PolicyName,
    /// How long to try again before that.
    pub(crate) give_up_after: Duration,
    /// Whether pages nobody asked for are fetched.
    pub(crate) prefetch: bool,
    /// How long it is recorded which pages the guest touches first; zero for not at all.
    pub(crate) record_window: Duration,
    /// Every page faults by itself, for an exact record.
    pub(crate) page_by_page: bool,
}

/// What is done when a page that a VM waits for cannot be had correctly: [`OnFailure`], as it is asked for.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PolicyName {
    /// Kill the VM
    #[default]
    Kill,
    /// Leave the VM waiting for that page, for somebody to look at
    Hold,
}

impl Serving {
    pub(crate) fn options(&self) -> SessionOptions {
        SessionOptions {
            on_failure: match self.policy {
                PolicyName::Kill => OnFailure::Kill,
                PolicyName::Hold => OnFailure::Hold,
            },
            retry: retry_for(self.give_up_after),
            prefetch: self.prefetch,
            record_window: self.record_window,
            page_by_page: self.page_by_page,
        }
    }

    /// Opens the snapshot to be served, and begins to decode its first pages if they are to be installed ahead. With
    /// `keep` they stay in memory for any number of VMs.
    pub(crate) fn open(&self, store: &Store, name: &Name, keep: bool) -> Result<Opened, Failure> {
        let opened = Opened::open(store, name)?;
        if self.prefetch {
            opened.decode_ahead(keep).map_err(|e| Failure::new("threads", e.to_string()))?;
        }
        Ok(opened)
    }
}

/// A [`Retry`] whose waits add up to `time` at least.
pub(crate) fn retry_for(time: Duration) -> Retry {
    let retry = Retry { limit: 0, ..Retry::default() };
    let (mut left, mut limit) = (time, 0);
    // A few waits that grow, and then as many of the longest as it takes.
    while !left.is_zero() && retry.wait(limit) < retry.longest {
        left = left.saturating_sub(retry.wait(limit));
        limit += 1;
    }
    let longest = left.as_nanos().div_ceil(retry.longest.as_nanos().max(1));
    let limit = limit.saturating_add(u32::try_from(longest).unwrap_or(u32::MAX));
    Retry { limit, ..retry }
}

/// Where what VMs touch first is noted for their next standby.
pub(crate) fn noted() -> Option<Tracking> {
    tracking().inspect_err(|why| tracing::warn!(%why, "the next standby will not know what was touched")).ok()
}

/// Tells why a VM is not served, and ends it, as it would wait for ever.
pub(crate) fn refused(refusal: &Refusal, on_failure: OnFailure) -> Failure {
    let mut message = refusal.error.to_string();
    let pid = refusal.peer.pid;
    match (&refusal.process, on_failure) {
        (Some(process), OnFailure::Kill) => match process.kill() {
            Ok(()) => message += &format!("; process {pid} was killed"),
            Err(error) => message += &format!("; process {pid} cannot be killed ({error}), end it yourself"),
        },
        (Some(_), OnFailure::Hold) => {
            message += &format!("; process {pid} waits for its memory for ever, end it yourself");
        }
        (None, _) => {}
    }
    Failure::new("vm_refused", message)
}

/// Waits until the VM is gone.
pub(crate) fn outlive(mut session: Session) -> Result<SessionReport, Failure> {
    loop {
        session = match session.wait(A_WHILE).map_err(|e| Failure::new("vm", format!("waiting: {e}")))? {
            Ok(report) => return Ok(report),
            Err(session) => session,
        }
    }
}

pub(crate) fn listen_failure(error: &ListenError) -> Failure {
    Failure::new("socket", error.to_string())
}

pub(crate) fn thread_failure(error: &io::Error) -> Failure {
    Failure::new("threads", format!("no thread could be started: {error}; raise the limit on them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The waits were added up one by one: a century took a billion and a half steps, and more overflowed.
    #[test]
    fn any_time_to_give_up_after_becomes_tries_at_once() {
        let waits = |retry: Retry| (0..retry.limit).map(|n| retry.wait(n)).sum::<Duration>();
        for ms in [0, 1, 10, 11, 5_000, 120_000, 120_001] {
            let (time, retry) = (Duration::from_millis(ms), retry_for(Duration::from_millis(ms)));
            assert!(waits(retry) >= time, "{time:?}: {retry:?}");
            let fewer = Retry { limit: retry.limit.saturating_sub(1), ..retry };
            assert!(retry.limit == 0 || waits(fewer) < time, "{time:?}: {retry:?}");
        }
        let century = retry_for(Duration::from_secs(100 * 365 * 24 * 3600));
        assert!(century.limit > 1_500_000_000, "{century:?}");
        assert_eq!(retry_for(Duration::MAX).limit, u32::MAX);
    }
}
