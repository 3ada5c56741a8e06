//! The envelope of small objects (roots, references, store header): magic, versions, flags, body, checksum.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 2 | format version that wrote it |
//! | 10 | 2 | oldest format version that may read it |
//! | 12 | 4 | flags; an unknown one is an error |
//! | 16 | 16 | domain id, zero when not sealed |
//! | 32 | 4 | body bytes as stored |
//! | 36 | 4 | header bytes (40); a later version may lengthen the header |
//! | 40 | n | body, sealed in an encrypted domain |
//! | 40+n | 32 | BLAKE3-256 of all before |

use std::borrow::Cow;

use crate::{
    domain::{Domain, DomainId},
    error::FormatError,
    wire::{Reader, Writer},
};

/// The format version this build writes and the newest it reads.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 40;
/// Bytes after the body.
pub const CHECKSUM_BYTES: usize = 32;
/// Flag: the body is sealed by the domain whose id the header carries.
pub const FLAG_SEALED: u32 = 1;

/// A kind of object: what its first bytes and its errors are.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The first eight bytes.
    pub magic: [u8; 8],
    /// What errors call it.
    pub what: &'static str,
    /// Most bytes its body may have.
    pub body_bytes_max: usize,
}

/// Checks versions and flags, the same in every kind of object.
pub(crate) fn check_version(
    what: &'static str,
    reader_min: u16,
    flags: u32,
    known: u32,
) -> Result<(), FormatError> {
    if reader_min > FORMAT_VERSION {
        return Err(FormatError::TooNew { what, needs: reader_min, reads: FORMAT_VERSION });
    }
    if flags & !known != 0 {
        return Err(FormatError::UnknownFlags { what, flags: flags & !known });
    }
    Ok(())
}

/// Wraps `body`, sealing it if the domain is encrypted.
pub fn wrap(kind: Kind, domain: &Domain, body: Vec<u8>) -> Vec<u8> {
    let body = domain.seal(kind.what, body);
    let mut w = Writer::new();
    w.bytes(&kind.magic);
    w.u16(FORMAT_VERSION);
    w.u16(FORMAT_VERSION);
    w.u32(if domain.is_encrypted() { FLAG_SEALED } else { 0 });
    w.bytes(&domain.id().0);
    w.u32(body.len() as u32);
    w.u32(HEADER_BYTES as u32);
    w.bytes(&body);
    let mut out = w.finish();
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    out
}

/// Checks and opens what [`wrap`] made. The checksum covers everything, so any damage is found here.
pub fn unwrap<'a>(kind: Kind, domain: &Domain, object: &'a [u8]) -> Result<Cow<'a, [u8]>, FormatError> {
    let what = kind.what;
    let mut r = Reader::new(object, what);
    if r.array::<8>()? != kind.magic {
        return Err(FormatError::NotThisKind(what));
    }
    let _written_by = r.u16()?;
    let reader_min = r.u16()?;
    let flags = r.u32()?;
    check_version(what, reader_min, flags, FLAG_SEALED)?;
    let id = DomainId(r.array()?);
    let body_bytes = r.u32()? as usize;
    let header_bytes = r.u32()? as usize;
    if header_bytes != HEADER_BYTES {
        return Err(r.malformed("unexpected header length"));
    }
    if body_bytes > kind.body_bytes_max {
        let (value, limit) = (body_bytes as u64, kind.body_bytes_max as u64);
        return Err(FormatError::OverLimit { what, value, limit });
    }
    let body = r.bytes(body_bytes)?;
    let checksum = r.array::<CHECKSUM_BYTES>()?;
    r.end()?;
    if *blake3::hash(&object[..object.len() - CHECKSUM_BYTES]).as_bytes() != checksum {
        return Err(FormatError::HashMismatch(what));
    }
    match (flags & FLAG_SEALED != 0, domain.is_encrypted()) {
        (true, false) => Err(FormatError::KeyMissing(what)),
        (false, true) => Err(FormatError::WrongKey(what)),
        _ if id != domain.id() => Err(FormatError::WrongKey(what)),
        _ => domain.open(what, body),
    }
}
