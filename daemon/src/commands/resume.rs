//! `dormouse resume firecracker NAME`: a VM wakes from the store.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use dormouse_core::Name;
use dormouse_firecracker::SessionReport;

use super::{
    cloud_hypervisor,
    keeping::KeepArgs,
    resume_kept,
    serve_uffd::{ServingArgs, outlive, print_report},
};
use crate::{
    client::{self, MaybeDaemon},
    context::{self, Context},
    failure::{Failure, Status},
    machine::wake::{self, Document, Wake, WakeIn},
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

    /// Start this Firecracker; without it, use the one that listens at --api-socket and has no guest yet, or else the one
    /// that the daemon starts
    #[arg(long, value_name = "BIN")]
    pub(crate) firecracker: Option<PathBuf>,

    /// Firecracker's API socket [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<PathBuf>,

    /// Write Firecracker's standard output, and with it the guest's serial port, to this file
    #[arg(long, value_name = "FILE")]
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

    /// Wake the snapshot even if a newer guest was about to replace it, and is lost
    #[arg(long)]
    pub(crate) older: bool,

    #[command(flatten)]
    pub(crate) keep: KeepArgs,

    #[command(flatten)]
    pub(crate) serving: ServingArgs,

    #[command(flatten)]
    pub(crate) daemon: MaybeDaemon,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

impl ResumeArgs {
    /// Refuses what only a daemon can make up for, which has a Firecracker of its own to start.
    fn check_here(&self) -> Result<(), Failure> {
        match (&self.firecracker, &self.api_socket, &self.console) {
            (None, None, _) => Err(Failure::usage(
                "give --firecracker, a binary, or --api-socket, where one listens; no daemon is asked that has its own",
            )),
            (None, Some(_), Some(_)) => Err(Failure::usage(
                "--console goes with --firecracker: one that runs already has its console",
            )),
            _ => Ok(()),
        }
    }

    /// As the service has it.
    pub(crate) fn wake(&self) -> Wake {
        Wake {
            name: self.name.clone(),
            firecracker: self.firecracker.clone(),
            api_socket: self.api_socket.clone(),
            console: self.console.clone(),
            dirty_tracking: !self.no_dirty_tracking,
            older: self.older,
            serving: self.serving.serving(),
        }
    }
}

pub(crate) fn run(args: ResumeArgs, context: &Context) -> Result<Status, Failure> {
    // Records are for who trains: the daemon keeps its own, and its VMs as well.
    let here = args.record.is_some() || args.keep.keep.is_some();
    let client = if here { None } else { args.daemon.find(context)? };
    if let Some(client) = client {
        return client::resume::run(&args, context, &client);
    }
    args.check_here()?;
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
    let woken = traces::operation("resume", || wake::wake(&args.wake(), within, || context.open_store()))?;
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

pub(crate) fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    writeln!(out, "{} runs in Firecracker, process {}", d.name, d.pid)?;
    writeln!(out, "  API at {}", d.api_socket.display())?;
    d.phases.iter().try_for_each(|p| writeln!(out, "  {:<20} {:>9.1} ms", p.name, p.at_us as f64 / 1e3))
}
