//! Requests, responses, and the order in which they may come.
//!
//! ```text
//! request,  16 bytes: command u16, parameters 6 bytes (Start: version u16, ignored 4), payload length u64
//! response, 16 bytes: status u16 (1 = ok, 2 = error), padding 6 bytes, payload length u64
//! range,    16 bytes: guest-physical address u64, length u64
//! ```
//! Little-endian throughout.

/// Bytes of a request's head, a response's head, and a range.
pub const HEAD_BYTES: usize = 16;
/// The protocol version spoken here, and by Cloud Hypervisor v53.
pub const VERSION: u16 = 0;
/// First bytes of the connection on which page faults are asked for.
pub const FAULT_ROLE: [u8; 2] = 2u16.to_le_bytes();
/// Most bytes of a `Config` payload.
pub const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Most bytes of a `State` payload.
pub const STATE_BYTES_MAX: u64 = 64 << 20;
/// Most bytes one page fault may ask for: a huge page.
pub const FAULT_BYTES_MAX: u64 = 1 << 30;
const PAGE_BYTES: u64 = 4096;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Begins; no payload.
    Start = 1,
    /// The VM's configuration, JSON.
    Config = 2,
    /// The devices' and vCPUs' state, opaque.
    State = 3,
    /// Memory content; not used between processes of one host.
    Memory = 4,
    /// Ends; the VM shall run (or ran).
    Complete = 5,
    /// Gives up; last sent by v52.
    Abandon = 6,
    /// A memory slot's number as u32, with the descriptor of its memory.
    MemoryFd = 7,
    /// Ends; the VM stays paused (or was).
    CompletePaused = 8,
    /// A range that the guest waits for.
    PageFault = 9,
}

impl Command {
    const ALL: [Self; 9] = [
        Self::Start,
        Self::Config,
        Self::State,
        Self::Memory,
        Self::Complete,
        Self::Abandon,
        Self::MemoryFd,
        Self::CompletePaused,
        Self::PageFault,
    ];

    /// The payload lengths it may have.
    fn payload(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::Start | Self::Complete | Self::Abandon | Self::CompletePaused => 0..=0,
            Self::Config => 1..=CONFIG_BYTES_MAX,
            Self::State => 1..=STATE_BYTES_MAX,
            Self::Memory => 0..=u64::MAX,
            Self::MemoryFd => 4..=4,
            Self::PageFault => HEAD_BYTES as u64..=HEAD_BYTES as u64,
        }
    }
}

/// What is wrong with what the peer sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// A command that does not exist.
    #[error("the peer sent command {0}, which is unknown: is it Cloud Hypervisor v53 or later?")]
    UnknownCommand(u16),
    /// Another protocol version.
    #[error("the peer speaks migration protocol version {0}; version {VERSION} is spoken here")]
    Version(u16),
    /// A payload length its command cannot have.
    #[error("the peer announced {length} bytes with {command:?}, which cannot be")]
    Length {
        /// The command.
        command: Command,
        /// The length.
        length: u64,
    },
    /// A status that does not exist, or a payload where none belongs.
    #[error("the peer answered with status {status} and {length} bytes, which cannot be")]
    Response {
        /// The status.
        status: u16,
        /// The length.
        length: u64,
    },
    /// A command at the wrong time.
    #[error("the peer sent {command:?} in a sequence where {expected} belongs")]
    OutOfOrder {
        /// The command.
        command: Command,
        /// What may come.
        expected: &'static str,
    },
    /// A range that is empty, unaligned, too long, or past the end of addresses.
    #[error("the peer asked for {length} bytes at {address:#x}: not a range of whole pages")]
    Range {
        /// Guest-physical start.
        address: u64,
        /// Length.
        length: u64,
    },
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub command: Command,
    /// Bytes of payload that follow.
    pub length: u64,
}

impl Request {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[..2].copy_from_slice(&(self.command as u16).to_le_bytes());
        if self.command == Command::Start {
            out[2..4].copy_from_slice(&VERSION.to_le_bytes());
        }
        out[8..].copy_from_slice(&self.length.to_le_bytes());
        out
    }

    /// From bytes. The payload's length has been checked against its command's limits.
    ///
    /// # Errors
    /// [`ProtocolError::UnknownCommand`], [`ProtocolError::Version`] or [`ProtocolError::Length`].
    pub fn decode(head: &[u8; HEAD_BYTES]) -> Result<Self, ProtocolError> {
        let (number, length) = halves(head);
        let command = Command::ALL
            .into_iter()
            .find(|c| *c as u16 == number)
            .ok_or(ProtocolError::UnknownCommand(number))?;
        let version = u16::from_le_bytes([head[2], head[3]]);
        if command == Command::Start && version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        if !command.payload().contains(&length) {
            return Err(ProtocolError::Length { command, length });
        }
        Ok(Self { command, length })
    }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Response {
    /// Done.
    Ok = 1,
    /// Refused; the peer gives up.
    Error = 2,
}

impl Response {
    /// As bytes.
    pub fn encode(self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[..2].copy_from_slice(&(self as u16).to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Response`].
    pub fn decode(head: &[u8; HEAD_BYTES]) -> Result<Self, ProtocolError> {
        match halves(head) {
            (1, 0) => Ok(Self::Ok),
            (2, 0) => Ok(Self::Error),
            (status, length) => Err(ProtocolError::Response { status, length }),
        }
    }
}

/// A range of guest-physical memory: whole pages, not empty, not past the end of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

impl GuestRange {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..].copy_from_slice(&self.length.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Range`].
    pub fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, ProtocolError> {
        let (low, high) = bytes.split_at(8);
        let word = |half: &[u8]| half.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let (address, length) = (word(low), word(high));
        let whole = address % PAGE_BYTES == 0 && length % PAGE_BYTES == 0;
        let fits = (1..=FAULT_BYTES_MAX).contains(&length) && address.checked_add(length).is_some();
        if whole && fits {
            Ok(Self { address, length })
        } else {
            Err(ProtocolError::Range { address, length })
        }
    }
}

fn halves(head: &[u8; HEAD_BYTES]) -> (u16, u64) {
    let [a, b, ..] = *head;
    let length = head[8..].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    (u16::from_le_bytes([a, b]), length)
}

/// How far a VM that goes to sleep has got: what the daemon has received. A pure state machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SleepSequence {
    /// Nothing yet.
    #[default]
    Connected,
    /// `Start`, and perhaps some memory.
    Started,
    /// `Config`: no more memory comes.
    Configured,
    /// `State`.
    StateReceived,
    /// `Complete` or `CompletePaused`; to be answered once all is safe.
    Completed,
    /// `Abandon`.
    Abandoned,
}

impl SleepSequence {
    /// Where `command` leads.
    ///
    /// # Errors
    /// [`ProtocolError::OutOfOrder`] if it may not come now.
    pub fn step(self, command: Command) -> Result<Self, ProtocolError> {
        let expected = match (self, command) {
            (Self::Connected, Command::Start) => return Ok(Self::Started),
            (Self::Started, Command::MemoryFd) => return Ok(Self::Started),
            (Self::Started, Command::Config) => return Ok(Self::Configured),
            (Self::Configured, Command::State) => return Ok(Self::StateReceived),
            (Self::StateReceived, Command::Complete | Command::CompletePaused) => return Ok(Self::Completed),
            (Self::Started | Self::Configured | Self::StateReceived, Command::Abandon) => {
                return Ok(Self::Abandoned);
            }
            (Self::Connected, _) => "Start",
            (Self::Started, _) => "MemoryFd or Config",
            (Self::Configured, _) => "State",
            (Self::StateReceived, _) => "Complete or CompletePaused",
            (Self::Completed | Self::Abandoned, _) => "nothing more",
        };
        Err(ProtocolError::OutOfOrder { command, expected })
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
