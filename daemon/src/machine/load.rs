//! The Firecracker a VM is woken in: started or found, and loaded while its memory is served.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use dormouse_firecracker::{
    ApiClient, ApiError, ConsoleInput, Firecracker, FirecrackerOptions, Handshake, HandshakeListener,
    Incoming, Jail, Refusal, Session, VmmProcess, handshake::Peer, machine, memfile::MemFile,
};

use super::{
    serving::{HANDSHAKE_PATIENCE, listen_failure, thread_failure},
    vmm::{API_PATIENCE, process_at, vmm_failure},
    wake::{Timeline, Wake},
};
use crate::failure::Failure;

/// How long Firecracker may take to start, and to ask for its memory.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// The kind of failure of a VM that did not come for its memory.
const NOBODY_CAME: &str = "vmm";

/// A Firecracker, started here or found.
pub(super) struct Vmm {
    pub(super) api: ApiClient,
    pub(super) api_socket: PathBuf,
    /// Killed when dropped, until it is let go.
    pub(super) started: Option<Firecracker>,
}

/// Starts the Firecracker that `wake` names, or finds the one that has no guest yet.
pub(super) fn vmm(wake: &Wake, scratch: &Path, input: ConsoleInput, own_group: bool) -> Result<Vmm, Failure> {
    let api_socket = wake.api_socket.clone().unwrap_or_else(|| scratch.join("api.sock"));
    let started = match &wake.firecracker {
        None => None,
        Some(binary) => {
            let options = FirecrackerOptions {
                binary: binary.clone(),
                api_socket: api_socket.clone(),
                console: wake.console.clone().unwrap_or_else(|| "/dev/null".into()),
                input,
                log: None,
                own_group,
            };
            Some(Firecracker::spawn(&options, START_PATIENCE).map_err(|e| vmm_failure(&e))?)
        }
    };
    let api = ApiClient::new(&api_socket, API_PATIENCE);
    if started.is_none() && machine::is_running(&api).is_ok() {
        // Whose load failed is ended, so it is not even tried.
        let message = format!("the Firecracker at {} has a guest already", api_socket.display());
        return Err(Failure::new("vmm", message));
    }
    Ok(Vmm { api, api_socket, started })
}

/// Loads the device state into `vmm` while its memory is served. Firecracker reads guest memory on the way.
pub(super) fn load(
    wake: &Wake,
    vmm: &Vmm,
    socket: &Path,
    state: &[u8],
    serve: impl FnOnce(Handshake) -> Result<Session, Box<Refusal>>,
    timeline: &mut Timeline,
) -> Result<(Session, Incoming), Failure> {
    let process = process_at(&vmm.api_socket)?;
    // Dropped once all is loaded.
    let jail = Jail::of(&process).map_err(|e| vmm_failure(&e))?;
    let (listener, socket) = match &jail {
        None => (HandshakeListener::bind(socket), socket.to_owned()),
        Some(jail) => {
            let (listener, socket) = jail.listen("uffd.sock").map_err(|e| listen_failure(&e))?;
            (Ok(listener), socket)
        }
    };
    let listener = listener.map_err(|e| listen_failure(&e))?;
    let incoming = Incoming::start(listener, HANDSHAKE_PATIENCE).map_err(|e| thread_failure(&e))?;
    let state = match &jail {
        None => MemFile::holding("dormouse-vmstate", state),
        Some(jail) => jail.file_holding("vmstate", state),
    };
    let state = state.map_err(|e| Failure::new("memory", e.to_string()))?;
    let session = thread::scope(|scope| {
        let loading = scope
            .spawn(|| vmm.api.load_snapshot_uffd(&state.path_for_vmm(), &socket, wake.dirty_tracking, false));
        let session =
            wait_for_handshake(&incoming, process.peer(), || loading.is_finished()).and_then(|handshake| {
                timeline.mark("handshake");
                serve(handshake).map_err(|refusal| Failure::new("vm_refused", refusal.error.to_string()))
            });
        if let Err(failure) = &session
            && (vmm.started.is_some() || failure.kind != NOBODY_CAME)
        {
            // It would wait for its memory for ever, and so would the thread that loads it. One that was found and never
            // came for its memory may be running somebody else's guest by now: two may have asked for it at once.
            give_up(&process);
        }
        let loaded = loading.join().unwrap_or_else(|_| {
            Err(ApiError::Response {
                request: "PUT /snapshot/load".into(),
                what: "the thread that asked panicked".into(),
            })
        });
        match (session, loaded) {
            (Ok(session), Ok(())) => {
                timeline.mark("load");
                Ok(session)
            }
            (Ok(session), Err(error)) => {
                give_up(&process);
                Err(because(&session, &error))
            }
            // What Firecracker itself says is nearer to the cause than that it did not come.
            (Err(failure), Err(error @ ApiError::Refused { .. })) if failure.kind == NOBODY_CAME => {
                Err(vmm_failure(&error))
            }
            (Err(failure), _) => Err(failure),
        }
    })?;
    Ok((session, incoming))
}

/// The handshake of `expected`. Whoever else comes to the socket is not the VM.
fn wait_for_handshake(
    incoming: &Incoming,
    expected: Peer,
    gave_up: impl Fn() -> bool,
) -> Result<Handshake, Failure> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        // In this order: a VM that came and went on has a handshake waiting.
        let over = gave_up() || Instant::now() >= deadline;
        match incoming.next(if over { Duration::from_millis(200) } else { Duration::from_millis(5) }) {
            Some(Ok(handshake)) if handshake.peer.pid == expected.pid => return Ok(handshake),
            Some(Ok(handshake)) => {
                tracing::warn!(pid = handshake.peer.pid, "a peer that is not the VM was sent away");
            }
            Some(Err(error)) => tracing::warn!(%error, "a peer was sent away"),
            None if over => return Err(Failure::new(NOBODY_CAME, "Firecracker did not ask for its memory")),
            None => {}
        }
    }
}

/// Ends a VM that did not come up.
pub(super) fn give_up(process: &VmmProcess) {
    if let Err(error) = process.kill() {
        tracing::error!(pid = process.peer().pid, %error, "Firecracker cannot be killed: end it yourself");
    }
}

/// What Firecracker said, and what was wrong with its memory if anything was.
pub(super) fn because(session: &Session, error: &ApiError) -> Failure {
    match session.report().killed_because {
        Some(why) => {
            Failure::new("vm_killed", format!("Firecracker was killed rather than given a wrong page: {why}"))
        }
        None => vmm_failure(error),
    }
}
