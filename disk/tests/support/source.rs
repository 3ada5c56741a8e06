//! A base held in memory.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Condvar, Mutex},
};

use dormouse_disk::source::{
    Content, Effort, Frame, FrameToken, PageSource, Place, SourceError, SourceErrorKind,
};

use super::PAGE;

const FRAME_PAGES: u64 = 8;

/// An image in frames of eight pages; every third frame is zero. Nothing is cached unless it was fetched and `caches`.
pub(crate) struct TestSource {
    bytes: Vec<u8>,
    caches: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    cached: HashSet<u64>,
    held: bool,
    asked: HashMap<u64, u64>,
    failing: Option<SourceErrorKind>,
    failures_left: u64,
}

impl TestSource {
    pub(crate) fn new(size_bytes: usize) -> Arc<Self> {
        Self::with_cache(size_bytes, false)
    }

    pub(crate) fn with_cache(size_bytes: usize, caches: bool) -> Arc<Self> {
        let mut bytes = vec![0; size_bytes.next_multiple_of(PAGE)];
        for (page, content) in bytes.chunks_mut(PAGE).enumerate() {
            if page as u64 / FRAME_PAGES % 3 != 2 {
                for (at, byte) in content.iter_mut().enumerate() {
                    *byte = (page as u8).wrapping_mul(31) ^ (at / 512) as u8 | 1;
                }
            }
        }
        bytes[size_bytes..].fill(0);
        Arc::new(TestSource { bytes, caches, state: Mutex::default(), changed: Condvar::new() })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// From now on fetches do not return.
    pub(crate) fn hold(&self) {
        self.state.lock().unwrap().held = true;
    }

    pub(crate) fn release(&self) {
        self.state.lock().unwrap().held = false;
        self.changed.notify_all();
    }

    /// Fails the next `times` fetches.
    pub(crate) fn fail(&self, kind: SourceErrorKind, times: u64) {
        let mut state = self.state.lock().unwrap();
        (state.failing, state.failures_left) = (Some(kind), times);
    }

    /// Returns once `frame` was asked for.
    pub(crate) fn wait_asked(&self, frame: u64) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| !state.asked.contains_key(&frame)).unwrap());
    }

    /// Fetches of `frame`.
    pub(crate) fn asked(&self, frame: u64) -> u64 {
        self.state.lock().unwrap().asked.get(&frame).copied().unwrap_or(0)
    }

    pub(crate) fn asked_in_all(&self) -> u64 {
        self.state.lock().unwrap().asked.values().sum()
    }
}

impl PageSource for TestSource {
    fn locate(&self, page: u64, _: Effort) -> Result<Option<Place>, SourceError> {
        let (frame, slot) = (page / FRAME_PAGES, page % FRAME_PAGES);
        let content = match frame % 3 {
            2 => Content::Zero,
            _ => Content::Frame { frame: FrameToken(frame), slot: slot as usize },
        };
        Ok(Some(Place { pages: FRAME_PAGES - slot, content }))
    }

    fn frame(&self, frame: FrameToken, effort: Effort) -> Result<Option<Arc<dyn Frame>>, SourceError> {
        let mut state = self.state.lock().unwrap();
        if effort != Effort::Fetch {
            if !state.cached.contains(&frame.0) {
                return Ok(None);
            }
        } else {
            *state.asked.entry(frame.0).or_default() += 1;
            self.changed.notify_all();
            if let Some(kind) = state.failing.filter(|_| state.failures_left > 0) {
                state.failures_left -= 1;
                return Err(SourceError::new(kind, "this fetch fails"));
            }
            state = self.changed.wait_while(state, |state| state.held).unwrap();
            if self.caches {
                state.cached.insert(frame.0);
            }
        }
        let from = (frame.0 * FRAME_PAGES) as usize * PAGE;
        let until = (from + FRAME_PAGES as usize * PAGE).min(self.bytes.len());
        Ok(Some(Arc::new(self.bytes[from..until].to_vec())))
    }
}
