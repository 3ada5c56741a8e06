//! The log, on standard error, and the export of spans.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::{
    cli::args::Command,
    commands::{resume::ResumeCommand, serve::LogFormat, standby::StandbyCommand},
    failure::Failure,
    traces::{TraceArgs, Traces},
};

/// Begins to log: warnings, more with `--verbose`, or as `DORMOUSE_LOG` says. The daemon says more, and when. What runs
/// VMs exports spans, if that is asked for.
pub(crate) fn begin(verbose: u8, command: &Command) -> Result<Traces, Failure> {
    let daemon = match command {
        Command::Serve(args) => Some(args.log_format),
        _ => None,
    };
    let default = match verbose + u8::from(daemon.is_some()) {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("DORMOUSE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // Colours are for people, and only where they can be seen.
    let coloured =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(coloured);
    let log = match daemon {
        Some(LogFormat::Json) => log.json().boxed(),
        Some(LogFormat::Text) => log.boxed(),
        None => log.without_time().boxed(),
    };
    let traces = Traces::begin(trace_args(command));
    let exported = traces.as_ref().ok().and_then(Traces::layer);
    match exported {
        // What is not logged is then not even looked at.
        None => tracing_subscriber::registry().with(log).with(filter).init(),
        Some(exported) => tracing_subscriber::registry().with(log.with_filter(filter)).with(exported).init(),
    }
    traces
}

/// Of commands that run VMs.
fn trace_args(command: &Command) -> Option<&TraceArgs> {
    match command {
        Command::Serve(args) => Some(&args.traces),
        Command::ServeUffd(args) => Some(&args.traces),
        Command::Resume(ResumeCommand::Firecracker(args)) => Some(&args.traces),
        Command::Standby(StandbyCommand::Firecracker(args)) => Some(&args.traces),
        _ => None,
    }
}
