//! VMs of an earlier daemon: taken up again where it left them.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use dormouse_chunkstore::Resume;
use dormouse_firecracker::{Session, SessionError, VmmProcess};
use dormouse_keeper::{Keeper, KeptVm};
use dormouse_wake::{
    Opened,
    kept_snapshot::{self, OpenKeptError},
};
use serde_json::Value;

use super::{
    api::{Origin, WakeRequest},
    interrupted,
    process::Process,
    scratch::{self, Scratch},
    state::Daemon,
    vm::Vm,
    wake,
};
use crate::{
    failure::Failure,
    machine::serving::{noted, thread_failure},
    traces,
};

/// Between two tries to serve a VM whose store is away.
const TRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long all first tries may take before the daemon is ready without them: far less than systemd waits for that.
const FIRST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a killed VM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Names of notes.
const ID: &str = "id";
const REQUEST: &str = "request";
const SCRATCH: &str = "scratch";
const TRACE: &str = "traceparent";

/// What the next daemon is to know of `vm`.
pub(super) fn notes(vm: &Vm, scratch: Option<&Scratch>) -> BTreeMap<String, String> {
    let mut notes =
        BTreeMap::from([(ID.to_owned(), vm.id.clone()), (REQUEST.to_owned(), vm.lock().request.to_string())]);
    if let Some(path) = scratch.and_then(|s| s.path().to_str()) {
        notes.insert(SCRATCH.to_owned(), path.to_owned());
    }
    if let Some(trace) = traces::traceparent(&vm.span()) {
        notes.insert(TRACE.to_owned(), trace);
    }
    notes
}

/// Takes up all VMs that nobody serves, side by side. What cannot be served yet, for its store is away or slow, is tried
/// again in the background.
pub(super) fn take_up(daemon: &Arc<Daemon>) -> Result<(), Failure> {
    if let Some(tracking) = noted() {
        tracking.sweep();
    }
    let Some(keeper) = &daemon.keeper else {
        scratch::clean(&daemon.directory, &[]);
        interrupted::look_after_others(daemon, &[]);
        return Ok(());
    };
    let all = keeper.take_all().map_err(|e| Failure::new("keep", e.to_string()))?;
    let scratch_of = |kept: &KeptVm| kept.record.notes.get(SCRATCH).map(PathBuf::from);
    let in_use: Vec<PathBuf> = all.iter().filter_map(scratch_of).collect();
    let processes: Vec<_> =
        all.iter().map(|kept| VmmProcess::of_kept(kept).map_or(kept.record.pid, |p| p.peer().pid)).collect();
    let (tried, first_tries) = mpsc::channel();
    for kept in all {
        let (daemon, keeper, tried) = (daemon.clone(), keeper.clone(), tried.clone());
        let vm = enter(&daemon, &kept)?;
        // Each on its own: one whose pages cannot be had holds up no other.
        thread::Builder::new()
            .name("dm-take-up".into())
            .spawn(move || {
                let (mut tried, mut told) = (Some(tried), String::new());
                while let Tried::Later(why) = try_once(&daemon, &vm, &kept, &keeper) {
                    tried.take();
                    if told != why {
                        let _inside = vm.span().entered();
                        tracing::warn!(%why, "a kept VM cannot be served yet; it waits");
                        told = why;
                    }
                    thread::sleep(TRY_INTERVAL);
                }
            })
            .map_err(|e| thread_failure(&e))?;
    }
    drop(tried);
    wait_for_all(&first_tries, FIRST_PATIENCE);
    scratch::clean(&daemon.directory, &in_use);
    interrupted::look_after_others(daemon, &processes);
    Ok(())
}

/// Waits until all who hold the other end have let go of it, but no longer than `patience`.
fn wait_for_all(held: &mpsc::Receiver<Infallible>, patience: Duration) {
    if let Err(mpsc::RecvTimeoutError::Timeout) = held.recv_timeout(patience) {
        tracing::warn!("kept VMs are still being taken up; requests are answered meanwhile");
    }
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
    if let Some(trace) = record.notes.get(TRACE) {
        traces::continue_from(&vm.span(), trace);
    }
    traces::tell(&vm.span(), "dormouse.snapshot", record.snapshot.snapshot.clone());
    let mut inner = vm.lock();
    inner.snapshot = Some(record.snapshot.snapshot.clone());
    inner.api_socket = record.api_socket.clone();
    inner.scratch = record.notes.get(SCRATCH).map(|path| Scratch::at(path));
    drop(inner);
    Ok(vm)
}

enum Tried {
    Done,
    Later(String),
}

fn try_once(daemon: &Arc<Daemon>, vm: &Arc<Vm>, kept: &KeptVm, keeper: &Arc<dyn Keeper>) -> Tried {
    let _inside = vm.span().entered();
    match serve(daemon, vm, kept, keeper) {
        Ok(()) => Tried::Done,
        Err(Trouble::Later(why)) => Tried::Later(why),
        Err(Trouble::Gone) => {
            wake::end(daemon, vm);
            Tried::Done
        }
        Err(Trouble::Never(failure)) => {
            tracing::error!(%failure, "a kept VM cannot be served; it waits, and stays kept");
            // So that it can be stopped all the same.
            let process = VmmProcess::of_kept(kept).ok().and_then(|vmm| Process::of(&vmm).ok());
            vm.lock().process = process.map(Arc::new);
            wake::fail(daemon, vm, &failure);
            Tried::Done
        }
    }
}

pub(super) enum Trouble {
    /// What is in the way may go away.
    Later(String),
    /// Its process has ended.
    Gone,
    Never(Failure),
}

fn serve(daemon: &Arc<Daemon>, vm: &Arc<Vm>, kept: &KeptVm, keeper: &Arc<dyn Keeper>) -> Result<(), Trouble> {
    let snapshot =
        kept_snapshot::open(&kept.record.snapshot, &daemon.store).map_err(|error| match error {
            error @ OpenKeptError::OtherStore { .. } => {
                Trouble::Never(Failure::new("no_such_snapshot", error.to_string()))
            }
            error => Trouble::Later(error.to_string()),
        })?;
    let opened = Opened::of(Resume { snapshot, stream: None }).map_err(|e| Trouble::Later(e.to_string()))?;
    let again = kept.try_clone().map_err(|e| Trouble::Later(e.to_string()))?;
    let session = Session::readopt(again, &opened, kept.record.options.into(), keeper.clone(), noted());
    let session = session.map_err(|refusal| match refusal.error {
        SessionError::Process(why) if why.has_ended() => Trouble::Gone,
        error => Trouble::Never(Failure::new("vm_refused", error.to_string())),
    })?;
    if was_not_woken(vm) {
        return Err(Trouble::Never(end_unwoken(vm, session)));
    }
    wake::serve(daemon, vm, session).map_err(Trouble::Never)?;
    if let Ok(process) = VmmProcess::of_kept(kept) {
        interrupted::look_after(daemon, Some(vm.clone()), process);
    }
    Ok(())
}

/// Whether it was asked for, and the earlier daemon did not come to the point of letting its guest go on.
fn was_not_woken(vm: &Vm) -> bool {
    let inner = vm.lock();
    let asked_for = serde_json::from_value::<WakeRequest>(inner.request.clone()).is_ok();
    asked_for && inner.scratch.as_ref().is_some_and(Scratch::is_waking)
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use super::*;

    /// Each was tried in turn before anything was answered, longer than systemd waits.
    #[test]
    fn first_tries_are_waited_for_together_and_not_for_ever() {
        let (tried, first_tries) = mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let tried = tried.clone();
                thread::spawn(move || drop(tried))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // One hangs.
        wait_for_all(&first_tries, Duration::ZERO);
        drop(tried);
        wait_for_all(&first_tries, Duration::MAX);
    }
}
