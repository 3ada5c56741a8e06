//! Guest memory that is filled as it is asked for.
//!
//! Cloud Hypervisor guards the guest's mapping of the memory files with a userfaultfd of its own and asks here
//! for each page the guest misses. Here the same files are mapped once more, for `dormouse-restore` to install into:
//! what is there for this mapping is there for everybody. A page asked for is fetched and installed with its
//! neighbours by the thread that answers; the restore's own workers prefetch meanwhile. The guest sees no page
//! before its VMM has asked for it and was answered.
//!
//! Pages only ever get into the files by userfaultfd, which puts exactly the pages asked for, where there are none,
//! and fails where one is. Writing to the files could do more: where the kernel backs them with huge pages, one
//! small write makes zeros of all absent neighbours. The mapping is never touched either, as a page that the guest
//! gives back at that moment would be missing for good.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};
use dormouse_restore::outcome::Outcome;
use dormouse_restore::state::PageState;
use dormouse_restore::{
    Content, Mapping, Memory, PageRun, PageSize, PageSource, Plan, Policy, Refusals, RegionSpec, Restore,
    RestoreHandle, Retry, SourceError, SourceErrorKind, Uffd, UffdOptions, WORKING_SET_PAGES_MAX,
};
use rustix::fs::SeekFrom;

use super::ahead::Ahead;
use super::counts::{Counts, ImageReport};
use super::filling;
use super::memory::MemorySlot;
pub use super::on_demand_error::{OnDemandError, ProvideError};
use super::protocol::GuestRange;
use super::send::{LaidOut, SendError, memory_file};
use super::touched::Touches;
use dormouse_core::OnFailure;
use dormouse_vmm_common::patient::Patient;

const PAGE: u64 = PAGE_BYTES as u64;
/// Pages of a run of zeros that one request brings in: touching fresh memory tends to go on.
const ZERO_STEP_PAGES: u64 = 64;
/// How long another thread is given to finish an install before it is looked at again.
const INSTALL_WAIT: Duration = Duration::from_micros(20);
/// Tries to put zeros in place before that counts as refused: about 20 s, as for other pages.
const INSTALL_TRIES: u32 = 1000;
/// First touches are recorded for this long.
pub(super) const RECORD_WINDOW: Duration = Duration::from_secs(5);
/// Waits are cut into pieces of this length, to look whether the VM is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How memory is served.
#[derive(Clone, Copy, Debug)]
pub struct WakeOptions {
    /// What is done when a page cannot be had correctly.
    pub on_failure: OnFailure,
    /// How long a fetch that fails is repeated before that.
    pub retry: Retry,
    /// Whether pages nobody asked for yet are installed in the background.
    pub prefetch: bool,
}

impl Default for WakeOptions {
    fn default() -> Self {
        Self { on_failure: OnFailure::default(), retry: Retry::default(), prefetch: true }
    }
}

/// An image being served.
pub(super) struct Served {
    pub(super) file: File,
    source: Arc<dyn PageSource>,
    pub(super) running: Mutex<Option<Running>>,
    pub(super) ended: Mutex<Option<ImageReport>>,
}

pub(super) struct Running {
    pub(super) handle: RestoreHandle,
    /// For pages that the guest gave back; the same memory that the restore has.
    pub(super) memory: Memory,
}

/// A slot being served.
pub(super) struct ServedSlot {
    pub(super) at: MemorySlot,
    pub(super) image: usize,
    region: usize,
}

/// How serving ends.
#[derive(Debug, Default)]
pub(super) struct Failing {
    /// Why the VM was ended rather than given a wrong page.
    pub(super) why: Mutex<Option<String>>,
    /// Nobody is served any more, so that a page which does not come harms nobody.
    pub(super) over: AtomicBool,
}

/// The memory of a VM that wakes.
pub struct OnDemand {
    pub(super) images: Vec<Served>,
    pub(super) names: Vec<String>,
    pub(super) slots: Vec<ServedSlot>,
    pub(super) counts: Counts,
    options: WakeOptions,
    pub(super) failing: Failing,
    refusals: Refusals,
    touches: Mutex<Touches>,
    pub(super) ahead: Ahead,
}

impl OnDemand {
    /// Makes empty memory files for the images of `laid_out`, to be filled from their sources. Prefetching begins.
    ///
    /// # Errors
    /// [`OnDemandError`].
    pub fn start(
        laid_out: &[(LaidOut, Arc<dyn PageSource>)],
        options: WakeOptions,
    ) -> Result<Self, OnDemandError> {
        let memory = Self::empty(laid_out, options)?;
        memory.prefetch();
        Ok(memory)
    }

    /// The same, without prefetching.
    pub(super) fn empty(
        laid_out: &[(LaidOut, Arc<dyn PageSource>)],
        options: WakeOptions,
    ) -> Result<Self, OnDemandError> {
        // Where one of several cannot be started, those before are ended with it.
        let mut all = Self {
            images: Vec::new(),
            names: Vec::new(),
            slots: Vec::new(),
            counts: Counts::default(),
            options,
            failing: Failing::default(),
            refusals: Refusals::default(),
            touches: Mutex::new(Touches::new(std::iter::empty())),
            ahead: Ahead::default(),
        };
        for (image, (laid_out, source)) in laid_out.iter().enumerate() {
            let file = memory_file(&laid_out.image, laid_out.bytes)?;
            filling::begin(&file).map_err(|e| OnDemandError::File(SendError::MemoryFile(e)))?;
            let specs: Vec<RegionSpec> = laid_out.slots.iter().map(region).collect();
            let source: Arc<dyn PageSource> = Arc::new(Patient(source.clone()));
            let plan = Plan::new(source.clone(), &specs)?;
            let map = |slot: &MemorySlot| {
                Ok(Arc::new(Mapping::shared(&file, slot.file_offset, slot.bytes / PAGE)?))
            };
            let mappings: Vec<Arc<Mapping>> =
                laid_out.slots.iter().map(map).collect::<io::Result<_>>().map_err(OnDemandError::Map)?;
            // Nobody touches the mappings, so no privilege is needed.
            let uffd = Uffd::create(UffdOptions { remove_events: false, kernel_faults: false })?;
            let memory = Memory::own(uffd.clone(), &mappings)?;
            // One prefetches, so that a core is left for who is waited for; nobody ever faults on this mapping.
            let policy =
                Policy { retry: options.retry, demand_workers: 1, prefetch_workers: 1, ..recorded() };
            let handle = Restore::start(plan, Memory::own(uffd, &mappings)?, policy)?;
            let served = laid_out.slots.iter().enumerate();
            all.slots.extend(served.map(|(region, at)| ServedSlot { at: *at, image, region }));
            all.images.push(Served {
                file,
                source,
                running: Mutex::new(Some(Running { handle, memory })),
                ended: Mutex::default(),
            });
            all.names.push(laid_out.image.to_string());
        }
        all.touches = Mutex::new(Touches::new(all.slots.iter().map(|s| &s.at)));
        Ok(all)
    }

    /// Begins to install pages that nobody has asked for, if the options say so.
    pub(super) fn prefetch(&self) {
        // What is plugged of pluggable memory is not to be told from here, and mostly it is not.
        let slots = |image: usize| self.slots.iter().filter(move |s| s.image == image && !s.at.pluggable);
        for (number, image) in self.images.iter().enumerate().filter(|_| self.options.prefetch) {
            if let Some(running) = &*lock(&image.running) {
                running.handle.prefetch(slots(number).map(|s| {
                    let spec = region(&s.at);
                    PageRun { first: spec.image_first, pages: spec.pages.0 }
                }));
            }
        }
    }

    /// The memory file of image number `image`.
    pub fn file(&self, image: usize) -> Option<&File> {
        self.images.get(image).map(|i| &i.file)
    }

    /// Puts the pages of `range` into their memory file, if they are not there, waiting for as long as it takes. Whether
    /// the guest is known to wait for them.
    ///
    /// # Errors
    /// [`ProvideError`]: they are not all there.
    pub fn provide(&self, range: GuestRange) -> Result<bool, ProvideError> {
        self.counts.requests.fetch_add(1, Ordering::AcqRel);
        let holds = |s: &&ServedSlot| {
            let end = s.at.address + s.at.bytes;
            s.at.address <= range.address && range.address.saturating_add(range.length) <= end
        };
        let number = self.slots.iter().position(|s| holds(&s)).ok_or(ProvideError::NoSlot(range))?;
        let slot = self.slots.get(number).ok_or(ProvideError::NoSlot(range))?;
        let first = (range.address - slot.at.address) / PAGE;
        let pages = range.length / PAGE;
        self.counts.pages.fetch_add(pages, Ordering::AcqRel);
        let touched = lock(&self.touches).asked(number, first);
        if touched {
            let page = PageIndex(slot.at.file_offset / PAGE + first);
            self.running(slot, |running| running.handle.note_touch(page))?;
        }
        (first..first + pages).try_for_each(|page| self.provide_page(slot, page))?;
        Ok(touched)
    }

    fn provide_page(&self, slot: &ServedSlot, page: u64) -> Result<(), ProvideError> {
        let in_image = PageIndex(slot.at.file_offset / PAGE + page);
        let address = slot.at.address + page * PAGE;
        let mut waited = false;
        loop {
            match self.running(slot, |r| r.handle.page_state(in_image))? {
                Some(PageState::Installed | PageState::Removed) if self.is_there(slot, in_image) => {
                    self.counts.present.fetch_add(u64::from(!waited), Ordering::AcqRel);
                    return Ok(());
                }
                Some(PageState::Installed | PageState::Removed) => {
                    self.counts.given_back.fetch_add(1, Ordering::AcqRel);
                    let zeros = || self.running(slot, |r| zero(r, slot.region, page));
                    if patiently(zeros, || self.pause(LOOK_INTERVAL))? {
                        return Ok(());
                    }
                    return Err(self.withhold(address, "it was given back, and zeros cannot be put there"));
                }
                // Another thread is at it, and it is no long work.
                Some(PageState::Copying) => std::thread::sleep(INSTALL_WAIT),
                Some(PageState::Absent | PageState::Awaited) => {
                    self.fetch_and_install(slot, in_image).map_err(|why| self.withhold(address, &why))?;
                }
                Some(PageState::Poisoned) | None => return Err(self.withhold(address, "it is not shown")),
            }
            waited = true;
        }
    }

    /// Installs `page` and the absent pages of its run around it; why not, if that cannot be.
    fn fetch_and_install(&self, slot: &ServedSlot, page: PageIndex) -> Result<(), String> {
        let Some(served) = self.images.get(slot.image) else { return Err("there is no such image".into()) };
        let installer = self.running(slot, |r| r.handle.installer()).map_err(|e| e.to_string())?;
        let extent = self.retrying(|| served.source.locate(page)).map_err(|e| e.to_string())?;
        let region = region(&slot.at);
        let (mut first, mut end) = (extent.first.0, extent.first.0.saturating_add(extent.pages));
        if !(first..end).contains(&page.0) {
            return Err("the page map answered for other pages".into());
        }
        if extent.content == Content::Zero {
            let block = page.0 / ZERO_STEP_PAGES * ZERO_STEP_PAGES;
            (first, end) = (first.max(block), end.min(block + ZERO_STEP_PAGES));
        }
        // A run may reach into other slots, of which one may be shown elsewhere or not at all.
        first = first.max(region.image_first.0);
        end = end.min(region.image_first.0 + region.pages.0);
        let run = PageRun { first: PageIndex(first), pages: end - first };
        let installed = match extent.content {
            Content::Zero => installer.install_zeros(run),
            Content::Frame { frame, slot } => {
                let decoded = self.retrying(|| {
                    self.counts.fetches.fetch_add(1, Ordering::AcqRel);
                    served.source.fetch(frame)
                });
                let decoded = decoded.map_err(|e| e.to_string())?;
                let bytes = decoded.slots(slot.get() as u64 + (first - extent.first.0), run.pages);
                installer.install_run(run.first, &bytes.ok_or("its frame is shorter than its page map says")?)
            }
        };
        installed.map(drop).map_err(|e| e.to_string())
    }

    /// Tries again as long as the policy says and the VM is there. Damage is looked at twice, in case a cache or the
    /// wire was at fault.
    fn retrying<T>(&self, get: impl Fn() -> Result<T, SourceError>) -> Result<T, SourceError> {
        let (mut retries, mut damaged) = (0, false);
        loop {
            let error = match get() {
                Ok(got) => {
                    self.refusals.over();
                    return Ok(got);
                }
                Err(error) => error,
            };
            match error.kind {
                SourceErrorKind::Retryable if retries < self.options.retry.limit => {
                    if !self.pause(self.options.retry.wait(retries)) {
                        return Err(error);
                    }
                    retries += 1;
                }
                SourceErrorKind::Denied => {
                    self.refusals.tell(&error);
                    // As long as it takes: whoever may lift that may do so at any time.
                    if !self.pause(self.options.retry.wait(retries)) {
                        return Err(error);
                    }
                    retries = retries.saturating_add(1);
                }
                SourceErrorKind::Damaged if !damaged => damaged = true,
                _ => return Err(error),
            }
            self.counts.retries.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Waits; false if nobody is served any more.
    fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while !self.is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(LOOK_INTERVAL));
        }
        false
    }

    fn is_over(&self) -> bool {
        self.failing.over.load(Ordering::Acquire)
    }

    /// Ends the VM, or leaves it waiting, rather than give it a wrong page.
    fn withhold(&self, address: u64, why: &str) -> ProvideError {
        if self.is_over() {
            return ProvideError::Ended;
        }
        let error = ProvideError::Withheld { address, why: why.to_owned() };
        self.counts.withheld.fetch_add(1, Ordering::AcqRel);
        if self.options.on_failure == OnFailure::Hold {
            tracing::error!(%error, "the VM waits: end it");
            while self.pause(LOOK_INTERVAL) {}
            return ProvideError::Ended;
        }
        lock(&self.failing.why).get_or_insert_with(|| error.to_string());
        error
    }

    fn running<T>(&self, slot: &ServedSlot, what: impl FnOnce(&Running) -> T) -> Result<T, ProvideError> {
        let running = self.images.get(slot.image).map(|i| lock(&i.running));
        running.as_ref().and_then(|r| r.as_ref()).map(what).ok_or(ProvideError::Ended)
    }

    /// Whether the file holds the page. A guest that gives memory back makes a hole there.
    fn is_there(&self, slot: &ServedSlot, page: PageIndex) -> bool {
        let at = page.0 * PAGE;
        let found = self.images.get(slot.image).map(|i| rustix::fs::seek(&i.file, SeekFrom::Data(at)));
        matches!(found, Some(Ok(data)) if data == at)
    }
}

impl std::fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnDemand").field("images", &self.names).finish_non_exhaustive()
    }
}

/// Where `slot` lies in its image.
pub(super) fn region(slot: &MemorySlot) -> RegionSpec {
    RegionSpec {
        image_first: PageIndex(slot.file_offset / PAGE),
        pages: PageCount(slot.bytes / PAGE),
        page_size: PageSize::Small,
    }
}

/// Puts zeros where the guest made a hole.
fn zero(running: &Running, region: usize, page: u64) -> Outcome {
    let pages = running.memory.regions().get(region).and_then(|r| r.pages(page, 1));
    pages.map_or(Outcome::Refused(libc::EINVAL), |pages| pages.zero())
}

/// Whether `install` did it, in the end: that the host has no memory just now, or that the memory is changing, passes.
/// False if `pause`, between two tries, says that nobody waits any more.
fn patiently<E>(
    mut install: impl FnMut() -> Result<Outcome, E>,
    mut pause: impl FnMut() -> bool,
) -> Result<bool, E> {
    for _ in 0..INSTALL_TRIES {
        match install()? {
            Outcome::Done | Outcome::AlreadyThere => return Ok(true),
            Outcome::Again | Outcome::NoMemory if pause() => {}
            _ => break,
        }
    }
    Ok(false)
}

/// First touches are recorded as for other machines.
fn recorded() -> Policy {
    Policy { record_pages: WORKING_SET_PAGES_MAX as usize, record_window: RECORD_WINDOW, ..Policy::default() }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "on_demand_tests.rs"]
mod tests;
