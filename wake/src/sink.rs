//! Where the runs of a stream go: into guest memory, by runs or by blocks.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
};

use dormouse_core::page::{PAGE_BYTES, PageIndex};

use crate::{
    blocks::{Added, Blocks, Gathered},
    coverage::HeldOut,
    lock,
};
use dormouse_restore::{
    BulkInstaller, Content, PageSize, PageSource, RestoreError, SourceError, SourceErrorKind,
};

/// Pages of a stream that one machine is not given at once: those held out of it, and those whose block is not whole
/// yet. Faults find them here.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) held: HeldOut,
    pages: Mutex<HashMap<u64, Arc<Vec<u8>>>>,
    blocks: OnceLock<Blocks>,
}

impl Waiting {
    pub(crate) fn new(held: HeldOut) -> Self {
        Waiting { held, pages: Mutex::default(), blocks: OnceLock::new() }
    }

    pub(crate) fn pages(&self) -> MutexGuard<'_, HashMap<u64, Arc<Vec<u8>>>> {
        lock(&self.pages)
    }

    pub(crate) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.get()
    }
}

/// Takes the runs of a stream: into guest memory, but for pages that wait.
pub(crate) struct Sink {
    installer: BulkInstaller,
    waiting: Arc<Waiting>,
    image: Arc<dyn PageSource>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Sink {
    /// One for a stream that brings the pages of `list`. What a block lacks when the stream is over is read from
    /// `image`.
    pub(crate) fn new(
        installer: BulkInstaller,
        list: &[std::ops::Range<u64>],
        waiting: Arc<Waiting>,
        image: Arc<dyn PageSource>,
    ) -> Self {
        waiting.blocks.get_or_init(|| Blocks::of(&installer, list, waiting.held));
        Sink { installer, waiting, image }
    }

    pub(crate) fn mark(&self, phase: &str) {
        self.installer.mark(phase);
    }

    pub(crate) fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<(), RestoreError> {
        let end = first.0 + (bytes.len() / PAGE_BYTES) as u64;
        let part = |from: u64, to: u64| {
            &bytes[(from - first.0) as usize * PAGE_BYTES..(to - first.0) as usize * PAGE_BYTES]
        };
        let held = |page: &u64| self.waiting.held.holds(PageIndex(*page));
        let mut at = first.0;
        while at < end {
            if held(&at) {
                self.waiting.pages().insert(at, Arc::new(part(at, at + 1).to_vec()));
                at += 1;
                continue;
            }
            let (in_block, stop) = self.waiting.blocks().map_or((false, end), |blocks| blocks.part(at, end));
            let to = (at..stop).find(held).unwrap_or(stop);
            match in_block {
                true => self.gather(at, part(at, to))?,
                false => drop(self.installer.install_run(PageIndex(at), part(at, to))?),
            }
            at = to;
        }
        Ok(())
    }

    fn gather(&self, page: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        let Some(blocks) = self.waiting.blocks() else { return Ok(()) };
        match blocks.add(page, bytes) {
            Added::Whole(block) => self.install_block(blocks, block),
            Added::Refused(PageSize::Small) => self.installer.install_run(PageIndex(page), bytes).map(drop),
            // A page of 2 MiB of which a part is not kept is left to the faults.
            Added::Kept | Added::Late | Added::Refused(PageSize::Huge) => Ok(()),
        }
    }

    fn install_block(&self, blocks: &Blocks, mut block: Gathered) -> Result<(), RestoreError> {
        let installed = self.installer.install_block(block.first(), &mut block.staging);
        blocks.done_with(block);
        installed.map(drop)
    }

    /// The stream is over: what it left in parts is installed, blocks of 2 MiB pages with what they lack. Gives way to
    /// faults.
    pub(crate) fn finish(&self) -> Result<(), RestoreError> {
        let Some(blocks) = self.waiting.blocks() else { return Ok(()) };
        for first in blocks.order() {
            let Some(missing) = blocks.missing(*first) else { continue };
            if self.installer.page_size(PageIndex(*first)) == Some(PageSize::Small) {
                self.install_parts(blocks, *first)?;
                continue;
            }
            while self.installer.is_demanded() {
                if self.installer.pause() {
                    return Err(RestoreError::Stopped);
                }
            }
            let settled = self.installer.is_settled(PageIndex(*first));
            // One that cannot be had now is left to the faults, which have more patience.
            let composed = |run: &std::ops::Range<u64>| compose(&*self.image, run.start, run.end - run.start);
            let rest: Result<Vec<_>, _> = missing.iter().filter(|_| !settled).map(composed).collect();
            let Some(mut block) = blocks.take(*first) else { continue };
            match rest {
                Ok(rest) if !settled => {
                    missing.iter().zip(&rest).for_each(|(run, bytes)| block.add(run.start, bytes));
                    // Nothing else comes once the stream is over, so that it is.
                    if block.is_whole() {
                        self.install_block(blocks, block)?;
                        continue;
                    }
                }
                Ok(_) => {}
                Err(why) => tracing::debug!(%why, first, "a page of 2 MiB is left to the faults"),
            }
            blocks.done_with(block);
        }
        Ok(())
    }

    fn install_parts(&self, blocks: &Blocks, first: u64) -> Result<(), RestoreError> {
        let Some(block) = blocks.take(first) else { return Ok(()) };
        for run in block.runs(true) {
            if let Some(bytes) = block.bytes(run.start, run.end - run.start) {
                self.installer.install_run(PageIndex(run.start), bytes)?;
            }
        }
        blocks.done_with(block);
        Ok(())
    }
}

/// The bytes of a run of `image`, from its frames.
pub(crate) fn compose(image: &dyn PageSource, first: u64, pages: u64) -> Result<Vec<u8>, SourceError> {
    let damaged = |what| SourceError::new(SourceErrorKind::Damaged, what);
    let mut bytes = Vec::with_capacity(pages as usize * PAGE_BYTES);
    let (mut page, end) = (first, first + pages);
    while page < end {
        let extent = image.locate(PageIndex(page))?;
        let here = extent.end().min(end).saturating_sub(page);
        match extent.content {
            Content::Zero => bytes.resize(bytes.len() + here as usize * PAGE_BYTES, 0),
            Content::Frame { frame, slot } => {
                let decoded = image.fetch(frame)?;
                let from = slot.get() as u64 + (page - extent.first.0);
                let slots = decoded.slots(from, here);
                let slots = slots.ok_or_else(|| damaged("a frame is shorter than its page map says"))?;
                bytes.extend_from_slice(&slots);
            }
        }
        if here == 0 {
            return Err(damaged("the page map has an empty run"));
        }
        page += here;
    }
    Ok(bytes)
}
