//! The files in memory that Firecracker writes a snapshot to, made while its guest still runs: what limits forbid is
//! refused before the pause.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::process::{Resource, getrlimit};

use super::api::SnapshotKind;
use super::jail::Jail;
use super::machine::Machine;
use super::memfile::MemFile;
use super::room::{Groups, Room, file_bytes_max, own_room, written_bytes_max};
use dormouse_vmm_common::vmm_process::VmmProcess;

/// Memory that Firecracker wants besides the guest's while it writes a snapshot, and that a guest may write between the
/// look at it and its pause.
const VMM_SPARE_BYTES: u64 = 32 << 20;
/// Memory that storing a capture takes besides the capture.
const OWN_SPARE_BYTES: u64 = 64 << 20;

/// Files for one capture.
#[derive(Debug)]
pub struct CaptureFiles {
    pub(super) memory: MemFile,
    pub(super) state: MemFile,
}

/// A limit that a capture would break.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// Of the length of files.
    #[error(
        "{who} may write files of {limit_bytes} bytes at most (RLIMIT_FSIZE), and a snapshot of this guest's memory has \
         {memory_bytes}: raise that limit (prlimit --fsize; the jailer's --resource-limit fsize)"
    )]
    FileSize {
        /// Whose limit it is.
        who: &'static str,
        /// The limit.
        limit_bytes: u64,
        /// What the file would have.
        memory_bytes: u64,
    },
    /// Of memory.
    #[error(
        "a capture of all memory takes {needed_bytes} bytes of memory, charged to {who}, and {} leaves {}: raise that \
         limit", room.limit, room.bytes
    )]
    Memory {
        /// Who writes it.
        who: &'static str,
        /// What it takes.
        needed_bytes: u64,
        /// What there is.
        room: Room,
    },
}

/// Why there are no files for a capture.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A limit would be broken.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Memory for the snapshot could not be had.
    #[error("no memory file could be made for the snapshot: {0}")]
    Memory(#[from] io::Error),
}

impl CaptureFiles {
    /// Makes them for a capture of `machine`. Memory for a full capture is taken at once, so that it is charged to this
    /// process and not to Firecracker, whose control group may be no larger than its guest.
    ///
    /// # Errors
    /// [`FilesError`]; the guest was not touched.
    pub fn prepare(
        kind: SnapshotKind,
        machine: &Machine,
        process: &VmmProcess,
        jail: Option<&Jail>,
    ) -> Result<Self, FilesError> {
        let (pid, memory_bytes) = (process.peer().pid, machine.memory_bytes);
        check_file_size("Firecracker", file_bytes_max(pid), memory_bytes)?;
        let file = |name| jail.map_or_else(|| MemFile::new(name), |jail| jail.file(name));
        let files = CaptureFiles { memory: file("dormouse-memory")?, state: file("dormouse-vmstate")? };
        if kind == SnapshotKind::Diff {
            return Ok(files);
        }
        if !machine.keeps_memory_file() {
            check_room("Firecracker", Groups::of(pid).room(), memory_bytes.saturating_add(VMM_SPARE_BYTES))?;
            check_room("Dormouse", own_room(), memory_bytes)?;
            return Ok(files);
        }
        check_file_size("Dormouse", getrlimit(Resource::Fsize).current, memory_bytes)?;
        /// Two captures must not both be promised the same memory.
        static TAKING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        check_room("Dormouse", own_room(), memory_bytes.saturating_add(OWN_SPARE_BYTES))?;
        files.memory.allocate(memory_bytes)?;
        Ok(files)
    }
}

/// Whether the control groups of `process` have room for a difference: that is charged to it, as nobody knows beforehand
/// which pages it has.
pub fn difference_fits(process: &VmmProcess, machine: &Machine) -> bool {
    let pid = process.peer().pid;
    let most = written_bytes_max(pid).unwrap_or(u64::MAX).min(machine.memory_bytes);
    Groups::of(pid).room().is_none_or(|room| room.bytes >= most.saturating_add(VMM_SPARE_BYTES))
}

fn check_file_size(who: &'static str, limit: Option<u64>, memory_bytes: u64) -> Result<(), LimitError> {
    match limit.filter(|limit| *limit < memory_bytes) {
        Some(limit_bytes) => Err(LimitError::FileSize { who, limit_bytes, memory_bytes }),
        None => Ok(()),
    }
}

fn check_room(who: &'static str, room: Option<Room>, needed_bytes: u64) -> Result<(), LimitError> {
    match room.filter(|room| room.bytes < needed_bytes) {
        Some(room) => Err(LimitError::Memory { who, needed_bytes, room }),
        None => Ok(()),
    }
}
