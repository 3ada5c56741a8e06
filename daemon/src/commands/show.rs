//! `dormouse show NAME`.

use std::io::{self, Write};

use clap::Args;
use dormouse_chunkstore::{SECTION_PACKS_MAX, Scatter, SnapshotSummary};
use dormouse_core::Name;
use serde::Serialize;

use crate::{
    context::{self, Context},
    failure::{Failure, Status},
    human,
    table::Table,
};

#[derive(Args, Debug)]
pub(crate) struct ShowArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,
}

#[derive(Debug, Serialize)]
struct Document {
    #[serde(flatten)]
    summary: SnapshotSummary,
    root: String,
    /// How often the name was moved.
    generation: u64,
    written_unix_ms: u64,
    encrypted: bool,
    #[serde(flatten)]
    scatter: Scatter,
}

pub(crate) fn run(args: &ShowArgs, context: &Context) -> Result<Status, Failure> {
    let snapshot = context.open_store()?.open_snapshot(&args.name)?;
    let reference = snapshot.reference();
    let document = Document {
        summary: SnapshotSummary::of(reference, snapshot.root()),
        root: reference.root.to_string(),
        generation: reference.sequence,
        written_unix_ms: reference.written_unix_ms,
        encrypted: snapshot.store().domain().is_encrypted(),
        scatter: snapshot.scatter()?,
    };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

fn print_text(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    let s = &document.summary;
    let expires = if s.expires_unix_ms == 0 { "never".into() } else { human::moment(s.expires_unix_ms) };
    writeln!(out, "{}", s.name)?;
    writeln!(out, "  snapshot   {}", s.snapshot)?;
    writeln!(out, "  parent     {}", s.parent.as_deref().unwrap_or("-"))?;
    writeln!(out, "  created    {}", human::moment(s.created_unix_ms))?;
    writeln!(out, "  expires    {expires}")?;
    writeln!(out, "  encrypted  {}", if document.encrypted { "yes" } else { "no" })?;
    let Scatter { packs_per_64_mib, reads_per_64_mib, most_packs_in_a_section } = &document.scatter;
    writeln!(
        out,
        "  scattered  {packs_per_64_mib:.1} packs, {reads_per_64_mib:.1} reads per 64 MiB; a section in at most \
         {most_packs_in_a_section} packs of {SECTION_PACKS_MAX}"
    )?;
    for (key, value) in &s.labels {
        writeln!(out, "  label      {key}={value}")?;
    }
    let mut table = Table::new(["kind", "id", ">size", ">non-zero"]);
    for i in &s.images {
        table.row([i.kind.into(), i.id.clone(), human::bytes(i.bytes), human::bytes(i.nonzero_bytes)]);
    }
    for s in &s.states {
        table.row(["state".into(), s.id.clone(), human::bytes(s.bytes), "-".into()]);
    }
    write!(out, "\n{table}")
}
