//! Blocks of 2 MiB, put together from the runs a stream brings, so that each is installed as one.
//!
//! Nothing of a block is in guest memory before all of it is here. Until then its pages are found here by faults.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use dormouse_core::page::{PAGE_BYTES, PageIndex};

use crate::{coverage::HeldOut, lock, page_set::PageSet};
use dormouse_restore::{BLOCK_PAGES, BulkInstaller, PageSize, Staging};

/// Blocks under way at once: as many bytes as may wait for a machine. What comes for others meanwhile is not gathered.
const OPEN_MAX: usize = 128;
/// Memory of blocks that were copied, kept for the next.
const SPARE_MAX: usize = 4;

/// The blocks that a stream is gathered into on its way to one machine.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// By their first page.
    blocks: BTreeMap<u64, Block>,
    /// Their first pages, in the order of the stream.
    order: Vec<u64>,
    open: AtomicUsize,
    spare: Mutex<Vec<Staging>>,
}

#[derive(Debug)]
struct Block {
    page_size: PageSize,
    parts: Mutex<Parts>,
}

#[derive(Debug, Default)]
enum Parts {
    #[default]
    Nothing,
    Some(Gathered),
    /// Installed, or left to the faults.
    Gone,
}

/// What is there of a block.
#[derive(Debug)]
pub(crate) struct Gathered {
    first: u64,
    pub(crate) staging: Staging,
    have: [u64; (BLOCK_PAGES / 64) as usize],
}

/// What became of a part of a block.
#[derive(Debug)]
pub(crate) enum Added {
    /// It is kept for the rest of its block.
    Kept,
    /// With it the block is whole.
    Whole(Gathered),
    /// It is of no use: its block is installed already.
    Late,
    /// There is no room for its block.
    Refused(PageSize),
}

impl Gathered {
    fn has(&self, page: u64) -> bool {
        let at = page.wrapping_sub(self.first);
        self.have.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Puts the bytes of the pages from `page` on, which lie in the block, in their place.
    pub(crate) fn add(&mut self, page: u64, bytes: &[u8]) {
        let (at, pages) = ((page - self.first) as usize, bytes.len() / PAGE_BYTES);
        let place = self.staging.bytes_mut().get_mut(at * PAGE_BYTES..(at + pages) * PAGE_BYTES);
        let Some(place) = place else { return };
        place.copy_from_slice(bytes);
        (at..at + pages).for_each(|at| self.have[at / 64] |= 1 << (at % 64));
    }

    /// Whether every page is there.
    pub(crate) fn is_whole(&self) -> bool {
        self.have.iter().all(|word| *word == u64::MAX)
    }

    /// Its first page.
    pub(crate) fn first(&self) -> PageIndex {
        PageIndex(self.first)
    }

    /// The runs that are there, or that are not.
    pub(crate) fn runs(&self, there: bool) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in (self.first..self.first + BLOCK_PAGES).filter(|page| self.has(*page) == there) {
            match runs.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    /// The bytes of `pages` pages from `first` on, if all of them are there.
    pub(crate) fn bytes(&self, first: u64, pages: u64) -> Option<&[u8]> {
        let at = first.checked_sub(self.first)? as usize * PAGE_BYTES;
        let there = (first..first + pages).all(|page| self.has(page));
        self.staging.bytes().get(at..at + pages as usize * PAGE_BYTES).filter(|_| there)
    }
}

impl Blocks {
    /// Those of `list`, which a stream is to bring but for pages that are `held` out.
    ///
    /// Small pages are gathered only where all of a block comes: to wait for pages that do not come would be in vain.
    pub(crate) fn of(installer: &BulkInstaller, list: &[Range<u64>], held: HeldOut) -> Self {
        let (mut all, mut these) = (PageSet::default(), Blocks::default());
        let mut found: BTreeMap<u64, (u32, PageSize)> = BTreeMap::new();
        if !installer.gathers() {
            return these;
        }
        for run in list.iter().flat_map(|run| all.insert(run.clone())) {
            let mut page = run.start;
            while page < run.end {
                let Some(block) = installer.block_at(PageIndex(page)) else {
                    page += 1;
                    continue;
                };
                let end = run.end.min(block.first.0 + block.pages);
                let listed = (page..end).filter(|page| !held.holds(PageIndex(*page))).count() as u32;
                let page_size = installer.page_size(block.first).unwrap_or(PageSize::Small);
                let entry = found.entry(block.first.0).or_insert_with(|| {
                    these.order.push(block.first.0);
                    (0, page_size)
                });
                entry.0 += listed;
                page = end;
            }
        }
        found.retain(|_, (listed, size)| *size == PageSize::Huge || u64::from(*listed) == BLOCK_PAGES);
        these.order.retain(|first| found.contains_key(first));
        let block = |(first, (_, page_size))| (first, Block { page_size, parts: Mutex::default() });
        these.blocks = found.into_iter().map(block).collect();
        these
    }

    fn find(&self, page: u64) -> Option<(u64, &Block)> {
        let (first, block) = self.blocks.range(..=page).next_back()?;
        (page - first < BLOCK_PAGES).then_some((*first, block))
    }

    /// The part of `page..end` that begins with `page` and lies in one block, or in none, as told.
    pub(crate) fn part(&self, page: u64, end: u64) -> (bool, u64) {
        match self.find(page) {
            Some((first, _)) => (true, end.min(first + BLOCK_PAGES)),
            None => (false, self.blocks.range(page..).next().map_or(end, |(first, _)| end.min(*first))),
        }
    }

    /// Takes pages from `page` on, which lie in one block.
    pub(crate) fn add(&self, page: u64, bytes: &[u8]) -> Added {
        let Some((first, block)) = self.find(page) else { return Added::Refused(PageSize::Small) };
        // Memory for it first: to allocate it takes longer than a fault that looks here should wait.
        let is_new = matches!(*lock(&block.parts), Parts::Nothing);
        let staging = if is_new { self.staging() } else { None };
        let mut parts = lock(&block.parts);
        match (&*parts, staging) {
            (Parts::Nothing, None) => return Added::Refused(block.page_size),
            (Parts::Nothing, Some(staging)) => {
                *parts = Parts::Some(Gathered { first, staging, have: Default::default() });
            }
            // Another thread was faster.
            (_, Some(unused)) => self.put_back(unused),
            (_, None) => {}
        }
        let Parts::Some(gathered) = &mut *parts else { return Added::Late };
        gathered.add(page, bytes);
        if !gathered.is_whole() {
            return Added::Kept;
        }
        match std::mem::replace(&mut *parts, Parts::Gone) {
            Parts::Some(gathered) => Added::Whole(gathered),
            _ => Added::Late,
        }
    }

    fn staging(&self) -> Option<Staging> {
        if self.open.fetch_add(1, Ordering::Relaxed) < OPEN_MAX {
            let spare = lock(&self.spare).pop();
            if let Some(staging) = spare.or_else(|| Staging::new().ok()) {
                staging.populate();
                return Some(staging);
            }
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Takes back what a block was put together in.
    pub(crate) fn done_with(&self, gathered: Gathered) {
        self.put_back(gathered.staging);
    }

    fn put_back(&self, staging: Staging) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        let mut spare = lock(&self.spare);
        if spare.len() < SPARE_MAX {
            spare.push(staging);
        }
    }

    /// The first pages of all blocks, in the order of the stream.
    pub(crate) fn order(&self) -> &[u64] {
        &self.order
    }

    /// What the block that begins with `first` still lacks; `None` if nothing of it is here.
    pub(crate) fn missing(&self, first: u64) -> Option<Vec<Range<u64>>> {
        match &*lock(&self.blocks.get(&first)?.parts) {
            Parts::Some(gathered) => Some(gathered.runs(false)),
            _ => None,
        }
    }

    /// Takes what is there of the block that begins with `first`; what comes later is of no use.
    pub(crate) fn take(&self, first: u64) -> Option<Gathered> {
        match std::mem::replace(&mut *lock(&self.blocks.get(&first)?.parts), Parts::Gone) {
            Parts::Some(gathered) => Some(gathered),
            _ => None,
        }
    }

    /// The pages here that a fault on `page` is to be given: of small pages itself alone, as the others come at once.
    pub(crate) fn piece(&self, page: u64) -> Option<Range<u64>> {
        let (_, block) = self.find(page)?;
        let Parts::Some(gathered) = &*lock(&block.parts) else { return None };
        if !gathered.has(page) {
            return None;
        }
        match block.page_size {
            PageSize::Small => Some(page..page + 1),
            PageSize::Huge => gathered.runs(true).into_iter().find(|run| run.contains(&page)),
        }
    }

    /// The bytes of pages that are here.
    pub(crate) fn bytes(&self, first: u64, pages: u64) -> Option<Vec<u8>> {
        match &*lock(&self.find(first)?.1.parts) {
            Parts::Some(gathered) => gathered.bytes(first, pages).map(<[u8]>::to_vec),
            _ => None,
        }
    }
}
