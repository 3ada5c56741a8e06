//! Threads that may block in a source.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// Read-ahead jobs that may wait; more are dropped.
const AHEAD_QUEUE_MAX: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that fetch for any number of disks. What somebody waits for comes before read-ahead, which never takes more
/// than half of the threads.
#[derive(Debug)]
pub struct Fetchers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    wake: Condvar,
    ahead_max: usize,
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    ahead: VecDeque<Job>,
    ahead_running: usize,
    closed: bool,
}

impl std::fmt::Debug for Queues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queues({} waited for, {} ahead)", self.demand.len(), self.ahead.len())
    }
}

impl Fetchers {
    /// Starts `threads` threads, at least two.
    pub fn start(threads: usize) -> io::Result<Self> {
        let threads = threads.max(2);
        let shared =
            Arc::new(Shared { queues: Mutex::default(), wake: Condvar::new(), ahead_max: threads / 2 });
        let fetchers = Fetchers { shared };
        for number in 0..threads {
            let shared = fetchers.shared.clone();
            thread::Builder::new().name(format!("disk-fetch-{number}")).spawn(move || shared.run())?;
        }
        Ok(fetchers)
    }

    pub(super) fn demand(&self, job: Job) {
        self.shared.lock().demand.push_back(job);
        self.shared.wake.notify_one();
    }

    /// Does `job` when nothing else is to do, or never.
    pub(super) fn ahead(&self, job: Job) {
        let mut queues = self.shared.lock();
        if queues.ahead.len() < AHEAD_QUEUE_MAX {
            queues.ahead.push_back(job);
            self.shared.wake.notify_one();
        }
    }
}

/// Threads end once they return from the source: nobody waits for them, as a store that is away may hold them long.
impl Drop for Fetchers {
    fn drop(&mut self) {
        let mut queues = self.shared.lock();
        queues.closed = true;
        queues.ahead.clear();
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut queues = self.lock();
        loop {
            if let Some(job) = queues.demand.pop_front() {
                drop(queues);
                job();
                queues = self.lock();
            } else if queues.closed {
                return;
            } else if queues.ahead_running < self.ahead_max
                && let Some(job) = queues.ahead.pop_front()
            {
                queues.ahead_running += 1;
                drop(queues);
                job();
                queues = self.lock();
                queues.ahead_running -= 1;
                if !queues.ahead.is_empty() {
                    self.wake.notify_one();
                }
            } else {
                queues = self.wake.wait(queues).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
