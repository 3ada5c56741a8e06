//! A jailed Firecracker: another user, another root. Files in memory and a socket where it can see them.
//!
//! In its `chroot` there is no `/proc`, so a nameless file in memory cannot be opened there by a path, and its
//! directory may be on a disk. So for as long as it is needed a small file system in memory is mounted in the jail's
//! own mount namespace, below a directory of a name that nobody else has. No other process sees it, nothing of it is
//! ever on a disk, and files that are open stay when it is taken away.

use std::ffi::CString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Uid;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::memfile::MemFile;
use crate::sys::namespace::in_mount_namespace;
use dormouse_vmm_common::listener::{HandshakeListener, ListenError};
use dormouse_vmm_common::vmm_process::VmmProcess;

/// A place in a jail. Dropping it takes it away.
#[derive(Debug)]
pub struct Jail {
    namespace: OwnedFd,
    uid: u32,
    /// As the jailed process sees it.
    directory: PathBuf,
}

/// Why nothing can be put into a jail.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the jail of process {pid}: {source}; this takes root")]
pub struct JailError {
    what: &'static str,
    pid: i32,
    source: io::Error,
}

impl Jail {
    /// A place in the jail of `process`; none if that sees the same root directory as this process.
    ///
    /// # Errors
    /// [`JailError`].
    pub fn of(process: &VmmProcess) -> Result<Option<Self>, JailError> {
        let peer = process.peer();
        let failed = |what| move |source| JailError { what, pid: peer.pid, source };
        let root = |whose: &str| std::fs::metadata(format!("{whose}/.")).map(|m| (m.dev(), m.ino()));
        match (root(&format!("/proc/{}/root", peer.pid)), root("")) {
            (Ok(theirs), Ok(ours)) if theirs != ours => {}
            // Whose root cannot be looked at is treated like one of this process's own kind, as it always was.
            _ => return Ok(None),
        }
        let namespace = File::open(format!("/proc/{}/ns/mnt", peer.pid)).map_err(failed("enter"))?;
        // Alive now, so the number was its own.
        if process.has_ended().map_err(failed("enter"))? {
            return Err(failed("enter")(io::ErrorKind::NotFound.into()));
        }
        let directory = PathBuf::from(format!("/.dormouse-{:016x}", chance().map_err(failed("enter"))?));
        let jail = Jail { namespace: namespace.into(), uid: peer.uid, directory };
        let made = in_mount_namespace(jail.namespace.as_fd(), || {
            DirBuilder::new().mode(0o700).create(&jail.directory)?;
            mount_memory(&jail.directory, jail.uid)
        });
        made.map_err(failed("make a file system in"))?;
        Ok(Some(jail))
    }

    /// An empty file called `name`, open here and for the jailed process to open.
    ///
    /// # Errors
    /// No memory.
    pub fn file(&self, name: &str) -> io::Result<MemFile> {
        let path = self.directory.join(name);
        let file = in_mount_namespace(self.namespace.as_fd(), || {
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            rustix::fs::fchown(&file, Some(Uid::from_raw(self.uid)), None)?;
            Ok(file)
        })?;
        Ok(MemFile::seen_as(file, path))
    }

    /// A file that holds `bytes`.
    ///
    /// # Errors
    /// As [`Jail::file`].
    pub fn file_holding(&self, name: &str, bytes: &[u8]) -> io::Result<MemFile> {
        let made = self.file(name)?;
        made.as_file().write_all(bytes)?;
        Ok(made)
    }

    /// A socket for the jailed process, and no other user, to connect to; and its path as that sees it.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(&self, name: &str) -> Result<(HandshakeListener, PathBuf), ListenError> {
        let path = self.directory.join(name);
        let mut listening = None;
        let done = in_mount_namespace(self.namespace.as_fd(), || {
            listening = Some(HandshakeListener::bind_for(&path, self.uid));
            Ok(())
        });
        match (listening, done) {
            (Some(listening), _) => Ok((listening?, path)),
            (None, outcome) => Err(ListenError::Io {
                what: "listen in the jail at",
                path,
                source: outcome.err().unwrap_or_else(|| io::ErrorKind::Other.into()),
            }),
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        let gone = in_mount_namespace(self.namespace.as_fd(), || {
            unmount(&self.directory, UnmountFlags::DETACH)?;
            std::fs::remove_dir(&self.directory)
        });
        if let Err(error) = gone {
            tracing::warn!(directory = %self.directory.display(), %error, "something stays behind in a jail");
        }
    }
}

fn chance() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// As large as need be, and without huge pages, which would blur what changed.
fn mount_memory(at: &Path, uid: u32) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options =
        |more: &str| CString::new(format!("mode=0700,uid={uid},size=0{more}")).map_err(io::Error::other);
    match mount("dormouse", at, "tmpfs", flags, options(",huge=never")?.as_c_str()) {
        // Kernels without huge pages do not know the option.
        Err(rustix::io::Errno::INVAL) => Ok(mount("dormouse", at, "tmpfs", flags, options("")?.as_c_str())?),
        outcome => Ok(outcome?),
    }
}
