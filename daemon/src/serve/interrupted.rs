//! Standbys in whose midst an earlier daemon was ended: they are finished where the snapshot is durable, and the guest
//! goes on where nothing was stored. Never both: two copies of one machine awake are the worst that can happen.

use std::{sync::Arc, thread, time::Duration};

use dormouse_vmm_glue::{
    firecracker::{ApiClient, VmmProcess, capture, tracking::Tracking, under_way::Left},
    keeper::KeptVm,
};

use super::{kept::Trouble, state::Daemon, vm::Vm};
use crate::commands::{
    standby::{process_at, tracking},
    unfinished::Unfinished,
};

/// How long a VM's Firecracker may take to let its guest go on.
const API_PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries while the store is away.
const TRY_INTERVAL: Duration = Duration::from_secs(1);

/// The standby of a kept VM that was left behind, if there is one.
pub(super) fn left_behind(daemon: &Daemon, kept: &KeptVm) -> Result<Option<Unfinished>, Trouble> {
    // Whatever is wrong with its process is found when it is taken up.
    let (Ok(process), Ok(tracking)) = (kept.vmm(), tracking()) else { return Ok(None) };
    Unfinished::of(&process, &tracking, &daemon.store).map_err(|failure| Trouble::Later(failure.message))
}

/// Does what is left of the standby of a VM that is served again.
pub(super) fn finish(daemon: &Daemon, vm: &Vm, kept: &KeptVm, unfinished: Unfinished) {
    let (Ok(process), Ok(tracking)) = (kept.vmm(), tracking()) else { return };
    do_what_is_left(daemon, Some(vm), &process, &tracking, unfinished);
}

/// The same for VMs that are not among those `kept`: they were found and put on standby. On a thread, as the store may be away.
pub(super) fn finish_others(daemon: &Arc<Daemon>, kept: Vec<i32>) {
    let daemon = daemon.clone();
    let started = thread::Builder::new().name("dm-unfinished".into()).spawn(move || {
        while finish_others_once(&daemon, &kept) && !daemon.is_stopping() {
            thread::sleep(TRY_INTERVAL);
        }
    });
    if let Err(error) = started {
        tracing::error!(%error, "standbys that were interrupted are not looked after");
    }
}

/// Whether some have to be looked at again.
fn finish_others_once(daemon: &Daemon, kept: &[i32]) -> bool {
    let Ok(tracking) = tracking() else { return false };
    let mut again = false;
    for (under_way, note) in tracking.all_standbys_left() {
        if note.by.as_ref() != Some(&daemon.directory) {
            continue;
        }
        let process = match process_at(&note.api_socket) {
            Ok(process) if under_way.is_of(&process, &tracking) => process,
            // It has ended.
            _ => {
                under_way.done();
                continue;
            }
        };
        let pid = process.peer().pid;
        if kept.contains(&pid) {
            // Whoever takes it up sees to that.
            continue;
        }
        match Unfinished::judge(under_way, note, &process, &daemon.store) {
            Ok(unfinished) => do_what_is_left(daemon, None, &process, &tracking, unfinished),
            Err(failure) => {
                tracing::warn!(pid, %failure, "a standby that was interrupted waits for the store");
                again = true;
            }
        }
    }
    again
}

fn do_what_is_left(
    daemon: &Daemon,
    vm: Option<&Vm>,
    process: &VmmProcess,
    tracking: &Tracking,
    unfinished: Unfinished,
) {
    let (pid, name) = (process.peer().pid, unfinished.note.name.clone());
    match unfinished.left.clone() {
        Left::Undone => go_on(pid, unfinished),
        Left::End { snapshot } => {
            // Known before it ends: whoever sees that it is gone sees why.
            let request = serde_json::from_value(unfinished.note.request.clone()).ok();
            if let (Some(vm), Some(answer)) = (vm, request.zip(unfinished.answer())) {
                vm.lock().standby = Some(answer);
            }
            match unfinished.end(process, tracking, &daemon.store) {
                Ok(stream) => {
                    tracing::warn!(
                        pid,
                        name,
                        snapshot,
                        "the standby that an earlier daemon began is finished: it was durable"
                    );
                    if let Some((_, answer)) =
                        vm.map(|vm| vm.lock()).as_mut().and_then(|inner| inner.standby.as_mut())
                    {
                        answer.stream = stream;
                    }
                }
                Err(failure) => {
                    tracing::error!(pid, name, %failure, "a standby that is durable cannot be finished");
                    vm.into_iter().for_each(|vm| vm.lock().standby = None);
                }
            }
        }
        Left::RanOn { snapshot } => {
            tracing::error!(
                pid,
                name,
                snapshot,
                "the earlier daemon was ended while it put this VM on standby; the snapshot is durable, but somebody let \
                 the guest run on: end one of the two"
            );
            unfinished.done();
        }
    }
}

/// Nothing was stored, for which the guest may stand still.
fn go_on(pid: i32, unfinished: Unfinished) {
    let api = ApiClient::new(&unfinished.note.api_socket, API_PATIENCE);
    let resumed = match capture::is_running(&api) {
        Ok(false) if unfinished.note.was_running => api.resume().map_err(|e| e.to_string()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    match resumed {
        Ok(()) => {
            tracing::warn!(
                pid,
                "the earlier daemon was ended while it put this VM on standby; nothing was stored, it is as it was"
            );
            unfinished.done();
        }
        Err(why) => {
            tracing::error!(pid, %why, "the VM may stand still; PATCH /vm of its Firecracker lets it go on")
        }
    }
}
