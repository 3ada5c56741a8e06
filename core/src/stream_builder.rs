//! Building a resume stream, up to what its readers accept.

use crate::{
    domain::Domain,
    envelope::{VERSION_1, VERSION_LZ4, write_start},
    frame::{Codec, EncodedFrame, compress_metadata},
    id::{RootId, SnapshotId},
    limits::NAME_BYTES_MAX,
    stream::{
        HEAD_BYTES_MAX, MAGIC, PREFIX_BYTES, STREAM_BYTES_MAX, STREAM_FRAMES_MAX, StreamBlob, StreamPart,
        WHAT,
    },
    wire::Writer,
};

const HEAD_LEVEL: i32 = 3;
/// Most bytes that a head has beside root, names and frames, and by which sealing and not compressing lengthen it.
const HEAD_ROOM_BYTES: usize = 512;

/// What a stream may have at most.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Bytes of the object.
    pub bytes: u64,
    /// Frames.
    pub frames: usize,
    /// Bytes of the head, raw and stored.
    pub head_bytes: usize,
}

impl Default for StreamLimits {
    /// What a reader accepts.
    fn default() -> Self {
        StreamLimits { bytes: STREAM_BYTES_MAX, frames: STREAM_FRAMES_MAX, head_bytes: HEAD_BYTES_MAX }
    }
}

/// Collects a stream.
#[derive(Debug)]
pub struct StreamBuilder {
    snapshot: SnapshotId,
    root: RootId,
    root_object: Vec<u8>,
    blobs: Vec<StreamBlob>,
    frames: Writer,
    count: usize,
    bytes: Vec<u8>,
    version: u16,
}

impl StreamBuilder {
    /// A stream of `snapshot` with no frames yet.
    pub fn new(snapshot: SnapshotId, root: RootId, root_object: Vec<u8>, blobs: Vec<StreamBlob>) -> Self {
        let (frames, count, bytes) = (Writer::new(), 0, Vec::new());
        StreamBuilder { snapshot, root, root_object, blobs, frames, count, bytes, version: VERSION_1 }
    }

    /// Bytes of frames so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no frame yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether the stream with this frame is surely within `limits`: what a head takes up is known only when it is closed.
    pub fn fits(&self, part: &StreamPart, frame: &EncodedFrame, limits: &StreamLimits) -> bool {
        let runs = match part {
            StreamPart::State { .. } => 0,
            StreamPart::Pages { runs, .. } => runs.len(),
        };
        let blobs = self.blobs.len() * (NAME_BYTES_MAX + 48);
        let raw = self.root_object.len() + blobs + self.frames.len() + 48 + 16 * runs + HEAD_ROOM_BYTES;
        let head = raw + raw / 128 + HEAD_ROOM_BYTES;
        let bytes = PREFIX_BYTES + head + self.bytes.len() + frame.stored.len();
        self.count < limits.frames && head <= limits.head_bytes && bytes as u64 <= limits.bytes
    }

    /// Appends a frame.
    pub fn push(&mut self, part: &StreamPart, frame: &EncodedFrame) {
        let w = &mut self.frames;
        self.count += 1;
        if frame.codec == Codec::Lz4 {
            self.version = VERSION_LZ4;
        }
        w.varint(frame.stored.len() as u64);
        w.varint(u64::from(frame.raw_bytes));
        w.u8(frame.codec as u8);
        w.bytes(&frame.hash.0);
        match part {
            StreamPart::State { blob } => {
                w.u8(0);
                w.varint(u64::from(*blob));
            }
            StreamPart::Pages { image, runs } => {
                w.u8(1);
                w.varint(u64::from(*image));
                w.varint(runs.len() as u64);
                let mut last = 0i64;
                for run in runs {
                    w.zigzag(run.start as i64 - last);
                    w.varint(run.end - run.start);
                    last = run.end as i64;
                }
            }
        }
        self.bytes.extend_from_slice(&frame.stored);
    }

    /// The object's bytes.
    pub fn finish(self, domain: &Domain) -> Vec<u8> {
        let mut head = Writer::new();
        head.bytes(&self.snapshot.0);
        head.bytes(&self.root.0);
        head.counted(&self.root_object);
        head.varint(self.blobs.len() as u64);
        for blob in &self.blobs {
            head.counted(blob.id.as_str().as_bytes());
            head.varint(blob.bytes);
            head.bytes(&blob.content);
        }
        head.varint(self.count as u64);
        head.bytes(&self.frames.finish());
        let raw = head.finish();
        let stored = domain.seal(WHAT, compress_metadata(&raw, HEAD_LEVEL));
        let mut w = write_start(MAGIC, self.version, domain, 0);
        w.u32(stored.len() as u32);
        w.u32(raw.len() as u32);
        let mut out = w.finish();
        let hash = blake3::Hasher::new().update(&out).update(&stored).finalize();
        out.extend_from_slice(hash.as_bytes());
        out.extend_from_slice(&stored);
        out.extend_from_slice(&self.bytes);
        out
    }
}
