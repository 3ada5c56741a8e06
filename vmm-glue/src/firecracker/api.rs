//! A client for Firecracker's API: HTTP/1.1 with JSON over a Unix socket, one connection per request.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http::{Response, parse_response};

/// A client of one Firecracker.
#[derive(Clone, Debug)]
pub struct ApiClient {
    socket: PathBuf,
    timeout: Duration,
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
        Self { socket: socket.to_owned(), timeout }
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
        self.request("GET", path, None)
    }

    /// `PUT` of any path.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn put(&self, path: &str, body: &Value) -> Result<(), ApiError> {
        self.request("PUT", path, Some(body)).map(drop)
    }

    /// Any request; the response's body as JSON, `null` if it has none.
    #[expect(clippy::missing_errors_doc, reason = "see machine_config")]
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let request = format!("{method} {path}");
        let deadline = Instant::now() + self.timeout;
        let exchange = || -> io::Result<Vec<u8>> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_write_timeout(Some(self.timeout.max(Duration::from_millis(1))))?;
            stream.write_all(&request_bytes(method, path, body))?;
            read_response(&mut stream, deadline)
        };
        let bytes = exchange().map_err(|source| ApiError::Io {
            request: request.clone(),
            socket: self.socket.clone(),
            source,
        })?;
        let response = parse_response(&bytes)
            .and_then(|r| r.ok_or_else(|| format!("it was cut short after {} bytes", bytes.len())))
            .map_err(|what| ApiError::Response { request: request.clone(), what })?;
        interpret(request, &response)
    }
}

fn request_bytes(method: &str, path: &str, body: Option<&Value>) -> Vec<u8> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut out = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    if !body.is_empty() {
        out += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    (out + "\r\n" + &body).into_bytes()
}

fn read_response(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    // A response too long or malformed ends the reading too: the caller parses again and says what it is.
    while matches!(parse_response(&bytes), Ok(None)) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

fn interpret(request: String, response: &Response) -> Result<Value, ApiError> {
    let json = if response.body.is_empty() {
        Ok(Value::Null)
    } else {
        serde_json::from_slice::<Value>(&response.body)
    };
    match (response.status, json) {
        (200..=299, Ok(value)) => Ok(value),
        (200..=299, Err(error)) => Err(ApiError::Response { request, what: error.to_string() }),
        (status, json) => {
            let said = json.ok().and_then(|v| Some(v.get("fault_message")?.as_str()?.to_owned()));
            let raw = || String::from_utf8_lossy(&response.body).chars().take(500).collect();
            Err(ApiError::Refused { request, status, fault_message: said.unwrap_or_else(raw) })
        }
    }
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
