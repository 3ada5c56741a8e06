//! Drives the built binary as people and scripts do. One test binary, so that it is linked once.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod attach;
mod command_line;
mod damage;
mod files;
mod home;
mod keys;
mod real_guests;
mod round_trip;
mod s3;
mod signals;
