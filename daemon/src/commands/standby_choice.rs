//! What a standby captures, and over which parent that is stored.

use dormouse_chunkstore::{Standing, Store};
use dormouse_core::Name;
use dormouse_firecracker::{
    ApiClient, Jail, VmmProcess,
    api::SnapshotKind,
    capture_files::{CaptureFiles, difference_fits},
    machine::Machine,
    memfile,
    tracking::Tracking,
};

use super::standby::{StandbyArgs, vmm_failure};
use crate::failure::Failure;

/// What is captured, and over which parent it is stored.
#[derive(Debug)]
pub(super) struct Choice {
    /// Whether the guest runs now.
    pub(super) is_running: bool,
    pub(super) kind: SnapshotKind,
    pub(super) parent: Option<Name>,
    pub(super) full_because: Option<&'static str>,
    /// What the name stands for.
    pub(super) before: Standing,
}

/// Chooses for a VM of which no other standby is under way, and makes the files that it is captured into. One that comes in
/// between makes Firecracker count anew, and a difference over what was chosen before would be a machine that never was.
pub(super) fn choose(
    args: &StandbyArgs,
    api: &ApiClient,
    process: &VmmProcess,
    jail: Option<&Jail>,
    tracking: &Tracking,
    store: &Store,
) -> Result<(Choice, CaptureFiles), Failure> {
    let machine = Machine::of(api).map_err(|e| vmm_failure(&e))?;
    check_drives(&machine)?;
    let base = tracking.base_of(process);
    let stands_for_base = |name: &Name| {
        let snapshot = store.open_snapshot(name).ok().map(|s| s.reference().snapshot.to_string());
        snapshot.is_some() && snapshot == base.as_ref().map(|b| b.snapshot.clone())
    };
    let parent = match &args.parent {
        Some(parent) => {
            store.open_snapshot(parent)?;
            Some(parent.clone())
        }
        None => base.as_ref().and_then(|b| Name::new(&b.name).ok()).filter(|name| stands_for_base(name)),
    };
    let before = store.standing(&args.name)?;
    if !args.replace && parent.as_ref() != Some(&args.name) && before.snapshot.is_some() {
        return Err(Failure::exists(&args.name));
    }
    let full_because = if args.full {
        Some("--full asks for it")
    } else if parent.is_none() {
        Some("there is no parent")
    } else if !parent.as_ref().is_some_and(stands_for_base) {
        Some("this host does not know the VM to have come from the parent")
    } else if !machine.tracks_dirty {
        Some("Firecracker does not track dirty pages")
    } else if machine.misplaces_differences() {
        Some(
            "Firecracker 1.14.0 and 1.14.1 write differences of such a guest at wrong offsets: use 1.14.2 or later",
        )
    } else if !memfile::holes_are_exact() {
        Some("transparent huge pages blur what changed in files in memory")
    } else if !difference_fits(process, &machine) {
        Some("the control group of Firecracker may have no room for a difference")
    } else {
        None
    };
    let kind = if full_because.is_some() { SnapshotKind::Full } else { SnapshotKind::Diff };
    let files = CaptureFiles::prepare(kind, &machine, process, jail).map_err(|e| vmm_failure(&e))?;
    Ok((Choice { is_running: machine.is_running, kind, parent, full_because, before }, files))
}

/// Firecracker leaves drives that another process serves out of its snapshots, or ends when it is asked for one.
fn check_drives(machine: &Machine) -> Result<(), Failure> {
    if machine.vhost_user_drives.is_empty() {
        return Ok(());
    }
    let drives = machine.vhost_user_drives.join(", ");
    Err(Failure::new(
        "vmm",
        format!(
            "another process serves the drive {drives} (vhost-user), and Firecracker's snapshots do not hold such drives: \
             the guest would wake without it; attach it as a file, or do not put this VM on standby"
        ),
    ))
}

#[cfg(test)]
#[path = "standby_choice_tests.rs"]
mod tests;
