//! From the command line to an exit code.

pub(crate) mod args;
pub(crate) mod values;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use self::args::{Cli, Command};
use crate::{
    commands::{self, serve::LogFormat},
    context::Context,
    failure::{Failure, Status},
    output,
};

/// Parses, runs, reports. Exit codes: 0 done, 1 failed, 2 wrong usage.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    init_log(cli.global.verbose, &cli.command);
    let json = cli.global.json;
    let context = Context::new(cli.global);
    match commands::run(cli.command, &context) {
        Ok(Status::Done) => ExitCode::SUCCESS,
        Ok(Status::Failed) => ExitCode::from(1),
        Err(failure) => {
            output::failure(&failure, json);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Answers a command line that makes no sense, or one that asks for help.
fn refuse(error: &clap::Error) -> ExitCode {
    // The message is for people in any case; that it cannot be printed leaves nobody to tell.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().skip(1).take_while(|a| a != "--").any(|a| a == "--json") {
        let text = error.render().to_string();
        let message = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").trim();
        output::failure_document(&Failure::usage(message));
    }
    ExitCode::from(2)
}

/// Logs to stderr: warnings, more with `--verbose`, or as `DORMOUSE_LOG` says. The daemon says more, and when.
fn init_log(verbose: u8, command: &Command) {
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
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match daemon {
        Some(LogFormat::Json) => log.json().init(),
        Some(LogFormat::Text) => log.init(),
        None => log.without_time().init(),
    }
}
