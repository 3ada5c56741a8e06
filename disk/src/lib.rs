//! Copy-on-write disks: an image of a snapshot, read lazily, under a local overlay that takes the writes.
//!
//! The design, the byte tables and the crash rules are in `docs/DISKS.md`.
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | where pages of the base come from: a trait, implemented by whoever has a store |
//! | [`fetch`] | threads that wait for the base; single flight, retries, read-ahead |
//! | [`states`] | which pages a layer holds: absent, present or zero; pure |
//! | [`map`] | the overlay's map file: codec and recovery, pure functions over bytes |
//! | [`mod@file`] | the files of an overlay behind a trait, so that tests can lose what was not synced |
//! | `layer` | one overlay layer: a data file, its map and its flush protocol |
//! | `stack` | which layers a directory holds, and what a crash left behind |
//! | [`disk`] | reads, writes, discards, flushes and seals over a stack of layers |
//! | [`budget`] | local space that several disks share |
//! | [`nbd`] | a front end: NBD over a Unix socket |
//!
//! This crate knows no VMM and no store.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod budget;
pub mod disk;
mod error;
pub mod fetch;
pub mod file;
mod layer;
pub mod map;
pub mod nbd;

pub mod source;
mod stack;
pub mod states;

pub use disk::{Disk, DiskOptions, Policy, SealedLayer, SectorKind};
pub use error::{DiskError, Result};
pub use map::Identity;
