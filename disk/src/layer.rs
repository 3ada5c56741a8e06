//! One overlay layer: a sparse data file in which each page lies at its own offset, and the map of which pages it holds.
//!
//! Flush: take what changed, sync the data, append to the map, sync that, acknowledge. After one failure nothing is
//! acknowledged any more, and pages written since the flush before are not read either: nobody knows whether the kernel
//! still has them.

use std::{
    io, mem,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dormouse_core::PAGE_BYTES;

use crate::{
    error::{DiskError, Result},
    file::DiskFile,
    map::MapLog,
    states::{PageState, PageStates, StateRun},
};

/// An open layer.
pub(crate) struct Layer {
    number: u64,
    data: Arc<dyn DiskFile>,
    pages: Mutex<Pages>,
    /// `None` once the layer was opened as a sealed one.
    log: Mutex<Option<Log>>,
}

/// What is known of the pages. Held for moments only, never over I/O.
#[derive(Default)]
struct Pages {
    states: PageStates,
    /// States that the map file does not have yet.
    pending: PageStates,
    /// Pages written or discarded since the last flush began, and those that the flush under way is to make durable; any
    /// state but absent marks them.
    unflushed: PageStates,
    flushing: PageStates,
    /// Writes and discards done.
    changes: u64,
    poisoned: Option<Arc<io::Error>>,
}

struct Log {
    map: MapLog,
    /// Of [`Pages::changes`], those that are durable.
    durable_changes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pages {
    fn check(&self) -> Result<()> {
        self.poisoned.clone().map_or(Ok(()), |error| Err(DiskError::Poisoned(error)))
    }

    fn set(&mut self, pages: Range<u64>, state: PageState) {
        self.unflushed.set(pages.clone(), PageState::Present);
        for page in pages {
            if self.states.get(page) != state {
                self.states.set(page..page + 1, state);
                self.pending.set(page..page + 1, state);
            }
        }
        self.changes += 1;
    }

    /// Whether the page's content is in doubt, since a sync that should have made it durable failed.
    fn in_doubt(&self, page: u64) -> bool {
        let marked = |pages: &PageStates| pages.get(page) != PageState::Absent;
        self.poisoned.is_some() && (marked(&self.unflushed) || marked(&self.flushing))
    }
}

impl Layer {
    pub(crate) fn new(data: Arc<dyn DiskFile>, map: MapLog, states: PageStates) -> Self {
        let number = map.header().layer;
        let pages = Mutex::new(Pages { states, ..Pages::default() });
        Layer { number, data, pages, log: Mutex::new(Some(Log { map, durable_changes: 0 })) }
    }

    /// A layer that takes no writes.
    pub(crate) fn sealed(number: u64, data: Arc<dyn DiskFile>, states: PageStates) -> Self {
        let pages = Mutex::new(Pages { states, ..Pages::default() });
        Layer { number, data, pages, log: Mutex::new(None) }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn state(&self, page: u64) -> PageState {
        lock(&self.pages).states.get(page)
    }

    /// How many of `pages` the data file does not hold yet.
    pub(crate) fn not_present(&self, pages: Range<u64>) -> u64 {
        let known = lock(&self.pages);
        pages.filter(|page| known.states.get(*page) != PageState::Present).count() as u64
    }

    pub(crate) fn runs(&self) -> Vec<StateRun> {
        lock(&self.pages).states.runs()
    }

    pub(crate) fn held_bytes(&self) -> u64 {
        lock(&self.pages).states.count(PageState::Present) * PAGE_BYTES as u64
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let pages = lock(&self.pages);
        [&pages.states, &pages.pending, &pages.unflushed, &pages.flushing]
            .map(PageStates::memory_bytes)
            .iter()
            .sum()
    }

    /// Fails if a page in doubt is among `pages`: of those neither data nor zeros are sure.
    pub(crate) fn check_pages(&self, pages: Range<u64>) -> Result<()> {
        let known = lock(&self.pages);
        if known.poisoned.is_some() && pages.into_iter().any(|page| known.in_doubt(page)) {
            return known.check();
        }
        Ok(())
    }

    /// Reads whole pages that are present.
    pub(crate) fn read(&self, first: u64, into: &mut [u8]) -> Result<()> {
        self.data.read_at(into, first * PAGE_BYTES as u64).map_err(DiskError::io("reading"))?;
        // A sync may have failed meanwhile, and the kernel have dropped what was read.
        self.check_pages(first..first + (into.len() / PAGE_BYTES) as u64)
    }

    /// Writes `bytes` at `offset`. Pages that are not present yet must be written whole.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset + bytes.len() as u64;
        let pages = offset / PAGE_BYTES as u64..end.div_ceil(PAGE_BYTES as u64);
        {
            let mut known = lock(&self.pages);
            known.check()?;
            known.unflushed.set(pages.clone(), PageState::Present);
        }
        self.data.write_at(bytes, offset).map_err(DiskError::io("writing"))?;
        let mut known = lock(&self.pages);
        // A flush that began before the write ended may have taken the mark away: it is set again.
        known.set(pages, PageState::Present);
        known.check()
    }

    /// Makes `pages` read as zeros; returns how many of them took space.
    pub(crate) fn zero(&self, pages: Range<u64>) -> Result<u64> {
        let mut freed = 0;
        {
            let mut known = lock(&self.pages);
            known.check()?;
            let present = |page: &u64| known.states.get(*page) == PageState::Present;
            freed += pages.clone().filter(present).count() as u64;
            known.set(pages.clone(), PageState::Zero);
        }
        if freed > 0 {
            // The hole may become durable before the map does: what is discarded may read as zeros or as before until the
            // next flush. If it cannot be made, the map still says zero.
            let (from, length) =
                (pages.start * PAGE_BYTES as u64, (pages.end - pages.start) * PAGE_BYTES as u64);
            if let Err(error) = self.data.punch(from, length) {
                tracing::debug!(%error, "no hole could be made in an overlay; it keeps the space");
            }
        }
        lock(&self.pages).check()?;
        Ok(freed)
    }

    /// Makes everything written so far durable, or fails for ever.
    pub(crate) fn flush(&self) -> Result<()> {
        let wanted = lock(&self.pages).changes;
        match &mut *lock(&self.log) {
            Some(log) => self.flush_locked(log, wanted),
            None => Ok(()),
        }
    }

    fn flush_locked(&self, log: &mut Log, wanted: u64) -> Result<()> {
        let (changes, pending, whole) = {
            let mut known = lock(&self.pages);
            known.check()?;
            if log.durable_changes >= wanted.min(known.changes) {
                return Ok(());
            }
            let pending = mem::take(&mut known.pending);
            known.flushing = mem::take(&mut known.unflushed);
            (known.changes, pending, log.map.is_long().then(|| known.states.clone()))
        };
        let synced = self.data.sync();
        let logged = synced.and_then(|()| match &whole {
            Some(states) => log.map.checkpoint(states),
            None => log.map.append(&pending),
        });
        let mut known = lock(&self.pages);
        self.settle(&mut known, logged)?;
        known.flushing = PageStates::new();
        log.durable_changes = changes;
        Ok(())
    }

    fn settle(&self, known: &mut Pages, result: io::Result<()>) -> Result<()> {
        if let Err(error) = result {
            tracing::error!(layer = self.number, %error, "a sync of an overlay failed: no flush is acknowledged any more");
            known.poisoned = Some(Arc::new(error));
        }
        known.check()
    }

    /// Flushes, and says in the map that no write follows. The caller keeps writes out.
    pub(crate) fn seal(&self) -> Result<()> {
        let mut slot = lock(&self.log);
        let Some(log) = &mut *slot else { return Ok(()) };
        self.flush_locked(log, u64::MAX)?;
        let sealed = log.map.seal();
        self.settle(&mut lock(&self.pages), sealed)?;
        *slot = None;
        Ok(())
    }
}
