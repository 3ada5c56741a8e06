//! The crate's `unsafe` code, behind safe functions.
#![allow(unsafe_code)]

pub(crate) mod guest_mapping;
pub(crate) mod kick;
pub(crate) mod memslot;
pub(crate) mod namespace;
pub(crate) mod program;
#[cfg(test)]
pub(crate) mod userfaultfd;
pub(crate) mod xsave;
