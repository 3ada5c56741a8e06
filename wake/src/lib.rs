//! Joins store and restore: a stored machine as what a restore wakes it from.
//!
//! | module | holds |
//! |---|---|
//! | [`stored_image`] | an image in a store, as a restore's source of pages |
//! | [`stored_disk`] | an image in a store, as the base of a disk |
//! | [`first_pages`] | a resume stream on its way into guest memory |
//! | [`recording`], [`coverage`] | what a session tells of what its machine needs first |
//! | [`prediction`], [`page_set`] | which pages come first next time |
//! | [`opened`] | a snapshot opened so that machines wake from it, with its resume stream |
//! | [`records`] | what this host has seen of machines' working sets |
//! | [`working_set`] | the pages a machine touched first, as a blob of its snapshot |
//! | [`kept_snapshot`] | the snapshot of a VM that outlives its server |
//!
//! It knows no VMM. It does no I/O of its own but for the records, which are files beside the host's caches.
#![forbid(unsafe_code)]

mod blocks;
pub mod coverage;
pub mod first_pages;
pub mod kept_snapshot;
pub mod opened;
pub mod page_set;
pub mod prediction;
pub mod recording;
pub mod records;
mod sink;
pub mod stored_disk;
pub mod stored_image;
pub mod working_set;

use dormouse_chunkstore::Snapshot;
use dormouse_core::ImageKind;

pub use coverage::{Coverage, HeldOut};
pub use first_pages::{FirstPages, FirstPagesSource, decode_workers};
pub use opened::{Opened, Sample, Waking, build_predicted_stream};
pub use page_set::PageSet;
pub use prediction::predict;
pub use recording::{PageByPage, Recording, SessionRecord};
pub use records::{Record, Records};
pub use stored_disk::StoredDisk;
pub use stored_image::{StoredImage, source_error};
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

/// Locks a mutex that no panic leaves half changed.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
