//! The holder's socket: one holder a path, reached by its own user only.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::HolderError;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// A listening socket. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct HolderSocket {
    pub(super) fd: OwnedFd,
    path: PathBuf,
    /// Locked for as long as somebody holds at this path.
    _lock: OwnedFd,
}

impl HolderSocket {
    /// Listens at `path`; `None` if another holder does.
    pub(super) fn bind(path: &Path) -> Result<Option<Self>, HolderError> {
        let io =
            |what| move |error: Errno| HolderError::Io { what, path: path.to_owned(), error: error.into() };
        let address = address(path)?;
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock =
            rustix::fs::open(&lock_path, flags, Mode::RUSR | Mode::WUSR).map_err(io("opening its lock"))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(io("locking it")(error)),
        }
        // With the lock, whatever socket is there is nobody's any more.
        match std::fs::symlink_metadata(path) {
            Ok(file) if !file.file_type().is_socket() => {
                return Err(HolderError::NotASocket(path.to_owned()));
            }
            Ok(_) => rustix::fs::unlink(path).map_err(io("removing a stale socket"))?,
            Err(_) => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(io("making a socket"))?;
        // On Linux `bind` creates the file with the mode the socket's inode has: there is no moment at which it is
        // there and open to others.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(io("restricting the socket"))?;
        rustix::net::bind(&fd, &address).map_err(io("binding the socket"))?;
        rustix::net::listen(&fd, BACKLOG).map_err(io("listening"))?;
        Ok(Some(HolderSocket { fd, path: path.to_owned(), _lock: lock }))
    }

    /// The next connection that waits, with its process's user.
    pub(super) fn accept(&self) -> rustix::io::Result<(OwnedFd, u32)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connection = rustix::net::accept_with(&self.fd, flags)?;
        let user = rustix::net::sockopt::socket_peercred(&connection)?.uid.as_raw();
        Ok((connection, user))
    }
}

impl Drop for HolderSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to the holder at `path`, which must be of this process's user.
pub(super) fn connect(path: &Path) -> Result<OwnedFd, HolderError> {
    let io = |what| move |error: Errno| HolderError::Io { what, path: path.to_owned(), error: error.into() };
    let address = address(path)?;
    let flags = SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(io("making a socket"))?;
    rustix::net::connect(&fd, &address).map_err(io("connecting"))?;
    let holder = rustix::net::sockopt::socket_peercred(&fd).map_err(io("asking who listens"))?;
    if holder.uid != rustix::process::geteuid() {
        return Err(io("another user's process listens there")(Errno::PERM));
    }
    Ok(fd)
}

fn address(path: &Path) -> Result<SocketAddrUnix, HolderError> {
    SocketAddrUnix::new(path).map_err(|_| HolderError::TooLong(path.to_owned()))
}
