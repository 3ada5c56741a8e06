//! What is said to the holder and what it says: pure functions. Each message is one line of JSON and, behind it, a
//! VM's record, which the holder does not look into, so that a holder serves programs newer than itself.

use serde::{Deserialize, Serialize};

use crate::record::{RECORD_BYTES_MAX, VmId};

/// The version spoken.
pub const PROTOCOL_VERSION: u32 = 1;
/// Most bytes of the line.
const LINE_BYTES_MAX: usize = 4096;
/// Most bytes of a message.
pub const MESSAGE_BYTES_MAX: usize = LINE_BYTES_MAX + RECORD_BYTES_MAX;

/// Said to the holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// First of all.
    Hello {
        /// [`PROTOCOL_VERSION`].
        version: u32,
    },
    /// Keep a VM: its record behind this line; userfaultfd, page states and pidfd with it.
    Keep {
        /// Names it.
        id: VmId,
    },
    /// Let go of a VM.
    Release {
        /// Which.
        id: VmId,
    },
    /// Give me a VM that nobody serves.
    Take,
}

/// Said by the holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Response {
    /// It was done.
    Done,
    /// A VM: its record behind this line, its descriptors with it.
    Vm {
        /// Names it.
        id: VmId,
    },
    /// There is no VM, or no more, that nobody serves.
    NoMore {
        /// How many there are that others serve.
        served_elsewhere: usize,
    },
    /// It was not done.
    Refused {
        /// Why not.
        why: String,
    },
}

/// Why a message cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Without an end of the line.
    #[error("a message has no line of at most {LINE_BYTES_MAX} bytes")]
    NoLine,
    /// The line makes no sense.
    #[error("a message makes no sense: {0}")]
    Json(#[from] serde_json::Error),
    /// The record is too long.
    #[error("a record has {0} bytes, more than the {RECORD_BYTES_MAX} allowed")]
    Record(usize),
}

/// A message's bytes.
///
/// # Errors
/// The line or the record is too long.
pub fn encode(line: &impl Serialize, record: &[u8]) -> Result<Vec<u8>, MessageError> {
    let mut message = serde_json::to_vec(line)?;
    if message.len() >= LINE_BYTES_MAX {
        return Err(MessageError::NoLine);
    }
    if record.len() > RECORD_BYTES_MAX {
        return Err(MessageError::Record(record.len()));
    }
    message.push(b'\n');
    message.extend_from_slice(record);
    Ok(message)
}

/// Reads a message: its line, and the record behind it.
///
/// # Errors
/// [`MessageError`].
pub fn decode<'m, T: Deserialize<'m>>(message: &'m [u8]) -> Result<(T, &'m [u8]), MessageError> {
    let end = message.iter().take(LINE_BYTES_MAX).position(|b| *b == b'\n').ok_or(MessageError::NoLine)?;
    let (line, record) = message.split_at(end);
    let record = record.get(1..).unwrap_or_default();
    if record.len() > RECORD_BYTES_MAX {
        return Err(MessageError::Record(record.len()));
    }
    Ok((serde_json::from_slice(line)?, record))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        let id = || VmId::new("vm-1-ff").expect("an id");
        for request in [
            Request::Hello { version: 1 },
            Request::Keep { id: id() },
            Request::Release { id: id() },
            Request::Take,
        ] {
            let message = encode(&request, b"{}\n\xFF").expect("short");
            assert_eq!(decode(&message).expect("a message"), (request, &b"{}\n\xFF"[..]));
        }
        let long = Response::Refused { why: "x".repeat(LINE_BYTES_MAX) };
        assert!(matches!(encode(&long, b""), Err(MessageError::NoLine)));
        assert!(encode(&Request::Take, &[0; RECORD_BYTES_MAX + 1]).is_err());
        assert!(decode::<Request>(b"{\"do\":\"keep\",\"id\":\"a b\"}\n").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Response>(&bytes);
        }
    }
}
