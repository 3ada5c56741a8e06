//! Stock Firecracker: its userfaultfd handshake, its API, its process.
//!
//! On `PUT /snapshot/load` with a `Uffd` memory backend Firecracker connects to a socket and sends, once, the
//! list of its memory regions as JSON together with the userfaultfd that guards them
//! (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md` in firecracker-microvm/firecracker). It
//! keeps the connection open for as long as it lives, so that its end tells of Firecracker's.
//!
//! All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

pub mod api;
mod beside;
pub mod capture;
pub mod capture_files;
mod earlier;
pub mod handshake;
pub mod incoming;
pub mod jail;
pub mod kept_session;
pub mod machine;
pub mod memfile;
pub mod process;
pub mod room;
pub mod session;
mod shown;
mod sys;
pub mod tracking;
pub mod under_way;
pub mod vcpus;
mod watch;

pub use api::{ApiClient, ApiError, SnapshotKind};
pub use dormouse_core::OnFailure;
pub use dormouse_keeper::regions::{self, PageSize, Region, RegionsError, parse_regions};
pub use dormouse_vmm_common::{HandshakeListener, ListenError, VmmProcess, VmmProcessError};
pub use handshake::{Handshake, HandshakeError, accept_handshake};
pub use incoming::Incoming;
pub use jail::{Jail, JailError};
pub use kept_session::KeepWith;
pub use process::{ConsoleInput, Firecracker, FirecrackerOptions, ProcessError};
pub use session::{
    RECORD_WINDOW, Refusal, Session, SessionError, SessionOptions, SessionReport, StillServed,
};
pub use watch::Measured;
