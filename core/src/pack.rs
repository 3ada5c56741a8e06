//! Packs: immutable objects of frames, closed by a footer that lists them and the pages they hold.
//!
//! | part | bytes | content |
//! |---|---|---|
//! | header | 32 | magic `DORMPACK`, version, reader minimum, flags, domain id |
//! | frames | n | back to back, in footer order |
//! | footer | m | see [`PackFooter`]; BLAKE3-256 of it as stored is the pack's name |
//! | trailer | 40 | magic `DORMTAIL`, version, reader minimum, flags, domain id, footer bytes, checksum |
//!
//! The checksum is the first four bytes of BLAKE3-256 over the 36 before it: a footer found through its pack's
//! reference is vouched for by the pack's name, but header and trailer are covered by nothing else.

use std::{collections::HashSet, fmt};

use crate::{
    domain::Domain,
    envelope::{FLAG_DENSE, START_BYTES, Start, VERSION_1, write_start},
    error::FormatError,
    frame::{Codec, EncodedFrame, FrameRef, compress_metadata, decompress},
    id::{ChunkId, FrameHash, PackId},
    limits::{
        FOOTER_BYTES_MAX, META_FRAME_BYTES_MAX, PACK_BYTES_MAX, PACK_FRAMES_MAX, PACK_TABLE_MAX,
        PACK_TARGET_BYTES,
    },
    page::PAGE_BYTES,
    wire::{Reader, Writer},
};

/// Bytes before the first frame.
pub const HEADER_BYTES: usize = START_BYTES;
/// Bytes after the footer.
pub const TRAILER_BYTES: usize = 40;
const HEADER_MAGIC: [u8; 8] = *b"DORMPACK";
const TRAILER_MAGIC: [u8; 8] = *b"DORMTAIL";
const CONTEXT: &str = "pack footer";
const FOOTER_VERSION: u8 = 1;
/// Most bytes a footer spends on a frame, its chunk ids apart.
const FOOTER_FRAME_BYTES_MAX: usize = 1 + 4 + 4 + 1 + FrameHash::BYTES;
/// Chunk ids do not compress and the rest is small: a fast level is enough.
const FOOTER_LEVEL: i32 = 1;

/// A pack and where its footer lies, as tables of packs list it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackRef {
    /// The pack's name.
    pub id: PackId,
    /// Byte offset of the footer.
    pub footer_offset: u32,
    /// Bytes of the footer as stored.
    pub footer_bytes: u32,
}

impl PackRef {
    /// Bytes of the whole pack object.
    pub fn object_bytes(&self) -> u64 {
        u64::from(self.footer_offset) + u64::from(self.footer_bytes) + TRAILER_BYTES as u64
    }

    /// The footer's byte range within the pack.
    pub fn footer_range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.footer_offset);
        start..start + u64::from(self.footer_bytes)
    }

    /// Checks that `frame` lies between this pack's header and its footer.
    pub(crate) fn check_frame(&self, frame: &FrameRef) -> Result<(), FormatError> {
        let range = frame.range();
        if range.start < HEADER_BYTES as u64 || range.end > u64::from(self.footer_offset) {
            return Err(FormatError::Malformed {
                what: "frame reference",
                why: "not among its pack's frames",
            });
        }
        Ok(())
    }

    /// Checks what holds for every pack.
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        let why = if self.object_bytes() > PACK_BYTES_MAX || self.footer_bytes as usize > FOOTER_BYTES_MAX {
            "a pack is larger than packs may be"
        } else if (self.footer_offset as usize) < HEADER_BYTES || self.footer_bytes == 0 {
            "a pack is smaller than packs can be"
        } else {
            return Ok(());
        };
        Err(FormatError::Malformed { what: "pack reference", why })
    }

    /// Checks a table of packs: its size, each pack, and that none is in it twice.
    pub(crate) fn check_table(packs: &[PackRef]) -> Result<(), FormatError> {
        if packs.len() > PACK_TABLE_MAX {
            let (value, limit) = (packs.len() as u64, PACK_TABLE_MAX as u64);
            return Err(FormatError::OverLimit { what: "packs in a table", value, limit });
        }
        let mut seen = HashSet::with_capacity(packs.len());
        for pack in packs {
            pack.check()?;
            if !seen.insert(pack.id) {
                return Err(FormatError::Malformed { what: "pack table", why: "a pack is in it twice" });
            }
        }
        Ok(())
    }

    /// Writes a table of packs.
    pub fn write_table(w: &mut Writer, packs: &[PackRef]) {
        w.varint(packs.len() as u64);
        for pack in packs {
            w.bytes(&pack.id.0);
            w.u32(pack.footer_offset);
            w.u32(pack.footer_bytes);
        }
    }

    /// Reads a table of packs.
    pub fn read_table(r: &mut Reader<'_>) -> Result<Vec<PackRef>, FormatError> {
        let n = r.count("packs in a table", PACK_TABLE_MAX, 40)?;
        let mut packs = Vec::with_capacity(n);
        for _ in 0..n {
            packs.push(PackRef { id: PackId(r.array()?), footer_offset: r.u32()?, footer_bytes: r.u32()? });
        }
        Self::check_table(&packs)?;
        Ok(packs)
    }
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Pages of images.
    Pages = 0,
    /// A page-map section.
    Section = 1,
    /// A piece of a device-state blob.
    Blob = 2,
}

/// A frame as a footer lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedFrame {
    /// What it holds.
    pub kind: FrameKind,
    /// Where it is: `pack` is always 0, the pack itself.
    pub at: FrameRef,
    /// The ids of its pages, in slot order; empty unless `kind` is [`FrameKind::Pages`].
    pub chunks: Vec<ChunkId>,
}

impl PackedFrame {
    /// Decodes the frame and, if it holds pages, checks each against its chunk id. A footer's chunk ids are
    /// claims of its writer: reading through a section never relies on them, deduplicating against them does.
    pub fn decode(&self, domain: &Domain, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
        let raw = self.at.decode(domain, stored)?;
        let same =
            raw.chunks_exact(PAGE_BYTES).zip(&self.chunks).all(|(page, id)| domain.chunk_id(page) == *id);
        if !same || (self.kind == FrameKind::Pages && self.chunks.len() * PAGE_BYTES != raw.len()) {
            return Err(FormatError::Malformed {
                what: CONTEXT,
                why: "a page is not the one its chunk id names",
            });
        }
        Ok(raw)
    }
}

/// The list of a pack's frames.
///
/// Stored: u32 raw length, then zstd of: version; count; per frame kind, stored bytes, raw bytes, codec, hash; then the
/// chunk ids of all page frames in order. Sealed as a whole in an encrypted domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackFooter {
    /// The frames in the order in which they lie in the pack, without gaps.
    pub frames: Vec<PackedFrame>,
}

impl PackFooter {
    /// The footer's raw bytes, which [`PackFooter::parse`] reads.
    pub fn to_raw(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(FOOTER_VERSION);
        w.varint(self.frames.len() as u64);
        for f in &self.frames {
            w.u8(f.kind as u8);
            w.varint(u64::from(f.at.stored_bytes));
            w.varint(u64::from(f.at.raw_bytes));
            w.u8(f.at.codec as u8);
            w.bytes(&f.at.hash.0);
        }
        self.frames.iter().flat_map(|f| &f.chunks).for_each(|id| w.bytes(&id.0));
        w.finish()
    }

    fn encode(&self, domain: &Domain) -> Vec<u8> {
        let raw = self.to_raw();
        let mut stored = (raw.len() as u32).to_le_bytes().to_vec();
        stored.extend(compress_metadata(&raw, FOOTER_LEVEL));
        domain.seal(CONTEXT, stored)
    }

    /// Verifies a footer against the name of its pack and decodes it.
    pub fn decode(domain: &Domain, id: PackId, stored: &[u8]) -> Result<Self, FormatError> {
        if PackId::of(stored) != id {
            return Err(FormatError::HashMismatch(CONTEXT));
        }
        let opened = domain.open(CONTEXT, stored)?;
        let mut r = Reader::new(&opened, CONTEXT);
        let raw_bytes = r.u32()? as usize;
        if raw_bytes > FOOTER_BYTES_MAX {
            let (value, limit) = (raw_bytes as u64, FOOTER_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: CONTEXT, value, limit });
        }
        let raw = decompress(r.bytes(r.remaining())?, raw_bytes, CONTEXT)?;
        Self::parse(&raw)
    }

    /// Decodes a footer's raw bytes.
    pub fn parse(raw: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(raw, CONTEXT);
        match r.u8()? {
            FOOTER_VERSION => {}
            0 => return Err(r.malformed("version 0")),
            v => {
                let (needs, reads) = (v.into(), FOOTER_VERSION.into());
                return Err(FormatError::TooNew { what: CONTEXT, needs, reads });
            }
        }
        let n = r.count("frames in a pack", PACK_FRAMES_MAX, 20)?;
        let mut frames = Vec::with_capacity(n);
        let mut offset = HEADER_BYTES as u64;
        for _ in 0..n {
            let kind = match r.u8()? {
                0 => FrameKind::Pages,
                1 => FrameKind::Section,
                2 => FrameKind::Blob,
                _ => return Err(r.malformed("unknown frame kind")),
            };
            let stored = r.bounded("stored frame bytes", PACK_BYTES_MAX - offset)?;
            let raw_bytes = r.bounded("raw frame bytes", META_FRAME_BYTES_MAX as u64)?;
            if stored == 0 || raw_bytes == 0 {
                return Err(r.malformed("an empty frame"));
            }
            let codec = Codec::of_pack(r.u8()?).ok_or_else(|| r.malformed("unknown frame codec"))?;
            let at = FrameRef {
                pack: 0,
                offset: offset as u32,
                stored_bytes: stored as u32,
                raw_bytes: raw_bytes as u32,
                codec,
                hash: FrameHash(r.array()?),
            };
            if kind == FrameKind::Pages {
                at.check_pages()?;
            }
            offset += stored;
            frames.push(PackedFrame { kind, at, chunks: Vec::new() });
        }
        for frame in frames.iter_mut().filter(|f| f.kind == FrameKind::Pages) {
            let pages = frame.at.pages();
            let ids = r.bytes(pages * ChunkId::BYTES)?;
            frame.chunks = ids
                .chunks_exact(ChunkId::BYTES)
                .map(|c| {
                    let mut id = [0; ChunkId::BYTES];
                    id.copy_from_slice(c);
                    ChunkId(id)
                })
                .collect();
        }
        r.end()?;
        Ok(PackFooter { frames })
    }
}

fn check_start<'a>(bytes: &'a [u8], magic: [u8; 8], domain: &Domain) -> Result<Reader<'a>, FormatError> {
    let mut r = Reader::new(bytes, "pack");
    Start::read(&mut r, "pack", magic, FLAG_DENSE)?.check_domain(domain)?;
    Ok(r)
}

fn trailer_check(before: &[u8]) -> [u8; 4] {
    let digest = blake3::hash(before);
    let [a, b, c, d, ..] = *digest.as_bytes();
    [a, b, c, d]
}

/// Collects frames into a pack.
pub struct PackBuilder {
    bytes: Vec<u8>,
    footer: PackFooter,
    footer_raw_bytes: usize,
    flags: u32,
}

impl fmt::Debug for PackBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackBuilder({} frames, {} bytes)", self.footer.frames.len(), self.bytes.len())
    }
}

impl PackBuilder {
    /// An empty pack of `domain`.
    pub fn new(domain: &Domain) -> Self {
        Self::with_flags(domain, 0)
    }

    /// An empty pack of `domain` for frames that are compressed as densely as they ever will be.
    pub fn dense(domain: &Domain) -> Self {
        Self::with_flags(domain, FLAG_DENSE)
    }

    fn with_flags(domain: &Domain, flags: u32) -> Self {
        PackBuilder {
            bytes: write_start(HEADER_MAGIC, VERSION_1, domain, flags).finish(),
            footer: PackFooter::default(),
            footer_raw_bytes: 1 + 4,
            flags,
        }
    }

    /// Bytes so far, with those the footer will need before compression. Pages that compress to almost nothing
    /// still cost a chunk id each, so a pack of them is bounded by its footer rather than by its frames.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.footer_raw_bytes
    }

    /// Whether the pack has reached the size at which it is to be closed. A pack that is pushed to while it is not
    /// full stays within every limit of the format.
    pub fn is_full(&self) -> bool {
        self.len() >= PACK_TARGET_BYTES || self.footer.frames.len() >= PACK_FRAMES_MAX
    }

    /// Whether no frame was added yet.
    pub fn is_empty(&self) -> bool {
        self.footer.frames.is_empty()
    }

    /// Appends a frame and returns its reference, with `pack` 0. `chunks` names the pages of a page frame.
    pub fn push(&mut self, kind: FrameKind, frame: &EncodedFrame, chunks: Vec<ChunkId>) -> FrameRef {
        let at = FrameRef {
            pack: 0,
            offset: self.bytes.len() as u32,
            stored_bytes: frame.stored.len() as u32,
            raw_bytes: frame.raw_bytes,
            codec: frame.codec,
            hash: frame.hash,
        };
        debug_assert!(frame.codec != Codec::Lz4, "a frame of a stream");
        debug_assert!(kind != FrameKind::Pages || chunks.len() * PAGE_BYTES == frame.raw_bytes as usize);
        self.bytes.extend_from_slice(&frame.stored);
        self.footer_raw_bytes += FOOTER_FRAME_BYTES_MAX + chunks.len() * ChunkId::BYTES;
        self.footer.frames.push(PackedFrame { kind, at, chunks });
        at
    }

    /// Closes the pack: its reference, its bytes, its footer.
    pub fn finish(mut self, domain: &Domain) -> (PackRef, Vec<u8>, PackFooter) {
        debug_assert!(
            self.footer.frames.len() <= PACK_FRAMES_MAX && self.footer_raw_bytes <= FOOTER_BYTES_MAX
        );
        let footer = self.footer.encode(domain);
        let pack = PackRef {
            id: PackId::of(&footer),
            footer_offset: self.bytes.len() as u32,
            footer_bytes: footer.len() as u32,
        };
        self.bytes.extend_from_slice(&footer);
        debug_assert_eq!(pack.check(), Ok(()));
        let mut trailer = write_start(TRAILER_MAGIC, VERSION_1, domain, self.flags);
        trailer.u32(footer.len() as u32);
        let mut trailer = trailer.finish();
        trailer.extend_from_slice(&trailer_check(&trailer));
        self.bytes.extend_from_slice(&trailer);
        (pack, self.bytes, self.footer)
    }
}

/// Whether a pack is marked as dense, by its header or its trailer.
pub fn is_dense(start: &[u8]) -> Result<bool, FormatError> {
    let mut r = Reader::new(start, "pack");
    let magic = if start.starts_with(&HEADER_MAGIC) { HEADER_MAGIC } else { TRAILER_MAGIC };
    Ok(Start::read(&mut r, "pack", magic, FLAG_DENSE)?.has(FLAG_DENSE))
}

/// Finds the footer of a pack from its last [`TRAILER_BYTES`], for a pack known only by name and size.
pub fn parse_trailer(
    domain: &Domain,
    id: PackId,
    object_bytes: u64,
    trailer: &[u8],
) -> Result<PackRef, FormatError> {
    let mut r = check_start(trailer, TRAILER_MAGIC, domain)?;
    let footer_bytes = r.u32()?;
    let check = r.array::<4>()?;
    r.end()?;
    if trailer_check(&trailer[..TRAILER_BYTES - 4]) != check {
        return Err(FormatError::HashMismatch("pack"));
    }
    let before = object_bytes
        .checked_sub(TRAILER_BYTES as u64 + u64::from(footer_bytes))
        .filter(|at| *at >= HEADER_BYTES as u64 && object_bytes <= PACK_BYTES_MAX)
        .ok_or(FormatError::Malformed { what: "pack", why: "its footer does not fit into it" })?;
    let pack = PackRef { id, footer_offset: before as u32, footer_bytes };
    pack.check()?;
    Ok(pack)
}

/// Checks every byte of a whole pack: header, footer, trailer, and each frame's hash. Returns its footer and
/// the indices of damaged frames.
pub fn check_object(
    domain: &Domain,
    id: PackId,
    object: &[u8],
) -> Result<(PackFooter, Vec<usize>), FormatError> {
    let trailer_at = object.len().checked_sub(TRAILER_BYTES).ok_or(FormatError::Truncated("pack"))?;
    let pack = parse_trailer(domain, id, object.len() as u64, &object[trailer_at..])?;
    check_start(object, HEADER_MAGIC, domain)?;
    let (header, trailer) = (&object[..START_BYTES], &object[trailer_at..]);
    if header[HEADER_MAGIC.len()..] != trailer[TRAILER_MAGIC.len()..START_BYTES] {
        return Err(FormatError::Malformed { what: "pack", why: "its header and trailer differ" });
    }
    let range = pack.footer_offset as usize..pack.footer_offset as usize + pack.footer_bytes as usize;
    let footer = PackFooter::decode(domain, id, &object[range])?;
    let end = footer.frames.last().map_or(HEADER_BYTES as u64, |f| f.at.range().end);
    if end != u64::from(pack.footer_offset) {
        return Err(FormatError::Malformed { what: "pack", why: "its frames do not end at its footer" });
    }
    let damaged = footer
        .frames
        .iter()
        .enumerate()
        .filter(|(_, f)| {
            let range = f.at.range();
            FrameHash::of(&object[range.start as usize..range.end as usize]) != f.at.hash
        })
        .map(|(i, _)| i)
        .collect();
    Ok((footer, damaged))
}
