//! Page maps and roots of a repaired snapshot: the same pages, found where they were put.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use dormouse_core::{
    FrameRef, PackId, Section, SectionBuilder, SectionIndex, Slot,
    frame::EncodedFrame,
    pack::FrameKind,
    section::{Extent, PagePlace},
};

use crate::{
    error::{Result, StoreError},
    import::MAP_LEVEL,
    meta_packs::MetaPacks,
    new_root::NewRoot,
    snapshot::Snapshot,
};

/// A frame's place: its pack, and its offset there.
pub(super) type Place = (PackId, u32);

/// Pages that lie elsewhere now.
#[derive(Debug)]
pub(super) struct MovedFrame {
    /// The number of the new frame.
    pub(super) number: usize,
    /// Its slot for each slot of the old one, where it has that page.
    pub(super) slots: Vec<Option<Slot>>,
}

/// What was had back.
#[derive(Default)]
pub(super) struct Recovered {
    /// Packs that are damaged: nothing should refer to them any more.
    pub(super) bad: HashSet<PackId>,
    pub(super) frames: HashMap<Place, MovedFrame>,
    pub(super) sections: HashMap<Place, Arc<Section>>,
    /// Pieces of device state, by the numbers of their new frames.
    pub(super) pieces: HashMap<Place, usize>,
}

impl Recovered {
    /// Writes the page maps of a snapshot anew that refer to what was moved, or were. `done` has those that other
    /// snapshots share.
    pub(super) fn remap(
        &self,
        snapshot: &Snapshot,
        pages: &MetaPacks<'_>,
        meta: &mut MetaPacks<'_>,
        done: &mut HashMap<Place, usize>,
    ) -> Result<NewRoot> {
        let root = snapshot.root();
        let mut new = NewRoot::default();
        for (image, entry) in root.images.iter().enumerate() {
            for (index, section) in (0..).zip(&entry.sections) {
                let Some(section) = section else { continue };
                let pack = root.packs[section.at.pack as usize];
                let place = (pack.id, section.at.offset);
                if let Some(number) = done.get(&place) {
                    new.take(*number);
                    continue;
                }
                let map = match self.sections.get(&place) {
                    Some(map) => Some(map.clone()),
                    // One that is damaged and was not had back stays what it is.
                    None => snapshot.section(image, SectionIndex(index)).ok().flatten(),
                };
                match map.filter(|map| self.bad.contains(&pack.id) || self.concerns(map)) {
                    None => new.keep(pack, section.at),
                    Some(map) => {
                        let map = self.rewrite(&map, pages)?;
                        let frame = EncodedFrame::encode(snapshot.store().domain(), &map.encode(), MAP_LEVEL);
                        let number = meta.push(FrameKind::Section, &frame)?;
                        done.insert(place, number);
                        new.take(number);
                    }
                }
            }
        }
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            let pack = root.packs[piece.pack as usize];
            match self.pieces.get(&(pack.id, piece.offset)) {
                Some(number) => new.take(*number),
                None => new.keep(pack, *piece),
            }
        }
        Ok(new)
    }

    fn concerns(&self, map: &Section) -> bool {
        let place = |frame: &FrameRef| (map.packs()[frame.pack as usize].id, frame.offset);
        map.frames().iter().any(|frame| self.frames.contains_key(&place(frame)))
    }

    fn rewrite(&self, map: &Section, pages: &MetaPacks<'_>) -> Result<Section> {
        let mut builder = SectionBuilder::new();
        for (_, extent) in map.extents() {
            match extent {
                Extent::Zero { pages } => (0..pages).for_each(|_| builder.push(None)),
                Extent::Frame { frame, slot, pages: count } => {
                    let frame = map.frames()[frame as usize];
                    let pack = map.packs()[frame.pack as usize];
                    let moved = self.frames.get(&(pack.id, frame.offset));
                    for slot in (slot.get()..slot.get() + count as usize).filter_map(Slot::new) {
                        let moved = moved.and_then(|m| Some((m.number, m.slots.get(slot.get()).copied()??)));
                        builder.push(Some(match moved {
                            None => PagePlace { pack, frame, slot },
                            Some((number, slot)) => {
                                let (pack, frame) = pages.get(number)?;
                                PagePlace { pack, frame, slot }
                            }
                        }));
                    }
                }
            }
        }
        let rewritten = builder.finish().filter(|new| new.stored_pages() == map.stored_pages());
        rewritten.ok_or(StoreError::Bug("a page map lost pages"))
    }
}
