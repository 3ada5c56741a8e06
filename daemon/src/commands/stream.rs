//! `dormouse stream`: the resume stream of a snapshot, made anew or removed.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use dormouse_chunkstore::{Resume, Store, StoreError, StreamReport};
use dormouse_core::Name;
use dormouse_restore::WORKING_SET_PAGES_MAX;
use dormouse_wake::predict;
use dormouse_wake::{Opened, Record, Records};
use serde::Serialize;

use crate::{
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

/// What to do with it.
#[derive(Debug, Subcommand)]
pub(crate) enum StreamCommand {
    /// Make it anew from what the machine is known to touch first
    Rebuild(RebuildArgs),
    /// Remove it; the snapshot stays, and wakes more slowly
    Rm(RmArgs),
}

#[derive(Args, Debug)]
pub(crate) struct RebuildArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// Take the pages from this record, as `resume --record` writes it [default: the last that this host recorded,
    /// else those of the stream there is]
    #[arg(long, value_name = "FILE")]
    from_record: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct RmArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,
}

/// A stream that was made.
#[derive(Debug, Serialize)]
pub(crate) struct Built {
    pub(crate) name: String,
    pub(crate) snapshot: String,
    /// Where its pages are known from: "record", "recorded", "stream", "nothing", "training".
    pub(crate) from: &'static str,
    pub(crate) stream: StreamReport,
}

#[derive(Debug, Serialize)]
struct Removed {
    name: String,
    removed: bool,
}

pub(crate) fn run(command: &StreamCommand, context: &Context) -> Result<Status, Failure> {
    match command {
        StreamCommand::Rebuild(args) => {
            let built = rebuild(args, &context.open_store()?)?;
            context.print(&built, |out| print_text(out, &built))?;
        }
        StreamCommand::Rm(args) => {
            let store = context.open_store()?;
            // A name that is wrong is told, and not taken for one without a stream.
            store.open_snapshot(&args.name)?;
            let removed = Removed { name: args.name.to_string(), removed: store.remove_stream(&args.name)? };
            context.print(&removed, |out| {
                let what =
                    if removed.removed { "has no resume stream any more" } else { "had no resume stream" };
                writeln!(out, "{} {what}", removed.name)
            })?;
        }
    }
    Ok(Status::Done)
}

fn rebuild(args: &RebuildArgs, store: &Store) -> Result<Built, Failure> {
    let opened = Opened::of(Resume { snapshot: store.open_snapshot(&args.name)?, stream: None })?;
    let reference = opened.snapshot().reference();
    let record = match &args.from_record {
        Some(path) => Some(Record::read(path).map_err(|e| Failure::file("reading", path, &e))?),
        None => Records::of(store).and_then(|records| records.last(reference.snapshot)),
    };
    let session = record.as_ref().map(|r| &r.session);
    let mut pages = predict(session, &[], WORKING_SET_PAGES_MAX);
    let mut from = match (&args.from_record, pages.is_empty()) {
        (Some(_), _) => "record",
        (None, false) => "recorded",
        (None, true) => "nothing",
    };
    // What another generation of the machine touched is a better guess than nothing.
    if pages.is_empty()
        && let Some(stream) = existing(store, &args.name)?
    {
        pages = opened.memory_runs(&stream);
        from = "stream";
    }
    let (name, snapshot) = (args.name.to_string(), reference.snapshot.to_string());
    Ok(Built { name, snapshot, from, stream: opened.build_stream(&pages)? })
}

/// The stream there is, be it of this snapshot or of an older one; a damaged one counts as none.
fn existing(store: &Store, name: &Name) -> Result<Option<dormouse_chunkstore::StreamInfo>, Failure> {
    match store.stream_info(name) {
        Err(StoreError::Damaged { .. }) => Ok(None),
        other => Ok(other?),
    }
}

pub(crate) fn print_text(out: &mut dyn Write, built: &Built) -> io::Result<()> {
    let (raw, stored) = (human::bytes(built.stream.raw_bytes), human::bytes(built.stream.stored_bytes));
    let from = match built.from {
        "record" => "the record given",
        "recorded" => "what this host recorded",
        "stream" => "the stream there was",
        "training" => "a training session",
        _ => "nothing: it brings the device state only",
    };
    writeln!(out, "resume stream of {}: {} pages, {raw} in {stored}", built.name, built.stream.pages)?;
    writeln!(out, "  made from {from}")
}
