//! A listener: the memory of one snapshot, for whichever Firecracker comes to a socket.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use dormouse_firecracker::{Handshake, HandshakeListener, Incoming, KeepWith, Session, SessionOptions};
use dormouse_wake::{Opened, kept_snapshot};
use serde_json::Value;

use super::{
    api::{ListenRequest, ListenerDocument, Origin},
    kept,
    state::Daemon,
    vm::now_unix_ms,
    wake,
};
use crate::{
    failure::Failure,
    machine::serving::{HANDSHAKE_PATIENCE, listen_failure, noted, refused, thread_failure},
    traces,
};

/// Between two looks whether to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A socket that is listened on.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) id: String,
    request: ListenRequest,
    snapshot: String,
    uid: u32,
    since_unix_ms: u64,
    served: AtomicU64,
    refused: AtomicU64,
    stopping: AtomicBool,
}

impl Listener {
    pub(super) fn document(&self) -> ListenerDocument {
        ListenerDocument {
            id: self.id.clone(),
            name: self.request.snapshot.clone(),
            snapshot: self.snapshot.clone(),
            socket: self.request.socket.clone(),
            uid: self.uid,
            since_unix_ms: self.since_unix_ms,
            served: self.served.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// Ends it, a moment later. VMs that came to it are served on.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// Begins to listen, or gives the listener that the same request made before. Whether it is new.
pub(super) fn listen(
    daemon: &Arc<Daemon>,
    request: ListenRequest,
) -> Result<(ListenerDocument, bool), Failure> {
    daemon.accepting()?;
    let (name, serving) = request.args()?;
    if let Some(same) = daemon.listeners().into_iter().find(|l| l.request == request && !l.is_stopping()) {
        return Ok((same.document(), false));
    }
    let opened = serving.open(&daemon.store, &name, true)?;
    let uid = request.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let socket = HandshakeListener::bind_for(&request.socket, uid).map_err(|e| listen_failure(&e))?;
    let incoming = Incoming::start(socket, HANDSHAKE_PATIENCE).map_err(|e| thread_failure(&e))?;
    let listener = Arc::new(Listener {
        id: format!("{name}-{}", daemon.short_name()),
        request,
        snapshot: opened.snapshot().reference().snapshot.to_string(),
        uid,
        since_unix_ms: now_unix_ms(),
        served: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
    });
    daemon.add_listener(&listener);
    let (for_thread, of_thread) = (daemon.clone(), listener.clone());
    let started = thread::Builder::new()
        .name("dm-listen".into())
        .spawn(move || take_all(&for_thread, &of_thread, &incoming, &opened, serving.options()));
    if let Err(error) = started {
        daemon.remove_listener(&listener.id);
        return Err(thread_failure(&error));
    }
    Ok((listener.document(), true))
}

fn take_all(
    daemon: &Arc<Daemon>,
    listener: &Listener,
    incoming: &Incoming,
    opened: &Opened,
    options: SessionOptions,
) {
    let _inside = tracing::info_span!("listener", id = %listener.id).entered();
    while !listener.is_stopping() {
        match incoming.next(LOOK_INTERVAL) {
            Some(Ok(handshake)) => {
                let taken = take(daemon, listener, handshake, opened, options);
                let counter = if taken.is_ok() { &listener.served } else { &listener.refused };
                counter.fetch_add(1, Ordering::Relaxed);
                if let Err(failure) = taken {
                    tracing::warn!(%failure, "a VM was refused");
                }
            }
            Some(Err(error)) => {
                listener.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "a peer was sent away");
            }
            None => {}
        }
    }
}

fn take(
    daemon: &Arc<Daemon>,
    listener: &Listener,
    handshake: Handshake,
    opened: &Opened,
    options: SessionOptions,
) -> Result<(), Failure> {
    let origin = Origin::Listener { listener: listener.id.clone() };
    let (vm, _) = daemon.enter(None, &listener.request.snapshot, origin, Value::Null)?;
    let _inside = vm.span().entered();
    let session = match &daemon.keeper {
        None => Session::wake(handshake, opened, options, noted()),
        Some(keeper) => {
            let (keeper, notes) = (keeper.clone(), kept::notes(&vm, None));
            let snapshot = kept_snapshot::note(opened.snapshot());
            let keep = KeepWith { keeper, snapshot, api_socket: None, notes };
            Session::wake_kept(handshake, opened, options, noted(), keep)
        }
    };
    let session = session.map_err(|refusal| {
        let failure = refused(&refusal, options.on_failure);
        wake::fail(daemon, &vm, &failure);
        failure
    })?;
    traces::tell(&vm.span(), "dormouse.snapshot", listener.snapshot.clone());
    vm.lock().snapshot = Some(listener.snapshot.clone());
    wake::serve(daemon, &vm, session)
}
