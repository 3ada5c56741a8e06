//! What is done beside a VM that woke: its first touches are recorded inside a window, and what they tell is used.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_restore::{RestoreError, RestoreHandle, WORKING_SET_PAGES_MAX};
use dormouse_wake::{Coverage, Recording, predict};

use super::tracking::Tracking;
use dormouse_vmm_common::vmm_process::VmmProcess;
use dormouse_wake::Opened;
use dormouse_wake::{Record, Records};

/// Between two notes of what was touched so far: another process may put the VM on standby at any time.
const NOTE_EVERY: Duration = Duration::from_millis(200);

/// What a stream was worth.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Measured {
    /// What was counted.
    #[serde(flatten)]
    pub counted: Coverage,
    /// Share of the first touches that it covered.
    pub coverage: Option<f64>,
    /// Share of it that was brought in vain.
    pub overfetch: Option<f64>,
}

impl From<Coverage> for Measured {
    fn from(counted: Coverage) -> Self {
        Measured { counted, coverage: counted.coverage(), overfetch: counted.overfetch() }
    }
}

/// The recording of one VM.
#[derive(Debug)]
pub(super) struct Watch {
    opened: Opened,
    recording: Recording,
    begun: Instant,
    window: Duration,
    /// How much of a longer window was over before.
    before: Duration,
    handle: Arc<RestoreHandle>,
    process: Arc<VmmProcess>,
    complete: bool,
    unfilled: bool,
    rebuilds: bool,
    fill_after: bool,
    /// Where it is noted for other processes.
    tracking: Option<Tracking>,
    noted_faults: Option<u64>,
}

/// A watch on a thread of its own, which ends with its window.
#[derive(Debug)]
pub(super) struct Watching {
    by: By,
    noted_in: Option<PathBuf>,
}

#[derive(Debug)]
enum By {
    Thread {
        ended: Sender<()>,
        thread: JoinHandle<Option<Record>>,
    },
    /// An earlier process, whose window was over.
    Another(Box<Record>),
}

impl Watching {
    /// What an earlier process has recorded in all of its window: nothing is added to it.
    pub(super) fn over(record: Record, process: &VmmProcess, tracking: &Tracking) -> Self {
        Watching { by: By::Another(Box::new(record)), noted_in: tracking.session_path(process) }
    }

    /// The VM is gone, or goes its own way: what was recorded.
    pub(super) fn end(self) -> Option<Record> {
        let record = match self.by {
            By::Another(record) => Some(*record),
            By::Thread { ended, thread } => {
                drop(ended);
                // A thread that panicked has said so on its own.
                thread.join().ok().flatten()
            }
        };
        if let Some(path) = self.noted_in {
            // It may never have been written.
            let _ = fs::remove_file(path);
        }
        record
    }
}

impl Watch {
    pub(super) fn new(
        opened: Opened,
        recording: Recording,
        window: Duration,
        handle: Arc<RestoreHandle>,
        process: Arc<VmmProcess>,
    ) -> Self {
        Self {
            opened,
            recording,
            begun: Instant::now(),
            window,
            before: Duration::ZERO,
            handle,
            process,
            complete: false,
            unfilled: false,
            rebuilds: false,
            fill_after: false,
            tracking: None,
            noted_faults: None,
        }
    }

    /// How much of the VM's window was over before this one begins, in the hands of another process.
    pub(super) fn begun_before(self, before: Duration) -> Self {
        Self { before, ..self }
    }

    /// Whether no background fill hides first touches.
    pub(super) fn complete(self, complete: bool) -> Self {
        Self { complete, unfilled: complete, ..self }
    }

    /// Whether that is so although not all was seen.
    pub(super) fn unfilled(self, unfilled: bool) -> Self {
        Self { unfilled, ..self }
    }

    /// Whether a better stream is made if one can be.
    pub(super) fn rebuilds(self, rebuilds: bool) -> Self {
        Self { rebuilds, ..self }
    }

    /// Whether the rest of memory is to be filled when the window is over.
    pub(super) fn fill_after(self, fill_after: bool) -> Self {
        Self { fill_after, ..self }
    }

    /// What is recorded is noted there for other processes.
    pub(super) fn track(self, tracking: Option<Tracking>) -> Self {
        Self { tracking, ..self }
    }

    pub(super) fn start(self) -> Result<Watching, RestoreError> {
        let noted_in = self.tracking.as_ref().and_then(|t| t.session_path(&self.process));
        let (sender, ended) = channel();
        let thread = Builder::new().name("dm-watch".into()).spawn(move || self.run(&ended));
        let by = By::Thread { ended: sender, thread: thread.map_err(RestoreError::Start)? };
        Ok(Watching { by, noted_in })
    }

    fn run(mut self, ended: &Receiver<()>) -> Option<Record> {
        loop {
            let left = self.window.saturating_sub(self.begun.elapsed());
            if left.is_zero() {
                break;
            }
            match ended.recv_timeout(left.min(NOTE_EVERY)) {
                Err(RecvTimeoutError::Timeout) => self.note_news(),
                _ => break,
            }
        }
        // If that cannot be told it runs, which costs a little work in vain.
        let runs = !self.process.has_ended().unwrap_or(false);
        let record = self.close(runs);
        if runs && self.fill_after {
            self.handle.fill_all();
        }
        record
    }

    /// Ends the recording. If the VM still `runs`, and a better stream can be made, it is made beside it.
    fn close(&self, runs: bool) -> Option<Record> {
        let record = self.record()?;
        if runs {
            self.note(&record);
        }
        if let Some(records) = Records::of(self.opened.snapshot().store()) {
            records.keep(&record);
        }
        let session = &record.session;
        let better = match self.opened.stream() {
            Some(_) => session.coverage.wants_another_set(),
            None => !session.missed.is_empty(),
        };
        // A record with gaps would make a stream with gaps, and the machine would wait for them next time.
        if runs && self.rebuilds && self.complete && better {
            self.rebuild(&record);
        }
        Some(record)
    }

    /// Makes the snapshot's stream anew, without hurry.
    fn rebuild(&self, record: &Record) {
        let opened = self.opened.clone();
        let pages = predict(Some(&record.session), &[], WORKING_SET_PAGES_MAX);
        let run = move || {
            // This thread only, by its number. Refused, it is merely as fast as others.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10);
            match opened.build_stream(&pages) {
                Ok(report) => tracing::info!(pages = report.pages, "a better resume stream has been stored"),
                Err(why) => tracing::info!(%why, "no better resume stream could be stored"),
            }
        };
        if let Err(error) = Builder::new().name("dm-restream".into()).spawn(run) {
            tracing::info!(%error, "no thread for a better resume stream");
        }
    }

    fn record(&self) -> Option<Record> {
        match self.recording.so_far(&self.handle) {
            Ok(session) => {
                let (so_far, whole) = (self.begun.elapsed().min(self.window), self.before + self.window);
                let record = Record::new(self.opened.snapshot(), whole, self.complete, session);
                Some(record.of_part(self.before + so_far, self.unfilled))
            }
            Err(why) => {
                tracing::info!(%why, "the working set could not be recorded");
                None
            }
        }
    }

    fn note_news(&mut self) {
        let faults = self.handle.counters().faults;
        if self.tracking.is_some()
            && self.noted_faults != Some(faults)
            && let Some(record) = self.record()
        {
            self.note(&record);
            self.noted_faults = Some(faults);
        }
    }

    fn note(&self, record: &Record) {
        if let Some(tracking) = &self.tracking
            && let Err(error) = tracking.note_session(&self.process, record)
        {
            tracing::debug!(%error, "the working set is not noted for the next standby");
        }
    }
}
