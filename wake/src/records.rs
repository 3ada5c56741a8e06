//! What this host has seen of machines' working sets, kept beside its caches.
//!
//! Statistics and predictions only: they may be deleted at any time, and the next session measures again. Pages come from
//! the store and from nowhere else. Each record is a JSON file named by the snapshot that was resumed, readable by its
//! owner only, since which pages a machine touches says something of what it does.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::SessionRecord;
use dormouse_chunkstore::{Snapshot, Store};
use dormouse_core::SnapshotId;
use dormouse_restore::WORKING_SET_PAGES_MAX;
use serde::{Deserialize, Serialize};

/// Raise it whenever the meaning changes: records of other versions count as none.
const VERSION: u32 = 1;
/// Records kept; of more, the oldest go.
const RECORDS_MAX: usize = 512;
/// Largest record read: hundreds of thousands of runs.
const RECORD_BYTES_MAX: u64 = 32 << 20;

/// What one session of a snapshot's machine showed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The snapshot's name when it was resumed.
    pub name: String,
    /// Its identity.
    pub snapshot: String,
    /// When, in milliseconds since 1970 UTC.
    pub recorded_unix_ms: u64,
    /// For how long first touches were recorded at most, in milliseconds.
    pub window_ms: u64,
    /// For how much of that time they were when this was written, in milliseconds.
    #[serde(default)]
    pub recorded_ms: u64,
    /// Whether nothing was filled in the background meanwhile: then all that is installed was brought by the stream or by
    /// faults.
    #[serde(default)]
    pub unfilled: bool,
    /// Whether every first touch in that time was seen. Not if all of memory was filled behind the machine's back, or if
    /// the process that recorded was killed and another went on.
    pub complete: bool,
    /// What was seen.
    pub session: SessionRecord,
}

impl Record {
    /// The record of a session that woke from `snapshot`.
    pub fn new(snapshot: &Snapshot, window: Duration, complete: bool, session: SessionRecord) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let reference = snapshot.reference();
        Record {
            version: VERSION,
            name: reference.name.to_string(),
            snapshot: reference.snapshot.to_string(),
            recorded_unix_ms: now.as_millis() as u64,
            window_ms: window.as_millis() as u64,
            recorded_ms: 0,
            unfilled: complete,
            complete,
            session,
        }
    }

    /// The record of the first part of its window, in which nothing was filled in the background or something was.
    pub fn of_part(self, time: Duration, unfilled: bool) -> Self {
        Record { recorded_ms: time.as_millis() as u64, unfilled, ..self }
    }

    /// How much longer, and for how many more pages, another process may record after this was written.
    pub fn left(&self) -> (Duration, u64) {
        let touched = self.session.coverage.missed.saturating_add(self.session.coverage.sampled_touched);
        let window = Duration::from_millis(self.window_ms.saturating_sub(self.recorded_ms));
        (window, WORKING_SET_PAGES_MAX.saturating_sub(touched))
    }

    /// Reads a record from a file.
    ///
    /// # Errors
    /// The file cannot be read, or is no record of this version.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::metadata(path)?.len();
        if bytes > RECORD_BYTES_MAX {
            return Err(invalid(format!("{bytes} bytes are too many for a record of a working set")));
        }
        Self::decode(&fs::read(path)?)
    }

    /// Reads a record from its bytes. Its runs may be any numbers; [`crate::predict`] copes with all of them.
    ///
    /// # Errors
    /// They are no record of this version.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let record: Record = serde_json::from_slice(bytes)?;
        if record.version != VERSION {
            return Err(invalid(format!("a record of version {}, not {VERSION}", record.version)));
        }
        Ok(record)
    }

    /// Writes it to a file, whole or not at all.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let unfinished = path.with_extension(format!("new{}", std::process::id()));
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::set_permissions(&unfinished, Permissions::from_mode(0o600))?;
        fs::rename(unfinished, path)
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The records of one store and domain on this host.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Those of `store`; `None` if it keeps nothing on this host.
    pub fn of(store: &Store) -> Option<Self> {
        Some(Self { directory: store.cache_dir()?.join("working-sets") })
    }

    /// The last record of a snapshot. What cannot be read counts as none.
    pub fn last(&self, snapshot: SnapshotId) -> Option<Record> {
        Record::read(&self.path(&snapshot.to_string())).ok()
    }

    /// Keeps `record` in place of the snapshot's last one, unless that has no gaps and this one has. Failing costs a
    /// measurement and is only logged.
    pub fn keep(&self, record: &Record) {
        let last = Record::read(&self.path(&record.snapshot));
        if !record.complete && last.is_ok_and(|last| last.complete) {
            return;
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        if let Err(error) = made.and_then(|()| record.write(&self.path(&record.snapshot))) {
            tracing::info!(%error, directory = %self.directory.display(), "a working set is not remembered");
        }
        self.prune();
    }

    fn path(&self, snapshot: &str) -> PathBuf {
        self.directory.join(format!("{snapshot}.json"))
    }

    fn prune(&self) {
        let files = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut files: Vec<_> =
            files.filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f.path()))).collect();
        files.sort();
        let too_many = files.len().saturating_sub(RECORDS_MAX);
        for (_, path) in files.into_iter().take(too_many) {
            // Another process may have been first.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_with_gaps_does_not_take_the_place_of_one_without() {
        let directory = tempfile::tempdir().expect("directory");
        let records = Records { directory: directory.path().join("records") };
        let record = |complete, page| Record {
            version: VERSION,
            name: "vm".into(),
            snapshot: "00".into(),
            recorded_unix_ms: 1,
            window_ms: 5000,
            recorded_ms: 0,
            unfilled: true,
            complete,
            session: SessionRecord { missed: vec![(page, 1)], ..Default::default() },
        };
        let kept = |new: &Record| {
            records.keep(new);
            Record::read(&records.path("00")).expect("kept").session.missed[0].0
        };
        let seen =
            [(false, 1), (false, 2), (true, 3), (false, 4), (true, 5)].map(|(c, p)| kept(&record(c, p)));
        assert_eq!(seen, [1, 2, 3, 3, 5]);
    }

    #[test]
    fn a_record_comes_back_and_nonsense_is_told() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("record.json");
        let session = SessionRecord { missed: vec![(7, 3)], unneeded: vec![9], ..Default::default() };
        let record = Record {
            version: VERSION,
            name: "vm".into(),
            snapshot: "00".into(),
            recorded_unix_ms: 1,
            window_ms: 5000,
            recorded_ms: 0,
            unfilled: true,
            complete: true,
            session,
        };
        record.write(&path).expect("written");
        assert_eq!(Record::read(&path).expect("read"), record);
        let whole = fs::read(&path).expect("bytes");
        for bad in [&b"{}"[..], b"", &whole[..whole.len() / 2], b"{\"version\":1,\"session\":[]}"] {
            fs::write(&path, bad).expect("written");
            assert!(Record::read(&path).is_err());
        }
        Record { version: 2, ..record }.write(&path).expect("written");
        assert!(Record::read(&path).expect_err("another version").to_string().contains("version 2"));
    }
}
