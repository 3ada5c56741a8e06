//! Settling doubt: what became of the write of a reference whose answer never came.
//!
//! Reading is not enough. The write may still be on its way and land after the store was asked. So a reference is settled
//! by a write of its own: what is there is written again, equal but for its nonce, or a tombstone where nothing is. Every
//! write of a reference is conditional on the bytes that it replaces (`If-Match`), or on there being none
//! (`If-None-Match: *`), so one that is late fails from then on. That the settling write succeeded says what the name stood
//! for at that instant.

use dormouse_core::{Name, Named, NewerGuest, Reference, Tombstone, limits::NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, StoreError},
    refs::{Found, nonce},
    store::{Store, now_unix_ms},
};

/// Times it is tried, while others move the name or the store does not answer.
const TRIES_MAX: u32 = 8;

/// What a name stands for at some moment; equal only if nobody moved or removed the name in between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// How often the name was moved or removed; 0 if it never was. Other than the rest it never comes back.
    pub sequence: u64,
    /// The snapshot, in hexadecimal; `None` if the name stands for nothing.
    pub snapshot: Option<String>,
    /// The root that lays it out.
    pub root: Option<String>,
}

/// What became of a write that was in doubt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The name stands for what it stood for before. The write did not land and will not: it has been made to fail.
    Undone,
    /// The name was moved since, by the write in doubt or by somebody else, and stands for this. A write that is late
    /// fails here as well, as the name is not what it expects.
    Moved(Reference),
    /// The name was moved or removed since, and stands for nothing. The write in doubt may have landed before that.
    Removed,
}

impl From<&Reference> for Standing {
    fn from(reference: &Reference) -> Self {
        Standing {
            sequence: reference.sequence,
            snapshot: Some(reference.snapshot.to_string()),
            root: Some(reference.root.to_string()),
        }
    }
}

impl Found {
    fn standing(&self) -> Standing {
        Standing {
            sequence: self.sequence,
            snapshot: self.reference.as_ref().map(|r| r.snapshot.to_string()),
            root: self.reference.as_ref().map(|r| r.root.to_string()),
        }
    }
}

impl Store {
    /// What `name` stands for now. Asked before a write, it is what [`Store::settle_reference`] needs if that write is
    /// in doubt.
    ///
    /// # Errors
    /// The store does not answer, or what is there is damaged.
    pub fn standing(&self, name: &Name) -> Result<Standing> {
        Ok(self.find(name)?.standing())
    }

    /// Tells all hosts that a guest on `host` is newer than what `name` stands for, which is `before`: its standby is
    /// about to replace that. [`Store::settle_reference`] takes it back, and so does whatever moves the name.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: the name was moved since `before` was asked. Or the store does not answer; then it may
    /// have been told or not, and is to be taken back.
    pub fn announce_newer(&self, name: &Name, before: &Standing, host: &str) -> Result<()> {
        let conflict = || StoreError::Conflict { name: name.to_string() };
        let found = self.find(name)?;
        if found.standing() != *before {
            return Err(conflict());
        }
        let Some(reference) = found.reference else { return Err(conflict()) };
        let boundary = |end: &usize| host.is_char_boundary(*end);
        let end = (0..=NAME_BYTES_MAX.min(host.len())).rev().find(boundary).unwrap_or(0);
        let newer = NewerGuest { host: host[..end].to_owned(), since_unix_ms: now_unix_ms() };
        let older = Reference { newer: Some(newer), ..reference };
        self.swap_reference(name, found.version.as_ref(), &older)
    }

    /// Finds out what became of a write of `name` that may still be on its way, and makes it fail if it did not land.
    /// `before` is what the name stood for before that write. What the name stands for is not changed, so this may be
    /// done again at any time, with the same `before`.
    ///
    /// # Errors
    /// [`StoreError::InDoubt`]: the doubt stands, since the store did not answer; ask again. Or what is there is damaged.
    pub fn settle_reference(&self, name: &Name, before: &Standing) -> Result<Settled> {
        if !self.settle_known()? {
            // Nothing was ever stored with this key: whoever writes a reference has made the domain before.
            return Ok(if before.sequence == 0 { Settled::Undone } else { Settled::Removed });
        }
        let key = self.keys.reference(&self.domain, name);
        let mut why = String::from("others kept moving the name");
        for _ in 0..TRIES_MAX {
            let found = match self.find(name) {
                Err(e) if e.is_retryable() => {
                    why = e.to_string();
                    continue;
                }
                found => found?,
            };
            if found.standing() != *before {
                return Ok(found.reference.map_or(Settled::Removed, Settled::Moved));
            }
            let again = match found.reference {
                // What was to replace it never will, so no guest waits to.
                Some(reference) => Named::Reference(Reference { newer: None, ..reference }),
                None => Named::Removed(Tombstone {
                    name_key: self.domain.name_key(name.as_str()),
                    sequence: found.sequence,
                }),
            };
            let bytes = bytes::Bytes::from(again.encode(&self.domain, &nonce()?));
            match self.backend.swap(&key, found.version.as_ref(), bytes.clone()) {
                Ok(true) => return Ok(Settled::Undone),
                // Somebody else moved it, or an earlier try of this landed late.
                Ok(false) => {}
                Err(e) if e.is_retryable() => {
                    why = e.to_string();
                    // Nobody else has these bytes.
                    if self.backend.get_versioned(&key).is_ok_and(|(now, _)| now == Some(bytes)) {
                        return Ok(Settled::Undone);
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Err(StoreError::InDoubt { name: name.to_string(), store: self.url().to_owned(), why })
    }
}
