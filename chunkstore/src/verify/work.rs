//! A round of repairs: what is still whole is taken, what is lost is looked for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Mutex, PoisonError},
};

use dormouse_core::{
    ChunkId, Domain, FrameRef, PAGE_BYTES, PackFooter, PackId, SECTION_PAGES, Section, SectionIndex, Slot,
    frame::EncodedFrame, is_zero, limits::BLOB_PIECE_BYTES, pack::FrameKind, section::Extent,
};

use super::{
    Need, Wanted,
    lost::{Lost, Source},
    remap::{MovedFrame, Place, Recovered},
    repair::{RepairOptions, Repaired},
};
use crate::{
    error::{Result, StoreError},
    import::{DEFAULT_LEVEL, Packing},
    meta_packs::MetaPacks,
    repack::DENSE_LEVEL,
    snapshot::Snapshot,
    store::Store,
};

/// A round of repairs.
pub(super) struct Work<'a> {
    domain: &'a Domain,
    pub(super) pages: MetaPacks<'a>,
    pub(super) meta: MetaPacks<'a>,
    pub(super) recovered: Recovered,
    lost: Vec<Lost>,
    pub(super) repaired: BTreeMap<PackId, Repaired>,
    /// Which slot of which lost frame a page of a snapshot's image is in: by number of the snapshot, and image.
    positions: HashMap<(usize, usize, u64), (usize, usize)>,
}

impl Store {
    /// Takes what is still whole in a damaged pack or cached on this host, and notes what is lost. Whether that can be
    /// told: of a pack that cannot be read, nothing is lost as far as anybody knows.
    pub(super) fn salvage(&self, want: &Wanted, work: &mut Work<'_>) -> Result<bool> {
        let object = self.backend.get(&self.keys.pack(want.pack.id), Some(0..want.pack.object_bytes()));
        let object = match object {
            Ok(object) => object,
            Err(e) => {
                self.of_one_object(e)?;
                return Ok(false);
            }
        };
        let range = want.pack.footer_range();
        let footer = object.as_ref().and_then(|o| o.get(range.start as usize..range.end as usize));
        let footer = footer.and_then(|f| PackFooter::decode(&self.domain, want.pack.id, f).ok());
        for need in want.frames.values() {
            let mut lost = Lost::new(want.pack.id, need.at, need.kind);
            footer.iter().for_each(|footer| lost.learn(footer));
            let range = need.at.range();
            let there = object.as_ref().and_then(|o| o.get(range.start as usize..range.end as usize));
            let cached = || self.disk()?.get(&need.at).map(|stored| (stored, Source::LocalCache));
            let copies = there.map(|stored| (stored.to_vec(), Source::SameObject)).into_iter();
            let taken = copies.chain(std::iter::once_with(cached).flatten()).find_map(|(stored, source)| {
                let raw =
                    need.at.decode(&self.domain, &stored).ok().filter(|raw| lost.agrees(work.domain, raw))?;
                Some((raw, stored, source))
            });
            match taken {
                Some((raw, stored, source)) => {
                    work.take(want.pack.id, need, &raw, Some(stored), source)?;
                }
                None => work.lost.push(lost),
            }
        }
        Ok(true)
    }

    /// Looks everywhere for what is lost; gives the packs of what was not found.
    pub(super) fn find_lost_frames(
        &self,
        snapshots: &[Snapshot],
        options: &RepairOptions,
        work: &mut Work<'_>,
    ) -> Result<BTreeSet<PackId>> {
        if work.lost.is_empty() {
            return Ok(BTreeSet::new());
        }
        work.locate(snapshots);
        self.learn_from_index(&mut work.lost);
        for (number, raw) in self.find_copies(&mut work.lost)? {
            work.take_lost(number, &raw, Source::OtherPack)?;
        }
        for (number, snapshot) in snapshots.iter().enumerate() {
            if work.lost.iter().any(|l| !l.is_found())
                && let Err(why) = self.look_into_stream(number, snapshot, work)
            {
                if why.is_retryable() {
                    return Err(why);
                }
                tracing::warn!(name = %snapshot.reference().name, %why, "its resume stream is no help");
            }
        }
        for path in &options.from {
            work.look_into_file(path, snapshots)?;
        }
        work.prove();
        let incomplete = work.lost.iter().filter(|l| !l.is_found()).map(|l| l.pack).collect();
        work.take_pages()?;
        Ok(incomplete)
    }

    fn look_into_stream(&self, number: usize, snapshot: &Snapshot, work: &mut Work<'_>) -> Result<()> {
        let resume = self.open_resume(&snapshot.reference().name)?;
        let Some(stream) = resume.stream.filter(|_| resume.snapshot.reference() == snapshot.reference())
        else {
            return Ok(());
        };
        let root = snapshot.root();
        for blob in &root.blobs {
            let place = |piece: &FrameRef| (root.packs[piece.pack as usize].id, piece.offset);
            let lost =
                |at: Place| work.lost.iter().position(|l| (l.pack, l.at.offset) == at && !l.is_found());
            if !blob.pieces.iter().any(|piece| lost(place(piece)).is_some()) {
                continue;
            }
            let Some(state) = stream.state(blob.id.as_str())? else { continue };
            for (piece, raw) in blob.pieces.iter().zip(state.chunks(BLOB_PIECE_BYTES)) {
                let found =
                    work.lost.iter().position(|l| (l.pack, l.at.offset) == place(piece) && !l.is_found());
                if let Some(found) = found.filter(|_| raw.len() == piece.raw_bytes as usize) {
                    work.take_lost(found, raw, Source::ResumeStream)?;
                }
            }
        }
        let Work { lost, positions, domain, .. } = work;
        let lost = Mutex::new(lost);
        stream.for_each_run(1, &|image, first, bytes| {
            let mut lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
            for (page, bytes) in (first.0..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                if let Some((frame, slot)) = positions.get(&(number, image as usize, page)) {
                    lost[*frame].offer(domain, *slot, bytes, Source::ResumeStream);
                }
            }
            Ok(())
        })?;
        Ok(())
    }
}

impl<'a> Work<'a> {
    pub(super) fn new(store: &'a Store, bad: &BTreeSet<PackId>) -> Self {
        // Names of their own: a pack of the same frames would have the name of the damaged one.
        let packing = Packing::of_attempt(1);
        Work {
            domain: &store.domain,
            pages: MetaPacks::new(store, packing),
            meta: MetaPacks::new(store, packing),
            recovered: Recovered { bad: bad.iter().copied().collect(), ..Default::default() },
            lost: Vec::new(),
            repaired: BTreeMap::new(),
            positions: HashMap::new(),
        }
    }

    fn note(&mut self, pack: PackId) -> &mut Repaired {
        self.repaired.entry(pack).or_default()
    }

    /// Takes a frame that was had back whole.
    fn take(
        &mut self,
        pack: PackId,
        need: &Need,
        raw: &[u8],
        stored: Option<Vec<u8>>,
        source: Source,
    ) -> Result<()> {
        let Need { at, kind, .. } = need;
        let frame = match stored {
            Some(stored) => EncodedFrame { stored, raw_bytes: at.raw_bytes, codec: at.codec, hash: at.hash },
            None => EncodedFrame::encode(self.domain, raw, DENSE_LEVEL),
        };
        let place = (pack, at.offset);
        match kind {
            FrameKind::Pages => {
                let chunks = raw.chunks_exact(PAGE_BYTES).map(|page| self.domain.chunk_id(page)).collect();
                let number = self.pages.push_chunks(FrameKind::Pages, &frame, chunks)?;
                let slots = (0..at.pages()).map(Slot::new).collect();
                self.recovered.frames.insert(place, MovedFrame { number, slots });
                self.note(pack).pages += at.pages() as u64;
            }
            FrameKind::Section => {
                let Ok(section) = Section::decode(raw) else { return Ok(()) };
                self.recovered.sections.insert(place, section.into());
                self.note(pack).page_maps += 1;
            }
            FrameKind::Blob => {
                let number = self.meta.push(FrameKind::Blob, &frame)?;
                self.recovered.pieces.insert(place, number);
                self.note(pack).state_pieces += 1;
            }
        }
        self.note(pack).sources.insert(source);
        Ok(())
    }

    fn take_lost(&mut self, number: usize, raw: &[u8], source: Source) -> Result<()> {
        let lost = &mut self.lost[number];
        if lost.is_found() || !lost.agrees(self.domain, raw) {
            return Ok(());
        }
        lost.taken = true;
        let need = Need { at: lost.at, kind: lost.kind, who: BTreeSet::new() };
        let pack = lost.pack;
        self.take(pack, &need, raw, None, source)
    }

    /// Finds out which pages of which images the lost frames held.
    fn locate(&mut self, snapshots: &[Snapshot]) {
        let numbers: HashMap<Place, usize> =
            self.lost.iter().enumerate().map(|(i, l)| ((l.pack, l.at.offset), i)).collect();
        for (number, snapshot) in snapshots.iter().enumerate() {
            for (image, entry) in snapshot.root().images.iter().enumerate() {
                for (index, section) in (0..).map(SectionIndex).zip(&entry.sections) {
                    let recovered = section.and_then(|s| {
                        let pack = snapshot.root().packs[s.at.pack as usize].id;
                        self.recovered.sections.get(&(pack, s.at.offset)).cloned()
                    });
                    let Some(map) = recovered.or_else(|| snapshot.section(image, index).ok().flatten())
                    else {
                        continue;
                    };
                    for (first, extent) in map.extents() {
                        let Extent::Frame { frame, slot, pages } = extent else { continue };
                        let at = map.frames()[frame as usize];
                        let Some(i) = numbers.get(&(map.packs()[at.pack as usize].id, at.offset)) else {
                            continue;
                        };
                        // Where page maps disagree about a frame, one is wrong, and its pages are not those of the frame.
                        let lost = &self.lost[*i].at;
                        if (lost.hash, lost.raw_bytes) != (at.hash, at.raw_bytes) {
                            continue;
                        }
                        let start = u64::from(index.0) * SECTION_PAGES + first as u64;
                        for n in 0..pages {
                            let slot = slot.get() + n as usize;
                            self.lost[*i].slots |= 1 << slot;
                            self.positions.insert((number, image, start + n), (*i, slot));
                        }
                    }
                }
            }
        }
    }

    /// Offers every page of an image file: by its id, and where ids are unknown by where it lies in an image of this size.
    fn look_into_file(&mut self, path: &Path, snapshots: &[Snapshot]) -> Result<()> {
        let error = |e| StoreError::file("reading", path, e);
        let file = File::open(path).map_err(error)?;
        let bytes = file.metadata().map_err(error)?.len();
        let mut images = Vec::new();
        for (number, snapshot) in snapshots.iter().enumerate() {
            let same = snapshot.root().images.iter().enumerate().filter(|(_, image)| image.bytes == bytes);
            images.extend(same.map(|(image, _)| (number, image)));
        }
        let missing: HashMap<_, Vec<_>> = self.missing();
        let mut page = vec![0; PAGE_BYTES];
        let pages = bytes.div_ceil(PAGE_BYTES as u64);
        for number in 0..pages {
            let at = number * PAGE_BYTES as u64;
            let end = (bytes - at).min(PAGE_BYTES as u64) as usize;
            page.fill(0);
            file.read_exact_at(&mut page[..end], at).map_err(error)?;
            if is_zero(&page) {
                continue;
            }
            let id = self.domain.chunk_id(&page);
            let mut slots: Vec<_> = missing.get(&id).into_iter().flatten().copied().collect();
            slots.extend(images.iter().filter_map(|(n, image)| self.positions.get(&(*n, *image, number))));
            for (frame, slot) in slots {
                self.lost[frame].offer(self.domain, slot, &page, Source::ImageFile);
            }
        }
        Ok(())
    }

    fn missing(&self) -> HashMap<ChunkId, Vec<(usize, usize)>> {
        let mut missing: HashMap<_, Vec<_>> = HashMap::new();
        for (number, lost) in self.lost.iter().enumerate() {
            for (slot, id) in lost.missing() {
                missing.entry(id).or_default().push((number, slot));
            }
        }
        missing
    }

    fn prove(&mut self) {
        self.lost.iter_mut().for_each(|lost| lost.prove(self.domain));
    }

    /// Puts what was found page by page into new frames.
    fn take_pages(&mut self) -> Result<()> {
        for lost in std::mem::take(&mut self.lost) {
            if lost.taken || lost.pages.iter().all(Option::is_none) {
                continue;
            }
            let (mut raw, mut chunks, mut slots) = (Vec::new(), Vec::new(), Vec::new());
            for page in &lost.pages {
                slots.push(page.as_ref().and_then(|_| Slot::new(chunks.len())));
                if let Some(page) = page {
                    raw.extend_from_slice(page);
                    chunks.push(self.domain.chunk_id(page));
                }
            }
            let repaired = self.note(lost.pack);
            repaired.pages += chunks.len() as u64;
            repaired.sources.extend(&lost.sources);
            let frame = EncodedFrame::encode(self.domain, &raw, DEFAULT_LEVEL);
            let number = self.pages.push_chunks(FrameKind::Pages, &frame, chunks)?;
            self.recovered.frames.insert((lost.pack, lost.at.offset), MovedFrame { number, slots });
        }
        Ok(())
    }
}
