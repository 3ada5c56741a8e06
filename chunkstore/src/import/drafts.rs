//! Page maps in the making: which frame each page will be in, before the frame's pack is known.

use std::collections::HashMap;

use dormouse_core::{
    ChunkId, Digest, Domain, FrameRef, ImageKind, PackId, PackRef, SECTION_PAGES, Section, SectionBuilder,
    SectionEntry, SectionIndex, Slot,
    content::SectionContent,
    section::{Extent, PagePlace},
};

use super::pack_writer::{FrameSequence, StoredPack};
use crate::error::{Result, StoreError};

/// Index into [`FrameTable`].
type FrameNumber = u32;

/// Frames that page maps refer to: those just made, whose place is not known yet, and older ones.
#[derive(Debug, Default)]
pub(crate) struct FrameTable {
    frames: Vec<Option<(PackRef, FrameRef)>>,
    known: HashMap<(PackId, u32), FrameNumber>,
    fresh: HashMap<FrameSequence, FrameNumber>,
}

impl FrameTable {
    /// A frame that is in the store.
    pub(crate) fn known(&mut self, pack: PackRef, frame: FrameRef) -> FrameNumber {
        let frames = &mut self.frames;
        *self.known.entry((pack.id, frame.offset)).or_insert_with(|| {
            frames.push(Some((pack, frame)));
            frames.len() as u32 - 1
        })
    }

    /// A frame that is being made.
    pub(crate) fn fresh(&mut self, sequence: FrameSequence) -> FrameNumber {
        let frames = &mut self.frames;
        *self.fresh.entry(sequence).or_insert_with(|| {
            frames.push(None);
            frames.len() as u32 - 1
        })
    }

    /// Notes where the frames of a pack came to be.
    pub(crate) fn stored(&mut self, stored: &StoredPack) {
        for (sequence, frame) in &stored.frames {
            let number = self.fresh(*sequence);
            self.frames[number as usize] = Some((stored.pack, *frame));
            self.known.insert((stored.pack.id, frame.offset), number);
            self.fresh.remove(sequence);
        }
    }

    /// Packs of all frames whose place is known.
    fn get(&self, number: FrameNumber) -> Option<(PackRef, FrameRef)> {
        self.frames.get(number as usize).copied().flatten()
    }
}

/// Where a page will be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Zero,
    At(FrameNumber, Slot),
}

/// A section of the parent, as far as a child needs it.
#[derive(Debug)]
pub(crate) struct BaseSection {
    pub(crate) entry: SectionEntry,
    /// The pack that `entry.at` lies in.
    pub(crate) pack: PackRef,
    /// How many packs its pages lie in.
    pub(crate) packs: usize,
    /// The ids of its pages, where they were asked for.
    pub(crate) ids: Option<Vec<Option<ChunkId>>>,
}

/// One section being made.
#[derive(Debug)]
pub(crate) struct SectionDraft {
    pub(crate) image: usize,
    pub(crate) index: SectionIndex,
    pub(crate) base: Option<BaseSection>,
    targets: Vec<Target>,
    content: SectionContent,
    changed: bool,
}

/// A section that is done.
pub(crate) enum Finished {
    /// All pages are zero.
    Zero,
    /// The same as the parent's.
    Same(SectionEntry, PackRef),
    /// A new one.
    New {
        /// Its page map.
        section: Section,
        /// Digest of its content.
        content: Digest,
    },
}

impl SectionDraft {
    /// A section that begins as the parent's is, or all zero.
    pub(crate) fn new(
        domain: &Domain,
        image: usize,
        index: SectionIndex,
        base: Option<(BaseSection, &Section)>,
        table: &mut FrameTable,
    ) -> Self {
        let mut targets = vec![Target::Zero; SECTION_PAGES as usize];
        if let Some((_, section)) = &base {
            for (first, extent) in section.extents() {
                let Extent::Frame { frame, slot, pages } = extent else { continue };
                let frame = section.frames()[frame as usize];
                let number = table.known(section.packs()[frame.pack as usize], frame);
                for i in 0..pages as usize {
                    if let Some(slot) = Slot::new(slot.get() + i) {
                        targets[first + i] = Target::At(number, slot);
                    }
                }
            }
        }
        let base = base.map(|(base, _)| base);
        let content = SectionContent::new(domain, base.as_ref().map(|b| &b.entry.content));
        SectionDraft { image, index, base, targets, content, changed: false }
    }

    /// The parent's page at this place, if it is known and not zero.
    pub(crate) fn base_id(&self, page: usize) -> Option<ChunkId> {
        *self.base.as_ref()?.ids.as_ref()?.get(page)?
    }

    /// Sets a page, in page order. `id` is `None` for a zero page.
    pub(crate) fn set(&mut self, page: usize, id: Option<ChunkId>, target: Target) {
        if self.targets[page] == target {
            return;
        }
        self.targets[page] = target;
        self.changed = true;
        self.content.change(page as u32, id.as_ref());
    }

    /// Whether any page was set to something else than before.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed
    }

    /// Where a page lies, if it is stored already.
    pub(crate) fn place(&self, page: usize, table: &FrameTable) -> Option<(PackRef, FrameRef, Slot)> {
        let Target::At(number, slot) = self.targets[page] else { return None };
        table.get(number).map(|(pack, frame)| (pack, frame, slot))
    }

    /// Has the same page somewhere else: what the section holds does not change.
    pub(crate) fn relocate(&mut self, page: usize, target: Target) {
        self.targets[page] = target;
    }

    /// How many pages lie in each pack, and whether any are in one that is being made.
    pub(crate) fn pages_by_pack(&self, table: &FrameTable) -> (HashMap<PackId, u64>, bool) {
        let (mut by_pack, mut fresh) = (HashMap::new(), false);
        for target in &self.targets {
            let Target::At(number, _) = target else { continue };
            match table.get(*number) {
                Some((pack, _)) => *by_pack.entry(pack.id).or_default() += 1,
                None => fresh = true,
            }
        }
        (by_pack, fresh)
    }

    /// Whether the place of every page is known.
    pub(crate) fn is_placed(&self, table: &FrameTable) -> bool {
        self.targets.iter().all(|t| match t {
            Target::Zero => true,
            Target::At(number, _) => table.get(*number).is_some(),
        })
    }

    /// The section; `pages` is how many of its pages the image has.
    pub(crate) fn finish(mut self, table: &FrameTable, pages: usize) -> Result<Finished> {
        // A child may be smaller than its parent.
        (pages..SECTION_PAGES as usize).for_each(|page| self.set(page, None, Target::Zero));
        if let (false, Some(base)) = (self.changed, &self.base) {
            return Ok(Finished::Same(base.entry, base.pack));
        }
        let mut builder = SectionBuilder::new();
        for target in &self.targets[..pages] {
            builder.push(match target {
                Target::Zero => None,
                Target::At(number, slot) => {
                    let place = table.get(*number);
                    let (pack, frame) =
                        place.ok_or(StoreError::Bug("a page was mapped before it was stored"))?;
                    Some(PagePlace { pack, frame, slot: *slot })
                }
            });
        }
        Ok(match builder.finish() {
            None => Finished::Zero,
            Some(section) => Finished::New { section, content: self.content.finish() },
        })
    }
}

/// The parent's image of the same name and kind.
pub(crate) fn matching(parent: &crate::snapshot::Snapshot, kind: ImageKind, id: &str) -> Option<usize> {
    parent.root().images.iter().position(|i| i.kind == kind && i.id.as_str() == id)
}
