//! Waking a machine: memory that is filled as it is touched.

use std::io;
use std::time::Duration;

use dormouse_chunkstore::{Resume, Snapshot, StoreError, StreamReport};
use dormouse_core::{PageCount, PageIndex};
use dormouse_restore::install::{UffdCopy, UffdMove};
use dormouse_restore::{
    Memory, PageRun, PageSize, Plan, PlanError, Policy, RegionSpec, Restore, RestoreError, RestoreHandle,
    SourceError, Uffd, UffdError, UffdOptions, VmStopped, WORKING_SET_PAGES_MAX,
};
use dormouse_wake::{Recording, SessionRecord, predict};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::sys::guest_mapping::GuestMapping;
use dormouse_wake::stored_working_set;
use dormouse_wake::{Opened, Sample, Waking};
use dormouse_wake::{Record, Records};

/// First touches are recorded for this long unless the caller says otherwise: what comes later belongs to no working set.
const RECORD_WINDOW: Duration = Duration::from_secs(5);

/// What is brought in before the guest asks for it. Faults always come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing: every page faults.
    Nothing,
    /// The snapshot's resume stream (see [`wake_resume`]) or, without one, the working set stored with it; without
    /// either, everything.
    #[default]
    WorkingSet,
    /// Stream or working set if there is one, and everything else in the order of the image.
    Everything,
    /// These runs of image pages, in this order.
    Runs(Vec<PageRun>),
}

/// How pages get into the guest's memory, which is this process's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Install {
    /// All of them are copied there by the kernel.
    #[default]
    Copy,
    /// Blocks of 2 MiB that the resume stream brings whole are put together beside guest memory and moved there as one;
    /// the guest then runs on pages of 2 MiB. Half of what copying costs where the host has such pages free, more than
    /// copying where it must first make them. All else is copied, as is everything where the kernel cannot do that (before
    /// Linux 6.8, or without transparent huge pages for those who ask).
    Move,
}

/// How a machine is to be woken.
#[derive(Clone, Debug)]
pub struct Wake {
    /// What to bring in first.
    pub prefetch: Prefetch,
    /// Threads, retries, what happens when a page cannot be had, and how long first touches are recorded (5 s, and 65,536
    /// pages at most).
    pub policy: Policy,
    /// Whether the guest can give memory back while it is being restored, by a balloon or by free page
    /// reporting.
    pub balloon: bool,
    /// Whether KVM runs the guest, whose faults are then taken inside the kernel. Without it, less privilege
    /// will do.
    pub kvm: bool,
    /// Whether a few pages, chosen by chance, are left out of the resume stream, so that their faults measure how good it
    /// is. Each costs the guest one fault on a page that is at hand, and with [`Install::Move`] the block around it has to
    /// be copied: only one wake in four does it then, unless the stream was last found to be mostly in vain.
    pub sample: bool,
    /// How pages are installed.
    pub install: Install,
}

impl Default for Wake {
    fn default() -> Self {
        let (prefetch, install) = (Prefetch::default(), Install::default());
        let (record_pages, record_window) = (WORKING_SET_PAGES_MAX as usize, RECORD_WINDOW);
        let policy = Policy { record_pages, record_window, ..Policy::default() };
        Self { prefetch, policy, balloon: false, kvm: true, sample: true, install }
    }
}

/// Why a machine could not be woken. Nothing of it has run.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    /// The snapshot cannot be read, or has no memory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The regions are not those of the machine.
    #[error(
        "the machine has {image} bytes of memory, the regions given {given}: give those it was stored with"
    )]
    Size {
        /// Bytes of the image.
        image: u64,
        /// Bytes of the regions.
        given: u64,
    },
    /// The regions do not make a plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No address space for guest memory.
    #[error("guest memory cannot be mapped: {0}")]
    Map(io::Error),
    /// userfaultfd is missing or not permitted; says how to permit it.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The restore did not start.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Why a resume stream could not be made anew. The machine is not concerned.
#[derive(Debug, thiserror::Error)]
pub enum ImproveError {
    /// A page map cannot be read.
    #[error("what the machine needed first cannot be told: {0}")]
    Session(#[from] SourceError),
    /// The store does not take it, or the pages cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The memory of a woken machine, and the restore that fills it.
///
/// Keep it for as long as the machine runs. If it is dropped before, the machine is served until the process
/// ends.
#[derive(Debug)]
pub struct Woken {
    // Before the mapping: `end` stops it first.
    restore: RestoreHandle,
    opened: Opened,
    recording: Recording,
    /// Whether no background fill hides first touches, and for how long they are recorded.
    complete: bool,
    window: Duration,
    mapping: GuestMapping,
}

impl Woken {
    /// The guest's memory; clone it into the VMM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.mapping.memory()
    }

    /// The running restore: counters, phases, failures.
    pub fn restore(&self) -> &RestoreHandle {
        &self.restore
    }

    /// What the machine needs first as far as it is known now, to be given to [`super::Sleep::working_set`]: what
    /// faulted, then what its resume stream brought, but for what is known not to have been needed.
    ///
    /// # Errors
    /// The store's, should a page map be read anew.
    pub fn working_set(&self) -> Result<Vec<PageRun>, SourceError> {
        let runs = predict(Some(&self.session()?), &[], WORKING_SET_PAGES_MAX);
        Ok(runs.into_iter().map(|r| PageRun { first: PageIndex(r.start), pages: r.end - r.start }).collect())
    }

    /// What was seen of first touches so far, and what that says of the resume stream.
    ///
    /// # Errors
    /// The store's, should a page map be read anew.
    pub fn session(&self) -> Result<SessionRecord, SourceError> {
        self.recording.so_far(&self.restore)
    }

    /// Makes the snapshot's resume stream anew if this session shows that it should be: that it misses much of what a
    /// machine needs first, or is mostly in vain, or that there is none. It serves the next machine that wakes from the
    /// same snapshot, while this one may go on running. `None` if the stream is good, or not to be judged because all of
    /// memory was filled behind the machine's back.
    ///
    /// # Errors
    /// The store's; the stream is then as it was.
    pub fn improve_stream(&self) -> Result<Option<StreamReport>, ImproveError> {
        let session = self.session()?;
        let better = match self.opened.stream() {
            Some(_) => session.coverage.wants_another_set(),
            None => !session.missed.is_empty(),
        };
        if !self.complete || !better {
            return Ok(None);
        }
        let pages = predict(Some(&session), &[], WORKING_SET_PAGES_MAX);
        Ok(Some(self.opened.build_stream(&pages)?))
    }

    /// Ends the restore of a machine that will not run again, and lets go of its memory once the VMM has too. What was
    /// seen of its working set is kept beside the store's caches.
    pub fn end(self, stopped: VmStopped) -> dormouse_restore::CountersSnapshot {
        if let (Some(records), Ok(session)) = (Records::of(self.opened.snapshot().store()), self.session()) {
            records.keep(&Record::new(self.opened.snapshot(), self.window, self.complete, session));
        }
        let Self { restore, mapping, .. } = self;
        let counters = restore.stop(stopped);
        drop(mapping);
        counters
    }
}

/// Makes the memory of `snapshot`'s machine, its pages on demand. The guest may run from now on.
///
/// `regions` are (guest-physical start, bytes) in ascending order, as when the machine was stored. Create the
/// VM itself on another thread meanwhile.
///
/// # Errors
/// [`WakeError`]. Where userfaultfd is not permitted, the message says how to permit it.
pub fn wake(snapshot: &Snapshot, regions: &[(GuestAddress, usize)], wake: Wake) -> Result<Woken, WakeError> {
    wake_resume(Resume { snapshot: snapshot.clone(), stream: None }, regions, wake)
}

/// As [`wake()`], from a snapshot opened by [`dormouse_chunkstore::Store::open_resume`]: if it has a resume
/// stream, that is what comes first.
///
/// # Errors
/// As [`wake()`].
pub fn wake_resume(
    resume: Resume,
    regions: &[(GuestAddress, usize)],
    wake: Wake,
) -> Result<Woken, WakeError> {
    wake_opened(Opened::of(resume)?, regions, wake)
}

/// As [`wake()`], from a snapshot that others may wake from too.
pub(super) fn wake_opened(
    opened: Opened,
    regions: &[(GuestAddress, usize)],
    wake: Wake,
) -> Result<Woken, WakeError> {
    let has = opened.image().page_count().0 * PageSize::Small.bytes();
    let given = regions.iter().map(|(_, bytes)| *bytes as u64).sum();
    if has != given {
        return Err(WakeError::Size { image: has, given });
    }
    let streams = matches!(wake.prefetch, Prefetch::WorkingSet | Prefetch::Everything);
    // Where everything is filled, pages left out come soon after, and say nothing.
    let sample = match wake.install {
        _ if !wake.sample || wake.prefetch == Prefetch::Everything => Sample::None,
        Install::Copy => Sample::Always,
        Install::Move => Sample::Rarely,
    };
    let Waking { source, first, recording } = opened.waking_with(streams, sample, PageSize::Small)?;
    let plan = Plan::new(source, &specs(regions))?;
    let mapping = GuestMapping::new(regions).map_err(WakeError::Map)?;
    let uffd = Uffd::create(UffdOptions { remove_events: wake.balloon, kernel_faults: wake.kvm })?;
    let memory = Memory::own(uffd, &mapping.mappings())?;
    let window = wake.policy.record_window;
    let restore = Restore::start_with(plan, memory, wake.policy, |memory, counters| match wake.install {
        Install::Copy => Box::new(UffdCopy::new(memory, counters)),
        Install::Move => Box::new(UffdMove::new(memory, counters)),
    })?;
    let streamed = first.is_some();
    if let Some((first, source)) = first {
        // It goes on by itself; what it does not bring faults.
        if let Err(error) = first.install(&restore, &source) {
            // Dropped, it would serve memory that nobody has; nothing has run on that.
            restore.stop(VmStopped::attest());
            return Err(error.into());
        }
    }
    let known = || streamed || known_first(&restore, opened.snapshot());
    let fills = match wake.prefetch {
        Prefetch::Nothing => false,
        Prefetch::Runs(runs) => {
            restore.prefetch(runs);
            false
        }
        Prefetch::WorkingSet => !known(),
        Prefetch::Everything => {
            known();
            true
        }
    };
    if fills {
        restore.fill_all();
    }
    Ok(Woken { restore, opened, recording, complete: !fills, window, mapping })
}

/// Begins to bring in the working set stored with the snapshot; whether there is one.
fn known_first(restore: &RestoreHandle, snapshot: &Snapshot) -> bool {
    let runs = stored_working_set(snapshot).unwrap_or_else(|error| {
        tracing::warn!(%error, "no working set");
        None
    });
    let known = runs.is_some();
    restore.prefetch(runs.into_iter().flatten());
    known
}

fn specs(regions: &[(GuestAddress, usize)]) -> Vec<RegionSpec> {
    let mut first = 0;
    let spec = |&(_, bytes): &(GuestAddress, usize)| {
        let pages = bytes as u64 / PageSize::Small.bytes();
        let image_first = PageIndex(first);
        first += pages;
        RegionSpec { image_first, pages: PageCount(pages), page_size: PageSize::Small }
    };
    regions.iter().map(spec).collect()
}
