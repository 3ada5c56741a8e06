//! `--keep`: VMs outlive the process that serves them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use dormouse_chunkstore::{Resume, Snapshot, Store, StoreError};
use dormouse_firecracker::{Session, SessionError, SessionOptions, SessionReport, StillServed};
use dormouse_keeper::{HolderKeeper, Keeper, KeptSnapshot, KeptVm, SystemdKeeper};
use dormouse_wake::{
    Opened,
    kept_snapshot::{self, OpenKeptError},
};

use super::serve_uffd::noted;
use crate::failure::Failure;

/// Between two tries to open a snapshot in a store that is away.
const STORE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two tries to let a VM go.
const DETACH_INTERVAL: Duration = Duration::from_secs(10);

/// Whether VMs are to outlive this process, and how.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct KeepArgs {
    /// Keep VMs beyond this process: in systemd's descriptor store if this service has one, else with the holder at
    /// this socket, which is started if need be [default: PATH of --socket or
    /// --api-socket, and ".keep"]. Started again with the same
    /// options, this command goes on with the VMs it finds there
    #[arg(long, value_name = "SOCKET", num_args = 0..=1)]
    pub(crate) keep: Option<Option<PathBuf>>,
}

impl KeepArgs {
    /// The keeper, if one is asked for. `default` is the socket to have one named after.
    pub(crate) fn keeper(&self, default: &Path) -> Result<Option<Arc<dyn Keeper>>, Failure> {
        let Some(socket) = &self.keep else { return Ok(None) };
        let failure = |why: String| Failure::new("keep", why);
        if socket.is_none()
            && std::env::var_os("FDSTORE").is_some()
            && let Some(keeper) = SystemdKeeper::from_environment().map_err(|e| failure(e.to_string()))?
        {
            return Ok(Some(Arc::new(keeper)));
        }
        let mut name = default.as_os_str().to_owned();
        name.push(".keep");
        let socket = std::path::absolute(socket.clone().unwrap_or_else(|| name.into()));
        let socket = socket.map_err(|e| failure(e.to_string()))?;
        let program = std::env::current_exe().map_err(|e| failure(format!("finding this program: {e}")))?;
        let keeper = HolderKeeper::connect(&socket, Some(&program)).map_err(|e| failure(e.to_string()))?;
        Ok(Some(Arc::new(keeper)))
    }
}

/// A VM that is served again.
pub(crate) struct TakenUp {
    pub(crate) session: Session,
    pub(crate) snapshot: Snapshot,
}

/// Goes on with all VMs that `keeper` has and nobody serves. One that cannot be served stays kept, and waits.
pub(crate) fn take_up(
    keeper: &Arc<dyn Keeper>,
    store: &Store,
    options: SessionOptions,
) -> Result<Vec<TakenUp>, Failure> {
    let kept = keeper.take_all().map_err(|e| Failure::new("keep", e.to_string()))?;
    let (mut taken_up, mut opened) = (Vec::new(), HashMap::new());
    for vm in kept {
        let (pid, name) = (vm.record.pid, vm.record.snapshot.name.clone());
        match take_up_one(vm, keeper, store, options, &mut opened) {
            Ok(Some(session)) => {
                tracing::info!(pid, name, "serving a VM that was kept");
                taken_up.push(session);
            }
            Ok(None) => tracing::info!(pid, name, "a VM that was kept has ended"),
            Err(failure) => tracing::error!(pid, name, %failure, "a kept VM cannot be served; it waits"),
        }
    }
    Ok(taken_up)
}

fn take_up_one(
    vm: KeptVm,
    keeper: &Arc<dyn Keeper>,
    store: &Store,
    options: SessionOptions,
    opened: &mut HashMap<String, Snapshot>,
) -> Result<Option<TakenUp>, Failure> {
    let wanted = vm.record.snapshot.clone();
    let snapshot = match opened.get(&wanted.snapshot) {
        Some(snapshot) => snapshot.clone(),
        None => {
            let snapshot = open(&wanted, store)?;
            opened.insert(wanted.snapshot, snapshot.clone());
            snapshot
        }
    };
    let opened = Opened::of(Resume { snapshot: snapshot.clone(), stream: None })?;
    match Session::readopt(vm, &opened, options, keeper.clone(), noted()) {
        Ok(session) => Ok(Some(TakenUp { session, snapshot })),
        Err(refusal) => match refusal.error {
            SessionError::Process(ref ended) if refusal.process.is_none() && ended.has_ended() => Ok(None),
            error => Err(Failure::new("vm_refused", error.to_string())),
        },
    }
}

/// Opens a kept snapshot, trying again for as long as the store is away: its VM stands still until then.
fn open(wanted: &KeptSnapshot, store: &Store) -> Result<Snapshot, Failure> {
    loop {
        match kept_snapshot::open(wanted, store) {
            Ok(snapshot) => return Ok(snapshot),
            Err(OpenKeptError::Store(
                error @ (StoreError::Unavailable { .. }
                | StoreError::Denied { .. }
                | StoreError::Archived { .. }),
            )) => {
                tracing::warn!(name = wanted.name, %error, "a kept VM waits for the store");
                std::thread::sleep(STORE_INTERVAL);
            }
            Err(error) => return Err(Failure::new("kept_snapshot", error.to_string())),
        }
    }
}

/// Fills the VM's memory and lets it go, trying again as long as that fails, or until it ends.
pub(crate) fn let_go(mut session: Session) -> Result<SessionReport, Failure> {
    loop {
        let StillServed { session: served, error } = match session.detach() {
            Ok(report) => return Ok(report),
            Err(still) => *still,
        };
        tracing::warn!(pid = served.process().peer().pid, %error, "the VM cannot be let go yet");
        match served.wait(DETACH_INTERVAL).map_err(|e| Failure::new("vm", format!("waiting: {e}")))? {
            Ok(report) => return Ok(report),
            Err(served) => session = served,
        }
    }
}
