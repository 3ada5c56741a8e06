//! Cloud Hypervisor's offload protocol: pure types, no VMM linked in.
//!
//! Offload is its *local live migration* spoken with a daemon (`docs/snapshot_restore.md` and
//! `vm-migration/src/protocol.rs` in cloud-hypervisor/cloud-hypervisor, v53 and later). To sleep, the VMM
//! sends and the daemon receives; to wake, the other way round:
//!
//! ```text
//! Start, MemoryFd (one per memory slot, with a memfd), Config, State, Complete or CompletePaused
//! ```
//! Each request is answered by a response before the next. The daemon may answer the last one of a sleeping
//! VM only when all memory is safe: the VMM ends on that answer, and the memfds are all that is left. To wake
//! on demand, the daemon opens a second connection between `Config` and `State`, whose first two bytes are
//! [`protocol::FAULT_ROLE`]; on it the VMM sends `PageFault` requests, each answered when the pages are in
//! the memfd.

pub mod memory;
pub mod protocol;

pub use memory::{MemorySlot, MemorySlotsError, memory_slots};
pub use protocol::{Command, GuestRange, ProtocolError, Request, Response, SleepSequence};
