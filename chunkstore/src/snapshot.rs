//! A snapshot opened for reading: where each page is, and its bytes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use dormouse_core::{
    FrameRef, ImageEntry, ImageKind, PackRef, PageCount, PageIndex, Reference, Root, SECTION_PAGES, Section,
    SectionIndex, Slot, section::Extent,
};

use crate::{
    error::{Result, StoreError},
    frame_cache::DecodedFrame,
    near_frame::NearFrame,
    store::Store,
};

/// A snapshot opened for reading. Cheap to clone; clones share what was read of its page maps.
#[derive(Clone, Debug)]
pub struct Snapshot {
    store: Store,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reference: Reference,
    root: Root,
    sections: Mutex<HashMap<(usize, SectionIndex), Arc<Section>>>,
}

/// A frame of pages and the pack it lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramePlace {
    /// The pack.
    pub pack: PackRef,
    /// The frame.
    pub frame: FrameRef,
}

/// What an image holds from some page on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// A run of zero pages.
    Zero {
        /// How many.
        pages: u64,
    },
    /// A run in consecutive slots of one frame.
    Stored {
        /// The frame.
        at: FramePlace,
        /// Slot of the first page.
        slot: Slot,
        /// How many.
        pages: u64,
    },
}

impl Snapshot {
    pub(crate) fn new(store: Store, reference: Reference, root: Root) -> Self {
        Snapshot { store, inner: Arc::new(Inner { reference, root, sections: Mutex::default() }) }
    }

    /// The reference it was opened by.
    pub fn reference(&self) -> &Reference {
        &self.inner.reference
    }

    /// Its root.
    pub fn root(&self) -> &Root {
        &self.inner.root
    }

    /// The store it is in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The image called `id` of this kind.
    pub fn image(&self, kind: ImageKind, id: &str) -> Result<Image> {
        let images = &self.inner.root.images;
        let index = images.iter().position(|i| i.kind == kind && i.id.as_str() == id);
        index.map(|index| Image { snapshot: self.clone(), index }).ok_or_else(|| {
            let of_kind = images.iter().filter(|i| i.kind == kind).map(|i| i.id.as_str());
            self.no_part(if kind == ImageKind::Memory { "memory" } else { "disk" }, id, of_kind)
        })
    }

    /// All images, in the order in which they were imported.
    pub fn images(&self) -> impl Iterator<Item = Image> + '_ {
        (0..self.inner.root.images.len()).map(|index| Image { snapshot: self.clone(), index })
    }

    /// The device-state blob called `id`, verified.
    pub fn read_blob(&self, id: &str) -> Result<Vec<u8>> {
        let root = &self.inner.root;
        let blob = root.blobs.iter().find(|b| b.id.as_str() == id);
        let blob = blob.ok_or_else(|| self.no_part("state", id, root.blobs.iter().map(|b| b.id.as_str())))?;
        let mut bytes = Vec::new();
        for piece in &blob.pieces {
            bytes.extend(self.store.read_frame(root.packs[piece.pack as usize].id, piece)?);
        }
        let digest = self.store.domain.content_hasher().update(&bytes).finalize();
        if *digest.as_bytes() != blob.content {
            let why = dormouse_core::FormatError::HashMismatch("device state");
            return Err(StoreError::Damaged { key: format!("state {id}"), why });
        }
        Ok(bytes)
    }

    fn no_part<'a>(&self, kind: &'static str, id: &str, has: impl Iterator<Item = &'a str>) -> StoreError {
        let has: Vec<_> = has.collect();
        StoreError::NoSuchPart {
            snapshot: self.inner.reference.name.to_string(),
            kind,
            id: id.to_owned(),
            has: if has.is_empty() { "none".into() } else { has.join(", ") },
        }
    }

    pub(crate) fn section(&self, image: usize, index: SectionIndex) -> Result<Option<Arc<Section>>> {
        let known = |s: &Self| {
            let sections = s.inner.sections.lock().unwrap_or_else(PoisonError::into_inner);
            sections.get(&(image, index)).cloned()
        };
        if let Some(section) = known(self) {
            return Ok(Some(section));
        }
        // No lock is held over the read; two threads may read the same section once each, and the first stays.
        let Some(section) = self.read_section(image, index)? else { return Ok(None) };
        let mut sections = self.inner.sections.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Some(sections.entry((image, index)).or_insert(Arc::new(section)).clone()))
    }

    /// [`Snapshot::section`], which is read now and not remembered.
    pub(crate) fn read_section(&self, image: usize, index: SectionIndex) -> Result<Option<Section>> {
        let root = &self.inner.root;
        let entry = root.images.get(image).and_then(|i| i.sections.get(index.0 as usize)).copied().flatten();
        let Some(entry) = entry else { return Ok(None) };
        let pack = &root.packs[entry.at.pack as usize];
        let section = self.store.read_section(pack, &entry.at)?;
        let checked = root.images[image].check_section(index, &section);
        checked.map_err(|why| StoreError::Damaged { key: self.store.keys.pack(pack.id), why })?;
        Ok(Some(section))
    }

    /// Reads all page maps that were not read yet, several at the same time.
    pub(crate) fn load_sections(&self) -> Result<()> {
        let images = self.inner.root.images.iter().enumerate();
        let all = images.flat_map(|(image, entry)| {
            let there = (0..).zip(&entry.sections).filter(|(_, section)| section.is_some());
            there.map(move |(index, _)| (image, SectionIndex(index)))
        });
        self.store.side_by_side(
            all.collect(),
            |(image, index)| self.section(image, index).map(drop),
            |()| Ok(()),
        )
    }
}

impl Store {
    pub(crate) fn read_section(&self, pack: &PackRef, at: &FrameRef) -> Result<Section> {
        let raw = self.read_frame(pack.id, at)?;
        Section::decode(&raw).map_err(|why| StoreError::Damaged { key: self.keys.pack(pack.id), why })
    }
}

/// One image of an open snapshot.
#[derive(Clone, Debug)]
pub struct Image {
    snapshot: Snapshot,
    index: usize,
}

impl Image {
    /// What the root says of it.
    pub fn entry(&self) -> &ImageEntry {
        &self.snapshot.inner.root.images[self.index]
    }

    /// Its size in pages.
    pub fn pages(&self) -> PageCount {
        self.entry().pages()
    }

    /// A section of its page map, `None` if all of it is zero. Reads it if it must.
    pub fn section(&self, index: SectionIndex) -> Result<Option<Arc<Section>>> {
        self.snapshot.section(self.index, index)
    }

    /// [`Image::section`] if it needs no reading.
    pub fn loaded_section(&self, index: SectionIndex) -> Option<Option<Arc<Section>>> {
        if self.entry().sections.get(index.0 as usize).copied().flatten().is_none() {
            return Some(None);
        }
        let sections = self.snapshot.inner.sections.lock().unwrap_or_else(PoisonError::into_inner);
        sections.get(&(self.index, index)).cloned().map(Some)
    }

    /// The frame if it is in memory.
    pub fn loaded_frame(&self, at: &FramePlace) -> Option<DecodedFrame> {
        self.snapshot.store.frames.peek((at.pack.id, at.frame.offset))
    }

    /// The frame if it is in memory, or if its stored bytes are (in the page cache): those are verified here, and decoded
    /// as they are needed. Waits for no disk and no network.
    pub fn frame_at_hand(&self, at: &FramePlace) -> Option<NearFrame> {
        let store = &self.snapshot.store;
        store.frames.get_near((at.pack.id, at.frame.offset), &at.frame, &store.domain, |stored| {
            store.backend.get_at_hand(&store.keys.pack(at.pack.id), at.frame.range(), stored)
                || store.disk().is_some_and(|disk| disk.get_at_hand(&at.frame, stored))
        })
    }

    /// What it holds from `page` on, up to the end of a frame or a section. Reads the section if it must.
    pub fn locate(&self, page: PageIndex) -> Result<Pages> {
        let left = self.pages().0.saturating_sub(page.0);
        let in_section = (SECTION_PAGES - page.in_section() as u64).min(left);
        let Some(section) = self.snapshot.section(self.index, page.section())? else {
            return Ok(Pages::Zero { pages: in_section });
        };
        Ok(match section.extent(page.in_section()) {
            Extent::Zero { pages } => Pages::Zero { pages: pages.min(in_section) },
            Extent::Frame { frame, slot, pages } => {
                let frame = section.frames()[frame as usize];
                let pack = section.packs()[frame.pack as usize];
                Pages::Stored { at: FramePlace { pack, frame }, slot, pages: pages.min(in_section) }
            }
        })
    }

    /// The frame's decoded pages, from memory or from the store.
    pub fn frame(&self, at: &FramePlace) -> Result<DecodedFrame> {
        let store = &self.snapshot.store;
        store.frames.get((at.pack.id, at.frame.offset), || store.read_frame(at.pack.id, &at.frame))
    }
}
