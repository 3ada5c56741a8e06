//! One question to a source that is under way, and those who wait for its answer.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use crate::source::{Frame, FrameToken, Place, SourceError};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Question {
    Place(u64),
    Frame(FrameToken),
}

/// What the source said.
#[derive(Clone)]
pub(super) enum Answer {
    Place(Place),
    Frame(Arc<dyn Frame>),
}

/// A question under way.
#[derive(Default)]
pub(super) struct Flight {
    answer: Mutex<Option<Result<Answer, SourceError>>>,
    answered: Condvar,
    begun: AtomicBool,
}

impl Flight {
    /// Whether the caller is the one to carry it out. Somebody who waits queues a flight again that read-ahead has queued.
    pub(super) fn begin(&self) -> bool {
        !self.begun.swap(true, Ordering::AcqRel)
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    pub(super) fn end(&self, answer: Result<Answer, SourceError>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.answered.notify_all();
    }

    /// The answer, or `None` if there is none by `deadline`.
    pub(super) fn wait(&self, deadline: Instant) -> Option<Result<Answer, SourceError>> {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(answer) = &*answer {
                return Some(answer.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (answer, _) = self.answered.wait_timeout(answer, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
