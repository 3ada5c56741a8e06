//! `dormouse verify [NAME] [--repair]`.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use dormouse_chunkstore::{RepairOptions, RepairReport, VerifyDepth, VerifyReport};
use dormouse_core::Name;
use serde::Serialize;

use super::leased;
use crate::{
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// The snapshot; all of them if none is named
    #[arg(value_parser = context::name)]
    name: Option<Name>,

    /// Check structure and presence only, without reading pages
    #[arg(long)]
    quick: bool,

    /// Restore what is damaged, as far as any copy of it can be reached: no snapshot changes, nothing is overwritten
    #[arg(long, conflicts_with = "quick")]
    repair: bool,

    /// An image file in which to look for pages that are missing; may be given again
    #[arg(long, value_name = "FILE", requires = "repair")]
    from: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Document<R> {
    clean: bool,
    #[serde(flatten)]
    report: R,
}

pub(crate) fn run(args: &VerifyArgs, context: &Context) -> Result<Status, Failure> {
    if args.repair {
        return repair(args, context);
    }
    let depth = if args.quick { VerifyDepth::Structure } else { VerifyDepth::Content };
    let report = context.open_store()?.verify(args.name.as_ref(), depth, &context.progress("verifying"))?;
    let document = Document { clean: report.is_clean(), report };
    context.print(&document, |out| print_text(out, &document.report))?;
    Ok(if document.clean { Status::Done } else { Status::Failed })
}

fn repair(args: &VerifyArgs, context: &Context) -> Result<Status, Failure> {
    let options = RepairOptions { from: args.from.clone() };
    let store = context.open_store()?;
    leased::give_back_on_signals(&store)?;
    let report = store.repair(args.name.as_ref(), &options, &context.progress("verifying"))?;
    let document = Document { clean: report.left.is_clean(), report };
    context.print(&document, |out| print_repair(out, &document.report))?;
    Ok(if document.clean { Status::Done } else { Status::Failed })
}

fn print_repair(out: &mut dyn Write, report: &RepairReport) -> io::Result<()> {
    for repaired in &report.repaired {
        let parts = [
            (repaired.pages, "pages"),
            (repaired.page_maps, "page maps"),
            (repaired.state_pieces, "pieces of device state"),
        ];
        let mut parts: Vec<_> =
            parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if parts.is_empty() {
            parts.push("all of it".into());
        }
        let sources: Vec<_> = repaired.sources.iter().map(ToString::to_string).collect();
        writeln!(out, "{}: had back {} from {}", repaired.object, parts.join(", "), sources.join(", "))?;
    }
    if !report.repaired.is_empty() {
        writeln!(
            out,
            "wrote {} objects, {}, and moved {} snapshots there; `dormouse gc` frees what is damaged",
            report.new_objects,
            human::bytes(report.new_bytes),
            report.moved_snapshots
        )?;
    }
    for name in &report.skipped_snapshots {
        writeln!(out, "left as it is, since somebody else moved it meanwhile: {name}")?;
    }
    print_text(out, &report.left)
}

fn print_text(out: &mut dyn Write, report: &VerifyReport) -> io::Result<()> {
    for damage in &report.damages {
        let hurts = if damage.hurts.is_empty() { "no snapshot".into() } else { damage.hurts.join(", ") };
        writeln!(out, "{}: {}\n  hurts {hurts}", damage.object, damage.why)?;
    }
    for unreadable in &report.unreadable {
        let hurts =
            if unreadable.hurts.is_empty() { "no snapshot".into() } else { unreadable.hurts.join(", ") };
        writeln!(out, "{}: not checked: {}\n  hurts {hurts}", unreadable.object, unreadable.why)?;
    }
    let VerifyReport { snapshots, objects, checked_bytes, damages, unreadable } = report;
    let checked = human::bytes(*checked_bytes);
    let verdict = match (damages.len(), unreadable.len()) {
        (0, 0) => "nothing is damaged".into(),
        (n, 0) => format!("{n} found"),
        (0, m) => format!("nothing else is damaged, {m} could not be read"),
        (n, m) => format!("{n} found, {m} could not be read"),
    };
    writeln!(out, "checked {snapshots} snapshots, {objects} objects, {checked}: {verdict}")
}
