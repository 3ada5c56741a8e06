//! A socket that a VMM, or whoever asks for something, connects to: made so that nobody else can.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, CWD, Mode, Uid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Peers that may wait to be accepted, as far as the kernel allows (`net.core.somaxconn`): more than anybody answers at a
/// time, as one that finds no room is refused (`EAGAIN`) rather than kept waiting.
const BACKLOG: i32 = 1024;

/// A listening Unix socket with mode 0600. Dropping it removes its file, if that is still the one it made.
#[derive(Debug)]
pub struct HandshakeListener {
    socket: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    peer_uid: u32,
}

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{0} is in use: another process listens on it. End that one or choose another path")]
    InUse(PathBuf),
    /// Something that is not a socket is there; it is left alone.
    #[error("{0} exists and is not a socket: remove it yourself or choose another path")]
    NotASocket(PathBuf),
    /// The path is longer than a Unix socket's may be.
    #[error("{0} is too long for a Unix socket: 107 bytes at most")]
    TooLong(PathBuf),
    /// The operating system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
}

impl HandshakeListener {
    /// Listens at `path` for a peer of this process's own user.
    ///
    /// # Errors
    /// [`ListenError`]. A stale socket, on which nobody listens, is replaced; nothing else ever is.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        Self::bind_for(path, rustix::process::geteuid().as_raw())
    }

    /// Listens at `path` for a peer of user `uid`, as for a jailed Firecracker. The socket's file is given to
    /// that user, which takes privilege unless it is this process's own.
    ///
    /// # Errors
    /// As [`HandshakeListener::bind`].
    pub fn bind_for(path: &Path, uid: u32) -> Result<Self, ListenError> {
        let io =
            |what| move |error: io::Error| ListenError::Io { what, path: path.to_owned(), source: error };
        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::TooLong(path.to_owned()))?;
        remove_stale_socket(path)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|e| io("make a socket for")(e.into()))?;
        // On Linux `bind` creates the file with the mode the socket's inode has, so that there is no moment
        // at which the file is there and open to others, and no need to change the process's umask.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| io("restrict")(e.into()))?;
        rustix::net::bind(&socket, &address).map_err(|e| match e {
            rustix::io::Errno::ADDRINUSE => ListenError::InUse(path.to_owned()),
            e => io("bind")(e.into()),
        })?;
        let file = std::fs::symlink_metadata(path).map_err(io("look at"))?;
        if file.uid() != uid {
            rustix::fs::chownat(CWD, path, Some(Uid::from_raw(uid)), None, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| io("give to the peer's user")(e.into()))?;
        }
        rustix::net::listen(&socket, BACKLOG).map_err(|e| io("listen on")(e.into()))?;
        Ok(Self {
            socket: UnixListener::from(socket),
            path: path.to_owned(),
            inode: (file.dev(), file.ino()),
            peer_uid: uid,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A second descriptor of the socket, for who accepts by other means and asks peers who they are.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone_socket(&self) -> io::Result<UnixListener> {
        self.socket.try_clone()
    }

    /// The user whose processes may connect.
    pub fn peer_uid(&self) -> u32 {
        self.peer_uid
    }

    /// The next connection, whoever makes it; `None` if there is none within `wait`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connection(&self, wait: Duration) -> io::Result<Option<UnixStream>> {
        self.accept(Instant::now() + wait)
    }

    /// The next connection, whoever makes it; `None` if there is none until `deadline`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn accept(&self, deadline: Instant) -> io::Result<Option<UnixStream>> {
        if !readable_by(self.socket.as_fd(), deadline)? {
            return Ok(None);
        }
        let stream = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        Ok(Some(UnixStream::from(stream)))
    }
}

impl Drop for HandshakeListener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket's file stays behind");
        }
    }
}

/// Waits until `fd` can be read (or its peer is gone); false if it cannot until `deadline`.
///
/// # Errors
/// Polling failed.
pub fn readable_by(fd: std::os::fd::BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timespec(left))) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// Removes a socket's file at `path` if nobody listens on it. Nothing there is fine.
///
/// # Errors
/// [`ListenError`]: whatever else is there is left alone.
pub fn remove_stale_socket(path: &Path) -> Result<(), ListenError> {
    let io = |what| move |source| ListenError::Io { what, path: path.to_owned(), source };
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("look at")(error)),
    };
    if !file.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io("remove the stale socket"))
        }
        // Accepted, or refused for a reason that only a listener has.
        Ok(_) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(io("probe")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that finds no room is refused, and beyond eight there was none.
    #[test]
    fn as_many_may_wait_as_are_answered_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let _listener = HandshakeListener::bind(&path).expect("listening");
        let address = SocketAddrUnix::new(&path).expect("short");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let peers: Vec<_> = (0..300)
            .map(|n| {
                let peer = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                    .expect("a socket");
                rustix::net::connect(&peer, &address).unwrap_or_else(|e| panic!("peer {n}: {e}"));
                peer
            })
            .collect();
        assert_eq!(peers.len(), 300);
    }
}
