//! The control socket, and the address where counts are read: who may connect, and how long they may take.

use std::{future::Future, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::Router;
use dormouse_firecracker::HandshakeListener;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::{failure::Failure, machine::serving::listen_failure};

/// Connections at a time. Further ones wait.
const CONNECTIONS_MAX: usize = 256;
/// How long a request's head may take, and how long a connection may be idle.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// After a connection could not be taken: out of descriptors, most likely.
const BREATH: Duration = Duration::from_millis(50);

/// A socket of mode 0600, removed when dropped.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    _file: HandshakeListener,
}

impl Control {
    /// Listens at `path`. A socket that nobody listens on is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, Failure> {
        let file = HandshakeListener::bind(path).map_err(|e| listen_failure(&e))?;
        let failed = |e: std::io::Error| Failure::file("listening on", path, &e);
        let socket = file.try_clone_socket().map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let listener = UnixListener::from_std(socket).map_err(failed)?;
        Ok(Control { listener, _file: file })
    }
}

/// Where peers connect.
pub(super) trait Peers: Send + Sync {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection.
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Why its peer is sent away.
    fn refusal(&self, stream: &Self::Stream) -> Option<String>;
}

impl Peers for Control {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    fn refusal(&self, stream: &UnixStream) -> Option<String> {
        may_ask(stream).err()
    }
}

/// An address where anybody who reaches it may read what is counted.
#[derive(Debug)]
pub(super) struct Counts(TcpListener);

impl Counts {
    /// Listens at `address`; where that is.
    pub(super) async fn bind(address: SocketAddr) -> Result<(Self, SocketAddr), Failure> {
        let failed = |error: io::Error| {
            Failure::new(
                "socket",
                format!("cannot listen at {address}: {error}; choose another with --metrics"),
            )
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let at = listener.local_addr().map_err(failed)?;
        Ok((Counts(listener), at))
    }
}

impl Peers for Counts {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.0.accept().await.map(|(stream, _)| stream)
    }

    fn refusal(&self, _: &TcpStream) -> Option<String> {
        None
    }
}

/// Answers requests until `end` says so; those that are being answered then are answered to their end.
pub(super) async fn answer(peers: impl Peers, router: Router, end: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let stream = tokio::select! {
            () = is_over(end.clone()) => break,
            accepted = peers.next() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(BREATH).await;
                    continue;
                }
            },
        };
        if let Some(why) = peers.refusal(&stream) {
            tracing::warn!(%why, "a peer was sent away");
            continue;
        }
        let slot = tokio::select! {
            () = is_over(end.clone()) => break,
            // The semaphore is never closed.
            slot = slots.clone().acquire_owned() => slot,
        };
        let (router, end) = (router.clone(), end.clone());
        connections.spawn(async move {
            let _slot = slot;
            converse(stream, router, end).await;
        });
    }
    drop(peers);
    connections.join_all().await;
}

/// Returns when `end` says so, or when nobody is left to say it.
async fn is_over(mut end: watch::Receiver<bool>) {
    let _ = end.wait_for(|end| *end).await;
}

/// The daemon's own user may ask, and root, who may do anything anyway.
fn may_ask(stream: &UnixStream) -> Result<(), String> {
    let peer = stream.peer_cred().map_err(|e| format!("its user cannot be told: {e}"))?;
    let ours = rustix::process::geteuid().as_raw();
    match peer.uid() {
        0 => Ok(()),
        uid if uid == ours => Ok(()),
        uid => Err(format!("it is user {uid}'s, and this daemon is user {ours}'s")),
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    end: watch::Receiver<bool>,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = is_over(end) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended badly");
    }
}
