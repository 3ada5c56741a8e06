//! Whether a store is there at all, and is the one it was: domains have an identity, and keyrings that open them.
//!
//! A reference that was cut to nothing must not pass for a removed name, or garbage collection deletes what it stood for. But
//! versions before format 3 left empty objects where names were removed. So the first writer makes tombstones of these, and
//! then the domain's identity: from then on an empty reference is damage. Readers make nothing.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use dormouse_core::{DomainId, Identity, Named, Tombstone, identity};

use crate::{
    error::{Result, StoreError},
    refs::{EMPTY_SEQUENCE, nonce},
    store::{Store, now_unix_ms},
};

impl Store {
    /// Whether the domain has an identity, whatever state it is in: an empty reference is damage then.
    pub(crate) fn has_identity(&self) -> Result<bool> {
        let known = &self.domain.0.has_identity;
        if known.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let there = self.backend.head(&self.keys.identity())?.is_some();
        known.fetch_or(there, Ordering::Relaxed);
        Ok(there)
    }

    /// Makes the domain's identity if it has none; whether it was made now. Called by writers of snapshots, once the
    /// domain is known. What is at the keys of removed names may be another object afterwards.
    pub(crate) fn found_identity(&self) -> Result<bool> {
        if self.has_identity()? {
            return Ok(false);
        }
        let mut empty = Vec::new();
        self.backend.list(&self.keys.refs(), &mut |meta| {
            empty.extend((meta.bytes == 0).then_some(meta.key));
        })?;
        for key in empty {
            if let (None, Some(version)) = self.backend.get_versioned(&key)? {
                let name_key = key.rsplit('/').next().unwrap_or_default().to_owned();
                let tombstone = Named::Removed(Tombstone { name_key, sequence: EMPTY_SEQUENCE });
                // Whoever swapped it meanwhile did not leave it empty.
                self.backend.swap(&key, Some(&version), tombstone.encode(&self.domain, &nonce()?).into())?;
            }
        }
        self.write_identity(false)?;
        self.domain.0.has_identity.store(true, Ordering::Relaxed);
        Ok(true)
    }

    /// Writes an identity: where there is none, or over one that is damaged.
    pub(crate) fn write_identity(&self, again: bool) -> Result<()> {
        let identity = Identity { id: nonce()?, created_unix_ms: now_unix_ms() };
        let bytes = Bytes::from(identity.encode(&self.domain));
        let key = self.keys.identity();
        if again {
            return self.backend.put_again(&key, bytes);
        }
        match self.backend.put_new(&key, bytes.clone()) {
            // Of two that come at the same moment, one is the identity.
            Err(e) if e.is_retryable() => self.backend.put_new(&key, bytes).map(drop),
            put => put.map(drop),
        }
    }

    /// What is wrong with the identity, if there is one.
    pub(crate) fn check_identity(&self) -> Result<Option<StoreError>> {
        let key = self.keys.identity();
        match self.get_whole(&key, identity::OBJECT_BYTES_MAX) {
            Ok(None) => Ok(None),
            Ok(Some(object)) => {
                let decoded = Identity::decode(&self.domain, &object);
                Ok(decoded.err().map(|why| StoreError::Damaged { key, why }))
            }
            Err(e) if e.is_retryable() => Err(e),
            Err(e) => Ok(Some(e)),
        }
    }

    /// Fails if nothing was ever stored here: whoever only reads is to know that there is nothing to find.
    pub(crate) fn check_there(&self) -> Result<()> {
        if self.backend.folders()?.is_empty() {
            return Err(StoreError::NothingStored { store: self.url().to_owned() });
        }
        Ok(())
    }

    /// Encrypted domains of which at least one is opened by no keyring: there are more of them than keyrings. Which keyring
    /// opens which domain only who has the key can tell, so all but the store's own are named.
    ///
    /// # Errors
    /// The store does not answer.
    pub fn unopened_domains(&self) -> Result<Vec<String>> {
        let is_domain = |folder: &String| {
            folder.len() == 32
                && folder.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
                && *folder != DomainId::PLAIN.to_string()
        };
        let mut domains: Vec<String> = self.backend.folders()?.into_iter().filter(is_domain).collect();
        if domains.is_empty() {
            return Ok(domains);
        }
        let mut keyrings = self.key_ids()?.len();
        if self.domain.is_encrypted() && self.settle()? {
            let own = self.keys.domain_prefix();
            domains.retain(|domain| domain != own);
            keyrings = keyrings.saturating_sub(1);
        }
        domains.sort();
        Ok(if domains.len() > keyrings { domains } else { Vec::new() })
    }

    /// Fails if there are domains that no keyring opens: the keyrings are lost, and another domain is not what is wanted.
    pub(crate) fn check_keyrings(&self) -> Result<()> {
        let domains = self.unopened_domains()?;
        if domains.is_empty() {
            return Ok(());
        }
        Err(StoreError::KeyringLost { domains: domains.join(", "), store: self.url().to_owned() })
    }

    /// Says so in the log if there are domains that no keyring opens.
    pub(crate) fn warn_of_lost_keyrings(&self) {
        if let Err(why) = self.check_keyrings() {
            tracing::warn!(%why, "there is more in this store than can be read");
        }
    }
}
