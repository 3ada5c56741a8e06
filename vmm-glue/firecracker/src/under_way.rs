//! A standby under way, noted on this host: should the process that does it be killed, the next can tell what is left to do.
//!
//! A standby pauses its guest, stores it, and ends it. Killed after the snapshot is durable and before the VM has ended, it
//! leaves a guest that stands still and must not run again, since somebody may wake the snapshot elsewhere; killed before,
//! one that has to go on. Which of the two it is the store says: it has the snapshot if what the name stands for has the
//! very device state that was captured. It has not, and never will, only if the name stands for what it stood for before,
//! and was written again so that a write which is still on its way fails. If others moved the name meanwhile, the snapshot
//! may have been there in between and be awake elsewhere: then nobody but a person lets the guest go on. Whether the guest still stands as it was captured its vCPU threads say: one that
//! did nothing since was never put on a processor.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_chunkstore::{Settled, Standing, Store, StoreError};
use dormouse_core::Name;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tracking::Tracking;
use super::vcpus::VcpuMarks;
use dormouse_vmm_common::vmm_process::VmmProcess;

/// Raise it whenever the meaning changes: notes of other versions count as none.
const VERSION: u32 = 1;
/// Largest note read.
const NOTE_BYTES_MAX: u64 = 1 << 20;

/// What is noted of a standby.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StandbyNote {
    version: u32,
    /// The name its snapshot gets.
    pub name: String,
    /// Where its Firecracker listens.
    pub api_socket: PathBuf,
    /// Whose business it is if it is left behind; nobody's in particular if not said.
    pub by: Option<PathBuf>,
    /// What was asked for, as whoever does it wants to find it again.
    pub request: Value,
    /// Whether the guest ran before.
    pub was_running: bool,
    /// What the name stood for before. None until that was asked, and in notes of earlier versions of Dormouse.
    #[serde(default)]
    pub before: Option<Standing>,
    /// Whether its VM is to end once it is durable: what the name stands for until then is older than the guest.
    #[serde(default)]
    pub ends: bool,
    /// What was captured to be ended. None before, and of a guest that is to run on.
    pub captured: Option<Captured>,
}

/// A guest as it was captured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Captured {
    /// BLAKE3 of its device state, in hexadecimal: no two instants of a machine have the same.
    pub state: String,
    /// How far its vCPUs had come, if that can be read here.
    pub vcpus: Option<VcpuMarks>,
    /// What will be answered, as far as it is known.
    pub answer: Value,
}

/// What is left to do of a standby whose process was killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing is stored, and nothing will be: the guest goes on, if it ran before.
    Undone,
    /// Others have moved or removed the name since. Whether this standby was durable in between, and its snapshot is awake
    /// elsewhere, nobody can tell: the guest is neither ended nor let go on.
    Unclear {
        /// Whether it stands still as it was captured.
        stands: bool,
    },
    /// It is durable as this snapshot, and the guest stands still as it was stored: end it, and never let it run.
    End {
        /// The snapshot's id.
        snapshot: String,
    },
    /// It is durable as this snapshot, and the guest has run on since, or nobody can tell: two machines by now.
    RanOn {
        /// The snapshot's id.
        snapshot: String,
    },
}

impl StandbyNote {
    /// The note of a standby that begins.
    pub fn new(name: &Name, api_socket: &Path, was_running: bool) -> Self {
        StandbyNote {
            version: VERSION,
            name: name.to_string(),
            api_socket: api_socket.to_owned(),
            by: None,
            request: Value::Null,
            was_running,
            before: None,
            ends: false,
            captured: None,
        }
    }

    /// What is left to do, if nobody does it any more. `state_id` is what the device state is called in snapshots.
    ///
    /// # Errors
    /// The store's: nobody can tell as long as it is away, or before it was written to, and the guest must stay as it is.
    pub fn left(&self, process: &VmmProcess, store: &Store, state_id: &str) -> Result<Left, StoreError> {
        // The name is not written before that is noted.
        let Ok(name) = Name::new(&self.name) else { return Ok(Left::Undone) };
        let Some(captured) = &self.captured else {
            // Other hosts are told no more of a newer guest. A store that is away now does not hold the guest up.
            if let (Some(before), true) = (&self.before, self.ends)
                && let Err(why) = store.settle_reference(&name, before)
            {
                tracing::warn!(%name, %why, "other hosts may still be told that a newer guest is to replace it");
            }
            return Ok(Left::Undone);
        };
        if let Some(before) = &self.before
            && store.settle_reference(&name, before)? == Settled::Undone
        {
            return Ok(Left::Undone);
        }
        // What cannot be read is not known to have stood still.
        let stands = || {
            captured.vcpus.as_ref().is_some_and(|then| VcpuMarks::of(process).is_ok_and(|now| now == *then))
        };
        match stored_as(store, &name, state_id, &captured.state)? {
            Some(snapshot) if stands() => Ok(Left::End { snapshot }),
            Some(snapshot) => Ok(Left::RanOn { snapshot }),
            None => Ok(Left::Unclear { stands: stands() }),
        }
    }
}

/// The snapshot that `name` stands for, if its device state is the one with the hash `state`.
fn stored_as(store: &Store, name: &Name, state_id: &str, state: &str) -> Result<Option<String>, StoreError> {
    let snapshot = match store.open_snapshot(name) {
        Err(StoreError::NoSuchSnapshot { .. }) => return Ok(None),
        opened => opened?,
    };
    let stored = match snapshot.read_blob(state_id) {
        Err(StoreError::NoSuchPart { .. }) => return Ok(None),
        read => read?,
    };
    Ok((hash_of(&stored) == state).then(|| snapshot.reference().snapshot.to_string()))
}

/// How [`Captured::state`] names a device state.
pub fn hash_of(state: &[u8]) -> String {
    blake3::hash(state).to_hex().to_string()
}

/// A note that this process holds: nobody else takes its standby for left behind. Dropped, it is left behind.
#[derive(Debug)]
pub struct StandbyUnderWay {
    path: PathBuf,
    held: File,
}

impl Tracking {
    /// Notes that a standby of `process` begins: until that is over it is the only one. If an earlier one was left
    /// behind, that is what stays noted, and it is given as well: it is to be judged first.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`]: another one is under way. Or it cannot be noted.
    pub fn begin_standby(
        &self,
        process: &VmmProcess,
        note: &StandbyNote,
    ) -> io::Result<(StandbyUnderWay, Option<StandbyNote>)> {
        let path = self.standby_path(process).ok_or_else(|| io::Error::other("the process has ended"))?;
        // Whoever holds the note that is there is at work.
        let Some(left) = hold(&path)? else {
            let held = begin(&path, note)?;
            return Ok((StandbyUnderWay { path, held }, None));
        };
        match read(&path, &left) {
            Some(earlier) => Ok((StandbyUnderWay { path, held: left }, Some(earlier))),
            // One of nonsense is replaced.
            None => {
                let held = replace(&path, note)?;
                drop(left);
                Ok((StandbyUnderWay { path, held }, None))
            }
        }
    }

    /// The standby of `process` that was left behind, if there is one: its process was killed. Whoever takes it is the
    /// one to finish it.
    pub fn standby_left(&self, process: &VmmProcess) -> Option<(StandbyUnderWay, StandbyNote)> {
        take(self.standby_path(process)?)
    }

    /// Whether a standby of `process` is noted, under way or left behind.
    pub fn standby_is_noted(&self, process: &VmmProcess) -> bool {
        self.standby_path(process).is_some_and(|path| path.exists())
    }

    /// All that were left behind on this host, except those that cannot be read.
    pub fn all_standbys_left(&self) -> Vec<(StandbyUnderWay, StandbyNote)> {
        let files = fs::read_dir(self.directory()).into_iter().flatten().flatten().map(|f| f.path());
        files.filter(|path| path.extension().is_some_and(|e| e == EXTENSION)).filter_map(take).collect()
    }

    /// The guest on this host that is newer than what `name` stands for, if that is `standing`: it stands still, or soon
    /// will, for a standby that is under way or was cut off. The number of its process.
    pub fn newer_guest(&self, name: &Name, standing: &Standing) -> Option<i32> {
        let files = fs::read_dir(self.directory()).into_iter().flatten().flatten().map(|f| f.path());
        files.filter(|path| path.extension().is_some_and(|e| e == EXTENSION)).find_map(|path| {
            let note = read(&path, &File::open(&path).ok()?)?;
            let replaces = note.ends && note.name == name.as_str() && note.before.as_ref() == Some(standing);
            if !replaces {
                return None;
            }
            // One whose process has ended is in nobody's way.
            let process = VmmProcess::of(&UnixStream::connect(&note.api_socket).ok()?).ok()?;
            (self.standby_path(&process).as_ref() == Some(&path)).then(|| process.peer().pid)
        })
    }

    fn standby_path(&self, process: &VmmProcess) -> Option<PathBuf> {
        self.path(process, EXTENSION)
    }
}

const EXTENSION: &str = "standby";

impl StandbyUnderWay {
    /// Notes more of it.
    ///
    /// # Errors
    /// What was noted before still is.
    pub fn note(&mut self, note: &StandbyNote) -> io::Result<()> {
        self.held = replace(&self.path, note)?;
        Ok(())
    }

    /// Whether it is of `process`.
    pub fn is_of(&self, process: &VmmProcess, tracking: &Tracking) -> bool {
        tracking.standby_path(process).as_ref() == Some(&self.path)
    }

    /// Where it is noted.
    pub fn place(&self) -> NotePlace {
        NotePlace(self.path.clone())
    }

    /// The standby is over: nothing is left to do of it.
    pub fn done(self) {
        self.place().clear();
    }
}

/// Where a standby is noted. To be cleared by whoever has it under way, and nobody else.
#[derive(Clone, Debug)]
pub struct NotePlace(PathBuf);

impl NotePlace {
    /// The standby is over: nothing is left to do of it.
    pub fn clear(&self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "a standby that is over is still noted as under way");
        }
    }
}

/// Writes a note where there is none. Of several who found none, one does.
fn begin(path: &Path, note: &StandbyNote) -> io::Result<File> {
    let (unfinished, held) = write(path, note)?;
    let begun = fs::hard_link(&unfinished, path);
    fs::remove_file(&unfinished)?;
    match begun {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(io::ErrorKind::WouldBlock.into()),
        begun => begun.map(|()| held),
    }
}

/// Writes a note in place of the one that this process holds, whole or not at all.
fn replace(path: &Path, note: &StandbyNote) -> io::Result<File> {
    let (unfinished, held) = write(path, note)?;
    fs::rename(unfinished, path)?;
    Ok(held)
}

/// Writes a note beside `path`, and holds it: at no time is there one that nobody holds.
fn write(path: &Path, note: &StandbyNote) -> io::Result<(PathBuf, File)> {
    /// Notes this process wrote: its threads may begin the same standby.
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let unfinished = path.with_extension(format!("standby-{}-{number}", std::process::id()));
    let mut file = File::create(&unfinished)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.try_lock().map_err(io::Error::from)?;
    file.write_all(&serde_json::to_vec(note)?)?;
    Ok((unfinished, file))
}

/// Holds the note at `path`, if there is one.
fn hold(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        file.try_lock().map_err(io::Error::from)?;
        // Another may have been put in its place before it was held.
        let is_it = fs::metadata(path).is_ok_and(|there| {
            file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        });
        if is_it {
            return Ok(Some(file));
        }
    }
}

fn take(path: PathBuf) -> Option<(StandbyUnderWay, StandbyNote)> {
    let held = hold(&path).ok()??;
    let note = read(&path, &held)?;
    Some((StandbyUnderWay { path, held }, note))
}

/// The note that is `held`; none if it makes no sense.
fn read(path: &Path, held: &File) -> Option<StandbyNote> {
    if held.metadata().ok()?.len() > NOTE_BYTES_MAX {
        return None;
    }
    let note: StandbyNote = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (note.version == VERSION).then_some(note)
}

#[cfg(test)]
#[path = "under_way_tests.rs"]
mod tests;
