//! Keeping a VM beyond the process that serves it: its descriptors in hands that do not die with it.
//!
//! | module | holds |
//! |---|---|
//! | [`record`] | what is known of a kept VM besides its descriptors: a small document |
//! | [`regions`] | where its memory lies: a list, as Firecracker sends it and as records have it |
//! | [`holder`] | a process of our own that holds descriptors, and the client that speaks to it |
//! | [`systemd`] | the same in systemd's descriptor store |
//!
//! ```text
//!   serving process  -- keep: userfaultfd, page states, pidfd, record -->  keeper
//!        | killed
//!   its successor    <-- take_all: the same -----------------------------  keeper
//! ```
//!
//! Who serves a VM keeps it before it is given its first page, and releases it once it has ended. `docs/SURVIVAL.md`
//! says what is guaranteed. This crate knows neither stores nor VMMs: descriptors and a record are all it sees.
//!
//! All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

pub mod holder;
pub mod record;
pub mod regions;
pub mod systemd;

mod descriptors;
mod sys;

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

pub use holder::{HolderKeeper, HolderOptions};
pub use record::{KeptOptions, KeptSnapshot, RecordError, VmId, VmRecord};
pub use regions::{PageSize, Region, RegionsError, parse_regions};
pub use systemd::SystemdKeeper;

/// All that is needed to go on serving a VM.
#[derive(Debug)]
pub struct KeptVm {
    /// What it is.
    pub record: VmRecord,
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// The states of its pages: `KeptStates` of `dormouse-restore`.
    pub states: OwnedFd,
    /// A pidfd of the VMM.
    pub process: OwnedFd,
}

impl KeptVm {
    /// A second set of the same descriptors.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(KeptVm {
            record: self.record.clone(),
            uffd: self.uffd.try_clone()?,
            states: self.states.try_clone()?,
            process: self.process.try_clone()?,
        })
    }
}

/// Holds VMs for whoever serves them next.
///
/// All methods may be called from any thread. A VM that is kept stays kept, whatever becomes of the caller, until it
/// is released or its process ends.
pub trait Keeper: Debug + Send + Sync {
    /// Keeps `vm`, and returns once that is certain.
    ///
    /// # Errors
    /// It is not kept.
    fn keep(&self, vm: &KeptVm) -> Result<(), KeepError>;

    /// Lets go of a VM that has ended, or that goes its own way. One that is not kept is no error.
    ///
    /// # Errors
    /// It may still be kept.
    fn release(&self, id: &VmId) -> Result<(), KeepError>;

    /// All VMs that are kept and that nobody serves any more. They stay kept; from now on it is the caller who serves
    /// them. What cannot be understood is left where it is, and told of in the log.
    ///
    /// # Errors
    /// The keeper cannot be asked. Nothing is lost.
    fn take_all(&self) -> Result<Vec<KeptVm>, KeepError>;
}

/// Why a keeper could not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// It refused.
    #[error("the keeper refused: {0}")]
    Refused(String),
    /// What it said makes no sense.
    #[error("the keeper answered what is not understood: {0}")]
    Answer(String),
    /// The holder's program could not be started.
    #[error("the holder at {socket} cannot be reached or started: {why}")]
    NoHolder {
        /// Where it should listen.
        socket: PathBuf,
        /// What stands in the way.
        why: String,
    },
    /// A VM's record is too large.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The operating system refused.
    #[error("keeping VMs: {what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's word.
        error: std::io::Error,
    },
}

impl KeepError {
    fn io<E: Into<std::io::Error>>(what: &'static str) -> impl Fn(E) -> Self {
        move |error| KeepError::Io { what, error: error.into() }
    }
}
