//! Decoded frames in memory: bounded by bytes, one fetch per frame however many ask at once.

use std::{ops::Range, sync::Arc};

use dormouse_core::{PAGE_BYTES, PackId, Slot};
use quick_cache::{Weighter, sync::Cache};

use crate::error::Result;

/// Where a frame lies: its pack and its offset there.
pub(crate) type FrameKey = (PackId, u32);

/// A frame that was verified and decoded. There is no other way to make one.
#[derive(Clone, Debug)]
pub struct DecodedFrame(Arc<Vec<u8>>);

impl DecodedFrame {
    /// The raw bytes of `pages` pages from `slot` on; `None` if the frame has fewer.
    pub fn pages(&self, slot: Slot, pages: usize) -> Option<&[u8]> {
        let start = slot.get() * PAGE_BYTES;
        self.0.get(Range { start, end: start + pages * PAGE_BYTES })
    }

    /// All raw bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for DecodedFrame {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<FrameKey, DecodedFrame> for ByBytes {
    fn weight(&self, _: &FrameKey, frame: &DecodedFrame) -> u64 {
        frame.0.len() as u64 + 64
    }
}

#[derive(Debug)]
pub(crate) struct FrameCache {
    cache: Cache<FrameKey, DecodedFrame, ByBytes>,
}

impl FrameCache {
    pub(crate) fn new(bytes: u64) -> Self {
        let frames = (bytes / (128 << 10)).max(16) as usize;
        FrameCache { cache: Cache::with_weighter(frames, bytes, ByBytes) }
    }

    /// The frame if it is there.
    pub(crate) fn peek(&self, key: FrameKey) -> Option<DecodedFrame> {
        self.cache.get(&key)
    }

    /// The frame, from memory or from `fetch`; whoever else asks meanwhile waits for the same fetch.
    pub(crate) fn get(&self, key: FrameKey, fetch: impl FnOnce() -> Result<Vec<u8>>) -> Result<DecodedFrame> {
        self.cache.get_or_insert_with(&key, || fetch().map(|raw| DecodedFrame(Arc::new(raw))))
    }
}
