//! A client for a VMM's API: HTTP/1.1 with JSON over a Unix socket, one connection per request.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::http::{Response, parse_response};

/// A client of one VMM.
#[derive(Clone, Debug)]
pub struct HttpClient {
    socket: PathBuf,
    timeout: Duration,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The VMM refused.
    #[error("the VMM refused {request} with status {status}: {said}")]
    Refused {
        /// Method and path.
        request: String,
        /// HTTP status.
        status: u16,
        /// Its own words.
        said: String,
    },
    /// What came back is not a response it could have sent.
    #[error("{request}: the answer is not a VMM's: {what}")]
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

impl HttpClient {
    /// A client of the VMM at `socket`. A request may take `timeout`, connecting excluded.
    pub fn new(socket: &Path, timeout: Duration) -> Self {
        Self { socket: socket.to_owned(), timeout }
    }

    /// `GET` of any path, as JSON.
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn get(&self, path: &str) -> Result<Value, HttpError> {
        self.request("GET", path, None)
    }

    /// `PUT` of any path.
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn put(&self, path: &str, body: &Value) -> Result<(), HttpError> {
        self.request("PUT", path, Some(body)).map(drop)
    }

    /// Any request; the response's body as JSON, `null` if it has none.
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, HttpError> {
        let request = format!("{method} {path}");
        let deadline = Instant::now() + self.timeout;
        let exchange = || -> io::Result<Vec<u8>> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_write_timeout(Some(self.timeout.max(Duration::from_millis(1))))?;
            stream.write_all(&request_bytes(method, path, body))?;
            read_response(&mut stream, deadline)
        };
        let bytes = exchange().map_err(|source| HttpError::Io {
            request: request.clone(),
            socket: self.socket.clone(),
            source,
        })?;
        let response = parse_response(&bytes)
            .and_then(|r| r.ok_or_else(|| format!("it was cut short after {} bytes", bytes.len())))
            .map_err(|what| HttpError::Response { request: request.clone(), what })?;
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

fn interpret(request: String, response: &Response) -> Result<Value, HttpError> {
    let json = if response.body.is_empty() {
        Ok(Value::Null)
    } else {
        serde_json::from_slice::<Value>(&response.body)
    };
    match (response.status, json) {
        (200..=299, Ok(value)) => Ok(value),
        (200..=299, Err(error)) => Err(HttpError::Response { request, what: error.to_string() }),
        (status, json) => {
            let said = json.ok().and_then(|v| Some(v.get("fault_message")?.as_str()?.to_owned()));
            let raw = || String::from_utf8_lossy(&response.body).chars().take(500).collect();
            Err(HttpError::Refused { request, status, said: said.unwrap_or_else(raw) })
        }
    }
}

#[cfg(test)]
#[path = "http_client_tests.rs"]
mod tests;
