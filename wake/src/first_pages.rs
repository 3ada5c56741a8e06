//! A resume stream decoded ahead of the machine that is to have its pages, or kept decoded for many machines.
//!
//! Decoding begins when the snapshot is opened, so that it is behind the start of the VMM. Once the machine is there,
//! what is decoded is installed in the order in which the stream brings it; what arrives later goes from the decoder's
//! buffer into guest memory without a stop. Meanwhile faults on decoded pages are answered from here
//! ([`FirstPagesSource`]) and not from the store.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{Builder, JoinHandle},
};

use dormouse_chunkstore::{HotRun, Result as StoreResult, ResumeStream, StoreError};
use dormouse_core::{
    page::{PAGE_BYTES, PageCount, PageIndex, Slot},
    stream::StreamPart,
};

use crate::{
    coverage::HeldOut,
    sink::{Sink, Waiting, compose},
};
use dormouse_restore::{
    DecodedFrame, Extent, FrameToken, PageSource, RestoreError, RestoreHandle, SourceError,
};

/// Decoded bytes that wait for a machine that is not there yet, at most. Those kept for many machines do not count.
const AHEAD_BYTES_MAX: usize = 256 << 20;
/// Set in tokens of frames that are pieces of a stream.
const PIECE: u64 = 1 << 63;

/// Threads that decode a stream: one core is left to the machine that wakes meanwhile.
pub fn decode_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().saturating_sub(1)).max(1)
}

/// The first pages of one image, decoded. Clones are the same; decoding ends when the last is gone.
#[derive(Clone, Debug)]
pub struct FirstPages {
    inner: Arc<Inner>,
    _guard: Arc<Guard>,
}

#[derive(Debug)]
struct Guard(Arc<Inner>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.state().cancelled = true;
        self.0.changed.notify_all();
    }
}

#[derive(Debug)]
struct Inner {
    image: u32,
    /// For many machines: the hot tier.
    keep: bool,
    /// What the stream holds of the image, in its order.
    list: Vec<Range<u64>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// In order of arrival; those taken away are gone from `by_first` only.
    queue: VecDeque<Arc<HotRun>>,
    by_first: BTreeMap<u64, Arc<HotRun>>,
    bytes: usize,
    sink: Option<Arc<Sink>>,
    /// Decoding is over, and why it ended early.
    ended: Option<Option<String>>,
    cancelled: bool,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'s>(&'s self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a run from the decoder.
    fn arrived(&self, image: u32, first: PageIndex, bytes: &[u8]) -> StoreResult<()> {
        if image != self.image {
            return Ok(());
        }
        let mut state = self.state();
        loop {
            if state.cancelled {
                return Err(StoreError::Usage("nobody waits for the first pages any more".into()));
            }
            if let Some(sink) = state.sink.clone() {
                drop(state);
                return sink.install(first, bytes).map_err(|why| StoreError::Usage(why.to_string()));
            }
            if self.keep || state.bytes < AHEAD_BYTES_MAX {
                break;
            }
            state = self.wait(state);
        }
        let run = Arc::new(HotRun { image, first, bytes: bytes.to_vec() });
        state.bytes += bytes.len();
        state.by_first.insert(first.0, run.clone());
        state.queue.push_back(run);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn find(&self, page: u64) -> Option<Arc<HotRun>> {
        let state = self.state();
        let (first, run) = state.by_first.range(..=page).next_back()?;
        (page - first < (run.bytes.len() / PAGE_BYTES) as u64).then(|| run.clone())
    }
}

impl FirstPages {
    /// Begins to decode what `stream` brings of `image` (an index into the root's images). With `keep` it stays in
    /// memory for any number of machines; otherwise it is for one, and goes as it is installed.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn decode(stream: Arc<ResumeStream>, image: u32, keep: bool) -> Result<Self, RestoreError> {
        Self::begin(stream, image, keep, true)
    }

    /// [`decode`](Self::decode) for one machine, leaving nothing of the stream on this host: the cold tier.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn decode_cold(stream: Arc<ResumeStream>, image: u32) -> Result<Self, RestoreError> {
        Self::begin(stream, image, false, false)
    }

    fn begin(stream: Arc<ResumeStream>, image: u32, keep: bool, on_disk: bool) -> Result<Self, RestoreError> {
        let list = stream.head().frames.iter().flat_map(|f| match &f.part {
            StreamPart::Pages { image: of, runs } if *of == image => runs.clone(),
            _ => Vec::new(),
        });
        let (state, changed) = (Mutex::default(), Condvar::new());
        let inner = Arc::new(Inner { image, keep, list: list.collect(), state, changed });
        let decoder = inner.clone();
        let run = move || {
            let arrived =
                |image, first, bytes: &[u8]| -> StoreResult<()> { decoder.arrived(image, first, bytes) };
            let done = stream.for_each_run(decode_workers(), &arrived);
            let mut state = decoder.state();
            let why = done.err().filter(|_| !state.cancelled).map(|why| why.to_string());
            if let Some(why) = &why {
                tracing::warn!(%why, "the resume stream ended early; what it did not bring is fetched by faults");
            }
            let whole = why.is_none() && !state.cancelled;
            state.ended = Some(why);
            drop(state);
            decoder.changed.notify_all();
            if whole && on_disk {
                // After all that the machine waits for.
                stream.keep();
            }
        };
        Builder::new().name("dm-first-pages".into()).spawn(run).map_err(RestoreError::Start)?;
        Ok(FirstPages { _guard: Arc::new(Guard(inner.clone())), inner })
    }

    /// What the stream holds of the image, in its order.
    pub fn list(&self) -> &[Range<u64>] {
        &self.inner.list
    }

    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.inner.list.iter().map(|run| run.end - run.start).sum()
    }

    /// Whether it stays in memory for many machines.
    pub fn is_kept(&self) -> bool {
        self.inner.keep
    }

    /// Waits until all of it is decoded and in memory; for those that are kept.
    pub fn wait_decoded(&self) {
        let mut state = self.inner.state();
        while self.inner.keep && state.ended.is_none() {
            state = self.inner.wait(state);
        }
    }

    /// Begins to install them, but for those `source` holds out, on a thread of its own. Faults are answered by others
    /// and wait for none of this.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn install(
        &self,
        handle: &RestoreHandle,
        source: &FirstPagesSource,
    ) -> Result<JoinHandle<()>, RestoreError> {
        let (first, waiting, image) = (self.clone(), source.waiting.clone(), source.image.clone());
        let sink = Arc::new(Sink::new(handle.installer(), self.list(), waiting, image));
        let run = move || first.pour(&sink);
        Builder::new().name("dm-first-fill".into()).spawn(run).map_err(RestoreError::Start)
    }

    fn pour(&self, sink: &Arc<Sink>) {
        let inner = &*self.inner;
        let (mut next, mut failed) = (0, false);
        let mut state = inner.state();
        if !inner.keep {
            state.sink = Some(sink.clone());
            inner.changed.notify_all();
        }
        loop {
            let run = if inner.keep { state.queue.get(next).cloned() } else { state.queue.pop_front() };
            let Some(run) = run else {
                if state.ended.is_some() || state.cancelled {
                    break;
                }
                state = inner.wait(state);
                continue;
            };
            next += 1;
            drop(state);
            let installed = sink.install(run.first, &run.bytes);
            state = inner.state();
            if let Err(why) = installed {
                // The machine is gone, or its memory is not what it was: faults will tell.
                tracing::debug!(%why, "first pages are not installed any further");
                state.cancelled |= !inner.keep;
                failed = true;
                break;
            }
            if !inner.keep {
                state.bytes -= run.bytes.len();
                state.by_first.remove(&run.first.0);
            }
        }
        failed |= state.cancelled;
        let ended = state.ended == Some(None);
        drop(state);
        if !failed && let Err(why) = sink.finish() {
            tracing::debug!(%why, "first pages are not installed any further");
            failed = true;
        }
        let mut state = inner.state();
        let whole = ended && !failed;
        // The sink holds the restore, which holds what faults are answered from, which holds this.
        state.sink = None;
        drop(state);
        inner.changed.notify_all();
        if whole {
            sink.mark("stream ready");
            tracing::info!("the resume stream is in place");
        }
    }
}

/// An image whose first pages are at hand: faults on those need neither the store nor a decoder.
#[derive(Clone)]
pub struct FirstPagesSource {
    image: Arc<dyn PageSource>,
    first: FirstPages,
    waiting: Arc<Waiting>,
}

/// A part of a run.
struct Piece(Arc<HotRun>, Range<usize>);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes.get(self.1.clone()).unwrap_or_default()
    }
}

impl FirstPagesSource {
    /// `image`, with its first pages at hand but for those of `held`, which fault one by one.
    pub fn new(image: Arc<dyn PageSource>, first: FirstPages, held: HeldOut) -> Self {
        FirstPagesSource { image, first, waiting: Arc::new(Waiting::new(held)) }
    }

    /// The piece of the stream that holds `page` and is at hand: a held-out page alone, others with those around them.
    fn piece(&self, page: PageIndex) -> Option<Extent> {
        let alone = self.waiting.held.holds(page);
        if alone && self.waiting.pages().contains_key(&page.0) {
            return extent(page.0, page.0 + 1);
        }
        let Some(run) = self.first.inner.find(page.0) else {
            let run = self.waiting.blocks()?.piece(page.0)?;
            return extent(run.start, run.end);
        };
        let run_end = run.first.0 + (run.bytes.len() / PAGE_BYTES) as u64;
        if alone {
            return extent(page.0, page.0 + 1);
        }
        let holds = |p: &u64| self.waiting.held.holds(PageIndex(*p));
        let from = (run.first.0..page.0).rev().find(holds).map_or(run.first.0, |p| p + 1);
        let to = (page.0..run_end).find(holds).unwrap_or(run_end);
        extent(from, to)
    }

    /// The bytes of a piece if they are at hand.
    fn piece_bytes(&self, first: u64, pages: u64) -> Option<DecodedFrame> {
        if pages == 1
            && let Some(bytes) = self.waiting.pages().get(&first)
        {
            return Some(DecodedFrame::new(bytes.clone()));
        }
        let Some(run) = self.first.inner.find(first) else {
            return self.waiting.blocks()?.bytes(first, pages).map(DecodedFrame::from);
        };
        let from = (first - run.first.0) as usize * PAGE_BYTES;
        let range = from..from + pages as usize * PAGE_BYTES;
        (range.end <= run.bytes.len()).then(|| DecodedFrame::new(Arc::new(Piece(run, range))))
    }
}

fn extent(from: u64, to: u64) -> Option<Extent> {
    let token = FrameToken(PIECE | (to - from) << 32 | from);
    Some(Extent::frame(PageIndex(from), to - from, token, Slot::new(0)?))
}

/// The pages of a piece, from its token.
fn piece_of(token: FrameToken) -> Option<(u64, u64)> {
    (token.0 & PIECE != 0).then_some((token.0 & u64::from(u32::MAX), (token.0 & !PIECE) >> 32))
}

impl PageSource for FirstPagesSource {
    fn page_count(&self) -> PageCount {
        self.image.page_count()
    }

    fn locate(&self, page: PageIndex) -> Result<Extent, SourceError> {
        self.piece(page).map_or_else(|| self.image.locate(page), Ok)
    }

    fn fetch(&self, frame: FrameToken) -> Result<DecodedFrame, SourceError> {
        let Some((first, pages)) = piece_of(frame) else { return self.image.fetch(frame) };
        let composed = || compose(&*self.image, first, pages).map(DecodedFrame::from);
        self.piece_bytes(first, pages).map_or_else(composed, Ok)
    }

    fn try_locate(&self, page: PageIndex) -> Option<Extent> {
        self.piece(page).or_else(|| self.image.try_locate(page))
    }

    fn try_fetch(&self, frame: FrameToken) -> Option<DecodedFrame> {
        let Some((first, pages)) = piece_of(frame) else { return self.image.try_fetch(frame) };
        self.piece_bytes(first, pages)
    }

    fn fetch_at_hand(&self, frame: FrameToken) -> Option<DecodedFrame> {
        let Some((first, pages)) = piece_of(frame) else { return self.image.fetch_at_hand(frame) };
        self.piece_bytes(first, pages)
    }

    fn runs_of(&self, frame: FrameToken) -> Option<Vec<Extent>> {
        piece_of(frame).map_or_else(|| self.image.runs_of(frame), |_| None)
    }
}

impl std::fmt::Debug for FirstPagesSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FirstPagesSource").field("held", &self.waiting.held).finish_non_exhaustive()
    }
}
