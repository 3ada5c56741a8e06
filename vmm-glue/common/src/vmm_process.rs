//! The VMM at the other end of a handshake: known by a pidfd, so that nobody else is ever killed in its place.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use dormouse_keeper::KeptVm;

use crate::listener::readable_by;
use crate::peer::{Peer, peer_of};

/// A VMM's process.
#[derive(Debug)]
pub struct VmmProcess {
    pidfd: OwnedFd,
    peer: Peer,
}

/// Why a process could not be taken hold of.
#[derive(Debug, thiserror::Error)]
pub enum VmmProcessError {
    /// It has ended.
    #[error("process {} has ended already", .0.pid)]
    Ended(Peer),
    /// The process of this number is another user's, so it is not the one that connected.
    #[error("process {} belongs to user {owner}, but user {} connected: its number was used again", peer.pid, peer.uid)]
    Reused {
        /// Who connected.
        peer: Peer,
        /// Whose process has that number now.
        owner: u32,
    },
    /// The operating system refused.
    #[error("cannot take hold of process {}: {source}", peer.pid)]
    Io {
        /// Who connected.
        peer: Peer,
        /// Its answer.
        source: io::Error,
    },
}

impl VmmProcessError {
    /// Whether it is that the process has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

impl VmmProcess {
    /// The process that made `connection`, by the kernel's word, or that listens at its other end.
    ///
    /// A process number may be used again once its process is gone. So the process is held first, and only
    /// then looked at: it must be alive, of the peer's user, and the connection still open.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub fn of(connection: &UnixStream) -> Result<Self, VmmProcessError> {
        let nobody = Peer { pid: 0, uid: 0 };
        let peer = peer_of(connection).map_err(|source| VmmProcessError::Io { peer: nobody, source })?;
        let io = |source| VmmProcessError::Io { peer, source };
        let pid = Pid::from_raw(peer.pid).ok_or(VmmProcessError::Ended(peer))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| match error {
            rustix::io::Errno::SRCH => VmmProcessError::Ended(peer),
            error => io(error.into()),
        })?;
        let process = Self { pidfd, peer };
        // The owner of its files in /proc is root where it is not dumpable; that is no other user either.
        let owner = std::fs::metadata(format!("/proc/{}", peer.pid)).map(|m| m.uid()).map_err(io)?;
        if owner != peer.uid && owner != 0 {
            return Err(VmmProcessError::Reused { peer, owner });
        }
        if process.has_ended().map_err(io)? || hung_up(connection).map_err(io)? {
            return Err(VmmProcessError::Ended(peer));
        }
        Ok(process)
    }

    /// The process that a pidfd kept from before is of; it was `peer`'s. Its number may differ by now, if this process
    /// is in another container.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub fn of_pidfd(pidfd: OwnedFd, mut peer: Peer) -> Result<Self, VmmProcessError> {
        peer.pid = match pid_of(&pidfd).map_err(|source| VmmProcessError::Io { peer, source })? {
            PidOf::Ended => return Err(VmmProcessError::Ended(peer)),
            PidOf::NotVisible => peer.pid,
            PidOf::Process(pid) => pid,
        };
        let process = Self { pidfd, peer };
        match process.has_ended().map_err(|source| VmmProcessError::Io { peer, source })? {
            true => Err(VmmProcessError::Ended(peer)),
            false => Ok(process),
        }
    }

    /// The process of a kept VM, if that is still there.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub fn of_kept(kept: &KeptVm) -> Result<Self, VmmProcessError> {
        let peer = Peer { pid: kept.record.pid, uid: kept.record.uid };
        let pidfd = kept.process.try_clone().map_err(|source| VmmProcessError::Io { peer, source })?;
        VmmProcess::of_pidfd(pidfd, peer)
    }

    /// A second pidfd.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone_pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Its number and user.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// Polling failed.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait_ended(Duration::ZERO)
    }

    /// Waits until it has ended; false if it has not after `timeout`.
    ///
    /// # Errors
    /// Polling failed.
    pub fn wait_ended(&self, timeout: Duration) -> io::Result<bool> {
        readable_by(self.pidfd.as_fd(), Instant::now() + timeout)
    }

    /// Kills it, and no other process. One that has ended already is as good as killed.
    ///
    /// # Errors
    /// The kernel refused, for example because it is another user's.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What a pidfd says of its process.
enum PidOf {
    Ended,
    /// It has no number here.
    NotVisible,
    Process(i32),
}

fn pid_of(pidfd: &OwnedFd) -> io::Result<PidOf> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    match line.and_then(|pid| pid.trim().parse::<i32>().ok()) {
        None => Err(io::Error::other("the descriptor is not a pidfd")),
        Some(0) => Ok(PidOf::NotVisible),
        Some(pid @ 1..) => Ok(PidOf::Process(pid)),
        Some(_) => Ok(PidOf::Ended),
    }
}

/// Whether the peer has closed `connection`.
fn hung_up(connection: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now))?;
    let [fd] = &fds;
    Ok(fd.revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_peer_that_is_there_is_held_and_one_that_hung_up_is_not() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bind");
        let near = UnixStream::connect(&path).expect("connect");
        let (far, _) = listener.accept().expect("accept");
        let process = VmmProcess::of(&far).expect("held");
        assert_eq!(process.peer().pid, std::process::id() as i32);
        assert!(!process.has_ended().expect("poll"));
        drop(near);
        assert!(matches!(VmmProcess::of(&far), Err(VmmProcessError::Ended(_))));
    }

    #[test]
    fn what_is_killed_is_seen_to_end() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().expect("sleep");
        let pid = Pid::from_raw(child.id() as i32).expect("a number");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
        let peer = Peer { pid: child.id() as i32, uid: rustix::process::geteuid().as_raw() };
        let process = VmmProcess { pidfd, peer };
        process.kill().expect("kill");
        assert!(process.wait_ended(Duration::from_secs(60)).expect("poll"));
        child.wait().expect("wait");
        process.kill().expect("nobody is left to kill");
        let kept = process.try_clone_pidfd().expect("descriptor");
        assert!(matches!(VmmProcess::of_pidfd(kept, peer), Err(VmmProcessError::Ended(_))));
    }

    #[test]
    fn a_kept_pidfd_tells_whose_it_is() {
        let own = rustix::process::getpid();
        let wrong = Peer { pid: 1, uid: 0 };
        let pidfd = pidfd_open(own, PidfdFlags::empty()).expect("pidfd");
        let process = VmmProcess::of_pidfd(pidfd, wrong).expect("alive");
        assert_eq!(process.peer().pid, own.as_raw_nonzero().get());
        let other = std::fs::File::open("/dev/null").expect("open").into();
        assert!(matches!(VmmProcess::of_pidfd(other, wrong), Err(VmmProcessError::Io { .. })));
    }
}
