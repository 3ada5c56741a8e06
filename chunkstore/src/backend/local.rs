//! A local directory: the default store, with fsync of files and directories.
//!
//! Objects are written through `object_store`'s staged writes (temporary file, fsync, link, fsync of the
//! directory). Reads go straight to the file, without a runtime between. References are swapped under a lock
//! file, because a file system has no compare-and-swap.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::UNIX_EPOCH,
};

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use rustix::fs::{FlockOperation, flock};

use super::{
    Backend, Leftovers, MUTABLE_BYTES_MAX, ObjectMeta, PutOutcome, Version, object::ObjectBackend, reserve,
    runner::Runner,
};
use crate::{
    error::{Result, StoreError},
    page_cache::read_at_hand,
};

/// The file that serialises swaps of references. Holds nothing.
const LOCK: &str = "lock";

#[derive(Debug)]
pub(super) struct LocalBackend {
    root: PathBuf,
    url: String,
    /// For writing; with it the directory is made.
    objects: OnceLock<ObjectBackend>,
}

impl LocalBackend {
    /// Opens a directory. Where there is none yet, the first write makes it.
    pub(super) fn open(root: &Path, url: String) -> Result<Self> {
        let root = match root.canonicalize() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => std::path::absolute(root),
            found => found,
        };
        let root = root.map_err(|e| StoreError::file("opening the store at", url.as_ref(), e))?;
        let local = LocalBackend { root, url, objects: OnceLock::new() };
        if local.root.exists() {
            local.objects()?;
        }
        Ok(local)
    }

    fn objects(&self) -> Result<&ObjectBackend> {
        if let Some(objects) = self.objects.get() {
            return Ok(objects);
        }
        let root = &self.root;
        std::fs::create_dir_all(root).map_err(|e| StoreError::file("making the store directory", root, e))?;
        let store = LocalFileSystem::new_with_prefix(root)
            .map_err(|e| StoreError::Usage(format!("{} cannot be used as a store: {e}", root.display())))?
            .with_fsync(true);
        let objects = ObjectBackend {
            url: self.url.clone(),
            prefix: object_store::path::Path::default(),
            store: Arc::new(store),
            runner: Runner::INLINE,
            keeps_conditions: true,
            worked: false.into(),
        };
        Ok(self.objects.get_or_init(|| objects))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    fn open_file(&self, key: &str) -> Result<Option<File>> {
        match File::open(self.path(key)) {
            Ok(file) => Ok(Some(file)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(self.io_error(format!("reading {key}"), e)),
        }
    }

    fn io_error(&self, doing: String, e: io::Error) -> StoreError {
        let store = self.url.clone();
        let why = e.to_string();
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { doing },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                StoreError::Denied { doing, store, why }
            }
            _ => StoreError::Unavailable { doing, store, why },
        }
    }

    fn sync_directory_of(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        let synced = File::open(path.parent().unwrap_or(&self.root)).and_then(|d| d.sync_all());
        synced.map_err(|e| self.io_error(format!("syncing the directory of {key}"), e))
    }

    /// Holds the lock until the file is dropped; the kernel lets go of it if the process dies.
    fn lock(&self) -> Result<File> {
        self.objects()?;
        let path = self.path(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| self.io_error("locking the store".into(), e))?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(self.io_error("locking the store".into(), e.into())),
            }
        }
    }
}

/// Of what is read of an object: more of it than that is damage, whatever it is.
fn version_of(bytes: &[u8]) -> Version {
    Version { e_tag: Some(blake3::hash(bytes).to_hex().to_string()), version: None }
}

impl Backend for LocalBackend {
    fn url(&self) -> &str {
        &self.url
    }

    fn is_local(&self) -> bool {
        true
    }

    fn keeps_conditions(&self) -> bool {
        true
    }

    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>> {
        let Some(file) = self.open_file(key)? else { return Ok(None) };
        let error = |e| self.io_error(format!("reading {key}"), e);
        let size = file.metadata().map_err(error)?.len();
        let range = range.unwrap_or(0..size);
        let end = range.end.min(size);
        let start = range.start.min(end);
        let mut bytes = vec![0; (end - start) as usize];
        match file.read_exact_at(&mut bytes, start) {
            Ok(()) => Ok(Some(bytes.into())),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Some(Bytes::new())),
            Err(e) => Err(error(e)),
        }
    }

    /// From the page cache, else not at all.
    fn get_at_hand(&self, key: &str, range: Range<u64>, into: &mut Vec<u8>) -> bool {
        let bytes = range.end.checked_sub(range.start).and_then(|n| usize::try_from(n).ok());
        let (Some(bytes), Ok(file)) = (bytes, File::open(self.path(key))) else { return false };
        into.resize(bytes, 0);
        read_at_hand(&file, &mut [io::IoSliceMut::new(into)], range.start)
    }

    fn file(&self, key: &str) -> Option<File> {
        File::open(self.path(key)).ok()
    }

    fn head(&self, key: &str) -> Result<Option<u64>> {
        match std::fs::metadata(self.path(key)) {
            Ok(meta) if meta.is_file() => Ok(Some(meta.len())),
            Ok(_) => Ok(None),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(self.io_error(format!("looking up {key}"), e)),
        }
    }

    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome> {
        let outcome = self.objects()?.put_new(key, bytes)?;
        if outcome == PutOutcome::Exists {
            // Whoever made it may not have come to this yet, and what is acknowledged here must be durable.
            self.sync_directory_of(key)?;
        }
        Ok(outcome)
    }

    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.objects()?.put_again(key, bytes)
    }

    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)> {
        Ok(match self.get(key, Some(0..MUTABLE_BYTES_MAX + 1))? {
            Some(bytes) => {
                let version = version_of(&bytes);
                ((!bytes.is_empty()).then_some(bytes), Some(version))
            }
            None => (None, None),
        })
    }

    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let _lock = self.lock()?;
        let (_, now) = self.get_versioned(key)?;
        if now.as_ref() != expected {
            return Ok(false);
        }
        if bytes.is_empty() {
            self.delete(key)?;
        } else {
            self.objects()?.put_again(key, bytes)?;
        }
        Ok(true)
    }

    fn swap_without_room(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool> {
        let _lock = self.lock()?;
        let (now, version) = self.get_versioned(key)?;
        if version.as_ref() != expected {
            return Ok(false);
        }
        if now.is_none_or(|now| now.len() < bytes.len()) {
            return Err(StoreError::Full { doing: format!("moving {key}") });
        }
        let write = || {
            let file = File::options().write(true).open(self.path(key))?;
            file.write_all_at(&bytes, 0)?;
            file.set_len(bytes.len() as u64)?;
            file.sync_all()
        };
        write().map(|()| true).map_err(|e| self.io_error(format!("moving {key}"), e))
    }

    fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(());
            }
            Err(e) => return Err(self.io_error(format!("deleting {key}"), e)),
        }
        self.sync_directory_of(key)
    }

    /// Whatever is there and cannot be looked at is an error, never left out: to the collector, a reference that is not
    /// listed is a snapshot that nobody wants any more.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()> {
        let mut folders = vec![(prefix.to_owned(), self.path(prefix))];
        while let Some((prefix, folder)) = folders.pop() {
            let error = |e| self.io_error(format!("listing {}", folder.display()), e);
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(_) if is_gone(&folder) => continue,
                Err(e) => return Err(error(e)),
            };
            for entry in entries {
                let entry = entry.map_err(error)?;
                let (name, path) = (entry.file_name(), entry.path());
                if is_staged(&name) {
                    continue;
                }
                // Through links: a folder of the store may have been put elsewhere.
                let meta = match std::fs::metadata(&path) {
                    Ok(meta) => meta,
                    // Deleted between the listing and the look at it.
                    Err(_) if is_gone(&path) => continue,
                    Err(e) => return Err(error(e)),
                };
                let Some(name) = name.to_str() else { continue };
                let key = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
                if meta.is_dir() {
                    folders.push((key, path));
                } else {
                    let modified_unix_ms = modified_unix_ms(&meta);
                    each(ObjectMeta { key, bytes: meta.len(), modified_unix_ms });
                }
            }
        }
        Ok(())
    }

    fn folders(&self) -> Result<Vec<String>> {
        let error = |e| self.io_error("listing the store".into(), e);
        let entries = match std::fs::read_dir(&self.root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(error)?,
        };
        let mut folders = Vec::new();
        for entry in entries {
            let entry = entry.map_err(error)?;
            if entry.path().is_dir() {
                folders.extend(entry.file_name().into_string());
            }
        }
        Ok(folders)
    }

    fn sweep_leftovers(&self, prefix: &str, before_unix_ms: u64, dry_run: bool) -> Result<Leftovers> {
        let mut swept = Leftovers::default();
        let mut folders = vec![self.path(prefix)];
        while let Some(folder) = folders.pop() {
            let error = |e| self.io_error(format!("looking for leftovers in {}", folder.display()), e);
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => continue,
                Err(e) => return Err(error(e)),
            };
            for entry in entries {
                let entry = entry.map_err(error)?;
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    folders.push(entry.path());
                } else if is_staged(&entry.file_name()) && modified_unix_ms(&meta) < before_unix_ms {
                    swept.files += 1;
                    swept.bytes += meta.len();
                    if !dry_run {
                        match std::fs::remove_file(entry.path()) {
                            // Its writer was slow and is done after all.
                            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                            removed => removed.map_err(error)?,
                        }
                    }
                }
            }
        }
        Ok(swept)
    }

    fn keep_reserve(&self) {
        if let Err(why) = reserve::keep(&self.root) {
            tracing::debug!(%why, "no room is kept back for when the disk is full");
        }
    }

    fn release_reserve(&self) -> bool {
        reserve::release(&self.root)
    }
}

/// Whether a file is what `object_store` writes before it links it to its name: the name, `#` and a number.
fn is_staged(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether there is nothing of this name, not even a link that leads nowhere.
fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}

fn modified_unix_ms(meta: &std::fs::Metadata) -> u64 {
    let since = meta.modified().ok().and_then(|m| m.duration_since(UNIX_EPOCH).ok());
    // One whose age is not known is left alone.
    since.map_or(u64::MAX, |d| d.as_millis() as u64)
}
