//! Cloud Hypervisor's offload protocol against a peer written from its documents.
#![allow(clippy::unwrap_used, reason = "tests")]

mod ahead;
mod faults;
mod hostile;
mod peer;
mod round_trip;
mod scene;
mod sys;
