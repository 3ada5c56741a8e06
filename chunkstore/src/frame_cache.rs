//! Decoded frames in memory: bounded by bytes, one fetch per frame however many ask at once.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use dormouse_core::{PAGE_BYTES, PackId, Slot};
use quick_cache::{Weighter, sync::Cache};

use crate::error::Result;

/// Where a frame lies: its pack and its offset there.
pub(crate) type FrameKey = (PackId, u32);

/// A frame that was verified and decoded. There is no other way to make one.
#[derive(Clone, Debug)]
pub struct DecodedFrame(Arc<Buffer>);

impl DecodedFrame {
    /// The raw bytes of `pages` pages from `slot` on; `None` if the frame has fewer.
    pub fn pages(&self, slot: Slot, pages: usize) -> Option<&[u8]> {
        let start = slot.get() * PAGE_BYTES;
        self.0.raw.get(Range { start, end: start + pages * PAGE_BYTES })
    }

    /// All raw bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0.raw
    }
}

impl AsRef<[u8]> for DecodedFrame {
    fn as_ref(&self) -> &[u8] {
        &self.0.raw
    }
}

/// Decoded bytes, whose memory goes back where it came from.
#[derive(Debug)]
struct Buffer {
    raw: Vec<u8>,
    home: Option<Arc<Spare>>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.put(std::mem::take(&mut self.raw));
        }
    }
}

/// Buffers that were in use and will be again.
#[derive(Debug, Default)]
struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    /// Buffers kept: 4 MiB.
    const MOST: usize = 32;

    fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < Self::MOST {
            spare.push(buffer);
        }
    }
}

/// Frames decoded lately and not kept: a set that forgets.
#[derive(Debug)]
struct Once(Mutex<Box<[Option<FrameKey>]>>);

impl Once {
    /// Frames remembered: 1 GiB of pages.
    const FRAMES: usize = 8 << 10;

    fn new() -> Self {
        Once(Mutex::new(vec![None; Self::FRAMES].into()))
    }

    /// Whether `key` was seen not long ago; from now on it was.
    fn seen_before(&self, key: FrameKey) -> bool {
        // Pack ids are hashes, so their bytes place a frame as well as any hash of them would.
        let (pack, offset) = (&key.0.0, u64::from(key.1));
        let hash = pack.iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte));
        let at = hash.wrapping_add(offset.wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 32;
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places[at as usize % Self::FRAMES].replace(key) == Some(key)
    }
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<FrameKey, DecodedFrame> for ByBytes {
    fn weight(&self, _: &FrameKey, frame: &DecodedFrame) -> u64 {
        frame.0.raw.len() as u64 + 64
    }
}

#[derive(Debug)]
pub(crate) struct FrameCache {
    cache: Cache<FrameKey, DecodedFrame, ByBytes>,
    spare: Arc<Spare>,
    once: Once,
}

impl FrameCache {
    pub(crate) fn new(bytes: u64) -> Self {
        let frames = (bytes / (128 << 10)).max(16) as usize;
        let cache = Cache::with_weighter(frames, bytes, ByBytes);
        FrameCache { cache, spare: Arc::default(), once: Once::new() }
    }

    /// The frame if it is there.
    pub(crate) fn peek(&self, key: FrameKey) -> Option<DecodedFrame> {
        self.cache.get(&key)
    }

    /// The frame, from memory or from `decode`, which is near at hand. Waits for nobody.
    ///
    /// Most frames are decoded once in the life of a machine, so only one that is decoded for the second time is kept;
    /// the others' buffers are used again, for fresh memory costs a fault a page.
    pub(crate) fn get_near(
        &self,
        key: FrameKey,
        decode: impl FnOnce(&mut Vec<u8>) -> Option<()>,
    ) -> Option<DecodedFrame> {
        if let Some(frame) = self.cache.get(&key) {
            return Some(frame);
        }
        let mut buffer = Buffer { raw: self.spare.take(), home: Some(self.spare.clone()) };
        decode(&mut buffer.raw)?;
        let frame = DecodedFrame(Arc::new(buffer));
        if self.once.seen_before(key) {
            self.cache.insert(key, frame.clone());
        }
        Some(frame)
    }

    /// The frame, from memory or from `fetch`; whoever else asks meanwhile waits for the same fetch.
    pub(crate) fn get(&self, key: FrameKey, fetch: impl FnOnce() -> Result<Vec<u8>>) -> Result<DecodedFrame> {
        self.cache.get_or_insert_with(&key, || {
            fetch().map(|raw| DecodedFrame(Arc::new(Buffer { raw, home: None })))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: FrameKey = (PackId([7; 32]), 4096);

    #[test]
    fn a_frame_near_at_hand_is_kept_when_it_is_decoded_for_the_second_time() {
        let cache = FrameCache::new(1 << 20);
        let mut decoded = 0;
        for _ in 0..4 {
            let frame = cache.get_near(KEY, |raw| {
                decoded += 1;
                raw.clear();
                raw.resize(PAGE_BYTES, 5);
                Some(())
            });
            assert_eq!(frame.as_ref().map(DecodedFrame::bytes), Some(&[5; PAGE_BYTES][..]));
        }
        assert_eq!(decoded, 2);
    }

    #[test]
    fn a_frame_that_cannot_be_decoded_leaves_nothing_behind() {
        let cache = FrameCache::new(1 << 20);
        for _ in 0..3 {
            let fails = |raw: &mut Vec<u8>| {
                raw.extend([1, 2, 3]);
                None
            };
            assert!(cache.get_near(KEY, fails).is_none());
        }
        assert!(cache.peek(KEY).is_none());
        let works = |raw: &mut Vec<u8>| {
            raw.clear();
            raw.push(9);
            Some(())
        };
        assert_eq!(cache.get_near(KEY, works).as_ref().map(DecodedFrame::bytes), Some(&[9][..]));
    }

    #[test]
    fn buffers_are_used_again_and_only_so_many_are_kept() {
        let cache = FrameCache::new(1 << 20);
        let decode = |raw: &mut Vec<u8>| {
            raw.resize(64, 0);
            Some(())
        };
        let frames: Vec<_> = (0..100u32).filter_map(|at| cache.get_near((KEY.0, at), decode)).collect();
        assert_eq!(frames.len(), 100);
        drop(frames);
        let spare = cache.spare.0.lock().map(|spare| spare.len());
        assert_eq!(spare.ok(), Some(Spare::MOST));
    }
}
