//! The end of the daemon. No userfaultfd is closed under a VM that needs it.

use std::{sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, oneshot},
    task::JoinSet,
};

use super::{OnStop, api::State, notify, operations, state::Daemon, vm::Vm};
use crate::failure::Failure;

/// Between two looks whether all is done, and between two tries to fill a VM.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// systemd is told this often that it goes on.
const TELL_INTERVAL: Duration = Duration::from_secs(10);
/// VMs that are filled at the same time.
const FILLED_AT_ONCE: usize = 4;

/// Told once, when the daemon is asked to end. Later requests change nothing.
pub(super) fn on_signal() -> Result<oneshot::Receiver<()>, Failure> {
    let caught = |kind| signal(kind).map_err(|e| Failure::new("bug", format!("signals: {e}")));
    let (mut terminate, mut interrupt) = (caught(SignalKind::terminate())?, caught(SignalKind::interrupt())?);
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // If nobody waits any more, it is ending already.
        let _ = tell.send(());
    });
    Ok(told)
}

/// Takes on no VM any more, and returns when the policy for those there are is fulfilled and nothing is under way: nor is
/// anything begun from then on. Requests are answered until then.
pub(super) async fn stop(daemon: &Arc<Daemon>) {
    daemon.stop();
    for listener in daemon.listeners() {
        listener.stop();
        daemon.remove_listener(&listener.id);
    }
    let policy = daemon.on_stop;
    tracing::info!(%policy, vms = daemon.health().vms, "stopping");
    let status = move |daemon: &Daemon| format!("stopping ({policy}); VMs served: {}", daemon.health().vms);
    notify::stopping(&status(daemon));
    let telling = tokio::spawn({
        let daemon = daemon.clone();
        async move {
            loop {
                tokio::time::sleep(TELL_INTERVAL).await;
                notify::stopping(&status(&daemon));
            }
        }
    });
    while daemon.vms().iter().any(|vm| vm.is_busy()) {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    if policy == OnStop::Detach {
        detach_all(daemon).await;
    }
    // With `detach`, those that ended meanwhile.
    let served = || daemon.vms().iter().any(|vm| matches!(vm.state(), State::Starting | State::Running));
    while policy != OnStop::Keep && served() {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    // Something may have been begun meanwhile, with one that was detached for example.
    let mut told = false;
    while !daemon.gate.close() {
        if !told {
            tracing::info!("something was begun meanwhile, and is waited for");
            told = true;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    if policy == OnStop::Keep {
        // Theirs is the next daemon's to go on with.
        daemon.vms().iter().for_each(|vm| vm.end_span());
    }
    telling.abort();
}

async fn detach_all(daemon: &Arc<Daemon>) {
    let slots = Arc::new(Semaphore::new(FILLED_AT_ONCE));
    let mut filling = JoinSet::new();
    for vm in daemon.vms() {
        let slots = slots.clone();
        filling.spawn(async move {
            // The semaphore is never closed.
            let _slot = slots.acquire_owned().await;
            detach_in_the_end(&vm).await;
        });
    }
    filling.join_all().await;
}

/// A store that is away may come back: there is nothing better to do than to try again.
async fn detach_in_the_end(vm: &Arc<Vm>) {
    while vm.state() == State::Running {
        if let Err(failure) = operations::detach(vm).await {
            tracing::warn!(parent: &vm.span(), %failure, "cannot end yet");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}
