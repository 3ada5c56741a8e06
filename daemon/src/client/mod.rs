//! The other end of the daemon's control socket.

pub(crate) mod resume;

use std::{
    io::ErrorKind,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use clap::Args;
use dormouse_chunkstore::backend::open_url;
use dormouse_firecracker::VmmProcess;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    context::{self, Context},
    failure::Failure,
    serve::{answer::ErrorBody, api::Health},
};

/// Names the control socket.
pub(crate) const CONTROL_VARIABLE: &str = "DORMOUSE_CONTROL";
/// Most bytes of an answer: a million snapshots' listing.
const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Where the daemon is looked for.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ControlArgs {
    /// Ask the daemon at this socket [default: $XDG_RUNTIME_DIR/dormouse/control.sock, if one answers]
    #[arg(long, value_name = "PATH", env = CONTROL_VARIABLE)]
    control: Option<PathBuf>,
}

/// Where the daemon is looked for, by a command that does without one too.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct MaybeDaemon {
    #[command(flatten)]
    control: ControlArgs,

    /// Do it here, even if a daemon answers
    #[arg(long)]
    no_daemon: bool,
}

/// Where a daemon listens unless told otherwise.
pub(crate) fn default_control() -> PathBuf {
    context::runtime_dir().join("control.sock")
}

/// A daemon that answers.
#[derive(Debug)]
pub(crate) struct Client {
    control: PathBuf,
}

impl MaybeDaemon {
    /// The daemon to ask, if there is one for the same store and key.
    ///
    /// # Errors
    /// One was named and cannot be asked.
    pub(crate) fn find(&self, context: &Context) -> Result<Option<Client>, Failure> {
        if self.no_daemon {
            return Ok(None);
        }
        match (self.control.find(context), &self.control.control) {
            (Ok(client), _) => Ok(Some(client)),
            (Err(failure), Some(_)) => Err(failure),
            (Err(failure), None) => {
                if failure.kind == "other_daemon" {
                    tracing::warn!(%failure, "the daemon is not asked");
                } else {
                    tracing::debug!(%failure, "no daemon is asked");
                }
                Ok(None)
            }
        }
    }
}

impl ControlArgs {
    /// The daemon.
    ///
    /// # Errors
    /// None answers, or it serves another store.
    pub(crate) fn find(&self, context: &Context) -> Result<Client, Failure> {
        let client = Client { control: self.control.clone().unwrap_or_else(default_control) };
        let health: Health = client.get("/v1/health")?;
        let url = open_url(&context.store_url()?)?.url().to_owned();
        let key_id = context.store_options()?.key.map(|key| key.id().to_string());
        let at = client.control.display();
        if health.store != url {
            let message = format!("the daemon at {at} serves the store {}, not {url}", health.store);
            return Err(Failure::new("other_daemon", message));
        }
        if health.key_id != key_id {
            return Err(Failure::new("other_daemon", format!("the daemon at {at} has another key")));
        }
        Ok(client)
    }
}

impl Client {
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::GET, path, Vec::new())
    }

    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|e| Failure::new("bug", e.to_string()))?;
        self.ask(Method::POST, path, body)
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, Failure> {
        let stream = connect(&self.control)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Failure::new("threads", e.to_string()))?;
        let lost = |why: String| {
            let at = self.control.display();
            let message =
                format!("the daemon at {at} was lost ({why}); what was asked for may have been done");
            Failure { retryable: true, ..Failure::new("daemon", message) }
        };
        let (ok, bytes) = runtime.block_on(exchange(stream, method, path, body)).map_err(lost)?;
        if !ok {
            let error: ErrorBody = serde_json::from_slice(&bytes).map_err(|e| lost(e.to_string()))?;
            return Err(error.into());
        }
        serde_json::from_slice(&bytes).map_err(|e| lost(e.to_string()))
    }
}

fn connect(control: &Path) -> Result<UnixStream, Failure> {
    let at = control.display();
    let stream = UnixStream::connect(control).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            Failure::new("no_daemon", format!("no daemon answers at {at}; `dormouse serve` starts one"))
        }
        _ => Failure::new("no_daemon", format!("the daemon at {at} cannot be asked: {e}")),
    })?;
    // Whoever can make a socket where it is looked for could otherwise acknowledge what was never done.
    let peer = VmmProcess::of(&stream).map_err(|e| Failure::new("no_daemon", e.to_string()))?.peer();
    if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
        let message = format!("who listens at {at} is user {}, who is not trusted with this", peer.uid);
        return Err(Failure::new("no_daemon", message));
    }
    Ok(stream)
}

/// Whether it succeeded, and the body.
async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(bool, Bytes), String> {
    stream.set_nonblocking(true).map_err(|e| e.to_string())?;
    let stream = tokio::net::UnixStream::from_std(stream).map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "dormouse")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body))
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let ok = response.status().is_success();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok((ok, body.map_err(|e| e.to_string())?.to_bytes()))
}
