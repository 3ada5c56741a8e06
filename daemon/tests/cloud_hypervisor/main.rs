//! Cloud Hypervisor through the built binary, which talks to a VMM of the test's own: a process with Cloud
//! Hypervisor's API and its part of the offload protocol, both written from its documents.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

#[path = "../firecracker/held_store.rs"]
#[expect(dead_code, reason = "what else it can do is for other tests")]
mod held_store;
mod in_doubt;
mod machine;
#[path = "../../../vmm-glue/cloud-hypervisor/tests/cloud_hypervisor/peer.rs"]
mod peer;
mod real;
/// Where a store for tests looks for it.
mod scene {
    pub(crate) use crate::vmm::wait_until;
}
#[path = "../firecracker/slow_s3.rs"]
#[expect(dead_code, reason = "what else it can do is for other tests")]
mod slow_s3;
mod sockets;
#[path = "../../../vmm-glue/cloud-hypervisor/tests/cloud_hypervisor/sys.rs"]
mod sys;
mod through_api;
mod vmm;
