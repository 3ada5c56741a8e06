//! A file that an import reads, and whether it is still what it was when the import began.
//!
//! A file that somebody writes to while it is read gives an image that never was: the start of one moment and the end of
//! another. So size, times and inode are compared before and after. What cannot be seen: writes to a block device, which
//! has no such times, and writes through a shared mapping to pages that were dirty in the page cache before.

use std::{
    fs::{File, Metadata},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{OFlags, SeekFrom},
    time::{ClockId, clock_gettime},
};

use crate::error::{Result, StoreError};

/// What a file looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Stamp {
            inode: (meta.dev(), meta.ino()),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// How `now` differs, in words.
    fn difference(&self, now: &Stamp) -> Option<String> {
        if self.inode != now.inode {
            Some("another file took its place".into())
        } else if self.bytes != now.bytes {
            Some(format!("it had {} bytes and now has {}", self.bytes, now.bytes))
        } else if self.modified != now.modified {
            Some("it was written to".into())
        } else if self.changed != now.changed {
            Some("it was written to, or its owner, mode or links were changed".into())
        } else {
            None
        }
    }
}

/// A file or block device that is being read.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// `None` for a block device.
    stamp: Option<Stamp>,
    allow_changing: bool,
}

impl Watched {
    /// Opens what has a length and can be read at any place; `allow_changing` makes [`Self::check`] content with all.
    pub(super) fn open(path: &Path, allow_changing: bool) -> Result<Self> {
        let error = |e| StoreError::file("reading", path, e);
        // Before it is opened: to open some of these is to wait, or has effects of its own.
        refuse_streams(path, &std::fs::metadata(path).map_err(error)?)?;
        let nonblock = OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).custom_flags(nonblock).open(path).map_err(error)?;
        let mut meta = file.metadata().map_err(error)?;
        refuse_streams(path, &meta)?;
        let is_device = meta.file_type().is_block_device();
        if !is_device && !allow_changing {
            wait_out_the_tick(&meta);
            meta = file.metadata().map_err(error)?;
        }
        // A block device has no length of its own in its metadata.
        let bytes = if is_device { length(&file).map_err(error)? } else { meta.len() };
        let stamp = (!is_device).then(|| Stamp::of(&meta));
        Ok(Watched { file, path: path.to_owned(), bytes, stamp, allow_changing })
    }

    /// After it was read: whether what was read is what the file is.
    ///
    /// # Errors
    /// [`StoreError::Changed`] if it is not.
    pub(super) fn check(&self) -> Result<()> {
        if self.allow_changing {
            return Ok(());
        }
        let error = |e| StoreError::file("reading", &self.path, e);
        let Some(before) = &self.stamp else {
            let now = length(&self.file).map_err(error)?;
            let grown = || format!("it had {} bytes and now has {now}", self.bytes);
            return if now == self.bytes { Ok(()) } else { Err(self.changed(grown())) };
        };
        if let Some(how) = before.difference(&Stamp::of(&self.file.metadata().map_err(error)?)) {
            return Err(self.changed(how));
        }
        match std::fs::metadata(&self.path) {
            Ok(meta) => before.difference(&Stamp::of(&meta)).map_or(Ok(()), |how| Err(self.changed(how))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(self.changed("it was removed".into())),
            Err(e) => Err(error(e)),
        }
    }

    /// The file ended at `offset`, though it was longer when it was opened.
    ///
    /// # Errors
    /// [`StoreError::Changed`], unless files that change are allowed.
    pub(super) fn ended_at(&self, offset: u64) -> Result<()> {
        if self.allow_changing {
            return Ok(());
        }
        Err(self.changed(format!("it had {} bytes and nothing is left at byte {offset}", self.bytes)))
    }

    fn changed(&self, how: String) -> StoreError {
        StoreError::Changed { path: self.path.display().to_string(), how }
    }
}

/// The length that seeking to the end gives.
fn length(file: &File) -> std::io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Refuses what has no length, or cannot be read twice and out of order.
fn refuse_streams(path: &Path, meta: &Metadata) -> Result<()> {
    let kind = meta.file_type();
    let (what, instead) = if kind.is_dir() {
        ("a directory", "give an image file")
    } else if kind.is_char_device() {
        ("a character device, which has no length", "give a file, a block device, or - for standard input")
    } else if kind.is_fifo() {
        ("a pipe, which cannot be read out of order", "give - and connect it to standard input")
    } else if kind.is_socket() {
        ("a socket", "give a file, a block device, or - for standard input")
    } else {
        return Ok(());
    };
    Err(StoreError::Usage(format!("{} is {what}; {instead}", path.display())))
}

/// Waits until a write to the file is sure to give it another time. Times have the grain of the kernel's tick, so a file
/// that was changed in this very tick could be changed once more without a trace. A tick has at most 10 ms. A file that
/// has no name, such as one in memory, is its owner's affair: nobody waits for it.
fn wait_out_the_tick(meta: &Metadata) {
    const TICK: Duration = Duration::from_millis(10);
    let changed = (meta.ctime(), meta.ctime_nsec());
    if meta.nlink() == 0 {
        return;
    }
    for _ in 0..TICK.as_millis() {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        // A time far ahead is of another clock.
        if (now.tv_sec, now.tv_nsec) > changed || changed.0 > now.tv_sec + 1 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
