//! The bytes of the protocol. All integers are big-endian.

/// First word of everything that the server says in the handshake.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting, and first of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of the answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Largest request, read or written.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Longest data of an option.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Bytes of an option's header.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request's header.
pub const REQUEST_HEADER_BYTES: usize = 28;

/// What an option asks.
pub mod option {
    #![expect(missing_docs, reason = "named as in the protocol's text")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// What the answer to an option is.
pub mod reply {
    #![expect(missing_docs, reason = "named as in the protocol's text")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// What an export can do.
pub mod export_flag {
    #![expect(missing_docs, reason = "named as in the protocol's text")]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Flags of a request.
pub mod flag {
    #![expect(missing_docs, reason = "named as in the protocol's text")]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Errors of requests.
pub mod error {
    #![expect(missing_docs, reason = "named as in the protocol's text")]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes.
    Read,
    /// To keep the bytes that follow the request.
    Write,
    /// To end the connection once all requests are answered. Has no answer.
    Disconnect,
    /// To make durable.
    Flush,
    /// To forget.
    Trim,
    /// To hold zeros.
    WriteZeroes,
    /// What is data and what is zeros.
    BlockStatus,
    /// Something that this server does not know.
    Other(u16),
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags.
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's own number of it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Decodes a header; `None` if it is none: then nobody knows where the next one begins.
    pub fn decode(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Option<Self> {
        let mut at = &bytes[..];
        if u32::from_be_bytes(take(&mut at)) != REQUEST_MAGIC {
            return None;
        }
        let flags = u16::from_be_bytes(take(&mut at));
        let command = match u16::from_be_bytes(take(&mut at)) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Other(other),
        };
        let cookie = u64::from_be_bytes(take(&mut at));
        let offset = u64::from_be_bytes(take(&mut at));
        Some(Request { flags, command, cookie, offset, length: u32::from_be_bytes(take(&mut at)) })
    }

    /// Bytes of data that follow the header.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Bytes of memory that carrying it out takes.
    pub fn buffer_bytes(&self) -> u32 {
        if matches!(self.command, Command::Read | Command::Write) { self.length } else { 0 }
    }
}

/// The next `N` bytes, zeros past the end.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let (head, tail) = bytes.split_at(N.min(bytes.len()));
    taken[..head.len()].copy_from_slice(head);
    *bytes = tail;
    taken
}

/// The header of an answer without chunks; data of a read follows if there is no error.
pub fn simple_reply(cookie: u64, error: u32) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

fn last_chunk(kind: u16, cookie: u64, payload_bytes: u32) -> Vec<u8> {
    let (magic, done) = (CHUNK_MAGIC.to_be_bytes(), 1u16.to_be_bytes());
    [&magic[..], &done, &kind.to_be_bytes(), &cookie.to_be_bytes(), &payload_bytes.to_be_bytes()].concat()
}

/// The only chunk of a read's answer; its `length` bytes of data follow.
pub fn data_chunk(cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [last_chunk(1, cookie, length + 8), offset.to_be_bytes().to_vec()].concat()
}

/// The answer to a request that leaves nothing to say.
pub fn none_chunk(cookie: u64) -> Vec<u8> {
    last_chunk(0, cookie, 0)
}

/// The answer to a request that failed.
pub fn error_chunk(cookie: u64, error: u32, message: &str) -> Vec<u8> {
    let whole = (0..=message.len().min(1024)).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    let message = &message.as_bytes()[..whole];
    let payload_bytes = 6 + message.len() as u32;
    let length = (message.len() as u16).to_be_bytes();
    [&last_chunk(1 << 15 | 1, cookie, payload_bytes), &error.to_be_bytes()[..], &length, message].concat()
}

/// The answer to a question for block status: runs of bytes with their flags.
pub fn status_chunk(cookie: u64, context: u32, runs: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = last_chunk(5, cookie, 4 + 8 * runs.len() as u32);
    bytes.extend(context.to_be_bytes());
    for (length, flags) in runs {
        bytes.extend(length.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

/// The answer to an option.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let (magic, length) = (OPTION_REPLY_MAGIC.to_be_bytes(), (data.len() as u32).to_be_bytes());
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length, data].concat()
}

/// The header of an option: what it asks, and how many bytes follow. `None` if it is none.
pub fn option_header(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<(u32, u32)> {
    let mut at = &bytes[..];
    (u64::from_be_bytes(take(&mut at)) == OPTION_MAGIC)
        .then(|| (u32::from_be_bytes(take(&mut at)), u32::from_be_bytes(take(&mut at))))
}
