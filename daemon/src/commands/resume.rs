//! `dormouse resume firecracker NAME`: a VM wakes from the store.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use dormouse_chunkstore::{Snapshot, Store};
use dormouse_core::Name;
use dormouse_vmm_glue::{
    firecracker::{
        ApiClient, ApiError, ConsoleInput, Firecracker, FirecrackerOptions, Handshake, HandshakeListener,
        Incoming, Jail, KeepWith, Refusal, Session, SessionReport, VmmProcess, capture, handshake::Peer,
        memfile::MemFile, tracking::Base,
    },
    keeper::{Keeper, KeptSnapshot},
    opened::Opened,
};
use serde::{Deserialize, Serialize};

use super::{
    cloud_hypervisor,
    keeping::KeepArgs,
    resume_kept,
    serve_uffd::{
        HANDSHAKE_PATIENCE, ServingArgs, listen_failure, noted, outlive, print_report, thread_failure,
    },
    standby::{API_PATIENCE, VMSTATE, micros, process_at, tracking, vmm_failure},
};
use crate::{
    client::{self, MaybeDaemon},
    context::{self, Context},
    failure::{Failure, Status},
    traces::{self, TraceArgs},
};

/// How long Firecracker may take to start, and to ask for its memory.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// The kind of failure of a VM that did not come for its memory.
const NOBODY_CAME: &str = "vmm";

/// Which VMM.
#[derive(Debug, Subcommand)]
pub(crate) enum ResumeCommand {
    /// A guest of stock Firecracker; serves its memory until it ends
    Firecracker(ResumeArgs),
    /// A guest of stock Cloud Hypervisor, v53 or later; serves its memory until it has all of it
    CloudHypervisor(cloud_hypervisor::resume::ResumeArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ResumeArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    pub(crate) name: Name,

    /// Start this Firecracker; without it, use the one that listens at --api-socket and has no guest yet
    #[arg(long, value_name = "BIN", required_unless_present = "api_socket")]
    pub(crate) firecracker: Option<PathBuf>,

    /// Firecracker's API socket [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<PathBuf>,

    /// Write Firecracker's standard output, and with it the guest's serial port, to this file
    #[arg(long, value_name = "FILE", requires = "firecracker")]
    pub(crate) console: Option<PathBuf>,

    /// Write what was served to this file as JSON once the VM has ended
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Write which pages the guest touched first to this file once the VM has ended, for `stream rebuild`
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,

    /// Do not let Firecracker track dirty pages: the next standby captures all memory
    #[arg(long)]
    pub(crate) no_dirty_tracking: bool,

    #[command(flatten)]
    pub(crate) keep: KeepArgs,

    #[command(flatten)]
    pub(crate) serving: ServingArgs,

    #[command(flatten)]
    pub(crate) daemon: MaybeDaemon,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

/// What `resume` says of itself.
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
struct Timeline {
    begun: Instant,
    phases: Vec<Phase>,
    traced: traces::Phases,
}

impl Timeline {
    fn begin() -> Self {
        Timeline { begun: Instant::now(), phases: Vec::new(), traced: traces::Phases::begin() }
    }

    fn mark(&mut self, name: &'static str) {
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

/// A Firecracker, started here or found.
struct Vmm {
    api: ApiClient,
    api_socket: PathBuf,
    /// Killed when dropped, until it is let go.
    started: Option<Firecracker>,
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

pub(crate) fn run(args: ResumeArgs, context: &Context) -> Result<Status, Failure> {
    // Records are for who trains: the daemon keeps its own, and its VMs as well.
    let here = args.record.is_some() || args.keep.keep.is_some();
    let client = if here { None } else { args.daemon.find(context)? };
    if let Some(client) = client {
        return client::resume::run(&args, context, &client);
    }
    let vm = traces::vm(args.name.as_str()).entered();
    let keeper = resume_kept::keeper(&args)?;
    let kept = keeper.as_ref().map(|keeper| resume_kept::vm(&args, keeper, context)).transpose()?;
    if let Some((document, session)) = kept.flatten() {
        context.print(&document, |out| print_text(out, &document))?;
        let report = outlive(session)?;
        traces::served(&vm, &report);
        return finish(&args, &report);
    }
    // Sockets that nobody else can reach, gone when this process ends.
    let scratch = tempfile::Builder::new().prefix("dormouse-").tempdir();
    let scratch = scratch.map_err(|e| Failure::file("using", &std::env::temp_dir(), &e))?;
    let keep = keeper.map(|keeper| (keeper, BTreeMap::new()));
    let within = WakeIn { keep, ..WakeIn::here(scratch.path()) };
    let woken = traces::operation("resume", || wake(&args, within, || context.open_store()))?;
    context.print(&woken.document, |out| print_text(out, &woken.document))?;
    drop(woken.incoming);
    // A child that nobody waits for stays a zombie, which is no obstacle: its pidfd tells of its end.
    let report = outlive(woken.session)?;
    traces::served(&vm, &report);
    drop(woken.started);
    finish(&args, &report)
}

/// Tells what was served, wherever that is asked for.
fn finish(args: &ResumeArgs, report: &SessionReport) -> Result<Status, Failure> {
    if let (Some(path), Some(record)) = (&args.record, &report.record) {
        record.write(path).map_err(|e| Failure::file("writing", path, &e))?;
    }
    let written = args.report.as_ref().map(|path| (path, serde_json::to_vec_pretty(report)));
    if let Some((path, Ok(bytes))) = written {
        std::fs::write(path, bytes).map_err(|e| Failure::file("writing", path, &e))?;
    }
    let mut text = Vec::new();
    // Writing to memory does not fail.
    let _ = print_report(&mut text, report);
    tracing::info!("{}", String::from_utf8_lossy(&text));
    match &report.killed_because {
        Some(why) => Err(killed(report.pid, why)),
        None => Ok(Status::Done),
    }
}

pub(crate) fn killed(pid: i32, why: &str) -> Failure {
    let why = format!("process {pid} was killed rather than given a wrong page: {why}");
    Failure::new("vm_killed", why)
}

/// Wakes a VM.
pub(crate) fn wake(
    args: &ResumeArgs,
    within: WakeIn<'_>,
    open_store: impl FnOnce() -> Result<Store, Failure>,
) -> Result<Woken, Failure> {
    let mut timeline = Timeline::begin();
    let WakeIn { scratch, input, own_group, keep } = within;
    // Firecracker starts while the store is asked.
    let (opened, vmm) = thread::scope(|scope| {
        let vmm = scope.spawn(|| vmm(args, scratch, input, own_group));
        let opened = open_store().and_then(|store| open(args, &store));
        timeline.mark("open");
        let vmm = vmm.join().unwrap_or_else(|_| Err(Failure::new("bug", "starting Firecracker panicked")));
        (opened, vmm)
    });
    let ((opened, state), vmm) = (opened?, vmm?);
    timeline.mark("spawn");

    let socket = scratch.join("uffd.sock");
    let options = args.serving.options();
    let serve = |handshake| match keep {
        None => Session::wake(handshake, &opened, options, noted()),
        Some((keeper, notes)) => {
            let snapshot = KeptSnapshot::of(opened.snapshot());
            let keep = KeepWith { keeper, snapshot, api_socket: Some(vmm.api_socket.clone()), notes };
            Session::wake_kept(handshake, &opened, options, noted(), keep)
        }
    };
    let (session, incoming) = load(args, &vmm, &socket, &state, serve, &mut timeline)?;
    remember(args, opened.snapshot(), &session);
    if let Err(error) = vmm.api.resume() {
        give_up(session.process());
        return Err(because(&session, &error));
    }
    session.restore().mark("resumed");
    timeline.mark("resume");
    timeline.add_restore(&session);

    let snapshot = opened.snapshot().reference().snapshot.to_string();
    let span = tracing::Span::current();
    traces::tell(&span, "dormouse.name", args.name.to_string());
    traces::tell(&span, "dormouse.snapshot", snapshot.clone());
    let document = Document {
        name: args.name.to_string(),
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
fn open(args: &ResumeArgs, store: &Store) -> Result<(Opened, Vec<u8>), Failure> {
    let opened = args.serving.open(store, &args.name, false)?;
    let state = opened.state(VMSTATE)?;
    Ok((opened, state))
}

fn vmm(args: &ResumeArgs, scratch: &Path, input: ConsoleInput, own_group: bool) -> Result<Vmm, Failure> {
    let api_socket = args.api_socket.clone().unwrap_or_else(|| scratch.join("api.sock"));
    let started = match &args.firecracker {
        None => None,
        Some(binary) => {
            let options = FirecrackerOptions {
                binary: binary.clone(),
                api_socket: api_socket.clone(),
                console: args.console.clone().unwrap_or_else(|| "/dev/null".into()),
                input,
                log: None,
                own_group,
            };
            Some(Firecracker::spawn(&options, START_PATIENCE).map_err(|e| vmm_failure(&e))?)
        }
    };
    let api = ApiClient::new(&api_socket, API_PATIENCE);
    if started.is_none() && capture::is_running(&api).is_ok() {
        // Whose load failed is ended, so it is not even tried.
        let message = format!("the Firecracker at {} has a guest already", api_socket.display());
        return Err(Failure::new("vmm", message));
    }
    Ok(Vmm { api, api_socket, started })
}

/// Loads the device state into `vmm` while its memory is served. Firecracker reads guest memory on the way.
fn load(
    args: &ResumeArgs,
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
        let loading = scope.spawn(|| {
            vmm.api.load_snapshot_uffd(&state.path_for_vmm(), &socket, !args.no_dirty_tracking, false)
        });
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
fn give_up(process: &VmmProcess) {
    if let Err(error) = process.kill() {
        tracing::error!(pid = process.peer().pid, %error, "Firecracker cannot be killed: end it yourself");
    }
}

/// What Firecracker said, and what was wrong with its memory if anything was.
fn because(session: &Session, error: &ApiError) -> Failure {
    match session.report().killed_because {
        Some(why) => {
            Failure::new("vm_killed", format!("Firecracker was killed rather than given a wrong page: {why}"))
        }
        None => vmm_failure(error),
    }
}

/// The next standby may then capture only what changed.
fn remember(args: &ResumeArgs, snapshot: &Snapshot, session: &Session) {
    if args.no_dirty_tracking {
        return;
    }
    let base = Base { name: args.name.to_string(), snapshot: snapshot.reference().snapshot.to_string() };
    let remembered = tracking().map(|tracking| tracking.remember(session.process(), &base));
    if !matches!(remembered, Ok(Ok(()))) {
        tracing::warn!("the next standby of this VM will capture all of its memory");
    }
}

pub(crate) fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    writeln!(out, "{} runs in Firecracker, process {}", d.name, d.pid)?;
    writeln!(out, "  API at {}", d.api_socket.display())?;
    d.phases.iter().try_for_each(|p| writeln!(out, "  {:<20} {:>9.1} ms", p.name, p.at_us as f64 / 1e3))
}
