//! Requests side by side: a bounded number in flight, each result handed to the caller as it comes.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use crossbeam::channel::bounded;

use crate::{error::Result, store::Store};

/// Most requests in flight to a remote store: at 20 ms each they are 3,200 a second, which one prefix of S3 bears.
const REMOTE_IN_FLIGHT: usize = 64;
/// Most reads of a local directory at the same time: enough to keep cores and disk busy.
const LOCAL_IN_FLIGHT: usize = 8;

impl Store {
    /// Does `work` for every item, several at the same time, and hands what came of each to `take`, in no particular
    /// order, on the calling thread. Ends with the first error of either, once what is in flight has come back.
    pub(crate) fn side_by_side<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        work: impl Fn(T) -> Result<R> + Sync,
        take: impl FnMut(R) -> Result<()>,
    ) -> Result<()> {
        let most = if self.backend.is_local() { LOCAL_IN_FLIGHT } else { REMOTE_IN_FLIGHT };
        each(most, items, work, take)
    }
}

/// [`Store::side_by_side`] with no more than `most` at the same time, for work that takes much memory.
pub(crate) fn each<T: Send, R: Send>(
    most: usize,
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
    mut take: impl FnMut(R) -> Result<()>,
) -> Result<()> {
    let workers = most.min(items.len());
    if workers < 2 {
        return items.into_iter().try_for_each(|item| take(work(item)?));
    }
    let items = Mutex::new(items.into_iter());
    thread::scope(|scope| {
        let (out, results) = bounded(workers);
        for _ in 0..workers {
            let (out, items, work) = (out.clone(), &items, &work);
            scope.spawn(move || {
                loop {
                    let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
                    // Nobody listens any more once something failed.
                    if next.is_none_or(|item| out.send(work(item)).is_err()) {
                        return;
                    }
                }
            });
        }
        drop(out);
        results.into_iter().try_for_each(|result| take(result?))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::error::StoreError;

    #[test]
    fn every_item_is_done_once_and_as_many_at_once_as_may_be() {
        // Nobody gets past the barrier alone: with fewer than four at a time this would never end.
        let barrier = Barrier::new(4);
        let mut done = Vec::new();
        each(
            4,
            (0..40).collect(),
            |n| {
                barrier.wait();
                Ok(n)
            },
            |n| {
                done.push(n);
                Ok(())
            },
        )
        .unwrap();
        done.sort_unstable();
        assert!(done.into_iter().eq(0..40));
    }

    #[test]
    fn the_first_error_of_either_side_ends_it() {
        let failing =
            |at: usize| move |n: usize| if n == at { Err(StoreError::Bug("asked for")) } else { Ok(n) };
        for most in [1, 3] {
            let mut taken = 0;
            let count = |_| {
                taken += 1;
                Ok(())
            };
            assert!(each(most, (0..1000).collect(), failing(5), count).is_err());
            assert!(taken < 1000);
            let result = each(most, (0..1000).collect(), failing(2000), |n| failing(7)(n).map(drop));
            assert!(result.is_err());
        }
    }
}
