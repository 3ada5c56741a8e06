//! `dormouse attach NAME DISK`: a disk of a snapshot, read as it is asked for and written to an overlay, over NBD.

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use dormouse_chunkstore::Image;
use dormouse_core::{ImageKind, Name};
use dormouse_disk::{
    Disk, DiskError, DiskOptions, Identity, Policy,
    budget::Budget,
    fetch::Fetchers,
    file::{Directory, LocalDirectory},
    nbd::Server,
};
use dormouse_wake::StoredDisk;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::values,
    context::{self, Context},
    failure::{Failure, Status},
    human,
};

/// Threads that fetch from the store.
const FETCHERS: usize = 8;

#[derive(Args, Debug)]
pub(crate) struct AttachArgs {
    /// The snapshot
    #[arg(value_parser = context::name)]
    name: Name,

    /// The disk
    #[arg(value_name = "DISK")]
    disk: String,

    /// Serve it over NBD at this Unix socket, until the command is ended by SIGTERM or SIGINT
    #[arg(long, value_name = "SOCKET")]
    nbd: PathBuf,

    /// Take no writes
    #[arg(long, conflicts_with = "overlay")]
    read_only: bool,

    /// Keep what is written in this directory, which is made; later attachments of the same disk go on with it
    #[arg(long, value_name = "DIR", required_unless_present = "read_only")]
    overlay: Option<PathBuf>,

    /// Writes wait while the overlay takes up so much, for example 10G
    #[arg(long, value_name = "SIZE", value_parser = values::bytes, requires = "overlay")]
    local_budget: Option<u64>,

    /// How long a read waits for the store before it fails
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = values::duration)]
    wait: Duration,
}

#[derive(Debug, Serialize)]
struct Document {
    name: String,
    snapshot: String,
    disk: String,
    bytes: u64,
    read_only: bool,
    socket: PathBuf,
}

pub(crate) fn run(args: &AttachArgs, context: &Context) -> Result<Status, Failure> {
    let snapshot = context.open_store()?.open_snapshot(&args.name)?;
    let image = snapshot.image(ImageKind::Disk, &args.disk)?;
    let document = Document {
        name: args.name.to_string(),
        snapshot: snapshot.reference().snapshot.to_string(),
        disk: args.disk.clone(),
        bytes: image.entry().bytes,
        read_only: args.read_only,
        socket: args.nbd.clone(),
    };
    let disk = Arc::new(open(args, image, snapshot.reference().snapshot.0)?);
    let failed = |error: std::io::Error| Failure::file("listening at", &args.nbd, &error);
    // Asked to end before it has begun to serve, it ends all the same.
    until_signal(|| {
        let server = Server::start(disk.clone(), &args.disk, &args.nbd).map_err(failed)?;
        context.print(&document, |out| {
            let (disk, bytes) = (&document.disk, human::bytes(document.bytes));
            writeln!(out, "disk {disk} ({bytes}) at nbd+unix:///{disk}?socket={}", document.socket.display())
        })?;
        Ok(server)
    })?;
    disk.flush().map_err(failure)?;
    Ok(Status::Done)
}

fn open(args: &AttachArgs, image: Image, snapshot: [u8; 32]) -> Result<Disk, Failure> {
    let (image_name, size_bytes) = (image.entry().id.to_string(), image.entry().bytes);
    let overlay = args.overlay.as_ref().map(|path| {
        let directory = LocalDirectory::open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => failure(DiskError::Busy),
            _ => Failure::file("opening", path, &error),
        });
        directory.map(|directory| Arc::new(directory) as Arc<dyn Directory>)
    });
    Disk::open(DiskOptions {
        source: Arc::new(StoredDisk::new(image)),
        // By hand there is no owner, so none is later than another.
        identity: Identity { snapshot, image: image_name, size_bytes, owner_token: 0 },
        overlay: overlay.transpose()?,
        fetchers: Arc::new(Fetchers::start(FETCHERS).map_err(|e| Failure::new("threads", e.to_string()))?),
        budget: Arc::new(args.local_budget.map_or_else(Budget::unlimited, Budget::new)),
        policy: Policy { base_wait_max: args.wait, ..Policy::default() },
    })
    .map_err(failure)
}

/// Keeps what `begin` returns until somebody asks the process to end.
fn until_signal<T>(begin: impl FnOnce() -> Result<T, Failure>) -> Result<(), Failure> {
    let bug = |error: std::io::Error| Failure::new("bug", format!("signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(bug)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(bug)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(bug)?;
        let _kept = begin()?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    })
}

fn failure(error: DiskError) -> Failure {
    let kind = match &error {
        DiskError::Busy => "busy",
        DiskError::OtherOwner(_) => "conflict",
        DiskError::Damaged { .. } | DiskError::Base(_) => "damaged",
        DiskError::Foreign(_) => "too_new",
        DiskError::Unavailable { .. } => "unavailable",
        DiskError::Full { .. } | DiskError::SealsWait { .. } => "full",
        DiskError::Identity(_) => "usage",
        _ => "file",
    };
    Failure { retryable: error.is_passing(), ..Failure::new(kind, error.to_string()) }
}
