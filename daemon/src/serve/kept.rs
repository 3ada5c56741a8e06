//! VMs of an earlier daemon: taken up again where it left them.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, thread, time::Duration};

use dormouse_vmm_glue::{
    firecracker::{ApiClient, Session, SessionError, capture},
    keeper::{Keeper, KeptVm, record::OpenKeptError},
};
use serde_json::Value;

use super::{
    api::{Origin, WakeRequest},
    scratch::{self, Mark, Scratch},
    state::Daemon,
    vm::Vm,
    wake,
};
use crate::{
    commands::serve_uffd::{memory_of, thread_failure},
    failure::Failure,
};

/// Between two tries to serve a VM whose store is away.
const TRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a killed VM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// How long a VM's Firecracker may take to let its guest go on.
const API_PATIENCE: Duration = Duration::from_secs(10);

/// Names of notes.
const ID: &str = "id";
const REQUEST: &str = "request";
const SCRATCH: &str = "scratch";

/// What the next daemon is to know of `vm`.
pub(super) fn notes(vm: &Vm, scratch: Option<&Scratch>) -> BTreeMap<String, String> {
    let mut notes =
        BTreeMap::from([(ID.to_owned(), vm.id.clone()), (REQUEST.to_owned(), vm.lock().request.to_string())]);
    if let Some(path) = scratch.and_then(|s| s.path().to_str()) {
        notes.insert(SCRATCH.to_owned(), path.to_owned());
    }
    notes
}

/// Takes up all VMs that nobody serves. What cannot be served yet, for its store is away, is tried again in the
/// background.
pub(super) fn take_up(daemon: &Arc<Daemon>) -> Result<(), Failure> {
    let Some(keeper) = &daemon.keeper else {
        scratch::clean(&daemon.directory, &[]);
        return Ok(());
    };
    let all = keeper.take_all().map_err(|e| Failure::new("keep", e.to_string()))?;
    let scratch_of = |kept: &KeptVm| kept.record.notes.get(SCRATCH).map(PathBuf::from);
    let in_use: Vec<PathBuf> = all.iter().filter_map(scratch_of).collect();
    for kept in all {
        let (daemon, keeper) = (daemon.clone(), keeper.clone());
        // Each on its own: one whose pages cannot be had holds up no other.
        let vm = enter(&daemon, &kept)?;
        let first = try_once(&daemon, &vm, &kept, &keeper);
        if let Tried::Later = first {
            thread::Builder::new()
                .name("dm-take-up".into())
                .spawn(move || {
                    let _inside = vm.span.clone().entered();
                    while let Tried::Later = try_once(&daemon, &vm, &kept, &keeper) {
                        thread::sleep(TRY_INTERVAL);
                    }
                })
                .map_err(|e| thread_failure(&e))?;
        }
    }
    scratch::clean(&daemon.directory, &in_use);
    Ok(())
}

fn enter(daemon: &Daemon, kept: &KeptVm) -> Result<Arc<Vm>, Failure> {
    let record = &kept.record;
    let request = record.notes.get(REQUEST).and_then(|text| serde_json::from_str(text).ok());
    let request: Value = request.unwrap_or_default();
    let name = &record.snapshot.name;
    let id = record.notes.get(ID).map(String::as_str);
    // An id given twice is no reason to let a VM stand still.
    let (vm, _) = daemon
        .enter(id, name, Origin::Kept, request.clone())
        .or_else(|_| daemon.enter(None, name, Origin::Kept, request))?;
    let mut inner = vm.lock();
    inner.snapshot = Some(record.snapshot.snapshot.clone());
    inner.api_socket = record.api_socket.clone();
    inner.scratch = record.notes.get(SCRATCH).map(|path| Scratch::at(path));
    drop(inner);
    Ok(vm)
}

enum Tried {
    Done,
    Later,
}

fn try_once(daemon: &Arc<Daemon>, vm: &Arc<Vm>, kept: &KeptVm, keeper: &Arc<dyn Keeper>) -> Tried {
    let _inside = vm.span.clone().entered();
    match serve(daemon, vm, kept, keeper) {
        Ok(()) => Tried::Done,
        Err(Trouble::Later(why)) => {
            tracing::warn!(%why, "a kept VM cannot be served yet; it waits");
            Tried::Later
        }
        Err(Trouble::Gone) => {
            wake::end(daemon, vm);
            Tried::Done
        }
        Err(Trouble::Never(failure)) => {
            tracing::error!(%failure, "a kept VM cannot be served; it waits, and stays kept");
            wake::fail(daemon, vm, &failure);
            Tried::Done
        }
    }
}

enum Trouble {
    /// What is in the way may go away.
    Later(String),
    /// Its process has ended.
    Gone,
    Never(Failure),
}

fn serve(daemon: &Arc<Daemon>, vm: &Arc<Vm>, kept: &KeptVm, keeper: &Arc<dyn Keeper>) -> Result<(), Trouble> {
    let snapshot = kept.record.snapshot.open(&daemon.store).map_err(|error| match error {
        error @ OpenKeptError::OtherStore { .. } => {
            Trouble::Never(Failure::new("no_such_snapshot", error.to_string()))
        }
        error => Trouble::Later(error.to_string()),
    })?;
    let source = memory_of(&snapshot).map_err(|e| Trouble::Later(e.message))?;
    let again = kept.try_clone().map_err(|e| Trouble::Later(e.to_string()))?;
    let session = Session::readopt(again, source, kept.record.options, keeper.clone());
    let session = session.map_err(|refusal| match refusal.error {
        SessionError::Process(why) if why.has_ended() => Trouble::Gone,
        error => Trouble::Never(Failure::new("vm_refused", error.to_string())),
    })?;
    if was_not_woken(vm) {
        return Err(Trouble::Never(end_unwoken(vm, session)));
    }
    let in_standby = vm.lock().scratch.as_ref().is_some_and(|s| s.has(Mark::InStandby));
    wake::serve(daemon, vm, session).map_err(Trouble::Never)?;
    if in_standby {
        go_on(vm);
    }
    Ok(())
}

/// Whether it was asked for, and the earlier daemon did not come to the point of letting its guest go on.
fn was_not_woken(vm: &Vm) -> bool {
    let inner = vm.lock();
    let asked_for = serde_json::from_value::<WakeRequest>(inner.request.clone()).is_ok();
    asked_for && inner.scratch.as_ref().is_some_and(|s| !s.has(Mark::Woken))
}

/// Nobody was told that it runs: it is ended, and whoever asked for it asks again.
fn end_unwoken(vm: &Vm, session: Session) -> Failure {
    let ended = session.process().kill().and_then(|()| session.wait(END_PATIENCE));
    if let Some(scratch) = vm.lock().scratch.take() {
        scratch.remove();
    }
    let outcome = match ended {
        Ok(Ok(_)) => "it was ended".to_owned(),
        Ok(Err(_)) => "it was killed and does not end".to_owned(),
        Err(error) => format!("it cannot be ended: {error}"),
    };
    Failure::new("vm", format!("the earlier daemon was ended while it woke this VM; {outcome}"))
}

/// The earlier daemon was ended in the midst of a standby, for which the guest may stand still.
fn go_on(vm: &Vm) {
    let (socket, scratch) = {
        let inner = vm.lock();
        (inner.api_socket.clone(), inner.scratch.clone())
    };
    let Some(socket) = socket else { return };
    let api = ApiClient::new(&socket, API_PATIENCE);
    let resumed = match capture::is_running(&api) {
        Ok(false) => api.resume().map_err(|e| e.to_string()),
        Ok(true) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    match resumed {
        Ok(()) => {
            tracing::warn!("the earlier daemon was ended while it put this VM on standby; the VM runs on");
            scratch.iter().for_each(|s| s.unmark(Mark::InStandby));
        }
        Err(why) => {
            tracing::error!(%why, "the VM may stand still; PATCH /vm of its Firecracker lets it go on")
        }
    }
}
