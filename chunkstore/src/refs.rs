//! References: reading, listing, swapping and removing names.

use bytes::Bytes;
use dormouse_core::{Name, Reference};

use crate::{
    backend::Version,
    error::{Result, StoreError},
    store::Store,
};

/// All references of a domain.
#[derive(Debug, Default)]
pub(crate) struct References {
    /// Those that can be read, by name.
    pub(crate) good: Vec<Reference>,
    /// The keys of those that cannot, and why.
    pub(crate) bad: Vec<(String, StoreError)>,
}

impl Store {
    /// What `name` stands for now, and the version to swap it by.
    pub(crate) fn reference(&self, name: &Name) -> Result<(Option<Reference>, Option<Version>)> {
        self.settle()?;
        let key = self.keys.reference(&self.domain, name);
        let (object, version) = self.backend.get_versioned(&key)?;
        let reference = object.map(|o| {
            Reference::decode(&self.domain, Some(name), &o).map_err(|why| StoreError::Damaged { key, why })
        });
        Ok((reference.transpose()?, version))
    }

    /// Moves `name` if it is still at `expected`.
    pub(crate) fn swap_reference(
        &self,
        name: &Name,
        expected: Option<&Version>,
        new: Option<&Reference>,
    ) -> Result<()> {
        let key = self.keys.reference(&self.domain, name);
        let bytes = new.map_or_else(Bytes::new, |r| r.encode(&self.domain).into());
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

    /// Reads all references.
    pub(crate) fn references(&self) -> Result<References> {
        self.settle_known()?;
        let mut keys = Vec::new();
        self.backend.list(&self.keys.refs(), &mut |meta| {
            if meta.bytes > 0 {
                keys.push(meta.key);
            }
        })?;
        let References { mut good, mut bad } = References::default();
        let read = |key: String| Ok((self.backend.get_versioned(&key)?.0, key));
        self.side_by_side(keys, read, |(object, key)| {
            // `None`: removed between the listing and now.
            let Some(object) = object else { return Ok(()) };
            match Reference::decode(&self.domain, None, &object) {
                Ok(r) if key == self.keys.reference(&self.domain, &r.name) => good.push(r),
                Ok(_) => {
                    let why = dormouse_core::FormatError::Malformed {
                        what: "reference",
                        why: "it is the reference of another name",
                    };
                    bad.push((key.clone(), StoreError::Damaged { key, why }));
                }
                Err(why) => bad.push((key.clone(), StoreError::Damaged { key, why })),
            }
            Ok(())
        })?;
        good.sort_by(|a, b| a.name.cmp(&b.name));
        bad.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(References { good, bad })
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
        if object.is_none() {
            return Err(self.no_such(name));
        }
        self.swap_reference(name, version.as_ref(), None)?;
        self.cool(name);
        // Derived from what is gone now. Should this fail, garbage collection finds it.
        if let Err(why) = self.backend.delete(&self.keys.stream(&self.domain, name)) {
            tracing::info!(%name, %why, "the resume stream was left behind");
        }
        Ok(())
    }
}
