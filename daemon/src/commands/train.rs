//! `dormouse train NAME`: a clone runs for a moment to show what the machine touches first, and is thrown away.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use dormouse_core::Name;
use dormouse_firecracker::{Session, SessionReport};
use dormouse_wake::build_predicted_stream;

use super::stream::{Built, print_text};
use crate::{
    cli::values,
    context::{self, Context},
    failure::{Failure, Status},
    machine::{
        serving::{PolicyName, Serving, outlive},
        wake::{self, Wake, WakeIn},
    },
};

#[derive(Args, Debug)]
pub(crate) struct TrainArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// Start this Firecracker
    #[arg(long, value_name = "BIN")]
    firecracker: PathBuf,

    /// Watch the clone for this long
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = values::duration)]
    window: Duration,

    /// Write the clone's standard output, and with it its serial port, to this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
}

pub(crate) fn run(args: &TrainArgs, context: &Context) -> Result<Status, Failure> {
    if args.window.is_zero() {
        return Err(Failure::usage("--window: nothing can be seen in no time"));
    }
    let store = context.open_store()?;
    let scratch = tempfile::Builder::new().prefix("dormouse-").tempdir();
    let scratch = scratch.map_err(|e| Failure::file("using", &std::env::temp_dir(), &e))?;
    let request = Wake {
        name: args.name.clone(),
        firecracker: Some(args.firecracker.clone()),
        api_socket: None,
        console: args.console.clone(),
        dirty_tracking: false,
        older: false,
        serving: Serving {
            policy: PolicyName::Kill,
            give_up_after: Duration::from_secs(120),
            prefetch: false,
            record_window: args.window,
            page_by_page: true,
        },
    };
    let woken = wake::wake(&request, WakeIn::here(scratch.path()), || Ok(store.clone()))?;
    drop(woken.incoming);
    let snapshot = woken.document.snapshot;
    let report = watch(woken.session, args.window)?;
    drop(woken.started);
    if let Some(why) = report.killed_because {
        let why = format!("the clone was killed rather than given a wrong page: {why}");
        return Err(Failure::new("vm_killed", why));
    }
    let session = report.record.as_ref().map(|r| &r.session);
    let Some(stream) = build_predicted_stream(&store, &args.name, session, &[])? else {
        return Err(Failure::new("vmm", "the clone touched nothing; give it more time with --window"));
    };
    let built = Built { name: args.name.to_string(), snapshot, from: "training", stream };
    context.print(&built, |out| print_text(out, &built))?;
    Ok(Status::Done)
}

/// Lets the VM run for `window`, or until it ends by itself, and then ends it.
fn watch(session: Session, window: Duration) -> Result<SessionReport, Failure> {
    match session.wait(window).map_err(|e| Failure::new("vm", format!("waiting: {e}")))? {
        Ok(report) => Ok(report),
        Err(session) => {
            let killed = session.process().kill();
            killed.map_err(|e| Failure::new("vmm", format!("the clone cannot be ended: {e}")))?;
            outlive(session)
        }
    }
}
