//! The connection on which a waking VM asks for pages, answered by a thread of its own.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_wake::SessionRecord;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::counts::{FaultCounts, ImageReport};
use super::on_demand::{OnDemand, ProvideError};
use super::pace::{EASED, Pace};
use super::protocol::Response;
use super::wire::{FaultRequest, Wire, WireError};
use dormouse_vmm_common::VmmProcess;

/// How often it is looked whether the VMM has asked for a page.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Why a VM is not served any more, other than that it has all its memory or is gone.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// It said what makes no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It asked for what cannot be given.
    #[error(transparent)]
    Provide(#[from] ProvideError),
}

/// A VMM that asks for pages. Dropping it does not end that.
#[derive(Debug)]
pub struct FaultServer {
    memory: Arc<OnDemand>,
    connection: UnixStream,
    /// Only for what is remembered of it.
    process: Option<Arc<VmmProcess>>,
    thread: JoinHandle<Result<(), FaultError>>,
}

/// What became of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct OnDemandReport {
    /// What the VMM asked for.
    pub asked: FaultCounts,
    /// What was done for it.
    pub images: Vec<ImageReport>,
    /// Why the VM was ended, if it was ended from here.
    pub killed_because: Option<String>,
    /// What was wrong with its requests, if anything.
    pub error: Option<String>,
    /// What the VM touched first, if that can be told.
    #[serde(skip)]
    pub session: Option<SessionRecord>,
    /// The VMM.
    #[serde(skip)]
    pub process: Option<Arc<VmmProcess>>,
}

impl FaultServer {
    /// Begins to answer on `wire` from `memory`.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(memory: Arc<OnDemand>, wire: Wire) -> io::Result<Self> {
        let connection = wire.stream().try_clone()?;
        let served = memory.clone();
        let thread = Builder::new().name("dm-ch-faults".into()).spawn(move || {
            let done = answer(&served, &wire);
            // Also tells whoever waits in `finish`, and a VMM that would wait for an answer.
            let _ = wire.stream().shutdown(Shutdown::Both);
            done
        })?;
        let process = VmmProcess::of(&connection).ok().map(Arc::new);
        Ok(Self { memory, connection, process, thread })
    }

    /// Waits until the VMM has asked for a page; false if it hangs up before, or has not within `patience`.
    ///
    /// A VMM that was not told to wake its VM on demand never asks. Its guest would run on empty memory, so none
    /// may run before this.
    pub fn wait_asked(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let over = self.thread.is_finished() || Instant::now() >= deadline;
            if self.memory.counts().requests > 0 {
                return true;
            }
            if over {
                return false;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// What the VMM asked for until now.
    pub fn counts(&self) -> FaultCounts {
        self.memory.counts()
    }

    /// Waits until the VMM asks no more, as it has all pages or is gone, and lets go of the memory.
    pub fn finish(self) -> OnDemandReport {
        // Also while a page is waited for that does not come.
        while !hung_up(&self.connection) && !self.thread.is_finished() {}
        let session = self.memory.session();
        self.memory.end();
        let error = match self.thread.join() {
            Ok(Ok(()) | Err(FaultError::Provide(ProvideError::Ended))) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the thread that answered panicked".into()),
        };
        OnDemandReport {
            asked: self.memory.counts(),
            images: self.memory.images(),
            killed_because: self.memory.ended_because(),
            error,
            session,
            process: self.process,
        }
    }
}

fn answer(memory: &OnDemand, wire: &Wire) -> Result<(), FaultError> {
    let (mut pace, begun) = (Pace::default(), Instant::now());
    let mut eased = memory.has_first_pages();
    loop {
        match wire.fault_request()? {
            Some(FaultRequest::Pages(range)) => match memory.provide(range) {
                Ok(touched) => {
                    let since = begun.elapsed();
                    if let Some(rest) = pace.rest(touched, since).filter(|_| eased) {
                        std::thread::sleep(rest);
                    } else if eased && since >= EASED {
                        memory.prefetch();
                        eased = false;
                    }
                    wire.respond(Response::Ok)?;
                }
                Err(ProvideError::Ended) => return Err(ProvideError::Ended.into()),
                Err(error) => {
                    // On this the VMM ends.
                    let _ = wire.respond(Response::Error);
                    return Err(error.into());
                }
            },
            Some(FaultRequest::Abandon) => return Ok(wire.respond(Response::Ok)?),
            None => return Ok(()),
        }
    }
}

/// Whether the peer has closed `connection`, or either side has shut it down; waits a second for that.
fn hung_up(connection: &UnixStream) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    // If it cannot be polled, the thread's end tells.
    rustix::event::poll(&mut fds, Some(&second)).is_ok_and(|ready| ready > 0)
}
