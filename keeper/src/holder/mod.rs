//! A process of our own that holds descriptors, and does nothing else: `dormouse hold --socket PATH`.
//!
//! It keeps the VMs it is given apart by who serves them: a VM belongs to the connection that kept or took it, for as
//! long as that is open. The kernel closes it once the last thread of its process is gone, so no VM is ever given to
//! one process while another's last system calls on it are under way.

pub mod message;

mod client;
mod server;
mod socket;

use std::path::PathBuf;
use std::time::Duration;

pub use client::HolderKeeper;
pub use server::hold;

/// What the holder's process is told.
#[derive(Clone, Debug)]
pub struct HolderOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// It ends when it has held nothing, and nobody was connected, for this long.
    pub linger: Duration,
}

/// How a holder ended, or why it did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// There was nothing left to hold.
    Idle,
    /// Another one listens there already.
    AnotherIsThere,
}

/// Why a holder could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The path is longer than a Unix socket's may be.
    #[error("{0} is too long for a Unix socket: 107 bytes at most")]
    TooLong(PathBuf),
    /// Something that is not a socket is there; it is left alone.
    #[error("{0} exists and is not a socket: remove it yourself or choose another path")]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("holding descriptors at {path}: {what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The kernel's word.
        error: std::io::Error,
    },
}

#[cfg(test)]
#[path = "tests.rs"]
pub(crate) mod tests;
