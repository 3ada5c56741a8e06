//! Resume streams kept on this host's disk: the warm tier.
//!
//! A stream that was read whole from a remote store is kept as it is, one file per name, below the cache directory. It
//! proves itself as it would from the store: its head by its hash, its frames by theirs, and that it is of the snapshot
//! the name stands for by the reference, which is always asked for. One that does not is deleted and read from the store.
//! Together they take up a quarter of the disk cache's bound at most; those not used for longest go first, and pinned ones
//! stay. Files are written beside and renamed; nothing is synced, as nothing is lost.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use dormouse_core::{
    Name, SnapshotId,
    stream::{PREFIX_BYTES, STREAM_BYTES_MAX, StreamHead},
};

use crate::{
    error::{Result, StoreError},
    store::Store,
};

/// Share of the disk cache's bound that streams may take up.
const SHARE: u64 = 4;

/// Where a snapshot's first pages are, as seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// On a local disk.
    Warm,
    /// In the object store only.
    Cold,
}

/// A stream kept here.
#[derive(Debug)]
pub(super) struct LocalStream {
    pub(super) file: File,
    path: PathBuf,
    pub(super) head: StreamHead,
}

impl LocalStream {
    /// It is not what it was, or of another snapshot.
    pub(super) fn discard(&self) {
        // It is only found and refused again if that fails.
        let _ = fs::remove_file(&self.path);
    }
}

impl Store {
    /// Where streams of this store are kept on this host; `None` if they are not, as those of a local store.
    fn local_streams(&self) -> Option<PathBuf> {
        (self.disk_bytes > 0 && !self.backend.is_local()).then_some(())?;
        Some(self.cache_dir()?.join("streams"))
    }

    fn local_stream_path(&self, name: &Name) -> Option<PathBuf> {
        Some(self.local_streams()?.join(self.domain.name_key(name.as_str())))
    }

    /// The stream kept of `name`, if its head is whole.
    pub(super) fn local_stream(&self, name: &Name) -> Option<LocalStream> {
        let path = self.local_stream_path(name)?;
        let file = File::open(&path).ok()?;
        let head = || {
            let mut prefix = vec![0; PREFIX_BYTES];
            file.read_exact_at(&mut prefix, 0).ok()?;
            let mut head = vec![0; StreamHead::end(&prefix).ok()?];
            file.read_exact_at(&mut head, 0).ok()?;
            let whole = StreamHead::decode(&self.domain, &head).ok()?;
            let bytes = file.metadata().ok()?.len();
            (whole.object_bytes(head.len() as u64) == bytes).then_some(whole)
        };
        let Some(head) = head() else {
            let _ = fs::remove_file(&path);
            return None;
        };
        Some(LocalStream { file, path, head })
    }

    /// Keeps the whole object of the stream of `name`, if it is to be. Failing costs a request next time.
    pub(super) fn keep_stream(&self, name: &Name, object: &[u8]) {
        if object.len() as u64 <= self.disk_bytes / SHARE
            && let Err(why) = self.write_stream(name, object)
        {
            tracing::info!(%why, "a resume stream is not kept on disk");
        }
    }

    fn write_stream(&self, name: &Name, object: &[u8]) -> Result<()> {
        let (Some(dir), Some(path)) = (self.local_streams(), self.local_stream_path(name)) else {
            return Ok(());
        };
        let half = beside(&path, &format!("new{}", std::process::id()));
        let written = fs::create_dir_all(&dir)
            .and_then(|()| fs::write(&half, object))
            .and_then(|()| fs::rename(&half, &path));
        if written.is_err() {
            let _ = fs::remove_file(&half);
        }
        self.bound_streams(&dir);
        written.map_err(|why| StoreError::file("writing", &path, why))
    }

    fn bound_streams(&self, dir: &Path) {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for file in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = file.path();
            let is_pin = file.file_name().to_string_lossy().starts_with(PIN);
            // What a crash left half written counts, and goes, as if it were a stream.
            if let (false, false, Ok(meta)) = (is_pin, pin_of(&path).exists(), file.metadata()) {
                files.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), path));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= self.disk_bytes / SHARE {
                break;
            }
            // Another process may have been first.
            let _ = fs::remove_file(path);
            total -= bytes;
        }
    }

    /// Whether the first pages of `name`, which stands for `snapshot`, are on this host's disk. Asks no remote store.
    pub fn tier(&self, name: &Name, snapshot: SnapshotId) -> Tier {
        let here = || self.local_stream(name).is_some_and(|stream| stream.head.snapshot == snapshot);
        if self.backend.is_local() || here() { Tier::Warm } else { Tier::Cold }
    }

    /// Whether the stream of `name` stays on this host's disk until [`Store::cool`].
    pub fn is_pinned(&self, name: &Name) -> bool {
        self.local_stream_path(name).is_some_and(|path| pin_of(&path).exists())
    }

    /// Brings the stream of `name` to this host's disk, in place of what is there, and keeps it until [`Store::cool`].
    /// Gives its bytes; `None` if the snapshot has no stream that is current.
    ///
    /// # Errors
    /// The store's; [`StoreError::Usage`] where nothing is kept on disk, because the store is a local one itself or has
    /// no cache directory, or where the stream is larger than all that may be kept; [`StoreError::File`] where it cannot be
    /// written. It is not pinned then.
    pub fn warm(&self, name: &Name) -> Result<Option<u64>> {
        let snapshot = self.open_snapshot(name)?;
        let no_cache = || {
            let why = "streams of this store are not kept on this host: it is a local store, or has no cache directory";
            StoreError::Usage(why.into())
        };
        let path = self.local_stream_path(name).ok_or_else(no_cache)?;
        let key = self.keys.stream(&self.domain, name);
        let Some(object) = self.get_whole(&key, STREAM_BYTES_MAX)? else { return Ok(None) };
        let damaged = |why| StoreError::Damaged { key: key.clone(), why };
        let head = StreamHead::decode(&self.domain, &object).map_err(damaged)?;
        if head.snapshot != snapshot.reference().snapshot {
            return Ok(None);
        }
        let mut raw = Vec::new();
        for frame in &head.frames {
            let range = frame.at.range();
            let stored = object.get(range.start as usize..range.end as usize).unwrap_or_default();
            frame.at.decode_into(&self.domain, stored, &mut raw).map_err(damaged)?;
        }
        let (bytes, most) = (object.len() as u64, self.disk_bytes / SHARE);
        if bytes > most {
            return Err(StoreError::Usage(format!(
                "the stream of {name} has {bytes} bytes, and all streams kept on this host may take up {most}, a quarter of \
                 its disk cache; build it from fewer pages, or give the host a larger cache (`disk_cache_bytes`)"
            )));
        }
        let file = |why: io::Error| StoreError::file("writing", &path, why);
        // The pin first, so that the bound does not take the file at once.
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(file)?;
        }
        let pin = pin_of(&path);
        let written = fs::write(&pin, b"").map_err(file).and_then(|()| self.write_stream(name, &object));
        if let Err(why) = written {
            let _ = fs::remove_file(pin);
            return Err(why);
        }
        Ok(Some(bytes))
    }

    /// Takes off this host's disk what is kept for names that are not among `kept`, in the form in which keys have them.
    pub(crate) fn cool_others(&self, kept: &HashSet<String>) {
        let Some(dir) = self.local_streams() else { return };
        for file in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let of = name.strip_prefix(PIN).unwrap_or(&name);
            // What is half written begins with a tilde as well, and goes by the bound.
            if !of.starts_with('~') && !kept.contains(of) {
                let _ = fs::remove_file(file.path());
            }
        }
    }

    /// Takes the stream of `name` off this host's disk; whether it was there. The store keeps it.
    pub fn cool(&self, name: &Name) -> bool {
        let Some(path) = self.local_stream_path(name) else { return false };
        let _ = fs::remove_file(pin_of(&path));
        fs::remove_file(&path).is_ok()
    }

    /// Notes that the stream of `name` was used, so that others go before it.
    pub(super) fn stream_used(&self, local: &LocalStream) {
        // A file that is only read cannot be marked through its own descriptor everywhere.
        if let Ok(file) = File::options().append(true).open(&local.path) {
            let _ = file.set_modified(SystemTime::now());
        }
    }
}

/// The start of the name of a pin; no snapshot's name begins like that.
const PIN: &str = "~pin-";

fn pin_of(path: &Path) -> PathBuf {
    beside(path, "pin")
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("~{what}-{name}"))
}
