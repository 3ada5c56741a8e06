//! First touches that another process recorded, before it was killed: this one goes on with them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use dormouse_restore::{PageSize, RestoreError, RestoreHandle};
use dormouse_wake::Recording;

use super::tracking::Tracking;
use super::watch::{Watch, Watching};
use dormouse_vmm_common::vmm_process::VmmProcess;
use dormouse_wake::Opened;
use dormouse_wake::Record;

/// What another process recorded of a VM's first touches, and how much may be added.
pub(super) struct Earlier {
    pub(super) record: Record,
    opened: Box<Opened>,
    tracking: Tracking,
    pub(super) window: Duration,
    pub(super) pages: u64,
    /// What was installed by then, if only the stream and faults did that.
    pub(super) installed: Vec<Range<u64>>,
}

impl Earlier {
    /// What is noted of `process`, if that is of the snapshot it is served from.
    pub(super) fn of(process: &VmmProcess, opened: Box<Opened>, tracking: Option<Tracking>) -> Option<Self> {
        let tracking = tracking?;
        let record = tracking.session_of(process)?;
        let same = record.snapshot == opened.snapshot().reference().snapshot.to_string();
        let (window, pages) = record.left();
        same.then_some(Earlier { record, opened, tracking, window, pages, installed: Vec::new() })
    }

    pub(super) fn is_over(&self) -> bool {
        self.window.is_zero() || self.pages == 0
    }
}

/// Records the rest of what a VM touches first. What happened between the last note and now nobody has seen, so that the
/// record is not complete.
pub(super) fn go_on_recording(
    earlier: Earlier,
    page_size: PageSize,
    (unfilled, fill_after): (bool, bool),
    handle: &Arc<RestoreHandle>,
    process: &Arc<VmmProcess>,
) -> Result<Watching, RestoreError> {
    if earlier.is_over() {
        return Ok(Watching::over(earlier.record, process, &earlier.tracking));
    }
    let Earlier { record, opened, tracking, window, installed, .. } = earlier;
    let recording = Recording::new(opened.image(), page_size).after(record.session, &installed);
    Watch::new(*opened, recording, window, handle.clone(), process.clone())
        .begun_before(Duration::from_millis(record.recorded_ms))
        .complete(false)
        .unfilled(unfilled)
        .fill_after(fill_after)
        .track(Some(tracking))
        .start()
}
