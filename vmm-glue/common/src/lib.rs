//! What the glue to every VMM has in common, and what belongs to none of them.
//!
//! | module | holds |
//! |---|---|
//! | [`dirty`] | runs of pages that a guest has written |
//! | [`http`] | a pure parser of HTTP/1.1 responses, with limits |
//! | [`http_client`] | a client for an HTTP API on a Unix socket |
//! | [`listener`] | a socket that only one user's processes may connect to |
//! | [`patient`] | a source of pages whose missing objects may come back |
//! | [`peer`] | who is at the other end of a connection |
//! | [`vmm_process`] | a VMM's process, held by a pidfd |
#![forbid(unsafe_code)]

pub mod dirty;
pub mod http;
pub mod http_client;
pub mod listener;
pub mod patient;
pub mod peer;
pub mod vmm_process;

pub use dirty::DirtyRun;
pub use http_client::{HttpClient, HttpError};
pub use listener::{HandshakeListener, ListenError};
pub use patient::Patient;
pub use peer::{Peer, peer_of};
pub use vmm_process::{VmmProcess, VmmProcessError};
