//! Content-addressed page store on plain object storage.
//!
//! Writes go: image -> hash -> dedup -> frame -> pack -> object store -> reference. Reads go: reference -> root ->
//! section -> frame, each verified against the hash that refers to it before it is decoded.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod announce;
pub mod backend;
mod cancel;
mod conditions;
mod disk_cache;
mod error;
mod export;
mod frame_cache;
mod gc;
mod identity;
mod import;
mod index;
mod keyring;
mod keys;
mod meta_packs;
#[cfg(test)]
mod misbehaving;
mod near_frame;
mod new_root;
mod page_cache;
mod parallel;
mod progress;
mod refs;
mod repack;
mod settle;
mod similar;
mod snapshot;
mod store;
mod stream;
mod tail;
mod usage;
mod verify;

pub use error::{Result, StoreError};
pub use export::ExportTarget;
pub use frame_cache::DecodedFrame;
pub use gc::{DEFAULT_GRACE, GcOptions, GcReport};
pub use import::{
    BlobBytes, BlobSource, DEFAULT_LEVEL, Dirty, ImageSource, ImportReport, ImportRequest, SECTION_PACKS_MAX,
};
pub use keyring::{KeyList, KnownKey, RotateReport, random_key};
pub use near_frame::NearFrame;
pub use progress::{NoProgress, Progress};
pub use repack::{DENSE_LEVEL, RepackOptions, RepackReport};
pub use settle::{Settled, Standing};
pub use snapshot::{FramePlace, Image, Pages, Snapshot};
pub use store::{Store, StoreOptions};
pub use stream::{HotRun, InstallRun, Resume, ResumeStream, StreamInfo, StreamReport, Tier, TouchedRun};
pub use usage::{ImageSummary, Scatter, SnapshotSummary, SnapshotUsage, StateSummary, Usage, UsageReport};
pub use verify::{
    Damage, RepairOptions, RepairReport, Repaired, Source as RepairSource, Unreadable, UnreadableKind,
    VerifyDepth, VerifyReport,
};
