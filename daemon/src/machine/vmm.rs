//! Firecracker's process and what this host notes of it.

use std::{env, os::unix::net::UnixStream, path::PathBuf, time::Duration};

use dormouse_firecracker::{VmmProcess, tracking::Tracking};

use crate::failure::Failure;

/// What Firecracker's device state is called in a snapshot.
pub(crate) const VMSTATE: &str = "vmstate";
/// How long Firecracker may take over a request: a full snapshot copies all of the guest's memory.
pub(crate) const API_PATIENCE: Duration = Duration::from_secs(600);

/// The Firecracker that listens at `socket`.
pub(crate) fn process_at(socket: &std::path::Path) -> Result<VmmProcess, Failure> {
    let connection = UnixStream::connect(socket).map_err(|e| {
        Failure::new("vmm", format!("no Firecracker answers at {}: {e}; is it running?", socket.display()))
    })?;
    VmmProcess::of(&connection).map_err(|e| Failure::new("vmm", e.to_string()))
}

/// This host's memory of what dirty pages are counted from.
pub(crate) fn tracking() -> Result<Tracking, Failure> {
    let directory = runtime_dir();
    Tracking::open(&directory).map_err(|e| Failure::file("using", &directory, &e))
}

/// Where this user's running things are: control sockets, and what is remembered of VMs until the next boot.
pub(crate) fn runtime_dir() -> PathBuf {
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir.join("dormouse"),
        _ if rustix::process::geteuid().is_root() => PathBuf::from("/run/dormouse"),
        _ => env::temp_dir().join(format!("dormouse-{}", rustix::process::geteuid().as_raw())),
    }
}

pub(crate) fn vmm_failure(error: &dyn std::error::Error) -> Failure {
    Failure::new("vmm", error.to_string())
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
