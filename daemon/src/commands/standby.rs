//! `dormouse standby firecracker NAME`: a running VM goes into the store, and out of this host.

use std::{io, ops::Range, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use dormouse_chunkstore::{DEFAULT_LEVEL, Progress, Store, StreamReport};
use dormouse_core::Name;
use dormouse_firecracker::VmmProcess;
use dormouse_wake::{Record, build_predicted_stream};
use serde_json::Value;

pub(crate) use super::standby_document::Document;
use super::{
    cloud_hypervisor,
    import::distinct,
    interruption::Interruption,
    standby_document::print_text,
    standby_flow::{Flow, Step},
};
pub(crate) use crate::machine::vmm::{API_PATIENCE, VMSTATE, micros, process_at, tracking, vmm_failure};
use crate::{
    cli::values::Part,
    client::MaybeDaemon,
    context::{self, Context},
    failure::{Failure, Status},
    serve::api::StandbyRequest,
    traces::{self, TraceArgs},
};

/// How long a killed VMM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Which VMM.
#[derive(Debug, Subcommand)]
pub(crate) enum StandbyCommand {
    /// A guest of stock Firecracker
    Firecracker(StandbyArgs),
    /// A guest of stock Cloud Hypervisor, v53 or later, with shared memory
    CloudHypervisor(cloud_hypervisor::standby::StandbyArgs),
}

#[derive(Args, Debug)]
pub(crate) struct StandbyArgs {
    /// What the snapshot will be called
    #[arg(value_parser = context::name)]
    pub(crate) name: Name,

    /// The API socket of the running Firecracker
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: PathBuf,

    /// The snapshot the VM was woken from, or was last captured as [default: the one this host remembers]
    #[arg(long, value_name = "NAME", value_parser = context::name)]
    pub(crate) parent: Option<Name>,

    /// Store this drive's file as well, while the guest stands still; may be given again
    #[arg(long, value_name = "ID=FILE", conflicts_with = "keep_running")]
    pub(crate) disk: Vec<Part>,

    /// Let the guest go on as soon as its snapshot is in this host's memory, and do not end it
    #[arg(long)]
    pub(crate) keep_running: bool,

    /// Capture all memory, even where only what changed would do
    #[arg(long)]
    pub(crate) full: bool,

    /// Give the name to this snapshot even if another one has it
    #[arg(long)]
    pub(crate) replace: bool,

    /// How hard to compress: 1 (fast) to 19 (dense)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,

    #[command(flatten)]
    pub(crate) daemon: MaybeDaemon,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

pub(crate) fn run(command: &StandbyCommand, context: &Context) -> Result<Status, Failure> {
    let args = match command {
        StandbyCommand::Firecracker(args) => args,
        StandbyCommand::CloudHypervisor(args) => return cloud_hypervisor::standby::run(args, context),
    };
    let document = match args.daemon.find(context)? {
        Some(client) => client.post("/v1/standby", &StandbyRequest::of(args)?)?,
        None => {
            let interruption = Interruption::catch(context.global().json)?;
            traces::operation("standby", || {
                let progress = context.progress("storing");
                perform(args, Asked::default(), || context.open_store(), &progress, &interruption)
            })?
        }
    };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

/// Whose business a standby is, and what was asked: noted on this host for whoever has to finish it.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) by: Option<PathBuf>,
    pub(crate) request: Value,
}

/// Puts a VM on standby: checks, captures, stores, ends. One that was killed between the last two is finished.
pub(crate) fn perform(
    args: &StandbyArgs,
    asked: Asked,
    open_store: impl FnOnce() -> Result<Store, Failure>,
    progress: &dyn Progress,
    interruption: &Interruption,
) -> Result<Document, Failure> {
    distinct("--disk", args.disk.iter().map(|d| &d.id))?;
    if let Some(disk) = args.disk.iter().find(|d| !d.file.exists()) {
        return Err(Failure::usage(format!("--disk {}: {} does not exist", disk.id, disk.file.display())));
    }
    let (flow, chosen) = match Flow::begin(args, asked, open_store, interruption)? {
        Step::Next(begun) => begun,
        Step::Finished(document) => return Ok(*document),
    };
    let (flow, captured) = flow.capture(chosen)?;
    match flow.store(captured, progress)? {
        Step::Next((flow, captured)) => flow.finish(captured),
        Step::Finished(document) => Ok(*document),
    }
}

pub(super) fn cannot_note(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::WouldBlock {
        let message = "another standby of this VM is under way";
        return Failure { retryable: true, ..Failure::new("busy", message) };
    }
    Failure::new("tracking", format!("the standby cannot be noted on this host: {error}"))
}

/// Stores the new snapshot's resume stream. The snapshot is durable and whole without it, so nothing here fails.
pub(super) fn predicted_stream(
    store: &Store,
    name: &Name,
    session: Option<&Record>,
    dirtied: &[Range<u64>],
) -> Option<StreamReport> {
    let built = build_predicted_stream(store, name, session.map(|r| &r.session), dirtied);
    built.unwrap_or_else(|why| {
        tracing::warn!(%why, "the snapshot is durable, but has no resume stream: it wakes more slowly");
        None
    })
}

pub(crate) fn end(process: &VmmProcess) -> Result<(), Failure> {
    let pid = process.peer().pid;
    let failed = |why: String| {
        Failure::new(
            "vmm",
            format!("the snapshot is durable, but Firecracker ({pid}) {why}; it is paused: end it yourself"),
        )
    };
    process.kill().map_err(|e| failed(format!("cannot be killed: {e}")))?;
    match process.wait_ended(END_PATIENCE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(failed("does not end".into())),
        Err(error) => Err(failed(format!("cannot be waited for: {error}"))),
    }
}
