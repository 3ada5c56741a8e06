//! Resume streams: building them, and reading them as they arrive.

mod build;
mod fetch;
mod parts;
mod read;

pub use self::{
    build::{STREAM_LEVEL, StreamReport, TouchedRun},
    read::{HotRun, HotStream, InstallRun, Resume, ResumeStream},
};
