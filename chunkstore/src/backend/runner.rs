//! Futures run to their end by whichever thread calls, a thread of another runtime included.
//!
//! A runtime's own `block_on` panics on a thread that drives another runtime. Here the calling thread polls the future
//! itself, inside the store's runtime, whose threads carry connections and timers. It blocks that thread, as every call
//! of a store does, but nothing else: whoever has a runtime that must not stand still calls from a blocking thread.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use tokio::{runtime::Runtime, task::unconstrained};

/// How futures are run: network clients need a runtime, the local file system does not.
#[derive(Debug)]
pub(super) struct Runner(Option<Runtime>);

impl Runner {
    pub(super) const INLINE: Self = Runner(None);

    pub(super) fn on(runtime: Runtime) -> Self {
        Runner(Some(runtime))
    }

    pub(super) fn run<F: Future>(&self, future: F) -> F::Output {
        let _inside = self.0.as_ref().map(Runtime::enter);
        // A task of another runtime has a budget of polls. Once it is spent, everything of that runtime's kind is "not
        // ready" until the task yields, which a thread that waits here never does.
        wait_for(unconstrained(future))
    }
}

impl Drop for Runner {
    /// Waits for nobody: whoever lets go of a store last may be a thread of another runtime, which may not wait. Nothing is
    /// under way then, as every call waits for its end.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Rouses a thread that waits for a future.
struct Rouse {
    thread: Thread,
    /// Kept beside the thread's own token, which another future that the same thread waits for may have used up.
    roused: AtomicBool,
}

impl Wake for Rouse {
    fn wake(self: Arc<Self>) {
        self.roused.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn wait_for<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let rouse = Arc::new(Rouse { thread: thread::current(), roused: AtomicBool::new(false) });
    let waker = Waker::from(rouse.clone());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        while !rouse.roused.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn runner() -> Runner {
        Runner::on(
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap(),
        )
    }

    /// Waits for a timer of the store's runtime, and for a task of it.
    async fn timer_and_task() -> u32 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        tokio::spawn(async { 7 }).await.unwrap()
    }

    #[test]
    fn a_call_ends_on_any_thread_and_its_store_is_dropped_there() {
        let outside = runner();
        assert_eq!(outside.run(timer_and_task()), 7);
        for other in [
            tokio::runtime::Builder::new_current_thread().build().unwrap(),
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap(),
        ] {
            // On the thread that drives it, in a task, and on a thread for what blocks.
            other.block_on(async {
                assert_eq!(runner().run(timer_and_task()), 7);
                let task = tokio::spawn(async { runner().run(timer_and_task()) });
                assert_eq!(task.await.unwrap(), 7);
                let blocking = tokio::task::spawn_blocking(|| runner().run(timer_and_task()));
                assert_eq!(blocking.await.unwrap(), 7);
            });
        }
        assert_eq!(futures::executor::block_on(async { runner().run(timer_and_task()) }), 7);
    }

    #[test]
    fn a_call_within_a_call_uses_up_nobodys_wake() {
        let (outer, inner) = (runner(), runner());
        let both = outer.run(async {
            let (tell, told) = tokio::sync::oneshot::channel();
            tokio::spawn(async move { tell.send(3).unwrap() });
            // Roused for the outer one, most likely, while it waits for the inner one.
            let within = inner.run(timer_and_task()) + Runner::INLINE.run(async { 1 });
            within + told.await.unwrap()
        });
        assert_eq!(both, 11);
    }

    #[test]
    fn a_task_whose_budget_is_spent_still_ends_its_call() {
        let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
        other.block_on(async {
            let task = tokio::spawn(async {
                // Far more polls than a task has between two yields.
                runner().run(async {
                    for _ in 0..10_000 {
                        let (tell, told) = tokio::sync::oneshot::channel();
                        tell.send(()).unwrap();
                        told.await.unwrap();
                    }
                });
            });
            task.await.unwrap();
        });
    }
}
