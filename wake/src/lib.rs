//! Joins store and restore: a stored machine as what a restore wakes it from.
//!
//! | module | holds |
//! |---|---|
//! | [`opened`] | a snapshot opened so that machines wake from it, with its resume stream |
//! | [`records`] | what this host has seen of machines' working sets |
//! | [`working_set`] | the pages a machine touched first, as a blob of its snapshot |
//! | [`kept_snapshot`] | the snapshot of a VM that outlives its server |
//!
//! It knows no VMM. It does no I/O of its own but for the records, which are files beside the host's caches.
#![forbid(unsafe_code)]

pub mod kept_snapshot;
pub mod opened;
pub mod records;
pub mod working_set;

use dormouse_chunkstore::Snapshot;
use dormouse_core::ImageKind;

pub use opened::{Opened, Sample, Waking, build_predicted_stream};
pub use records::{Record, Records};
pub use working_set::{
    WORKING_SET_ID, WorkingSetError, build_stream, decode_working_set, encode_working_set, stored_working_set,
};

/// What the memory image of a machine is called in its snapshots, as `dormouse import --memory` calls it.
pub const MEMORY_ID: &str = "memory";

/// The place of the machine's memory among the snapshot's images.
pub fn memory_index(snapshot: &Snapshot) -> Option<u32> {
    let images = &snapshot.root().images;
    let at = images.iter().position(|i| i.kind == ImageKind::Memory && i.id.as_str() == MEMORY_ID);
    at.and_then(|at| u32::try_from(at).ok())
}
