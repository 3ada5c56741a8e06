//! A client for Firecracker's API: HTTP/1.1 with JSON over a Unix socket, one connection per request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_vmm_common::{HttpClient, HttpError};
use serde_json::{Value, json};

/// A client of one Firecracker.
#[derive(Clone, Debug)]
pub struct ApiClient {
    http: HttpClient,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Firecracker refused.
    #[error("Firecracker refused {request} with status {status}: {fault_message}")]
    Refused {
        /// Method and path.
        request: String,
        /// HTTP status.
        status: u16,
        /// Its own words.
        fault_message: String,
    },
    /// What came back is not a response it could have sent.
    #[error("{request}: the answer is not Firecracker's: {what}")]
    Response {
        /// Method and path.
        request: String,
        /// What is wrong.
        what: String,
    },
    /// The socket failed.
    #[error("{request} over {socket}: {source}")]
    Io {
        /// Method and path.
        request: String,
        /// The API socket.
        socket: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// What a snapshot holds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// The pages dirtied since the last snapshot; needs `track_dirty_pages`.
    Diff,
}

impl ApiClient {
    /// A client of the Firecracker at `socket`. A request may take `timeout`, connecting excluded.
    pub fn new(socket: &Path, timeout: Duration) -> Self {
        Self { http: HttpClient::new(socket, timeout) }
    }

    /// `PUT /machine-config`.
    ///
    /// # Errors
    /// [`ApiError`], here and below.
    pub fn machine_config(&self, memory_mib: u64, track_dirty: bool) -> Result<(), ApiError> {
        let body = json!({"vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": track_dirty});
        self.put("/machine-config", &body)
    }

    /// `PUT /boot-source` with an ELF kernel.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn boot_source(&self, kernel: &Path) -> Result<(), ApiError> {
        self.put("/boot-source", &json!({"kernel_image_path": kernel}))
    }

    /// `PUT /actions`: starts the guest.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn start(&self) -> Result<(), ApiError> {
        self.put("/actions", &json!({"action_type": "InstanceStart"}))
    }

    /// `PATCH /vm`: pauses the guest.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn pause(&self) -> Result<(), ApiError> {
        self.request("PATCH", "/vm", Some(&json!({"state": "Paused"}))).map(drop)
    }

    /// `PATCH /vm`: lets the guest go on.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn resume(&self) -> Result<(), ApiError> {
        self.request("PATCH", "/vm", Some(&json!({"state": "Resumed"}))).map(drop)
    }

    /// `PUT /snapshot/create`, of a paused guest. Paths are as Firecracker sees them.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn create_snapshot(&self, kind: SnapshotKind, state: &Path, memory: &Path) -> Result<(), ApiError> {
        let kind = match kind {
            SnapshotKind::Full => "Full",
            SnapshotKind::Diff => "Diff",
        };
        let body = json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory});
        self.put("/snapshot/create", &body)
    }

    /// `PUT /snapshot/load` with pages served over the userfaultfd socket `uffd`; Firecracker connects to it
    /// before this returns.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn load_snapshot_uffd(
        &self,
        state: &Path,
        uffd: &Path,
        track_dirty: bool,
        resume: bool,
    ) -> Result<(), ApiError> {
        self.load_snapshot(state, "Uffd", uffd, track_dirty, resume)
    }

    /// `PUT /snapshot/load` with memory from a raw file.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn load_snapshot_file(
        &self,
        state: &Path,
        memory: &Path,
        track_dirty: bool,
        resume: bool,
    ) -> Result<(), ApiError> {
        self.load_snapshot(state, "File", memory, track_dirty, resume)
    }

    fn load_snapshot(
        &self,
        state: &Path,
        backend: &str,
        path: &Path,
        track_dirty: bool,
        resume: bool,
    ) -> Result<(), ApiError> {
        // Known to 1.12 by this name; later versions still take it.
        let body = json!({
            "snapshot_path": state,
            "mem_backend": {"backend_type": backend, "backend_path": path},
            "enable_diff_snapshots": track_dirty,
            "resume_vm": resume,
        });
        self.put("/snapshot/load", &body)
    }

    /// `GET` of any path, as JSON.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn get(&self, path: &str) -> Result<Value, ApiError> {
        Ok(self.http.get(path)?)
    }

    /// `PUT` of any path.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn put(&self, path: &str, body: &Value) -> Result<(), ApiError> {
        Ok(self.http.put(path, body)?)
    }

    /// Any request; the response's body as JSON, `null` if it has none.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        Ok(self.http.request(method, path, body)?)
    }
}

impl From<HttpError> for ApiError {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Refused { request, status, said } => {
                ApiError::Refused { request, status, fault_message: said }
            }
            HttpError::Response { request, what } => ApiError::Response { request, what },
            HttpError::Io { request, socket, source } => ApiError::Io { request, socket, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_firecrackers_words() {
        let refused =
            HttpError::Refused { request: "PUT /vm".to_owned(), status: 400, said: "because".to_owned() };
        let error = ApiError::from(refused).to_string();
        assert_eq!(error, "Firecracker refused PUT /vm with status 400: because");
    }
}
