//! The crate's `unsafe` code, behind safe functions.

pub(crate) mod program;
