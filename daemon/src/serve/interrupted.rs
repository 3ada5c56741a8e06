//! Standbys that were cut off, as an earlier daemon was ended in their midst or the store did not say how they ended: they
//! are finished where the snapshot is durable, and the guest goes on where nothing was stored. Never both: two copies of
//! one machine awake are the worst that can happen.

use std::{path::Path, sync::Arc, thread, time::Duration};

use dormouse_firecracker::{ApiClient, VmmProcess, machine, tracking::Tracking, under_way::Left};

use super::{
    state::Daemon,
    vm::{Finishing, Vm},
};
use crate::{
    commands::unfinished::{Unfinished, unclear},
    machine::vmm::{process_at, tracking},
};

/// How long a VM's Firecracker may take to let its guest go on.
const API_PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries while the store is away, or a Firecracker does not answer.
const TRY_INTERVAL: Duration = Duration::from_secs(1);

/// Does what is left of a standby of `process`, if anything is: on a thread, as the store may be away and its Firecracker
/// slow to answer, until it is done or the process has ended.
pub(super) fn look_after(daemon: &Arc<Daemon>, vm: Option<Arc<Vm>>, process: VmmProcess) {
    let Ok(tracking) = tracking() else { return };
    if !tracking.standby_is_noted(&process) {
        return;
    }
    let daemon = daemon.clone();
    let started = thread::Builder::new().name("dm-unfinished".into()).spawn(move || {
        let _inside = vm.as_ref().map(|vm| vm.span().entered());
        // Whoever is at it now may be killed, too.
        loop {
            if let Some((under_way, note)) = tracking.standby_left(&process) {
                match Unfinished::judge(under_way, note, &process, &daemon.store) {
                    Ok(unfinished) => {
                        do_what_is_left(&daemon, vm.as_ref(), &process, &tracking, unfinished);
                    }
                    Err(failure) => {
                        let pid = process.peer().pid;
                        tracing::warn!(pid, %failure, "a standby that was cut off waits for the store");
                    }
                }
            }
            if !tracking.standby_is_noted(&process) {
                return;
            }
            thread::sleep(TRY_INTERVAL);
        }
    });
    if let Err(error) = started {
        tracing::error!(%error, "a standby that was cut off is not looked after");
    }
}

/// The same of a VM whose standby failed.
pub(super) fn look_after_vm(daemon: &Arc<Daemon>, vm: &Arc<Vm>, api_socket: &Path) {
    if let Ok(process) = process_at(api_socket) {
        look_after(daemon, Some(vm.clone()), process);
    }
}

/// The same of VMs that are not among those `kept`: they were found and put on standby.
pub(super) fn look_after_others(daemon: &Arc<Daemon>, kept: &[i32]) {
    let Ok(tracking) = tracking() else { return };
    for (under_way, note) in tracking.all_standbys_left() {
        if note.by.as_ref() != Some(&daemon.directory) {
            continue;
        }
        match process_at(&note.api_socket) {
            Ok(process) if under_way.is_of(&process, &tracking) => {
                drop(under_way);
                // Whoever takes it up sees to those that are kept.
                if !kept.contains(&process.peer().pid) {
                    look_after(daemon, None, process);
                }
            }
            // It has ended.
            _ => under_way.done(),
        }
    }
}

fn do_what_is_left(
    daemon: &Daemon,
    vm: Option<&Arc<Vm>>,
    process: &VmmProcess,
    tracking: &Tracking,
    unfinished: Unfinished,
) {
    let (pid, name) = (process.peer().pid, unfinished.note.name.clone());
    match unfinished.left.clone() {
        Left::Undone => go_on(pid, unfinished),
        Left::End { snapshot } => {
            // Known before it ends, and all of it before the VM has: whoever sees that it is gone sees why.
            let _finishing = vm.map(Finishing::begin);
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
                        "a standby that was cut off is finished: it was durable"
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
        Left::Unclear { .. } => {
            let failure = unclear(&name);
            tracing::error!(pid, name, %failure, "a standby that was cut off is left to you");
            unfinished.done();
        }
        Left::RanOn { snapshot } => {
            tracing::error!(
                pid,
                name,
                snapshot,
                "a standby of this VM was cut off; the snapshot is durable, but somebody let the guest run on: end one \
                 of the two"
            );
            unfinished.done();
        }
    }
}

/// Nothing was stored, for which the guest may stand still.
fn go_on(pid: i32, unfinished: Unfinished) {
    let api = ApiClient::new(&unfinished.note.api_socket, API_PATIENCE);
    let resumed = match machine::is_running(&api) {
        Ok(false) if unfinished.note.was_running => api.resume().map_err(|e| e.to_string()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    match resumed {
        Ok(()) => {
            tracing::warn!(pid, "a standby of this VM was cut off; nothing was stored, it is as it was");
            unfinished.done();
        }
        Err(why) => {
            tracing::error!(pid, %why, "the VM may stand still; it is told to go on again")
        }
    }
}
