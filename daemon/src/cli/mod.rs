//! From the command line to an exit code.

pub(crate) mod args;
pub(crate) mod values;

use std::process::ExitCode;

use clap::Parser as _;

use self::args::Cli;
use crate::{
    commands,
    context::Context,
    failure::{Failure, Status},
    logging, output,
};

/// Parses, runs, reports. Exit codes: 0 done, 1 failed, 2 wrong usage.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let json = cli.global.json;
    let done = logging::begin(cli.global.verbose, &cli.command).and_then(|traces| {
        let done = commands::run(cli.command, &Context::new(cli.global));
        traces.end();
        done
    });
    match done {
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
