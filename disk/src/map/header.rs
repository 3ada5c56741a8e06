//! The header of a map file.

use dormouse_core::{
    FormatError, IMAGE_PAGES_MAX, PageCount,
    wire::{Reader, Writer},
};

use super::{Checksum, checksum};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 256;
const CHECKED_BYTES: usize = HEADER_BYTES - 16;
const MAGIC: [u8; 8] = *b"DORMOMAP";
const VERSION: u32 = 1;
const NAME_BYTES: usize = 128;
const WHAT: &str = "overlay map";

/// What an overlay belongs to. An overlay is opened only over the base that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The snapshot whose image is the base, by the hash of its logical content: that stays when the store is laid out
    /// anew.
    pub snapshot: [u8; 32],
    /// The image's name, at most 128 bytes of UTF-8.
    pub image: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Token of the machine's owner: grows with every change of owner.
    pub owner_token: u64,
}

/// The header of one map file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the overlay belongs to.
    pub identity: Identity,
    /// Grows with every checkpoint of the layer.
    pub generation: u64,
    /// Random, of this file.
    pub nonce: [u8; 16],
    /// The layer's number, from 1.
    pub layer: u64,
    /// The layer beneath, or 0 for the base.
    pub beneath: u64,
}

impl Identity {
    /// Whether an overlay can have this identity.
    pub fn check(&self) -> Result<(), FormatError> {
        let malformed = |why| FormatError::Malformed { what: WHAT, why };
        if self.image.is_empty() || self.image.len() > NAME_BYTES {
            return Err(malformed("the image's name has no byte or more than 128"));
        }
        if self.size_bytes == 0 {
            return Err(malformed("the disk has no bytes"));
        }
        let (value, limit) = (PageCount::covering(self.size_bytes).0, IMAGE_PAGES_MAX);
        if value > limit {
            return Err(FormatError::OverLimit { what: "overlay map's disk, in pages", value, limit });
        }
        Ok(())
    }

    /// Pages of the disk; the last may be partial.
    pub fn pages(&self) -> u64 {
        PageCount::covering(self.size_bytes).0
    }
}

impl Header {
    /// The bytes of the header, and the checksum that the first record continues. The identity must pass its check.
    pub fn encode(&self) -> (Vec<u8>, Checksum) {
        let mut out = Writer::new();
        out.bytes(&MAGIC);
        out.u32(VERSION);
        out.u32(0);
        out.u64(self.generation);
        out.bytes(&self.nonce);
        out.u64(self.layer);
        out.u64(self.beneath);
        out.u64(self.identity.size_bytes);
        out.u64(self.identity.owner_token);
        out.bytes(&self.identity.snapshot);
        out.u8(self.identity.image.len() as u8);
        out.bytes(self.identity.image.as_bytes());
        let mut bytes = out.finish();
        bytes.resize(CHECKED_BYTES, 0);
        let sum = checksum(&[&bytes]);
        bytes.extend(sum);
        (bytes, sum)
    }

    /// The header that `bytes` begin with.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Checksum), FormatError> {
        let mut reader = Reader::new(bytes, WHAT);
        let checked = reader.bytes(CHECKED_BYTES)?;
        let sum: Checksum = reader.array()?;
        if checked[..8] != MAGIC {
            return Err(FormatError::NotThisKind(WHAT));
        }
        if checksum(&[checked]) != sum {
            return Err(FormatError::HashMismatch(WHAT));
        }
        let mut reader = Reader::new(&checked[8..], WHAT);
        let version = reader.u32()?;
        if version != VERSION {
            let needs = u16::try_from(version).unwrap_or(u16::MAX);
            return Err(FormatError::TooNew { what: WHAT, needs, reads: VERSION as u16 });
        }
        let flags = reader.u32()?;
        if flags != 0 {
            return Err(FormatError::UnknownFlags { what: WHAT, flags });
        }
        let (generation, nonce) = (reader.u64()?, reader.array()?);
        let (layer, beneath) = (reader.u64()?, reader.u64()?);
        let (size_bytes, owner_token, snapshot) = (reader.u64()?, reader.u64()?, reader.array()?);
        let name_bytes = usize::from(reader.u8()?);
        let name = reader.bytes(name_bytes)?.to_vec();
        let image = String::from_utf8(name).map_err(|_| reader.malformed("the name is not UTF-8"))?;
        if reader.bytes(reader.remaining())?.iter().any(|byte| *byte != 0) {
            return Err(reader.malformed("there is something where zeros should be"));
        }
        if layer == 0 || beneath >= layer {
            return Err(reader.malformed("a layer lies beneath itself"));
        }
        let identity = Identity { snapshot, image, size_bytes, owner_token };
        identity.check()?;
        Ok((Header { identity, generation, nonce, layer, beneath }, sum))
    }
}
