//! The kernel and raw memory, behind types that cannot be misused.
//!
//! An install takes a registered region and a range checked against it, never an address. Each `unsafe` block
//! says why it is sound; nothing outside this module has one.

mod abi;
pub mod event;
pub mod mapping;
pub mod memory;
pub mod region;
pub mod shared_file;
pub mod staging;
pub mod uffd;
