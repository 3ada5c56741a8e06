//! `dormouse standby cloud-hypervisor NAME`: a VM goes into the store, and out of this host.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use dormouse_chunkstore::{
    BlobBytes, DEFAULT_LEVEL, ImageSource, ImportReport, ImportRequest, Settled, Standing, Store, StoreError,
    StreamReport,
};
use dormouse_cloud_hypervisor::{Received, VmmApi, VmmApiError, receive};
use dormouse_core::{ImageKind, Name};
use dormouse_firecracker::{HandshakeListener, VmmProcess};
use dormouse_wake::Record;
use serde::Serialize;

use super::{API_PATIENCE, MESSAGE_PATIENCE, absolute, scratch, vmm_failure, waiting_failure};
use crate::{
    cli::values::{self, Part},
    commands::{
        import::distinct,
        newer_guest::{announce_newer, withdraw_newer},
        serve_uffd::listen_failure,
        standby::{micros, predicted_stream, tracking},
    },
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

/// How long a VMM may take to end once its VM is safe.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Waits are cut into pieces of this length, to look whether Cloud Hypervisor has refused meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Between two tries to learn whether a snapshot is durable.
const TRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(crate) struct StandbyArgs {
    /// What the snapshot will be called
    #[arg(value_parser = context::name)]
    name: Name,

    /// The API socket of the running Cloud Hypervisor; without it, wait at --socket until the VM is sent there
    #[arg(long, value_name = "PATH", required_unless_present = "socket")]
    api_socket: Option<PathBuf>,

    /// Listen here: the destination_url, as unix:PATH, of send-migration with local=on
    /// [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// How long to wait for the VM
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = values::duration)]
    wait: Duration,

    /// The snapshot the VM was woken from: only what changed since is stored
    #[arg(long, value_name = "NAME", value_parser = context::name)]
    parent: Option<Name>,

    /// Store this drive's file as well, while the guest stands still; may be given again
    #[arg(long, value_name = "ID=FILE")]
    disk: Vec<Part>,

    /// Give the name to this snapshot even if another one has it
    #[arg(long)]
    replace: bool,

    /// How hard to compress: 1 (fast) to 19 (dense)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
}

#[derive(Debug, Serialize)]
struct Document {
    name: String,
    snapshot: String,
    parent: Option<String>,
    pid: i32,
    /// Whether Cloud Hypervisor has ended, as it does unless it was told to keep the VM.
    ended: bool,
    /// Whether the guest ran when it was sent.
    was_running: bool,
    /// How long the guest stood still: from its configuration's answer to the last one.
    pause_us: u64,
    /// From the request, or from when the VM came, until it was durable in the store.
    durable_us: u64,
    phases: Phases,
    import: ImportReport,
    /// The snapshot's resume stream, where it is known what the VM touched when it woke.
    stream: Option<StreamReport>,
}

/// Each of these follows the one before.
#[derive(Debug, Default, Serialize)]
struct Phases {
    wait_us: u64,
    receive_us: u64,
    import_us: u64,
    end_us: u64,
    stream_us: u64,
}

pub(crate) fn run(args: &StandbyArgs, context: &Context) -> Result<Status, Failure> {
    distinct("--disk", args.disk.iter().map(|d| &d.id))?;
    if let Some(disk) = args.disk.iter().find(|d| !d.file.exists()) {
        return Err(Failure::usage(format!("--disk {}: {} does not exist", disk.id, disk.file.display())));
    }
    // What can be refused is refused before the guest is touched.
    let store = context.open_store()?;
    let before = check_names(args, &store)?;
    let api = args.api_socket.as_ref().map(|socket| VmmApi::new(socket, API_PATIENCE));
    api.iter().try_for_each(VmmApi::check_started).map_err(|e| vmm_failure(&e))?;
    let scratch = scratch()?;
    let socket = absolute(args.socket.as_deref().unwrap_or(&scratch.path().join("standby.sock")))?;
    let listener = HandshakeListener::bind(&socket).map_err(|e| listen_failure(&e))?;
    tracing::info!(socket = %socket.display(), "waiting for Cloud Hypervisor");

    let begun = Instant::now();
    let come = || match &api {
        None => wait_for_vm(args, &listener, || Ok(())),
        Some(api) => send(args, api, &listener, &socket),
    };
    let told = announce_newer(&store, &args.name, &before).map_err(Failure::from);
    let received = told.and_then(|()| come()).inspect_err(|_| withdraw_newer(&store, &args.name, &before))?;
    drop(listener);
    let arrived = begun.elapsed();
    let importing = Instant::now();
    let (report, received) = store_vm(args, &store, &before, received, context)?;
    let (import_us, durable) = (micros(importing.elapsed()), begun.elapsed());
    tracing::info!(durable_us = micros(durable), "durable in the store");

    let session = session_of(&received);
    let ending = Instant::now();
    let (pid, was_running, paused) = (received.peer().pid, received.was_running, received.paused);
    let connection = received.acknowledge().map_err(|error| {
        Failure::new(
            "vmm",
            format!("the snapshot is durable, but {error}; what became of the VM its log says"),
        )
    })?;
    let pause_us = micros(paused.elapsed());
    // One that keeps its VM (preserve_source=on) does not end.
    let ended = match VmmProcess::of(&connection) {
        Ok(process) => process.wait_ended(if api.is_some() { END_PATIENCE } else { LOOK_INTERVAL }),
        Err(_) => Ok(true),
    };
    let ended = ended.map_err(|e| waiting_failure(&e))?;
    let (end_us, streaming) = (micros(ending.elapsed()), Instant::now());
    let stream = predicted_stream(&store, &args.name, session.as_ref(), &[]);
    let document = Document {
        name: args.name.to_string(),
        snapshot: report.snapshot.clone(),
        parent: args.parent.as_ref().map(ToString::to_string),
        pid,
        ended,
        was_running,
        pause_us,
        durable_us: micros(durable),
        phases: Phases {
            wait_us: micros(arrived.saturating_sub(received_for(paused, begun, arrived))),
            receive_us: micros(received_for(paused, begun, arrived)),
            import_us,
            end_us,
            stream_us: micros(streaming.elapsed()),
        },
        import: report,
        stream,
    };
    context.print(&document, |out| print_text(out, &document))?;
    Ok(Status::Done)
}

/// What the VM touched when it woke, if it was woken here. It is noted for this once.
fn session_of(received: &Received) -> Option<Record> {
    let (process, tracking) = (VmmProcess::of(received.connection()).ok()?, tracking().ok()?);
    let session = tracking.session_of(&process);
    tracking.forget_session(&process);
    session
}

/// Of the time until the VM had `arrived`, what was spent after it had been told to stand still.
fn received_for(paused: Instant, begun: Instant, arrived: Duration) -> Duration {
    arrived.saturating_sub(paused.saturating_duration_since(begun))
}

/// What the name stands for before.
fn check_names(args: &StandbyArgs, store: &Store) -> Result<Standing, Failure> {
    if let Some(parent) = &args.parent {
        store.open_snapshot(parent)?;
    }
    let before = store.standing(&args.name)?;
    if !args.replace && args.parent.as_ref() != Some(&args.name) && before.snapshot.is_some() {
        return Err(Failure::exists(&args.name));
    }
    Ok(before)
}

/// Has Cloud Hypervisor send the VM here.
fn send(
    args: &StandbyArgs,
    api: &VmmApi,
    listener: &HandshakeListener,
    socket: &Path,
) -> Result<Received, Failure> {
    // Some versions answer at once, others when all is done, which is after the last answer from here: the thread
    // ends with Cloud Hypervisor, or with this process.
    let (api, socket) = (api.clone(), socket.to_owned());
    let sending: thread::JoinHandle<Result<(), VmmApiError>> = thread::Builder::new()
        .name("dm-ch-api".into())
        .spawn(move || api.send_migration(&socket))
        .map_err(|e| crate::commands::serve_uffd::thread_failure(&e))?;
    let mut sending = Some(sending);
    wait_for_vm(args, listener, || match sending.take_if(|s| s.is_finished()).map(thread::JoinHandle::join) {
        Some(Ok(Err(error))) => Err(vmm_failure(&error)),
        _ => Ok(()),
    })
}

/// The VM that comes to `listener`, unless `check` says that none will. Who sends something else is sent away.
fn wait_for_vm(
    args: &StandbyArgs,
    listener: &HandshakeListener,
    mut check: impl FnMut() -> Result<(), Failure>,
) -> Result<Received, Failure> {
    let deadline = Instant::now() + args.wait;
    let mut last = None;
    while Instant::now() < deadline {
        check()?;
        let Some(connection) = listener.connection(LOOK_INTERVAL).map_err(|e| waiting_failure(&e))? else {
            continue;
        };
        match receive(connection, listener.peer_uid(), MESSAGE_PATIENCE) {
            Ok(received) => return Ok(received),
            // The one VM that was asked for.
            Err(error) if args.api_socket.is_some() => return Err(vmm_failure(&error)),
            Err(error) => {
                tracing::warn!(%error, "a peer was sent away");
                last = Some(error.to_string());
            }
        }
    }
    let last = last.map(|l| format!("; the last peer was sent away: {l}")).unwrap_or_default();
    Err(Failure::new(
        "vmm",
        format!(
            "no VM was sent to {} within {:?}{last}. Call send-migration destination_url=unix:{0},local=on",
            listener.path().display(),
            args.wait
        ),
    ))
}

/// Stores the VM; if that fails, it is told to go on.
fn store_vm(
    args: &StandbyArgs,
    store: &Store,
    before: &Standing,
    received: Received,
    context: &Context,
) -> Result<(ImportReport, Received), Failure> {
    let request = request(args, &received);
    let report = request.and_then(|request| match store.import(&request, &context.progress("storing")) {
        Err(doubt @ StoreError::InDoubt { .. }) => resolve(&request, store, before, doubt),
        imported => Ok(imported?),
    });
    match report {
        Ok(report) => Ok((report, received)),
        Err(failure) => {
            withdraw_newer(store, &args.name, before);
            let state = match received.refuse() {
                Ok(()) => "the VM goes on".to_owned(),
                Err(error) => {
                    format!("the VM could not be told ({error}), and goes on unless its VMM is gone")
                }
            };
            Err(Failure {
                message: format!("{}; nothing was stored and {state}", failure.message),
                ..failure
            })
        }
    }
}

/// The VM stands still for as long as its connection is not answered, so whoever asked waits, until the store says
/// whether the snapshot is durable after all: let go on before, there might be two of one machine. That it is not is known
/// only once the name was written again, so that a write which is still on its way fails.
fn resolve(
    request: &ImportRequest,
    store: &Store,
    before: &Standing,
    doubt: StoreError,
) -> Result<ImportReport, Failure> {
    loop {
        let settled = store.settle_reference(&request.name, before);
        match settled.and_then(|settled| Ok((settled, stored_as(request, store)?))) {
            Ok((Settled::Undone, _)) => return Err(doubt.into()),
            Ok((_, Some(snapshot))) => {
                let name = request.name.to_string();
                return Ok(ImportReport { name, snapshot, ..ImportReport::default() });
            }
            Ok((_, None)) => tracing::error!(
                "others moved {} meanwhile: whether the snapshot was durable in between, and is awake elsewhere, nobody can \
                 tell; the VM stands still: end it, or end this command, and it goes on",
                request.name
            ),
            Err(error) => {
                tracing::warn!(%error, "it is not known whether the snapshot is stored; the VM stands still until it is");
            }
        }
        thread::sleep(TRY_INTERVAL);
    }
}

/// The id of the snapshot that the name stands for, if that has the very device state of `request`: no two instants of a
/// machine have the same.
fn stored_as(request: &ImportRequest, store: &Store) -> Result<Option<String>, StoreError> {
    let snapshot = match store.open_snapshot(&request.name) {
        Err(StoreError::NoSuchSnapshot { .. }) => return Ok(None),
        opened => opened?,
    };
    for blob in &request.blobs {
        let BlobBytes::Memory(bytes) = &blob.bytes else { continue };
        let stored = match snapshot.read_blob(blob.id.as_str()) {
            Err(StoreError::NoSuchPart { .. }) => return Ok(None),
            read => read?,
        };
        if stored != *bytes {
            return Ok(None);
        }
    }
    Ok(Some(snapshot.reference().snapshot.to_string()))
}

fn request(args: &StandbyArgs, received: &Received) -> Result<ImportRequest, Failure> {
    let (memory, blobs) = received.parts().map_err(|e| Failure::new("vmm", e.to_string()))?;
    let disks = args.disk.iter().map(|disk| ImageSource {
        id: disk.id.clone(),
        kind: ImageKind::Disk,
        path: disk.file.clone(),
        dirty: None,
    });
    Ok(ImportRequest {
        parent: args.parent.clone(),
        images: memory.into_iter().chain(disks).collect(),
        blobs,
        level: args.level,
        replace: args.replace,
        ..ImportRequest::new(args.name.clone())
    })
}

fn print_text(out: &mut dyn Write, d: &Document) -> io::Result<()> {
    let ms = |us: u64| us as f64 / 1e3;
    writeln!(out, "{} is on standby ({} of memory and disks)", d.name, human::bytes(d.import.logical_bytes))?;
    writeln!(out, "  guest paused  {:>9.1} ms", ms(d.pause_us))?;
    writeln!(out, "  durable       {:>9.1} ms", ms(d.durable_us))?;
    writeln!(out, "  stored        {:>9}", human::bytes(d.import.stored_bytes))?;
    let vm = if d.ended { "has ended" } else { "is still there" };
    writeln!(out, "  Cloud Hypervisor ({}) {vm}", d.pid)
}
