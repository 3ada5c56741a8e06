//! The envelope of small objects (roots, references): magic, versions, flags, body, checksum.
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
//! | 40 | n | body; in an encrypted domain sealed, and bound to the 40 bytes before it |
//! | 40+n | 32 | BLAKE3-256 of all before |

use std::borrow::Cow;

use crate::{
    domain::{Domain, DomainId, SEAL_OVERHEAD_BYTES},
    error::FormatError,
    wire::{Reader, Writer},
};

/// The newest format version this build reads. It writes each object in the oldest that has all the object needs.
pub const FORMAT_VERSION: u16 = 3;
/// The version of all objects in which nothing is of a later one.
pub(crate) const VERSION_1: u16 = 1;
/// The version that brought frames of LZ4.
pub(crate) const VERSION_LZ4: u16 = 2;
/// The version that brought references with a nonce, tombstones, and identities.
pub(crate) const VERSION_3: u16 = 3;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 40;
/// Bytes after the body.
pub const CHECKSUM_BYTES: usize = 32;
/// Flag: the body is sealed by the domain whose id the header carries.
pub const FLAG_SEALED: u32 = 1;
/// Flag of packs: made by repacking, at a slow and dense level; repacking it again would win nothing.
pub const FLAG_DENSE: u32 = 2;

/// A kind of object: what its first bytes and its errors are.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The first eight bytes.
    pub magic: [u8; 8],
    /// What errors call it, and the context its body is sealed under: part of the format, never reworded.
    pub what: &'static str,
    /// Most bytes its body may have.
    pub body_bytes_max: usize,
}

impl Kind {
    /// Most bytes an object of this kind may have.
    pub const fn object_bytes_max(&self) -> u64 {
        (HEADER_BYTES + self.body_bytes_max + CHECKSUM_BYTES) as u64
    }
}

/// Bytes every object begins with: magic, versions, flags, domain.
pub(crate) const START_BYTES: usize = 32;

/// Writes the first [`START_BYTES`] of an object, of the version that has all it needs.
pub(crate) fn write_start(magic: [u8; 8], version: u16, domain: &Domain, extra_flags: u32) -> Writer {
    let mut w = Writer::new();
    w.bytes(&magic);
    w.u16(version);
    w.u16(version);
    w.u32(extra_flags | if domain.is_encrypted() { FLAG_SEALED } else { 0 });
    w.bytes(&domain.id().0);
    w
}

/// An object's flags and domain, as its start gives them.
pub(crate) struct Start {
    what: &'static str,
    flags: u32,
    id: DomainId,
    reader_min: u16,
}

impl Start {
    /// Reads the start of an object and checks what does not depend on a key: magic, versions, flags.
    pub(crate) fn read(
        r: &mut Reader<'_>,
        what: &'static str,
        magic: [u8; 8],
        extra_flags: u32,
    ) -> Result<Self, FormatError> {
        if r.array::<8>()? != magic {
            return Err(FormatError::NotThisKind(what));
        }
        let (written_by, reader_min) = (r.u16()?, r.u16()?);
        if reader_min > FORMAT_VERSION {
            return Err(FormatError::TooNew { what, needs: reader_min, reads: FORMAT_VERSION });
        }
        if reader_min == 0 || written_by < reader_min {
            return Err(r.malformed("its versions contradict each other"));
        }
        let flags = r.u32()?;
        let unknown = flags & !(FLAG_SEALED | extra_flags);
        if unknown != 0 {
            return Err(FormatError::UnknownFlags { what, flags: unknown });
        }
        Ok(Start { what, flags, id: DomainId(r.array()?), reader_min })
    }

    /// Whether a flag is set.
    pub(crate) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Checks that the object is one of `domain`.
    pub(crate) fn check_domain(&self, domain: &Domain) -> Result<(), FormatError> {
        let sealed = self.has(FLAG_SEALED);
        match (sealed, domain.is_encrypted()) {
            (true, false) => Err(FormatError::KeyMissing(self.what)),
            _ if self.id != domain.id() || sealed != domain.is_encrypted() => {
                Err(FormatError::WrongKey(self.what))
            }
            _ => Ok(()),
        }
    }
}

/// Wraps `body`, sealing it if the domain is encrypted.
pub fn wrap(kind: Kind, domain: &Domain, body: Vec<u8>) -> Vec<u8> {
    wrap_as(kind, VERSION_1, domain, body)
}

/// As [`wrap`], for a body that readers before `version` do not know.
pub(crate) fn wrap_as(kind: Kind, version: u16, domain: &Domain, body: Vec<u8>) -> Vec<u8> {
    let stored_bytes = body.len() + if domain.is_encrypted() { SEAL_OVERHEAD_BYTES } else { 0 };
    debug_assert!(stored_bytes <= kind.body_bytes_max, "a {} no reader accepts", kind.what);
    let mut w = write_start(kind.magic, version, domain, 0);
    w.u32(stored_bytes as u32);
    w.u32(HEADER_BYTES as u32);
    let mut out = w.finish();
    let body = domain.seal_with(kind.what, &out, body);
    out.extend_from_slice(&body);
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    out
}

/// Checks and opens what [`wrap`] made. The checksum covers everything, so any damage is found here.
pub fn unwrap<'a>(kind: Kind, domain: &Domain, object: &'a [u8]) -> Result<Cow<'a, [u8]>, FormatError> {
    unwrap_versioned(kind, domain, object).map(|(_, body)| body)
}

/// As [`unwrap`]; and the oldest version that may read the object, where that says how its body is laid out.
pub(crate) fn unwrap_versioned<'a>(
    kind: Kind,
    domain: &Domain,
    object: &'a [u8],
) -> Result<(u16, Cow<'a, [u8]>), FormatError> {
    let what = kind.what;
    let mut r = Reader::new(object, what);
    let start = Start::read(&mut r, what, kind.magic, 0)?;
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
    start.check_domain(domain)?;
    Ok((start.reader_min, domain.open_with(what, &object[..HEADER_BYTES], body)?))
}
