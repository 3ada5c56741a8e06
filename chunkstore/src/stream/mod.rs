//! Resume streams: building them, and reading them as they arrive.

mod build;
mod fetch;
mod local;
mod parts;
mod read;

pub use self::{
    build::{StreamInfo, StreamReport, TouchedRun},
    local::Tier,
    read::{HotRun, InstallRun, Resume, ResumeStream},
};
