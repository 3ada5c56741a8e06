//! What a VM is given before it asks: the first pages of its resume stream, shown to it; and what it touched beyond them,
//! for the next stream.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dormouse_restore::{PageSize, PageSource};
use dormouse_wake::{Recording, SessionRecord};

use super::on_demand::{OnDemand, OnDemandError, WakeOptions, lock};
use super::shown::show;
use super::stored::StoredVm;
use dormouse_wake::Waking;

/// How often it is looked whether the first pages are there.
const LOOK_INTERVAL: Duration = Duration::from_micros(100);
/// How long the guest waits for its first pages: a store that is slower gives them as they are asked for.
const FIRST_PAGES_PATIENCE: Duration = Duration::from_secs(5);

/// What comes before the VM asks.
#[derive(Default)]
pub(super) struct Ahead {
    /// First pages on their way into the file.
    pouring: Mutex<Option<JoinHandle<()>>>,
    /// Of a VM with all its memory in one image.
    recording: Option<Recording>,
}

impl OnDemand {
    /// Makes empty memory files for `vm`. Its first pages begin to be installed, if it has a resume stream; if not,
    /// prefetching begins.
    ///
    /// # Errors
    /// [`OnDemandError`].
    pub fn wake(vm: &StoredVm, options: WakeOptions) -> Result<Self, OnDemandError> {
        let Some(opened) = vm.opened() else { return Self::start(&vm.sources(), options) };
        let Waking { source, first, recording } = opened.waking(options.prefetch, false, PageSize::Small)?;
        let only = |_| -> Arc<dyn PageSource> { source.clone() };
        let laid_out: Vec<_> = vm.memory.iter().map(|(one, image)| (one.clone(), only(image))).collect();
        let mut memory = Self::empty(&laid_out, options)?;
        memory.ahead.recording = Some(recording.page_by_page());
        match (first, memory.images.first()) {
            (Some((first, source)), Some(image)) => {
                if let Some(running) = &*lock(&image.running) {
                    *lock(&memory.ahead.pouring) = Some(first.install(&running.handle, &source)?);
                }
            }
            _ => memory.prefetch(),
        }
        Ok(memory)
    }

    /// Shows what is there to the VMM of process `pid`, which has mapped the memory files and does not guard them yet; of
    /// a VM with a resume stream, once all of that is there. How many pages that are.
    pub fn show(&self, pid: i32) -> u64 {
        let deadline = Instant::now() + FIRST_PAGES_PATIENCE;
        let pouring = lock(&self.ahead.pouring);
        while pouring.as_ref().is_some_and(|p| !p.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(LOOK_INTERVAL);
        }
        let mut shown = 0;
        for image in &self.images {
            match show(&image.file, pid) {
                Ok(pages) => shown += pages,
                Err(why) => {
                    tracing::info!(pid, %why, "no page is shown to the VMM before it asks, so each costs a round trip");
                    break;
                }
            }
        }
        self.counts.shown.fetch_add(shown, Ordering::AcqRel);
        shown
    }

    /// What the VM touched, so far; `None` if that cannot be told.
    pub fn session(&self) -> Option<SessionRecord> {
        let recording = self.ahead.recording.as_ref()?;
        let image = self.images.first()?;
        let running = lock(&image.running);
        let record = recording.so_far(&running.as_ref()?.handle);
        record.inspect_err(|why| tracing::info!(%why, "the working set could not be recorded")).ok()
    }

    /// Whether the VM has a resume stream, and so its working set. What that leaves is not prefetched yet.
    pub(super) fn has_first_pages(&self) -> bool {
        lock(&self.ahead.pouring).is_some()
    }
}
