//! Firecracker's process and what this host notes of it.

use std::{env, path::PathBuf};

pub(crate) use crate::commands::standby::{API_PATIENCE, VMSTATE, micros, process_at, tracking, vmm_failure};

/// Where this user's running things are: control sockets, and what is remembered of VMs until the next boot.
pub(crate) fn runtime_dir() -> PathBuf {
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir.join("dormouse"),
        _ if rustix::process::geteuid().is_root() => PathBuf::from("/run/dormouse"),
        _ => env::temp_dir().join(format!("dormouse-{}", rustix::process::geteuid().as_raw())),
    }
}
