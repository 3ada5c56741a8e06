//! What goes on beside the faults of a VM: its stream, the record of its first touches, the fill.

use std::sync::{Arc, Weak};
use std::thread::{Builder, JoinHandle};

use dormouse_restore::{PageSize, RestoreError, RestoreHandle};
use dormouse_wake::{FirstPages, FirstPagesSource, Recording};

use super::earlier::{Earlier, go_on_recording};
use super::session::SessionOptions;
use super::tracking::Tracking;
use super::watch::{Watch, Watching};
use dormouse_vmm_common::vmm_process::VmmProcess;
use dormouse_wake::Opened;

/// What a VM that wakes is given and watched by: its stream, if there is one, and the record of its first touches.
pub(super) type Beside = (Option<(FirstPages, FirstPagesSource)>, Recording, Box<Opened>, Option<Tracking>);

/// Begins all of that for `handle`. Where it fails, nothing holds on to `handle`.
pub(super) fn accompany(
    handle: &Arc<RestoreHandle>,
    process: &Arc<VmmProcess>,
    waking: Option<Beside>,
    earlier: Option<Earlier>,
    options: SessionOptions,
    page_size: PageSize,
) -> Result<Option<Watching>, RestoreError> {
    let (prefetch, record) = (options.prefetch && !options.page_by_page, !options.record_window.is_zero());
    let (mut streaming, mut watch) = (None, None);
    if let Some((first, recording, opened, tracking)) = waking {
        if let Some((first, source)) = first {
            streaming = Some(first.install(handle, &source)?);
        }
        // Filling the rest at once would hide what the machine touches beyond its stream.
        let later = streaming.is_some() && record;
        if record {
            let (handle, process) = (handle.clone(), process.clone());
            let watched = Watch::new(*opened, recording, options.record_window, handle, process)
                .complete(later || !prefetch)
                .rebuilds(!options.page_by_page)
                .fill_after(later && prefetch)
                .track(tracking);
            watch = Some(watched.start()?);
        }
    }
    let mut fill_later = false;
    if let Some(earlier) = earlier {
        // Filled already, or about to be: then there is nothing to be seen any more.
        fill_later = prefetch && earlier.record.unfilled && !earlier.is_over();
        let unfilled = earlier.record.unfilled && (fill_later || !prefetch);
        watch = Some(go_on_recording(earlier, page_size, (unfilled, fill_later), handle, process)?);
    }
    match streaming {
        // Nothing is recorded then, so that no watch is left behind where this fails.
        Some(streaming) if prefetch && !record => fill_behind(streaming, Arc::downgrade(handle))?,
        None if prefetch && !fill_later => handle.fill_all(),
        _ => {}
    }
    Ok(watch)
}

/// Installs the rest once the stream is in place.
fn fill_behind(streaming: JoinHandle<()>, handle: Weak<RestoreHandle>) -> Result<(), RestoreError> {
    let run = move || {
        // A stream that panicked has said so on its own, and the rest is wanted all the more.
        let _ = streaming.join();
        if let Some(handle) = handle.upgrade() {
            handle.fill_all();
        }
    };
    Builder::new().name("dm-fill-behind".into()).spawn(run).map(drop).map_err(RestoreError::Start)
}
