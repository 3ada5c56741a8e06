//! When what happened on the way from a request to the guest's first answer.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A step of a boot or restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// `main` was reached; marked by the program itself, where the timeline began before it.
    ProcessStarted,
    /// `KVM_CREATE_VM` has returned.
    VmCreated,
    /// `KVM_CREATE_VCPU` has returned.
    VcpuCreated,
    /// The vCPU has its state.
    StateSet,
    /// The memory slots are set.
    MemoryAttached,
    /// The vCPU thread is about to enter the guest for the first time.
    FirstEntry,
    /// The guest has left for the first time: it has run at least one instruction.
    FirstExit,
    /// The guest's first right answer.
    FirstAnswer,
    /// The first pass in which the guest found every page right.
    FirstPass,
}

impl Phase {
    /// A short name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ProcessStarted => "process_started",
            Self::VmCreated => "vm_created",
            Self::VcpuCreated => "vcpu_created",
            Self::StateSet => "state_set",
            Self::MemoryAttached => "memory_attached",
            Self::FirstEntry => "first_entry",
            Self::FirstExit => "first_exit",
            Self::FirstAnswer => "first_answer",
            Self::FirstPass => "first_pass",
        }
    }
}

/// Times of phases since a beginning. Clones share their marks.
#[derive(Clone, Debug)]
pub struct Timeline {
    begin: Instant,
    before: Duration,
    marks: Arc<Mutex<Vec<(Phase, Duration)>>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

impl Timeline {
    /// One that begins now.
    pub fn new() -> Self {
        Self::begun(Duration::ZERO)
    }

    /// One that began `before` ago, say when another process decided to start this one.
    pub fn begun(before: Duration) -> Self {
        Self { begin: Instant::now(), before, marks: Arc::default() }
    }

    /// One that began at `monotonic`, a reading of [`monotonic_now`] possibly taken by another process. A
    /// reading in the future counts as now.
    pub fn begun_at(monotonic: Duration) -> Self {
        Self::begun(monotonic_now().saturating_sub(monotonic))
    }

    /// Marks `phase` as reached now; only the first mark of a phase counts.
    pub fn mark(&self, phase: Phase) {
        let at = self.before + self.begin.elapsed();
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.iter().all(|(marked, _)| *marked != phase) {
            marks.push((phase, at));
        }
    }

    /// Time from the beginning to `phase`, if it was reached.
    pub fn at(&self, phase: Phase) -> Option<Duration> {
        self.marks().into_iter().find(|(marked, _)| *marked == phase).map(|(_, at)| at)
    }

    /// All phases reached, in the order in which they were.
    pub fn marks(&self) -> Vec<(Phase, Duration)> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The system's monotonic clock, comparable between processes of one machine.
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = Duration::ZERO;
        for (phase, at) in self.marks() {
            let step = at.saturating_sub(last);
            writeln!(f, "{:>10.3} ms  +{:>8.3}  {}", ms(at), ms(step), phase.name())?;
            last = at;
        }
        Ok(())
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
