//! Reads that a machine waits for: asked again while they are slow, and given up before long.
//!
//! The client's own patience is a minute, which is right for an import and wrong for a fault. Here a read that brings
//! nothing for a rung of the ladder is asked for once more, and whichever answer comes first is taken; one that fails is
//! asked for again after a pause. After four requests and the last rung it is *unavailable*: whoever waits decides then,
//! which for a fault means a new ladder until the policy of its restore ends that, and for a stream doing without it.
//! Requests that are under way by then are cancelled, and no more than so many are under way in one store: an outage in which
//! a hundred machines wait costs no more threads than a slow hour.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};

use crate::{
    backend::Backend,
    cancel::Cancel,
    error::{Result, StoreError},
};

/// Requests for one thing, at most.
const ASKED_MOST: u32 = 4;
/// How long request number n may bring nothing before the next goes out: the first rung is beyond what 19 in 20 take.
const RUNGS: [Duration; ASKED_MOST as usize] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// The pause after request number n has failed, if no other is under way.
const PAUSES: [Duration; ASKED_MOST as usize - 1] =
    [Duration::from_millis(10), Duration::from_millis(40), Duration::from_millis(160)];

/// Most such requests under way in one store, each on a thread: four for each of 32 that wait.
const UNDER_WAY_MOST: usize = 128;
/// How long a read waits until one of them ends, before it is given up.
const SLOT_PATIENCE: Duration = Duration::from_millis(1500);

/// How many more requests may be under way.
#[derive(Debug)]
pub(crate) struct Slots {
    free: Mutex<usize>,
    given_back: Condvar,
}

/// One request, until it is dropped.
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.given_back.notify_one();
    }
}

impl Default for Slots {
    fn default() -> Self {
        Slots::new(UNDER_WAY_MOST)
    }
}

impl Slots {
    fn new(most: usize) -> Self {
        Slots { free: Mutex::new(most), given_back: Condvar::new() }
    }

    fn take(self: &Arc<Self>, patience: Duration) -> Option<Slot> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.given_back.wait_timeout_while(free, patience, |free| *free == 0);
        let mut free = waited.unwrap_or_else(PoisonError::into_inner).0;
        *free = free.checked_sub(1)?;
        Some(Slot(self.clone()))
    }
}

/// What to do about a read now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing for this long, unless something comes.
    Wait(Duration),
    /// Send another request.
    Ask,
    /// Give it up.
    GiveUp,
}

/// Where a read stands: how often it was asked for, how many requests are under way, and since when nothing came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ladder {
    asked: u32,
    running: u32,
    since: Instant,
}

impl Ladder {
    /// Nothing was asked for yet.
    pub(crate) fn new(now: Instant) -> Self {
        Ladder { asked: 0, running: 0, since: now }
    }

    /// Whether a request was sent.
    pub(crate) fn has_begun(&self) -> bool {
        self.asked > 0
    }

    /// A request is sent.
    pub(crate) fn ask(&mut self, now: Instant) {
        (self.asked, self.running, self.since) = (self.asked + 1, self.running + 1, now);
    }

    /// Bytes have come.
    pub(crate) fn progress(&mut self, now: Instant) {
        self.since = now;
    }

    /// A request has failed.
    pub(crate) fn failed(&mut self, now: Instant) {
        (self.running, self.since) = (self.running.saturating_sub(1), now);
    }

    /// Whether no request is under way.
    fn is_idle(&self) -> bool {
        self.running == 0
    }

    /// Asking again would not help.
    pub(crate) fn exhaust(&mut self) {
        (self.asked, self.running) = (ASKED_MOST, 0);
    }

    pub(crate) fn step(&self, now: Instant) -> Step {
        let nth = |limits: &[Duration]| limits.get(self.asked.saturating_sub(1) as usize).copied();
        let limit = match (self.asked, self.running) {
            (0, _) => None,
            (_, 0) => nth(&PAUSES),
            _ => nth(&RUNGS),
        };
        let quiet = now.saturating_duration_since(self.since);
        match limit.and_then(|limit| limit.checked_sub(quiet)).filter(|left| !left.is_zero()) {
            Some(left) => Step::Wait(left),
            None if self.asked < ASKED_MOST => Step::Ask,
            None => Step::GiveUp,
        }
    }
}

/// What the threads of one read share.
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    ladder: Ladder,
    answer: Option<Result<T>>,
    error: Option<StoreError>,
    over: bool,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that bytes have come; whether more are wanted.
pub(crate) type Progress<'a> = dyn Fn() -> bool + 'a;

/// Does `request` as often as the ladder says, each time on a thread of its own, until one succeeds.
///
/// # Errors
/// That of a request that is not worth repeating, or else [`StoreError::Unavailable`].
pub(crate) fn climb<T: Send + 'static>(
    slots: &Arc<Slots>,
    unavailable: impl FnOnce(String) -> StoreError,
    request: impl Fn(&Progress<'_>) -> Result<T> + Send + Sync + 'static,
) -> Result<T> {
    let (ladder, answer) = (Ladder::new(Instant::now()), None);
    let state = Mutex::new(State { ladder, answer, error: None, over: false });
    let (shared, request) = (Arc::new(Shared { state, changed: Condvar::new() }), Arc::new(request));
    let waited_for = WaitedFor(Cancel::default());
    let mut state = shared.state();
    loop {
        if let Some(answer) = state.answer.take() {
            state.over = true;
            return answer;
        }
        match state.ladder.step(Instant::now()) {
            Step::Ask => {
                // Another request for the same is not worth waiting for; the only one is.
                let patience = if state.ladder.is_idle() { SLOT_PATIENCE } else { Duration::ZERO };
                drop(state);
                let slot = slots.take(patience);
                state = shared.state();
                if state.answer.is_some() {
                    continue;
                }
                state.ladder.ask(Instant::now());
                let Some(slot) = slot else {
                    state.ladder.failed(Instant::now());
                    if state.ladder.is_idle() {
                        state.ladder.exhaust();
                        let (doing, store) = ("reading".into(), "this host".into());
                        let why = "as many requests are under way as may be, and none has ended".into();
                        state.error.get_or_insert(StoreError::Unavailable { doing, store, why });
                    }
                    continue;
                };
                let (shared, request, cancel) = (shared.clone(), request.clone(), waited_for.0.clone());
                let run = move || {
                    cancel.within(|| attempt(&shared, &*request));
                    drop(slot);
                };
                if let Err(error) = std::thread::Builder::new().name("dm-read".into()).spawn(run) {
                    state.ladder.failed(Instant::now());
                    state.error = Some(unavailable_thread(&error));
                }
            }
            Step::Wait(time) => {
                state = shared.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0;
            }
            Step::GiveUp => {
                state.over = true;
                let why =
                    state.error.take().map_or_else(|| "it does not answer".into(), |why| why.to_string());
                return Err(unavailable(why));
            }
        }
    }
}

/// Whoever waits. Without it, requests end.
struct WaitedFor(Cancel);

impl Drop for WaitedFor {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn unavailable_thread(error: &std::io::Error) -> StoreError {
    let why = format!("no thread for it: {error}");
    StoreError::Unavailable { doing: "reading".into(), store: "this host".into(), why }
}

fn attempt<T>(shared: &Shared<T>, request: &(impl Fn(&Progress<'_>) -> Result<T> + ?Sized)) {
    let progress = || {
        let mut state = shared.state();
        state.ladder.progress(Instant::now());
        !state.over && state.answer.is_none()
    };
    let answer = request(&progress);
    let mut state = shared.state();
    match answer {
        Err(error) if error.is_retryable() => {
            state.ladder.failed(Instant::now());
            state.error = Some(error);
        }
        // The first one counts.
        answer => drop(state.answer.get_or_insert(answer)),
    }
    drop(state);
    shared.changed.notify_all();
}

/// The bytes in `range` of an object; `None` if there is no such object.
///
/// # Errors
/// As [`climb`].
pub(crate) fn get(
    backend: &Arc<dyn Backend>,
    slots: &Arc<Slots>,
    key: &str,
    range: Range<u64>,
) -> Result<Option<Bytes>> {
    let store = backend.url().to_owned();
    let unavailable = |why| StoreError::Unavailable { doing: format!("reading {key}"), store, why };
    let (backend, key) = (backend.clone(), key.to_owned());
    climb(slots, unavailable, move |progress| {
        let (mut parts, mut stopped) = (Vec::new(), false);
        let there = backend.get_parts(&key, range.clone(), &mut |part| {
            parts.push(part);
            stopped = !progress();
            !stopped
        })?;
        if stopped {
            // Another request was first, so that nobody looks at this.
            return Ok(None);
        }
        Ok(there.then(|| match &mut parts[..] {
            [one] => std::mem::take(one),
            parts => {
                let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
                parts.iter().for_each(|part| whole.extend_from_slice(part));
                whole.freeze()
            }
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake_s3::{FakeS3, Faults};

    #[test]
    fn requests_that_nobody_waits_for_end() {
        let server = FakeS3::default();
        let backend: Arc<dyn Backend> = server.backend();
        backend.put_new("x", Bytes::from_static(b"x")).unwrap();
        server.misbehave(Faults { silent: Some("x"), ..Default::default() });
        let error = get(&backend, &Arc::default(), "x", 0..1).unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        assert!(server.wait_until_none_is_left_hanging(), "requests go on though the read was given up");
    }

    #[test]
    fn many_reads_at_once_are_few_requests() {
        let slots = Arc::new(Slots::new(2));
        let (begun, open) = (Arc::new(Mutex::new(0)), Arc::new((Mutex::new(false), Condvar::new())));
        let read = || {
            let (begun, open) = (begun.clone(), open.clone());
            let unavailable = |why| StoreError::Unavailable { doing: "x".into(), store: "y".into(), why };
            climb(&slots, unavailable, move |_| {
                *begun.lock().unwrap() += 1;
                drop(open.1.wait_while(open.0.lock().unwrap(), |open| !*open).unwrap());
                Ok(())
            })
        };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..6).map(|_| scope.spawn(read)).collect();
            for reader in readers {
                let given_up = reader.join().unwrap();
                assert!(matches!(given_up, Err(StoreError::Unavailable { .. })), "{given_up:?}");
            }
        });
        assert_eq!(*begun.lock().unwrap(), 2);
        *open.0.lock().unwrap() = true;
        open.1.notify_all();
        // Their room is there again.
        read().unwrap();
    }

    #[test]
    fn a_read_that_is_quiet_is_asked_for_four_times_and_then_given_up() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut ladder = Ladder::new(start);
        let mut asked = Vec::new();
        for ms in 0..10_000 {
            match ladder.step(at(ms)) {
                Step::Ask => {
                    ladder.ask(at(ms));
                    asked.push(ms);
                }
                Step::GiveUp => {
                    assert_eq!((asked, ms), (vec![0, 100, 300, 700], 1500));
                    return;
                }
                Step::Wait(_) => {}
            }
        }
        panic!("it was never given up");
    }

    #[test]
    fn bytes_that_keep_coming_however_slowly_are_waited_for() {
        let start = Instant::now();
        let mut ladder = Ladder::new(start);
        ladder.ask(start);
        for ms in 1..10_000 {
            let now = start + Duration::from_millis(ms);
            if ms % 90 == 0 {
                ladder.progress(now);
            }
            assert!(matches!(ladder.step(now), Step::Wait(_)), "after {ms} ms");
        }
    }

    #[test]
    fn a_read_that_fails_is_asked_for_again_after_longer_and_longer_pauses() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut ladder = Ladder::new(start);
        let mut asked = Vec::new();
        for ms in 0..10_000 {
            match ladder.step(at(ms)) {
                Step::Ask => {
                    ladder.ask(at(ms));
                    ladder.failed(at(ms));
                    asked.push(ms);
                }
                Step::GiveUp => {
                    assert_eq!((asked, ms), (vec![0, 10, 50, 210], 211));
                    return;
                }
                Step::Wait(_) => {}
            }
        }
        panic!("it was never given up");
    }

    #[test]
    fn a_failure_does_not_hurry_a_request_that_is_under_way() {
        let start = Instant::now();
        let mut ladder = Ladder::new(start);
        ladder.ask(start);
        ladder.ask(start);
        ladder.failed(start);
        assert_eq!(ladder.step(start), Step::Wait(RUNGS[1]));
    }
}
