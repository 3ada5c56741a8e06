//! Identities: that a domain is one, and was written to by a version that leaves no empty references.

use crate::{
    domain::Domain,
    envelope::{self, Kind, VERSION_3},
    error::FormatError,
    reference::Nonce,
    wire::{Reader, Writer},
};

const KIND: Kind = Kind { magic: *b"DORMSELF", what: "identity", body_bytes_max: 1024 };
/// Largest identity object a reader accepts.
pub const OBJECT_BYTES_MAX: u64 = KIND.object_bytes_max();

/// What tells a domain from all others, and that it is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Chosen at random when it was made.
    pub id: Nonce,
    /// When that was, milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
}

impl Identity {
    /// The object's bytes.
    pub fn encode(&self, domain: &Domain) -> Vec<u8> {
        let mut w = Writer::new();
        w.bytes(&self.id);
        w.u64(self.created_unix_ms);
        envelope::wrap_as(KIND, VERSION_3, domain, w.finish())
    }

    /// Decodes the object.
    pub fn decode(domain: &Domain, object: &[u8]) -> Result<Self, FormatError> {
        let body = envelope::unwrap(KIND, domain, object)?;
        let mut r = Reader::new(&body, KIND.what);
        let identity = Identity { id: r.array()?, created_unix_ms: r.u64()? };
        r.end()?;
        Ok(identity)
    }
}
