//! A machine that wakes, by the path that the service's machines take: its snapshot opened, its first pages decoded ahead
//! and installed behind its start. None are held out, as they are in some wakes to measure how good they are.

use std::{sync::Arc, thread::JoinHandle};

use dormouse_chunkstore::{ResumeStream, Store};
use dormouse_core::{PAGE_BYTES, PageIndex};
use dormouse_restore::{Memory, PageSize, Policy, Restore, RestoreHandle, VmStopped, state::PageState};
use dormouse_wake::{Opened, Waking};

use crate::guest::{Bench, name, plan};
use crate::{BenchError, Result};

/// Memory that is filled from a snapshot.
pub(crate) struct Machine {
    pub(crate) handle: RestoreHandle,
    waking: Waking,
}

impl Machine {
    /// Starts to restore `memory` from what was opened.
    pub(crate) fn wake(opened: &Opened, memory: Memory, policy: Policy) -> Result<Self> {
        let waking = opened.waking(true, false, PageSize::Small)?;
        let pages = waking.source.page_count();
        let handle = Restore::start(plan(waking.source.clone(), pages)?, memory, policy)?;
        Ok(Machine { handle, waking })
    }

    /// Begins to install the first pages.
    pub(crate) fn install(&self) -> Result<JoinHandle<()>> {
        let (first, source) = self.waking.first.as_ref().ok_or_else(no_stream)?;
        Ok(first.install(&self.handle, source)?)
    }

    /// Installs the first pages.
    pub(crate) fn fill(&self) -> Result<()> {
        self.install()?.join().map_err(|_| BenchError::wrong("the thread that installs panicked"))
    }

    /// Waits until all first pages are decoded; for those that are kept in memory.
    pub(crate) fn wait_decoded(&self) {
        self.waking.first.iter().for_each(|(first, _)| first.wait_decoded());
    }

    /// Ends the machine. How many first pages it had, all of which must be in place by now.
    pub(crate) fn end(self) -> Result<u64> {
        let (first, _) = self.waking.first.as_ref().ok_or_else(no_stream)?;
        let there = |page: u64| self.handle.page_state(PageIndex(page)) == Some(PageState::Installed);
        let missing = first.list().iter().cloned().flatten().filter(|page| !there(*page)).count();
        let pages = first.pages();
        self.handle.stop(VmStopped::attest());
        match missing {
            0 => Ok(pages),
            _ => Err(BenchError::wrong(format!("{missing} of {pages} first pages are not in place"))),
        }
    }
}

fn no_stream() -> BenchError {
    BenchError::wrong("the stream just built is not there, or is empty")
}

/// Opens `called` to be woken.
pub(crate) fn open(store: &Store, called: &str) -> Result<Opened> {
    Ok(Opened::open(store, &name(called)?)?)
}

/// The guest with a stream of `mib` of its pages, on local disk, opened.
pub(crate) fn with_stream(bench: &Bench, mib: u64) -> Result<Opened> {
    let store = bench.local()?;
    store.build_stream(&store.open_snapshot(&name("guest")?)?, &bench.working_set(mib * 256, 1))?;
    open(&store, "guest")
}

/// The pages of a stream in the order of their addresses, in runs as long as they can be: what a floor copies.
pub(crate) fn runs_of(opened: &Opened) -> Result<Vec<(PageIndex, Vec<u8>)>> {
    let runs = std::sync::Mutex::new(Vec::new());
    let stream: &ResumeStream = opened.stream().ok_or_else(no_stream)?;
    stream.for_each_run(1, &|_, first, bytes| {
        runs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((first, bytes.to_vec()));
        Ok(())
    })?;
    let mut runs = runs.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    runs.sort_by_key(|(first, _)| *first);
    let mut merged: Vec<(PageIndex, Vec<u8>)> = Vec::new();
    for (first, bytes) in runs {
        match merged.last_mut() {
            Some((before, all)) if before.0 + (all.len() / PAGE_BYTES) as u64 == first.0 => {
                all.extend_from_slice(&bytes);
            }
            _ => merged.push((first, bytes)),
        }
    }
    Ok(merged)
}

/// Memory of the size of what was opened, mapped and registered.
pub(crate) fn memory_for(opened: &Opened) -> Result<(Arc<dormouse_restore::Mapping>, Memory)> {
    crate::guest::fresh(opened.image().page_count().0, true)
}
