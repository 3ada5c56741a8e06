//! References: reading, listing, swapping and removing names.

use bytes::Bytes;
use dormouse_core::{FormatError, Name, Named, Nonce, Reference, Tombstone};

use crate::{
    backend::Version,
    error::{Result, StoreError},
    store::{Store, now_unix_ms},
};

/// All references of a domain.
#[derive(Debug, Default)]
pub(crate) struct References {
    /// Those that can be read, by name.
    pub(crate) good: Vec<Reference>,
    /// The keys of those that cannot, and why.
    pub(crate) bad: Vec<(String, StoreError)>,
    /// The keys of those that the store does not give out, and why: they may be what they should be.
    pub(crate) unreadable: Vec<(String, StoreError)>,
}

/// The sequence of a name whose object is empty: earlier versions removed names so in stores that do not delete under a
/// condition. It is not that of a name that never was.
pub(crate) const EMPTY_SEQUENCE: u64 = 1;

/// What is at the key of a name.
#[derive(Debug)]
pub(crate) struct Found {
    /// What the name stands for.
    pub(crate) reference: Option<Reference>,
    /// How often it was moved or removed.
    pub(crate) sequence: u64,
    /// What to swap it by; `None` if there is no object.
    pub(crate) version: Option<Version>,
}

impl Store {
    /// What `name` stands for now, and the version to swap it by.
    pub(crate) fn reference(&self, name: &Name) -> Result<(Option<Reference>, Option<Version>)> {
        self.find(name).map(|found| (found.reference, found.version))
    }

    /// As [`Store::reference`]; and the sequence, which goes on where the name was removed.
    pub(crate) fn find(&self, name: &Name) -> Result<Found> {
        self.settle()?;
        let key = self.keys.reference(&self.domain, name);
        let (object, version) = self.backend.get_versioned(&key)?;
        let Some(object) = object else {
            let sequence = version.as_ref().map_or(0, |_| EMPTY_SEQUENCE);
            if version.is_some() && self.has_identity()? {
                return Err(empty_reference(key));
            }
            return Ok(Found { reference: None, sequence, version });
        };
        let named = Named::decode(&self.domain, Some(name), &object);
        let named = named.map_err(|why| StoreError::Damaged { key, why })?;
        let sequence = named.sequence();
        let reference = match named {
            Named::Reference(reference) => Some(reference),
            Named::Removed(_) => None,
        };
        Ok(Found { reference, sequence, version })
    }

    /// Moves `name` if it is still at `expected`.
    pub(crate) fn swap_reference(
        &self,
        name: &Name,
        expected: Option<&Version>,
        new: &Reference,
    ) -> Result<()> {
        // Only the later version tells of a newer guest.
        let bytes = match new.newer {
            None => new.encode(&self.domain),
            Some(_) => Named::Reference(new.clone()).encode(&self.domain, &nonce()?),
        };
        self.swap_named(name, expected, bytes.into())
    }

    /// Removes `name` if it is still at `expected`. What is left in its place tells that it was removed, and is like no
    /// other object: a write that is still on its way and expects what was there before fails.
    pub(crate) fn swap_for_tombstone(
        &self,
        name: &Name,
        expected: Option<&Version>,
        sequence: u64,
    ) -> Result<()> {
        let tombstone = Named::Removed(Tombstone { name_key: self.domain.name_key(name.as_str()), sequence });
        let bytes = Bytes::from(tombstone.encode(&self.domain, &nonce()?));
        match self.swap_named(name, expected, bytes.clone()) {
            Err(StoreError::Full { .. }) => {
                let key = self.keys.reference(&self.domain, name);
                let swapped = self.backend.swap_without_room(&key, expected, bytes)?;
                if swapped { Ok(()) } else { Err(StoreError::Conflict { name: name.to_string() }) }
            }
            done => done,
        }
    }

    fn swap_named(&self, name: &Name, expected: Option<&Version>, bytes: Bytes) -> Result<()> {
        self.prove_conditions()?;
        let key = self.keys.reference(&self.domain, name);
        let swapped = match self.backend.swap(&key, expected, bytes.clone()) {
            // The answer may have been lost: the reference itself says whether it moved. One that does not say so, for
            // whatever reason, leaves that open.
            Err(e) if e.is_retryable() => {
                let Ok((now, version)) = self.backend.get_versioned(&key) else { return Err(e) };
                if now.unwrap_or_default() == bytes {
                    true
                } else if version.as_ref() == expected {
                    self.backend.swap(&key, expected, bytes).map_err(|_| e)?
                } else {
                    return Err(e);
                }
            }
            other => other?,
        };
        if swapped { Ok(()) } else { Err(StoreError::Conflict { name: name.to_string() }) }
    }

    /// Reads all references; fails if the store does not give out one of them.
    pub(crate) fn references(&self) -> Result<References> {
        let mut all = self.readable_references()?;
        if all.unreadable.is_empty() { Ok(all) } else { Err(all.unreadable.swap_remove(0).1) }
    }

    /// Reads all references that can be read.
    pub(crate) fn readable_references(&self) -> Result<References> {
        self.settle_known()?;
        let (mut keys, mut empty) = (Vec::new(), Vec::new());
        self.backend.list(&self.keys.refs(), &mut |meta| {
            if meta.bytes > 0 { keys.push(meta.key) } else { empty.push(meta.key) }
        })?;
        if keys.is_empty() && empty.is_empty() {
            self.check_there()?;
        }
        let References { mut good, mut bad, mut unreadable } = References::default();
        let read = |key: String| Ok((self.backend.get_versioned(&key), key));
        self.side_by_side(keys, read, |(got, key)| {
            let (object, version) = match got {
                Ok(got) => got,
                Err(e) => {
                    unreadable.push((key, self.of_one_object(e)?));
                    return Ok(());
                }
            };
            let Some(object) = object else {
                // No version: removed between the listing and now.
                empty.extend(version.map(|_| key));
                return Ok(());
            };
            match Named::decode(&self.domain, None, &object) {
                Ok(named) if key == self.keys.reference_at(&named.name_key(&self.domain)) => {
                    if let Named::Reference(reference) = named {
                        good.push(reference);
                    }
                }
                Ok(_) => {
                    let why = FormatError::Malformed {
                        what: "reference",
                        why: "it is the reference of another name",
                    };
                    bad.push((key.clone(), StoreError::Damaged { key, why }));
                }
                Err(why) => bad.push((key.clone(), StoreError::Damaged { key, why })),
            }
            Ok(())
        })?;
        if !empty.is_empty() && self.has_identity()? {
            bad.extend(empty.into_iter().map(|key| (key.clone(), empty_reference(key))));
        }
        good.sort_by(|a, b| a.name.cmp(&b.name));
        bad.sort_by(|(a, _), (b, _)| a.cmp(b));
        unreadable.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(References { good, bad, unreadable })
    }

    /// Removes `name`. What only it used stays until garbage is collected.
    ///
    /// # Errors
    /// [`StoreError::NoSuchSnapshot`]; [`StoreError::Conflict`] if it was moved at the same moment.
    pub fn remove(&self, name: &Name) -> Result<()> {
        self.settle()?;
        let key = self.keys.reference(&self.domain, name);
        // A damaged reference can be removed as well, so its content does not matter here.
        let (object, version) = self.backend.get_versioned(&key)?;
        // One that is empty and no tombstone is damaged, too.
        let damaged = object.is_none() && version.is_some() && self.has_identity()?;
        if object.is_none() && !damaged {
            return Err(self.no_such(name));
        }
        let sequence = match Named::decode(&self.domain, Some(name), &object.unwrap_or_default()) {
            Ok(Named::Removed(_)) => return Err(self.no_such(name)),
            Ok(Named::Reference(reference)) => reference.sequence,
            // Nobody knows it, but no name was moved as often as there were milliseconds.
            Err(_) => now_unix_ms(),
        };
        self.swap_for_tombstone(name, version.as_ref(), sequence.saturating_add(1))?;
        self.cool(name);
        // Derived from what is gone now. Should this fail, garbage collection finds it.
        if let Err(why) = self.backend.delete(&self.keys.stream(&self.domain, name)) {
            tracing::info!(%name, %why, "the resume stream was left behind");
        }
        Ok(())
    }
}

/// Of nothing was made a tombstone before the domain got its identity.
fn empty_reference(key: String) -> StoreError {
    StoreError::Damaged { key, why: FormatError::Truncated("reference") }
}

/// Bytes that nobody else has, from the operating system.
pub(crate) fn nonce() -> Result<Nonce> {
    let mut nonce = Nonce::default();
    // So few are given at once, or none.
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| StoreError::file("asking for random bytes of", "getrandom(2)".as_ref(), e.into()))?;
    Ok(nonce)
}
