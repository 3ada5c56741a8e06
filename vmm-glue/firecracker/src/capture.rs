//! Taking a snapshot of a running Firecracker into memory, with as short a pause as it allows.

use std::io;
use std::time::{Duration, Instant};

use super::api::{ApiClient, ApiError, SnapshotKind};
use super::capture_files::CaptureFiles;
use super::machine::{MachineError, is_running};
use super::memfile::MemFile;

/// A snapshot in memory.
#[derive(Debug)]
pub struct Capture {
    /// What the memory file holds.
    pub kind: SnapshotKind,
    /// Guest memory; holes of a difference are as in the parent.
    pub memory: MemFile,
    /// Firecracker's device state.
    pub state: MemFile,
    /// Whether the guest ran before.
    pub was_running: bool,
    /// Where the time went.
    pub times: CaptureTimes,
}

/// Where the time of a capture went.
#[derive(Clone, Copy, Debug, Default)]
pub struct CaptureTimes {
    /// Until the guest stood still.
    pub pause: Duration,
    /// Writing the snapshot.
    pub snapshot: Duration,
    /// Letting the guest go on, if that was asked for.
    pub resume: Duration,
    /// From the request to pause until the guest went on, or could have.
    pub paused: Duration,
}

/// Why nothing was captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Firecracker refused, or could not be asked.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// There is no guest to capture.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The snapshot's files cannot be read.
    #[error("the snapshot's memory file cannot be read: {0}")]
    Scratch(#[from] io::Error),
    /// The guest ran before, and stands still now or may: it could not be told to go on.
    #[error("{why}; the guest stands still, or may: it could not be told to go on ({resume}); ask again")]
    StandsStill {
        /// Why nothing was captured, or what was.
        why: String,
        /// What it answered when told to go on.
        resume: ApiError,
    },
    /// It answered that the snapshot is there, but it is not.
    #[error("Firecracker says it has written the snapshot, but {0} is empty")]
    Empty(&'static str),
}

impl CaptureError {
    /// Whether a guest that ran before stands still, or may.
    pub fn stands_still(&self) -> bool {
        matches!(self, CaptureError::StandsStill { .. })
    }

    /// Whether Firecracker could not be asked any more: it may have ended.
    pub fn hung_up(&self) -> bool {
        match self {
            CaptureError::Api(error)
            | CaptureError::Machine(MachineError::Api(error))
            | CaptureError::StandsStill { resume: error, .. } => !matches!(error, ApiError::Refused { .. }),
            _ => false,
        }
    }
}

/// Pauses the guest, takes a snapshot into `files`, and lets a guest that ran before go on if `resume`. A guest that is
/// paused may have `ran_before` all the same: paused by a standby that was killed.
///
/// # Errors
/// [`CaptureError`]. Unless it is [`CaptureError::StandsStill`] the guest runs then if it ran before. Which pages
/// Firecracker takes for dirty may have changed: what comes next must be a full snapshot.
pub fn capture(
    api: &ApiClient,
    kind: SnapshotKind,
    ran_before: bool,
    resume: bool,
    files: CaptureFiles,
) -> Result<Capture, CaptureError> {
    let mut was_running = ran_before;
    let captured = try_capture(api, kind, &mut was_running, resume, files);
    captured.map_err(|error| match was_running.then(|| api.resume()) {
        Some(Err(resume)) => CaptureError::StandsStill { why: error.to_string(), resume },
        _ => error,
    })
}

fn try_capture(
    api: &ApiClient,
    kind: SnapshotKind,
    was_running: &mut bool,
    resume: bool,
    files: CaptureFiles,
) -> Result<Capture, CaptureError> {
    let CaptureFiles { memory, state } = files;
    let is_running = is_running(api)?;
    *was_running |= is_running;
    let mut times = CaptureTimes::default();
    let begun = Instant::now();
    if is_running {
        api.pause()?;
    }
    times.pause = begun.elapsed();
    let writing = Instant::now();
    api.create_snapshot(kind, &state.path_for_vmm(), &memory.path_for_vmm())?;
    check(&memory, &state)?;
    times.snapshot = writing.elapsed();
    if resume && *was_running {
        let resuming = Instant::now();
        api.resume()?;
        times.resume = resuming.elapsed();
    }
    times.paused = begun.elapsed();
    Ok(Capture { kind, memory, state, was_running: *was_running, times })
}

fn check(memory: &MemFile, state: &MemFile) -> Result<(), CaptureError> {
    for (file, what) in [(memory, "the memory file"), (state, "the state file")] {
        if file.is_empty()? {
            return Err(CaptureError::Empty(what));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
