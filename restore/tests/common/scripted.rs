//! Answers of the kernel that a test cannot bring about, given in its place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_restore::install::{Installer, UffdCopy};
use dormouse_restore::outcome::Outcome;
use dormouse_restore::plan::Span;
use dormouse_restore::{Counters, FailClosed, Memory};

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Copy,
    Zero,
    Poison,
}

type Answer = dyn Fn(Ask, Span) -> Option<Outcome> + Send + Sync;

/// Asks the kernel only where it has no answer itself.
struct Scripted {
    inner: UffdCopy,
    answer: Box<Answer>,
}

impl Installer for Scripted {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        (self.answer)(Ask::Copy, at).unwrap_or_else(|| self.inner.copy(at, bytes))
    }
    fn zero(&self, at: Span) -> Outcome {
        (self.answer)(Ask::Zero, at).unwrap_or_else(|| self.inner.zero(at))
    }
    fn poison(&self, at: Span) -> Outcome {
        (self.answer)(Ask::Poison, at).unwrap_or_else(|| self.inner.poison(at))
    }
    fn wake(&self, at: Span) {
        self.inner.wake(at);
    }
}

/// An installer that gives `answer`'s answers, and the kernel's where that has none.
pub fn scripted(
    answer: impl Fn(Ask, Span) -> Option<Outcome> + Send + Sync + 'static,
) -> impl FnOnce(Arc<Memory>, Arc<Counters>) -> Box<dyn Installer> {
    |memory, counters| Box::new(Scripted { inner: UffdCopy::new(memory, counters), answer: Box::new(answer) })
}

/// A policy's way to end the VM that ends nothing, and how often it was asked to.
pub fn counted_kill() -> (FailClosed, Arc<AtomicU64>) {
    let calls = Arc::new(AtomicU64::new(0));
    let counted = calls.clone();
    let kill = FailClosed::Kill(Arc::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    (kill, calls)
}
