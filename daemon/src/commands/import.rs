//! `dormouse import NAME`.

use std::{
    collections::HashSet,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use dormouse_chunkstore::{
    BlobBytes, BlobSource, DEFAULT_LEVEL, Dirty, ImageSource, ImportReport, ImportRequest,
};
use dormouse_core::{ImageId, ImageKind, Name};

use super::spool::{STREAM, Spool};
use crate::{
    cli::values::{self, DirtyPages, Label, Part},
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

/// What the one guest memory of a snapshot is called.
pub(crate) const MEMORY: &str = "memory";

#[derive(Args, Clone, Debug)]
pub(crate) struct ImportArgs {
    /// What the snapshot will be called: letters, digits, '.', '_' and '-'
    #[arg(value_parser = context::name)]
    name: Name,

    /// The snapshot this one was made from: what they have in common is shared without being looked for
    #[arg(long, value_name = "NAME", value_parser = context::name)]
    parent: Option<Name>,

    /// The guest's memory, raw; - is standard input
    #[arg(long, value_name = "FILE")]
    memory: Option<PathBuf>,

    /// A disk, raw; may be given again for further ones
    #[arg(long, value_name = "ID=FILE")]
    disk: Vec<Part>,

    /// Device state of the VMM, given back as it is; may be given again
    #[arg(long, value_name = "ID=FILE")]
    state: Vec<Part>,

    /// This image's file ("memory", or a disk's ID) holds only what changed: its holes are as in the parent
    #[arg(long, value_name = "ID", requires = "parent")]
    diff: Vec<ImageId>,

    /// Only these 4 KiB pages of this image differ from the parent; nothing else of its file is read. RANGES as
    /// 0..16,512..520 (ends not included), or @FILE with a range a line
    #[arg(long, value_name = "ID=RANGES", requires = "parent")]
    dirty: Vec<DirtyPages>,

    /// As --dirty, from a bitmap: a bit for each page of 4 KiB, lowest first, as KVM_GET_DIRTY_LOG gives it
    #[arg(long, value_name = "ID=FILE", requires = "parent")]
    dirty_bitmap: Vec<Part>,

    /// Something to remember about the snapshot; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<Label>,

    /// Let go of the snapshot after this time, for example 30d [default: never]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    expires: Option<Duration>,

    /// Give the name to this snapshot even if another one has it
    #[arg(long)]
    replace: bool,

    /// Store files although something writes to them meanwhile: what is stored may be a state they never had
    #[arg(long)]
    allow_changing: bool,

    /// How hard to compress: 1 (fast) to 19 (dense)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
}

pub(crate) fn run(args: ImportArgs, context: &Context) -> Result<Status, Failure> {
    let mut args = args;
    // What is asked for makes sense before all of a stream is taken in.
    request(args.clone())?;
    let _spool = take_stream(&mut args, context)?;
    let request = request(args)?;
    let store = context.open_store()?;
    let report = store.import(&request, &context.progress("importing"))?;
    context.print(&report, |out| print_text(out, &report))?;
    Ok(Status::Done)
}

/// Puts a file in the place of `-`, which stays as long as what is given back.
fn take_stream(args: &mut ImportArgs, context: &Context) -> Result<Option<Spool>, Failure> {
    let memory = ImageId::new(MEMORY).map_err(|e| Failure::usage(e.to_string()))?;
    let images = args.memory.iter_mut().map(|file| (memory.clone(), file));
    let images = images.chain(args.disk.iter_mut().map(|d| (d.id.clone(), &mut d.file)));
    let files = images.chain(args.state.iter_mut().map(|s| (s.id.clone(), &mut s.file)));
    let mut streams: Vec<_> = files.filter(|(_, file)| file.as_os_str() == STREAM).collect();
    let Some((id, file)) = streams.pop() else { return Ok(None) };
    if let Some((other, _)) = streams.pop() {
        return Err(Failure::usage(format!(
            "standard input is one stream and cannot be both {other} and {id}; give all but one as files"
        )));
    }
    if args.diff.contains(&id) {
        return Err(Failure::usage(format!(
            "--diff {id}: a stream has no holes that could say what changed; give a file, or --dirty {id}=RANGES"
        )));
    }
    let spool = Spool::stdin(&context.cache_dir().unwrap_or_else(std::env::temp_dir))?;
    *file = spool.path();
    Ok(Some(spool))
}

fn request(args: ImportArgs) -> Result<ImportRequest, Failure> {
    let mut images = Vec::new();
    if let Some(path) = args.memory {
        let id = ImageId::new(MEMORY).map_err(|e| Failure::usage(e.to_string()))?;
        images.push(ImageSource { id, kind: ImageKind::Memory, path, dirty: None });
    }
    images.extend(args.disk.into_iter().map(|disk| ImageSource {
        id: disk.id,
        kind: ImageKind::Disk,
        path: disk.file,
        dirty: None,
    }));
    if images.is_empty() {
        return Err(Failure::usage("nothing to import: give --memory FILE, --disk ID=FILE, or both"));
    }
    distinct("image", images.iter().map(|i| &i.id))?;
    distinct("--state", args.state.iter().map(|s| &s.id))?;
    let diffs = args.diff.into_iter().map(|id| ("--diff", id, Dirty::FileData));
    let dirty = args.dirty.into_iter().map(|d| ("--dirty", d.id, Dirty::Ranges(d.ranges)));
    let mut bitmaps = Vec::new();
    for Part { id, file } in args.dirty_bitmap {
        let bits = std::fs::read(&file)
            .map_err(|e| Failure::usage(format!("--dirty-bitmap {id}: reading {}: {e}", file.display())))?;
        bitmaps.push(("--dirty-bitmap", id, Dirty::Bitmap(bits)));
    }
    for (option, id, dirty) in diffs.chain(dirty).chain(bitmaps) {
        let image = images.iter_mut().find(|i| i.id == id).ok_or_else(|| {
            Failure::usage(format!(
                "{option} {id}: no image of this import is called so; give its --memory or --disk"
            ))
        })?;
        if image.dirty.replace(dirty).is_some() {
            return Err(Failure::usage(format!(
                "what changed in {id} is given twice; give one --diff, --dirty or --dirty-bitmap"
            )));
        }
    }
    let blobs =
        args.state.into_iter().map(|s| BlobSource { id: s.id, bytes: BlobBytes::File(s.file) }).collect();
    Ok(ImportRequest {
        parent: args.parent,
        labels: args.label.into_iter().map(|l| (l.key, l.value)).collect(),
        images,
        blobs,
        level: args.level,
        replace: args.replace,
        allow_changing: args.allow_changing,
        expires_unix_ms: args.expires.map_or(0, unix_ms_in),
        ..ImportRequest::new(args.name)
    })
}

/// Names within a snapshot must be told apart.
pub(crate) fn distinct<'a>(what: &str, ids: impl Iterator<Item = &'a ImageId>) -> Result<(), Failure> {
    let mut seen = HashSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(Failure::usage(format!(
                "{what} {id} is given twice; every one needs a name of its own"
            )));
        }
    }
    Ok(())
}

fn unix_ms_in(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_add(time).as_millis()).unwrap_or(u64::MAX)
}

fn print_text(out: &mut dyn std::io::Write, report: &ImportReport) -> std::io::Result<()> {
    let ImportReport { name, logical_bytes, nonzero_bytes, new_bytes, stored_bytes, objects, .. } = report;
    writeln!(out, "imported {name}")?;
    writeln!(out, "  logical   {:>12}", human::bytes(*logical_bytes))?;
    writeln!(out, "  non-zero  {:>12}", human::bytes(*nonzero_bytes))?;
    writeln!(
        out,
        "  new       {:>12}  {} of what is not zero",
        human::bytes(*new_bytes),
        human::percent(*new_bytes, *nonzero_bytes)
    )?;
    if report.gathered_bytes > 0 {
        writeln!(
            out,
            "  gathered  {:>12}  that was strewn over many packs",
            human::bytes(report.gathered_bytes)
        )?;
    }
    writeln!(out, "  stored    {:>12}  in {objects} new objects", human::bytes(*stored_bytes))
}
