//! Reads the kernel's messages: removals take effect at once, faults go to the fault thread's inbox.

use std::time::Instant;

use crate::core::{Core, Fault, lock};
use crate::error::RestoreError;
use crate::plan::Span;
use crate::state::{Action, PageEvent};
use crate::sys::event::Event;
use crate::sys::uffd::UffdError;

impl Core {
    /// Reads one batch of messages; how many there were.
    ///
    /// Any thread may call this that is not inside the gate: one whose install was refused with EAGAIN must,
    /// because that means that an event waits and nothing can be installed before it is read.
    pub(crate) fn pump(&self) -> Result<usize, UffdError> {
        let mut buffer = lock(&self.events);
        let (mut read, mut faults, mut to_wake, mut strays) = (0, 0, Vec::new(), Vec::new());
        {
            let _closed = self.gate.close();
            let at = Instant::now();
            for event in self.memory.uffd().read_events(&mut buffer)? {
                read += 1;
                match event {
                    Event::Fault { address, .. } => {
                        faults += 1;
                        lock(&self.inbox).push_back(Fault { address, at });
                    }
                    Event::Remove { start, end } | Event::Unmap { start, end } => {
                        self.counters.removes.add(1);
                        self.remove(start, end, &mut to_wake);
                    }
                    Event::OtherFault { address } => strays.push(address),
                    Event::Remap { from, .. } => strays.push(from),
                    Event::Fork { .. } => tracing::warn!("the VMM forked; its child is not served"),
                    Event::Unknown { kind } => tracing::warn!(kind, "unknown userfaultfd message"),
                }
            }
        }
        drop(buffer);
        self.counters.events.add(read as u64);
        self.counters.faults.add(faults);
        // Only now: a woken vCPU faults again at once and must find the event read and the gate open.
        for span in to_wake {
            self.installer.wake(span);
        }
        strays.into_iter().for_each(|address| self.stray(address));
        Ok(read)
    }

    /// Marks all cells of an address range removed.
    pub(crate) fn remove(&self, start: u64, end: u64, to_wake: &mut Vec<Span>) {
        for (index, region) in self.memory.regions().iter().enumerate() {
            let unit = region.page_size().bytes();
            let from = start.max(region.start());
            let to = end.min(region.start() + region.bytes());
            if from >= to {
                continue;
            }
            // The kernel rounds a removal from huge pages inwards, so a page removed in part stays.
            let (first, last) = ((from - region.start()).div_ceil(unit), (to - region.start()) / unit);
            let Some(span) = self.plan.span(index, first, last.saturating_sub(first)) else { continue };
            if self.table.apply_all(span, PageEvent::Removed, Action::Wake) {
                to_wake.push(span);
            }
        }
    }

    /// A fault nobody here can answer.
    pub(crate) fn stray(&self, address: u64) {
        self.fail_vm(RestoreError::StrayFault { address });
    }
}
