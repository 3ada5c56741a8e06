//! `dormouse standby firecracker NAME`: a running VM goes into the store, and out of this host.

use std::{
    io,
    ops::Range,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use dormouse_chunkstore::{
    BlobBytes, BlobSource, DEFAULT_LEVEL, Dirty, ImageSource, ImportRequest, Progress, Store, StoreError,
    StreamReport,
};
use dormouse_core::{ImageId, ImageKind, Name};
use dormouse_firecracker::{
    ApiClient, Jail, VmmProcess,
    api::SnapshotKind,
    capture::{self, Capture},
    tracking::{Base, Tracking},
    under_way::{self, StandbyNote, StandbyUnderWay},
    vcpus::VcpuMarks,
};
use dormouse_wake::{Record, build_predicted_stream};
use serde_json::{Value, json};

pub(crate) use super::standby_document::Document;
use super::{
    cloud_hypervisor,
    import::{MEMORY, distinct},
    standby_choice::{Choice, choose},
    standby_document::print_text,
    unfinished::{self, Earlier, Resolved},
};
use crate::{
    cli::values::Part,
    client::MaybeDaemon,
    context::{self, Context},
    failure::{Failure, Status},
    serve::api::StandbyRequest,
    traces::{self, TraceArgs},
};

/// What Firecracker's device state is called in a snapshot.
pub(crate) const VMSTATE: &str = "vmstate";
/// How long Firecracker may take over a request: a full snapshot copies all of the guest's memory.
pub(crate) const API_PATIENCE: Duration = Duration::from_secs(600);
/// How long a killed VMM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Which VMM.
#[derive(Debug, Subcommand)]
pub(crate) enum StandbyCommand {
    /// A guest of stock Firecracker
    Firecracker(StandbyArgs),
    /// A guest of stock Cloud Hypervisor, v53 or later, with shared memory
    CloudHypervisor(cloud_hypervisor::standby::StandbyArgs),
}

#[derive(Args, Debug)]
pub(crate) struct StandbyArgs {
    /// What the snapshot will be called
    #[arg(value_parser = context::name)]
    pub(crate) name: Name,

    /// The API socket of the running Firecracker
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: PathBuf,

    /// The snapshot the VM was woken from, or was last captured as [default: the one this host remembers]
    #[arg(long, value_name = "NAME", value_parser = context::name)]
    pub(crate) parent: Option<Name>,

    /// Store this drive's file as well, while the guest stands still; may be given again
    #[arg(long, value_name = "ID=FILE", conflicts_with = "keep_running")]
    pub(crate) disk: Vec<Part>,

    /// Let the guest go on as soon as its snapshot is in this host's memory, and do not end it
    #[arg(long)]
    pub(crate) keep_running: bool,

    /// Capture all memory, even where only what changed would do
    #[arg(long)]
    pub(crate) full: bool,

    /// Give the name to this snapshot even if another one has it
    #[arg(long)]
    pub(crate) replace: bool,

    /// How hard to compress: 1 (fast) to 19 (dense)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,

    #[command(flatten)]
    pub(crate) daemon: MaybeDaemon,

    #[command(flatten)]
    pub(crate) traces: TraceArgs,
}

pub(crate) fn run(command: &StandbyCommand, context: &Context) -> Result<Status, Failure> {
    let args = match command {
        StandbyCommand::Firecracker(args) => args,
        StandbyCommand::CloudHypervisor(args) => return cloud_hypervisor::standby::run(args, context),
    };
    let document = match args.daemon.find(context)? {
        Some(client) => client.post("/v1/standby", &StandbyRequest::of(args)?)?,
        None => traces::operation("standby", || {
            perform(args, Asked::default(), || context.open_store(), &context.progress("storing"))
        })?,
    };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

/// Whose business a standby is, and what was asked: noted on this host for whoever has to finish it.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) by: Option<PathBuf>,
    pub(crate) request: Value,
}

/// Puts a VM on standby: checks, captures, stores, ends. One that was killed between the last two is finished.
pub(crate) fn perform(
    args: &StandbyArgs,
    asked: Asked,
    open_store: impl FnOnce() -> Result<Store, Failure>,
    progress: &dyn Progress,
) -> Result<Document, Failure> {
    let (begun, mut traced) = (Instant::now(), traces::Phases::begin());
    distinct("--disk", args.disk.iter().map(|d| &d.id))?;
    if let Some(disk) = args.disk.iter().find(|d| !d.file.exists()) {
        return Err(Failure::usage(format!("--disk {}: {} does not exist", disk.id, disk.file.display())));
    }
    let api = ApiClient::new(&args.api_socket, API_PATIENCE);
    let process = process_at(&args.api_socket)?;
    let tracking = tracking()?;
    let jail = Jail::of(&process).map_err(|e| vmm_failure(&e))?;
    let store = open_store()?;
    let mut note = StandbyNote::new(&args.name, &args.api_socket, false);
    (note.by, note.request) = (asked.by, asked.request);
    let (mut under_way, earlier) = tracking.begin_standby(&process, &note).map_err(|e| cannot_note(&e))?;
    let (after_another, mut left_paused) = (earlier.is_some(), false);
    if let Some(earlier) = earlier {
        (under_way, left_paused) =
            match unfinished::finish(args, under_way, earlier, &process, &tracking, &store)? {
                Earlier::Finished(document) => return Ok(*document),
                Earlier::Replaced { under_way, left_paused } => (under_way, left_paused),
            };
    }
    // What can be refused is refused before the guest is touched.
    let choice = match choose(args, &api, &process, &tracking, &store) {
        Ok(choice) => choice,
        Err(failure) if left_paused => return Err(let_go(&api, under_way, failure)),
        Err(failure) => {
            // What was left behind before still is.
            (!after_another).then(|| under_way.done());
            return Err(failure);
        }
    };
    note.was_running = choice.is_running || left_paused;
    under_way.note(&note).map_err(|e| cannot_note(&e))?;
    let check_us = micros(begun.elapsed());
    traced.over("check");

    // Before the capture, for which Firecracker touches pages of its own accord.
    let session = tracking.session_of(&process);
    // Taking a snapshot makes Firecracker count anew; from here on what was remembered is wrong.
    if let Err(error) = tracking.forget(&process) {
        let failure = Failure::new("tracking", error.to_string());
        if left_paused {
            return Err(let_go(&api, under_way, failure));
        }
        under_way.done();
        return Err(failure);
    }
    let captured = capture::capture(&api, choice.kind, note.was_running, args.keep_running, jail.as_ref());
    let captured = match captured {
        Ok(captured) => captured,
        Err(error) => {
            // One that stands still is for whoever comes next to let go on.
            (!error.stands_still()).then(|| under_way.done());
            return Err(vmm_failure(&error));
        }
    };
    let state = match captured.state.read() {
        Ok(state) => state,
        Err(error) => {
            let failure = Failure::new("memory", error.to_string());
            return Err(give_back(args, &api, &captured, under_way, failure));
        }
    };
    let resumable_us = micros(begun.elapsed());
    traced.over("capture");
    tracing::info!(resumable_us, "resumable on this host");
    let mut document = Document::of(args, &choice, &process, &captured);
    (document.resumable_us, document.phases.check_us) = (resumable_us, check_us);

    let importing = Instant::now();
    let noted = args.keep_running || note_captured(&mut under_way, &mut note, &process, &state, &document);
    let imported = match noted {
        true => request(args, &choice, &captured, state).map(|r| store.import(&r, progress)),
        false => Err(Failure::new("tracking", "what was captured cannot be noted on this host")),
    };
    let report = match imported {
        Ok(Ok(report)) => report,
        Ok(Err(doubt @ StoreError::InDoubt { .. })) if args.keep_running => {
            under_way.done();
            let failure = Failure::from(doubt);
            return Err(Failure { message: format!("{}; the VM is as it was", failure.message), ..failure });
        }
        // The guest goes on only if it is known that it may.
        Ok(Err(doubt @ StoreError::InDoubt { .. })) => {
            return match unfinished::resolve(&doubt, under_way, note, &process, &tracking, &store)? {
                Resolved::Durable(document) => Ok(*document),
                Resolved::NotStored(under_way) => {
                    Err(give_back(args, &api, &captured, under_way, doubt.into()))
                }
            };
        }
        Ok(Err(error)) => return Err(give_back(args, &api, &captured, under_way, error.into())),
        Err(failure) => return Err(give_back(args, &api, &captured, under_way, failure)),
    };
    document.import_is(report, micros(importing.elapsed()), micros(begun.elapsed()));
    traced.over("import");
    tracing::info!(durable_us = document.durable_us, "durable in the store");

    let ending = Instant::now();
    if args.keep_running {
        let base = Base { name: args.name.to_string(), snapshot: document.snapshot.clone() };
        if let Err(error) = tracking.remember(&process, &base) {
            tracing::warn!(%error, "the next standby of this VM will capture all of its memory");
        }
    } else {
        // Killed from here on, it still answers all that is known. One that does not end stays noted.
        note_captured_answer(&mut under_way, &mut note, &document);
        end(&process)?;
    }
    under_way.done();
    document.phases.end_us = micros(ending.elapsed());
    traced.over("end");
    let streaming = Instant::now();
    let dirtied = match captured.kind {
        SnapshotKind::Diff => captured.memory.written_pages().unwrap_or_default(),
        SnapshotKind::Full => Vec::new(),
    };
    document.stream = predicted_stream(&store, &args.name, session.as_ref(), &dirtied);
    document.phases.stream_us = micros(streaming.elapsed());
    traced.over("stream");
    document.tell();
    Ok(document)
}

fn cannot_note(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::WouldBlock {
        let message = "another standby of this VM is under way";
        return Failure { retryable: true, ..Failure::new("busy", message) };
    }
    Failure::new("tracking", format!("the standby cannot be noted on this host: {error}"))
}

/// Notes how the guest stands now: from here on the snapshot may become durable at any time.
fn note_captured(
    under_way: &mut StandbyUnderWay,
    note: &mut StandbyNote,
    process: &VmmProcess,
    state: &[u8],
    document: &Document,
) -> bool {
    let vcpus = VcpuMarks::of(process)
        .inspect_err(|why| tracing::warn!(%why, "should this be killed now, nobody can tell whether the guest stood still"));
    let (state, answer) = (under_way::hash_of(state), json!(document));
    note.captured = Some(under_way::Captured { state, vcpus: vcpus.ok(), answer });
    under_way.note(note).inspect_err(|error| tracing::error!(%error, "the standby cannot be noted")).is_ok()
}

fn note_captured_answer(under_way: &mut StandbyUnderWay, note: &mut StandbyNote, document: &Document) {
    if let Some(captured) = &mut note.captured {
        captured.answer = json!(document);
    }
    if let Err(error) = under_way.note(note) {
        tracing::warn!(%error, "should this be killed now, its answer will be less than all");
    }
}

/// The Firecracker that listens at `socket`.
pub(crate) fn process_at(socket: &std::path::Path) -> Result<VmmProcess, Failure> {
    let connection = UnixStream::connect(socket).map_err(|e| {
        Failure::new("vmm", format!("no Firecracker answers at {}: {e}; is it running?", socket.display()))
    })?;
    VmmProcess::of(&connection).map_err(|e| Failure::new("vmm", e.to_string()))
}

/// This host's memory of what dirty pages are counted from.
pub(crate) fn tracking() -> Result<Tracking, Failure> {
    let directory = context::runtime_dir();
    Tracking::open(&directory).map_err(|e| Failure::file("using", &directory, &e))
}

fn request(
    args: &StandbyArgs,
    choice: &Choice,
    captured: &Capture,
    state: Vec<u8>,
) -> Result<ImportRequest, Failure> {
    let id = |id: &str| ImageId::new(id).map_err(|e| Failure::usage(e.to_string()));
    let memory = ImageSource {
        id: id(MEMORY)?,
        kind: ImageKind::Memory,
        path: captured.memory.path(),
        dirty: (captured.kind == SnapshotKind::Diff).then_some(Dirty::FileData),
    };
    let disks = args.disk.iter().map(|disk| ImageSource {
        id: disk.id.clone(),
        kind: ImageKind::Disk,
        path: disk.file.clone(),
        dirty: None,
    });
    Ok(ImportRequest {
        parent: choice.parent.clone(),
        images: [memory].into_iter().chain(disks).collect(),
        blobs: vec![BlobSource { id: id(VMSTATE)?, bytes: BlobBytes::Memory(state) }],
        level: args.level,
        replace: args.replace,
        ..ImportRequest::new(args.name.clone())
    })
}

/// Stores the new snapshot's resume stream. The snapshot is durable and whole without it, so nothing here fails.
pub(super) fn predicted_stream(
    store: &Store,
    name: &Name,
    session: Option<&Record>,
    dirtied: &[Range<u64>],
) -> Option<StreamReport> {
    let built = build_predicted_stream(store, name, session.map(|r| &r.session), dirtied);
    built.unwrap_or_else(|why| {
        tracing::warn!(%why, "the snapshot is durable, but has no resume stream: it wakes more slowly");
        None
    })
}

/// The store did not take the snapshot: the VM goes on as if nothing had happened.
fn give_back(
    args: &StandbyArgs,
    api: &ApiClient,
    captured: &Capture,
    under_way: StandbyUnderWay,
    failure: Failure,
) -> Failure {
    let failure = Failure { message: format!("{}; nothing was stored", failure.message), ..failure };
    if args.keep_running || !captured.was_running {
        under_way.done();
        return Failure { message: format!("{} and the VM is as it was", failure.message), ..failure };
    }
    let_go(api, under_way, failure)
}

/// A VM that ran and is paused, of which nothing was stored, goes on. If it cannot be told to, it is left behind for
/// whoever comes next.
fn let_go(api: &ApiClient, under_way: StandbyUnderWay, failure: Failure) -> Failure {
    let state = match api.resume() {
        Ok(()) => {
            under_way.done();
            "the VM runs on".to_owned()
        }
        Err(error) => format!("the VM is still there, paused, and could not be resumed ({error}); ask again"),
    };
    Failure { message: format!("{} and {state}", failure.message), ..failure }
}

pub(crate) fn end(process: &VmmProcess) -> Result<(), Failure> {
    let pid = process.peer().pid;
    let failed = |why: String| {
        Failure::new(
            "vmm",
            format!("the snapshot is durable, but Firecracker ({pid}) {why}; it is paused: end it yourself"),
        )
    };
    process.kill().map_err(|e| failed(format!("cannot be killed: {e}")))?;
    match process.wait_ended(END_PATIENCE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(failed("does not end".into())),
        Err(error) => Err(failed(format!("cannot be waited for: {error}"))),
    }
}

pub(crate) fn vmm_failure(error: &dyn std::error::Error) -> Failure {
    Failure::new("vmm", error.to_string())
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
