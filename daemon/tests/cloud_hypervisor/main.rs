//! Cloud Hypervisor through the built binary, which talks to a VMM of the test's own: a process with Cloud
//! Hypervisor's API and its part of the offload protocol, both written from its documents.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod machine;
#[path = "../../../vmm-glue/tests/cloud_hypervisor/peer.rs"]
mod peer;
mod real;
mod sockets;
#[path = "../../../vmm-glue/tests/cloud_hypervisor/sys.rs"]
mod sys;
mod through_api;
mod vmm;
