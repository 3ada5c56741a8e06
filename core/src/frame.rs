//! Frames: up to 32 pages compressed together, the unit of fetch, verify and decode.

use std::{borrow::Cow, cell::RefCell};

use crate::{
    domain::Domain,
    error::FormatError,
    id::FrameHash,
    limits::{META_FRAME_BYTES_MAX, PACK_BYTES_MAX},
    page::{FRAME_PAGES_MAX, PAGE_BYTES},
    wire::{Reader, Writer},
};

/// Context under which frames are sealed.
const CONTEXT: &str = "frame";

/// How a frame's bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame (RFC 8878) with its content size, without checksum or dictionary.
    Zstd = 1,
    /// One LZ4 block (LZ4 block format, no header). In resume streams only, as decoding is what a resume waits for.
    Lz4 = 2,
}

impl Codec {
    /// Of a frame in a pack: what is stored once is stored densely.
    pub(crate) fn of_pack(v: u8) -> Option<Self> {
        match v {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }

    /// Of a frame in a resume stream.
    pub(crate) fn of_stream(v: u8) -> Option<Self> {
        match v {
            2 => Some(Codec::Lz4),
            _ => Self::of_pack(v),
        }
    }
}

/// LZ4's middle level: 2 % fewer bytes than the fastest for three times its time. The next one takes 4 % off that and six
/// times as long.
const LZ4_LEVEL: i32 = 2;

/// Where a frame is and what it must look like when it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRef {
    /// Index into the pack table of the object that holds this reference.
    pub pack: u32,
    /// Byte offset within the pack.
    pub offset: u32,
    /// Bytes as stored.
    pub stored_bytes: u32,
    /// Bytes once decoded.
    pub raw_bytes: u32,
    /// How it is stored.
    pub codec: Codec,
    /// Hash of the stored bytes.
    pub hash: FrameHash,
}

impl FrameRef {
    /// Fewest bytes a reference takes when written.
    pub const BYTES_MIN: usize = 4 + 1 + FrameHash::BYTES;

    /// Pages in a frame of pages.
    pub fn pages(&self) -> usize {
        self.raw_bytes as usize / PAGE_BYTES
    }

    /// The byte range of the frame within its pack.
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.stored_bytes)
    }

    /// Appends the reference.
    pub fn write(&self, w: &mut Writer) {
        w.varint(u64::from(self.pack));
        w.varint(u64::from(self.offset));
        w.varint(u64::from(self.stored_bytes));
        w.varint(u64::from(self.raw_bytes));
        w.u8(self.codec as u8);
        w.bytes(&self.hash.0);
    }

    /// Reads a reference into a table of `packs` packs.
    pub fn read(r: &mut Reader<'_>, packs: usize) -> Result<Self, FormatError> {
        let pack = r.bounded("pack index", packs.saturating_sub(1) as u64)?;
        if packs == 0 {
            return Err(r.malformed("a frame reference without a pack table"));
        }
        let offset = r.bounded("frame offset", PACK_BYTES_MAX)?;
        let stored_bytes = r.bounded("stored frame bytes", PACK_BYTES_MAX - offset)?;
        let raw_bytes = r.bounded("raw frame bytes", META_FRAME_BYTES_MAX as u64)?;
        if stored_bytes == 0 || raw_bytes == 0 {
            return Err(r.malformed("an empty frame"));
        }
        let codec = Codec::of_pack(r.u8()?).ok_or_else(|| r.malformed("unknown frame codec"))?;
        Ok(FrameRef {
            pack: pack as u32,
            offset: offset as u32,
            stored_bytes: stored_bytes as u32,
            raw_bytes: raw_bytes as u32,
            codec,
            hash: FrameHash(r.array()?),
        })
    }

    /// Checks that this refers to a frame of pages: 1 to 32 whole ones.
    pub fn check_pages(&self) -> Result<(), FormatError> {
        let raw = self.raw_bytes as usize;
        if raw == 0 || !raw.is_multiple_of(PAGE_BYTES) || raw > FRAME_PAGES_MAX * PAGE_BYTES {
            return Err(FormatError::Malformed { what: "frame reference", why: "not 1 to 32 whole pages" });
        }
        Ok(())
    }

    /// Verifies, opens and decodes the frame's stored bytes.
    ///
    /// # Errors
    /// [`FormatError::HashMismatch`] before anything else is looked at; then what opening or decoding finds.
    pub fn decode(&self, domain: &Domain, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
        let mut raw = Vec::new();
        self.decode_into(domain, stored, &mut raw)?;
        Ok(raw)
    }

    /// [`FrameRef::decode`] into a buffer that is used again and again: fresh memory costs a page fault a page.
    /// After an error the buffer's content means nothing.
    pub fn decode_into(&self, domain: &Domain, stored: &[u8], raw: &mut Vec<u8>) -> Result<(), FormatError> {
        let opened = self.verified(domain, stored)?;
        let raw_bytes = self.raw_bytes as usize;
        match self.codec {
            Codec::Raw => {
                raw.clear();
                raw.extend_from_slice(&opened);
            }
            Codec::Zstd => decompress_into(&opened, raw_bytes, raw, "frame")?,
            Codec::Lz4 => decompress_lz4_into(&opened, raw_bytes, raw)?,
        }
        if raw.len() == raw_bytes { Ok(()) } else { Err(FormatError::Undecodable("frame")) }
    }

    /// What is stored, verified and opened. No frame is decoded that did not come through here.
    pub(crate) fn verified<'a>(
        &self,
        domain: &Domain,
        stored: &'a [u8],
    ) -> Result<Cow<'a, [u8]>, FormatError> {
        if stored.len() != self.stored_bytes as usize {
            return Err(FormatError::Truncated("frame"));
        }
        if FrameHash::of(stored) != self.hash {
            return Err(FormatError::HashMismatch("frame"));
        }
        let opened = domain.open(CONTEXT, stored)?;
        let raw_bytes = self.raw_bytes as usize;
        if raw_bytes > META_FRAME_BYTES_MAX {
            let (value, limit) = (raw_bytes as u64, META_FRAME_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: "raw frame bytes", value, limit });
        }
        Ok(opened)
    }
}

/// A frame encoded and ready to be put in a pack.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// Bytes to store.
    pub stored: Vec<u8>,
    /// Bytes before encoding.
    pub raw_bytes: u32,
    /// How they are stored.
    pub codec: Codec,
    /// Hash of `stored`.
    pub hash: FrameHash,
}

impl EncodedFrame {
    /// Compresses and seals `raw`, 1 byte to 4 MiB of it; what does not shrink is stored as it is.
    pub fn encode(domain: &Domain, raw: &[u8], level: i32) -> Self {
        Self::seal(domain, raw, Codec::Zstd, compress(raw, level))
    }

    /// [`EncodedFrame::encode`] with blocks of `block_bytes`, as versions before this one may have made it: for whoever
    /// wants to know whether something is what a frame held of which only the hash is left.
    pub fn encode_in_blocks(domain: &Domain, raw: &[u8], level: i32, block_bytes: u32) -> Self {
        Self::seal(domain, raw, Codec::Zstd, compress_in_blocks(raw, level, block_bytes))
    }

    /// [`EncodedFrame::encode`] for frames that somebody waits for: guest memory takes some 7 % more bytes than at zstd's
    /// level -1, and half its time to decode.
    pub fn encode_for_speed(domain: &Domain, raw: &[u8]) -> Self {
        let mode = lz4::block::CompressionMode::HIGHCOMPRESSION(LZ4_LEVEL);
        Self::seal(domain, raw, Codec::Lz4, lz4::block::compress(raw, Some(mode), false).ok())
    }

    fn seal(domain: &Domain, raw: &[u8], codec: Codec, compressed: Option<Vec<u8>>) -> Self {
        debug_assert!((1..=META_FRAME_BYTES_MAX).contains(&raw.len()), "a frame no reader accepts");
        let (codec, bytes) = match compressed {
            // Decoding costs time: less than 1/64 saved does not pay for it.
            Some(c) if c.len() + raw.len() / 64 < raw.len() => (codec, c),
            _ => (Codec::Raw, raw.to_vec()),
        };
        let stored = domain.seal(CONTEXT, bytes);
        let hash = FrameHash::of(&stored);
        EncodedFrame { stored, raw_bytes: raw.len() as u32, codec, hash }
    }
}

thread_local! {
    // A zstd context is hundreds of KiB to set up; each thread keeps its own between frames.
    static COMPRESSOR: RefCell<Option<((i32, u32), zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses `raw`, or `None` if zstd fails (it is then stored raw).
pub(crate) fn compress(raw: &[u8], level: i32) -> Option<Vec<u8>> {
    compress_in_blocks(raw, level, block_bytes(level))
}

fn compress_in_blocks(raw: &[u8], level: i32, block_bytes: u32) -> Option<Vec<u8>> {
    let how = (level, block_bytes);
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(h, _)| *h != how) {
            *slot = Some((how, compressor(level, block_bytes)?));
        }
        slot.as_mut()?.1.compress(raw).ok()
    })
}

/// Guest memory changes its nature from page to page, so entropy tables pay for being made anew more often than zstd
/// does by itself (once in 128 KiB): 1 % fewer bytes. And a fault waits only for the blocks up to its page. See
/// `docs/DENSITY.md`.
pub const fn block_bytes(level: i32) -> u32 {
    if level < 13 { 16 << 10 } else { 32 << 10 }
}

fn compressor(level: i32, block_bytes: u32) -> Option<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level).ok()?;
    compressor.set_parameter(zstd::zstd_safe::CParameter::MaxBlockSize(block_bytes)).ok()?;
    Some(compressor)
}

/// Compresses metadata, which is always stored compressed.
///
/// # Panics
/// Where zstd cannot allocate a few hundred KiB, as any allocation in Rust would.
pub(crate) fn compress_metadata(raw: &[u8], level: i32) -> Vec<u8> {
    match compress(raw, level) {
        Some(stored) => stored,
        None => panic!("out of memory: zstd could not compress {} bytes of metadata", raw.len()),
    }
}

/// Decompresses to exactly `raw_bytes`, which the caller has bounded. Nothing is allocated for a zstd frame
/// whose own header promises another size.
pub(crate) fn decompress(
    stored: &[u8],
    raw_bytes: usize,
    what: &'static str,
) -> Result<Vec<u8>, FormatError> {
    let mut raw = Vec::new();
    decompress_into(stored, raw_bytes, &mut raw, what)?;
    Ok(raw)
}

/// That a zstd frame's own header promises `raw_bytes`.
pub(crate) fn check_size(stored: &[u8], raw_bytes: usize, what: &'static str) -> Result<(), FormatError> {
    match zstd::zstd_safe::get_frame_content_size(stored) {
        Ok(Some(n)) if n == raw_bytes as u64 => Ok(()),
        _ => Err(FormatError::Undecodable(what)),
    }
}

/// [`decompress`] into a buffer, which is cleared first.
fn decompress_into(
    stored: &[u8],
    raw_bytes: usize,
    raw: &mut Vec<u8>,
    what: &'static str,
) -> Result<(), FormatError> {
    check_size(stored, raw_bytes, what)?;
    raw.clear();
    raw.reserve_exact(raw_bytes);
    DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Decompressor::new().ok();
        }
        let done = slot.as_mut().and_then(|d| d.decompress_to_buffer(stored, raw).ok());
        if done == Some(raw_bytes) && raw.len() == raw_bytes {
            Ok(())
        } else {
            Err(FormatError::Undecodable(what))
        }
    })
}

/// Decompresses an LZ4 block to exactly `raw_bytes`, which the caller has bounded. Old content of `raw` is not wiped first:
/// that would cost as much as a fifth of the decoding.
pub(crate) fn decompress_lz4_into(
    stored: &[u8],
    raw_bytes: usize,
    raw: &mut Vec<u8>,
) -> Result<(), FormatError> {
    const UNDECODABLE: FormatError = FormatError::Undecodable("frame");
    // A block of this format shrinks what it holds to no less than a 255th.
    if stored.len() < raw_bytes / 255 {
        return Err(UNDECODABLE);
    }
    raw.resize(raw_bytes, 0);
    let limit = i32::try_from(raw_bytes).map_err(|_| UNDECODABLE)?;
    match lz4::block::decompress_to_buffer(stored, Some(limit), raw) {
        Ok(n) if n == raw_bytes => Ok(()),
        _ => Err(UNDECODABLE),
    }
}
