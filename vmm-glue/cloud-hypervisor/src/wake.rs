//! Waking a stored VM in a Cloud Hypervisor that waits for it.

use std::sync::Arc;
use std::time::Duration;

use dormouse_chunkstore::Progress;

use super::fault_server::FaultServer;
use super::memory::foreign_device;
use super::on_demand::{OnDemand, OnDemandError, WakeOptions};
use super::send::{SendError, Sender, announce_faults};
use super::stored::{StoredError, StoredVm};
use super::wire::Wire;

/// How long a VMM may take to ask for its first page, which it does at once where it does at all.
const FIRST_FAULT_PATIENCE: Duration = Duration::from_secs(10);

/// Why a VM was not woken. Its guest has not run.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    /// The snapshot cannot be read, or is of something else.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// Its memory cannot be served on demand.
    #[error(transparent)]
    OnDemand(#[from] OnDemandError),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// No thread could be started.
    #[error("no thread could be started: {0}")]
    Thread(std::io::Error),
    /// It cannot be woken on demand.
    #[error(
        "the VM has {0}, run by another process, which would see zeros for pages that are not there yet: wake it \
         eagerly"
    )]
    ForeignDevice(&'static str),
    /// The VMM would not ask for pages.
    #[error(
        "Cloud Hypervisor asks for no pages, so its guest would run on empty memory: call receive-migration with \
         memory_mode=postcopy, or wake the VM eagerly"
    )]
    NotPostcopy,
}

/// Told of each step, by name, as it is done.
pub type Note<'n> = &'n mut dyn FnMut(&'static str);

/// Wakes `vm` with all its memory in place. The VMM was told nothing of a memory mode, or `precopy`.
///
/// # Errors
/// [`WakeError`].
pub fn wake_eagerly(
    vm: &StoredVm,
    connect: impl Fn() -> Result<Wire, SendError>,
    run: bool,
    progress: &dyn Progress,
    note: Note<'_>,
) -> Result<(), WakeError> {
    let memory = vm.fill(progress)?;
    note("filled");
    let sender = Sender::begin(connect()?)?;
    note("start");
    memory.iter().try_for_each(|(laid_out, file)| sender.memory(laid_out, file))?;
    sender.config(&vm.config)?;
    note("config");
    sender.state(&vm.state)?;
    note("state");
    sender.complete(run)?;
    note("complete");
    Ok(())
}

/// Wakes `vm` with empty memory, which is filled as the VMM asks for it. The VMM was told `memory_mode=postcopy`.
///
/// # Errors
/// [`WakeError`]; the VMM was told to throw away what it has got.
pub fn wake_on_demand(
    vm: &StoredVm,
    connect: impl Fn() -> Result<Wire, SendError>,
    run: bool,
    options: WakeOptions,
    note: Note<'_>,
) -> Result<FaultServer, WakeError> {
    if let Some(device) = foreign_device(&vm.config) {
        return Err(WakeError::ForeignDevice(device));
    }
    let memory = Arc::new(OnDemand::wake(vm, options)?);
    let woken = send_on_demand(vm, &memory, connect, run, note);
    if woken.is_err() {
        memory.end();
    }
    woken
}

fn send_on_demand(
    vm: &StoredVm,
    memory: &Arc<OnDemand>,
    connect: impl Fn() -> Result<Wire, SendError>,
    run: bool,
    note: Note<'_>,
) -> Result<FaultServer, WakeError> {
    let sender = Sender::begin(connect()?)?;
    note("start");
    for (image, (laid_out, _)) in vm.memory.iter().enumerate() {
        if let Some(file) = memory.file(image) {
            sender.memory(laid_out, file)?;
        }
    }
    sender.config(&vm.config)?;
    note("config");
    // From its state on it guards its memory.
    memory.show(sender.wire().peer().pid);
    note("shown");
    // The VMM asks for pages while it restores the state.
    let faults = connect()?;
    announce_faults(&faults).map_err(SendError::from)?;
    let server = FaultServer::start(memory.clone(), faults).map_err(WakeError::Thread)?;
    sender.state(&vm.state)?;
    note("state");
    if !server.wait_asked(FIRST_FAULT_PATIENCE) {
        // It is told; that it may not listen makes nothing worse, as it has not been told to run.
        let _ = sender.abandon();
        return Err(WakeError::NotPostcopy);
    }
    note("asked");
    sender.complete(run)?;
    note("complete");
    Ok(server)
}
