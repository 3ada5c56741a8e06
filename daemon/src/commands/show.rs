//! `dormouse show NAME`.

use std::io::{self, Write};

use clap::Args;
use dormouse_chunkstore::{SECTION_PACKS_MAX, Scatter, Snapshot, SnapshotSummary, StreamInfo};
use dormouse_core::{Name, PAGE_BYTES};
use dormouse_firecracker::Measured;
use dormouse_wake::{Record, Records};
use serde::Serialize;

use super::tier::tier_of;
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

/// What `show` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Document {
    #[serde(flatten)]
    summary: SnapshotSummary,
    root: String,
    /// How often the name was moved.
    generation: u64,
    written_unix_ms: u64,
    encrypted: bool,
    #[serde(flatten)]
    scatter: Scatter,
    /// Where its first pages are, as seen from this host: "hot", "warm" or "cold".
    tier: &'static str,
    pinned: bool,
    stream: Option<StreamDocument>,
    working_set: Option<WorkingSetDocument>,
}

/// The resume stream.
#[derive(Debug, Serialize)]
struct StreamDocument {
    /// Whether it is of this snapshot; one that is not is not used.
    current: bool,
    /// The snapshot it is of.
    snapshot: String,
    pages: u64,
    raw_bytes: u64,
    stored_bytes: u64,
    frames: u64,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// What the last session on this host that was measured says of the working set.
#[derive(Debug, Serialize)]
struct WorkingSetDocument {
    recorded_unix_ms: u64,
    window_ms: u64,
    /// Whether every first touch in that time was seen.
    complete: bool,
    samples: u64,
    #[serde(flatten)]
    measured: Measured,
}

pub(crate) fn run(args: &ShowArgs, context: &Context) -> Result<Status, Failure> {
    let snapshot = context.open_store()?.open_snapshot(&args.name)?;
    let document = Document::of(&snapshot)?;
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

impl Document {
    pub(crate) fn of(snapshot: &Snapshot) -> Result<Self, Failure> {
        let (reference, store) = (snapshot.reference(), snapshot.store());
        Ok(Document {
            summary: SnapshotSummary::of(reference, snapshot.root()),
            root: reference.root.to_string(),
            generation: reference.sequence,
            written_unix_ms: reference.written_unix_ms,
            encrypted: store.domain().is_encrypted(),
            tier: tier_of(store, &reference.name, reference.snapshot),
            pinned: store.is_pinned(&reference.name),
            stream: StreamDocument::of(snapshot),
            working_set: Records::of(store)
                .and_then(|records| records.last(reference.snapshot))
                .map(|record| WorkingSetDocument::of(&record)),
            scatter: snapshot.scatter()?,
        })
    }
}

impl StreamDocument {
    /// The snapshot is whole without it, so a stream that cannot be read is shown and is no failure.
    fn of(snapshot: &Snapshot) -> Option<Self> {
        let reference = snapshot.reference();
        match snapshot.store().stream_info(&reference.name) {
            Ok(info) => info.map(|StreamInfo { head, stored_bytes }| StreamDocument {
                current: head.snapshot == reference.snapshot,
                snapshot: head.snapshot.to_string(),
                pages: head.pages(),
                raw_bytes: head.pages() * PAGE_BYTES as u64,
                stored_bytes,
                frames: head.frames.len() as u64,
                problem: None,
            }),
            Err(why) => Some(StreamDocument {
                current: false,
                snapshot: String::new(),
                pages: 0,
                raw_bytes: 0,
                stored_bytes: 0,
                frames: 0,
                problem: Some(why.to_string()),
            }),
        }
    }
}

impl WorkingSetDocument {
    fn of(record: &Record) -> Self {
        WorkingSetDocument {
            recorded_unix_ms: record.recorded_unix_ms,
            window_ms: record.window_ms,
            complete: record.complete,
            samples: record.session.coverage.samples(),
            measured: record.session.coverage.into(),
        }
    }
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
    let pinned = if document.pinned { ", pinned" } else { "" };
    writeln!(out, "  tier       {} on this host{pinned}", document.tier)?;
    writeln!(out, "  stream     {}", stream_text(document.stream.as_ref()))?;
    if let Some(w) = document.working_set.as_ref().filter(|w| w.measured.counted.set_pages > 0) {
        let percent = |share: Option<f64>| share.map_or("?".into(), |s| format!("{:.1} %", s * 100.0));
        let (covered, vain) = (percent(w.measured.coverage), percent(w.measured.overfetch));
        let (samples, one_in) = (w.samples, w.measured.counted.one_in);
        let when = human::moment(w.recorded_unix_ms);
        let sampled = format!("{samples} samples, 1 page in {one_in} held out; {when}");
        writeln!(out, "  coverage   {covered} of first touches, {vain} in vain ({sampled})")?;
    }
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

fn stream_text(stream: Option<&StreamDocument>) -> String {
    match stream {
        None => "none".into(),
        Some(StreamDocument { problem: Some(why), .. }) => format!("unusable: {why}"),
        Some(s) => {
            let (raw, stored) = (human::bytes(s.raw_bytes), human::bytes(s.stored_bytes));
            let of = if s.current { "" } else { ", of another snapshot and so not used" };
            format!("{} pages, {raw} in {stored}{of}", s.pages)
        }
    }
}
