//! Types, hashing and the on-disk format of Dormouse.
//!
//! This crate is pure: no I/O, no async, no `unsafe`. Every byte that Dormouse writes to a store is laid out
//! here and nowhere else; `docs/FORMAT.md` is the same in prose.
#![forbid(unsafe_code)]

pub mod page;

pub use page::*;
