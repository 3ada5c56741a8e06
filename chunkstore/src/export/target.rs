//! Where an export goes: a file, which is there as a whole or stays as it was; a block device; or a stream.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::SeekFrom;

use super::staged::{Staged, parent};
use crate::error::{Result, StoreError};

/// Most symbolic links to follow, as the kernel has it.
const LINKS_MAX: usize = 40;

/// A place that an export is written to.
///
/// A regular file is written without a name, made durable, and put in the place of what was there: a failed or killed
/// export leaves that as it was, and nothing else behind. Symbolic links are followed, and what is at their end is
/// replaced. A new file has the mode that the umask leaves, one that is replaced keeps its mode and, if that is permitted,
/// its owner. Devices, pipes and what `/dev/stdout` stands for are written to directly.
#[derive(Debug)]
pub struct ExportTarget {
    path: PathBuf,
    to: To,
    /// Directory and name, for what has a place in one.
    entry: Option<((u64, u64), OsString)>,
    /// The file that is there.
    node: Option<(u64, u64)>,
}

#[derive(Debug)]
enum To {
    File(Staged),
    Device(File),
    /// A file that some process has open, by the name that `/proc` gives it.
    Opened(File),
    /// Opened when it is written to: a pipe's other end may wait for that of another.
    Stream(Option<File>),
}

/// How bytes get there.
pub(super) enum Way<'a> {
    /// At any place; what is not written is zero.
    Sparse(&'a File),
    /// At any place, and all of it.
    Over(&'a File),
    /// One after the other.
    InOrder(&'a File),
}

impl ExportTarget {
    /// A place for so many bytes. Nothing that is there is touched yet.
    ///
    /// # Errors
    /// [`StoreError::Usage`] for a device that is too small; [`StoreError::File`] for a place that cannot be written to.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let error = |e| StoreError::file("writing", path, e);
        let end = follow(path).map_err(error)?;
        let node = end.meta.as_ref().and_then(node_of);
        let (path, mut entry) = (path.to_owned(), None);
        let kind = end.meta.as_ref().map(Metadata::file_type);
        let open = || File::options().write(true).open(&end.path).map_err(error);
        let to = match kind {
            Some(kind) if kind.is_dir() => return Err(error(io::ErrorKind::IsADirectory.into())),
            Some(kind) if kind.is_block_device() => {
                let device = open()?;
                fits(&device, &path, bytes)?;
                To::Device(device)
            }
            Some(kind) if !kind.is_file() => To::Stream(None),
            Some(_) if end.is_opened => To::Opened(open()?),
            _ => {
                let staged = Staged::beside(&end.path, end.meta.as_ref()).map_err(error)?;
                entry = Some(staged.entry().map_err(error)?);
                To::File(staged)
            }
        };
        Ok(ExportTarget { path, to, entry, node })
    }

    /// This process's standard output, as a stream.
    ///
    /// # Errors
    /// There is none.
    pub fn stdout() -> Result<Self> {
        let path = PathBuf::from("standard output");
        let file = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let file = file.map_err(|e| StoreError::file("writing", &path, e))?;
        let node = file.metadata().ok().as_ref().and_then(node_of);
        Ok(ExportTarget { path, to: To::Stream(Some(file)), entry: None, node })
    }

    /// What it was called when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are one place, however they were spelt: one would overwrite the other.
    pub fn is_same(&self, other: &Self) -> bool {
        let same_entry = self.entry.is_some() && self.entry == other.entry;
        same_entry || (self.node.is_some() && self.node == other.node)
    }

    /// Whether this is where standard output goes.
    pub fn is_standard_output(&self) -> bool {
        Self::stdout().is_ok_and(|stdout| self.is_same(&stdout))
    }

    /// Writes these bytes, and no others.
    ///
    /// # Errors
    /// [`StoreError::File`], [`StoreError::Full`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.path.clone();
        let written = match self.begin(bytes.len() as u64)? {
            Way::Sparse(file) | Way::Over(file) => std::os::unix::fs::FileExt::write_all_at(file, bytes, 0),
            Way::InOrder(mut file) => io::Write::write_all(&mut file, bytes),
        };
        written.map_err(|e| StoreError::file("writing", &path, e))
    }

    /// Makes it as long as what comes.
    pub(super) fn begin(&mut self, bytes: u64) -> Result<Way<'_>> {
        let path = &self.path;
        let error = |e| StoreError::file("writing", path, e);
        match &mut self.to {
            To::File(staged) => {
                staged.file().set_len(bytes).map_err(error)?;
                Ok(Way::Sparse(staged.file()))
            }
            To::Opened(file) => {
                file.set_len(0).and_then(|()| file.set_len(bytes)).map_err(error)?;
                Ok(Way::Sparse(file))
            }
            To::Device(file) => Ok(Way::Over(file)),
            To::Stream(file) => {
                if file.is_none() {
                    *file = Some(File::options().write(true).open(path).map_err(error)?);
                }
                file.as_ref().map(Way::InOrder).ok_or(StoreError::Bug("a stream was not opened"))
            }
        }
    }

    /// What was written is whole: makes it durable and puts it in its place.
    ///
    /// # Errors
    /// [`StoreError::File`], [`StoreError::Full`]: then a file that was there is as it was.
    pub fn finish(self) -> Result<()> {
        let done = match self.to {
            To::File(staged) => staged.publish(),
            To::Device(file) | To::Opened(file) => file.sync_all(),
            To::Stream(_) => Ok(()),
        };
        done.map_err(|e| StoreError::file("writing", &self.path, e))
    }
}

/// What tells a file from others; `None` for the one that swallows all.
fn node_of(meta: &Metadata) -> Option<(u64, u64)> {
    let null = rustix::fs::makedev(1, 3);
    let swallows = meta.file_type().is_char_device() && meta.rdev() == null;
    (!swallows).then(|| (meta.dev(), meta.ino()))
}

fn fits(device: &File, path: &Path, bytes: u64) -> Result<()> {
    let size = rustix::fs::seek(device, SeekFrom::End(0));
    let size = size.map_err(|e| StoreError::file("writing", path, e.into()))?;
    if size >= bytes {
        return Ok(());
    }
    let path = path.display();
    Err(StoreError::Usage(format!(
        "{path} has {size} bytes and {bytes} are to be written; nothing was written, give a larger device or a file"
    )))
}

/// What a path leads to.
struct End {
    path: PathBuf,
    meta: Option<Metadata>,
    /// It goes through a link of `/proc` to a file that is open: that file is meant, not its name.
    is_opened: bool,
}

/// Follows symbolic links, also where nothing is at their end yet.
fn follow(path: &Path) -> io::Result<End> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(End { path, meta: None, is_opened: false });
            }
            Err(e) => return Err(e),
        };
        if !meta.is_symlink() {
            return Ok(End { path, meta: Some(meta), is_opened: false });
        }
        let dir = parent(&path).to_owned();
        if rustix::fs::statfs(&dir)?.f_type == rustix::fs::PROC_SUPER_MAGIC {
            return Ok(End { meta: Some(fs::metadata(&path)?), path, is_opened: true });
        }
        path = dir.join(fs::read_link(&path)?);
    }
    Err(rustix::io::Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_device_is_refused_before_it_is_written_to() {
        let device = tempfile::tempfile().unwrap();
        device.set_len(4096).unwrap();
        fits(&device, Path::new("/dev/x"), 4096).unwrap();
        let why = fits(&device, Path::new("/dev/x"), 4097).unwrap_err();
        assert!(
            matches!(why, StoreError::Usage(_)) && why.to_string().contains("nothing was written"),
            "{why}"
        );
    }
}
