//! Object keys: where in a store each kind of object is.

use dormouse_core::{Domain, DomainId, Name, PackId, RootId};

/// Where keyrings are: beside the domains, since they are what tells which domain a key opens.
pub(crate) const KEYRING_PREFIX: &str = "keys";

/// The keyring of a user's key.
pub(crate) fn keyring_key(user: DomainId) -> String {
    format!("{KEYRING_PREFIX}/{user}")
}

/// Prefixes and keys of one domain.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    domain: String,
}

impl Keys {
    pub(crate) fn new(domain: &Domain) -> Self {
        let domain = if domain.id() == DomainId::PLAIN { "plain".into() } else { domain.id().to_string() };
        Keys { domain }
    }

    pub(crate) fn domain_prefix(&self) -> &str {
        &self.domain
    }

    /// That the domain is one.
    pub(crate) fn identity(&self) -> String {
        format!("{}/identity", self.domain)
    }

    pub(crate) fn packs(&self) -> String {
        format!("{}/packs", self.domain)
    }

    /// Packs are spread over 256 prefixes, so that a listing can be split and a local folder stays small.
    pub(crate) fn pack(&self, id: PackId) -> String {
        format!("{}/packs/{:02x}/{id}", self.domain, id.0[0])
    }

    pub(crate) fn roots(&self) -> String {
        format!("{}/roots", self.domain)
    }

    pub(crate) fn root(&self, id: RootId) -> String {
        format!("{}/roots/{id}", self.domain)
    }

    pub(crate) fn refs(&self) -> String {
        format!("{}/refs", self.domain)
    }

    pub(crate) fn reference(&self, domain: &Domain, name: &Name) -> String {
        self.reference_at(&domain.name_key(name.as_str()))
    }

    /// The reference of a name of which only the last part of that key is known.
    pub(crate) fn reference_at(&self, name_key: &str) -> String {
        format!("{}/refs/{name_key}", self.domain)
    }

    /// The resume stream of a name: found without knowing what the name stands for.
    pub(crate) fn stream(&self, domain: &Domain, name: &Name) -> String {
        format!("{}/streams/{}", self.domain, domain.name_key(name.as_str()))
    }

    pub(crate) fn streams(&self) -> String {
        format!("{}/streams", self.domain)
    }

    pub(crate) fn condemned_all(&self) -> String {
        format!("{}/condemned", self.domain)
    }

    pub(crate) fn announced_all(&self) -> String {
        format!("{}/announced", self.domain)
    }

    /// The announcement of a snapshot that is about to get a name.
    pub(crate) fn announced(&self, unique: blake3::Hash) -> String {
        format!("{}/announced/{unique}", self.domain)
    }

    /// The lease of whoever collects garbage.
    pub(crate) fn gc_lease(&self) -> String {
        format!("{}/gc/lease", self.domain)
    }

    /// The mark by which garbage collection announces that it is about to delete an object.
    pub(crate) fn condemned(&self, object_key: &str) -> String {
        let tail = object_key.rsplit('/').next().unwrap_or(object_key);
        format!("{}/condemned/{tail}", self.domain)
    }
}
