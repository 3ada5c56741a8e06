//! `dormouse export NAME`.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use clap::Args;
use dormouse_chunkstore::Snapshot;
use dormouse_core::{ImageKind, Name};
use serde::Serialize;

use super::import::MEMORY;
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

    /// Write the guest's memory to this file
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
    let memory = args.memory.iter().map(|file| (ImageKind::Memory, MEMORY, file));
    let disks = args.disk.iter().map(|d| (ImageKind::Disk, d.id.as_str(), &d.file));
    let images: Vec<_> = memory.chain(disks).collect();

    // Everything asked for is there, or no file is touched.
    for (kind, id, _) in &images {
        snapshot.image(*kind, id)?;
    }
    let states = args.state.iter().map(|part| Ok((part, snapshot.read_blob(part.id.as_str())?)));
    let states = states.collect::<Result<Vec<_>, Failure>>()?;

    let mut written = Vec::new();
    for (kind, id, file) in images {
        written.push(export_image(&snapshot, kind, id, file, context)?);
    }
    for (part, bytes) in states {
        write_file(&part.file, &bytes).map_err(|e| Failure::file("writing", &part.file, &e))?;
        let (id, bytes) = (part.id.to_string(), bytes.len() as u64);
        written.push(Written { kind: "state", id, file: part.file.clone(), bytes });
    }

    let snapshot_id = snapshot.reference().snapshot.to_string();
    let document = Document { name: args.name.to_string(), snapshot: snapshot_id, written };
    context.print(&document, |out| {
        document.written.iter().try_for_each(|w| {
            writeln!(out, "{} {} -> {} ({})", w.kind, w.id, w.file.display(), human::bytes(w.bytes))
        })
    })?;
    Ok(Status::Done)
}

fn export_image(
    snapshot: &Snapshot,
    kind: ImageKind,
    id: &str,
    file: &Path,
    context: &Context,
) -> Result<Written, Failure> {
    let image = snapshot.image(kind, id)?;
    image.export(file, &context.progress(&format!("exporting {id}")))?;
    let bytes = image.entry().bytes;
    Ok(Written { kind: kind_word(kind), id: id.to_owned(), file: file.to_owned(), bytes })
}

/// Writes all or nothing, as the export of an image does; only into devices and pipes one must write directly.
fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return fs::write(path, bytes);
    }
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new()
        .prefix(".dormouse-export")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)?;
    temporary.write_all(bytes)?;
    temporary.persist(path)?;
    Ok(())
}

/// `memory` or `disk`.
pub(crate) fn kind_word(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Memory => "memory",
        ImageKind::Disk => "disk",
    }
}
