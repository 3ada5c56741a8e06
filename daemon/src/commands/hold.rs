//! `dormouse hold`: holds the descriptors of VMs for those who serve them. Started by them.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use dormouse_keeper::{
    HolderOptions,
    holder::{self, Ended},
};
use serde::Serialize;

use crate::{
    cli::values,
    context::Context,
    failure::{Failure, Status},
};

#[derive(Args, Debug)]
pub(crate) struct HoldArgs {
    /// Listen here
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// End after holding nothing, with nobody connected, for this long
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    linger: Duration,
}

#[derive(Debug, Serialize)]
struct Document {
    socket: PathBuf,
    /// Whether another holder was there already.
    another_is_there: bool,
}

pub(crate) fn run(args: HoldArgs, context: &Context) -> Result<Status, Failure> {
    // Whoever started it may be ended with all of its session. It is no leader of anything, unless started by hand.
    let _ = rustix::process::setsid();
    // The last to be killed for lack of memory, where that may be asked for: it holds others' machines.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let options = HolderOptions { socket: args.socket, linger: args.linger };
    let ended = holder::hold(&options).map_err(|e| Failure::new("hold", e.to_string()))?;
    let document = Document { socket: options.socket, another_is_there: ended == Ended::AnotherIsThere };
    context.print(&document, |out| match ended {
        Ended::Idle => writeln!(out, "nothing left to hold"),
        Ended::AnotherIsThere => writeln!(out, "another holder is there already"),
    })?;
    Ok(Status::Done)
}
