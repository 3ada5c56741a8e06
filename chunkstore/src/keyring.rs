//! Whose key opens which domain: finding it on opening, founding it at the first import, rotating it.
//!
//! A domain's key is random and never leaves the store but wrapped under the key of a user, in `keys/<id of that key>`.
//! The object is read once, when a store is opened with a key; without a key nothing is asked. Where it does not exist
//! yet the domain is made by the first import. Two hosts that do so at the same moment both look who was first.

use std::{
    fs::File,
    io::Read as _,
    ops::Deref,
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

use bytes::Bytes;
use dormouse_core::{Domain, DomainId, DomainKey, Keyring, Named, Nonce, Tombstone, keyring};
use serde::Serialize;

use crate::{
    backend::PutOutcome,
    error::{Result, StoreError},
    keys::{KEYRING_PREFIX, Keys, keyring_key},
    store::Store,
};

/// A domain, what its objects are called, and where this host caches them.
#[derive(Debug)]
struct Opened {
    domain: Domain,
    keys: Keys,
    cache_dir: Option<PathBuf>,
}

/// The domain a store works in, once it is known.
#[derive(Debug)]
pub(crate) struct Access {
    user: Option<DomainKey>,
    cache_base: Option<PathBuf>,
    /// What there is to work with before the keyring was read or made: a domain in which nobody stores anything, or,
    /// without a key, the plain one.
    before: Opened,
    settled: OnceLock<(Opened, DomainKey)>,
    /// Whether the domain is known to have an identity.
    pub(crate) has_identity: AtomicBool,
}

impl Access {
    pub(crate) fn new(user: Option<DomainKey>, cache_base: Option<PathBuf>) -> Arc<Self> {
        let domain = user.as_ref().map_or_else(Domain::plain, Domain::encrypted);
        let before = Opened::new(domain, cache_base.as_ref());
        let (settled, has_identity) = (OnceLock::new(), false.into());
        Arc::new(Access { user, cache_base, before, settled, has_identity })
    }

    fn opened(&self) -> &Opened {
        self.settled.get().map_or(&self.before, |(opened, _)| opened)
    }

    fn settle(&self, key: DomainKey) {
        let opened = Opened::new(Domain::encrypted(&key), self.cache_base.as_ref());
        // Whoever else was at it read the same object.
        let _ = self.settled.set((opened, key));
    }

    /// Where this host caches what it knows of the store.
    pub(crate) fn cache_base(&self) -> Option<&std::path::Path> {
        self.cache_base.as_deref()
    }

    /// Where this host caches the domain.
    pub(crate) fn cache_dir(&self) -> Option<&std::path::Path> {
        self.opened().cache_dir.as_deref()
    }
}

impl Opened {
    fn new(domain: Domain, cache_base: Option<&PathBuf>) -> Self {
        let keys = Keys::new(&domain);
        let cache_dir = cache_base.map(|base| base.join(keys.domain_prefix()));
        Opened { domain, keys, cache_dir }
    }
}

/// The store's domain.
#[derive(Clone, Debug)]
pub(crate) struct TheDomain(pub(crate) Arc<Access>);

impl Deref for TheDomain {
    type Target = Domain;

    fn deref(&self) -> &Domain {
        &self.0.opened().domain
    }
}

/// The names of its objects.
#[derive(Clone, Debug)]
pub(crate) struct TheKeys(pub(crate) Arc<Access>);

impl Deref for TheKeys {
    type Target = Keys;

    fn deref(&self) -> &Keys {
        &self.0.opened().keys
    }
}

/// A key the store knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KnownKey {
    /// Its public identifier.
    pub key_id: String,
    /// Whether it is the one in use.
    pub in_use: bool,
}

/// The keys of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyList {
    /// The domain that the key in use opens: the folder its snapshots are under.
    pub domain: Option<String>,
    /// Every key that opens some domain, or did.
    pub keys: Vec<KnownKey>,
}

/// What a rotation did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RotateReport {
    /// The domain that both keys open.
    pub domain: String,
    /// The key it was opened with.
    pub old_key_id: String,
    /// The key that opens it as well now.
    pub new_key_id: String,
    /// Whether the old one opens nothing any more.
    pub dropped_old: bool,
}

impl Store {
    /// The key's domain if it is known or can be found out; `false` if the store does not know the key. Without a
    /// key there is nothing to find out.
    pub(crate) fn settle(&self) -> Result<bool> {
        let access = &self.domain.0;
        let Some(user) = &access.user else { return Ok(true) };
        if access.settled.get().is_some() {
            return Ok(true);
        }
        match self.read_keyring(user)? {
            Some(Keyring::Wrapped(key)) => access.settle(key),
            Some(Keyring::Retired { successor }) => return Err(retired(user.id(), successor)),
            None => return Ok(false),
        }
        Ok(true)
    }

    /// As [`Store::settle`] for who only reads: a key that the store does not know is an error if it knows others.
    pub(crate) fn settle_known(&self) -> Result<bool> {
        if self.settle()? {
            return Ok(true);
        }
        let known = self.key_ids()?;
        match (known.is_empty(), &self.domain.0.user) {
            (false, Some(user)) => Err(StoreError::UnknownKey {
                key: user.id().to_string(),
                known: known.join(", "),
                store: self.url().to_owned(),
            }),
            _ => Ok(false),
        }
    }

    /// Makes the key's domain if there is none yet.
    ///
    /// # Errors
    /// [`StoreError::InTheClear`] without a key, if the store has keyrings and that was not permitted;
    /// [`StoreError::KeyringLost`] instead of a domain beside one that nobody can open any more.
    pub(crate) fn found(&self) -> Result<()> {
        let known =
            if self.domain.0.user.is_none() && !self.no_encryption { self.key_ids()? } else { Vec::new() };
        if !known.is_empty() {
            return Err(StoreError::InTheClear { known: known.join(", "), store: self.url().to_owned() });
        }
        let is_settled = self.settle()?;
        if !is_settled {
            self.check_keyrings()?;
        }
        self.prove_conditions()?;
        let Some(user) = self.domain.0.user.as_ref().filter(|_| !is_settled) else { return Ok(()) };
        let ours = random_key()?;
        let object = Bytes::from(Keyring::Wrapped(ours.clone()).encode(user));
        let put = self.backend.put_new(&keyring_key(user.id()), object);
        if matches!(put, Ok(PutOutcome::Created)) {
            tracing::info!(key = %user.id(), domain = %ours.id(), "a new domain was made for this key");
            self.domain.0.settle(ours);
            return Ok(());
        }
        // Somebody else was first, or the answer was lost on its way: what is there now counts.
        if self.settle()? {
            return Ok(());
        }
        put.map(|_| ())?;
        Err(StoreError::Conflict { name: format!("the keyring of {}", user.id()) })
    }

    /// Called where nothing was found: an error if no key was given, and everything there is needs one.
    pub(crate) fn hint_at_key(&self) -> Result<()> {
        if self.domain.is_encrypted() {
            return Ok(());
        }
        let mut plain = false;
        self.backend.list(&self.keys.refs(), &mut |meta| {
            // In the clear, how large a tombstone is follows from its name.
            let name_key = meta.key.rsplit('/').next().unwrap_or_default().to_owned();
            let tombstone = Named::Removed(Tombstone { name_key, sequence: 0 });
            let bytes = tombstone.encode(&self.domain, &Nonce::default()).len() as u64;
            plain |= meta.bytes > 0 && meta.bytes != bytes;
        })?;
        if plain {
            return Ok(());
        }
        let known = self.key_ids()?;
        if known.is_empty() {
            return Ok(());
        }
        Err(StoreError::KeyNeeded { known: known.join(", "), store: self.url().to_owned() })
    }

    /// The keys that the store knows, and the domain that the one in use opens.
    pub fn key_list(&self) -> Result<KeyList> {
        let mine = self.domain.0.user.as_ref().map(|user| user.id().to_string());
        let settled = self.settle()? && mine.is_some();
        let keys = self
            .key_ids()?
            .into_iter()
            .map(|key_id| KnownKey { in_use: mine.as_ref() == Some(&key_id), key_id });
        Ok(KeyList { domain: settled.then(|| self.domain.id().to_string()), keys: keys.collect() })
    }

    /// Lets `new` open the domain that the key in use opens; with `drop_old` that one opens it no more. No data is
    /// written anew. Whoever kept a copy of the old key and of its keyring object can still read with them.
    ///
    /// # Errors
    /// [`StoreError::Usage`] without a key in use, or if `new` opens another domain already.
    pub fn rotate_key(&self, new: &DomainKey, drop_old: bool) -> Result<RotateReport> {
        let access = &self.domain.0;
        let usage = |why: String| Err(StoreError::Usage(why));
        let Some(old) = &access.user else {
            return usage("no key is in use that could be rotated; pass --key-file".into());
        };
        if new.id() == old.id() {
            return usage(
                "the new key is the old one; `dormouse key generate --out PATH` makes another".into(),
            );
        }
        let domain_key = match (self.settle_known()?, access.settled.get()) {
            (true, Some((_, key))) => key,
            _ => return usage("nothing was stored with this key yet: simply use the new one".into()),
        };
        let key = keyring_key(new.id());
        let object = Bytes::from(Keyring::Wrapped(domain_key.clone()).encode(new));
        let put = self.backend.put_new(&key, object);
        // What is there counts, not what was answered; the old key goes only once the new one is proven to work.
        match self.read_keyring(new)? {
            Some(Keyring::Wrapped(found)) if found.id() == domain_key.id() => {}
            Some(Keyring::Wrapped(_)) => {
                return usage(format!("key {} opens another domain already", new.id()));
            }
            Some(Keyring::Retired { successor }) => return Err(retired(new.id(), successor)),
            None => {
                put?;
                return Err(StoreError::Missing { key, referrer: "the new key".into() });
            }
        }
        if drop_old {
            let note = Keyring::Retired { successor: new.id() }.encode(old);
            self.backend.put_again(&keyring_key(old.id()), note.into())?;
        }
        Ok(RotateReport {
            domain: domain_key.id().to_string(),
            old_key_id: old.id().to_string(),
            new_key_id: new.id().to_string(),
            dropped_old: drop_old,
        })
    }

    fn read_keyring(&self, user: &DomainKey) -> Result<Option<Keyring>> {
        let key = keyring_key(user.id());
        let Some(object) = self.get_whole(&key, keyring::OBJECT_BYTES_MAX)? else { return Ok(None) };
        Keyring::decode(user, &object).map(Some).map_err(|why| StoreError::Damaged { key, why })
    }

    pub(crate) fn key_ids(&self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        self.backend.list(KEYRING_PREFIX, &mut |meta| {
            ids.extend(meta.key.rsplit('/').next().map(str::to_owned));
        })?;
        ids.sort();
        Ok(ids)
    }
}

fn retired(key: DomainId, successor: DomainId) -> StoreError {
    StoreError::KeyRetired { key: key.to_string(), successor: successor.to_string() }
}

/// A key from the operating system's random source.
pub fn random_key() -> Result<DomainKey> {
    let source = "/dev/urandom";
    let mut key = [0; 32];
    File::open(source)
        .and_then(|mut file| file.read_exact(&mut key))
        .map_err(|e| StoreError::file("reading", source.as_ref(), e))?;
    Ok(DomainKey::new(key))
}
