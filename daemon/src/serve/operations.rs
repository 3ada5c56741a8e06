//! What can be done with a VM: standby, stop, detach. Each is done once however often it is asked for, and goes on
//! when whoever asked hangs up.

use std::{path::Path, sync::Arc, time::Duration};

use dormouse_chunkstore::NoProgress;
use dormouse_firecracker::ApiClient;
use serde_json::{Value, json};

use super::{
    api::{Origin, StandbyRequest, State, StopRequest, VmDocument, seconds},
    interrupted,
    process::Process,
    state::Daemon,
    vm::Vm,
    wake,
};
use crate::{
    commands::{
        interruption::Interruption,
        standby::{self, Asked},
    },
    failure::Failure,
    machine::vmm::process_at,
};

/// How long a killed VM may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// How long Firecracker may take to pass Ctrl+Alt+Del on.
const KEYS_PATIENCE: Duration = Duration::from_secs(5);

/// Puts a VM on standby.
pub(super) async fn standby(
    daemon: &Arc<Daemon>,
    vm: &Arc<Vm>,
    request: StandbyRequest,
) -> Result<Value, Failure> {
    if let Some(document) = already(vm, &request) {
        return Ok(document);
    }
    let api_socket = vm.lock().api_socket.clone();
    let Some(api_socket) = api_socket.or_else(|| request.api_socket.clone()) else {
        return Err(Failure::usage(format!("give api_socket: it is not known for {}", vm.id)));
    };
    if let Some(socket) = &request.api_socket {
        is_of(vm, socket).await?;
    }
    if vm.is_over() {
        return Err(Failure::new("not_served", format!("{} is no more", vm.id)));
    }
    let args = request.args(&api_socket)?;
    let (daemon, done) = (daemon.clone(), request.clone());
    let work = move |vm: &Arc<Vm>| {
        if let Some(document) = already(vm, &done) {
            return Ok(document);
        }
        // Should the daemon be killed, the next one finishes it, or lets the guest go on.
        let asked = Asked { by: Some(daemon.directory.clone()), request: json!(done) };
        let document =
            standby::perform(&args, asked, || Ok(daemon.store.clone()), &NoProgress, &Interruption::none());
        daemon.metrics.slept(&document);
        let document = document.inspect_err(|_| interrupted::look_after_vm(&daemon, vm, &args.api_socket))?;
        let answer = json!(document);
        vm.lock().standby = Some((done, document));
        Ok(answer)
    };
    vm.once("standby", json!(request), work).await
}

/// Refuses an API socket that is another VM's.
async fn is_of(vm: &Vm, socket: &Path) -> Result<(), Failure> {
    let Some(process) = vm.lock().process.clone() else { return Ok(()) };
    match held(socket).await {
        Ok(found) if found.pid() != process.pid() => {
            let (at, pid) = (socket.display(), found.pid());
            Err(Failure::usage(format!("api_socket: process {pid}, not {}, listens at {at}", vm.id)))
        }
        // Nobody there: that is for the standby itself to tell.
        _ => Ok(()),
    }
}

/// What the same request gave before: its answer may have been lost. A guest that has run since is captured again,
/// unless the request says by its id that it is the same.
fn already(vm: &Vm, request: &StandbyRequest) -> Option<Value> {
    let same = |then: &StandbyRequest| {
        let api_socket = then.api_socket.clone();
        let for_good = !then.keep_running || then.request_id.is_some();
        for_good && *then == StandbyRequest { api_socket, ..request.clone() }
    };
    let inner = vm.lock();
    let (_, document) = inner.standby.as_ref().filter(|(then, _)| same(then))?;
    Some(json!(document))
}

/// Puts whatever VM answers at `request.api_socket` on standby, whether it is known here or not.
pub(super) async fn standby_at(daemon: &Arc<Daemon>, request: StandbyRequest) -> Result<Value, Failure> {
    let Some(socket) = request.api_socket.clone() else {
        return Err(Failure::usage("give api_socket, where the VM's Firecracker listens"));
    };
    // What can be refused is refused before anything is looked for.
    request.args(&socket)?;
    let process = match held(&socket).await {
        Ok(process) => process,
        // Nobody is there. If this is what put it on standby, its answer may have been lost.
        Err(failure) => {
            let mut vms = daemon.vms();
            vms.retain(|vm| vm.is_over() && vm.lock().api_socket.as_deref() == Some(&socket));
            // Only the last that was there: what became of those before is no answer for it.
            let last = vms.into_iter().max_by_key(|vm| vm.lock().ended_unix_ms);
            return last.and_then(|vm| already(&vm, &request)).ok_or(failure);
        }
    };
    let known =
        |vm: &Arc<Vm>| !vm.is_over() && vm.lock().process.as_ref().is_some_and(|p| p.pid() == process.pid());
    if let Some(vm) = daemon.vms().into_iter().find(known) {
        vm.lock().api_socket.get_or_insert(socket);
        return standby(daemon, &vm, request).await;
    }
    daemon.accepting()?;
    let (vm, _) = daemon.enter(None, &request.name, Origin::Found, json!(request))?;
    let process = Arc::new(process);
    {
        let mut inner = vm.lock();
        inner.process = Some(process.clone());
        inner.api_socket = Some(socket);
    }
    vm.set_state(State::Detached);
    wake::watch_end(daemon, &vm, process)?;
    standby(daemon, &vm, request).await
}

/// The process that listens at `socket`.
async fn held(socket: &Path) -> Result<Process, Failure> {
    let socket = socket.to_owned();
    let found = tokio::task::spawn_blocking(move || {
        Process::of(&process_at(&socket)?).map_err(|e| Failure::new("vmm", e.to_string()))
    });
    found.await.map_err(|e| Failure::new("bug", e.to_string()))?
}

/// Ends a VM.
pub(super) async fn stop(vm: &Arc<Vm>, request: StopRequest) -> Result<VmDocument, Failure> {
    // One that cannot be served is over for the daemon, and its process may live all the same.
    let lives = vm.state() == State::Failed && vm.lock().process.is_some();
    if lives || !vm.is_over() {
        let key = json!(request);
        vm.once("stop", key, move |vm| end(vm, request.grace_s).map(|()| Value::Null)).await?;
        // What there is to release is released, and the report is final.
        if !vm.wait_over(END_PATIENCE).await {
            let message =
                format!("the process of {} has ended, and what was of it is not released yet", vm.id);
            return Err(Failure { retryable: true, ..Failure::new("vm", message) });
        }
    }
    Ok(vm.document())
}

fn end(vm: &Vm, grace_s: u64) -> Result<(), Failure> {
    let (process, api_socket) = {
        let inner = vm.lock();
        (inner.process.clone(), inner.api_socket.clone())
    };
    let failed = |e: std::io::Error| Failure::new("vm", format!("ending {}: {e}", vm.id));
    let process = process.ok_or_else(|| Failure::new("not_served", format!("{} has no process", vm.id)))?;
    let grace = seconds("grace_s", grace_s)?;
    if !grace.is_zero() {
        let Some(socket) = api_socket else {
            return Err(Failure::usage(format!("{} cannot be asked: its API socket is not known", vm.id)));
        };
        let api = ApiClient::new(&socket, KEYS_PATIENCE);
        if let Err(error) = api.put("/actions", &json!({"action_type": "SendCtrlAltDel"})) {
            tracing::warn!(%error, "the guest could not be asked to end");
        } else if process.wait_ended(grace).map_err(failed)? {
            return Ok(());
        }
    }
    process.kill().map_err(failed)?;
    match process.wait_ended(END_PATIENCE).map_err(failed)? {
        true => Ok(()),
        false => Err(Failure::new("vm", format!("{} was killed and does not end", vm.id))),
    }
}

/// Lets a VM go its own way, once all of its memory is there.
pub(super) async fn detach(vm: &Arc<Vm>) -> Result<VmDocument, Failure> {
    if vm.state() != State::Detached {
        vm.once("detach", Value::Null, |vm| let_go(vm).map(|()| Value::Null)).await?;
    }
    Ok(vm.document())
}

/// As [`detach`], on this thread.
pub(super) fn let_go(vm: &Vm) -> Result<(), Failure> {
    let not_served = || Failure::new("not_served", format!("the memory of {} is not served here", vm.id));
    let not_filled = |why: String| {
        let message = format!("not all memory of {} can be had, so it is served on: {why}", vm.id);
        Failure { retryable: true, ..Failure::new("unavailable", message) }
    };
    if vm.state() == State::Detached {
        return Ok(());
    }
    // While this takes its time the session can be looked at.
    let session = vm.session().ok_or_else(not_served)?;
    session.restore().fill_all();
    session.restore().wait_filled().map_err(|e| not_filled(e.to_string()))?;
    drop(session);
    let session = vm.take_session().ok_or_else(not_served)?;
    match session.detach() {
        Ok(report) => {
            vm.lock().report = Some(report);
            vm.set_detached();
            Ok(())
        }
        Err(still) => {
            let why = still.error.to_string();
            vm.lock().session = Some(Arc::new(still.session));
            Err(not_filled(why))
        }
    }
}
