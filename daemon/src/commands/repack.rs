//! `dormouse repack`.

use std::io::{self, Write};

use clap::Args;
use dormouse_chunkstore::{DENSE_LEVEL, RepackOptions, RepackReport};

use super::leased;
use crate::{
    cli::values,
    context::Context,
    failure::{Failure, Status},
    human,
};

#[derive(Args, Debug)]
pub(crate) struct RepackArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// How hard to compress: 1 (fast) to 19 (dense)
    #[arg(long, value_name = "LEVEL", default_value_t = DENSE_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,

    /// Rewrite packs of no more than so many bytes in all, for example 512M or 2G, and leave the rest for the next time
    #[arg(long, value_name = "SIZE", value_parser = values::bytes)]
    max_bytes: Option<u64>,
}

pub(crate) fn run(args: &RepackArgs, context: &Context) -> Result<Status, Failure> {
    let options = RepackOptions { level: args.level, dry_run: args.dry_run, max_bytes: args.max_bytes };
    let store = context.open_store()?;
    leased::give_back_on_signals(&store)?;
    let report = store.repack(options, &context.progress("repacking"))?;
    context.print(&report, |out| print_text(out, &report))?;
    Ok(Status::Done)
}

fn print_text(out: &mut dyn Write, report: &RepackReport) -> io::Result<()> {
    let RepackReport { packs, rewritten_packs, rewritten_bytes, new_packs, new_bytes, .. } = report;
    let old = human::bytes(*rewritten_bytes);
    if report.dry_run {
        writeln!(out, "{rewritten_packs} of {packs} packs ({old}) would be rewritten")?;
        return print_left(out, report);
    }
    if *rewritten_packs == 0 {
        return writeln!(out, "nothing to do: all {packs} packs are dense and mostly in use");
    }
    writeln!(
        out,
        "rewrote {rewritten_packs} of {packs} packs, {old}, as {new_packs}, {}",
        human::bytes(*new_bytes)
    )?;
    writeln!(out, "moved {} snapshots", report.moved_snapshots)?;
    for name in &report.skipped_snapshots {
        writeln!(out, "left as it is, since somebody else moved it meanwhile: {name}")?;
    }
    print_left(out, report)?;
    writeln!(out, "`dormouse gc` frees the old packs")
}

fn print_left(out: &mut dyn Write, report: &RepackReport) -> io::Result<()> {
    match report.left_packs {
        0 => Ok(()),
        left => writeln!(out, "left for the next time: {left} packs"),
    }
}
