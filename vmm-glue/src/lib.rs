//! Connects Dormouse to virtual-machine monitors: stock Firecracker, Cloud Hypervisor, and VMMs of one's own.
//!
//! | module | holds |
//! |---|---|
//! | [`guest`] | the guest program that fills, answers and verifies; the [`guest::Guest`] trait; its two hosts' common parts |
//! | [`minivm`] | a small VMM on `kvm-ioctls` and `vm-memory` that runs the guest program |
//! | [`embed`] | linking Dormouse into a VMM: standby and waking in `vm-memory`'s types |
//! | [`firecracker`] | the userfaultfd handshake, API client and process of stock Firecracker |
//! | [`kept_snapshot`] | the snapshot of a VM that outlives its server |
//! | [`opened`] | a snapshot opened so that machines wake from it, with its resume stream |
//! | [`records`] | what this host has seen of machines' working sets |
//! | [`cloud_hypervisor`] | the offload protocol of stock Cloud Hypervisor, both directions |
//!
//! Nothing here installs a page by itself: that is the business of `dormouse-restore`, which [`embed`] and
//! [`cloud_hypervisor`] put to work.
//!
//! All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

pub mod cloud_hypervisor;
pub mod embed;
pub mod firecracker;
pub mod guest;
pub mod kept_snapshot;
pub mod minivm;
pub mod opened;
pub mod records;
mod sys;

pub use dormouse_keeper as keeper;
