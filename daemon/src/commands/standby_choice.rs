//! What a standby captures, and over which parent that is stored.

use dormouse_chunkstore::Store;
use dormouse_core::Name;
use dormouse_firecracker::{ApiClient, VmmProcess, api::SnapshotKind, capture, memfile, tracking::Tracking};

use super::standby::{StandbyArgs, vmm_failure};
use crate::failure::Failure;

/// What is captured, and over which parent it is stored.
pub(super) struct Choice {
    /// Whether the guest runs now.
    pub(super) is_running: bool,
    pub(super) kind: SnapshotKind,
    pub(super) parent: Option<Name>,
    pub(super) full_because: Option<&'static str>,
}

/// Chooses for a VM of which no other standby is under way: one that comes in between makes Firecracker count anew, and
/// a difference over what was chosen before would be a machine that never was.
pub(super) fn choose(
    args: &StandbyArgs,
    api: &ApiClient,
    process: &VmmProcess,
    tracking: &Tracking,
    store: &Store,
) -> Result<Choice, Failure> {
    let is_running = capture::is_running(api).map_err(|e| vmm_failure(&e))?;
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
    if !args.replace && parent.as_ref() != Some(&args.name) && store.open_snapshot(&args.name).is_ok() {
        return Err(Failure::exists(&args.name));
    }
    let full_because = if args.full {
        Some("--full asks for it")
    } else if parent.is_none() {
        Some("there is no parent")
    } else if !parent.as_ref().is_some_and(stands_for_base) {
        Some("this host does not know the VM to have come from the parent")
    } else if !capture::tracks_dirty_pages(api).map_err(|e| vmm_failure(&e))? {
        Some("Firecracker does not track dirty pages")
    } else if !memfile::holes_are_exact() {
        Some("transparent huge pages blur what changed in files in memory")
    } else {
        None
    };
    let kind = if full_because.is_some() { SnapshotKind::Full } else { SnapshotKind::Diff };
    Ok(Choice { is_running, kind, parent, full_because })
}
