//! What all threads of one restore share. Nothing here is global: a process may run any number of restores.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::counters::Counters;
use crate::error::RestoreError;
use crate::frames::{CellsUnderWay, Frames};
use crate::install::Installer;
use crate::kept::KeptStates;
use crate::plan::{Cell, Plan};
use crate::policy::Policy;
use crate::queue::Queue;
use crate::refusals::Refusals;
use crate::sys::memory::Memory;
use crate::sys::uffd::EventBuffer;
use crate::table::PageTable;
use crate::timeline::Timeline;
use crate::working_set::Recorder;

/// Messages read from the kernel at once.
const EVENT_BATCH: usize = 64;

/// Pages per ioctl where removals may be reported: see [`Gate`].
const GATED_STEP_PAGES: u64 = 64;

/// A fault read from the kernel and not looked at yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: u64,
    pub(crate) at: Instant,
}

pub(crate) struct Core {
    pub(crate) plan: Plan,
    pub(crate) table: PageTable,
    pub(crate) memory: Arc<Memory>,
    pub(crate) installer: Box<dyn Installer>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) policy: Policy,
    pub(crate) gate: Gate,
    pub(crate) events: Mutex<EventBuffer>,
    pub(crate) inbox: Mutex<VecDeque<Fault>>,
    pub(crate) queue: Queue,
    pub(crate) frames: Frames,
    pub(crate) huge_under_way: CellsUnderWay,
    pub(crate) timeline: Timeline,
    pub(crate) recorder: Mutex<Recorder>,
    pub(crate) failures: Mutex<Vec<Arc<RestoreError>>>,
    pub(crate) fill_failure: Mutex<Option<Arc<RestoreError>>>,
    pub(crate) ended: Mutex<Option<Arc<RestoreError>>>,
    pub(crate) kill_called: AtomicBool,
    /// The thread that ends the VM.
    pub(crate) killing: Mutex<Option<JoinHandle<()>>>,
    pub(crate) refusals: Refusals,
    /// Awaited cells whose install was refused, and told. Whoever waits for one is not woken when another way fails too,
    /// or it would fault, fail and be woken without end. As many as threads wait; those that came after all do no harm.
    pub(crate) withheld: Mutex<HashSet<Cell>>,
    /// Of each region, whether all is installed and it is, or is being, unregistered: an install that is refused for that
    /// was not needed.
    let_go: Box<[AtomicBool]>,
    bell: OwnedFd,
    stopping: AtomicBool,
}

impl Core {
    pub(crate) fn new(
        plan: Plan,
        memory: Arc<Memory>,
        installer: Box<dyn Installer>,
        counters: Arc<Counters>,
        policy: Policy,
        kept: Option<KeptStates>,
    ) -> Result<Self, RestoreError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| RestoreError::Start(e.into()))?;
        if kept.is_some() && memory.uffd().may_report_forks() {
            // The descriptor of a child comes by an event, which in a kept file anybody may have written.
            return Err(RestoreError::Policy("a VM whose userfaultfd reports forks cannot be kept"));
        }
        Ok(Core {
            events: Mutex::new(
                kept.as_ref().map_or_else(|| EventBuffer::new(EVENT_BATCH), |k| k.event_buffer()),
            ),
            table: kept.map_or_else(|| PageTable::new(plan.cells()), PageTable::kept),
            gate: Gate(memory.uffd().may_report_removes().then(|| RwLock::new(()))),
            inbox: Mutex::default(),
            queue: Queue::default(),
            frames: Frames::new(policy.decoded_frames),
            huge_under_way: CellsUnderWay::default(),
            timeline: Timeline::new(),
            recorder: Mutex::new(Recorder::new(policy.record_pages, policy.record_window)),
            failures: Mutex::default(),
            fill_failure: Mutex::default(),
            ended: Mutex::default(),
            kill_called: AtomicBool::new(false),
            killing: Mutex::default(),
            refusals: Refusals::default(),
            withheld: Mutex::default(),
            let_go: plan.regions().map(|_| AtomicBool::new(false)).collect(),
            stopping: AtomicBool::new(false),
            plan,
            memory,
            installer,
            counters,
            policy,
            bell,
        })
    }

    /// Marks a region as let go, or as not let go after all.
    pub(crate) fn set_let_go(&self, region: usize, yes: bool) {
        if let Some(let_go) = self.let_go.get(region) {
            let_go.store(yes, Ordering::Release);
        }
    }

    pub(crate) fn is_let_go(&self, region: usize) -> bool {
        self.let_go.get(region).is_some_and(|let_go| let_go.load(Ordering::Acquire))
    }

    /// Pages one ioctl may install.
    pub(crate) fn step_pages(&self) -> u64 {
        let limit = if self.gate.0.is_some() { GATED_STEP_PAGES } else { u64::MAX };
        self.policy.step_pages.clamp(1, limit)
    }

    /// Rouses the fault thread.
    pub(crate) fn ring(&self) {
        // A full counter rings as well.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    pub(crate) fn bell(&self) -> std::os::fd::BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn silence_bell(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0u8; 8]);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Ends all threads of the restore. What it leaves undone is the caller's to answer for.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.queue.stop();
        self.ring();
    }
}

/// Keeps installs and the reading of events apart.
///
/// The kernel lets a removal go ahead once its event is *read*. A thread that has looked at a page's state
/// but not yet entered its install could then put the image's bytes where zeros belong. So installs happen
/// inside the gate, and events are read with the gate closed; installs are short (a quarter MiB) for that.
pub(crate) struct Gate(Option<RwLock<()>>);

impl Gate {
    pub(crate) fn enter(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.0.as_ref().map(|gate| gate.read().unwrap_or_else(PoisonError::into_inner))
    }
    pub(crate) fn close(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.0.as_ref().map(|gate| gate.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Locks `mutex`; what it guards is valid after every single step, so a panic elsewhere does not spoil it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
