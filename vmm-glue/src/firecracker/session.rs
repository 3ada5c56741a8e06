//! One VM served: from its handshake until its process is gone.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dormouse_core::page::{PAGE_BYTES, PageCount, PageIndex};
use dormouse_restore::sys::memory::AnnouncedRegion;
use dormouse_restore::{
    CountersSnapshot, DetachError, FailClosed, KeptStatesError, Memory, PageSize, PageSource, Plan,
    PlanError, Policy, RegionSpec, Restore, RestoreError, RestoreHandle, Retry, TimelineReport, UffdError,
    VmStopped,
};

use super::handshake::{Handshake, Peer};
use super::kept_session::{Keeping, Kept};
use super::patient::Patient;
use super::regions::{self, Region};
use super::vmm_process::{VmmProcess, VmmProcessError};
use crate::keeper::{KeepError, VmId};

/// What is done when a page cannot be had correctly.
///
/// Poisoning is not among it: an access that KVM emulates takes a poisoned page for a device, Firecracker
/// answers for a device that is not there, and the guest goes on with bytes that nobody stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Kill Firecracker.
    #[default]
    Kill,
    /// Leave the vCPU waiting, for somebody to look at.
    Hold,
}

/// How a VM is served.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// What is done when a page cannot be had correctly.
    pub on_failure: OnFailure,
    /// How long a fetch that fails is repeated before that.
    pub retry: Retry,
    /// Whether pages nobody asked for yet are installed in the background.
    pub prefetch: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { on_failure: OnFailure::default(), retry: Retry::default(), prefetch: true }
    }
}

/// Why a VM could not be served. It has not got a single page; what becomes of it is the caller's decision,
/// see [`Refusal::process`].
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Its process could not be taken hold of.
    #[error(transparent)]
    Process(#[from] VmmProcessError),
    /// Its memory has another size than the snapshot's.
    #[error(
        "Firecracker has {given_bytes} bytes of memory, the snapshot's memory image has {image_bytes}: \
         load the vmstate of the same snapshot"
    )]
    WrongSize {
        /// What Firecracker's regions have together.
        given_bytes: u64,
        /// What the image has.
        image_bytes: u64,
    },
    /// Its regions do not fit the image.
    #[error("Firecracker's memory regions do not fit the snapshot: {0}")]
    Plan(#[from] PlanError),
    /// Its userfaultfd cannot be used.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The restore could not be started.
    #[error(transparent)]
    Start(#[from] RestoreError),
    /// It could not be kept, and serving it without was not asked for.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The states its pages were left in cannot be used.
    #[error(transparent)]
    States(#[from] KeptStatesError),
}

/// A VM that could not be served, and still waits for its memory.
#[derive(Debug)]
pub struct Refusal {
    /// Why.
    pub error: SessionError,
    /// Who it was.
    pub peer: Peer,
    /// Its process, if it could be taken hold of: it waits for its first page for ever, so end it.
    pub process: Option<VmmProcess>,
}

/// A VM being served. Dropping it does not end that: its memory is served for as long as this process lives.
#[derive(Debug)]
pub struct Session {
    handle: RestoreHandle,
    process: Arc<VmmProcess>,
    killed: Arc<Mutex<Option<String>>>,
    image_bytes: u64,
    kept: Option<Kept>,
}

/// What became of a VM.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SessionReport {
    /// Firecracker's process.
    pub pid: i32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Why it was ended, if it was ended from here.
    pub killed_because: Option<String>,
    /// Errors for which pages were withheld.
    pub failures: Vec<String>,
    /// What was done.
    pub counters: CountersSnapshot,
    /// When.
    pub timeline: TimelineReport,
}

impl Session {
    /// Begins to serve the memory that `handshake` hands over from the image of `source`.
    ///
    /// # Errors
    /// [`Refusal`]. Its userfaultfd is closed; Firecracker's own copy keeps the VM waiting, so that it sees
    /// no zero page.
    pub fn start(
        handshake: Handshake,
        source: Arc<dyn PageSource>,
        options: SessionOptions,
    ) -> Result<Self, Box<Refusal>> {
        Self::begin(handshake, source, options, Keeping::No)
    }

    pub(super) fn begin(
        handshake: Handshake,
        source: Arc<dyn PageSource>,
        options: SessionOptions,
        keeping: Keeping,
    ) -> Result<Self, Box<Refusal>> {
        let peer = handshake.peer;
        let process = match VmmProcess::of(&handshake.connection) {
            Ok(process) => Arc::new(process),
            Err(error) => return Err(Box::new(Refusal { error: error.into(), peer, process: None })),
        };
        let Handshake { uffd, regions, .. } = handshake;
        Self::start_for((uffd, regions), process.clone(), source, options, keeping).map_err(|error| {
            let process = Arc::into_inner(process);
            Box::new(Refusal { error, peer, process })
        })
    }

    pub(super) fn start_for(
        (uffd, regions): (OwnedFd, Vec<Region>),
        process: Arc<VmmProcess>,
        source: Arc<dyn PageSource>,
        options: SessionOptions,
        keeping: Keeping,
    ) -> Result<Self, SessionError> {
        let plan = plan(source, &regions)?;
        let memory = Memory::adopt(uffd, &announced(&regions))?;
        let kept = keeping.states(&plan, &memory, &regions, &process, options)?;
        let killed = Arc::new(Mutex::new(None));
        let fail_closed = fail_closed(options.on_failure, process.clone(), killed.clone());
        let policy = Policy { retry: options.retry, fail_closed, ..Policy::default() };
        let (handle, kept) = match kept {
            None => (Restore::start(plan, memory, policy)?, None),
            Some((states, kept)) if kept.is_new => {
                (Restore::start_kept(plan, memory, states, policy)?, Some(kept))
            }
            Some((states, kept)) => (Restore::adopt(plan, memory, states, policy)?, Some(kept)),
        };
        if options.prefetch {
            handle.fill_all();
        }
        let image_bytes = regions.iter().map(|r| r.bytes).sum();
        Ok(Self { handle, process, killed, image_bytes, kept })
    }

    /// Firecracker's process.
    pub fn process(&self) -> &VmmProcess {
        &self.process
    }

    /// The restore.
    pub fn restore(&self) -> &RestoreHandle {
        &self.handle
    }

    /// The id under which it is kept, if it is.
    pub fn kept_as(&self) -> Option<&VmId> {
        self.kept.as_ref().map(|kept| &kept.id)
    }

    /// What was done so far.
    pub fn report(&self) -> SessionReport {
        SessionReport {
            pid: self.process.peer().pid,
            memory_bytes: self.image_bytes,
            killed_because: self.killed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            failures: self.handle.failures().iter().map(|e| e.to_string()).collect(),
            counters: self.handle.counters(),
            timeline: self.handle.timeline(),
        }
    }

    /// Waits until the VM is gone, by `timeout` at the latest; gives the session back if it is still there.
    ///
    /// The process, and neither the connection nor the restore, tells: a VM whose page could not be installed
    /// is still one that must not lose its userfaultfd.
    ///
    /// # Errors
    /// Its process could not be waited for.
    pub fn wait(self, timeout: Duration) -> std::io::Result<Result<SessionReport, Self>> {
        if !self.process.wait_ended(timeout)? {
            return Ok(Err(self));
        }
        let report = self.report();
        if let Some(kept) = &self.kept {
            kept.release();
        }
        // No vCPU runs without its process.
        let counters = self.handle.stop(VmStopped::attest());
        Ok(Ok(SessionReport { counters, ..report }))
    }
}

/// A [`Session::detach`] that could not be done; the VM is served as before.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StillServed {
    /// The session.
    pub session: Session,
    /// Why.
    pub error: Arc<RestoreError>,
}

impl Session {
    /// Installs all that is left of its memory, and lets the VM go its own way: from here on it needs nobody, and is
    /// not kept any more. The report is as of then.
    ///
    /// # Errors
    /// [`StillServed`]: not all of its memory could be had, or the VM has ended.
    pub fn detach(self) -> Result<SessionReport, Box<StillServed>> {
        let report = self.report();
        let Self { handle, process, killed, image_bytes, kept } = self;
        match handle.detach() {
            Ok(counters) => {
                if let Some(kept) = &kept {
                    kept.release();
                }
                Ok(SessionReport { counters, ..report })
            }
            Err(still) => {
                let DetachError { handle, error } = *still;
                let session = Self { handle, process, killed, image_bytes, kept };
                Err(Box::new(StillServed { session, error }))
            }
        }
    }
}

/// The plan for `regions`, which must show the whole image.
fn plan(source: Arc<dyn PageSource>, regions: &[Region]) -> Result<Plan, SessionError> {
    let image_bytes = source.page_count().0 * PAGE_BYTES as u64;
    let given_bytes = regions.iter().map(|r| r.bytes).fold(0, u64::saturating_add);
    if given_bytes != image_bytes {
        return Err(SessionError::WrongSize { given_bytes, image_bytes });
    }
    let spec = |r: &Region| RegionSpec {
        image_first: PageIndex(r.offset / PAGE_BYTES as u64),
        pages: PageCount(r.bytes / PAGE_BYTES as u64),
        page_size: page_size(r.page_size),
    };
    Ok(Plan::new(Arc::new(Patient(source)), &regions.iter().map(spec).collect::<Vec<_>>())?)
}

fn announced(regions: &[Region]) -> Vec<AnnouncedRegion> {
    let announce =
        |r: &Region| AnnouncedRegion { address: r.host, bytes: r.bytes, page_size: page_size(r.page_size) };
    regions.iter().map(announce).collect()
}

fn page_size(size: regions::PageSize) -> PageSize {
    match size {
        regions::PageSize::Small => PageSize::Small,
        regions::PageSize::Huge => PageSize::Huge,
    }
}

fn fail_closed(
    on_failure: OnFailure,
    process: Arc<VmmProcess>,
    killed: Arc<Mutex<Option<String>>>,
) -> FailClosed {
    FailClosed::Kill(Arc::new(move |why: &RestoreError| {
        let pid = process.peer().pid;
        if on_failure == OnFailure::Hold {
            return tracing::error!(pid, %why, "a vCPU waits for a page that cannot be had: end its VM");
        }
        killed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| why.to_string());
        if let Err(error) = process.kill() {
            tracing::error!(pid, %error, "Firecracker cannot be killed; its vCPUs wait");
        }
    }))
}
