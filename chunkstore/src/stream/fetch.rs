//! Fetching a stream's bytes ahead of who needs them, over several requests at once.
//!
//! The first requests go out before anything is known of the stream, not even its size: one round trip instead of
//! two. Their bytes are used as they arrive, whichever request they arrive by. A piece that has brought nothing for
//! too long is asked for again, as [`crate::tail`] has it, which cuts the slow tail of object stores; if that does not
//! help, the stream is given up, and the machine wakes without it.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};

use super::parts::Parts;
use crate::{
    backend::Backend,
    cancel::Cancel,
    error::{Result, StoreError},
    tail::{Ladder, Step},
};

/// Requests that go out before the stream's size is known, and as many again once it is, if there is more.
pub(super) const STREAMS: usize = 8;
/// Size of the first pieces. All of them together are the stream of a 24 to 32 MiB working set: a stream that just
/// does not fit waits for another first byte, and one that is much smaller has asked for pieces in vain.
const FIRST_BYTES: u64 = 1792 << 10;
/// Size of later ones.
const LATER_BYTES: u64 = 4 << 20;
/// Longest wait between two looks at a piece.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Piece {
    ladder: Ladder,
    /// All of it that the object has.
    here: bool,
    /// There is no such object.
    missing: bool,
    error: Option<StoreError>,
    got: Parts,
    /// Ends requests for it that nobody waits for any more.
    cancel: Cancel,
}

impl Piece {
    fn wanted() -> Self {
        let (ladder, got, cancel) = (Ladder::new(Instant::now()), Parts::default(), Cancel::default());
        Piece { ladder, here: false, missing: false, error: None, got, cancel }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

#[derive(Debug, Default)]
struct State {
    pieces: Vec<Piece>,
    /// Bytes of the whole stream, once known.
    total: Option<u64>,
    stopped: bool,
}

/// Pieces of one object, fetched in order.
#[derive(Debug)]
pub(super) struct Fetcher {
    backend: Arc<dyn Backend>,
    key: String,
    state: Mutex<State>,
    changed: Condvar,
}

fn range_of(piece: usize) -> Range<u64> {
    let piece = piece as u64;
    let first = STREAMS as u64;
    if piece < first {
        piece * FIRST_BYTES..(piece + 1) * FIRST_BYTES
    } else {
        let start = first * FIRST_BYTES + (piece - first) * LATER_BYTES;
        start..start + LATER_BYTES
    }
}

fn piece_of(offset: u64) -> usize {
    let first = STREAMS as u64 * FIRST_BYTES;
    if offset < first {
        (offset / FIRST_BYTES) as usize
    } else {
        STREAMS + ((offset - first) / LATER_BYTES) as usize
    }
}

/// The pieces that hold `range`, each with the part of it that it holds, counted from the piece's start.
fn parts_of(range: &Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
    let range = range.clone();
    let pieces = piece_of(range.start)..=piece_of(range.end.max(range.start + 1) - 1);
    pieces.map(move |piece| {
        let at = range_of(piece);
        let (from, to) = (range.start.max(at.start), range.end.min(at.end));
        (piece, from - at.start..to.max(from) - at.start)
    })
}

impl Fetcher {
    /// Begins to fetch. The threads end when all is there, or when this is dropped.
    pub(super) fn start(backend: Arc<dyn Backend>, key: String) -> Arc<Self> {
        let pieces = (0..STREAMS).map(|_| Piece::wanted()).collect();
        let state = State { pieces, ..Default::default() };
        let fetcher = Arc::new(Fetcher { backend, key, state: Mutex::new(state), changed: Condvar::new() });
        (0..STREAMS).for_each(|_| fetcher.spawn_next());
        fetcher
    }

    /// Runs `work` on a thread of its own until it returns `false`.
    fn spawn(self: &Arc<Self>, work: impl Fn(&Fetcher) -> bool + Send + 'static) -> std::io::Result<()> {
        let weak = Arc::downgrade(self);
        let spawned = std::thread::Builder::new().name("dm-stream".into()).spawn(move || {
            while let Some(fetcher) = weak.upgrade() {
                if !work(&fetcher) {
                    return;
                }
            }
        });
        spawned.map(drop)
    }

    /// Starts a thread that fetches what is wanted. With fewer of them it is slower: who waits for a piece that nobody
    /// has asked for asks for it.
    fn spawn_next(self: &Arc<Self>) {
        if let Err(error) = self.spawn(|f| f.fetch_next()) {
            tracing::warn!(%error, "a thread for a resume stream could not be had");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches the next piece nobody fetches yet; `false` if there is nothing more to do.
    fn fetch_next(&self) -> bool {
        let piece = {
            let mut state = self.state();
            loop {
                if state.stopped {
                    return false;
                }
                let next = state.pieces.iter().position(|p| !p.ladder.has_begun());
                if let Some(piece) = next {
                    state.pieces[piece].ladder.ask(Instant::now());
                    break piece;
                }
                if state.total.is_some() {
                    return false;
                }
                // Until the head says how much there is, there may be more. Woken early, a thread only looks again.
                let waited = self.changed.wait_timeout(state, Duration::from_millis(50));
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                if timeout.timed_out() {
                    return true;
                }
                state = guard;
            }
        };
        self.fetch(piece);
        true
    }

    /// Fetches a piece, or what the stream has of it.
    fn fetch(&self, piece: usize) {
        let mut offset = 0;
        let cancel = {
            let state = self.state();
            match state.pieces.get(piece) {
                Some(piece) if !state.stopped => piece.cancel.clone(),
                _ => return,
            }
        };
        let mut take = |part: Bytes| {
            let mut state = self.state();
            let stopped = state.stopped;
            // Speculative pieces past the end are dropped while they are under way.
            let Some(piece) = state.pieces.get_mut(piece) else { return false };
            if piece.got.append(offset, &part) {
                piece.ladder.progress(Instant::now());
                self.changed.notify_all();
            }
            offset += part.len() as u64;
            !stopped && !piece.here
        };
        let got = cancel.within(|| self.backend.get_parts(&self.key, range_of(piece), &mut take));
        let mut state = self.state();
        let Some(piece) = state.pieces.get_mut(piece) else { return };
        match got {
            // A request that was told to stop has brought less than there is, and nobody waits any more.
            Ok(true) => {
                piece.here = true;
                piece.cancel.cancel();
            }
            // Another request has brought it.
            Err(_) if piece.here => {}
            Ok(false) => piece.missing = true,
            Err(error) => {
                if error.is_retryable() {
                    piece.ladder.failed(Instant::now());
                } else {
                    piece.ladder.exhaust();
                }
                piece.error = Some(error);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Says how long the stream is, so that what is left of it is fetched.
    pub(super) fn set_total(self: &Arc<Self>, total: u64) {
        let mut state = self.state();
        state.total = Some(total);
        let pieces = if total == 0 { 0 } else { piece_of(total - 1) + 1 };
        // Speculative pieces past the end are nobody's business any more.
        state.pieces.truncate(pieces.max(1));
        while state.pieces.len() < pieces {
            state.pieces.push(Piece::wanted());
        }
        let waiting = state.pieces.iter().filter(|p| !p.ladder.has_begun()).count();
        drop(state);
        self.changed.notify_all();
        // The first threads are busy with the first pieces; what is left should not wait for those.
        (0..waiting.min(STREAMS)).for_each(|_| self.spawn_next());
    }

    /// The bytes in `range`; waits for them. Shorter only if the object is.
    pub(super) fn bytes(self: &Arc<Self>, range: Range<u64>) -> Result<Bytes> {
        let mut state = self.state();
        loop {
            if has(&state, &range)? {
                return Ok(collect(&state, &range));
            }
            state = self.wait(state, &range)?;
        }
    }

    /// Takes the first of `wanted` whose bytes are there, and its bytes; waits for one. `None` if none is left.
    pub(super) fn take_ready(
        self: &Arc<Self>,
        wanted: &Mutex<Vec<(usize, Range<u64>)>>,
    ) -> Result<Option<(usize, Bytes)>> {
        let mut state = self.state();
        loop {
            let next = {
                let mut wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
                let Some((_, first)) = wanted.first().cloned() else { return Ok(None) };
                for at in 0..wanted.len() {
                    if has(&state, &wanted[at].1)? {
                        let (index, range) = wanted.remove(at);
                        return Ok(Some((index, collect(&state, &range))));
                    }
                }
                first
            };
            state = self.wait(state, &next)?;
        }
    }

    /// Waits for something to arrive, and sees to it that the first missing piece of `range` is asked for.
    fn wait<'s>(
        self: &'s Arc<Self>,
        mut state: MutexGuard<'s, State>,
        range: &Range<u64>,
    ) -> Result<MutexGuard<'s, State>> {
        let mut time = LOOK;
        for (index, part) in parts_of(range) {
            let Some(piece) = state.pieces.get_mut(index) else {
                return Err(StoreError::Bug("a piece past the end of a resume stream was asked for"));
            };
            if piece.got.len() >= part.end || piece.here {
                continue;
            }
            if piece.missing {
                return Err(StoreError::Missing { key: self.key.clone(), referrer: "a resume".into() });
            }
            match piece.ladder.step(Instant::now()) {
                Step::Wait(left) => time = left.min(LOOK),
                Step::Ask => {
                    piece.ladder.ask(Instant::now());
                    let fetch = move |f: &Fetcher| {
                        f.fetch(index);
                        false
                    };
                    if self.spawn(fetch).is_err() {
                        piece.ladder.failed(Instant::now());
                    }
                    time = Duration::ZERO;
                }
                Step::GiveUp => {
                    let why =
                        piece.error.as_ref().map_or_else(|| "it does not answer".into(), ToString::to_string);
                    return Err(StoreError::Unavailable {
                        doing: format!("reading {}", self.key),
                        store: self.backend.url().to_owned(),
                        why,
                    });
                }
            }
            break;
        }
        let waited = self.changed.wait_timeout(state, time);
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Lets the threads end.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.stopped = true;
        state.pieces.iter().for_each(|piece| piece.cancel.cancel());
        drop(state);
        self.changed.notify_all();
    }
}

/// Whether all of `range` is there that the object has.
fn has(state: &State, range: &Range<u64>) -> Result<bool> {
    for (piece, part) in parts_of(range) {
        let Some(piece) = state.pieces.get(piece) else {
            return Err(StoreError::Bug("a piece past the end of a resume stream was asked for"));
        };
        if piece.got.len() < part.end && !piece.here {
            return Ok(false);
        }
    }
    Ok(true)
}

fn collect(state: &State, range: &Range<u64>) -> Bytes {
    let mut parts = Vec::new();
    for (piece, part) in parts_of(range) {
        if let Some(piece) = state.pieces.get(piece) {
            piece.got.for_each(part, |bytes| parts.push(bytes));
        }
    }
    if parts.len() == 1 {
        return parts.swap_remove(0);
    }
    let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| whole.extend_from_slice(part));
    whole.freeze()
}
