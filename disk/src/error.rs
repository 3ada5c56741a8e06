//! What can go wrong with a disk, by what its user would do about it.

use std::{io, sync::Arc, time::Duration};

use crate::{map::MapError, source::SourceError};

/// A result of this crate.
pub type Result<T, E = DiskError> = std::result::Result<T, E>;

/// Why a disk could not be opened, or a request not be done.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The request is not within the disk.
    #[error("{length} bytes at {offset} are not within the disk of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Size of the disk.
        size: u64,
    },
    /// A write to a disk that takes none.
    #[error("the disk is attached read-only")]
    ReadOnly,
    /// The base did not answer in time. Passing: the same request may succeed later.
    #[error("the base did not answer within {waited:?}; the disk goes on, ask again: {last}")]
    Unavailable {
        /// How long was waited.
        waited: Duration,
        /// What the last try said.
        last: String,
    },
    /// The base has the page no more, or has it damaged. Permanent until the store is repaired.
    #[error("the base cannot give the page; `dormouse verify` says more: {0}")]
    Base(#[source] SourceError),
    /// A file of the overlay failed.
    #[error("{what} the overlay failed: {source}")]
    Io {
        /// What was done: a word such as "reading".
        what: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A sync failed earlier, so nobody knows what of the writes since the flush before is on the disk. Permanent: flushed
    /// data can be read; to write again, attach the disk anew.
    #[error(
        "a sync of the overlay failed, so no write or flush is acknowledged any more; what was flushed before can \
         be read, and is what the disk has after it is attached anew: {0}"
    )]
    Poisoned(#[source] Arc<io::Error>),
    /// No local space came free in time. Passing.
    #[error("no local space for the overlay within {waited:?}; make room, then ask again")]
    Full {
        /// How long was waited.
        waited: Duration,
    },
    /// Sealed overlays that wait for upload already fill most of the local space. Passing.
    #[error(
        "sealed overlays that wait for upload hold {held_bytes} bytes of local space; wait for the upload"
    )]
    SealsWait {
        /// Bytes that overlays hold.
        held_bytes: u64,
    },
    /// Another process has the overlay open.
    #[error("another process has this overlay open; detach the disk there first")]
    Busy,
    /// The overlay belongs to another base, image, size or later owner. Nothing was changed.
    #[error("this overlay belongs to {0}; attach it there, or choose another directory")]
    OtherOwner(String),
    /// The overlay's map cannot be trusted. Nothing was changed.
    #[error(
        "layer {layer} of the overlay is damaged: {why}; restore it from a copy, or give it up explicitly"
    )]
    Damaged {
        /// The layer's number.
        layer: u64,
        /// What is wrong.
        why: String,
    },
    /// The overlay was written by a later version. Nothing was changed.
    #[error("the overlay needs a newer dormouse: {0}")]
    Foreign(#[source] MapError),
    /// The disk cannot be described in an overlay.
    #[error("this disk can have no overlay: {0}")]
    Identity(#[source] dormouse_core::FormatError),
}

impl DiskError {
    /// Whether the same request may succeed later without anybody repairing anything.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            DiskError::Unavailable { .. }
                | DiskError::Full { .. }
                | DiskError::SealsWait { .. }
                | DiskError::Busy
        )
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| DiskError::Io { what, source: Arc::new(source) }
    }
}
