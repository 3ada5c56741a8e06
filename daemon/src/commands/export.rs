//! `dormouse export NAME`.

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::Args;
use dormouse_chunkstore::{ExportTarget, Image, Snapshot};
use dormouse_core::{ImageKind, Name};
use serde::Serialize;

use super::{import::MEMORY, spool::STREAM};
use crate::{
    cli::values::Part,
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// Write the guest's memory to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    memory: Option<PathBuf>,

    /// Write this disk to this file; may be given again
    #[arg(long, value_name = "ID=FILE")]
    disk: Vec<Part>,

    /// Write this device state to this file; may be given again
    #[arg(long, value_name = "ID=FILE")]
    state: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct Document {
    name: String,
    snapshot: String,
    written: Vec<Written>,
}

#[derive(Debug, Serialize)]
struct Written {
    kind: &'static str,
    id: String,
    file: PathBuf,
    bytes: u64,
}

pub(crate) fn run(args: &ExportArgs, context: &Context) -> Result<Status, Failure> {
    if args.memory.is_none() && args.disk.is_empty() && args.state.is_empty() {
        return Err(Failure::usage(
            "nothing to export: say what goes where with --memory FILE, --disk ID=FILE or --state ID=FILE; \
             `dormouse show NAME` lists what there is",
        ));
    }
    let snapshot = context.open_store()?.open_snapshot(&args.name)?;
    // Everything asked for is there and has a place of its own, or no file is touched.
    let mut parts = parts(args, &snapshot)?;
    let streamed = check_places(&parts, context)?;
    let mut written = Vec::new();
    for part in &mut parts {
        let bytes = match &part.what {
            What::Image(image) => {
                image.export_to(&mut part.target, &context.progress(&format!("exporting {}", part.id)))?;
                image.entry().bytes
            }
            What::State(bytes) => {
                part.target.write(bytes)?;
                bytes.len() as u64
            }
        };
        written.push(Written { kind: part.kind, id: part.id.clone(), file: part.file.clone(), bytes });
    }
    // None takes its place before all are whole.
    parts.into_iter().try_for_each(|part| part.target.finish())?;

    let snapshot_id = snapshot.reference().snapshot.to_string();
    let document = Document { name: args.name.to_string(), snapshot: snapshot_id, written };
    if streamed {
        // Standard output has what was exported, and nothing else.
        let _ = print_text(&mut io::stderr(), &document);
        return Ok(Status::Done);
    }
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

fn print_text(out: &mut dyn io::Write, document: &Document) -> io::Result<()> {
    document.written.iter().try_for_each(|w| {
        writeln!(out, "{} {} -> {} ({})", w.kind, w.id, w.file.display(), human::bytes(w.bytes))
    })
}

/// A part and where it goes.
struct Exported {
    kind: &'static str,
    id: String,
    file: PathBuf,
    what: What,
    target: ExportTarget,
}

enum What {
    Image(Image),
    State(Vec<u8>),
}

fn parts(args: &ExportArgs, snapshot: &Snapshot) -> Result<Vec<Exported>, Failure> {
    let memory = args.memory.iter().map(|file| (ImageKind::Memory, MEMORY, file));
    let disks = args.disk.iter().map(|d| (ImageKind::Disk, d.id.as_str(), &d.file));
    let mut parts = Vec::new();
    for (kind, id, file) in memory.chain(disks) {
        let image = snapshot.image(kind, id)?;
        parts.push((kind_word(kind), id, file, image.entry().bytes, What::Image(image)));
    }
    for Part { id, file } in &args.state {
        let bytes = snapshot.read_blob(id.as_str())?;
        parts.push(("state", id.as_str(), file, bytes.len() as u64, What::State(bytes)));
    }
    let place = |(kind, id, file, bytes, what): (&'static str, &str, &PathBuf, u64, What)| {
        let stdout = file.as_os_str() == STREAM;
        let target = if stdout { ExportTarget::stdout()? } else { ExportTarget::open(file, bytes)? };
        Ok(Exported { kind, id: id.to_owned(), file: file.clone(), what, target })
    };
    parts.into_iter().map(place).collect()
}

/// Whether standard output is one of the places; refuses those that would overwrite each other.
fn check_places(parts: &[Exported], context: &Context) -> Result<bool, Failure> {
    for (i, part) in parts.iter().enumerate() {
        if let Some(other) = parts[..i].iter().find(|other| other.target.is_same(&part.target)) {
            let (a, b) = (other.file.display(), part.file.display());
            return Err(Failure::usage(format!(
                "{} {} and {} {} would be written to the same file, {a} and {b}; give each a file of its own",
                other.kind, other.id, part.kind, part.id
            )));
        }
    }
    let streamed = parts.iter().any(|part| part.target.is_standard_output());
    if streamed && context.global().json {
        return Err(Failure::usage(
            "standard output cannot take both what is exported and a JSON document; leave --json away",
        ));
    }
    if streamed && io::stdout().is_terminal() && parts.iter().any(|part| part.file.as_os_str() == STREAM) {
        return Err(Failure::usage(
            "- is standard output, and that is a terminal; connect a file or a pipe to it",
        ));
    }
    Ok(streamed)
}

/// `memory` or `disk`.
pub(crate) fn kind_word(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Memory => "memory",
        ImageKind::Disk => "disk",
    }
}
