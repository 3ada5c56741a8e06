//! Starts a restore and holds it.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_core::page::PageIndex;

use crate::bulk::BulkInstaller;
use crate::core::{Core, lock};
use crate::counters::{Counters, CountersSnapshot};
use crate::error::RestoreError;
use crate::install::{Installer, UffdCopy};
use crate::kept::KeptStates;
use crate::plan::{PageRun, PageSize, Plan};
use crate::policy::Policy;
use crate::state::PageState;
use crate::sys::memory::Memory;
use crate::timeline::TimelineReport;
use crate::working_set::WorkingSet;
use crate::{fault_loop, worker};

/// Starts restores.
#[derive(Debug)]
pub struct Restore;

impl Restore {
    /// Starts serving the faults of `memory` from the image of `plan`. The VM may run from now on.
    pub fn start(plan: Plan, memory: Memory, policy: Policy) -> Result<RestoreHandle, RestoreError> {
        Self::start_with(plan, memory, policy, |memory, counters| Box::new(UffdCopy::new(memory, counters)))
    }

    /// [`start`](Self::start) with an installer of the caller's.
    pub fn start_with(
        plan: Plan,
        memory: Memory,
        policy: Policy,
        installer: impl FnOnce(Arc<Memory>, Arc<Counters>) -> Box<dyn Installer>,
    ) -> Result<RestoreHandle, RestoreError> {
        Self::run(Self::prepare(plan, memory, policy, installer, None)?)
    }

    /// [`start`](Self::start) with page states that outlive this process if somebody keeps them, together with the
    /// userfaultfd: see [`KeptStates::create`]. Hand both to the keeper first: from here on the guest is given pages.
    pub fn start_kept(
        plan: Plan,
        memory: Memory,
        states: KeptStates,
        policy: Policy,
    ) -> Result<RestoreHandle, RestoreError> {
        let installer =
            |memory, counters| -> Box<dyn Installer> { Box::new(UffdCopy::new(memory, counters)) };
        Self::run(Self::prepare(plan, memory, policy, installer, Some(states))?)
    }

    /// Goes on where a process that is gone has left off, with the userfaultfd and the [`KeptStates::open`]ed page
    /// states it left. Every vCPU whose fault that process had read, and not answered, faults again.
    ///
    /// Pages touched from here on are recorded as `policy` says; those touched before were that process's to
    /// record.
    pub fn adopt(
        plan: Plan,
        memory: Memory,
        states: KeptStates,
        policy: Policy,
    ) -> Result<RestoreHandle, RestoreError> {
        let installer =
            |memory, counters| -> Box<dyn Installer> { Box::new(UffdCopy::new(memory, counters)) };
        let removed = states.removed();
        let core = Self::prepare(plan, memory, policy, installer, Some(states))?;
        for (start, end) in removed {
            core.remove(start, end, &mut Vec::new());
        }
        let handle = Self::run(core)?;
        for region in handle.core.memory.regions() {
            if let Some(all) = region.pages(0, region.bytes() / region.page_size().bytes()) {
                all.wake();
            }
        }
        Ok(handle)
    }

    fn prepare(
        plan: Plan,
        memory: Memory,
        policy: Policy,
        installer: impl FnOnce(Arc<Memory>, Arc<Counters>) -> Box<dyn Installer>,
        kept: Option<KeptStates>,
    ) -> Result<Arc<Core>, RestoreError> {
        check(&plan, &memory, &policy)?;
        let (memory, counters) = (Arc::new(memory), Arc::new(Counters::default()));
        let installer = installer(memory.clone(), counters.clone());
        Ok(Arc::new(Core::new(plan, memory, installer, counters, policy, kept)?))
    }

    fn run(core: Arc<Core>) -> Result<RestoreHandle, RestoreError> {
        let mut handle = RestoreHandle { core: core.clone(), threads: Vec::new() };
        let mut start = |name: &str, run: fn(&Core)| {
            let core = core.clone();
            Builder::new().name(name.into()).spawn(move || run(&core)).map(|t| handle.threads.push(t))
        };
        let demand =
            (0..core.policy.demand_workers).map(|_| ("dm-demand", (|c| worker::run(c, true)) as fn(&Core)));
        let prefetch = (0..core.policy.prefetch_workers)
            .map(|_| ("dm-prefetch", (|c| worker::run(c, false)) as fn(&Core)));
        // The fault thread last: if a worker cannot be had, no fault has been taken off the descriptor.
        for (name, run) in demand.chain(prefetch).chain([("dm-fault", fault_loop::run as fn(&Core))]) {
            if let Err(error) = start(name, run) {
                core.stop();
                return Err(RestoreError::Start(error));
            }
        }
        Ok(handle)
    }
}

fn check(plan: &Plan, memory: &Memory, policy: &Policy) -> Result<(), RestoreError> {
    let (planned, given) = (plan.regions().len(), memory.regions().len());
    if planned != given {
        return Err(RestoreError::RegionCount { planned, given });
    }
    for (region, (planned, given)) in plan.regions().zip(memory.regions()).enumerate() {
        if planned.pages.bytes() != given.bytes() || planned.page_size != given.page_size() {
            return Err(RestoreError::RegionShape {
                region,
                given_bytes: given.bytes(),
                given_page_bytes: given.page_size().bytes(),
                planned_bytes: planned.pages.bytes(),
                planned_page_bytes: planned.page_size.bytes(),
            });
        }
    }
    if policy.demand_workers == 0 || policy.demand_workers + policy.prefetch_workers > 1024 {
        return Err(RestoreError::Policy("there must be 1 to 1024 workers, one of them for demand"));
    }
    Ok(())
}

/// Says that a VM will not run again: it was killed, or paused for good.
///
/// Closing a userfaultfd hands a running guest zero pages, which is why letting go asks for this.
#[derive(Debug)]
pub struct VmStopped(());

impl VmStopped {
    /// The caller's word that no vCPU of the VM runs or will run.
    pub fn attest() -> Self {
        VmStopped(())
    }
}

/// A [`RestoreHandle::detach`] that could not be done; the restore goes on.
#[derive(Debug, thiserror::Error)]
#[error("cannot detach: {error}")]
pub struct DetachError {
    /// The restore, still serving its VM.
    pub handle: RestoreHandle,
    /// Why.
    pub error: Arc<RestoreError>,
}

/// A running restore.
///
/// Dropping it does not end it: its threads go on serving the VM until that is gone, since letting go of a
/// live VM would hand it zeros. [`detach`](Self::detach) or [`stop`](Self::stop) end it.
pub struct RestoreHandle {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl RestoreHandle {
    /// Installs `runs` in the background, in this order, as far as no fault is waiting. Parts of runs that no
    /// region shows are left out, as are huge pages covered in part.
    pub fn prefetch(&self, runs: impl IntoIterator<Item = PageRun>) {
        let core = &self.core;
        core.queue.prefetch(runs.into_iter().flat_map(|run| core.spans(run)).map(|s| (s, core.page_size(s))));
    }

    /// Installs everything that is left, in the background.
    pub fn fill_all(&self) {
        lock(&self.core.fill_failure).take();
        self.prefetch(self.core.plan.regions().map(|r| PageRun { first: r.image_first, pages: r.pages.0 }));
    }

    /// Waits until nothing is left to install. [`fill_all`](Self::fill_all) comes first, unless the guest is
    /// to touch everything itself. Fails if what was asked for could not be had.
    pub fn wait_filled(&self) -> Result<(), Arc<RestoreError>> {
        loop {
            if self.core.table.all_settled() {
                self.core.timeline.mark("filled");
                return Ok(());
            }
            if let Some(error) = lock(&self.core.ended).clone() {
                return Err(error);
            }
            if self.core.is_stopping() {
                return Err(Arc::new(RestoreError::Stopped));
            }
            if self.core.queue.wait_idle(Duration::from_millis(20)) {
                if let Some(error) = lock(&self.core.fill_failure).clone() {
                    return Err(error);
                }
                // What is left is in the hands of faults or of working-set streams.
                self.core.queue.pause(Duration::from_millis(1));
            }
        }
    }

    /// Installs pages from several threads; see [`BulkInstaller`].
    pub fn installer(&self) -> BulkInstaller {
        BulkInstaller::new(self.core.clone())
    }

    /// [`BulkInstaller::install_run`].
    pub fn install_run(&self, first: PageIndex, bytes: &[u8]) -> Result<u64, RestoreError> {
        self.installer().install_run(first, bytes)
    }

    /// The state of the page (of its region's size) that shows `page`.
    pub fn page_state(&self, page: PageIndex) -> Option<PageState> {
        self.core.plan.cell_of(page).map(|cell| self.core.table.get(cell))
    }

    /// What was done so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.core.counters.snapshot()
    }

    /// The pages touched first, in order, as far as they faulted and the window lasts.
    pub fn record(&self) -> WorkingSet {
        // The lock is given back first: faults are recorded under it.
        let seen = lock(&self.core.recorder).so_far();
        seen.working_set()
    }

    /// Notes that `page` was touched, for whoever learns of touches otherwise than by faults on this memory.
    pub fn note_touch(&self, page: PageIndex) {
        lock(&self.core.recorder).touched(page, Instant::now());
    }

    /// Phases and latencies so far.
    pub fn timeline(&self) -> TimelineReport {
        self.core.timeline.report()
    }

    /// Notes that the VM reached a phase of its own, such as "resumed".
    pub fn mark(&self, phase: &str) {
        self.core.timeline.mark(phase);
    }

    /// Errors for which something was withheld from the VM, the first sixteen.
    pub fn failures(&self) -> Vec<Arc<RestoreError>> {
        lock(&self.core.failures).clone()
    }

    /// Why the restore ended by itself, if it did: [`RestoreError::VmGone`].
    pub fn ended(&self) -> Option<Arc<RestoreError>> {
        lock(&self.core.ended).clone()
    }

    /// A second descriptor of the userfaultfd, for a keeper that outlives this process.
    pub fn try_clone_uffd(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.core.memory.uffd().try_clone_fd()
    }

    /// Lets a running VM go its own way: installs everything that is left, then unregisters its memory, then
    /// ends. In this order the guest can at no time see a page that is neither installed nor faulting.
    pub fn detach(self) -> Result<CountersSnapshot, Box<DetachError>> {
        self.fill_all();
        if let Err(error) = self.wait_filled() {
            return Err(Box::new(DetachError { handle: self, error }));
        }
        for (index, region) in self.core.memory.regions().iter().enumerate() {
            // From here on a fault may be under way that the kernel answers first. Those before stay let go, come what may.
            let before = self.core.is_let_go(index);
            self.core.set_let_go(index, true);
            if let Err(error) = region.unregister()
                && region.is_alive()
            {
                self.core.set_let_go(index, before);
                let error = Arc::new(RestoreError::from(error));
                return Err(Box::new(DetachError { handle: self, error }));
            }
        }
        // A thread that began to give memory back before that waits until its event is read, for ever if need be: the
        // VM may have a userfaultfd of its own, with which this one's end goes unnoticed.
        while self.core.memory.regions().first().is_some_and(|region| region.is_changing()) {
            if let Err(error) = self.core.pump() {
                let error = Arc::new(RestoreError::from(error));
                return Err(Box::new(DetachError { handle: self, error }));
            }
            std::thread::yield_now();
        }
        self.core.timeline.mark("detached");
        Ok(self.end())
    }

    /// Ends the restore of a VM that will not run again.
    pub fn stop(self, _: VmStopped) -> CountersSnapshot {
        self.end()
    }

    fn end(mut self) -> CountersSnapshot {
        self.core.stop();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
        let killing = lock(&self.core.killing).take();
        killing.into_iter().for_each(|thread| drop(thread.join()));
        self.core.counters.snapshot()
    }
}

impl std::fmt::Debug for RestoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RestoreHandle").field("plan", &self.core.plan).finish_non_exhaustive()
    }
}

/// Image pages in one prefetch step; a plan of huge pages takes whole ones.
const _: () = assert!(crate::queue::PREFETCH_STEP_PAGES.is_multiple_of(PageSize::Huge.pages()));
