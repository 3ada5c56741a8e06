//! How serving memory on demand ends, and what is told of it.

use std::sync::atomic::Ordering;

use dormouse_core::page::PageIndex;
use dormouse_restore::VmStopped;
use dormouse_restore::state::PageState;

use super::counts::{FaultCounts, ImageReport};
use super::filling;
use super::on_demand::{OnDemand, Running, Served, lock, region};

impl OnDemand {
    /// Lets go of the memory: of a VM that has all of it, or is gone. Whoever waits for a page is not answered.
    pub fn end(&self) {
        self.failing.over.store(true, Ordering::Release);
        for (number, (image, name)) in self.images.iter().zip(&self.names).enumerate() {
            let Some(running) = lock(&image.running).take() else { continue };
            // One that is not stays told as such, for as long as its VM lives.
            if self.is_whole(number, &running) {
                filling::end(&image.file);
            }
            let Running { handle, memory } = running;
            let timeline = handle.timeline();
            let failures = handle.failures().iter().map(|e| e.to_string()).collect();
            // No vCPU runs on this mapping: the guest has one of its own, which its VMM guards.
            let counters = handle.stop(VmStopped::attest());
            drop(memory);
            *lock(&image.ended) = Some(ImageReport { image: name.clone(), counters, timeline, failures });
        }
    }

    /// Whether all that is plugged for good is there, of image number `number`.
    fn is_whole(&self, number: usize, running: &Running) -> bool {
        let slots = self.slots.iter().filter(|s| s.image == number && !s.at.pluggable).map(|s| region(&s.at));
        let mut pages = slots.flat_map(|at| (at.image_first.0..at.image_first.0 + at.pages.0).map(PageIndex));
        let is_there = |state| matches!(state, Some(PageState::Installed | PageState::Removed));
        pages.all(|page| is_there(running.handle.page_state(page)))
    }

    /// Why the VM was ended from here, if it was.
    pub fn ended_because(&self) -> Option<String> {
        lock(&self.failing.why).clone()
    }

    /// What was asked for so far.
    pub fn counts(&self) -> FaultCounts {
        self.counts.now()
    }

    /// What befell the images, so far or until the end.
    pub fn images(&self) -> Vec<ImageReport> {
        let report = |(image, name): (&Served, &String)| match &*lock(&image.running) {
            Some(Running { handle, .. }) => Some(ImageReport {
                image: name.clone(),
                counters: handle.counters(),
                timeline: handle.timeline(),
                failures: handle.failures().iter().map(|e| e.to_string()).collect(),
            }),
            None => lock(&image.ended).clone(),
        };
        self.images.iter().zip(&self.names).filter_map(report).collect()
    }
}

impl Drop for OnDemand {
    /// A restore that is merely dropped goes on, as if a guest ran on its memory.
    fn drop(&mut self) {
        self.end();
    }
}
