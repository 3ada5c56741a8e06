//! Decoded frames in memory: bounded by bytes, one fetch per frame however many ask at once.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use dormouse_core::{Domain, FrameRef, PAGE_BYTES, PackId, Slot};
use quick_cache::{Weighter, sync::Cache};

use crate::{
    error::Result,
    near_frame::{Kind, NearFrame, Partly},
};

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
pub(crate) struct Spare {
    buffers: Mutex<Vec<Vec<u8>>>,
    partly: AtomicUsize,
}

impl Spare {
    /// Buffers kept: 4 MiB.
    const MOST: usize = 32;
    /// Frames that may be decoded in part at once. Each holds a decoder, which is larger than the frame.
    const PARTLY_MOST: usize = 32;

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<u8> {
        self.buffers().pop().unwrap_or_default()
    }

    pub(crate) fn put(&self, buffer: Vec<u8>) {
        let mut spare = self.buffers();
        if buffer.capacity() > 0 && spare.len() < Self::MOST {
            spare.push(buffer);
        }
    }

    /// Whether one more frame may be decoded in part.
    fn one_more_partly(&self) -> bool {
        let more = |n| (n < Self::PARTLY_MOST).then_some(n + 1);
        self.partly.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    pub(crate) fn one_less_partly(&self) {
        self.partly.fetch_sub(1, Ordering::Relaxed);
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

    /// The frame, from memory, or from its stored bytes, which `read` puts into a buffer if they are at hand. Waits for
    /// nobody.
    ///
    /// Most frames are decoded once in the life of a machine, so only one that is asked for a second time is kept; the
    /// others are decoded no further than somebody needs, and their buffers are used again, for fresh memory costs a
    /// fault a page.
    pub(crate) fn get_near(
        &self,
        key: FrameKey,
        at: &FrameRef,
        domain: &Domain,
        read: impl FnOnce(&mut Vec<u8>) -> bool,
    ) -> Option<NearFrame> {
        if let Some(frame) = self.cache.get(&key) {
            return Some(NearFrame(Kind::Whole(frame)));
        }
        let mut stored = self.spare.take();
        let mut raw = self.spare.take();
        if !read(&mut stored) {
            self.spare.put(stored);
            self.spare.put(raw);
            return None;
        }
        // What is wrong with it, if anything, is for the ordinary way to find out and to tell.
        let again = self.once.seen_before(key);
        if !again && self.spare.one_more_partly() {
            let begun = at.begin(domain, stored, raw).inspect_err(|_| self.spare.one_less_partly());
            let partly = Partly::new(begun.ok()?, self.spare.clone());
            return Some(NearFrame(Kind::Partly(Arc::new(partly))));
        }
        let decoded = at.decode_into(domain, &stored, &mut raw);
        self.spare.put(stored);
        decoded.ok()?;
        let frame = DecodedFrame(Arc::new(Buffer { raw, home: Some(self.spare.clone()) }));
        if again {
            self.cache.insert(key, frame.clone());
        }
        Some(NearFrame(Kind::Whole(frame)))
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
    use dormouse_core::{FrameHash, frame::EncodedFrame};

    use super::*;

    const PAGES: usize = 32;

    /// A frame of noise and zeros, in blocks that are decoded one by one.
    fn frame(n: u32) -> (FrameKey, FrameRef, EncodedFrame, Vec<u8>) {
        let noise = |at: usize| blake3::hash(&[at as u8, (at >> 8) as u8, n as u8]).as_bytes()[0];
        let raw: Vec<u8> =
            (0..PAGES * PAGE_BYTES).map(|at| if at % 4 == 0 { noise(at / 4) } else { n as u8 }).collect();
        let encoded = EncodedFrame::encode(&Domain::plain(), &raw, 3);
        let (stored_bytes, raw_bytes) = (encoded.stored.len() as u32, raw.len() as u32);
        let (codec, hash) = (encoded.codec, encoded.hash);
        let at = FrameRef { pack: 0, offset: n, stored_bytes, raw_bytes, codec, hash };
        ((PackId([7; 32]), n), at, encoded, raw)
    }

    fn near(cache: &FrameCache, n: u32) -> NearFrame {
        let (key, at, encoded, _) = frame(n);
        let read = |into: &mut Vec<u8>| {
            into.clear();
            into.extend_from_slice(&encoded.stored);
            true
        };
        cache.get_near(key, &at, &Domain::plain(), read).unwrap()
    }

    #[test]
    fn a_frame_near_at_hand_is_kept_when_it_is_asked_for_a_second_time() {
        let cache = FrameCache::new(1 << 20);
        assert!(matches!(near(&cache, 1), NearFrame(Kind::Partly(_))));
        assert!(cache.peek(frame(1).0).is_none());
        assert!(matches!(near(&cache, 1), NearFrame(Kind::Whole(_))));
        assert_eq!(cache.peek(frame(1).0).unwrap().bytes(), frame(1).3);
    }

    #[test]
    fn all_threads_that_decode_a_frame_bit_by_bit_see_the_same_bytes() {
        let (cache, raw) = (FrameCache::new(1 << 20), frame(1).3);
        let one = near(&cache, 1);
        assert_eq!(one.pages(), PAGES);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (one, raw) = (one.clone(), &raw);
                scope.spawn(move || {
                    for slot in (0..PAGES).map(|n| (n * 13 + thread * 5) % PAGES) {
                        let pages = (1 + slot * 7 % 12).min(PAGES - slot);
                        let bytes = one.slots(slot, pages).unwrap();
                        assert_eq!(bytes, &raw[slot * PAGE_BYTES..(slot + pages) * PAGE_BYTES]);
                    }
                });
            }
        });
        assert!(matches!(one.slots(0, PAGES), Some(std::borrow::Cow::Borrowed(_))), "it is whole by now");
        assert_eq!(one.slots(PAGES - 1, 2), None, "the frame ends before");
    }

    #[test]
    fn a_frame_that_is_not_what_was_stored_leaves_nothing_behind() {
        let cache = FrameCache::new(1 << 20);
        let (key, at, encoded, _) = frame(1);
        let at = FrameRef { hash: FrameHash([9; 16]), ..at };
        for _ in 0..3 {
            let read = |into: &mut Vec<u8>| {
                into.clone_from(&encoded.stored);
                true
            };
            assert!(cache.get_near(key, &at, &Domain::plain(), read).is_none());
            assert!(cache.get_near(key, &at, &Domain::plain(), |_| false).is_none());
        }
        assert!(cache.peek(key).is_none());
        assert_eq!(cache.spare.partly.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn so_many_frames_are_decoded_in_part_and_no_more_and_buffers_are_used_again() {
        let cache = FrameCache::new(1 << 20);
        let frames: Vec<_> = (0..100).map(|n| near(&cache, n)).collect();
        let partly = frames.iter().filter(|f| matches!(f, NearFrame(Kind::Partly(_)))).count();
        assert_eq!(partly, Spare::PARTLY_MOST);
        for (n, one) in frames.iter().enumerate() {
            assert_eq!(one.slots(5, 1).unwrap(), &frame(n as u32).3[5 * PAGE_BYTES..][..PAGE_BYTES]);
        }
        drop(frames);
        assert_eq!(cache.spare.buffers().len(), Spare::MOST);
        assert!(matches!(near(&cache, 100), NearFrame(Kind::Partly(_))), "those that are done count no more");
    }
}
