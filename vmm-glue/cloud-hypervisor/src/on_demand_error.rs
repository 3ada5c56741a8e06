//! Why memory could not be served on demand.

use std::io;

use dormouse_restore::{PlanError, RestoreError, UffdError};

use super::protocol::GuestRange;
use super::send::SendError;

/// Why memory could not be served on demand. Nothing of the VM has run.
#[derive(Debug, thiserror::Error)]
pub enum OnDemandError {
    /// The memory file could not be made.
    #[error(transparent)]
    File(#[from] SendError),
    /// It could not be mapped.
    #[error("a memory file cannot be mapped: {0}")]
    Map(io::Error),
    /// Slots and image do not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// userfaultfd is missing or not permitted; says how to permit it.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The restore did not start.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Why pages were not provided.
#[derive(Debug, thiserror::Error)]
pub enum ProvideError {
    /// They are not the guest's.
    #[error("the peer asked for {} bytes at {:#x}, which are in no memory slot", .0.length, .0.address)]
    NoSlot(GuestRange),
    /// They cannot be had correctly.
    #[error("the page at {address:#x} cannot be had correctly, so it is withheld: {why}")]
    Withheld {
        /// Guest-physical address.
        address: u64,
        /// Why.
        why: String,
    },
    /// Nobody is served any more.
    #[error("the VM is gone")]
    Ended,
}
