//! Frames whose stored bytes are at hand, decoded as far as somebody needed them.
//!
//! A vCPU waits for one page. The blocks of its frame behind that page are decoded once they are asked for, which is when
//! nobody waits any more. The frame as a whole is verified before.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use dormouse_core::{FramePrefix, PAGE_BYTES};

use crate::frame_cache::{DecodedFrame, Spare};

/// Pages copied out of a frame that is not whole yet, at most: to decode all of it costs less than to copy more.
const COPIED_PAGES_MAX: usize = 8;

/// A verified frame, decoded or about to be.
#[derive(Clone, Debug)]
pub struct NearFrame(pub(crate) Kind);

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// All of it is decoded.
    Whole(DecodedFrame),
    /// Decoded as far as it was needed.
    Partly(Arc<Partly>),
}

impl NearFrame {
    /// Pages in the frame.
    pub fn pages(&self) -> usize {
        match &self.0 {
            Kind::Whole(frame) => frame.bytes().len() / PAGE_BYTES,
            Kind::Partly(frame) => frame.raw_bytes / PAGE_BYTES,
        }
    }

    /// The raw bytes of `pages` pages from `slot` on, decoded if they are not yet; `None` if the frame has fewer, or is
    /// none although its hash is right.
    pub fn slots(&self, slot: usize, pages: usize) -> Option<Cow<'_, [u8]>> {
        let start = slot.checked_mul(PAGE_BYTES)?;
        let end = pages.checked_mul(PAGE_BYTES)?.checked_add(start)?;
        match &self.0 {
            Kind::Whole(frame) => frame.bytes().get(start..end).map(Cow::Borrowed),
            Kind::Partly(frame) => frame.bytes(start, end),
        }
    }
}

/// A frame decoded from its start on.
#[derive(Debug)]
pub(crate) struct Partly {
    raw_bytes: usize,
    whole: OnceLock<Vec<u8>>,
    prefix: Mutex<Option<FramePrefix>>,
    home: Arc<Spare>,
}

impl Partly {
    pub(crate) fn new(prefix: FramePrefix, home: Arc<Spare>) -> Self {
        let (raw_bytes, whole) = (prefix.raw_bytes(), OnceLock::new());
        Partly { raw_bytes, whole, prefix: Mutex::new(Some(prefix)), home }
    }

    fn bytes(&self, start: usize, end: usize) -> Option<Cow<'_, [u8]>> {
        if let Some(whole) = self.whole.get() {
            return whole.get(start..end).map(Cow::Borrowed);
        }
        let mut held = self.prefix.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prefix) = held.as_mut() {
            let all = end - start > COPIED_PAGES_MAX * PAGE_BYTES;
            prefix.reach(if all { self.raw_bytes } else { end }).ok()?;
            if !prefix.is_whole() {
                return prefix.bytes().get(start..end).map(|bytes| Cow::Owned(bytes.to_vec()));
            }
        }
        if let Some(prefix) = held.take() {
            let (raw, stored) = prefix.into_buffers();
            self.home.put(stored);
            // Only the one who took the prefix comes here, so it is not set yet.
            let _ = self.whole.set(raw);
        }
        drop(held);
        self.whole.get()?.get(start..end).map(Cow::Borrowed)
    }
}

impl Drop for Partly {
    fn drop(&mut self) {
        self.home.one_less_partly();
        let prefix = self.prefix.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let buffers = prefix.map(FramePrefix::into_buffers);
        let whole = self.whole.take().map(|raw| (raw, Vec::new()));
        for (raw, stored) in buffers.into_iter().chain(whole) {
            self.home.put(raw);
            self.home.put(stored);
        }
    }
}
