//! A VM that wakes: sent to a Cloud Hypervisor that waits for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};

use super::memory::{MemorySlot, StoredIn};
use super::protocol::{Command, FAULT_ROLE};
use super::wire::{Wire, WireError};

/// How often a socket that is not there yet is looked for.
const LOOK_INTERVAL: Duration = Duration::from_micros(250);

/// Why a VM was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The exchange failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Nobody listens.
    #[error("nobody listens at {path}: {source}; was receive-migration called with this socket?")]
    Connect {
        /// Where.
        path: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The snapshot's images are not those of its slots.
    #[error("memory slot {slot}: {what}; was the snapshot taken by `standby cloud-hypervisor`?")]
    Layout {
        /// The slot.
        slot: u32,
        /// What is wrong.
        what: String,
    },
    /// No memory for the guest's memory.
    #[error("no memory file could be made: {0}")]
    MemoryFile(io::Error),
}

/// An image of the snapshot, and the memory slots in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaidOut {
    /// The image.
    pub image: StoredIn,
    /// Its length.
    pub bytes: u64,
    /// Its slots, by ascending place in it. At least one.
    pub slots: Vec<MemorySlot>,
}

/// Which of `images` (with their lengths) holds which of `slots`. Pure.
///
/// # Errors
/// [`SendError::Layout`]: a slot is in none or in two, reaches past its image's end, or overlaps another in it.
pub fn lay_out(slots: &[MemorySlot], images: &[(StoredIn, u64)]) -> Result<Vec<LaidOut>, SendError> {
    let bad = |slot: &MemorySlot, what: String| SendError::Layout { slot: slot.slot, what };
    let empty =
        |(image, bytes): &(StoredIn, u64)| LaidOut { image: image.clone(), bytes: *bytes, slots: Vec::new() };
    let mut laid_out: Vec<LaidOut> = images.iter().map(empty).collect();
    for slot in slots {
        let mut holders = laid_out.iter_mut().filter(|l| l.image.holds(slot.slot));
        let holder = holders.next().ok_or_else(|| bad(slot, "no image of the snapshot holds it".into()))?;
        if holders.next().is_some() {
            return Err(bad(slot, "more than one image of the snapshot holds it".into()));
        }
        if slot.file_offset.checked_add(slot.bytes).is_none_or(|end| end > holder.bytes) {
            return Err(bad(
                slot,
                format!("reaches past the {} bytes of image {}", holder.bytes, holder.image),
            ));
        }
        holder.slots.push(*slot);
    }
    for one in &mut laid_out {
        one.slots.sort_by_key(|s| s.file_offset);
        if let Some(pair) = one.slots.windows(2).find(|p| p[0].file_offset + p[0].bytes > p[1].file_offset) {
            return Err(bad(&pair[1], "overlaps another in its image".into()));
        }
    }
    laid_out.retain(|l| !l.slots.is_empty());
    Ok(laid_out)
}

/// An empty file in memory of `bytes` bytes, which can never be shortened under those who map it.
///
/// # Errors
/// [`SendError::MemoryFile`].
pub fn memory_file(image: &StoredIn, bytes: u64) -> Result<File, SendError> {
    let make = || -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(format!("dormouse-{image}"), flags)?);
        file.set_len(bytes)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    make().map_err(SendError::MemoryFile)
}

/// Connects to the Cloud Hypervisor that listens at `path`, or soon will, unless `gave_up` says otherwise before.
///
/// # Errors
/// [`SendError`].
pub fn connect(
    path: &Path,
    allowed: u32,
    wait: Duration,
    patience: Duration,
    gave_up: impl Fn() -> bool,
) -> Result<Wire, SendError> {
    let deadline = Instant::now() + wait;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(Wire::new(stream, allowed, patience)?),
            Err(source) => {
                let absent =
                    [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&source.kind());
                if !absent || gave_up() || Instant::now() >= deadline {
                    return Err(SendError::Connect { path: path.display().to_string(), source });
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
        }
    }
}

/// A Cloud Hypervisor that is being sent a VM.
#[derive(Debug)]
pub struct Sender {
    wire: Wire,
}

impl Sender {
    /// Begins.
    ///
    /// # Errors
    /// [`SendError`], here and below. Whatever failed, the VM has not run; the VMM is without one again.
    pub fn begin(wire: Wire) -> Result<Self, SendError> {
        wire.ask(Command::Start, &[])?;
        Ok(Self { wire })
    }

    /// The connection.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Sends the memory file of each slot.
    #[expect(clippy::missing_errors_doc, reason = "see begin")]
    pub fn memory(&self, laid_out: &LaidOut, file: &File) -> Result<(), SendError> {
        let send = |slot: &MemorySlot| self.wire.ask_memory_fd(slot.slot, file.as_fd());
        Ok(laid_out.slots.iter().try_for_each(send)?)
    }

    /// Sends the configuration.
    #[expect(clippy::missing_errors_doc, reason = "see begin")]
    pub fn config(&self, config: &[u8]) -> Result<(), SendError> {
        Ok(self.wire.ask(Command::Config, config)?)
    }

    /// Sends the devices' and vCPUs' state. On demand, the VMM must be able to ask for pages by now.
    #[expect(clippy::missing_errors_doc, reason = "see begin")]
    pub fn state(&self, state: &[u8]) -> Result<(), SendError> {
        Ok(self.wire.ask(Command::State, state)?)
    }

    /// Ends: the guest runs from now on, or stays paused.
    #[expect(clippy::missing_errors_doc, reason = "see begin")]
    pub fn complete(self, run: bool) -> Result<(), SendError> {
        let command = if run { Command::Complete } else { Command::CompletePaused };
        Ok(self.wire.ask(command, &[])?)
    }

    /// Gives up: the VMM throws away what it has got.
    #[expect(clippy::missing_errors_doc, reason = "see begin")]
    pub fn abandon(self) -> Result<(), SendError> {
        match self.wire.ask(Command::Abandon, &[]) {
            // v53 answers a migration it has aborted with either.
            Ok(()) | Err(WireError::Refused(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Announces `wire`, a further connection to a VMM that has its configuration, as the one to ask for pages on.
///
/// # Errors
/// [`WireError::Io`].
pub fn announce_faults(wire: &Wire) -> Result<(), WireError> {
    wire.write(&FAULT_ROLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(slot: u32, bytes: u64, file_offset: u64) -> MemorySlot {
        MemorySlot { slot, address: u64::from(slot) << 32, bytes, file_offset, pluggable: false }
    }

    #[test]
    fn each_slot_is_found_in_its_image() {
        let slots = [slot(0, 8192, 4096), slot(1, 4096, 0), slot(2, 4096, 0)];
        let images = [(StoredIn::Slots(vec![0, 1]), 12288), (StoredIn::Slots(vec![2]), 4096)];
        let found = lay_out(&slots, &images).expect("laid out");
        let numbers: Vec<Vec<u32>> = found.iter().map(|l| l.slots.iter().map(|s| s.slot).collect()).collect();
        assert_eq!(numbers, [vec![1, 0], vec![2]]);
    }

    #[test]
    fn images_that_are_not_those_of_the_slots_are_refused() {
        let all = |bytes| vec![(StoredIn::All, bytes)];
        for (slots, images, part) in [
            (vec![slot(7, 4096, 0)], vec![(StoredIn::Slots(vec![6]), 4096)], "no image"),
            (
                vec![slot(7, 4096, 0)],
                [all(4096), vec![(StoredIn::Slots(vec![7]), 4096)]].concat(),
                "more than one",
            ),
            (vec![slot(7, 8192, 0)], all(4096), "past the 4096 bytes"),
            (vec![slot(7, 4096, u64::MAX - 4095)], all(4096), "past the"),
            (vec![slot(7, 8192, 0), slot(8, 4096, 4096)], all(8192), "slot 8: overlaps"),
        ] {
            let error = lay_out(&slots, &images).expect_err("must be refused").to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
    }
}
