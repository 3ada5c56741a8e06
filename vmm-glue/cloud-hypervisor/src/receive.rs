//! A VM that goes to sleep: received up to the answer on which it ends.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};

use super::filling;
use super::memory::{MemorySlot, MemorySlotsError, SLOTS_MAX, StoredIn, memory_slots, stored_in};
use super::protocol::{Command, Response, SleepSequence};
use super::wire::{Wire, WireError};
use dormouse_vmm_common::peer::Peer;

/// Most memory files a VM may have: Cloud Hypervisor makes one for each region, NUMA zone and hot-plugged module.
pub const MEMORY_FILES_MAX: usize = 16;

/// Why a VM was not received. It goes on as if nothing had happened, if its VMM is what it says it is.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The exchange failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Its memory slots make no sense.
    #[error(transparent)]
    Slots(#[from] MemorySlotsError),
    /// No memory files came.
    #[error(
        "Cloud Hypervisor sent no memory files: pass local=on to send-migration, and start the VM with shared \
         memory (--memory shared=on)"
    )]
    NotLocal,
    /// More memory files than allowed, or than slots.
    #[error(
        "{0} memory files came: a VM has one for each slot, {SLOTS_MAX} at most, of {MEMORY_FILES_MAX} files"
    )]
    TooMany(usize),
    /// What came with a slot cannot be its memory.
    #[error("memory slot {slot}: {what}")]
    File {
        /// The slot.
        slot: u32,
        /// What is wrong.
        what: String,
    },
    /// Cloud Hypervisor thought better of it.
    #[error("Cloud Hypervisor gave up; its log says why")]
    Abandoned,
}

/// A memory file, and the slots it shows.
#[derive(Debug)]
pub struct MemoryFile {
    /// What it is stored as.
    pub image: StoredIn,
    /// The file. Nobody writes to it until the VM goes on.
    pub file: File,
    /// Its length.
    pub bytes: u64,
}

/// A VM that stands still and waits for an answer.
#[derive(Debug)]
pub struct Received {
    /// Its memory.
    pub memory: Vec<MemoryFile>,
    /// Its memory slots, by ascending address.
    pub slots: Vec<MemorySlot>,
    /// Its configuration, JSON.
    pub config: Vec<u8>,
    /// The state of its devices and vCPUs, JSON.
    pub state: Vec<u8>,
    /// Whether the guest ran before.
    pub was_running: bool,
    /// When it was told to stand still.
    pub paused: Instant,
    wire: Wire,
}

impl Received {
    /// Who sent it.
    pub fn peer(&self) -> Peer {
        self.wire.peer()
    }

    /// The connection to who sent it.
    pub fn connection(&self) -> &UnixStream {
        self.wire.stream()
    }

    /// Says that all of it is safe: the VM ends, unless its user asked otherwise. Gives back the connection.
    ///
    /// # Errors
    /// The answer did not get through; the VM then goes on.
    pub fn acknowledge(self) -> Result<UnixStream, WireError> {
        self.wire.respond(Response::Ok)?;
        self.wire.stream().try_clone().map_err(WireError::from)
    }

    /// Says that it could not be kept: the VM goes on.
    ///
    /// # Errors
    /// The answer did not get through; the VM goes on all the same once the connection is closed.
    pub fn refuse(self) -> Result<(), WireError> {
        self.wire.respond(Response::Error)
    }
}

/// Receives the VM that a process of user `allowed` sends over `connection`, all but the last answer. Each message
/// may take `patience`.
///
/// # Errors
/// [`ReceiveError`]; the peer was told, as far as it listens.
pub fn receive(connection: UnixStream, allowed: u32, patience: Duration) -> Result<Received, ReceiveError> {
    let wire = Wire::new(connection, allowed, patience)?;
    match collect(&wire) {
        Ok(Collected { files, config, slots, state, was_running, paused }) => {
            match memory_files(files, &slots) {
                Ok(memory) => Ok(Received { memory, slots, config, state, was_running, paused, wire }),
                Err(error) => Err(told(&wire, error)),
            }
        }
        Err(error) => Err(told(&wire, error)),
    }
}

/// Tells the peer of `error`, so that it need not find out by itself.
fn told(wire: &Wire, error: ReceiveError) -> ReceiveError {
    let answer = if matches!(error, ReceiveError::Abandoned) { Response::Ok } else { Response::Error };
    // It may be gone, which is no worse.
    let _ = wire.respond(answer);
    error
}

struct Collected {
    files: HashMap<u32, OwnedFd>,
    config: Vec<u8>,
    slots: Vec<MemorySlot>,
    state: Vec<u8>,
    was_running: bool,
    paused: Instant,
}

fn collect(wire: &Wire) -> Result<Collected, ReceiveError> {
    let mut at = SleepSequence::default();
    let mut files = HashMap::new();
    let (mut config, mut slots, mut state) = (Vec::new(), Vec::new(), Vec::new());
    let mut paused = Instant::now();
    loop {
        let request = wire.request()?;
        at = at.step(request.command).map_err(WireError::from)?;
        match request.command {
            Command::Start => {}
            Command::MemoryFd => {
                let (slot, file) = wire.memory_fd()?;
                if files.len() >= SLOTS_MAX {
                    return Err(ReceiveError::TooMany(files.len() + 1));
                }
                // The guest still runs.
                if filling::is_going_on(&file).unwrap_or(false) {
                    return Err(ReceiveError::File { slot, what: STILL_FILLED.into() });
                }
                if files.insert(slot, file).is_some() {
                    return Err(ReceiveError::File { slot, what: "came twice".into() });
                }
            }
            Command::Config => {
                if files.is_empty() {
                    return Err(ReceiveError::NotLocal);
                }
                config = wire.payload(&request)?;
                slots = memory_slots(&config)?;
            }
            Command::State => state = wire.payload(&request)?,
            Command::Complete | Command::CompletePaused => {
                let was_running = request.command == Command::Complete;
                return Ok(Collected { files, config, slots, state, was_running, paused });
            }
            // `step` lets no other through.
            _ => return Err(ReceiveError::Abandoned),
        }
        wire.respond(Response::Ok)?;
        if request.command == Command::Config {
            paused = Instant::now();
        }
    }
}

/// What is wrong with memory that its VM has not got all of.
const STILL_FILLED: &str = "its pages are still on their way from the snapshot that the VM was woken from: wait until `resume` \
                            has ended, which says that the VM has all its memory";

/// A file and the slots it shows.
struct Shown {
    inode: (u64, u64),
    file: File,
    bytes: u64,
    slots: Vec<MemorySlot>,
}

/// The files behind `slots`, each once.
fn memory_files(
    mut files: HashMap<u32, OwnedFd>,
    slots: &[MemorySlot],
) -> Result<Vec<MemoryFile>, ReceiveError> {
    if files.len() > slots.len() {
        return Err(ReceiveError::TooMany(files.len()));
    }
    let mut shown: Vec<Shown> = Vec::new();
    for at in slots {
        let bad = |what: String| ReceiveError::File { slot: at.slot, what };
        let file = files.remove(&at.slot).ok_or_else(|| bad("no memory file came for it".into()))?;
        let file = checked(file).map_err(bad)?;
        let about = file.metadata().map_err(|e| bad(e.to_string()))?;
        let (inode, bytes, end) = ((about.dev(), about.ino()), about.len(), at.file_offset + at.bytes);
        if bytes < end {
            return Err(bad(format!("its file has {bytes} bytes, but it ends at {end}")));
        }
        match shown.iter_mut().find(|f| f.inode == inode) {
            Some(same) => same.slots.push(*at),
            None => shown.push(Shown { inode, file, bytes, slots: vec![*at] }),
        }
    }
    if shown.len() > MEMORY_FILES_MAX {
        return Err(ReceiveError::TooMany(shown.len()));
    }
    let alone = shown.len() == 1;
    shown.into_iter().map(|file| memory_file(file, alone)).collect()
}

fn memory_file(mut shown: Shown, alone: bool) -> Result<MemoryFile, ReceiveError> {
    shown.slots.sort_by_key(|s| s.file_offset);
    let mut end = 0;
    for slot in &shown.slots {
        if slot.file_offset < end {
            return Err(ReceiveError::File { slot: slot.slot, what: "overlaps another in its file".into() });
        }
        end = slot.file_offset + slot.bytes;
    }
    let slot = shown.slots.first().map_or(0, |s| s.slot);
    let bad = |what: String| Err(ReceiveError::File { slot, what });
    if shown.bytes != end {
        return bad(format!("its file has {} bytes, of which slots use {end}", shown.bytes));
    }
    let name =
        if alone { Some(StoredIn::All) } else { stored_in(shown.slots.iter().map(|s| s.slot).collect()) };
    match name {
        Some(image) => Ok(MemoryFile { image, file: shown.file, bytes: shown.bytes }),
        None => bad("shares its file with too many other slots".into()),
    }
}

/// `file`, if it can be read like memory.
fn checked(file: OwnedFd) -> Result<File, String> {
    let kind =
        rustix::fs::fstat(&file).map(|s| FileType::from_raw_mode(s.st_mode)).map_err(|e| e.to_string())?;
    if kind != FileType::RegularFile {
        return Err(format!("what came with it is {kind:?}, not a memory file"));
    }
    let mode = rustix::fs::fcntl_getfl(&file).map_err(|e| e.to_string())? & OFlags::ACCMODE;
    if mode == OFlags::WRONLY {
        return Err("its file is open for writing only".into());
    }
    Ok(file.into())
}
