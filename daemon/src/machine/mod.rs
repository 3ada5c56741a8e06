//! The service as a library: what wakes machines and serves them, without a command line and without HTTP.
//!
//! | file | holds |
//! |---|---|
//! | `wake.rs` | [`wake::wake`]: a snapshot runs again in a Firecracker |
//! | `load.rs` | the Firecracker it is woken in: started or found, and loaded while its memory is served |
//! | `serving.rs` | how its memory is served, and what becomes of a VM that cannot be |
//! | `vmm.rs` | Firecracker's process, and what this host notes of it |
//!
//! Commands and the service both call it, with its own types. Standby is not here yet.

pub(crate) mod load;
pub(crate) mod serving;
pub(crate) mod vmm;
pub(crate) mod wake;
