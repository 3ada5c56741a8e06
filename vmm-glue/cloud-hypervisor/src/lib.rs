//! Cloud Hypervisor's offload protocol, both directions, no VMM linked in.
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
//!
//! | module | holds |
//! |---|---|
//! | [`protocol`] | heads, ranges and the order of requests: pure |
//! | [`memory`] | which memory slot lies where, and in which image it is stored: pure |
//! | [`wire`] | bounded, patient reading and writing of the above |
//! | [`mod@receive`] | a VM that goes to sleep: its memfds, configuration and state |
//! | [`send`] | a VM that wakes: the same, the other way round |
//! | [`stored`] | such a VM in a store |
//! | [`wake`] | waking it, eagerly or on demand |
//! | [`on_demand`] | its memory, page by page, through `dormouse-restore` |
//! | `ahead` | what a VM is given before it asks |
//! | `pace` | how fast a VMM that goes through its memory is answered: pure |
//! | `shown` | pages that the VMM has before it asks for any |
//! | [`learned`] | what a session teaches for the next one |
//! | `touched` | what the guest touched, from the order in which its VMM asks: pure |
//! | [`counts`] | what it asked for, and what was done for it |
//! | [`fault_server`] | the connection on which it asks for pages |
//! | [`api`] | the VMM's HTTP API |

mod ahead;
pub mod api;
pub mod counts;
mod ending;
pub mod fault_server;
mod filling;
pub mod learned;
pub mod memory;
pub mod on_demand;
mod on_demand_error;
mod pace;
pub mod protocol;
pub mod receive;
pub mod send;
mod shown;
pub mod stored;
mod touched;
pub mod wake;
pub mod wire;

pub use api::{VmmApi, VmmApiError};
pub use fault_server::{FaultServer, OnDemandReport};
pub use memory::{MemorySlot, MemorySlotsError, memory_slots};
pub use on_demand::{OnDemand, OnDemandError, WakeOptions};
pub use protocol::{Command, GuestRange, ProtocolError, Request, Response, SleepSequence};
pub use receive::{ReceiveError, Received, receive};
pub use send::{SendError, Sender};
pub use stored::{StoredError, StoredVm};
pub use wake::{WakeError, wake_eagerly, wake_on_demand};
pub use wire::{Wire, WireError};
