//! `dormouse resume cloud-hypervisor NAME`: a VM wakes from the store.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use dormouse_cloud_hypervisor::{
    FaultServer, OnDemandReport, SendError, StoredVm, VmmApi, WakeError, WakeOptions, Wire, learned, send,
    wake_eagerly, wake_on_demand,
};
use dormouse_core::Name;
use dormouse_core::OnFailure;
use serde::Serialize;

use super::{API_PATIENCE, MESSAGE_PATIENCE, absolute, scratch, vmm_failure};
use crate::{
    cli::values,
    commands::{
        serve_uffd::{PolicyName, noted, retry_for, thread_failure},
        standby::micros,
    },
    context::{self, Context},
    failure::{Failure, Status},
    machine::wake::refuse_older,
};

#[derive(Args, Debug)]
pub(crate) struct ResumeArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// The API socket of a running Cloud Hypervisor without a VM; without it, receive-migration was, or soon will be,
    /// called by somebody else
    #[arg(long, value_name = "PATH", required_unless_present = "socket")]
    api_socket: Option<PathBuf>,

    /// Where Cloud Hypervisor listens: the receiver_url, as unix:PATH, of receive-migration
    /// [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// How long to wait until it listens
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    wait: Duration,

    /// Bring in all memory before the guest runs; receive-migration must not say memory_mode=postcopy then
    #[arg(long)]
    eager: bool,

    /// Leave the guest paused
    #[arg(long)]
    paused: bool,

    /// Wake the snapshot even if a newer guest was about to replace it, and is lost
    #[arg(long)]
    older: bool,

    /// Write what was served to this file as JSON once the VM needs nothing more
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// What to do when a page the VM waits for cannot be had correctly
    #[arg(long, value_name = "POLICY", value_enum, default_value_t, conflicts_with = "eager")]
    policy: PolicyName,

    /// How long to try again before that
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = values::duration,
          conflicts_with = "eager")]
    give_up_after: Duration,

    /// Fetch only pages that are asked for
    #[arg(long, conflicts_with = "eager")]
    no_prefetch: bool,
}

impl ResumeArgs {
    fn options(&self) -> WakeOptions {
        let on_failure = match self.policy {
            PolicyName::Kill => OnFailure::Kill,
            PolicyName::Hold => OnFailure::Hold,
        };
        WakeOptions { on_failure, retry: retry_for(self.give_up_after), prefetch: !self.no_prefetch }
    }
}

#[derive(Debug, Serialize)]
struct Document {
    name: String,
    snapshot: String,
    /// Cloud Hypervisor's process.
    pid: i32,
    /// "eager" or "on-demand".
    memory: &'static str,
    /// Whether the guest runs.
    running: bool,
    /// From the request until the guest ran, or could have.
    resumed_us: u64,
    /// What had happened when, from the request on.
    phases: Vec<Phase>,
}

#[derive(Debug, Serialize)]
struct Phase {
    name: &'static str,
    at_us: u64,
}

pub(crate) fn run(args: &ResumeArgs, context: &Context) -> Result<Status, Failure> {
    let begun = Instant::now();
    let mut phases = Vec::new();
    let mut note = |name| phases.push(Phase { name, at_us: micros(begun.elapsed()) });
    let store = context.open_store()?;
    let (snapshot, vm) = if args.eager {
        let snapshot = store.open_snapshot(&args.name)?;
        (snapshot.clone(), StoredVm::open(&snapshot))
    } else {
        let resume = store.open_resume(&args.name)?;
        (resume.snapshot.clone(), StoredVm::resumed(resume))
    };
    refuse_older(&args.name, &snapshot, args.older)?;
    let vm = vm.map_err(|e| wake_failure(e.into()))?;
    note("open");
    let scratch = scratch()?;
    let socket = absolute(args.socket.as_deref().unwrap_or(&scratch.path().join("resume.sock")))?;
    let (pid, server) = wake(args, &vm, &socket, context, &mut note)?;
    let document = Document {
        name: args.name.to_string(),
        snapshot: snapshot.reference().snapshot.to_string(),
        pid,
        memory: if args.eager { "eager" } else { "on-demand" },
        running: !args.paused,
        resumed_us: micros(begun.elapsed()),
        phases,
    };
    context.print(&document, |out| print_text(out, &document))?;
    match server {
        None => Ok(Status::Done),
        Some(server) => {
            let done = server.finish();
            let status = report(args, &done)?;
            learn(&vm, done);
            Ok(status)
        }
    }
}

/// For the next time: this VM's next standby, and the next VM that wakes from the same snapshot.
fn learn(vm: &StoredVm, done: OnDemandReport) {
    let (Some(opened), Some(session)) = (vm.opened(), done.session) else { return };
    let record = learned::remember(opened, session);
    if let (Some(process), Some(tracking)) = (done.process, noted())
        && let Err(error) = tracking.note_session(&process, &record)
    {
        tracing::debug!(%error, "the working set is not noted for the next standby");
    }
    if let Some(stream) = learned::better_stream(opened, &record.session) {
        tracing::info!(pages = stream.pages, "a better resume stream has been stored");
    }
}

/// Wakes the VM in the VMM at `socket`, which is told to listen there if its API is known.
fn wake(
    args: &ResumeArgs,
    vm: &StoredVm,
    socket: &Path,
    context: &Context,
    note: &mut dyn FnMut(&'static str),
) -> Result<(i32, Option<FaultServer>), Failure> {
    // It answers when the VM is there, or could not be received.
    let listening = args.api_socket.as_ref().map(|api| {
        let (api, socket, on_demand) = (VmmApi::new(api, API_PATIENCE), socket.to_owned(), !args.eager);
        let ask = move || api.receive_migration(&socket, on_demand);
        thread::Builder::new().name("dm-ch-api".into()).spawn(ask).map_err(|e| thread_failure(&e))
    });
    let listening = listening.transpose()?;
    let gave_up = || listening.as_ref().is_some_and(thread::JoinHandle::is_finished);
    let peer = std::cell::Cell::new(0);
    let uid = rustix::process::geteuid().as_raw();
    let connect = || -> Result<Wire, SendError> {
        let wire = send::connect(socket, uid, args.wait, MESSAGE_PATIENCE, gave_up)?;
        peer.set(wire.peer().pid);
        Ok(wire)
    };
    let woken = if args.eager {
        wake_eagerly(vm, connect, !args.paused, &context.progress("bringing in memory"), note).map(|()| None)
    } else {
        wake_on_demand(vm, connect, !args.paused, args.options(), note).map(Some)
    };
    // What Cloud Hypervisor itself says is nearer to the cause. One that nobody connected to still listens.
    let finished = listening.filter(|l| woken.is_ok() || l.is_finished() || peer.get() != 0);
    let said = finished.and_then(|l| l.join().ok()).and_then(Result::err);
    match (woken, said) {
        (Ok(server), None) => Ok((peer.get(), server)),
        // Its VM was received all the same: the answer was lost, or nobody could wait for it.
        (Ok(server), Some(error)) => {
            tracing::warn!(%error, "Cloud Hypervisor has the VM, but its API says otherwise");
            Ok((peer.get(), server))
        }
        (Err(error @ WakeError::Send(SendError::Wire(_) | SendError::Connect { .. })), Some(said)) => {
            Err(Failure::new("vmm", format!("{said} ({error})")))
        }
        (Err(error), _) => Err(wake_failure(error)),
    }
}

fn wake_failure(error: WakeError) -> Failure {
    match error {
        WakeError::Stored(dormouse_cloud_hypervisor::StoredError::Store(error)) => error.into(),
        WakeError::Thread(error) => thread_failure(&error),
        error => vmm_failure(&error),
    }
}

fn report(args: &ResumeArgs, report: &OnDemandReport) -> Result<Status, Failure> {
    if let (Some(path), Ok(bytes)) = (&args.report, serde_json::to_vec_pretty(report)) {
        std::fs::write(path, bytes).map_err(|e| Failure::file("writing", path, &e))?;
    }
    let asked = &report.asked;
    tracing::info!(
        asked.requests,
        asked.pages,
        asked.present,
        asked.shown,
        "the VM needs nothing more from here"
    );
    match (&report.killed_because, &report.error) {
        (Some(why), _) => {
            let why = format!("the VM was ended rather than given a wrong page: {why}");
            Err(Failure::new("vm_killed", why))
        }
        (None, Some(error)) => Err(Failure::new("vmm", error.clone())),
        (None, None) => Ok(Status::Done),
    }
}

fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    let state = if d.running { "runs" } else { "is paused" };
    writeln!(out, "{} {state} in Cloud Hypervisor, process {}, its memory {}", d.name, d.pid, d.memory)?;
    d.phases.iter().try_for_each(|p| writeln!(out, "  {:<20} {:>9.1} ms", p.name, p.at_us as f64 / 1e3))
}
