//! Receiving the userfaultfd and the region list.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use dormouse_vmm_common::listener::{HandshakeListener, readable_by};
pub use dormouse_vmm_common::peer::Peer;
use dormouse_vmm_common::peer::peer_of;

use super::regions::{MESSAGE_BYTES_MAX, Region, RegionsError, parse_regions};

/// Descriptors one message has room for; more than one is refused anyway.
const DESCRIPTORS_ROOM: usize = 4;

/// What Firecracker handed over.
#[derive(Debug)]
pub struct Handshake {
    /// The userfaultfd, close-on-exec. Closing it while Firecracker lives gives its guest zero pages.
    pub uffd: OwnedFd,
    /// The memory it guards.
    pub regions: Vec<Region>,
    /// Firecracker's process, as the kernel knows it.
    pub peer: Peer,
    /// The connection, which Firecracker keeps open as long as it lives: end-of-file tells that it has ended.
    pub connection: UnixStream,
}

/// Why a handshake failed. The connection it came on is closed, with all descriptors that came on it; the
/// listener is as good as before.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nobody connected in time.
    #[error("nobody connected within {0:?}: was /snapshot/load called with this socket as its Uffd backend?")]
    NobodyCame(Duration),
    /// The peer is another user's process.
    #[error("process {} of user {} connected, where only user {allowed} may", peer.pid, peer.uid)]
    WrongUser {
        /// Who came.
        peer: Peer,
        /// Who may.
        allowed: u32,
    },
    /// The peer closed the connection before its message was whole.
    #[error("the peer closed the connection after {bytes} bytes, before its region list was whole")]
    HungUp {
        /// Bytes received.
        bytes: usize,
    },
    /// The message was not whole in time.
    #[error("the peer sent {bytes} bytes and then nothing: its region list is not whole")]
    Stalled {
        /// Bytes received.
        bytes: usize,
    },
    /// The message is wrong.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// Not exactly one descriptor came with it.
    #[error("{count} descriptors came with the region list, where exactly one userfaultfd belongs")]
    Descriptors {
        /// How many, as far as they were counted.
        count: usize,
    },
    /// The descriptor is something else.
    #[error("the descriptor received is {found:?}, not a userfaultfd")]
    NotUserfaultfd {
        /// What it is, as `/proc` names it.
        found: String,
    },
    /// The operating system refused.
    #[error("receiving the handshake: {0}")]
    Io(#[from] io::Error),
}

/// Takes the next connection of `listener` and receives its handshake, all within `timeout`.
///
/// # Errors
/// [`HandshakeError`]. Other connections are not disturbed: call again to wait for the right peer.
pub fn accept_handshake(
    listener: &HandshakeListener,
    timeout: Duration,
) -> Result<Handshake, HandshakeError> {
    let deadline = Instant::now() + timeout;
    let connection = listener.accept(deadline)?.ok_or(HandshakeError::NobodyCame(timeout))?;
    receive_handshake(connection, listener.peer_uid(), deadline)
}

/// Receives the handshake of a peer that has connected and must be of user `allowed`.
pub(super) fn receive_handshake(
    connection: UnixStream,
    allowed: u32,
    deadline: Instant,
) -> Result<Handshake, HandshakeError> {
    let peer = peer_of(&connection)?;
    if peer.uid != allowed {
        return Err(HandshakeError::WrongUser { peer, allowed });
    }
    let (regions, mut descriptors) = receive(&connection, deadline)?;
    let count = descriptors.len();
    let uffd = match descriptors.pop() {
        Some(only) if count == 1 => only,
        _ => return Err(HandshakeError::Descriptors { count }),
    };
    check_userfaultfd(&uffd)?;
    Ok(Handshake { uffd, regions, peer, connection })
}

/// Receives until the region list is whole. The connection stays open, so its own syntax has to tell.
fn receive(
    connection: &UnixStream,
    deadline: Instant,
) -> Result<(Vec<Region>, Vec<OwnedFd>), HandshakeError> {
    let mut message = Vec::new();
    let mut descriptors = Vec::new();
    loop {
        if !readable_by(connection.as_fd(), deadline)? {
            return Err(HandshakeError::Stalled { bytes: message.len() });
        }
        let received = receive_some(connection, &mut message, &mut descriptors)?;
        if descriptors.len() > 1 {
            return Err(HandshakeError::Descriptors { count: descriptors.len() });
        }
        if received == 0 {
            return Err(HandshakeError::HungUp { bytes: message.len() });
        }
        match parse_regions(&message) {
            Ok(regions) => return Ok((regions, descriptors)),
            Err(error) if error.is_incomplete() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive_some(
    connection: &UnixStream,
    message: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, HandshakeError> {
    // One byte more than allowed, so that too long a message is seen to be.
    let mut buffer = vec![0; MESSAGE_BYTES_MAX + 1 - message.len()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_ROOM))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(connection, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    };
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            descriptors.extend(fds);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // The kernel has dropped those for which there was no room.
        return Err(HandshakeError::Descriptors { count: descriptors.len() + 1 });
    }
    message.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
    Ok(received.bytes)
}

fn check_userfaultfd(fd: &OwnedFd) -> Result<(), HandshakeError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() == "anon_inode:[userfaultfd]" {
        Ok(())
    } else {
        Err(HandshakeError::NotUserfaultfd { found: link.display().to_string() })
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
