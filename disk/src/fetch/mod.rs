//! Waits for the base on behalf of disks: single flight, retries, deadlines, read-ahead.
//!
//! A disk's request never calls a source that may block. It asks for a *flight*, which a thread of [`Fetchers`] carries
//! out, and waits for it no longer than its policy says; the flight goes on and serves whoever asks next.

mod base;
mod flight;
mod pool;
mod read_ahead;

pub(crate) use base::Base;
pub use base::Counters;
pub use pool::Fetchers;
