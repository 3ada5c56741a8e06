//! One VM served: from its handshake until its process is gone.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dormouse_core::OnFailure;
use dormouse_keeper::record::KeptOptions;
use dormouse_restore::{
    CountersSnapshot, DetachError, FailClosed, KeptStatesError, Memory, PageSize, PageSource, PlanError,
    Policy, Restore, RestoreError, RestoreHandle, Retry, TimelineReport, UffdError, VmStopped,
    WORKING_SET_PAGES_MAX,
};
use dormouse_wake::PageByPage;

use super::beside::accompany;
use super::earlier::Earlier;
use super::handshake::{Handshake, Peer};
use super::kept_session::{Keeping, Kept};
use super::regions::{self, Region};
use super::shown::{announced, check_size, plan};
use super::tracking::Tracking;
use super::watch::{Measured, Watching};
use dormouse_keeper::{KeepError, VmId};
use dormouse_vmm_common::vmm_process::{VmmProcess, VmmProcessError};
use dormouse_wake::Record;
use dormouse_wake::{Opened, Waking};

/// How long first touches are recorded, unless somebody says otherwise: what comes later is work, and no waking.
pub const RECORD_WINDOW: Duration = Duration::from_secs(5);

/// How a VM is served.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// What is done when a page cannot be had correctly.
    pub on_failure: OnFailure,
    /// How long a fetch that fails is repeated before that.
    pub retry: Retry,
    /// Whether pages nobody asked for yet are installed in the background: first those of the resume stream if there
    /// is one, then, once the working set is recorded, the rest; without a stream, all of them at once.
    pub prefetch: bool,
    /// For how long the pages that are touched first are recorded. Zero for not at all.
    pub record_window: Duration,
    /// Every page faults by itself, and nothing is prefetched: slow, and the record is exact.
    pub page_by_page: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            on_failure: OnFailure::default(),
            retry: Retry::default(),
            prefetch: true,
            record_window: RECORD_WINDOW,
            page_by_page: false,
        }
    }
}

impl std::convert::From<KeptOptions> for SessionOptions {
    fn from(KeptOptions { on_failure, retry, prefetch }: KeptOptions) -> Self {
        Self { on_failure, retry, prefetch, ..Self::default() }
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
    pub process: Option<Arc<VmmProcess>>,
}

/// A VM being served. Dropping it does not end that: its memory is served for as long as this process lives.
#[derive(Debug)]
pub struct Session {
    handle: Arc<RestoreHandle>,
    process: Arc<VmmProcess>,
    killed: Arc<Mutex<Option<String>>>,
    image_bytes: u64,
    kept: Option<Kept>,
    /// Of a VM whose first touches are recorded.
    watch: Option<Watching>,
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
    /// What the stream was worth, if it woke from one and its first touches were recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set: Option<Measured>,
    /// All that was recorded of its first touches.
    #[serde(skip)]
    pub record: Option<Record>,
}

/// What a session is served from.
pub(super) enum From {
    Source(Arc<dyn PageSource>),
    Opened(Box<Opened>, Option<Tracking>),
    /// As another process did, which noted what it saw.
    Another(Box<Opened>, Option<Tracking>),
}

impl Session {
    /// Begins to serve the memory that `handshake` hands over from a snapshot: with its resume stream if it has one
    /// and `options` ask for prefetch, and recording what the VM touches first. That is noted in `tracking`, so that
    /// another process that puts the VM on standby knows it.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn wake(
        handshake: Handshake,
        opened: &Opened,
        options: SessionOptions,
        tracking: Option<Tracking>,
    ) -> Result<Self, Box<Refusal>> {
        Self::begin(handshake, From::Opened(Box::new(opened.clone()), tracking), options, Keeping::No)
    }

    /// Begins to serve the memory that `handshake` hands over from the image of `source`. Nothing is recorded.
    ///
    /// # Errors
    /// [`Refusal`]. Its userfaultfd is closed; Firecracker's own copy keeps the VM waiting, so that it sees
    /// no zero page.
    pub fn start(
        handshake: Handshake,
        source: Arc<dyn PageSource>,
        options: SessionOptions,
    ) -> Result<Self, Box<Refusal>> {
        Self::begin(handshake, From::Source(source), options, Keeping::No)
    }

    pub(super) fn begin(
        handshake: Handshake,
        from: From,
        options: SessionOptions,
        keeping: Keeping,
    ) -> Result<Self, Box<Refusal>> {
        let peer = handshake.peer;
        let process = match VmmProcess::of(&handshake.connection) {
            Ok(process) => Arc::new(process),
            Err(error) => return Err(Box::new(Refusal { error: error.into(), peer, process: None })),
        };
        let Handshake { uffd, regions, .. } = handshake;
        Self::start_for((uffd, regions), process.clone(), from, options, keeping)
            .map_err(|error| Box::new(Refusal { error, peer, process: Some(process) }))
    }

    pub(super) fn start_for(
        (uffd, regions): (OwnedFd, Vec<Region>),
        process: Arc<VmmProcess>,
        from: From,
        options: SessionOptions,
        keeping: Keeping,
    ) -> Result<Self, SessionError> {
        let huge = regions.iter().any(|r| r.page_size == regions::PageSize::Huge);
        let page_size = if huge { PageSize::Huge } else { PageSize::Small };
        let record = !options.record_window.is_zero();
        let mut earlier = None;
        let (mut source, waking) = match from {
            From::Source(source) => (source, None),
            From::Another(opened, tracking) => {
                let source = opened.image();
                earlier = Earlier::of(&process, opened, tracking);
                (source, None)
            }
            From::Opened(opened, tracking) => {
                check_size(&*opened.image(), &regions)?;
                let stream = options.prefetch && !options.page_by_page;
                let Waking { source, first, mut recording } = opened.waking(stream, record, page_size)?;
                if options.page_by_page {
                    recording = recording.page_by_page();
                }
                (source, Some((first, recording, opened, tracking)))
            }
        };
        if options.page_by_page {
            source = Arc::new(PageByPage(source));
        }
        let plan = plan(source, &regions)?;
        let memory = Memory::adopt(uffd, &announced(&regions))?;
        let kept = keeping.states(&plan, &memory, &regions, &process, options)?;
        let killed = Arc::new(Mutex::new(None));
        let fail_closed = fail_closed(options.on_failure, process.clone(), killed.clone());
        if let (Some(earlier), Some((states, _))) = (&mut earlier, &kept)
            && earlier.record.unfilled
        {
            earlier.installed = states.installed(&plan);
        }
        let (record_pages, record_window) = match (&earlier, &kept) {
            (Some(earlier), _) => (earlier.pages, earlier.window),
            // Without the first of them the others say little.
            (None, Some((_, kept))) if !kept.is_new => (0, Duration::ZERO),
            _ => (WORKING_SET_PAGES_MAX, options.record_window),
        };
        let policy = Policy {
            retry: options.retry,
            fail_closed,
            record_pages: record_pages as usize,
            record_window,
            ..Policy::default()
        };
        let (handle, kept) = match kept {
            None => (Restore::start(plan, memory, policy), None),
            Some((states, kept)) if kept.is_new => {
                (Restore::start_kept(plan, memory, states, policy), Some(kept))
            }
            Some((states, kept)) => (Restore::adopt(plan, memory, states, policy), Some(kept)),
        };
        let image_bytes = regions.iter().map(|r| r.bytes).sum();
        let begun = handle.and_then(|handle| {
            let handle = Arc::new(handle);
            match accompany(&handle, &process, waking, earlier, options, page_size) {
                Ok(watch) => Ok((handle, watch)),
                Err(error) => {
                    // Firecracker's own copy of the userfaultfd keeps its guest from zeros, and it is to be ended.
                    alone(handle).stop(VmStopped::attest());
                    Err(error)
                }
            }
        });
        match begun {
            Ok((handle, watch)) => Ok(Self { handle, process, killed, image_bytes, kept, watch }),
            Err(error) => {
                // One that was kept before stays so, for the next who tries.
                if let Some(kept) = kept.filter(|kept| kept.is_new) {
                    kept.release();
                }
                Err(error.into())
            }
        }
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
            working_set: None,
            record: None,
        }
    }

    /// Waits until the VM is gone, by `timeout` at the latest; gives the session back if it is still there.
    ///
    /// The process, and neither the connection nor the restore, tells: a VM whose page could not be installed
    /// is still one that must not lose its userfaultfd.
    ///
    /// # Errors
    /// Its process could not be waited for.
    pub fn wait(mut self, timeout: Duration) -> std::io::Result<Result<SessionReport, Self>> {
        if !self.process.wait_ended(timeout)? {
            return Ok(Err(self));
        }
        let mut report = self.report();
        if let Some(watch) = self.watch.take() {
            report.record = watch.end();
            let streamed = report.record.as_ref().map(|r| r.session.coverage).filter(|c| c.set_pages > 0);
            report.working_set = streamed.map(Measured::from);
        }
        if let Some(kept) = &self.kept {
            kept.release();
        }
        // No vCPU runs without its process.
        report.counters = alone(self.handle).stop(VmStopped::attest());
        Ok(Ok(report))
    }
}

/// The restore itself. Its watch is over, so that others hold it for a moment at most.
fn alone(mut handle: Arc<RestoreHandle>) -> RestoreHandle {
    loop {
        handle = match Arc::try_unwrap(handle) {
            Ok(handle) => return handle,
            Err(shared) => shared,
        };
        std::thread::sleep(Duration::from_millis(1));
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
        let mut report = self.report();
        let Self { handle, process, killed, image_bytes, kept, watch } = self;
        report.record = watch.and_then(Watching::end);
        match alone(handle).detach() {
            Ok(counters) => {
                if let Some(kept) = &kept {
                    kept.release();
                }
                Ok(SessionReport { counters, ..report })
            }
            Err(still) => {
                let DetachError { handle, error } = *still;
                let handle = Arc::new(handle);
                let session = Self { handle, process, killed, image_bytes, kept, watch: None };
                Err(Box::new(StillServed { session, error }))
            }
        }
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
