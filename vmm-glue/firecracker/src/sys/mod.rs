//! The crate's `unsafe` code, behind safe functions.
#![allow(unsafe_code)]

pub(crate) mod namespace;
#[cfg(test)]
pub(crate) mod userfaultfd;
