//! Packs: immutable objects of frames, closed by a footer that lists them and the pages they hold.
//!
//! | part | bytes | content |
//! |---|---|---|
//! | header | 32 | magic `DORMPACK`, version, reader minimum, flags, domain id |
//! | frames | n | back to back, in footer order |
//! | footer | m | see [`PackFooter`]; BLAKE3-256 of it as stored is the pack's name |
//! | trailer | 40 | magic `DORMTAIL`, version, reader minimum, flags, domain id, footer bytes, zero |

use std::fmt;

use crate::{
    domain::{Domain, DomainId},
    envelope::{FLAG_SEALED, FORMAT_VERSION, check_version},
    error::FormatError,
    frame::{Codec, EncodedFrame, FrameRef, compress_metadata, decompress},
    id::{ChunkId, FrameHash, PackId},
    limits::{FOOTER_BYTES_MAX, META_FRAME_BYTES_MAX, PACK_BYTES_MAX, PACK_FRAMES_MAX, PACK_TABLE_MAX},
    page::PAGE_BYTES,
    wire::{Reader, Writer},
};

/// Bytes before the first frame.
pub const HEADER_BYTES: usize = 32;
/// Bytes after the footer.
pub const TRAILER_BYTES: usize = 40;
const HEADER_MAGIC: [u8; 8] = *b"DORMPACK";
const TRAILER_MAGIC: [u8; 8] = *b"DORMTAIL";
const CONTEXT: &str = "pack footer";
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
            let pack = PackRef { id: PackId(r.array()?), footer_offset: r.u32()?, footer_bytes: r.u32()? };
            if pack.object_bytes() > PACK_BYTES_MAX || (pack.footer_bytes as usize) > FOOTER_BYTES_MAX {
                return Err(r.malformed("a pack is larger than packs may be"));
            }
            packs.push(pack);
        }
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

/// The list of a pack's frames.
///
/// Stored: u32 raw length, then zstd of: count; per frame kind, stored bytes, raw bytes, codec, hash; then the
/// chunk ids of all page frames in order. Sealed as a whole in an encrypted domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackFooter {
    /// The frames in the order in which they lie in the pack, without gaps.
    pub frames: Vec<PackedFrame>,
}

impl PackFooter {
    fn encode(&self, domain: &Domain) -> Vec<u8> {
        let mut w = Writer::new();
        w.varint(self.frames.len() as u64);
        for f in &self.frames {
            w.u8(f.kind as u8);
            w.varint(u64::from(f.at.stored_bytes));
            w.varint(u64::from(f.at.raw_bytes));
            w.u8(f.at.codec as u8);
            w.bytes(&f.at.hash.0);
        }
        self.frames.iter().flat_map(|f| &f.chunks).for_each(|id| w.bytes(&id.0));
        let raw = w.finish();
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
            let codec = match r.u8()? {
                0 => Codec::Raw,
                1 => Codec::Zstd,
                _ => return Err(r.malformed("unknown frame codec")),
            };
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

fn fixed(magic: [u8; 8], domain: &Domain) -> Writer {
    let mut w = Writer::new();
    w.bytes(&magic);
    w.u16(FORMAT_VERSION);
    w.u16(FORMAT_VERSION);
    w.u32(if domain.is_encrypted() { FLAG_SEALED } else { 0 });
    w.bytes(&domain.id().0);
    w
}

fn check_fixed(r: &mut Reader<'_>, magic: [u8; 8], domain: &Domain) -> Result<(), FormatError> {
    if r.array::<8>()? != magic {
        return Err(FormatError::NotThisKind("pack"));
    }
    let written_by = r.u16()?;
    check_version("pack", r.u16()?, r.u32()?, FLAG_SEALED)?;
    if written_by == 0 {
        return Err(r.malformed("written by no version"));
    }
    if DomainId(r.array()?) != domain.id() {
        return Err(FormatError::WrongKey("pack"));
    }
    Ok(())
}

/// Collects frames into a pack.
pub struct PackBuilder {
    bytes: Vec<u8>,
    footer: PackFooter,
}

impl fmt::Debug for PackBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackBuilder({} frames, {} bytes)", self.footer.frames.len(), self.bytes.len())
    }
}

impl PackBuilder {
    /// An empty pack of `domain`.
    pub fn new(domain: &Domain) -> Self {
        PackBuilder { bytes: fixed(HEADER_MAGIC, domain).finish(), footer: PackFooter::default() }
    }

    /// Bytes so far, without the footer.
    pub fn len(&self) -> usize {
        self.bytes.len()
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
        debug_assert!(kind != FrameKind::Pages || chunks.len() * PAGE_BYTES == frame.raw_bytes as usize);
        self.bytes.extend_from_slice(&frame.stored);
        self.footer.frames.push(PackedFrame { kind, at, chunks });
        at
    }

    /// Closes the pack: its reference, its bytes, its footer.
    pub fn finish(mut self, domain: &Domain) -> (PackRef, Vec<u8>, PackFooter) {
        let footer = self.footer.encode(domain);
        let pack = PackRef {
            id: PackId::of(&footer),
            footer_offset: self.bytes.len() as u32,
            footer_bytes: footer.len() as u32,
        };
        self.bytes.extend_from_slice(&footer);
        let mut trailer = fixed(TRAILER_MAGIC, domain);
        trailer.u32(footer.len() as u32);
        trailer.u32(0);
        self.bytes.extend_from_slice(&trailer.finish());
        (pack, self.bytes, self.footer)
    }
}

/// Finds the footer of a pack from its last [`TRAILER_BYTES`], for a pack known only by name and size.
pub fn parse_trailer(
    domain: &Domain,
    id: PackId,
    object_bytes: u64,
    trailer: &[u8],
) -> Result<PackRef, FormatError> {
    let mut r = Reader::new(trailer, "pack");
    check_fixed(&mut r, TRAILER_MAGIC, domain)?;
    let footer_bytes = r.u32()?;
    if r.u32()? != 0 {
        return Err(r.malformed("reserved bytes are not zero"));
    }
    r.end()?;
    let before = object_bytes
        .checked_sub(TRAILER_BYTES as u64 + u64::from(footer_bytes))
        .filter(|at| *at >= HEADER_BYTES as u64 && object_bytes <= PACK_BYTES_MAX)
        .ok_or(FormatError::Malformed { what: "pack", why: "its footer does not fit into it" })?;
    Ok(PackRef { id, footer_offset: before as u32, footer_bytes })
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
    let mut r = Reader::new(object, "pack");
    check_fixed(&mut r, HEADER_MAGIC, domain)?;
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
