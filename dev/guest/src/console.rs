//! What the guest says, with the time at which it said it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of output and wrong page numbers kept; older ones are forgotten, their counts are not.
const KEPT: usize = 64 * 1024;

/// The guest's serial port and report ports, shared between the thread that runs it and those that watch.
///
/// Output bytes: `B` booted, `R` filled, `A` answer right, `x` answer wrong, `.` all pages right, `X` some
/// page wrong, `M` next generation written, `p` parked, `g` generation follows, `i` up to 256 pages given back and
/// zero, `d` taken again (how many of them were zero follows), `!` no parameters or no balloon found.
#[derive(Clone, Debug, Default)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    text: VecDeque<u8>,
    counts: [u64; 256],
    first: [Option<Instant>; 256],
    input: VecDeque<u8>,
    wrong_pages: VecDeque<u32>,
    wrong_total: u64,
    generation: Option<u32>,
    ended: Option<String>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            text: VecDeque::new(),
            counts: [0; 256],
            first: [None; 256],
            input: VecDeque::new(),
            wrong_pages: VecDeque::new(),
            wrong_total: 0,
            generation: None,
            ended: None,
        }
    }
}

/// Why waiting for the guest to say something was in vain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConsoleError {
    /// Time ran out.
    #[error("the guest did not say {expected:?} (time {count}) within {timeout:?}; it said {said:?}")]
    Silent {
        /// The byte waited for.
        expected: char,
        /// How often it should have been said.
        count: u64,
        /// How long was waited.
        timeout: Duration,
        /// The end of what was said instead.
        said: String,
    },
    /// The guest ended meanwhile.
    #[error("the guest ended before saying {expected:?}: {reason}; it said {said:?}")]
    Ended {
        /// The byte waited for.
        expected: char,
        /// What ended it.
        reason: String,
        /// The end of what was said instead.
        said: String,
    },
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every update leaves the state whole, so a panic elsewhere does not spoil it.
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Times `byte` was said since this console was created.
    pub fn count(&self, byte: u8) -> u64 {
        self.lock().counts[usize::from(byte)]
    }

    /// When `byte` was first said.
    pub fn first(&self, byte: u8) -> Option<Instant> {
        self.lock().first[usize::from(byte)]
    }

    /// The last 64 KiB of what was said.
    pub fn text(&self) -> String {
        self.lock().said(KEPT)
    }

    /// The sum of wrong pages over all passes, as the guest counted them.
    pub fn wrong_total(&self) -> u64 {
        self.lock().wrong_total
    }

    /// The numbers of the pages last found wrong, oldest first, at most 64 Ki of them.
    pub fn wrong_pages(&self) -> Vec<u32> {
        self.lock().wrong_pages.iter().copied().collect()
    }

    /// The generation the last full pass found, if there was a pass.
    pub fn generation(&self) -> Option<u32> {
        self.lock().generation
    }

    /// Why the guest ended, if it did.
    pub fn ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }

    /// Waits until `byte` has been said `count` times in all.
    ///
    /// # Errors
    /// [`ConsoleError`] if the time runs out or the guest ends first.
    pub fn wait_for(&self, byte: u8, count: u64, timeout: Duration) -> Result<(), ConsoleError> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.lock();
        while inner.counts[usize::from(byte)] < count {
            let expected = char::from(byte);
            if let Some(reason) = inner.ended.clone() {
                return Err(ConsoleError::Ended { expected, reason, said: inner.said(200) });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConsoleError::Silent { expected, count, timeout, said: inner.said(200) });
            }
            let waited = self.shared.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The guest says `byte`.
    pub fn say(&self, byte: u8) {
        let mut inner = self.lock();
        inner.counts[usize::from(byte)] += 1;
        inner.first[usize::from(byte)].get_or_insert_with(Instant::now);
        if inner.text.len() == KEPT {
            inner.text.pop_front();
        }
        inner.text.push_back(byte);
        drop(inner);
        self.shared.changed.notify_all();
    }

    /// A verification ended, with `wrong` pages that were not as they should be.
    pub fn pass_ended(&self, wrong: u32) {
        self.lock().wrong_total += u64::from(wrong);
    }

    /// The guest told its generation.
    pub fn found_generation(&self, generation: u32) {
        self.lock().generation = Some(generation);
    }

    /// The guest found `page` to be wrong.
    pub fn found_wrong(&self, page: u32) {
        let mut inner = self.lock();
        if inner.wrong_pages.len() == KEPT {
            inner.wrong_pages.pop_front();
        }
        inner.wrong_pages.push_back(page);
    }

    /// The guest has ended, for this reason.
    pub fn end(&self, reason: &str) {
        self.lock().ended.get_or_insert_with(|| reason.to_owned());
        self.shared.changed.notify_all();
    }

    /// A byte for the guest to read.
    pub fn push_input(&self, byte: u8) {
        let mut inner = self.lock();
        if inner.input.len() < KEPT {
            inner.input.push_back(byte);
        }
        drop(inner);
        self.shared.changed.notify_all();
    }

    /// Whether there is a byte for the guest to read.
    pub fn has_input(&self) -> bool {
        !self.lock().input.is_empty()
    }

    /// The guest reads a byte.
    pub fn pop_input(&self) -> Option<u8> {
        self.lock().input.pop_front()
    }
}

impl Inner {
    fn said(&self, last: usize) -> String {
        let skip = self.text.len().saturating_sub(last);
        self.text.iter().skip(skip).map(|&b| char::from(b)).collect()
    }
}
