//! Resume streams: what a machine touches first, in one object, in the order in which it is touched.
//!
//! A stream is derived from a snapshot and the working set known for it; it can be deleted and rebuilt at any time,
//! and a better one replaces it whole. It belongs to a name, not to a root: whoever reads it asks for the reference at
//! the same time and uses the stream only if both are of the same snapshot.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 32 | magic `DORMSTRM`, version, reader minimum, flags, domain id |
//! | 32 | 4 | head bytes as stored |
//! | 36 | 4 | head bytes raw |
//! | 40 | 32 | BLAKE3-256 of the 40 bytes before and the head as stored |
//! | 72 | n | head: zstd, sealed in an encrypted domain |
//! | 72+n | m | frames, back to back in head order |
//!
//! Head: snapshot id, root id, root object, state blobs, frames. Each frame has the hash of its stored bytes in the
//! head, as a page map's frames have.

use std::ops::Range;

use crate::{
    domain::Domain,
    envelope::{START_BYTES, Start},
    error::FormatError,
    frame::{Codec, FrameRef, decompress},
    id::{Digest, FrameHash, RootId, SnapshotId},
    limits::{BLOB_BYTES_MAX, BLOBS_MAX, IMAGES_MAX, META_FRAME_BYTES_MAX, NAME_BYTES_MAX, ROOT_BYTES_MAX},
    name::ImageId,
    page::{IMAGE_PAGES_MAX, PAGE_BYTES},
    wire::Reader,
};

pub use crate::stream_builder::{StreamBuilder, StreamLimits};

pub(crate) const WHAT: &str = "resume stream";
pub(crate) const MAGIC: [u8; 8] = *b"DORMSTRM";
/// Bytes before the head.
pub const PREFIX_BYTES: usize = START_BYTES + 8 + 32;
/// Pages in a stream's frame, at most: 256 KiB.
pub const STREAM_FRAME_PAGES_MAX: usize = 64;
/// Largest stream a reader accepts.
pub const STREAM_BYTES_MAX: u64 = 1 << 30;
/// Most frames in a stream.
pub const STREAM_FRAMES_MAX: usize = 1 << 18;
/// Largest head, stored and raw.
pub const HEAD_BYTES_MAX: usize = 64 << 20;

/// What a frame of a stream holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamPart {
    /// The next piece of a device-state blob.
    State {
        /// Index into [`StreamHead::blobs`].
        blob: u32,
    },
    /// Pages of an image.
    Pages {
        /// Index into the root's images.
        image: u32,
        /// Which pages, in the order in which the frame holds them.
        runs: Vec<Range<u64>>,
    },
}

/// A frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamFrame {
    /// Where it is in the stream (`pack` is 0), and what it must look like.
    pub at: FrameRef,
    /// What it holds.
    pub part: StreamPart,
}

/// A device-state blob in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamBlob {
    /// Its name.
    pub id: ImageId,
    /// Its size.
    pub bytes: u64,
    /// Digest of its bytes.
    pub content: Digest,
}

/// What a stream is of and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHead {
    /// The snapshot it was made from.
    pub snapshot: SnapshotId,
    /// The snapshot's root at that time.
    pub root: RootId,
    /// That root's object, so that it need not be asked for.
    pub root_object: Vec<u8>,
    /// The snapshot's device state.
    pub blobs: Vec<StreamBlob>,
    /// Its frames in the order in which they are to be used.
    pub frames: Vec<StreamFrame>,
}

impl StreamHead {
    /// Bytes of the whole stream, given where its frames begin.
    pub fn object_bytes(&self, frames_at: u64) -> u64 {
        self.frames.last().map_or(frames_at, |f| f.at.range().end)
    }

    /// Pages of all frames.
    pub fn pages(&self) -> u64 {
        let pages = |f: &StreamFrame| match &f.part {
            StreamPart::State { .. } => 0,
            StreamPart::Pages { runs, .. } => runs.iter().map(|r| r.end - r.start).sum(),
        };
        self.frames.iter().map(pages).sum()
    }

    /// Where the frames begin, from the first [`PREFIX_BYTES`] of a stream.
    pub fn end(prefix: &[u8]) -> Result<usize, FormatError> {
        let mut r = Reader::new(prefix, WHAT);
        Start::read(&mut r, WHAT, MAGIC, 0)?;
        let head = r.u32()? as usize;
        if head > HEAD_BYTES_MAX {
            let (value, limit) = (head as u64, HEAD_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: "stream head bytes", value, limit });
        }
        Ok(PREFIX_BYTES + head)
    }

    /// Verifies and decodes the head; `bytes` are the stream's up to [`StreamHead::end`], or more.
    pub fn decode(domain: &Domain, bytes: &[u8]) -> Result<Self, FormatError> {
        let end = Self::end(bytes)?;
        let bytes = bytes.get(..end).ok_or(FormatError::Truncated(WHAT))?;
        let mut r = Reader::new(bytes, WHAT);
        let start = Start::read(&mut r, WHAT, MAGIC, 0)?;
        let _stored = r.u32()?;
        let raw_bytes = r.u32()? as usize;
        let hash: Digest = r.array()?;
        let stored = r.bytes(r.remaining())?;
        if *blake3::Hasher::new().update(&bytes[..PREFIX_BYTES - 32]).update(stored).finalize().as_bytes()
            != hash
        {
            return Err(FormatError::HashMismatch(WHAT));
        }
        start.check_domain(domain)?;
        if raw_bytes > HEAD_BYTES_MAX {
            let (value, limit) = (raw_bytes as u64, HEAD_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: "stream head bytes", value, limit });
        }
        let opened = domain.open(WHAT, stored)?;
        Self::parse(&decompress(&opened, raw_bytes, WHAT)?, end as u64)
    }

    /// Decodes a head's raw bytes; frames begin at byte `frames_at` of the stream.
    pub fn parse(raw: &[u8], frames_at: u64) -> Result<Self, FormatError> {
        let mut r = Reader::new(raw, WHAT);
        let (snapshot, root) = (SnapshotId(r.array()?), RootId(r.array()?));
        let root_object = r.counted("root bytes", ROOT_BYTES_MAX)?.to_vec();
        let mut blobs = Vec::new();
        for _ in 0..r.count("blobs", BLOBS_MAX, 34)? {
            let name = std::str::from_utf8(r.counted("name bytes", NAME_BYTES_MAX)?);
            let id = ImageId::new(name.map_err(|_| r.malformed("a name is not text"))?)?;
            blobs.push(StreamBlob {
                id,
                bytes: r.bounded("blob bytes", BLOB_BYTES_MAX)?,
                content: r.array()?,
            });
        }
        let n = r.count("frames in a stream", STREAM_FRAMES_MAX, 5 + FrameHash::BYTES)?;
        let mut frames = Vec::with_capacity(n);
        let mut offset = frames_at;
        let mut state_bytes = vec![0; blobs.len()];
        for _ in 0..n {
            let frame = read_frame(&mut r, &mut offset, blobs.len())?;
            if let StreamPart::State { blob } = frame.part {
                state_bytes[blob as usize] += u64::from(frame.at.raw_bytes);
            }
            frames.push(frame);
        }
        r.end()?;
        // Whoever puts a state together takes up as much memory as its pieces say.
        if blobs.iter().zip(&state_bytes).any(|(blob, bytes)| blob.bytes != *bytes) {
            return Err(r.malformed("the pieces of a state do not add up to its size"));
        }
        Ok(StreamHead { snapshot, root, root_object, blobs, frames })
    }
}

fn read_frame(r: &mut Reader<'_>, offset: &mut u64, blobs: usize) -> Result<StreamFrame, FormatError> {
    let stored = r.bounded("stored frame bytes", STREAM_BYTES_MAX - (*offset).min(STREAM_BYTES_MAX))?;
    let raw_bytes = r.bounded("raw frame bytes", META_FRAME_BYTES_MAX as u64)?;
    if stored == 0 || raw_bytes == 0 {
        return Err(r.malformed("a frame is empty"));
    }
    let codec = Codec::of_stream(r.u8()?).ok_or_else(|| r.malformed("unknown frame codec"))?;
    let hash = FrameHash(r.array()?);
    let at = FrameRef {
        pack: 0,
        offset: *offset as u32,
        stored_bytes: stored as u32,
        raw_bytes: raw_bytes as u32,
        codec,
        hash,
    };
    *offset += stored;
    let part = match r.u8()? {
        0 => {
            let blob = r.bounded("blob index", BLOBS_MAX as u64)?;
            if blob >= blobs as u64 {
                return Err(r.malformed("a frame is of a blob that is not there"));
            }
            StreamPart::State { blob: blob as u32 }
        }
        1 => {
            let image = r.bounded("image index", IMAGES_MAX as u64)? as u32;
            let n = r.count("runs in a frame", STREAM_FRAME_PAGES_MAX, 2)?;
            let (mut runs, mut last, mut total) = (Vec::with_capacity(n), 0i64, 0u64);
            for _ in 0..n {
                let first = last
                    .checked_add(r.zigzag()?)
                    .and_then(|p| u64::try_from(p).ok())
                    .filter(|p| *p < IMAGE_PAGES_MAX)
                    .ok_or_else(|| r.malformed("a run begins outside any image"))?;
                let pages = r.bounded("pages in a run", STREAM_FRAME_PAGES_MAX as u64)?;
                if pages == 0 {
                    return Err(r.malformed("a run is empty"));
                }
                total += pages;
                if total > STREAM_FRAME_PAGES_MAX as u64 {
                    return Err(r.malformed("a frame has more pages than any may have"));
                }
                last = (first + pages) as i64;
                runs.push(first..first + pages);
            }
            if total * PAGE_BYTES as u64 != raw_bytes {
                return Err(r.malformed("a frame's runs do not add up to its size"));
            }
            StreamPart::Pages { image, runs }
        }
        _ => return Err(r.malformed("unknown kind of frame")),
    };
    Ok(StreamFrame { at, part })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DomainKey, frame::EncodedFrame};

    fn sample(domain: &Domain) -> Vec<u8> {
        let blobs = vec![StreamBlob { id: ImageId::new("vmstate").unwrap(), bytes: 5, content: [9; 32] }];
        let mut b = StreamBuilder::new(SnapshotId([1; 32]), RootId([2; 32]), b"root".to_vec(), blobs);
        b.push(&StreamPart::State { blob: 0 }, &EncodedFrame::encode(domain, b"state", 1));
        let runs = vec![70..72, 3..4];
        let pages: Vec<u8> = (0..3 * PAGE_BYTES).map(|i| (i / 64) as u8).collect();
        b.push(&StreamPart::Pages { image: 0, runs }, &EncodedFrame::encode_for_speed(domain, &pages));
        b.finish(domain)
    }

    #[test]
    fn a_stream_comes_back_as_it_was_built() {
        for domain in [Domain::plain(), Domain::encrypted(&DomainKey::new([3; 32]))] {
            let object = sample(&domain);
            let head = StreamHead::decode(&domain, &object).unwrap();
            assert_eq!((head.snapshot, head.root), (SnapshotId([1; 32]), RootId([2; 32])));
            assert_eq!((head.root_object.as_slice(), head.pages()), (&b"root"[..], 3));
            let frames_at = StreamHead::end(&object).unwrap() as u64;
            assert_eq!(head.object_bytes(frames_at), object.len() as u64);
            let [state, pages] = &head.frames[..] else { panic!("two frames") };
            let bytes = |f: &StreamFrame| &object[f.at.range().start as usize..f.at.range().end as usize];
            assert_eq!(state.at.decode(&domain, bytes(state)).unwrap(), b"state");
            assert_eq!(pages.part, StreamPart::Pages { image: 0, runs: vec![70..72, 3..4] });
            assert_eq!(pages.at.decode(&domain, bytes(pages)).unwrap().len(), 3 * PAGE_BYTES);
        }
    }

    /// What a stream of one state of `bytes` with these frames decodes to.
    fn decoded(bytes: u64, frames: &[(StreamPart, EncodedFrame)]) -> Result<StreamHead, FormatError> {
        let blobs = vec![StreamBlob { id: ImageId::new("vmstate").unwrap(), bytes, content: [9; 32] }];
        let mut b = StreamBuilder::new(SnapshotId([1; 32]), RootId([2; 32]), b"root".to_vec(), blobs);
        frames.iter().for_each(|(part, frame)| b.push(part, frame));
        StreamHead::decode(&Domain::plain(), &b.finish(&Domain::plain()))
    }

    #[test]
    fn pieces_of_a_state_add_up_to_its_size() {
        let piece =
            |raw: &[u8]| (StreamPart::State { blob: 0 }, EncodedFrame::encode(&Domain::plain(), raw, 1));
        let both = [piece(b"sta"), piece(b"te")];
        assert!(decoded(5, &both).is_ok() && decoded(0, &[]).is_ok());
        for (bytes, frames) in [(4, &both[..]), (6, &both), (5, &both[..1]), (5, &[]), (0, &both)] {
            let refused = matches!(decoded(bytes, frames), Err(FormatError::Malformed { .. }));
            assert!(refused, "{} pieces for {bytes} bytes", frames.len());
        }
    }

    #[test]
    fn frames_that_are_empty_or_hold_more_pages_than_any_may_are_refused() {
        let domain = Domain::plain();
        let empty =
            EncodedFrame { stored: Vec::new(), raw_bytes: 0, codec: Codec::Raw, hash: FrameHash::of(b"") };
        for part in [StreamPart::State { blob: 0 }, StreamPart::Pages { image: 0, runs: vec![] }] {
            assert!(matches!(decoded(0, &[(part, empty.clone())]), Err(FormatError::Malformed { .. })));
        }
        let pages = |runs: Vec<Range<u64>>| {
            let raw = vec![7; runs.iter().map(|r| (r.end - r.start) as usize * PAGE_BYTES).sum()];
            let frame = EncodedFrame::encode(&domain, &raw, 1);
            decoded(0, &[(StreamPart::Pages { image: 0, runs }, frame)])
        };
        assert!(pages(vec![0..40, 50..74]).is_ok());
        assert!(matches!(pages(vec![0..40, 50..75]), Err(FormatError::Malformed { .. })));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let domain = Domain::plain();
        let object = sample(&domain);
        let whole = |object: &[u8]| -> Result<(), FormatError> {
            let head = StreamHead::decode(&domain, object)?;
            for f in &head.frames {
                let range = f.at.range();
                let stored = object.get(range.start as usize..range.end as usize);
                f.at.decode(&domain, stored.ok_or(FormatError::Truncated(WHAT))?)?;
            }
            Ok(())
        };
        assert_eq!(whole(&object), Ok(()));
        for byte in 0..object.len() {
            // Bytes 8..10 say which version wrote it; a reader of any version reads what it may read.
            for bit in 0..8 {
                let mut damaged = object.clone();
                damaged[byte] ^= 1 << bit;
                assert!(whole(&damaged).is_err(), "bit {bit} of byte {byte}");
            }
            assert!(whole(&object[..byte]).is_err(), "cut at {byte}");
        }
    }
}
