//! Brings a sleeping machine's memory back while the machine already runs.
//!
//! A VMM's guest memory is registered with a userfaultfd; the guest starts at once, and each page it
//! touches before the page is there stops that vCPU until this crate has installed it.
//!
//! What happens to a fault, and where to read about it:
//!
//! ```text
//!  guest touches an absent page
//!    -> kernel queues an event -> pump.rs reads it (REMOVE events are applied first)
//!    -> fault_loop.rs asks state.rs what to do, through table.rs
//!    -> serve.rs asks source.rs where the page is, fetches its frame once (frames.rs)
//!    -> fill.rs claims the page, or its whole run if the guest walks (locality.rs), and installs it (install.rs)
//!    -> the kernel wakes the vCPU
//!    -> rest.rs installs what else the image shows of that frame, once nobody waits
//! ```
//!
//! What comes without a fault, as from a resume stream, goes in by [`BulkInstaller`], in runs or in blocks of 2 MiB.
//!
//! Rules the code keeps, each with a test:
//! - A page that cannot be had correctly is waited for, poisoned, or the VM killed, never zero-filled ([`policy`]).
//! - A page the guest gave back reads as zero whatever order events arrive in ([`mod@state`]).
//! - Faults come before prefetch, always.
//! - The descriptor is never closed under a live VM ([`RestoreHandle`]).
//! - A process killed at any instant can be followed by another ([`kept`]).
//!
//! This crate knows no store, no cloud, no VMM protocol and no on-disk format: pages come through [`PageSource`].
#![deny(unsafe_code)]

pub mod counters;
pub mod error;
pub mod install;
pub mod kept;
pub mod outcome;
pub mod plan;
pub mod policy;
mod refusals;
pub mod session;
pub mod source;
pub mod state;
pub mod table;
pub mod timeline;
pub mod working_set;

mod bulk;
mod core;
mod failure;
mod fault_loop;
mod fill;
mod frames;
mod locality;
mod pump;
mod queue;
mod rest;
mod serve;
mod worker;

#[expect(unsafe_code, reason = "the one place where the kernel is called by address")]
pub mod sys;

pub use bulk::{BLOCK_PAGES, BulkInstaller};
pub use counters::{Counters, CountersSnapshot};
pub use error::RestoreError;
pub use kept::{KeptStates, KeptStatesError};
pub use plan::{PageRun, PageSize, Plan, PlanError, RegionSpec};
pub use policy::{FailClosed, Policy, Retry};
pub use refusals::Refusals;
pub use session::{DetachError, Restore, RestoreHandle, VmStopped};
pub use source::{
    Content, DecodedFrame, Extent, FrameBytes, FrameToken, PageSource, SourceError, SourceErrorKind,
};
pub use sys::mapping::Mapping;
pub use sys::memory::Memory;
pub use sys::staging::Staging;
pub use sys::uffd::{Uffd, UffdError, UffdOptions};
pub use timeline::{Histogram, Phase, TimelineReport};
pub use working_set::{WORKING_SET_PAGES_MAX, WorkingSet};
