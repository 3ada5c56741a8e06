//! The crate's `unsafe` code, behind safe functions.

pub(crate) mod kick;
pub(crate) mod memslot;
pub(crate) mod xsave;
