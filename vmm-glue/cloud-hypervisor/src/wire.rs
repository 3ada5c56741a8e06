//! Reading and writing of the protocol's messages: nothing is waited for without an end, and nothing allocated
//! because a peer announced it.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::protocol::{Command, GuestRange, HEAD_BYTES, ProtocolError, Request, Response};
use dormouse_vmm_common::listener::readable_by;
use dormouse_vmm_common::peer::{Peer, peer_of};

/// Bytes of a payload read, and made room for, at once.
const STEP_BYTES: usize = 64 << 10;
/// Descriptors one message has room for; more than one is refused anyway.
const DESCRIPTORS_ROOM: usize = 4;
/// How long the next request is looked for before sleeping: waking up takes longer than most answers.
const SPIN: Duration = Duration::from_micros(50);

/// Why an exchange with the peer failed.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection's end came within a message, or where one was due.
    #[error("the peer closed the connection after {bytes} bytes of {what}: see its log for why")]
    HungUp {
        /// What was being read.
        what: &'static str,
        /// Bytes of it received.
        bytes: usize,
    },
    /// The peer fell silent.
    #[error("the peer sent {bytes} bytes of {what} and then nothing for {patience:?}")]
    Stalled {
        /// What was being read.
        what: &'static str,
        /// Bytes of it received.
        bytes: usize,
        /// How long it was waited for.
        patience: Duration,
    },
    /// What it sent is wrong.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// Not exactly one descriptor came with a memory slot.
    #[error("{count} descriptors came with a memory slot, where exactly one memory file belongs")]
    Descriptors {
        /// How many, as far as they were counted.
        count: usize,
    },
    /// It refused what was sent.
    #[error("Cloud Hypervisor refused {0:?}: its log, or the answer of its API, says why")]
    Refused(Command),
    /// It is another user's process.
    #[error("process {} of user {} is at the other end, where only user {allowed} may be", peer.pid, peer.uid)]
    WrongUser {
        /// Who is there.
        peer: Peer,
        /// Who may be.
        allowed: u32,
    },
    /// The operating system refused.
    #[error("talking to Cloud Hypervisor: {0}")]
    Io(#[from] io::Error),
}

/// A connection to a Cloud Hypervisor of a known user.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
    peer: Peer,
    patience: Duration,
}

impl Wire {
    /// Speaks on `stream` with a process of user `allowed`. A message that is due may take `patience`.
    ///
    /// # Errors
    /// [`WireError::WrongUser`].
    pub fn new(stream: UnixStream, allowed: u32, patience: Duration) -> Result<Self, WireError> {
        let peer = peer_of(&stream)?;
        if peer.uid != allowed {
            return Err(WireError::WrongUser { peer, allowed });
        }
        stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        Ok(Self { stream, peer, patience })
    }

    /// Who is at the other end, by the kernel's word.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next request's head.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn request(&self) -> Result<Request, WireError> {
        let mut head = [0; HEAD_BYTES];
        self.read("a request", &mut head, None)?;
        Ok(Request::decode(&head)?)
    }

    /// The payload of `request`, whose length its decoding has checked.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn payload(&self, request: &Request) -> Result<Vec<u8>, WireError> {
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let at = bytes.len();
            bytes.resize(at + STEP_BYTES.min(length - at), 0);
            self.read("a payload", &mut bytes[at..], None)?;
        }
        Ok(bytes)
    }

    /// The payload of a `MemoryFd` request: the slot's number and its memory file.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn memory_fd(&self) -> Result<(u32, OwnedFd), WireError> {
        let (mut slot, mut descriptors) = ([0; 4], Vec::new());
        self.read("a memory slot's number", &mut slot, Some(&mut descriptors))?;
        let count = descriptors.len();
        match descriptors.pop() {
            Some(only) if count == 1 => Ok((u32::from_le_bytes(slot), only)),
            _ => Err(WireError::Descriptors { count }),
        }
    }

    /// The next request on a connection for page faults, waited for as long as it takes; `None` at its end, also
    /// within a message, as of a VMM that was killed.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn fault_request(&self) -> Result<Option<FaultRequest>, WireError> {
        match self.whole_fault_request() {
            Err(WireError::HungUp { .. }) => Ok(None),
            got => got,
        }
    }

    fn whole_fault_request(&self) -> Result<Option<FaultRequest>, WireError> {
        let mut head = [0; HEAD_BYTES];
        let Some(first) = self.first_of(&mut head)? else { return Ok(None) };
        self.read("a request", &mut head[first..], None)?;
        let request = Request::decode(&head)?;
        match request.command {
            Command::PageFault => {
                let mut range = [0; HEAD_BYTES];
                self.read("a range", &mut range, None)?;
                Ok(Some(FaultRequest::Pages(GuestRange::decode(&range)?)))
            }
            Command::Abandon => Ok(Some(FaultRequest::Abandon)),
            command => {
                let expected = "PageFault or Abandon";
                Err(ProtocolError::OutOfOrder { command, expected }.into())
            }
        }
    }

    /// Sends an answer.
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn respond(&self, response: Response) -> Result<(), WireError> {
        self.write(&response.encode())
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// [`WireError::HungUp`], [`WireError::Io`].
    pub fn write(&self, bytes: &[u8]) -> Result<(), WireError> {
        (&self.stream).write_all(bytes).map_err(sending)
    }

    /// Sends a request and waits until it is done.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn ask(&self, command: Command, payload: &[u8]) -> Result<(), WireError> {
        self.write(&Request { command, length: payload.len() as u64 }.encode())?;
        self.write(payload)?;
        self.answered(command)
    }

    /// Sends a memory slot with its file and waits until it was taken.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn ask_memory_fd(&self, slot: u32, file: BorrowedFd<'_>) -> Result<(), WireError> {
        let number = slot.to_le_bytes();
        self.write(&Request { command: Command::MemoryFd, length: number.len() as u64 }.encode())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.stream, &[IoSlice::new(&number)], &mut ancillary, SendFlags::NOSIGNAL)
        });
        let sent = sent.map_err(|e| sending(e.into()))?;
        // What is left of four bytes, if anything, needs no descriptor.
        self.write(&number[sent..])?;
        self.answered(Command::MemoryFd)
    }

    fn answered(&self, command: Command) -> Result<(), WireError> {
        let mut head = [0; HEAD_BYTES];
        self.read("an answer", &mut head, None)?;
        match Response::decode(&head)? {
            Response::Ok => Ok(()),
            Response::Error => Err(WireError::Refused(command)),
        }
    }

    /// Fills `into`, all within the patience.
    fn read(
        &self,
        what: &'static str,
        into: &mut [u8],
        mut descriptors: Option<&mut Vec<OwnedFd>>,
    ) -> Result<(), WireError> {
        let deadline = Instant::now() + self.patience;
        let mut bytes = 0;
        while bytes < into.len() {
            match self.receive(&mut into[bytes..], descriptors.as_deref_mut())? {
                Some(0) => return Err(WireError::HungUp { what, bytes }),
                Some(got) => bytes += got,
                None if readable_by(self.stream.as_fd(), deadline)? => {}
                None => return Err(WireError::Stalled { what, bytes, patience: self.patience }),
            }
        }
        Ok(())
    }

    /// The first bytes of a message, waited for as long as it takes; `None` at the connection's end.
    fn first_of(&self, into: &mut [u8]) -> Result<Option<usize>, WireError> {
        let looked_since = Instant::now();
        loop {
            match self.receive(into, None)? {
                Some(got) => return Ok((got > 0).then_some(got)),
                None if looked_since.elapsed() < SPIN => std::hint::spin_loop(),
                None => drop(readable_by(self.stream.as_fd(), Instant::now() + Duration::from_secs(3600))?),
            }
        }
    }

    /// What has arrived; `None` if nothing has. Descriptors that nobody asked for are closed by the kernel.
    fn receive(
        &self,
        into: &mut [u8],
        descriptors: Option<&mut Vec<OwnedFd>>,
    ) -> Result<Option<usize>, WireError> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_ROOM))];
        let mut ancillary = match descriptors {
            Some(_) => RecvAncillaryBuffer::new(&mut space),
            None => RecvAncillaryBuffer::default(),
        };
        let received = loop {
            match rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(into)], &mut ancillary, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                // A peer that was killed with bytes of ours unread.
                Err(rustix::io::Errno::CONNRESET) => return Ok(Some(0)),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        };
        if let Some(descriptors) = descriptors {
            for part in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = part {
                    descriptors.extend(fds);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                // The kernel has dropped those for which there was no room.
                return Err(WireError::Descriptors { count: descriptors.len() + 1 });
            }
        }
        Ok(Some(received.bytes))
    }
}

/// Why nothing could be sent.
fn sending(error: io::Error) -> WireError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            WireError::HungUp { what: "an answer", bytes: 0 }
        }
        _ => WireError::Io(error),
    }
}

/// What may come on a connection for page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultRequest {
    /// The guest waits for these pages.
    Pages(GuestRange),
    /// Nobody waits any more.
    Abandon,
}
