//! Roots: the small immutable object a snapshot is opened by.
//!
//! The body is zstd-compressed and has two parts. The *logical* part says what the snapshot is: images, content
//! digests, device-state blobs, parent, labels; its hash is the [`SnapshotId`]. The *layout* part says where it
//! lies at present: packs, sections, blob pieces. Repacking writes a new root with the same logical part.

use std::collections::HashSet;

use crate::{
    domain::Domain,
    envelope::{self, Kind},
    error::FormatError,
    frame::{FrameRef, compress_metadata, decompress},
    id::{Digest, RootId, SnapshotId},
    limits::{
        BLOB_BYTES_MAX, BLOBS_MAX, IMAGES_MAX, LABEL_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX, ROOT_BYTES_MAX,
        SECTIONS_MAX,
    },
    name::ImageId,
    pack::PackRef,
    page::{IMAGE_PAGES_MAX, PAGE_BYTES, PageCount, SectionIndex},
    section::Section,
    wire::{Reader, Writer},
};

/// A body that does not compress is a little longer than the root itself.
const BODY_BYTES_MAX: usize = ROOT_BYTES_MAX + ROOT_BYTES_MAX / 128;
const KIND: Kind = Kind { magic: *b"DORMROOT", what: "root", body_bytes_max: BODY_BYTES_MAX };
const LEVEL: i32 = 3;
/// Largest root object a reader accepts.
pub const OBJECT_BYTES_MAX: u64 = KIND.object_bytes_max();

/// What an image is to its machine. Both are stored alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ImageKind {
    /// Guest memory.
    Memory = 0,
    /// A disk.
    Disk = 1,
}

/// One section of an image that is not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionEntry {
    /// Digest of the section's logical content: its parent's digest and the pages that differ from it.
    pub content: Digest,
    /// Where the section is stored; its pack indexes [`Root::packs`].
    pub at: FrameRef,
    /// Pages in it that are not zero.
    pub stored_pages: u32,
}

/// A memory or a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageEntry {
    /// Its name.
    pub id: ImageId,
    /// What it is.
    pub kind: ImageKind,
    /// Its exact size; a last, partial page is stored padded with zeros.
    pub bytes: u64,
    /// Its sections in order, `None` where all pages are zero.
    pub sections: Vec<Option<SectionEntry>>,
}

impl ImageEntry {
    /// Its size in pages.
    pub fn pages(&self) -> PageCount {
        PageCount::covering(self.bytes)
    }

    /// Pages that are not zero.
    pub fn stored_pages(&self) -> u64 {
        self.sections.iter().flatten().map(|s| u64::from(s.stored_pages)).sum()
    }

    /// Verifies and decodes the section at `index` from its frame's stored bytes, and checks that it is one this
    /// image can have. `None` if all pages there are zero or the image ends before.
    pub fn decode_section(
        &self,
        domain: &Domain,
        index: SectionIndex,
        stored: &[u8],
    ) -> Result<Option<Section>, FormatError> {
        let Some(entry) = self.sections.get(index.0 as usize).and_then(Option::as_ref) else {
            return Ok(None);
        };
        let section = Section::decode(&entry.at.decode(domain, stored)?)?;
        self.check_section(index, &section)?;
        Ok(Some(section))
    }

    /// Checks that a decoded section is the one this image has at `index`, as far as its root can tell.
    pub fn check_section(&self, index: SectionIndex, section: &Section) -> Result<(), FormatError> {
        let stored =
            self.sections.get(index.0 as usize).and_then(Option::as_ref).map_or(0, |e| e.stored_pages);
        let pages = index.pages(self.pages());
        if section.end_page() as u64 > pages.end - pages.start || section.stored_pages() != u64::from(stored)
        {
            let why = "it does not hold the pages its root says";
            return Err(FormatError::Malformed { what: "page-map section", why });
        }
        Ok(())
    }
}

/// A device-state blob: opaque bytes the VMM wants back as they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    /// Its name.
    pub id: ImageId,
    /// Digest of its bytes.
    pub content: Digest,
    /// Its size.
    pub bytes: u64,
    /// Its pieces in order; their packs index [`Root::packs`].
    pub pieces: Vec<FrameRef>,
}

/// A snapshot's root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// The snapshot this one was made from.
    pub parent: Option<SnapshotId>,
    /// When the machine was captured, milliseconds since 1970 UTC. Not part of the identity.
    pub created_unix_ms: u64,
    /// Key and value pairs, strictly ascending by key.
    pub labels: Vec<(String, String)>,
    /// Memory and disks, each id once.
    pub images: Vec<ImageEntry>,
    /// Device state, each id once.
    pub blobs: Vec<BlobEntry>,
    /// The packs that sections and blob pieces lie in.
    pub packs: Vec<PackRef>,
}

impl Root {
    /// The snapshot's identity in `domain`.
    pub fn snapshot_id(&self, domain: &Domain) -> SnapshotId {
        SnapshotId(*domain.snapshot_hasher().update(&self.logical()).finalize().as_bytes())
    }

    /// The image called `id`.
    pub fn image(&self, id: &str) -> Option<&ImageEntry> {
        self.images.iter().find(|i| i.id.as_str() == id)
    }

    fn logical(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(u8::from(self.parent.is_some()));
        self.parent.iter().for_each(|p| w.bytes(&p.0));
        w.varint(self.labels.len() as u64);
        for (key, value) in &self.labels {
            w.counted(key.as_bytes());
            w.counted(value.as_bytes());
        }
        w.varint(self.images.len() as u64);
        for image in &self.images {
            w.counted(image.id.as_str().as_bytes());
            w.u8(image.kind as u8);
            w.varint(image.bytes);
            // Runs of absent sections cost two bytes, so that a sparse 64 GiB machine's root stays small.
            let mut rest = &image.sections[..];
            while !rest.is_empty() {
                let absent = rest.iter().take_while(|s| s.is_none()).count();
                let present = rest[absent..].iter().take_while(|s| s.is_some()).count();
                w.varint(absent as u64);
                w.varint(present as u64);
                rest[absent..absent + present].iter().flatten().for_each(|s| w.bytes(&s.content));
                rest = &rest[absent + present..];
            }
        }
        w.varint(self.blobs.len() as u64);
        for blob in &self.blobs {
            w.counted(blob.id.as_str().as_bytes());
            w.varint(blob.bytes);
            w.bytes(&blob.content);
        }
        w.finish()
    }

    fn layout(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.created_unix_ms);
        PackRef::write_table(&mut w, &self.packs);
        for section in self.images.iter().flat_map(|i| &i.sections).flatten() {
            section.at.write(&mut w);
            w.varint(u64::from(section.stored_pages));
        }
        for blob in &self.blobs {
            w.varint(blob.pieces.len() as u64);
            blob.pieces.iter().for_each(|p| p.write(&mut w));
        }
        w.finish()
    }

    /// Checks everything a reader will: a root that fails this must not be written. [`Root::decode`] and
    /// [`Root::parse`] have checked it already.
    pub fn check(&self) -> Result<(), FormatError> {
        let over = |what, value: usize, limit: usize| match value > limit {
            true => Err(FormatError::OverLimit { what, value: value as u64, limit: limit as u64 }),
            false => Ok(()),
        };
        let malformed = |why| Err(FormatError::Malformed { what: KIND.what, why });
        over("labels", self.labels.len(), LABELS_MAX)?;
        over("images", self.images.len(), IMAGES_MAX)?;
        over("blobs", self.blobs.len(), BLOBS_MAX)?;
        for (key, value) in &self.labels {
            over("label bytes", key.len().max(value.len()), LABEL_BYTES_MAX)?;
        }
        if !self.labels.is_sorted_by(|a, b| a.0 < b.0) {
            return malformed("its labels are not in order, or one is there twice");
        }
        let mut ids = HashSet::new();
        if !self.images.iter().all(|i| ids.insert(&i.id)) {
            return malformed("two images have the same id");
        }
        ids.clear();
        if !self.blobs.iter().all(|b| ids.insert(&b.id)) {
            return malformed("two blobs have the same id");
        }
        PackRef::check_table(&self.packs)?;
        let frame = |at: &FrameRef| match self.packs.get(at.pack as usize) {
            Some(pack) => pack.check_frame(at),
            None => malformed("a frame in no pack of its table"),
        };
        let mut sections = 0;
        for image in &self.images {
            if image.bytes > IMAGE_PAGES_MAX * PAGE_BYTES as u64
                || image.sections.len() != image.pages().sections() as usize
            {
                return malformed("an image's sections do not fit its size");
            }
            sections += image.sections.len();
            over("sections", sections, SECTIONS_MAX)?;
            for (index, section) in (0..).zip(&image.sections) {
                let Some(section) = section else { continue };
                let range = SectionIndex(index).pages(image.pages());
                if !(1..=range.end - range.start).contains(&u64::from(section.stored_pages)) {
                    return malformed("a section stores no page, or more than it has");
                }
                frame(&section.at)?;
            }
        }
        for blob in &self.blobs {
            if blob.bytes > BLOB_BYTES_MAX {
                let (value, limit) = (blob.bytes, BLOB_BYTES_MAX);
                return Err(FormatError::OverLimit { what: "blob bytes", value, limit });
            }
            if blob.pieces.iter().map(|p| u64::from(p.raw_bytes)).sum::<u64>() != blob.bytes {
                return malformed("a blob's pieces do not add up to its size");
            }
            blob.pieces.iter().try_for_each(frame)?;
        }
        Ok(())
    }

    /// The root's raw bytes, which [`Root::parse`] reads.
    pub fn to_raw(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.counted(&self.logical());
        w.bytes(&self.layout());
        w.finish()
    }

    /// The object's name and bytes. [`Root::check`] first: what fails it is encoded, but no reader accepts it.
    pub fn encode(&self, domain: &Domain) -> (RootId, Vec<u8>) {
        debug_assert_eq!(self.check(), Ok(()));
        let raw = self.to_raw();
        debug_assert!(raw.len() <= ROOT_BYTES_MAX, "a root no reader accepts");
        let mut body = (raw.len() as u32).to_le_bytes().to_vec();
        body.extend(compress_metadata(&raw, LEVEL));
        let object = envelope::wrap(KIND, domain, body);
        (RootId::of(&object), object)
    }

    /// Verifies the object against its name and decodes it.
    pub fn decode(domain: &Domain, id: RootId, object: &[u8]) -> Result<Self, FormatError> {
        if RootId::of(object) != id {
            return Err(FormatError::HashMismatch(KIND.what));
        }
        let body = envelope::unwrap(KIND, domain, object)?;
        let mut r = Reader::new(&body, KIND.what);
        let raw_bytes = r.u32()? as usize;
        if raw_bytes > ROOT_BYTES_MAX {
            let (value, limit) = (raw_bytes as u64, ROOT_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: KIND.what, value, limit });
        }
        Self::parse(&decompress(r.bytes(r.remaining())?, raw_bytes, KIND.what)?)
    }

    /// Decodes a root's raw bytes.
    pub fn parse(raw: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(raw, KIND.what);
        let logical = r.counted("logical part bytes", ROOT_BYTES_MAX)?;
        let mut root = Root::default();
        root.read_logical(&mut Reader::new(logical, KIND.what))?;
        root.read_layout(&mut r)?;
        root.check()?;
        Ok(root)
    }

    fn read_logical(&mut self, r: &mut Reader<'_>) -> Result<(), FormatError> {
        self.parent = match r.u8()? {
            0 => None,
            1 => Some(SnapshotId(r.array()?)),
            _ => return Err(r.malformed("a flag is neither 0 nor 1")),
        };
        for _ in 0..r.count("labels", LABELS_MAX, 2)? {
            let key = text(r, LABEL_BYTES_MAX)?.to_owned();
            self.labels.push((key, text(r, LABEL_BYTES_MAX)?.to_owned()));
        }
        let mut total = 0;
        for _ in 0..r.count("images", IMAGES_MAX, 4)? {
            let id = ImageId::new(text(r, NAME_BYTES_MAX)?)?;
            let kind = match r.u8()? {
                0 => ImageKind::Memory,
                1 => ImageKind::Disk,
                _ => return Err(r.malformed("unknown image kind")),
            };
            let bytes = r.bounded("image bytes", IMAGE_PAGES_MAX * PAGE_BYTES as u64)?;
            let wanted = PageCount::covering(bytes).sections() as usize;
            total += wanted;
            if total > SECTIONS_MAX {
                let (value, limit) = (total as u64, SECTIONS_MAX as u64);
                return Err(FormatError::OverLimit { what: "sections", value, limit });
            }
            let mut sections = Vec::new();
            while sections.len() < wanted {
                let left = (wanted - sections.len()) as u64;
                let absent = r.bounded("absent sections", left)? as usize;
                let present = r.bounded("present sections", left - absent as u64)? as usize;
                // One way to write it: absent ones are only left out at the start, present ones only at the end.
                if (absent == 0 && !sections.is_empty()) || (present == 0 && absent as u64 != left) {
                    return Err(r.malformed("a run of sections is split in two"));
                }
                sections.resize(sections.len() + absent, None);
                for _ in 0..present {
                    let content = r.array()?;
                    sections.push(Some(SectionEntry { content, at: NOWHERE, stored_pages: 0 }));
                }
            }
            self.images.push(ImageEntry { id, kind, bytes, sections });
        }
        for _ in 0..r.count("blobs", BLOBS_MAX, 34)? {
            let id = ImageId::new(text(r, NAME_BYTES_MAX)?)?;
            let bytes = r.bounded("blob bytes", BLOB_BYTES_MAX)?;
            self.blobs.push(BlobEntry { id, bytes, content: r.array()?, pieces: Vec::new() });
        }
        r.end()
    }

    fn read_layout(&mut self, r: &mut Reader<'_>) -> Result<(), FormatError> {
        self.created_unix_ms = r.u64()?;
        self.packs = PackRef::read_table(r)?;
        for section in self.images.iter_mut().flat_map(|i| &mut i.sections).flatten() {
            section.at = FrameRef::read(r, self.packs.len())?;
            section.stored_pages = r.bounded("stored pages", crate::page::SECTION_PAGES)? as u32;
        }
        for blob in &mut self.blobs {
            let n = r.count("blob pieces", BLOB_BYTES_MAX as usize, FrameRef::BYTES_MIN)?;
            for _ in 0..n {
                blob.pieces.push(FrameRef::read(r, self.packs.len())?);
            }
        }
        r.end()
    }
}

/// Stands in until the layout part is read.
const NOWHERE: FrameRef = FrameRef {
    pack: 0,
    offset: 0,
    stored_bytes: 0,
    raw_bytes: 0,
    codec: crate::frame::Codec::Raw,
    hash: crate::id::FrameHash([0; 16]),
};

fn text<'a>(r: &mut Reader<'a>, limit: usize) -> Result<&'a str, FormatError> {
    let bytes = r.counted("text bytes", limit)?;
    std::str::from_utf8(bytes).map_err(|_| r.malformed("a text is not UTF-8"))
}
