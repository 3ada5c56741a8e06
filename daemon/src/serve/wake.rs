//! Waking: a snapshot runs again in a Firecracker, and the daemon serves its memory.

use std::{sync::Arc, thread, time::Duration};

use dormouse_firecracker::{ConsoleInput, Firecracker, Session};
use rustix::process::{Pid, WaitOptions};
use serde_json::{Value, json};

use super::{
    api::{Origin, State, VmDocument, WakeRequest},
    kept,
    process::Process,
    scratch::Scratch,
    state::Daemon,
    vm::{Vm, now_unix_ms},
};
use crate::{
    failure::Failure,
    machine::{
        serving::thread_failure,
        wake::{self as waking, Wake, WakeIn},
    },
    traces,
};

/// Between two looks whether a standby is over.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Waits are cut into pieces of this length.
const A_WHILE: Duration = Duration::from_secs(3600);

/// Wakes what `request` asks for, or gives the VM that the same request woke before. Whether it is new.
pub(super) async fn wake(daemon: &Arc<Daemon>, request: WakeRequest) -> Result<(VmDocument, bool), Failure> {
    daemon.accepting()?;
    let args = request.args(daemon.firecracker.as_deref())?;
    let origin = if args.firecracker.is_some() { Origin::Started } else { Origin::Pool };
    if let Some(id) = &request.id {
        // An id is shown in paths and tables.
        dormouse_core::Name::new(id).map_err(|e| Failure::usage(format!("id: {e}")))?;
    }
    let key = json!(request);
    let (vm, new) = daemon.enter(request.id.as_deref(), &request.snapshot, origin, key.clone())?;
    if !new && vm.state() == State::Starting && vm.lock().origin == Origin::Kept {
        let message = format!("{} is about to be taken up again", vm.id);
        return Err(Failure { retryable: true, ..Failure::new("busy", message) });
    }
    // Until its resume has come to its end nothing else can be done with it, though it runs already.
    if new || vm.state() == State::Starting || vm.is_busy_with("resume") {
        let (daemon, input) = (daemon.clone(), input_of(&request));
        let work = move |vm: &Arc<Vm>| match begin(&daemon, vm, &args, input) {
            Ok(()) => Ok(Value::Null),
            Err(failure) => {
                daemon.metrics.resume_failed(failure.kind);
                fail(&daemon, vm, &failure);
                Err(failure)
            }
        };
        vm.once("resume", key, work).await?;
    }
    Ok((vm.document(), new))
}

/// The VM never ran, or cannot be served.
pub(super) fn fail(daemon: &Daemon, vm: &Vm, failure: &Failure) {
    {
        let mut inner = vm.lock();
        inner.failure = Some(failure.clone());
        inner.ended_unix_ms = Some(now_unix_ms());
    }
    traces::outcome::<()>(&vm.span(), &Err(failure.clone()));
    vm.set_state(State::Failed);
    vm.end_span();
    daemon.forget_oldest();
}

fn input_of(request: &WakeRequest) -> ConsoleInput {
    request.console_input.clone().map_or(ConsoleInput::Nothing, ConsoleInput::File)
}

fn begin(daemon: &Arc<Daemon>, vm: &Arc<Vm>, request: &Wake, input: ConsoleInput) -> Result<(), Failure> {
    if vm.state() != State::Starting {
        // The request came again at the very moment it was done.
        return Ok(());
    }
    // Of two that want the same Firecracker the second is told so before it touches it.
    let _reserved = request.api_socket.as_deref().map(|socket| daemon.reserve(socket)).transpose()?;
    let scratch = Scratch::make(&daemon.directory, &daemon.short_name())?;
    let keep = daemon.keeper.as_ref().map(|keeper| (keeper.clone(), kept::notes(vm, Some(&scratch))));
    let within = WakeIn { scratch: scratch.path(), input, own_group: true, keep };
    let woken =
        waking::wake(request, within, || Ok(daemon.store.clone())).inspect_err(|_| scratch.remove())?;
    scratch.woken();
    daemon.metrics.resumed(&woken.document);
    traces::tell(&vm.span(), "dormouse.snapshot", woken.document.snapshot.clone());
    {
        let mut inner = vm.lock();
        inner.snapshot = Some(woken.document.snapshot.clone());
        inner.api_socket = Some(woken.document.api_socket.clone());
        inner.child = woken.started.and_then(Firecracker::detach);
        inner.scratch = Some(scratch);
        inner.resume = Some(woken.document);
    }
    serve(daemon, vm, woken.session)
}

/// Takes on a VM whose memory is being served.
pub(super) fn serve(daemon: &Arc<Daemon>, vm: &Arc<Vm>, session: Session) -> Result<(), Failure> {
    let session = Arc::new(session);
    vm.lock().session = Some(session.clone());
    let process = match Process::of(session.process()) {
        Ok(process) => Arc::new(process),
        Err(error) if session.process().has_ended().unwrap_or(false) => {
            tracing::info!(%error, "it has ended already");
            drop(session);
            end(daemon, vm);
            return Ok(());
        }
        Err(error) => return Err(abandon(&session, &format!("its process cannot be held: {error}"))),
    };
    vm.lock().process = Some(process.clone());
    vm.set_state(State::Running);
    watch_end(daemon, vm, process).map_err(|failure| abandon(&session, &failure.message))
}

/// Nobody would notice the VM's end, so it is ended now. It has not run long.
fn abandon(session: &Session, why: &str) -> Failure {
    let pid = session.process().peer().pid;
    match session.process().kill() {
        Ok(()) => Failure::new("vm", format!("{why}; process {pid} was killed")),
        Err(error) => Failure::new("vm", format!("{why}; process {pid} cannot be killed ({error})")),
    }
}

/// Sees to what is to be done once the VM's process is gone.
pub(super) fn watch_end(daemon: &Arc<Daemon>, vm: &Arc<Vm>, process: Arc<Process>) -> Result<(), Failure> {
    let (daemon, vm) = (daemon.clone(), vm.clone());
    let waiting = move || {
        let ended = loop {
            match process.wait_ended(A_WHILE) {
                Ok(false) => {}
                ended => break ended,
            }
        };
        let _inside = vm.span().entered();
        match ended {
            Ok(_) => end(&daemon, &vm),
            Err(error) => tracing::error!(%error, "the end of its process cannot be waited for"),
        }
    };
    thread::Builder::new().name("dm-end".into()).spawn(waiting).map(drop).map_err(|e| thread_failure(&e))
}

/// The VM's process is gone: everything of it is released.
pub(super) fn end(daemon: &Daemon, vm: &Vm) {
    let served = vm.take_session().map(|session| session.wait(Duration::from_secs(1)));
    let (child, scratch) = {
        let mut inner = vm.lock();
        (inner.child.take(), inner.scratch.take())
    };
    match served {
        Some(Ok(Ok(report))) => {
            if let Some(why) = &report.killed_because {
                tracing::error!(%why, "killed rather than given a wrong page");
            }
            traces::served(&vm.span(), &report);
            vm.lock().report = Some(report);
        }
        Some(Ok(Err(_session))) => tracing::error!("its process was thought to be gone and is not"),
        Some(Err(error)) => tracing::error!(%error, "its process cannot be waited for"),
        // It was detached before.
        None => {}
    }
    let child = child.and_then(|pid| Pid::from_raw(pid.cast_signed()));
    // Its number is its own until it is waited for.
    if let Some(child) = child
        && let Err(error) = rustix::process::waitpid(Some(child), WaitOptions::NOHANG)
    {
        tracing::warn!(%error, "its process stays a zombie");
    }
    if let Some(scratch) = scratch {
        scratch.remove();
    }
    // What ended it comes to its end first: whoever sees that the VM is gone sees why.
    while vm.is_busy_with("standby") {
        thread::sleep(LOOK_INTERVAL);
    }
    vm.lock().ended_unix_ms = Some(now_unix_ms());
    let killed = vm.lock().report.as_ref().is_some_and(|r| r.killed_because.is_some());
    let slept = vm.lock().standby.as_ref().is_some_and(|(request, _)| !request.keep_running);
    daemon.metrics.ended(if killed {
        "killed"
    } else if slept {
        "standby"
    } else {
        "ended"
    });
    vm.set_state(State::Ended);
    vm.end_span();
    daemon.forget_oldest();
}
