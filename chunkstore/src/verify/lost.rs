//! Frames that are lost, and finding again what was in them.
//!
//! A frame is had back whole if bytes with its hash turn up. Otherwise its pages are looked for one by one: each must
//! have the id that the pack's footer or this host's index lists for it. Where no ids are known, all pages of the frame
//! must be there, and compress to bytes with its hash. Nothing else is believed.

use std::collections::{BTreeSet, HashMap};

use dormouse_core::{
    ChunkId, Domain, FrameHash, FrameRef, PAGE_BYTES, PackFooter, PackId, PackRef,
    frame::{EncodedFrame, block_bytes},
    pack::FrameKind,
};
use serde::Serialize;

use crate::{DENSE_LEVEL, error::Result, import::DEFAULT_LEVEL, index::Index, store::Store};

/// Levels that frames were compressed at, if nobody asked for another one; and all there are.
const LIKELY_LEVELS: [i32; 2] = [DEFAULT_LEVEL, DENSE_LEVEL];
const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;
/// Most ways in which pages are put together to see whether they are what a frame held.
const GUESSES_MAX: usize = 64;
/// Copies of one frame or page that are remembered: should one be damaged as well, the next is tried.
const COPIES_MAX: usize = 4;

/// Where what was lost was found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The damaged object still has it.
    SameObject,
    /// Verified frames on this host's disk.
    LocalCache,
    /// Another pack.
    OtherPack,
    /// The snapshot's resume stream.
    ResumeStream,
    /// An image file.
    ImageFile,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Source::SameObject => "the object itself",
            Source::LocalCache => "this host's cache",
            Source::OtherPack => "another pack",
            Source::ResumeStream => "a resume stream",
            Source::ImageFile => "an image file",
        })
    }
}

/// A frame that cannot be read where it should be.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) pack: PackId,
    pub(super) at: FrameRef,
    pub(super) kind: FrameKind,
    /// The slots that snapshots refer to, a bit each.
    pub(super) slots: u32,
    /// The ids of its pages, where they are known.
    ids: Vec<Option<ChunkId>>,
    /// Pages found and proven.
    pub(super) pages: Vec<Option<Vec<u8>>>,
    /// Pages that may be the right ones.
    guesses: Vec<Vec<(Vec<u8>, Source)>>,
    pub(super) sources: BTreeSet<Source>,
    /// Whether the whole frame was had back.
    pub(super) taken: bool,
}

impl Lost {
    pub(super) fn new(pack: PackId, at: FrameRef, kind: FrameKind) -> Self {
        let pages = if kind == FrameKind::Pages { at.pages() } else { 0 };
        Lost {
            pack,
            at,
            kind,
            slots: 0,
            ids: vec![None; pages],
            pages: vec![None; pages],
            guesses: vec![Vec::new(); pages],
            sources: BTreeSet::new(),
            taken: false,
        }
    }

    /// Takes the ids of its pages from the footer of its pack.
    pub(super) fn learn(&mut self, footer: &PackFooter) {
        let frame = footer.frames.iter().find(|f| f.at.offset == self.at.offset && f.at.hash == self.at.hash);
        for (known, id) in self.ids.iter_mut().zip(frame.into_iter().flat_map(|f| &f.chunks)) {
            *known = Some(*id);
        }
    }

    /// Whether this slot is needed and still missing.
    pub(super) fn misses(&self, slot: usize) -> bool {
        self.slots & (1 << slot) != 0 && self.pages.get(slot).is_some_and(Option::is_none)
    }

    /// Whether every page that is needed was found.
    pub(super) fn is_found(&self) -> bool {
        let pages = self.kind == FrameKind::Pages && (0..self.pages.len()).all(|slot| !self.misses(slot));
        self.taken || pages
    }

    /// Pages that are missing and whose ids are known, by slot.
    pub(super) fn missing(&self) -> impl Iterator<Item = (usize, ChunkId)> + '_ {
        (0..self.ids.len()).filter(|slot| self.misses(*slot)).filter_map(|slot| Some((slot, self.ids[slot]?)))
    }

    /// Whether nothing that is known of its pages contradicts these bytes.
    pub(super) fn agrees(&self, domain: &Domain, raw: &[u8]) -> bool {
        let pages = raw.chunks_exact(PAGE_BYTES).zip(&self.ids);
        raw.len() == self.at.raw_bytes as usize
            && pages.into_iter().all(|(page, id)| id.is_none_or(|id| domain.chunk_id(page) == id))
    }

    /// Takes a page that is, or may be, the one in this slot. A page map that is not to be trusted may name one that the
    /// frame does not have.
    pub(super) fn offer(&mut self, domain: &Domain, slot: usize, page: &[u8], source: Source) {
        let Some(known) = self.ids.get(slot) else { return };
        match *known {
            Some(id) if self.pages[slot].is_none() && domain.chunk_id(page) == id => {
                self.pages[slot] = Some(page.to_vec());
                self.sources.insert(source);
            }
            None => {
                let guesses = &mut self.guesses[slot];
                if guesses.len() < COPIES_MAX && guesses.iter().all(|(known, _)| known != page) {
                    guesses.push((page.to_vec(), source));
                }
            }
            _ => {}
        }
    }

    /// Whether these bytes, compressed at this level by any version, are the frame.
    fn is_of(&self, domain: &Domain, raw: &[u8], level: i32) -> bool {
        // Twice as large before they were made smaller, and at first those of zstd itself.
        let now = block_bytes(level);
        [now, 2 * now, 128 << 10]
            .into_iter()
            .any(|block| EncodedFrame::encode_in_blocks(domain, raw, level, block).hash == self.at.hash)
    }

    /// Tries whether pages that were guessed are, together, what the frame held.
    pub(super) fn prove(&mut self, domain: &Domain) {
        if self.is_found() || self.guesses.iter().all(Vec::is_empty) {
            return;
        }
        // Of each slot the page that was proven, or those that were guessed.
        let choices: Vec<Vec<&[u8]>> = self
            .pages
            .iter()
            .zip(&self.guesses)
            .map(|(page, guesses)| match page {
                Some(page) => vec![&page[..]],
                None => guesses.iter().map(|(page, _)| &page[..]).collect(),
            })
            .collect();
        let all: usize = choices.iter().map(Vec::len).fold(1, usize::saturating_mul);
        for number in 0..all.min(GUESSES_MAX) {
            let mut left = number;
            let mut raw = Vec::with_capacity(choices.len() * PAGE_BYTES);
            for pages in &choices {
                raw.extend_from_slice(pages[left % pages.len()]);
                left /= pages.len();
            }
            let mut levels = LIKELY_LEVELS.into_iter().chain(LEVELS.filter(|_| number == 0));
            if levels.any(|level| self.is_of(domain, &raw, level)) {
                self.sources.extend(self.guesses.iter().flatten().map(|(_, source)| *source));
                self.pages = raw.chunks_exact(PAGE_BYTES).map(|page| Some(page.to_vec())).collect();
                return;
            }
        }
    }
}

/// Copies that footers of other packs list.
#[derive(Default)]
struct Copies {
    frames: HashMap<FrameHash, Vec<(PackRef, FrameRef)>>,
    pages: HashMap<ChunkId, Vec<(PackRef, FrameRef, usize)>>,
}

impl Store {
    /// Takes the ids of lost pages from this host's index, where no footer had them.
    pub(super) fn learn_from_index(&self, lost: &mut [Lost]) {
        let unknown = |l: &Lost| l.ids.iter().any(Option::is_none);
        let packs = lost.iter().filter(|l| unknown(l)).map(|l| l.pack).collect();
        let index = Index::open(self.cache_dir());
        let mut numbers: HashMap<(PackId, u32), usize> = HashMap::new();
        numbers.extend(lost.iter().enumerate().map(|(i, l)| ((l.pack, l.at.offset), i)));
        for (id, place) in index.pages_in(&packs) {
            let Some(i) = numbers.get(&(place.pack.id, place.frame.offset)) else { continue };
            let same = lost[*i].at.hash == place.frame.hash;
            if let Some(known) = lost[*i].ids.get_mut(place.slot.get()).filter(|_| same) {
                *known = Some(id);
            }
        }
    }

    /// Looks for lost frames and pages in all other packs; gives the frames that were found whole, decoded, by number.
    pub(super) fn find_copies(&self, lost: &mut [Lost]) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut copies = Copies::default();
        for l in lost.iter().filter(|l| !l.is_found()) {
            copies.frames.insert(l.at.hash, Vec::new());
            copies.pages.extend(l.missing().map(|(_, id)| (id, Vec::new())));
        }
        if copies.frames.is_empty() {
            return Ok(Vec::new());
        }
        self.read_all_footers(&mut copies)?;
        let mut whole = Vec::new();
        for (i, l) in lost.iter_mut().enumerate().filter(|(_, l)| !l.is_found()) {
            let exact = copies.frames.get(&l.at.hash).into_iter().flatten();
            let exact = exact.filter(|(pack, at)| (pack.id, at.offset) != (l.pack, l.at.offset));
            if let Some(raw) = first_readable(exact, |(pack, at)| self.read_frame(pack.id, at))? {
                whole.push((i, raw));
                continue;
            }
            for (slot, id) in l.missing().collect::<Vec<_>>() {
                for (pack, at, there) in copies.pages.get(&id).into_iter().flatten() {
                    if (pack.id, at.offset) == (l.pack, l.at.offset) {
                        continue;
                    }
                    let frame = first_readable([()].iter(), |()| self.read_frame(pack.id, at))?;
                    let page = frame.as_deref().and_then(|raw| raw.chunks_exact(PAGE_BYTES).nth(*there));
                    page.into_iter().for_each(|page| l.offer(&self.domain, slot, page, Source::OtherPack));
                }
            }
        }
        Ok(whole)
    }

    fn read_all_footers(&self, copies: &mut Copies) -> Result<()> {
        let mut packs = Vec::new();
        self.backend.list(&self.keys.packs(), &mut |meta| {
            let id = meta.key.rsplit('/').next().and_then(PackId::from_hex);
            packs.extend(id.map(|id| (id, meta.bytes)));
        })?;
        let read = |(id, bytes)| match self.footer_of_unknown(id, bytes) {
            Ok(read) => Ok(Some(read)),
            Err(why) if why.is_retryable() => Err(why),
            Err(_) => Ok(None),
        };
        self.side_by_side(packs, read, |read| {
            let Some((pack, footer)) = read else { return Ok(()) };
            for frame in &footer.frames {
                if let Some(known) = copies.frames.get_mut(&frame.at.hash).filter(|k| k.len() < COPIES_MAX) {
                    known.push((pack, frame.at));
                }
                for (slot, id) in frame.chunks.iter().enumerate() {
                    if let Some(known) = copies.pages.get_mut(id).filter(|k| k.len() < COPIES_MAX) {
                        known.push((pack, frame.at, slot));
                    }
                }
            }
            Ok(())
        })
    }
}

/// The first that can be read; an error only if the store does not answer.
fn first_readable<'a, T: 'a>(
    places: impl Iterator<Item = &'a T>,
    read: impl Fn(&T) -> Result<Vec<u8>>,
) -> Result<Option<Vec<u8>>> {
    for place in places {
        match read(place) {
            Ok(raw) => return Ok(Some(raw)),
            Err(why) if why.is_retryable() => return Err(why),
            Err(_) => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(pages: usize, stored: &EncodedFrame) -> Lost {
        let (raw_bytes, stored_bytes) = ((pages * PAGE_BYTES) as u32, stored.stored.len() as u32);
        let (codec, hash) = (stored.codec, stored.hash);
        let at = FrameRef { pack: 0, offset: 32, stored_bytes, raw_bytes, codec, hash };
        Lost { slots: ((1u64 << pages) - 1) as u32, ..Lost::new(PackId([1; 32]), at, FrameKind::Pages) }
    }

    /// Two page maps may disagree about how many pages a frame has: one of them is damaged, or was made to harm.
    #[test]
    fn a_page_of_a_slot_that_the_frame_does_not_have_is_no_help() {
        let domain = Domain::plain();
        let page = vec![7; PAGE_BYTES];
        let frame = EncodedFrame::encode(&domain, &page.repeat(2), 1);
        let mut lost = lost(2, &frame);
        lost.slots |= 1 << 9;
        assert!(!lost.misses(9));
        lost.offer(&domain, 9, &page, Source::ImageFile);
        assert_eq!(lost.missing().count(), 0);
        (0..2).for_each(|slot| lost.offer(&domain, slot, &page, Source::ImageFile));
        lost.prove(&domain);
        assert!(lost.is_found());
    }

    /// Blocks became smaller twice, and what was stored before stays what it is.
    #[test]
    fn pages_of_a_frame_that_an_older_version_compressed_are_proven() {
        let domain = Domain::plain();
        let bytes = (0..32 * PAGE_BYTES as u64).map(|i| ((i * i) >> 9) as u8 & 63);
        let raw: Vec<u8> = bytes.collect();
        for (level, block) in [(DEFAULT_LEVEL, 32 << 10), (DENSE_LEVEL, 64 << 10), (3, 128 << 10)] {
            let frame = EncodedFrame::encode_in_blocks(&domain, &raw, level, block);
            let now = EncodedFrame::encode(&domain, &raw, level);
            assert_ne!(frame.hash, now.hash, "blocks of {block} bytes make other bytes");
            let mut lost = lost(32, &frame);
            for (slot, page) in raw.chunks_exact(PAGE_BYTES).enumerate() {
                lost.offer(&domain, slot, page, Source::ImageFile);
            }
            lost.prove(&domain);
            assert!(lost.is_found(), "level {level}, blocks of {block} bytes");
        }
    }
}
