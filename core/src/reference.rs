//! References: the only mutable objects. A name, and the root it stands for now.

use crate::{
    domain::Domain,
    envelope::{self, Kind},
    error::FormatError,
    id::{RootId, SnapshotId},
    limits::{NAME_BYTES_MAX, REFERENCE_BYTES_MAX},
    name::Name,
    wire::{Reader, Writer},
};

const KIND: Kind = Kind { magic: *b"DORMREF\0", what: "reference", body_bytes_max: REFERENCE_BYTES_MAX };
/// Largest reference object a reader accepts.
pub const OBJECT_BYTES_MAX: u64 = KIND.object_bytes_max();

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The name; also inside, so that an object put under another name is noticed.
    pub name: Name,
    /// How often this name was moved; grows with every swap.
    pub sequence: u64,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The root object that lays it out at present.
    pub root: RootId,
    /// Bytes of the root object, so that it can be read with one exact request.
    pub root_bytes: u32,
    /// When the reference was written, milliseconds since 1970 UTC.
    pub written_unix_ms: u64,
    /// When the snapshot may be dropped, milliseconds since 1970 UTC; 0 for never.
    pub expires_unix_ms: u64,
}

impl Reference {
    /// The object's bytes.
    pub fn encode(&self, domain: &Domain) -> Vec<u8> {
        let mut w = Writer::new();
        w.counted(self.name.as_str().as_bytes());
        w.u64(self.sequence);
        w.bytes(&self.snapshot.0);
        w.bytes(&self.root.0);
        w.u32(self.root_bytes);
        w.u64(self.written_unix_ms);
        w.u64(self.expires_unix_ms);
        envelope::wrap(KIND, domain, w.finish())
    }

    /// Decodes the object found under `name`, or under any name if `None`.
    pub fn decode(domain: &Domain, name: Option<&Name>, object: &[u8]) -> Result<Self, FormatError> {
        let body = envelope::unwrap(KIND, domain, object)?;
        let mut r = Reader::new(&body, KIND.what);
        let text = std::str::from_utf8(r.counted("name bytes", NAME_BYTES_MAX)?)
            .map_err(|_| r.malformed("its name is not text"))?;
        let reference = Reference {
            name: Name::new(text)?,
            sequence: r.u64()?,
            snapshot: SnapshotId(r.array()?),
            root: RootId(r.array()?),
            root_bytes: r.u32()?,
            written_unix_ms: r.u64()?,
            expires_unix_ms: r.u64()?,
        };
        r.end()?;
        if name.is_some_and(|n| *n != reference.name) {
            return Err(r.malformed("it is the reference of another name"));
        }
        Ok(reference)
    }
}
