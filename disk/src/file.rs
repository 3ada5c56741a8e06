//! The files of an overlay, behind traits, so that tests can record, fail and lose what is done to them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Advice, FallocateFlags, FlockOperation};

/// One file. Only what was there at a successful [`sync`](Self::sync) is sure to be there after a crash.
pub trait DiskFile: Send + Sync {
    /// Fills `into` from `offset` on; past the end of the file is an error.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything written so far durable, as `fdatasync`.
    fn sync(&self) -> io::Result<()>;
    /// Sets the length; what is new reads as zeros.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Makes a hole: zeros that take no space. The length stays.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The length.
    fn length(&self) -> io::Result<u64>;
}

/// The directory of one overlay.
pub trait Directory: Send + Sync {
    /// The file called `name`, if there is one.
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn DiskFile>>>;
    /// A new, empty file called `name`; an old one goes.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Removes the file called `name`, if there is one.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations and removals durable.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the local file system, locked for as long as this lives.
#[derive(Debug)]
pub struct LocalDirectory {
    path: PathBuf,
    handle: File,
}

impl LocalDirectory {
    /// Opens `path`, which is made, for its owner alone. Fails with [`io::ErrorKind::WouldBlock`] if another process has it.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let handle = File::open(path)?;
        rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive)?;
        // Its own name must be durable before anything in it can be.
        if let Some(parent) = path.canonicalize()?.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(LocalDirectory { path: path.to_owned(), handle })
    }
}

impl Directory for LocalDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let file = match OpenOptions::new().read(true).write(true).open(self.path.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // After a failed sync the page cache may show what the disk never got. What is clean is read from the disk anew.
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(Some(Arc::new(LocalFile(file))))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Ok(Arc::new(LocalFile(options.open(self.path.join(name))?)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }
}

#[derive(Debug)]
struct LocalFile(File);

impl DiskFile for LocalFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            &self.0,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length,
        )?)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}
