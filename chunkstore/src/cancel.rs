//! Cancellation: requests whose answer nobody waits for any more end at once, and so do their threads.
//!
//! A token is in force for everything that a thread asks a store for [within](Cancel::within) it, however many layers are
//! between. So what wraps a backend need not know of it.

use std::{
    cell::RefCell,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::future::{Either, select};
use tokio::sync::Notify;

thread_local! {
    static IN_FORCE: RefCell<Option<Cancel>> = const { RefCell::new(None) };
}

/// Says that nobody waits any more. All clones are the same token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<Token>);

#[derive(Debug, Default)]
struct Token {
    cancelled: AtomicBool,
    told: Notify,
}

/// The request was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody waits for the answer any more")]
pub(crate) struct Cancelled;

/// Puts back what was in force before.
struct Restore(Option<Cancel>);

impl Drop for Restore {
    fn drop(&mut self) {
        IN_FORCE.set(self.0.take());
    }
}

impl Cancel {
    /// Ends what is under way within this token, and what is begun within it from now on.
    pub(crate) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        self.0.told.notify_waiters();
    }

    /// Does `work` with this token in force on this thread.
    pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        let _restore = Restore(IN_FORCE.replace(Some(self.clone())));
        work()
    }

    /// Ends once the token is cancelled.
    async fn cancelled(&self) {
        let mut told = pin!(self.0.told.notified());
        // From here on no call is missed.
        told.as_mut().enable();
        if !self.0.cancelled.load(Ordering::SeqCst) {
            told.await;
        }
    }
}

/// What `request` comes to, unless the token in force on this thread is cancelled first.
pub(crate) fn unless_cancelled<T>(
    request: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Cancelled>> {
    // Now, on the thread that asks: a runtime may go on elsewhere.
    let token = IN_FORCE.with_borrow(Clone::clone);
    async move {
        let Some(token) = token else { return Ok(request.await) };
        match select(pin!(token.cancelled()), pin!(request)).await {
            Either::Left(_) => Err(Cancelled),
            Either::Right((answer, _)) => Ok(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future, thread};

    use futures::executor::block_on;

    use super::*;

    fn ask<T>(answer: impl Future<Output = T>) -> Result<T, Cancelled> {
        block_on(unless_cancelled(answer))
    }

    #[test]
    fn a_request_that_never_answers_ends_when_cancelled() {
        let token = Cancel::default();
        let canceller = thread::spawn({
            let token = token.clone();
            move || token.cancel()
        });
        // Whether it is cancelled before or while it waits.
        assert_eq!(token.within(|| ask(future::pending::<()>())), Err(Cancelled));
        canceller.join().unwrap();
        assert_eq!(token.within(|| ask(future::ready(1))), Err(Cancelled));
    }

    #[test]
    fn only_what_is_asked_within_it_is_cancelled() {
        let (outer, inner) = (Cancel::default(), Cancel::default());
        outer.within(|| {
            inner.cancel();
            assert_eq!(inner.within(|| ask(future::ready(1))), Err(Cancelled));
            assert_eq!(ask(future::ready(2)), Ok(2));
            assert_eq!(thread::scope(|s| s.spawn(|| ask(future::ready(3))).join().unwrap()), Ok(3));
        });
        inner.within(|| assert_eq!(outer.within(|| ask(future::ready(4))), Ok(4)));
        assert_eq!(ask(future::ready(5)), Ok(5));
    }
}
