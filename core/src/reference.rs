//! References: the only mutable objects. A name, and the root it stands for now, or that it was removed.

use crate::{
    domain::Domain,
    envelope::{self, Kind, VERSION_3},
    error::FormatError,
    id::{RootId, SnapshotId},
    limits::{NAME_BYTES_MAX, REFERENCE_BYTES_MAX},
    name::Name,
    wire::{Reader, Writer},
};

const KIND: Kind = Kind { magic: *b"DORMREF\0", what: "reference", body_bytes_max: REFERENCE_BYTES_MAX };
/// Largest reference object a reader accepts.
pub const OBJECT_BYTES_MAX: u64 = KIND.object_bytes_max();

/// What follows the nonce: nothing, since the name was removed.
const REMOVED: u8 = 0;
/// What follows the nonce: what the name stands for.
const STANDS: u8 = 1;
/// What follows the nonce: what the name stands for, and the guest that is newer.
const STANDS_FOR_OLDER: u8 = 2;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The name; also inside, so that an object put under another name is noticed.
    pub name: Name,
    /// How often this name was moved or removed; grows with every swap that changes what it stands for.
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
    /// The guest that is newer than the snapshot, if a standby of it has begun and is not known to have ended.
    pub newer: Option<NewerGuest>,
}

/// A guest that is newer than the snapshot of its name: waking the snapshot would lose what the guest did since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewerGuest {
    /// The host it is on, as that calls itself; at most [`NAME_BYTES_MAX`] bytes. For people.
    pub host: String,
    /// When its standby began, milliseconds since 1970 UTC by that host's clock. For people.
    pub since_unix_ms: u64,
}

/// A name that was removed, or that is kept from a write that may still be on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// The last part of its key: [`Domain::name_key`] of the name, which nobody need know.
    pub name_key: String,
    /// The sequence goes on over a removal; 0 if the name never stood for anything.
    pub sequence: u64,
}

/// Bytes that nobody else has written, so that no two objects of one name are equal: stores tell the versions of an
/// object by its bytes.
pub type Nonce = [u8; 16];

/// What is stored at the key of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// The name stands for a snapshot.
    Reference(Reference),
    /// It stands for nothing.
    Removed(Tombstone),
}

impl Reference {
    /// The object's bytes, in the version that all readers know. They do not tell of a newer guest:
    /// [`Named::encode`] does.
    pub fn encode(&self, domain: &Domain) -> Vec<u8> {
        let mut w = Writer::new();
        self.write(&mut w);
        envelope::wrap(KIND, domain, w.finish())
    }

    /// Decodes the object found under `name`, or under any name if `None`. A tombstone is an error.
    pub fn decode(domain: &Domain, name: Option<&Name>, object: &[u8]) -> Result<Self, FormatError> {
        match Named::decode(domain, name, object)? {
            Named::Reference(reference) => Ok(reference),
            Named::Removed(_) => {
                Err(FormatError::Malformed { what: KIND.what, why: "it says that the name was removed" })
            }
        }
    }

    fn write(&self, w: &mut Writer) {
        w.counted(self.name.as_str().as_bytes());
        w.u64(self.sequence);
        w.bytes(&self.snapshot.0);
        w.bytes(&self.root.0);
        w.u32(self.root_bytes);
        w.u64(self.written_unix_ms);
        w.u64(self.expires_unix_ms);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(Reference {
            name: read_name(r)?,
            sequence: r.u64()?,
            snapshot: SnapshotId(r.array()?),
            root: RootId(r.array()?),
            root_bytes: r.u32()?,
            written_unix_ms: r.u64()?,
            expires_unix_ms: r.u64()?,
            newer: None,
        })
    }
}

impl NewerGuest {
    fn write(&self, w: &mut Writer) {
        w.counted(self.host.as_bytes());
        w.u64(self.since_unix_ms);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(NewerGuest { host: read_text(r)?.to_owned(), since_unix_ms: r.u64()? })
    }
}

impl Named {
    /// The object's bytes, equal to no others under this name if `nonce` was never used before. Readers of versions
    /// before 3 refuse it and say which version is needed.
    pub fn encode(&self, domain: &Domain, nonce: &Nonce) -> Vec<u8> {
        let mut w = Writer::new();
        w.bytes(nonce);
        match self {
            Named::Removed(tombstone) => {
                w.u8(REMOVED);
                w.counted(tombstone.name_key.as_bytes());
                w.u64(tombstone.sequence);
            }
            Named::Reference(reference) => {
                w.u8(if reference.newer.is_some() { STANDS_FOR_OLDER } else { STANDS });
                reference.write(&mut w);
                if let Some(newer) = &reference.newer {
                    newer.write(&mut w);
                }
            }
        }
        envelope::wrap_as(KIND, VERSION_3, domain, w.finish())
    }

    /// Decodes the object found under `name`, or under any name if `None`.
    pub fn decode(domain: &Domain, name: Option<&Name>, object: &[u8]) -> Result<Self, FormatError> {
        let (version, body) = envelope::unwrap_versioned(KIND, domain, object)?;
        let mut r = Reader::new(&body, KIND.what);
        let kind = if version < VERSION_3 {
            STANDS
        } else {
            r.array::<{ size_of::<Nonce>() }>()?;
            r.u8()?
        };
        let named = match kind {
            STANDS => Named::Reference(Reference::read(&mut r)?),
            STANDS_FOR_OLDER => {
                let reference = Reference::read(&mut r)?;
                Named::Reference(Reference { newer: Some(NewerGuest::read(&mut r)?), ..reference })
            }
            REMOVED => {
                Named::Removed(Tombstone { name_key: read_text(&mut r)?.to_owned(), sequence: r.u64()? })
            }
            _ => return Err(r.malformed("it neither stands for a snapshot nor was removed")),
        };
        r.end()?;
        let is_other = |name: &Name| match &named {
            Named::Reference(reference) => reference.name != *name,
            Named::Removed(tombstone) => tombstone.name_key != domain.name_key(name.as_str()),
        };
        if name.is_some_and(is_other) {
            return Err(r.malformed("it is the reference of another name"));
        }
        Ok(named)
    }

    /// The last part of the key it belongs at: an object put under another name is noticed by it.
    pub fn name_key(&self, domain: &Domain) -> String {
        match self {
            Named::Reference(reference) => domain.name_key(reference.name.as_str()),
            Named::Removed(tombstone) => tombstone.name_key.clone(),
        }
    }

    /// How often this name was moved or removed.
    pub fn sequence(&self) -> u64 {
        match self {
            Named::Reference(reference) => reference.sequence,
            Named::Removed(tombstone) => tombstone.sequence,
        }
    }
}

fn read_name(r: &mut Reader<'_>) -> Result<Name, FormatError> {
    Name::new(read_text(r)?)
}

fn read_text<'a>(r: &mut Reader<'a>) -> Result<&'a str, FormatError> {
    let bytes = r.counted("name bytes", NAME_BYTES_MAX)?;
    std::str::from_utf8(bytes).map_err(|_| r.malformed("its name is not text"))
}
