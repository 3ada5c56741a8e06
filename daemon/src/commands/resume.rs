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
use dormouse_firecracker::{
    ConsoleInput, Firecracker, Incoming, KeepWith, Session, SessionReport, tracking::Base,
};
use dormouse_keeper::Keeper;
use dormouse_wake::{Opened, kept_snapshot};
use serde::{Deserialize, Serialize};

use super::{
    cloud_hypervisor,
    keeping::KeepArgs,
    resume_kept,
    resume_load::{because, give_up, load, vmm},
    serve_uffd::{ServingArgs, noted, outlive, print_report},
    standby::{VMSTATE, micros, tracking},
};
use crate::{
    client::{self, MaybeDaemon},
    context::{self, Context},
    failure::{Failure, Status},
    traces::{self, TraceArgs},
};

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
            let snapshot = kept_snapshot::note(opened.snapshot());
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
