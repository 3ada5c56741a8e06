//! The base of a disk, as its requests read it.

use std::{
    collections::HashMap,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use dormouse_core::PAGE_BYTES;

use super::{
    flight::{Answer, Flight, Question},
    pool::Fetchers,
    read_ahead::ReadAhead,
};
use crate::{
    error::{DiskError, Result},
    source::{Content, Effort, FrameToken, PageSource, Place, SourceError, SourceErrorKind},
};

const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What a disk has asked its base for so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames fetched because somebody waited.
    pub frames_fetched: AtomicU64,
    /// Frames fetched ahead.
    pub frames_ahead: AtomicU64,
    /// Requests that joined a fetch which was under way.
    pub fetches_joined: AtomicU64,
    /// Times that a source was asked again after a passing error.
    pub retries: AtomicU64,
}

/// A source, with those who wait for it.
pub(crate) struct Base {
    source: Arc<dyn PageSource>,
    fetchers: Arc<Fetchers>,
    flights: Mutex<HashMap<Question, Arc<Flight>>>,
    ahead: Mutex<ReadAhead>,
    counters: Counters,
    wait_max: Duration,
    pages: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Base {
    pub(crate) fn new(
        source: Arc<dyn PageSource>,
        fetchers: Arc<Fetchers>,
        wait_max: Duration,
        pages: u64,
    ) -> Self {
        let (flights, ahead, counters) = Default::default();
        Base { source, fetchers, flights, ahead, counters, wait_max, pages }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Reads `wanted`, in page order, into the pages of `into` that have the same numbers counted from `first`. All frames
    /// that are missing are asked for before the first is waited for.
    pub(crate) fn read(self: &Arc<Self>, wanted: &[u64], first: u64, into: &mut [u8]) -> Result<()> {
        let deadline = Instant::now() + self.wait_max;
        let mut pieces = Vec::new();
        let mut wanted = wanted.iter().copied().peekable();
        while let Some(page) = wanted.next() {
            let place = self.place(page, deadline)?;
            let mut pages = 1;
            while pages < place.pages && wanted.next_if_eq(&(page + pages)).is_some() {
                pages += 1;
            }
            let at = (page - first) as usize * PAGE_BYTES;
            let bytes = at..at + pages as usize * PAGE_BYTES;
            match place.content {
                Content::Zero => into[bytes].fill(0),
                Content::Frame { frame, slot } => pieces.push((frame, slot, bytes)),
            }
        }
        let mut flights = HashMap::new();
        for (token, slot, bytes) in &mut pieces {
            match self.guarded(|source| source.frame(*token, Effort::Near)) {
                Ok(Some(frame)) if frame.copy(*slot, &mut into[bytes.clone()]).is_some() => {
                    bytes.end = bytes.start
                }
                _ => {
                    flights.entry(*token).or_insert_with(|| self.start(Question::Frame(*token)));
                }
            }
        }
        for (token, slot, bytes) in pieces.into_iter().filter(|(_, _, bytes)| !bytes.is_empty()) {
            let answer = self.answer(Question::Frame(token), flights.get(&token).cloned(), deadline)?;
            let copied = match answer {
                Answer::Frame(frame) => frame.copy(slot, &mut into[bytes]),
                Answer::Place(_) => None,
            };
            let damaged =
                || SourceError::new(SourceErrorKind::Damaged, "a frame lacks pages that it should hold");
            copied.ok_or_else(|| DiskError::Base(damaged()))?;
        }
        Ok(())
    }

    /// How `page` is held, and how many pages from it on.
    pub(crate) fn place(self: &Arc<Self>, page: u64, deadline: Instant) -> Result<Place> {
        if let Ok(Some(place)) = self.guarded(|source| source.locate(page, Effort::Near)) {
            return Ok(place);
        }
        match self.answer(Question::Place(page), None, deadline)? {
            Answer::Place(place) => Ok(place),
            Answer::Frame(_) => {
                let why =
                    SourceError::new(SourceErrorKind::Damaged, "a frame came where a place was asked for");
                Err(DiskError::Base(why))
            }
        }
    }

    /// By when a request that begins now must have its answer.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.wait_max
    }

    /// Notes that somebody read these pages of the base, and fetches ahead what they will want next.
    pub(crate) fn note_read(self: &Arc<Self>, read: Range<u64>, window_max: u64) {
        let ahead = lock(&self.ahead).note(read, window_max, self.pages);
        if !ahead.is_empty() {
            let base = self.clone();
            self.fetchers.ahead(Box::new(move || base.fetch_ahead(ahead)));
        }
    }

    fn fetch_ahead(self: &Arc<Self>, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            // An error is told to whoever reads the page.
            let Ok(Some(place)) = self.guarded(|source| source.locate(page, Effort::Fetch)) else { return };
            if let Content::Frame { frame, .. } = place.content
                && !matches!(self.guarded(|source| source.frame(frame, Effort::Cached)), Ok(Some(_)))
            {
                let base = self.clone();
                self.fetchers.ahead(Box::new(move || base.start_ahead(frame)));
            }
            page = page.saturating_add(place.pages.max(1));
        }
    }

    /// The answer to a question, asked again after passing errors until `deadline`.
    fn answer(
        self: &Arc<Self>,
        question: Question,
        under_way: Option<Arc<Flight>>,
        deadline: Instant,
    ) -> Result<Answer> {
        let mut flight = under_way.unwrap_or_else(|| self.start(question));
        let (mut backoff, mut damaged, mut last) = (BACKOFF_FIRST, false, None);
        loop {
            let error = match flight.wait(deadline) {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(error)) => error,
                None => return Err(self.unavailable(last)),
            };
            match error.kind {
                SourceErrorKind::Gone => return Err(DiskError::Base(error)),
                SourceErrorKind::Damaged if damaged => return Err(DiskError::Base(error)),
                SourceErrorKind::Damaged => damaged = true,
                SourceErrorKind::Retryable => {
                    last = Some(error);
                    if Instant::now() + backoff >= deadline {
                        return Err(self.unavailable(last));
                    }
                    std::thread::sleep(backoff);
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            flight = self.start(question);
        }
    }

    fn unavailable(&self, last: Option<SourceError>) -> DiskError {
        let last = last.map_or("no answer yet".to_owned(), |error| error.to_string());
        DiskError::Unavailable { waited: self.wait_max, last }
    }

    /// The flight for a question that somebody waits for: one under way, or a new one.
    fn start(self: &Arc<Self>, question: Question) -> Arc<Flight> {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(&question) {
            self.counters.fetches_joined.fetch_add(1, Ordering::Relaxed);
            if flight.has_begun() {
                return flight.clone();
            }
            // It waits in the queue, of read-ahead perhaps, which may be long: it is queued once more.
        }
        let flight = flights.entry(question).or_default().clone();
        drop(flights);
        let (base, carried) = (self.clone(), flight.clone());
        self.fetchers.demand(Box::new(move || base.carry_out(question, &carried, false)));
        flight
    }

    fn start_ahead(&self, frame: FrameToken) {
        let question = Question::Frame(frame);
        let flight = match lock(&self.flights).entry(question) {
            std::collections::hash_map::Entry::Occupied(_) => return,
            std::collections::hash_map::Entry::Vacant(vacant) => vacant.insert(Arc::default()).clone(),
        };
        self.carry_out(question, &flight, true);
    }

    fn carry_out(&self, question: Question, flight: &Arc<Flight>, ahead: bool) {
        if !flight.begin() {
            return;
        }
        let answer = match question {
            Question::Place(page) => self
                .guarded(|source| source.locate(page, Effort::Fetch))
                .map(|place| place.map(Answer::Place)),
            Question::Frame(frame) => {
                let counters = &self.counters;
                let count = if ahead { &counters.frames_ahead } else { &counters.frames_fetched };
                count.fetch_add(1, Ordering::Relaxed);
                self.guarded(|source| source.frame(frame, Effort::Fetch))
                    .map(|frame| frame.map(Answer::Frame))
            }
        };
        let nothing = || SourceError::new(SourceErrorKind::Damaged, "the source had no answer to any effort");
        let answer = answer.and_then(|answer| answer.ok_or_else(nothing));
        lock(&self.flights).remove(&question);
        flight.end(answer);
    }

    fn guarded<T>(
        &self,
        ask: impl FnOnce(&dyn PageSource) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        let panicked = |_| Err(SourceError::new(SourceErrorKind::Damaged, "the source panicked"));
        catch_unwind(AssertUnwindSafe(|| ask(&*self.source))).unwrap_or_else(panicked)
    }
}
