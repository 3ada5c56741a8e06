//! Stragglers: pages of a child's section that lie in packs which hold few of its pages.
//!
//! Every generation puts the pages it changed into a pack of its own, so a section that is changed again and again comes
//! to lie in more and more of them. One that would lie in more packs than it may has the pages of those with the fewest
//! stored again, together, and for the next generations has packs to spare. What that may cost an import follows from
//! what changed, so that a child goes on costing what changed; where that is not enough, packs are more than they should
//! be for a while. What was chosen and why: `docs/DENSITY.md`.

use std::collections::{HashMap, HashSet};

use dormouse_core::{FrameRef, PAGE_BYTES, PackId, PackRef, PageCount, Slot};

use super::{
    drafts::{SectionDraft, Target},
    layout::Layouter,
};
use crate::{
    error::{Result, StoreError},
    store::Store,
};

/// Most packs that a section of a child should lie in.
pub const SECTION_PACKS_MAX: usize = 32;
/// Packs fewer, at least, that a section lies in when its stragglers have been stored again: this many generations
/// share the cost.
const FREED_PACKS: usize = 8;
/// Pages that an import may store again for each that it stores anew...
const PAGES_PER_NEW_PAGE: u64 = 8;
/// ...and besides, in all: 4 MiB.
const PAGES_BESIDES: u64 = 1024;
/// Most pages of one section that are stored again at once, all of them in memory: 16 MiB.
const SECTION_PAGES_AT_ONCE: u64 = 4096;
/// Sections that are kept until it is known how much changed; what is more has its turn in a later generation.
const SCATTERED_MAX: usize = 64;
/// Frames of one pack with less than this between them are read at once...
const GAP_BYTES: u64 = 64 << 10;
/// ...up to this many bytes.
const READ_BYTES_MAX: u64 = 1 << 20;

/// The packs section number `index` of an image may lie in. Sections that change together reach their bounds at
/// different generations, so that no import pays for all of them.
fn packs_max(index: u32) -> usize {
    SECTION_PACKS_MAX - index as usize % FREED_PACKS
}

/// Of packs and the pages of one section in each, those whose pages are to be stored again, for `allowance` pages at
/// most; empty if it is not worth it. `fresh`: whether the section has pages in the pack being made, too.
fn choose(mut packs: Vec<(u64, PackId)>, fresh: bool, max: usize, allowance: u64) -> HashSet<PackId> {
    let now = packs.len() + usize::from(fresh);
    if now <= max {
        return HashSet::new();
    }
    // Whatever is stored again comes to lie in the pack being made.
    let wanted = packs.len() + 1 - (max - FREED_PACKS);
    packs.sort_unstable();
    let mut pages = 0;
    let chosen: HashSet<PackId> = packs
        .into_iter()
        .take(wanted)
        .take_while(|(in_pack, _)| {
            pages += in_pack;
            pages <= allowance
        })
        .map(|(_, pack)| pack)
        .collect();
    let freed = chosen.len() - usize::from(!fresh && !chosen.is_empty());
    if freed >= FREED_PACKS { chosen } else { HashSet::new() }
}

/// Frames of one pack that are read in one request.
struct Read {
    pack: PackRef,
    frames: Vec<FrameRef>,
}

/// A page that is stored again: its number in the section, and its bytes.
type Straggler = (usize, Vec<u8>);

impl Layouter<'_> {
    /// Whether the draft is to be kept until it is known how much changed.
    pub(super) fn is_scattered(&self, draft: &SectionDraft) -> bool {
        let Some(base) = draft.base.as_ref().filter(|_| draft.is_changed()) else { return false };
        self.scattered.len() < SCATTERED_MAX && base.packs >= packs_max(draft.index.0)
    }

    /// Stores the stragglers of scattered sections again, as far as what changed allows.
    pub(super) fn gather(&mut self) -> Result<()> {
        let mut allowance = PAGES_BESIDES + PAGES_PER_NEW_PAGE * self.out.new_pages;
        let mut scattered = std::mem::take(&mut self.scattered);
        scattered.sort_by_key(|draft| std::cmp::Reverse(draft.base.as_ref().map_or(0, |b| b.packs)));
        for draft in &mut scattered {
            let (by_pack, fresh) = draft.pages_by_pack(&self.table);
            let packs = by_pack.into_iter().map(|(pack, pages)| (pages, pack)).collect();
            let most = allowance.min(SECTION_PAGES_AT_ONCE);
            let chosen = choose(packs, fresh, packs_max(draft.index.0), most);
            if !chosen.is_empty() {
                allowance -= self.gather_section(draft, &chosen)?.min(allowance);
            }
        }
        self.waiting.extend(scattered);
        Ok(())
    }

    /// Stores pages of a section that lie in the chosen packs again; how many.
    fn gather_section(&mut self, draft: &mut SectionDraft, chosen: &HashSet<PackId>) -> Result<u64> {
        let pages = draft.index.pages(PageCount(self.images[draft.image].pages()));
        let pages = (pages.end - pages.start) as usize;
        let mut wanted: HashMap<(PackId, u32), Vec<(usize, Slot)>> = HashMap::new();
        let mut frames = HashMap::new();
        for page in 0..pages {
            let Some((pack, frame, slot)) = draft.place(page, &self.table) else { continue };
            if chosen.contains(&pack.id) {
                wanted.entry((pack.id, frame.offset)).or_default().push((page, slot));
                frames.insert((pack.id, frame.offset), (pack, frame));
            }
        }
        let reads = together(frames.into_values().collect());
        self.out.gathered_reads += reads.len() as u64;
        let mut stragglers = Vec::new();
        let read = |read: Read| read_pages(self.store, &read, &wanted);
        self.store.side_by_side(reads, read, |pages| {
            stragglers.extend(pages);
            Ok(())
        })?;
        stragglers.sort_unstable_by_key(|(page, _)| *page);
        for (page, bytes) in &stragglers {
            let id = self.store.domain.chunk_id(bytes);
            let target = match self.in_session(&id) {
                Some(target) => target,
                None => {
                    self.out.gathered_pages += 1;
                    match self.store_page(id, bytes)? {
                        Some(target) => target,
                        // Another thread failed; what it has to say comes first.
                        None => break,
                    }
                }
            };
            draft.relocate(*page, target);
        }
        Ok(stragglers.len() as u64)
    }

    fn in_session(&mut self, id: &dormouse_core::ChunkId) -> Option<Target> {
        let (sequence, slot) = self.session.get(id).copied()?;
        Some(Target::At(self.table.fresh(sequence), slot))
    }
}

/// Frames in the order in which they lie, those near each other in one read.
fn together(mut frames: Vec<(PackRef, FrameRef)>) -> Vec<Read> {
    frames.sort_unstable_by_key(|(pack, frame)| (pack.id, frame.offset));
    let mut reads: Vec<Read> = Vec::new();
    for (pack, frame) in frames {
        let fits = |read: &&mut Read| {
            let start = read.frames.first().map_or(0, |f| f.range().start);
            let end = read.frames.last().map_or(0, |f| f.range().end);
            read.pack.id == pack.id
                && frame.range().start <= end + GAP_BYTES
                && frame.range().end - start <= READ_BYTES_MAX
        };
        match reads.last_mut().filter(fits) {
            Some(read) => read.frames.push(frame),
            None => reads.push(Read { pack, frames: vec![frame] }),
        }
    }
    reads
}

/// The pages wanted of some frames. What is damaged stays where it is: a child is no worse for it than its parent, and
/// `verify` is who complains.
fn read_pages(
    store: &Store,
    read: &Read,
    wanted: &HashMap<(PackId, u32), Vec<(usize, Slot)>>,
) -> Result<Vec<Straggler>> {
    let mut pages = Vec::new();
    let frames = match store.read_frames(read.pack.id, &read.frames) {
        Ok(frames) => frames,
        Err(why) if why.is_retryable() => return Err(why),
        Err(why) => {
            tracing::warn!(%why, "stragglers are left where they are");
            return Ok(pages);
        }
    };
    for (frame, raw) in read.frames.iter().zip(frames) {
        for (page, slot) in wanted.get(&(read.pack.id, frame.offset)).into_iter().flatten() {
            let at = slot.get() * PAGE_BYTES;
            let bytes = raw.get(at..at + PAGE_BYTES);
            pages.push((*page, bytes.ok_or(StoreError::Bug("a page outside its frame"))?.to_vec()));
        }
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packs(pages: &[u64]) -> Vec<(u64, PackId)> {
        pages.iter().enumerate().map(|(i, pages)| (*pages, PackId([i as u8; 32]))).collect()
    }

    #[test]
    fn the_smallest_packs_are_chosen_until_there_is_room() {
        let sizes: Vec<u64> = (1..=32).rev().collect();
        assert!(choose(packs(&sizes[1..]), true, 32, 1000).is_empty(), "32 packs are not too many");
        let chosen = choose(packs(&sizes), true, 32, 1000);
        // 33 with the pack being made; 24 are to be left, that one included.
        assert_eq!(chosen.len(), 9);
        assert!((23..32u8).all(|i| chosen.contains(&PackId([i; 32]))));
    }

    #[test]
    fn what_would_cost_too_much_or_gain_too_little_is_left() {
        let sizes: Vec<u64> = (1..=40).collect();
        assert_eq!(choose(packs(&sizes), true, 32, 36).len(), 8, "1 to 8 pages are 36");
        assert!(choose(packs(&sizes), true, 32, 35).is_empty());
        // Without a pack being made, one more goes for the one that has to be.
        assert!(choose(packs(&sizes), false, 32, 36).is_empty());
        assert_eq!(choose(packs(&sizes), false, 32, 45).len(), 9);
        assert!(choose(packs(&[500; 33]), true, 32, 1024).is_empty());
    }

    #[test]
    fn sections_reach_their_bounds_at_different_generations() {
        let bounds: HashSet<usize> = (0..64).map(packs_max).collect();
        assert_eq!(bounds.len(), FREED_PACKS);
        assert!(bounds.into_iter().all(|max| (25..=SECTION_PACKS_MAX).contains(&max)));
    }

    #[test]
    fn frames_near_each_other_are_read_at_once() {
        let pack = |n| PackRef { id: PackId([n; 32]), footer_offset: 60 << 20, footer_bytes: 1 };
        let frame = |offset, stored_bytes| FrameRef {
            pack: 0,
            offset,
            stored_bytes,
            raw_bytes: 4096,
            codec: dormouse_core::Codec::Raw,
            hash: dormouse_core::FrameHash([0; 16]),
        };
        let frames = [
            (pack(2), frame(32, 100)),
            (pack(1), frame(200, 100)),
            (pack(1), frame(32, 100)),
            (pack(1), frame(300 + (64 << 10), 100)),
            (pack(1), frame(500 + (128 << 10), 100)),
            (pack(1), frame(600 + (128 << 10), 1 << 20)),
        ];
        let reads = together(frames.to_vec());
        let shape: Vec<_> = reads.iter().map(|r| (r.pack.id.0[0], r.frames.len())).collect();
        assert_eq!(shape, [(1, 3), (1, 1), (1, 1), (2, 1)]);
    }
}
