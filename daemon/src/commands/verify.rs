//! `dormouse verify [NAME]`.

use std::io::{self, Write};

use clap::Args;
use dormouse_chunkstore::{VerifyDepth, VerifyReport};
use dormouse_core::Name;
use serde::Serialize;

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
}

#[derive(Debug, Serialize)]
struct Document {
    clean: bool,
    #[serde(flatten)]
    report: VerifyReport,
}

pub(crate) fn run(args: &VerifyArgs, context: &Context) -> Result<Status, Failure> {
    let depth = if args.quick { VerifyDepth::Structure } else { VerifyDepth::Content };
    let report = context.open_store()?.verify(args.name.as_ref(), depth, &context.progress("verifying"))?;
    let document = Document { clean: report.is_clean(), report };
    context.print(&document, |out| print_text(out, &document.report))?;
    Ok(if document.clean { Status::Done } else { Status::Failed })
}

fn print_text(out: &mut dyn Write, report: &VerifyReport) -> io::Result<()> {
    for damage in &report.damages {
        let hurts = if damage.hurts.is_empty() { "no snapshot".into() } else { damage.hurts.join(", ") };
        writeln!(out, "{}: {}\n  hurts {hurts}", damage.object, damage.why)?;
    }
    let VerifyReport { snapshots, objects, checked_bytes, damages } = report;
    let checked = human::bytes(*checked_bytes);
    let verdict = match damages.len() {
        0 => "nothing is damaged".into(),
        n => format!("{n} found"),
    };
    writeln!(out, "checked {snapshots} snapshots, {objects} objects, {checked}: {verdict}")
}
