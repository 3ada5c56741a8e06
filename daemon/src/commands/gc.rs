//! `dormouse gc`.

use std::{
    io::{self, Write},
    time::Duration,
};

use clap::Args;
use dormouse_chunkstore::{DEFAULT_GRACE, GcOptions, GcReport};

use super::leased;
use crate::{
    cli::values,
    context::Context,
    failure::{Failure, Status},
    human,
};

#[derive(Args, Debug)]
pub(crate) struct GcArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// How long something must have been garbage before it is deleted, for example 0s or 7d [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    grace: Option<Duration>,
}

pub(crate) fn run(args: &GcArgs, context: &Context) -> Result<Status, Failure> {
    let options = GcOptions { grace: args.grace.unwrap_or(DEFAULT_GRACE), dry_run: args.dry_run };
    let store = context.open_store()?;
    leased::give_back_on_signals(&store)?;
    let report = store.gc(options)?;
    context.print(&report, |out| print_text(out, &report))?;
    Ok(Status::Done)
}

fn print_text(out: &mut dyn Write, report: &GcReport) -> io::Result<()> {
    let would = if report.dry_run { "would be " } else { "" };
    let line = |out: &mut dyn Write, what: &str, objects: u64, bytes: u64| {
        writeln!(out, "{would}{what}: {objects} objects, {}", human::bytes(bytes))
    };
    for name in &report.expired {
        writeln!(out, "{would}removed as its time is over: {name}")?;
    }
    line(out, "deleted", report.deleted_objects, report.deleted_bytes)?;
    line(
        out,
        "condemned, to be deleted after the grace time",
        report.condemned_objects,
        report.condemned_bytes,
    )?;
    if report.leftover_files > 0 {
        let bytes = human::bytes(report.leftover_bytes);
        writeln!(out, "{would}deleted, as their writers died: {} files, {bytes}", report.leftover_files)?;
    }
    if report.rescued_objects > 0 {
        writeln!(out, "{would}kept after all: {} objects", report.rescued_objects)?;
    }
    writeln!(out, "in use: {} of {} objects", report.live_objects, report.objects)
}
