//! The map file of an overlay layer: which pages the layer holds, as a checksummed, append-only log.
//!
//! A layer has two map files and uses one at a time. A file is a header, a checkpoint of all states, and then a record for
//! each flush. Nothing acknowledged is overwritten: a full log is followed by a checkpoint in the *other* file, and only
//! once that is durable is the first one cut to nothing.
//!
//! Header, 256 bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `DORMOMAP` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | flags, 0; unknown ones are an error |
//! | 16 | 8 | generation: grows with every checkpoint of the layer |
//! | 24 | 16 | nonce: random, of this file, so that remains of an earlier log never continue this one |
//! | 40 | 8 | number of the layer, from 1 |
//! | 48 | 8 | number of the layer beneath; 0 if the base lies beneath |
//! | 56 | 8 | size of the disk in bytes |
//! | 64 | 8 | token of the owner that wrote it |
//! | 72 | 32 | snapshot whose image is the base |
//! | 104 | 1 | n, length of the image's name |
//! | 105 | 128 | the name, then zeros |
//! | 233 | 7 | zeros |
//! | 240 | 16 | first 16 bytes of BLAKE3 of the 240 before |
//!
//! Record:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | n, length of the payload, at most 65,536 |
//! | 4 | 1 | kind: 1 states of the checkpoint, 2 end of the checkpoint, 3 states of a flush, 4 sealed |
//! | 5 | 3 | zeros |
//! | 8 | n | payload: of kinds 1 and 3 runs; of kinds 2 and 4 nothing |
//! | 8 + n | 16 | first 16 bytes of BLAKE3 of the checksum before (the header's, for the first record) and the 8 + n bytes |
//!
//! Runs: a varint count, then per run a varint gap from the end of the run before, and a varint `2 * pages + zero`, where
//! `zero` is 1 for pages that read as zeros and 0 for pages in the data file.
//!
//! All integers are little-endian. A log ends where a record is cut off, has a wrong checksum, or means nothing.

mod header;
mod log;
mod record;
mod recover;

pub use header::{HEADER_BYTES, Header, Identity};
pub(crate) use log::{MapLog, random_nonce};
pub use record::{Encoder, RUN_PAYLOAD_BYTES_MAX, RecordKind, decode_runs};
pub use recover::{MapError, Recovered, recover, recover_newest};

/// First bytes of a checksum, as kept in the file.
pub type Checksum = [u8; 16];

fn checksum(parts: &[&[u8]]) -> Checksum {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}
