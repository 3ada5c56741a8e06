//! The keyring: a domain's key, wrapped under the key of somebody who may use it.
//!
//! One small object per user key, sealed by it. A domain may have several, so that a key is changed by wrapping the
//! domain's key once more, and no data is rewritten. A key that was taken out of use leaves a note of its successor.

use crate::{
    domain::{Domain, DomainId, DomainKey},
    envelope::{self, Kind},
    error::FormatError,
    wire::{Reader, Writer},
};

const KIND: Kind = Kind { magic: *b"DORMKEYS", what: "keyring", body_bytes_max: 256 };
/// Largest keyring object a reader accepts.
pub const OBJECT_BYTES_MAX: u64 = KIND.object_bytes_max();
const WRAPPED: u8 = 0;
const RETIRED: u8 = 1;

/// What the keyring object of a user key says.
#[derive(Clone, Debug)]
pub enum Keyring {
    /// The key opens the domain of this key.
    Wrapped(DomainKey),
    /// The key opens nothing any more.
    Retired {
        /// Id of the key that took its place.
        successor: DomainId,
    },
}

impl Keyring {
    /// The object's bytes, sealed under the user's key.
    pub fn encode(&self, user: &DomainKey) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Keyring::Wrapped(key) => {
                w.u8(WRAPPED);
                w.bytes(key.expose());
            }
            Keyring::Retired { successor } => {
                w.u8(RETIRED);
                w.bytes(&successor.0);
            }
        }
        envelope::wrap(KIND, &Domain::encrypted(user), w.finish())
    }

    /// Opens the object found under the id of `user`.
    pub fn decode(user: &DomainKey, object: &[u8]) -> Result<Self, FormatError> {
        let body = envelope::unwrap(KIND, &Domain::encrypted(user), object)?;
        let mut r = Reader::new(&body, KIND.what);
        let keyring = match r.u8()? {
            WRAPPED => Keyring::Wrapped(DomainKey::new(r.array()?)),
            RETIRED => Keyring::Retired { successor: DomainId(r.array()?) },
            _ => return Err(r.malformed("it neither wraps a key nor names a successor")),
        };
        r.end()?;
        Ok(keyring)
    }
}
