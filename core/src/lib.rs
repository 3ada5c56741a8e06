//! Types, hashing and the on-disk format of Dormouse.
//!
//! This crate is pure: no I/O, no async, no `unsafe`. Every byte that Dormouse writes to a store is laid out
//! here and nowhere else; `docs/FORMAT.md` is the same in prose.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod content;
pub mod domain;
pub mod envelope;
pub mod error;
pub mod frame;
mod frame_prefix;
pub mod id;
pub mod identity;
pub mod keyring;
pub mod limits;
pub mod name;
pub mod pack;
pub mod page;
pub mod policy;
pub mod reference;
pub mod root;
pub mod section;
pub mod stream;
mod stream_builder;
pub mod wire;

pub use content::{SectionContent, blob_content};
pub use domain::{Domain, DomainId, DomainKey};
pub use error::FormatError;
pub use frame::{Codec, FrameRef};
pub use frame_prefix::FramePrefix;
pub use id::{ChunkId, Digest, FrameHash, PackId, RootId, SnapshotId};
pub use identity::Identity;
pub use keyring::Keyring;
pub use name::{ImageId, Name};
pub use pack::{PackBuilder, PackFooter, PackRef};
pub use page::*;
pub use policy::{OnFailure, Retry};
pub use reference::{Named, NewerGuest, Nonce, Reference, Tombstone};
pub use root::{BlobEntry, ImageEntry, ImageKind, Root, SectionEntry};
pub use section::{Section, SectionBuilder};
