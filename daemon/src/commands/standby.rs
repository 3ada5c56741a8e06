//! `dormouse standby firecracker NAME`: a running VM goes into the store, and out of this host.

use std::{
    borrow::Cow,
    io::{self, Write},
    ops::Range,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use dormouse_chunkstore::{
    BlobBytes, BlobSource, DEFAULT_LEVEL, Dirty, ImageSource, ImportReport, ImportRequest, Progress, Store,
    StreamReport,
};
use dormouse_core::{ImageId, ImageKind, Name};
use dormouse_vmm_glue::{
    firecracker::{
        ApiClient, Jail, VmmProcess,
        api::SnapshotKind,
        capture::{self, Capture},
        memfile,
        tracking::{Base, Tracking},
    },
    opened::build_predicted_stream,
    records::Record,
};
use serde::{Deserialize, Serialize};

use super::{
    cloud_hypervisor,
    import::{MEMORY, distinct},
};
use crate::{
    cli::values::Part,
    client::MaybeDaemon,
    context::{self, Context},
    failure::{Failure, Status},
    human,
    serve::api::StandbyRequest,
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
}

/// What `standby` says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Document {
    name: String,
    snapshot: String,
    parent: Option<String>,
    /// "full" or "diff".
    kind: Cow<'static, str>,
    /// Why all memory was captured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    full_because: Option<Cow<'static, str>>,
    pid: i32,
    ended: bool,
    /// How long the guest stood still, or had to before it could have gone on.
    pub(crate) pause_us: u64,
    /// From the request until the snapshot was whole in this host's memory.
    resumable_us: u64,
    /// From the request until it was durable in the store.
    pub(crate) durable_us: u64,
    phases: Phases,
    /// Bytes of memory captured.
    captured_bytes: u64,
    import: ImportReport,
    /// The resume stream, made from what the guest touched and wrote in this session; none if that is not known.
    #[serde(default)]
    stream: Option<StreamReport>,
}

/// Each of these follows the one before.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Phases {
    check_us: u64,
    pause_us: u64,
    snapshot_us: u64,
    resume_us: u64,
    import_us: u64,
    end_us: u64,
    #[serde(default)]
    stream_us: u64,
}

/// What is captured, and over which parent it is stored.
struct Choice {
    kind: SnapshotKind,
    parent: Option<Name>,
    full_because: Option<&'static str>,
}

pub(crate) fn run(command: &StandbyCommand, context: &Context) -> Result<Status, Failure> {
    let args = match command {
        StandbyCommand::Firecracker(args) => args,
        StandbyCommand::CloudHypervisor(args) => return cloud_hypervisor::standby::run(args, context),
    };
    let document = match args.daemon.find(context)? {
        Some(client) => client.post("/v1/standby", &StandbyRequest::of(args)?)?,
        None => perform(args, || context.open_store(), &context.progress("storing"))?,
    };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

/// Puts a VM on standby: checks, captures, stores, ends.
pub(crate) fn perform(
    args: &StandbyArgs,
    open_store: impl FnOnce() -> Result<Store, Failure>,
    progress: &dyn Progress,
) -> Result<Document, Failure> {
    let begun = Instant::now();
    distinct("--disk", args.disk.iter().map(|d| &d.id))?;
    if let Some(disk) = args.disk.iter().find(|d| !d.file.exists()) {
        return Err(Failure::usage(format!("--disk {}: {} does not exist", disk.id, disk.file.display())));
    }
    let api = ApiClient::new(&args.api_socket, API_PATIENCE);
    let process = process_at(&args.api_socket)?;
    let tracking = tracking()?;
    let store = open_store()?;
    let choice = choose(args, &api, &process, &tracking, &store)?;
    let check_us = micros(begun.elapsed());

    // Before the capture, for which Firecracker touches pages of its own accord.
    let session = tracking.session_of(&process);
    let jail = Jail::of(&process).map_err(|e| vmm_failure(&e))?;
    // Taking a snapshot makes Firecracker count anew; from here on what was remembered is wrong.
    tracking.forget(&process).map_err(|e| Failure::new("tracking", e.to_string()))?;
    let captured = capture::capture(&api, choice.kind, args.keep_running, jail.as_ref());
    let captured = captured.map_err(|e| vmm_failure(&e))?;
    let resumable_us = micros(begun.elapsed());
    tracing::info!(resumable_us, "resumable on this host");

    let importing = Instant::now();
    let request = request(args, &choice, &captured)?;
    let report = store.import(&request, progress);
    let report = report.map_err(|error| give_back(args, &api, &captured, error.into()))?;
    let (import_us, durable_us) = (micros(importing.elapsed()), micros(begun.elapsed()));
    tracing::info!(durable_us, "durable in the store");

    let ending = Instant::now();
    if args.keep_running {
        let base = Base { name: args.name.to_string(), snapshot: report.snapshot.clone() };
        if let Err(error) = tracking.remember(&process, &base) {
            tracing::warn!(%error, "the next standby of this VM will capture all of its memory");
        }
    } else {
        end(&process)?;
    }
    let (end_us, streaming) = (micros(ending.elapsed()), Instant::now());
    let dirtied = match captured.kind {
        SnapshotKind::Diff => captured.memory.written_pages().unwrap_or_default(),
        SnapshotKind::Full => Vec::new(),
    };
    let stream = predicted_stream(&store, &args.name, session.as_ref(), &dirtied);
    let times = captured.times;
    Ok(Document {
        name: args.name.to_string(),
        snapshot: report.snapshot.clone(),
        parent: choice.parent.map(|p| p.to_string()),
        kind: if choice.kind == SnapshotKind::Full { "full" } else { "diff" }.into(),
        full_because: choice.full_because.map(Cow::from),
        pid: process.peer().pid,
        ended: !args.keep_running,
        pause_us: micros(times.paused),
        resumable_us,
        durable_us,
        phases: Phases {
            check_us,
            pause_us: micros(times.pause),
            snapshot_us: micros(times.snapshot),
            resume_us: micros(times.resume),
            import_us,
            end_us,
            stream_us: micros(streaming.elapsed()),
        },
        captured_bytes: captured.memory.stored_bytes().map_err(|e| Failure::new("memory", e.to_string()))?,
        import: report,
        stream,
    })
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

fn choose(
    args: &StandbyArgs,
    api: &ApiClient,
    process: &VmmProcess,
    tracking: &Tracking,
    store: &Store,
) -> Result<Choice, Failure> {
    // What can be refused is refused before the guest is touched.
    capture::is_running(api).map_err(|e| vmm_failure(&e))?;
    let base = tracking.base_of(process);
    let stands_for_base = |name: &Name| {
        let snapshot = store.open_snapshot(name).ok().map(|s| s.reference().snapshot.to_string());
        snapshot.is_some() && snapshot == base.as_ref().map(|b| b.snapshot.clone())
    };
    let parent = match &args.parent {
        Some(parent) => {
            store.open_snapshot(parent)?;
            Some(parent.clone())
        }
        None => base.as_ref().and_then(|b| Name::new(&b.name).ok()).filter(|name| stands_for_base(name)),
    };
    if !args.replace && parent.as_ref() != Some(&args.name) && store.open_snapshot(&args.name).is_ok() {
        return Err(Failure::usage(format!(
            "a snapshot called {0} exists; choose another name, pass --replace, or make it the parent with --parent {0}",
            args.name
        )));
    }
    let full_because = if args.full {
        Some("--full asks for it")
    } else if parent.is_none() {
        Some("there is no parent")
    } else if !parent.as_ref().is_some_and(stands_for_base) {
        Some("this host does not know the VM to have come from the parent")
    } else if !capture::tracks_dirty_pages(api).map_err(|e| vmm_failure(&e))? {
        Some("Firecracker does not track dirty pages")
    } else if !memfile::holes_are_exact() {
        Some("transparent huge pages blur what changed in files in memory")
    } else {
        None
    };
    let kind = if full_because.is_some() { SnapshotKind::Full } else { SnapshotKind::Diff };
    Ok(Choice { kind, parent, full_because })
}

fn request(args: &StandbyArgs, choice: &Choice, captured: &Capture) -> Result<ImportRequest, Failure> {
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
    let state = captured.state.read().map_err(|e| Failure::new("memory", e.to_string()))?;
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
fn give_back(args: &StandbyArgs, api: &ApiClient, captured: &Capture, failure: Failure) -> Failure {
    let state = if args.keep_running || !captured.was_running {
        "the VM is as it was".to_owned()
    } else {
        match api.resume() {
            Ok(()) => "the VM runs on".to_owned(),
            Err(error) => format!("the VM is still there, paused, and could not be resumed ({error})"),
        }
    };
    Failure { message: format!("{}; nothing was stored and {state}", failure.message), ..failure }
}

fn end(process: &VmmProcess) -> Result<(), Failure> {
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

pub(crate) fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    let ms = |us: u64| us as f64 / 1e3;
    writeln!(out, "{} is on standby ({} capture of {})", d.name, d.kind, human::bytes(d.captured_bytes))?;
    writeln!(out, "  guest paused  {:>9.1} ms", ms(d.pause_us))?;
    writeln!(out, "  resumable     {:>9.1} ms", ms(d.resumable_us))?;
    writeln!(out, "  durable       {:>9.1} ms", ms(d.durable_us))?;
    writeln!(out, "  stored        {:>9}", human::bytes(d.import.stored_bytes))?;
    if let Some(stream) = &d.stream {
        let (pages, bytes) = (human::bytes(stream.raw_bytes), human::bytes(stream.stored_bytes));
        writeln!(out, "  stream        {pages:>9} in {bytes}")?;
    }
    let vm = if d.ended { "has ended" } else { "runs on" };
    writeln!(out, "  Firecracker ({}) {vm}", d.pid)
}
