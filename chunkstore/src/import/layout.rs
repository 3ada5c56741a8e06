//! Laying pages out: the one thread of an import that decides, page by page in image order, what is shared with
//! what is stored already and what goes into which new frame.

use std::collections::{HashMap, HashSet, VecDeque};

use crossbeam::channel::{Receiver, Sender};
use dormouse_core::{
    ChunkId, Digest, FRAME_PAGES_MAX, PAGE_BYTES, PackFooter, PackId, PackRef, PageCount, PageIndex,
    SECTION_PAGES, Section, SectionEntry, SectionIndex, Slot, frame::EncodedFrame, page::PageIndex as Page,
    section::Extent,
};

use super::{
    blocks::{Block, ImageFile, PageHash},
    drafts::{BaseSection, Finished, FrameTable, SectionDraft, Target},
    pack_writer::{FrameSequence, RawJob, StoredPack},
};
use crate::{
    error::{Result, StoreError},
    index::Index,
    progress::Progress,
    snapshot::Snapshot,
    store::Store,
};

/// Sections that may wait for their frames to be stored before the open pack is closed early: this bounds memory
/// for images of which little is new.
const WAITING_SECTIONS_MAX: usize = 64;
/// Most footers of the parent's packs that an import of dirty pages reads only to share more: a page map of many
/// generations refers to many packs, and a child is to cost what changed.
const LEARN_BASE_PACKS_MAX: usize = 16;
/// Level for page maps: small, written once, read at every resume.
pub(crate) const MAP_LEVEL: i32 = 9;

/// A section ready to be put into a metadata pack, or to be shared with the parent.
pub(crate) enum LaidOut {
    Zero,
    Same(SectionEntry, PackRef),
    New { frame: EncodedFrame, content: Digest, stored_pages: u32 },
}

/// What laying out found.
#[derive(Default)]
pub(crate) struct Layout {
    /// Per image, its sections in order.
    pub(crate) sections: Vec<Vec<LaidOut>>,
    /// Packs of others that new page maps refer to and that are not reached through the parent.
    pub(crate) reused: HashSet<PackRef>,
    /// Packs written.
    pub(crate) stored: Vec<PackRef>,
    pub(crate) stored_bytes: u64,
    pub(crate) new_pages: u64,
    pub(crate) read_bytes: u64,
    /// Pages of others stored again, and the requests that read them.
    pub(crate) gathered_pages: u64,
    pub(crate) gathered_reads: u64,
}

/// The parent's side of one image.
pub(crate) struct BaseImage<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) image: usize,
}

impl BaseImage<'_> {
    /// Whether all of a section is zero.
    pub(crate) fn is_zero(&self, index: usize) -> bool {
        self.snapshot.root().images[self.image].sections.get(index).copied().flatten().is_none()
    }

    fn section(&self, index: usize) -> LaidOut {
        let root = self.snapshot.root();
        match root.images[self.image].sections.get(index).copied().flatten() {
            None => LaidOut::Zero,
            Some(entry) => LaidOut::Same(entry, root.packs[entry.at.pack as usize]),
        }
    }
}

pub(crate) struct Layouter<'a> {
    pub(crate) store: &'a Store,
    pub(crate) index: &'a Index,
    pub(crate) images: &'a [ImageFile],
    pub(crate) bases: Vec<Option<BaseImage<'a>>>,
    pub(crate) raw: Sender<RawJob>,
    pub(crate) stored: Receiver<StoredPack>,
    pub(crate) progress: &'a dyn Progress,
    pub(super) table: FrameTable,
    footers: HashMap<PackId, PackFooter>,
    learned_packs: usize,
    parent_packs: HashSet<PackId>,
    pub(super) session: HashMap<ChunkId, (FrameSequence, Slot)>,
    pages: Vec<u8>,
    chunks: Vec<ChunkId>,
    sequence: FrameSequence,
    draft: Option<SectionDraft>,
    pub(super) waiting: VecDeque<SectionDraft>,
    /// Sections in too many packs; they wait for what can be done about it.
    pub(super) scattered: Vec<SectionDraft>,
    flushed: bool,
    pub(super) out: Layout,
}

impl<'a> Layouter<'a> {
    pub(crate) fn new(
        store: &'a Store,
        index: &'a Index,
        images: &'a [ImageFile],
        bases: Vec<Option<BaseImage<'a>>>,
        raw: Sender<RawJob>,
        stored: Receiver<StoredPack>,
        progress: &'a dyn Progress,
    ) -> Self {
        // Until a block says otherwise every section is the parent's, or zero.
        let sections = images.iter().zip(&bases).map(|(image, base)| {
            let count = PageCount(image.pages()).sections() as usize;
            (0..count).map(|i| base.as_ref().map_or(LaidOut::Zero, |b| b.section(i))).collect()
        });
        let out = Layout { sections: sections.collect(), ..Default::default() };
        Layouter {
            store,
            index,
            images,
            bases,
            raw,
            stored,
            progress,
            table: FrameTable::default(),
            footers: HashMap::new(),
            learned_packs: 0,
            parent_packs: HashSet::new(),
            session: HashMap::new(),
            pages: Vec::new(),
            chunks: Vec::new(),
            sequence: 0,
            draft: None,
            waiting: VecDeque::new(),
            scattered: Vec::new(),
            flushed: false,
            out,
        }
    }

    /// Takes the blocks in order. `Ok(false)` if another thread failed.
    pub(crate) fn add(&mut self, block: &Block) -> Result<bool> {
        self.out.read_bytes += block.read_bytes;
        while let Ok(stored) = self.stored.try_recv() {
            self.note_stored(&stored);
        }
        let section = PageIndex(block.first_page).section();
        if self.draft.as_ref().is_none_or(|d| (d.image, d.index) != (block.image, section)) {
            self.close_draft()?;
            self.draft = Some(self.make_draft(block.image, section)?);
        }
        let open = self.add_pages(block)?;
        let worked = block.pages.iter().filter(|p| **p != PageHash::Clean).count();
        self.progress.advance((worked * PAGE_BYTES) as u64);
        Ok(open)
    }

    fn add_pages(&mut self, block: &Block) -> Result<bool> {
        let mut draft = self.draft.take().ok_or(StoreError::Bug("no section is open"))?;
        let at = |i: usize| Page(block.first_page + i as u64).in_section();
        // Pages that neither the parent nor this import has are looked up together.
        let mut unknown = Vec::new();
        for (i, page) in block.pages.iter().enumerate() {
            if let PageHash::Chunk(id) = page
                && draft.base_id(at(i)) != Some(*id)
                && !self.session.contains_key(id)
            {
                unknown.push((i, *id));
            }
        }
        let ids: Vec<_> = unknown.iter().map(|(_, id)| *id).collect();
        let mut places = HashMap::new();
        self.index.look_up(&ids, |i, place| {
            places.insert(unknown[i].0, place);
        });
        for (i, page) in block.pages.iter().enumerate() {
            let id = match page {
                PageHash::Clean => continue,
                PageHash::Zero => {
                    draft.set(at(i), None, Target::Zero);
                    continue;
                }
                PageHash::Chunk(id) => *id,
            };
            if draft.base_id(at(i)) == Some(id) {
                continue;
            }
            let target = if let Some((sequence, slot)) = self.session.get(&id) {
                Target::At(self.table.fresh(*sequence), *slot)
            } else if let Some(place) = places.get(&i) {
                if !self.parent_packs.contains(&place.pack.id) {
                    self.out.reused.insert(place.pack);
                }
                Target::At(self.table.known(place.pack, place.frame), place.slot)
            } else {
                self.out.new_pages += 1;
                let Some(target) = self.store_page(id, block.page(i))? else {
                    self.draft = Some(draft);
                    return Ok(false);
                };
                target
            };
            draft.set(at(i), Some(id), target);
        }
        self.draft = Some(draft);
        Ok(true)
    }

    /// Puts a page into the frame being filled; `None` if another thread failed.
    pub(super) fn store_page(&mut self, id: ChunkId, page: &[u8]) -> Result<Option<Target>> {
        let slot = Slot::new(self.chunks.len()).ok_or(StoreError::Bug("a frame is over-full"))?;
        self.pages.extend_from_slice(page);
        self.chunks.push(id);
        self.session.insert(id, (self.sequence, slot));
        let target = Target::At(self.table.fresh(self.sequence), slot);
        let taken = self.chunks.len() < FRAME_PAGES_MAX || self.send_frame();
        Ok(taken.then_some(target))
    }

    /// Sends the frame being filled; `false` if nobody takes it because a thread failed.
    fn send_frame(&mut self) -> bool {
        if self.chunks.is_empty() {
            return true;
        }
        let job = RawJob::Frame {
            sequence: self.sequence,
            raw: std::mem::replace(&mut self.pages, Vec::with_capacity(FRAME_PAGES_MAX * PAGE_BYTES)),
            chunks: std::mem::take(&mut self.chunks),
        };
        self.sequence += 1;
        self.flushed = false;
        self.raw.send(job).is_ok()
    }

    fn note_stored(&mut self, stored: &StoredPack) {
        self.table.stored(stored);
        self.index.add(&stored.pack, &stored.footer);
        // From here on the index answers for these pages.
        for id in stored.footer.frames.iter().flat_map(|f| &f.chunks) {
            self.session.remove(id);
        }
        self.parent_packs.insert(stored.pack.id);
        self.out.stored.push(stored.pack);
        self.out.stored_bytes += stored.object_bytes;
    }

    fn make_draft(&mut self, image: usize, index: SectionIndex) -> Result<SectionDraft> {
        let base = match &self.bases[image] {
            None => None,
            Some(base) => {
                let root = base.snapshot.root();
                let entry = root.images[base.image].sections.get(index.0 as usize).copied().flatten();
                let section = base.snapshot.section(base.image, index)?;
                entry
                    .zip(section)
                    .map(|(entry, section)| (entry, root.packs[entry.at.pack as usize], section))
            }
        };
        let Some((entry, pack, section)) = base else {
            return Ok(SectionDraft::new(&self.store.domain, image, index, None, &mut self.table));
        };
        self.parent_packs.extend(section.packs().iter().map(|p| p.id));
        let all_compared = self.images[image].dirty.is_none();
        let ids = self.base_ids(&section, all_compared)?;
        let base = BaseSection { entry, pack, packs: section.packs().len(), ids };
        Ok(SectionDraft::new(&self.store.domain, image, index, Some((base, &section)), &mut self.table))
    }

    /// Reads the footers of a section's packs into the index, and the ids of its pages if they are `wanted`.
    fn base_ids(&mut self, section: &Section, wanted: bool) -> Result<Option<Vec<Option<ChunkId>>>> {
        let mut packs = Vec::new();
        for pack in section.packs() {
            let known = self.index.knows(pack.id);
            if self.footers.contains_key(&pack.id) || (known && !wanted) {
                continue;
            }
            if !wanted && self.learned_packs >= LEARN_BASE_PACKS_MAX {
                break;
            }
            self.learned_packs += usize::from(!known);
            packs.push((*pack, known));
        }
        let read = |(pack, known)| Ok((pack, known, self.store.read_footer(&pack)?));
        self.store.side_by_side(packs, read, |(pack, known, footer)| {
            if !known {
                self.index.add(&pack, &footer);
            }
            self.footers.insert(pack.id, footer);
            Ok(())
        })?;
        if !wanted {
            return Ok(None);
        }
        let mut ids = vec![None; SECTION_PAGES as usize];
        for (first, extent) in section.extents() {
            let Extent::Frame { frame, slot, pages } = extent else { continue };
            let at = section.frames()[frame as usize];
            let footer = self.footers.get(&section.packs()[at.pack as usize].id);
            let frames = footer.map(|f| &f.frames[..]).unwrap_or_default();
            let Ok(i) = frames.binary_search_by_key(&at.offset, |f| f.at.offset) else { continue };
            for (n, id) in frames[i].chunks.iter().skip(slot.get()).take(pages as usize).enumerate() {
                ids[first + n] = Some(*id);
            }
        }
        // Footers are a page's weight a pack; those of one section at a time are enough to keep.
        let current: HashSet<_> = section.packs().iter().map(|p| p.id).collect();
        self.footers.retain(|id, _| current.contains(id));
        Ok(Some(ids))
    }

    fn close_draft(&mut self) -> Result<()> {
        if let Some(draft) = self.draft.take() {
            if self.is_scattered(&draft) {
                self.scattered.push(draft);
            } else {
                self.waiting.push_back(draft);
            }
        }
        self.settle(false)
    }

    /// Finishes the sections whose frames are all stored; with `all`, there must be none left.
    fn settle(&mut self, all: bool) -> Result<()> {
        if self.waiting.len() > WAITING_SECTIONS_MAX && !self.flushed {
            self.send_frame();
            let flush = RawJob::Flush { sequence: self.sequence };
            self.sequence += 1;
            self.flushed = self.raw.send(flush).is_ok();
        }
        while let Some(draft) = self.waiting.front() {
            if !draft.is_placed(&self.table) {
                return if all { Err(StoreError::Bug("a section waits for no pack")) } else { Ok(()) };
            }
            let Some(draft) = self.waiting.pop_front() else { break };
            let (image, index) = (draft.image, draft.index.0 as usize);
            let pages = draft.index.pages(PageCount(self.images[image].pages()));
            let laid_out = match draft.finish(&self.table, (pages.end - pages.start) as usize)? {
                Finished::Zero => LaidOut::Zero,
                Finished::Same(entry, pack) => LaidOut::Same(entry, pack),
                Finished::New { section, content } => {
                    let stored_pages = section.stored_pages() as u32;
                    let frame = EncodedFrame::encode(&self.store.domain, &section.encode(), MAP_LEVEL);
                    LaidOut::New { frame, content, stored_pages }
                }
            };
            self.out.sections[image][index] = laid_out;
        }
        Ok(())
    }

    /// After the last block: stores what is left and finishes every section.
    pub(crate) fn finish(mut self) -> Result<Layout> {
        self.close_draft()?;
        self.gather()?;
        self.send_frame();
        // With no more work to come the other threads finish one after the other, and this loop ends.
        let (closed, _) = crossbeam::channel::bounded(0);
        drop(std::mem::replace(&mut self.raw, closed));
        while let Ok(stored) = self.stored.recv() {
            self.note_stored(&stored);
        }
        self.settle(true)?;
        Ok(self.out)
    }
}
