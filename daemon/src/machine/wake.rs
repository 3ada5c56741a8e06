//! Waking: a snapshot runs again in a Firecracker, and this process serves its memory.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use dormouse_chunkstore::{Snapshot, Standing, Store};
use dormouse_core::Name;
use dormouse_firecracker::{ConsoleInput, Firecracker, Incoming, KeepWith, Session, tracking::Base};
use dormouse_keeper::Keeper;
use dormouse_wake::{Opened, kept_snapshot};
use serde::{Deserialize, Serialize};

use super::{
    load::{because, give_up, load, vmm},
    serving::{Serving, noted},
    vmm::{VMSTATE, micros, tracking},
};
use crate::{failure::Failure, traces};

/// What is to be woken, and in which Firecracker.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    /// The snapshot.
    pub(crate) name: Name,
    /// Start this Firecracker; without it, use the one that listens at `api_socket` and has no guest yet.
    pub(crate) firecracker: Option<PathBuf>,
    /// Firecracker's API socket; by default among the scratch files.
    pub(crate) api_socket: Option<PathBuf>,
    /// The file that the standard output of a started Firecracker goes to.
    pub(crate) console: Option<PathBuf>,
    /// Whether Firecracker tracks dirty pages, so that the next standby captures what changed.
    pub(crate) dirty_tracking: bool,
    /// Whether it is woken even if a guest elsewhere is newer and was to replace it.
    pub(crate) older: bool,
    /// How its memory is served.
    pub(crate) serving: Serving,
}

/// What is told of a VM that woke.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Document {
    pub(crate) name: String,
    pub(crate) snapshot: String,
    pub(crate) pid: i32,
    pub(crate) api_socket: PathBuf,
    /// Pages that the resume stream brings; without one, nothing.
    #[serde(default)]
    pub(crate) stream_pages: Option<u64>,
    /// From the request until the guest ran.
    pub(crate) resumed_us: u64,
    /// What had happened when, from the request on.
    pub(crate) phases: Vec<Phase>,
}

/// An instant of a resume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) at_us: u64,
}

/// Notes what has happened.
pub(super) struct Timeline {
    begun: Instant,
    phases: Vec<Phase>,
    traced: traces::Phases,
}

impl Timeline {
    fn begin() -> Self {
        Timeline { begun: Instant::now(), phases: Vec::new(), traced: traces::Phases::begin() }
    }

    pub(super) fn mark(&mut self, name: &'static str) {
        self.traced.over(name);
        self.phases.push(Phase { name: name.into(), at_us: micros(self.begun.elapsed()) });
    }
}

impl Timeline {
    /// Adds what the restore has noted since the handshake, where it began.
    fn add_restore(&mut self, session: &Session) {
        let begun = self.phases.iter().find(|p| p.name == "handshake").map_or(0, |p| p.at_us);
        let noted = session.restore().timeline().phases.into_iter().filter(|p| p.name != "resumed");
        for phase in noted {
            let phase = Phase { name: phase.name, at_us: begun + phase.at_us };
            self.traced.note(phase.name.clone(), Duration::from_micros(phase.at_us));
            self.phases.push(phase);
        }
        self.phases.sort_by_key(|p| p.at_us);
    }
}

/// Where and how a VM is woken.
pub(crate) struct WakeIn<'a> {
    /// Sockets are made here.
    pub(crate) scratch: &'a Path,
    /// Where a Firecracker that is started has its serial input from.
    pub(crate) input: ConsoleInput,
    /// Whether it outlives a Ctrl-C at this process's terminal.
    pub(crate) own_group: bool,
    /// With whom the VM is kept beyond this process, and what its next server is to know of it.
    pub(crate) keep: Option<(Arc<dyn Keeper>, BTreeMap<String, String>)>,
}

impl<'a> WakeIn<'a> {
    /// For a command that serves one VM and ends with it.
    pub(crate) fn here(scratch: &'a Path) -> Self {
        WakeIn { scratch, input: ConsoleInput::Inherited, own_group: false, keep: None }
    }
}

/// A VM that runs again.
pub(crate) struct Woken {
    pub(crate) document: Document,
    pub(crate) session: Session,
    /// The Firecracker that was started for it: killed when dropped.
    pub(crate) started: Option<Firecracker>,
    /// Where it came for its memory. Ending it takes a moment, which the guest should not wait for.
    pub(crate) incoming: Incoming,
}

/// Wakes a VM.
pub(crate) fn wake(
    request: &Wake,
    within: WakeIn<'_>,
    open_store: impl FnOnce() -> Result<Store, Failure>,
) -> Result<Woken, Failure> {
    let mut timeline = Timeline::begin();
    let WakeIn { scratch, input, own_group, keep } = within;
    // Firecracker starts while the store is asked.
    let (opened, vmm) = thread::scope(|scope| {
        let vmm = scope.spawn(|| vmm(request, scratch, input, own_group));
        let opened = open_store().and_then(|store| open(request, &store));
        timeline.mark("open");
        let vmm = vmm.join().unwrap_or_else(|_| Err(Failure::new("bug", "starting Firecracker panicked")));
        (opened, vmm)
    });
    let ((opened, state), vmm) = (opened?, vmm?);
    timeline.mark("spawn");

    let socket = scratch.join("uffd.sock");
    let options = request.serving.options();
    let serve = |handshake| match keep {
        None => Session::wake(handshake, &opened, options, noted()),
        Some((keeper, notes)) => {
            let snapshot = kept_snapshot::note(opened.snapshot());
            let keep = KeepWith { keeper, snapshot, api_socket: Some(vmm.api_socket.clone()), notes };
            Session::wake_kept(handshake, &opened, options, noted(), keep)
        }
    };
    let (session, incoming) = load(request, &vmm, &socket, &state, serve, &mut timeline)?;
    remember(request, opened.snapshot(), &session);
    if let Err(error) = vmm.api.resume() {
        give_up(session.process());
        return Err(because(&session, &error));
    }
    session.restore().mark("resumed");
    timeline.mark("resume");
    timeline.add_restore(&session);

    let snapshot = opened.snapshot().reference().snapshot.to_string();
    let span = tracing::Span::current();
    traces::tell(&span, "dormouse.name", request.name.to_string());
    traces::tell(&span, "dormouse.snapshot", snapshot.clone());
    let document = Document {
        name: request.name.to_string(),
        snapshot,
        pid: session.process().peer().pid,
        api_socket: vmm.api_socket,
        stream_pages: opened.stream().map(|s| s.head().pages()),
        resumed_us: micros(timeline.begun.elapsed()),
        phases: timeline.phases,
    };
    Ok(Woken { document, session, started: vmm.started, incoming })
}

/// The snapshot and its device state.
fn open(request: &Wake, store: &Store) -> Result<(Opened, Vec<u8>), Failure> {
    let opened = request.serving.open(store, &request.name, false)?;
    refuse_older(&request.name, opened.snapshot(), request.older)?;
    let state = opened.only_state(VMSTATE)?;
    Ok((opened, state))
}

/// A snapshot is not woken while a guest is newer than it and waits for its standby to be finished: on this host, where
/// that is noted, or on another one, which the reference tells.
pub(crate) fn refuse_older(name: &Name, snapshot: &Snapshot, older: bool) -> Result<(), Failure> {
    if older {
        return Ok(());
    }
    let standing = Standing::from(snapshot.reference());
    // Where nothing can be noted, no standby is under way.
    let newer = tracking().ok().and_then(|tracking| tracking.newer_guest(name, &standing));
    let whose = match (newer, &snapshot.reference().newer) {
        (Some(pid), _) => format!("the guest of process {pid} on this host"),
        (None, Some(newer)) => format!("a guest on the host {:?}", newer.host),
        (None, None) => return Ok(()),
    };
    let message = format!(
        "{whose} is newer than {name}, and a standby of it as {name} is under way or was cut off: wait, or give that standby \
         again there, which finishes it or lets the guest go on; if that guest is lost, wake the older one with --older"
    );
    Err(Failure { retryable: true, ..Failure::new("busy", message) })
}

/// The next standby may then capture only what changed.
fn remember(request: &Wake, snapshot: &Snapshot, session: &Session) {
    if !request.dirty_tracking {
        return;
    }
    let base = Base { name: request.name.to_string(), snapshot: snapshot.reference().snapshot.to_string() };
    let remembered = tracking().map(|tracking| tracking.remember(session.process(), &base));
    if !matches!(remembered, Ok(Ok(()))) {
        tracing::warn!("the next standby of this VM will capture all of its memory");
    }
}
