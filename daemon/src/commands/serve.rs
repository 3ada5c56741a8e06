//! `dormouse serve`: the daemon.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{keeping::KeepArgs, standby::tracking};
use crate::{
    client,
    context::{self, Context},
    failure::{Failure, Status},
    serve::{self, OnStop, Settings},
    traces::TraceArgs,
};

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// Take requests at this socket [default: $XDG_RUNTIME_DIR/dormouse/control.sock]
    #[arg(long, value_name = "PATH", env = client::CONTROL_VARIABLE)]
    control: Option<PathBuf>,

    /// Start this Firecracker for requests that name none
    #[arg(long, value_name = "BIN")]
    firecracker: Option<PathBuf>,

    /// What becomes of VMs when the daemon is asked to end (SIGTERM, SIGINT) [default: keep; with --no-keep, detach]
    #[arg(long, value_name = "POLICY", value_enum)]
    on_stop: Option<OnStop>,

    /// Keep VMs beyond this process with the holder at this socket [default: in systemd's descriptor store if this
    /// service has one, else PATH of --control, and ".keep"]
    #[arg(long, value_name = "SOCKET", conflicts_with = "no_keep")]
    keep: Option<PathBuf>,

    /// VMs do not outlive a daemon that is killed
    #[arg(long)]
    no_keep: bool,

    /// Answer `GET /metrics`, and nothing else, at this address, such as 127.0.0.1:9464; whoever reaches it may ask
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,

    /// How to write the log, on standard error
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

/// How a log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// A line each, for people
    #[default]
    Text,
    /// A JSON document each
    Json,
}

#[derive(Serialize)]
struct Document<'a> {
    control: &'a Path,
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<SocketAddr>,
}

pub(crate) fn run(args: ServeArgs, context: &Context) -> Result<Status, Failure> {
    // Makes the directory and sees that nobody else can write there.
    tracking()?;
    let control = args.control.unwrap_or_else(client::default_control);
    let control = std::path::absolute(&control).map_err(|e| Failure::file("finding", &control, &e))?;
    let keeper = match args.no_keep {
        true => None,
        false => KeepArgs { keep: Some(args.keep) }.keeper(&control)?,
    };
    let on_stop = match (args.on_stop, &keeper) {
        (Some(OnStop::Keep), None) => return Err(Failure::usage("--on-stop keep goes with keeping VMs")),
        (Some(policy), _) => policy,
        (None, Some(_)) => OnStop::Keep,
        (None, None) => OnStop::Detach,
    };
    let settings = Settings {
        control: control.clone(),
        metrics: args.metrics,
        directory: context::runtime_dir().join(format!("vms-{}", short_hash(&control))),
        store_url: context.store_url()?,
        store_options: context.store_options()?,
        firecracker: args
            .firecracker
            .map(std::path::absolute)
            .transpose()
            .map_err(|e| Failure::usage(format!("--firecracker: {e}")))?,
        on_stop,
        keeper,
    };
    let mut told = Ok(());
    serve::serve(settings, |metrics| {
        let document = Document { control: &control, pid: std::process::id(), metrics };
        told = context.print(&document, |out| writeln!(out, "serving at {}", control.display()));
    })?;
    told.map(|()| Status::Done)
}

/// Tells daemons of one user apart by their control sockets, in few letters.
fn short_hash(path: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    format!("{:08x}", hasher.finish() as u32)
}
