//! Moving pages: in which order, into which frames, and where they lie then.

use std::{
    collections::{HashMap, hash_map::Entry},
    thread,
};

use crossbeam::channel::bounded;
use dormouse_core::{
    ChunkId, FRAME_PAGES_MAX, FrameRef, PackFooter, PackId, PackRef, Section, SectionBuilder, Slot,
    section::{Extent, PagePlace},
};

use super::{RepackReport, each_extent};
use crate::{
    error::{Result, StoreError},
    frame_cache::DecodedFrame,
    import::{AHEAD, Failure, Packing, RawJob, compress_frames, fill_packs, permits, upload_packs},
    progress::Progress,
    similar::{grouped, signature},
    snapshot::Snapshot,
    store::Store,
};

/// Where a page is: pack, offset of the frame, slot.
type Old = (PackId, u32, u8);

/// A pack whose live pages move.
pub(super) struct Victim {
    pub(super) pack: PackRef,
    pub(super) footer: PackFooter,
}

impl Victim {
    /// The id of a page, as the footer lists it.
    fn id(&self, frame: &FrameRef, slot: Slot) -> Option<ChunkId> {
        let frames = &self.footer.frames;
        let i = frames.binary_search_by_key(&frame.offset, |f| f.at.offset).ok()?;
        frames[i].chunks.get(slot.get()).copied()
    }
}

/// The live pages of the victims in the order in which snapshots, oldest first, map them. What is stored in several
/// places is in it once.
#[derive(Default)]
pub(super) struct Moves {
    pub(super) order: Vec<(PackRef, FrameRef, Slot)>,
    numbers: HashMap<Old, usize>,
}

impl Store {
    /// Puts similar pages next to each other.
    pub(super) fn group_similar(
        &self,
        moves: &mut Moves,
        keep: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut signatures = Vec::with_capacity(moves.order.len());
        for (pack, frame, slot) in &moves.order {
            keep()?;
            let decoded = self.frames.get((pack.id, frame.offset), || self.read_frame(pack.id, frame))?;
            let page = decoded.pages(*slot, 1);
            signatures
                .push(signature(page.ok_or(StoreError::Bug("a page map refers past the end of a frame"))?));
        }
        let groups = grouped(&signatures);
        let mut new_numbers = vec![0; groups.len()];
        groups.iter().enumerate().for_each(|(new, old)| new_numbers[*old] = new);
        moves.order = groups.into_iter().map(|page| moves.order[page]).collect();
        moves.numbers.values_mut().for_each(|number| *number = new_numbers[*number]);
        Ok(())
    }

    /// Compresses and stores the pages anew; gives the place of each.
    pub(super) fn move_pages(
        &self,
        victims: &HashMap<PackId, Victim>,
        moves: &Moves,
        (packing, level): (Packing, i32),
        progress: &dyn Progress,
        keep: &mut dyn FnMut() -> Result<()>,
        report: &mut RepackReport,
    ) -> Result<Vec<PagePlace>> {
        let cores = thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let failure = Failure::default();
        let stored: Result<Vec<_>> = thread::scope(|scope| {
            let (raw_out, raw) = bounded(2 * cores);
            let (frame_out, frames) = bounded(2 * cores);
            let (pack_out, packs) = bounded(1);
            let (stored_out, stored) = crossbeam::channel::unbounded();
            let (frame_done, permits) = permits(AHEAD * cores);
            let (failure, domain) = (&failure, &*self.domain);
            for _ in 0..cores {
                let (raw, frame_out, permits) = (raw.clone(), frame_out.clone(), permits.clone());
                scope.spawn(move || compress_frames(domain, level, &raw, &permits, &frame_out));
            }
            drop((raw, frame_out));
            scope.spawn(move || fill_packs(domain, packing, &frames, frame_done, &pack_out));
            scope.spawn(move || upload_packs(self, &packs, &stored_out, failure));
            for (sequence, pages) in moves.order.chunks(FRAME_PAGES_MAX).enumerate() {
                keep()?;
                let (raw, chunks) = self.gather_pages(victims, pages)?;
                progress.advance(raw.len() as u64);
                if raw_out.send(RawJob::Frame { sequence: sequence as u32, raw, chunks }).is_err() {
                    break;
                }
            }
            drop(raw_out);
            Ok(stored.into_iter().collect())
        });
        failure.take()?;
        let mut frames = HashMap::new();
        for pack in stored? {
            report.new_packs += 1;
            report.new_bytes += pack.object_bytes;
            frames.extend(pack.frames.iter().map(|(sequence, at)| (*sequence as usize, (pack.pack, *at))));
        }
        let place = |i: usize| {
            let (pack, frame) = frames.get(&(i / FRAME_PAGES_MAX)).copied()?;
            Some(PagePlace { pack, frame, slot: Slot::new(i % FRAME_PAGES_MAX)? })
        };
        let places = (0..moves.order.len()).map(place).collect::<Option<Vec<_>>>();
        places.ok_or(StoreError::Bug("a page was not stored again"))
    }

    fn gather_pages(
        &self,
        victims: &HashMap<PackId, Victim>,
        pages: &[(PackRef, FrameRef, Slot)],
    ) -> Result<(Vec<u8>, Vec<ChunkId>)> {
        let (mut raw, mut chunks) = (Vec::new(), Vec::new());
        for page in pages {
            let (decoded, id) = self.checked_page(victims, page)?;
            raw.extend_from_slice(decoded.pages(page.2, 1).unwrap_or_default());
            chunks.push(id);
        }
        Ok((raw, chunks))
    }

    /// The frame that a page is in, and the page's id. What is written is what its id says, or nothing is: repacking
    /// must never launder damage.
    fn checked_page(
        &self,
        victims: &HashMap<PackId, Victim>,
        (pack, frame, slot): &(PackRef, FrameRef, Slot),
    ) -> Result<(DecodedFrame, ChunkId)> {
        let decoded = self.frames.get((pack.id, frame.offset), || self.read_frame(pack.id, frame))?;
        let listed = victims.get(&pack.id).and_then(|v| v.id(frame, *slot));
        let (Some(page), Some(id)) = (decoded.pages(*slot, 1), listed) else {
            let why = dormouse_core::FormatError::Malformed {
                what: "pack footer",
                why: "it does not list a frame that a page map refers to",
            };
            return Err(StoreError::Damaged { key: self.keys.pack(pack.id), why });
        };
        if self.domain.chunk_id(page) != id {
            let why = dormouse_core::FormatError::HashMismatch("page");
            return Err(StoreError::Damaged { key: self.keys.pack(pack.id), why });
        }
        Ok((decoded, id))
    }

    /// What is to be moved, in the order of snapshots and their images.
    pub(super) fn order(&self, snapshots: &[Snapshot], victims: &HashMap<PackId, Victim>) -> Result<Moves> {
        let mut moves = Moves::default();
        let mut ids: HashMap<ChunkId, usize> = HashMap::new();
        let mut copies = Vec::new();
        for snapshot in snapshots {
            each_extent(snapshot, |pack, frame, slot, pages| {
                let Some(victim) = victims.get(&pack.id) else { return };
                for slot in (slot.get()..slot.get() + pages as usize).filter_map(Slot::new) {
                    let Entry::Vacant(entry) = moves.numbers.entry((pack.id, frame.offset, slot.get() as u8))
                    else {
                        continue;
                    };
                    let page = (victim.pack, frame, slot);
                    let next = moves.order.len();
                    let number = victim.id(&frame, slot).map_or(next, |id| *ids.entry(id).or_insert(next));
                    entry.insert(number);
                    if number == next { moves.order.push(page) } else { copies.push(page) }
                }
            })?;
        }
        // Of a copy nobody will read, its id is all that says that it is one.
        copies.iter().try_for_each(|page| self.checked_page(victims, page).map(drop))?;
        Ok(moves)
    }
}

/// The same section with its pages where they were moved to.
pub(super) fn rewrite(section: &Section, moves: &Moves, places: &[PagePlace]) -> Result<Section> {
    let mut builder = SectionBuilder::new();
    for (_, extent) in section.extents() {
        match extent {
            Extent::Zero { pages } => (0..pages).for_each(|_| builder.push(None)),
            Extent::Frame { frame, slot, pages } => {
                let frame = section.frames()[frame as usize];
                let pack = section.packs()[frame.pack as usize];
                for slot in (slot.get()..slot.get() + pages as usize).filter_map(Slot::new) {
                    let number = moves.numbers.get(&(pack.id, frame.offset, slot.get() as u8));
                    let place = number.and_then(|n| places.get(*n)).copied();
                    builder.push(Some(place.unwrap_or(PagePlace { pack, frame, slot })));
                }
            }
        }
    }
    let rewritten = builder.finish().ok_or(StoreError::Bug("a page map lost its pages"))?;
    if rewritten.stored_pages() != section.stored_pages() {
        return Err(StoreError::Bug("a page map lost pages"));
    }
    Ok(rewritten)
}
