//! `standby cloud-hypervisor` and `resume cloud-hypervisor`: stock Cloud Hypervisor through its offload protocol.

pub(crate) mod resume;
pub(crate) mod standby;

use std::{io, path::Path, path::PathBuf, time::Duration};

use crate::failure::Failure;

/// How long Cloud Hypervisor may take over one message: it restores a whole VM before it answers some.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(600);
/// How long it may take over a request to its API, which waits for all of a resume.
const API_PATIENCE: Duration = Duration::from_secs(3600);

/// `path`, as Cloud Hypervisor can find it wherever it runs.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| Failure::file("using", path, &e))
}

/// A directory for sockets that nobody else can reach, gone with the value.
fn scratch() -> Result<tempfile::TempDir, Failure> {
    let made = tempfile::Builder::new().prefix("dormouse-").tempdir();
    made.map_err(|e| Failure::file("using", &std::env::temp_dir(), &e))
}

fn vmm_failure(error: &dyn std::error::Error) -> Failure {
    Failure::new("vmm", error.to_string())
}

fn waiting_failure(error: &io::Error) -> Failure {
    Failure::new("vmm", format!("waiting for Cloud Hypervisor: {error}"))
}
