//! Fetching a stream's bytes ahead of who needs them, over several requests at once.
//!
//! The first requests go out before anything is known of the stream, not even its size: one round trip instead of
//! two. Whoever waits too long for a piece asks for it a second time himself (a hedge), which cuts the slow tail of
//! object stores.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    backend::Backend,
    error::{Result, StoreError},
};

/// Requests under way at once.
pub(super) const STREAMS: usize = 8;
/// Size of the first pieces.
const FIRST_BYTES: u64 = 1 << 20;
/// Size of later ones.
const LATER_BYTES: u64 = 4 << 20;
/// A piece that takes longer than this is asked for once more.
const HEDGE_AFTER: Duration = Duration::from_millis(100);
/// Tries for one piece before the stream is given up.
const TRIES: u32 = 4;

#[derive(Debug)]
enum Piece {
    Wanted,
    UnderWay { since: Instant, hedged: bool },
    Here(Bytes),
    Failed { tries: u32, error: StoreError },
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

impl Fetcher {
    /// Begins to fetch. The threads end when all is there, or when this is dropped.
    pub(super) fn start(backend: Arc<dyn Backend>, key: String) -> Arc<Self> {
        let pieces = (0..STREAMS).map(|_| Piece::Wanted).collect();
        let state = State { pieces, ..Default::default() };
        let fetcher = Arc::new(Fetcher { backend, key, state: Mutex::new(state), changed: Condvar::new() });
        for _ in 0..STREAMS {
            let weak = Arc::downgrade(&fetcher);
            let spawned = std::thread::Builder::new().name("dm-stream".into()).spawn(move || {
                while let Some(fetcher) = weak.upgrade() {
                    if !fetcher.fetch_next() {
                        return;
                    }
                }
            });
            // With fewer threads it is slower; whoever waits fetches by himself in the end.
            if let Err(error) = spawned {
                tracing::warn!(%error, "a thread for a resume stream could not be had");
            }
        }
        fetcher
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
                let next = state.pieces.iter().position(|p| matches!(p, Piece::Wanted));
                if let Some(piece) = next {
                    state.pieces[piece] = Piece::UnderWay { since: Instant::now(), hedged: false };
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

    fn fetch(&self, piece: usize) {
        let got = self.backend.get(&self.key, Some(range_of(piece)));
        let mut state = self.state();
        let tries = match &state.pieces[piece] {
            Piece::Here(_) => return,
            Piece::Failed { tries, .. } => *tries,
            _ => 0,
        };
        state.pieces[piece] = match got {
            Ok(Some(bytes)) => Piece::Here(bytes),
            Ok(None) => {
                let key = self.key.clone();
                let error = StoreError::Missing { key, referrer: "a resume".into() };
                Piece::Failed { tries: TRIES, error }
            }
            Err(error) => Piece::Failed { tries: tries + 1, error },
        };
        drop(state);
        self.changed.notify_all();
    }

    /// Says how long the stream is, so that what is left of it is fetched.
    pub(super) fn set_total(&self, total: u64) {
        let mut state = self.state();
        state.total = Some(total);
        let pieces = if total == 0 { 0 } else { piece_of(total - 1) + 1 };
        // Speculative pieces past the end are nobody's business any more.
        state.pieces.truncate(pieces.max(1));
        while state.pieces.len() < pieces {
            state.pieces.push(Piece::Wanted);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The bytes in `range`; waits for them. Shorter only if the object is.
    pub(super) fn bytes(&self, range: Range<u64>) -> Result<Bytes> {
        let (first, last) = (piece_of(range.start), piece_of(range.end.max(range.start + 1) - 1));
        let mut out = Vec::new();
        for piece in first..=last {
            let bytes = self.wait(piece)?;
            let at = range_of(piece);
            let from = range.start.saturating_sub(at.start).min(bytes.len() as u64) as usize;
            let to = (range.end - at.start).min(bytes.len() as u64) as usize;
            if first == last {
                return Ok(bytes.slice(from..to.max(from)));
            }
            out.extend_from_slice(&bytes[from..to.max(from)]);
        }
        Ok(out.into())
    }

    fn wait(&self, piece: usize) -> Result<Bytes> {
        let mut state = self.state();
        loop {
            if state.pieces.len() <= piece {
                return Err(StoreError::Bug("a piece past the end of a resume stream was asked for"));
            }
            let ask = match &mut state.pieces[piece] {
                Piece::Here(bytes) => return Ok(bytes.clone()),
                Piece::Wanted => false,
                Piece::Failed { error: StoreError::Missing { key, referrer }, .. } => {
                    return Err(StoreError::Missing { key: key.clone(), referrer: referrer.clone() });
                }
                Piece::Failed { tries, error } => {
                    if *tries >= TRIES {
                        let lost = StoreError::Unavailable {
                            doing: format!("reading {}", self.key),
                            store: self.backend.url().to_owned(),
                            why: error.to_string(),
                        };
                        return Err(lost);
                    }
                    true
                }
                Piece::UnderWay { since, hedged } => {
                    let late = !*hedged && since.elapsed() >= HEDGE_AFTER;
                    *hedged |= late;
                    late
                }
            };
            if ask {
                drop(state);
                self.fetch(piece);
                state = self.state();
                continue;
            }
            let waited = self.changed.wait_timeout(state, HEDGE_AFTER / 4);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the threads end.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }
}
