//! Dedup domains: who may share pages with whom, and the keys that keep others out.
//!
//! Everything a domain stores is bound to it: chunk ids are keyed, and frames, footers and roots are sealed
//! with XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha). The nonce is synthetic, a keyed hash of the plaintext
//! and its context, so that sealing the same bytes twice gives the same object and a retried upload is idempotent.

use std::fmt;

use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{AeadInPlace, generic_array::GenericArray},
};

use crate::{
    error::FormatError,
    id::{ChunkId, Digest},
};

/// Bytes that sealing adds: the nonce before, the tag after.
pub const SEAL_OVERHEAD_BYTES: usize = NONCE_BYTES + TAG_BYTES;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
const CONTENT_PURPOSE: &str = "dormouse 2026 v1 logical content";
const SNAPSHOT_PURPOSE: &str = "dormouse 2026 v1 snapshot id";

/// Which domain an object belongs to; all zero for the one that is not encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainId(pub [u8; 16]);

impl DomainId {
    /// The domain without encryption.
    pub const PLAIN: DomainId = DomainId([0; 16]);
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DomainId({self})")
    }
}

/// A domain's 256-bit master key. Never printed.
#[derive(Clone)]
pub struct DomainKey([u8; 32]);

impl DomainKey {
    /// Wraps key bytes; they must come from a random source.
    pub fn new(bytes: [u8; 32]) -> Self {
        DomainKey(bytes)
    }

    /// The key's bytes, for wrapping it under another key.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    fn derive(&self, purpose: &str) -> Digest {
        blake3::derive_key(purpose, &self.0)
    }

    /// A public identifier that tells keys apart and gives nothing away.
    pub fn id(&self) -> DomainId {
        let digest = self.derive("dormouse 2026 v1 key id");
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        DomainId(id)
    }
}

impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DomainKey(id {})", self.id())
    }
}

#[derive(Clone)]
struct Keys {
    chunk: Digest,
    content: Digest,
    snapshot: Digest,
    name: Digest,
    nonce: Digest,
    aead: XChaCha20Poly1305,
}

/// A dedup domain: hashes and seals on behalf of those who share it.
#[derive(Clone)]
pub struct Domain {
    id: DomainId,
    keys: Option<Box<Keys>>,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({})", self.id)
    }
}

impl Domain {
    /// The domain without encryption.
    pub fn plain() -> Self {
        Domain { id: DomainId::PLAIN, keys: None }
    }

    /// The domain of a key.
    pub fn encrypted(key: &DomainKey) -> Self {
        let aead_key = key.derive("dormouse 2026 v1 aead");
        let keys = Keys {
            chunk: key.derive("dormouse 2026 v1 chunk id"),
            content: key.derive(CONTENT_PURPOSE),
            snapshot: key.derive(SNAPSHOT_PURPOSE),
            name: key.derive("dormouse 2026 v1 name"),
            nonce: key.derive("dormouse 2026 v1 nonce"),
            aead: XChaCha20Poly1305::new(GenericArray::from_slice(&aead_key)),
        };
        Domain { id: key.id(), keys: Some(Box::new(keys)) }
    }

    /// The domain's public identifier.
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// Whether this domain's objects are sealed.
    pub fn is_encrypted(&self) -> bool {
        self.keys.is_some()
    }

    /// The id of a page in this domain.
    pub fn chunk_id(&self, page: &[u8]) -> ChunkId {
        ChunkId(match &self.keys {
            Some(keys) => *blake3::keyed_hash(&keys.chunk, page).as_bytes(),
            None => *blake3::hash(page).as_bytes(),
        })
    }

    /// A hasher for the logical content of sections and blobs in this domain.
    pub fn content_hasher(&self) -> blake3::Hasher {
        match &self.keys {
            Some(keys) => blake3::Hasher::new_keyed(&keys.content),
            None => blake3::Hasher::new_derive_key(CONTENT_PURPOSE),
        }
    }

    /// A hasher for snapshot identities: apart from [`Domain::content_hasher`], because whoever chooses the bytes
    /// of a device-state blob must not thereby choose a snapshot's identity.
    pub(crate) fn snapshot_hasher(&self) -> blake3::Hasher {
        match &self.keys {
            Some(keys) => blake3::Hasher::new_keyed(&keys.snapshot),
            None => blake3::Hasher::new_derive_key(SNAPSHOT_PURPOSE),
        }
    }

    /// What a name is called in object keys: itself, or a keyed hash where names are secret.
    pub fn name_key(&self, name: &str) -> String {
        match &self.keys {
            Some(keys) => blake3::keyed_hash(&keys.name, name.as_bytes()).to_hex().to_string(),
            None => name.to_owned(),
        }
    }

    /// Seals `plain`, bound to `context` (what kind of object this is). Plain domains return it as it is.
    pub fn seal(&self, context: &'static str, plain: Vec<u8>) -> Vec<u8> {
        self.seal_with(context, &[], plain)
    }

    /// As [`Domain::seal`], and bound to `header` too: bytes stored in the clear beside the sealed ones. Their
    /// number is fixed for each context, so that what is hashed into the nonce has one reading only.
    pub(crate) fn seal_with(&self, context: &'static str, header: &[u8], plain: Vec<u8>) -> Vec<u8> {
        let Some(keys) = &self.keys else { return plain };
        let bound = bound_bytes(context, header);
        let mut hasher = blake3::Hasher::new_keyed(&keys.nonce);
        hasher.update(&bound).update(&plain);
        let digest = hasher.finalize();
        let nonce = XNonce::from_slice(&digest.as_bytes()[..NONCE_BYTES]);
        let mut out = Vec::with_capacity(plain.len() + SEAL_OVERHEAD_BYTES);
        out.extend_from_slice(nonce);
        out.extend_from_slice(&plain);
        match keys.aead.encrypt_in_place_detached(nonce, &bound, &mut out[NONCE_BYTES..]) {
            Ok(tag) => out.extend_from_slice(&tag),
            // Only for plaintexts over 256 GiB, 2^16 times the largest object the format allows.
            Err(_) => unreachable!("the plaintext is over the cipher's limit"),
        }
        out
    }

    /// Opens what [`Domain::seal`] made with the same context; anything else is [`FormatError::WrongKey`].
    pub fn open<'a>(
        &self,
        context: &'static str,
        sealed: &'a [u8],
    ) -> Result<std::borrow::Cow<'a, [u8]>, FormatError> {
        self.open_with(context, &[], sealed)
    }

    /// Opens what [`Domain::seal_with`] made.
    pub(crate) fn open_with<'a>(
        &self,
        context: &'static str,
        header: &[u8],
        sealed: &'a [u8],
    ) -> Result<std::borrow::Cow<'a, [u8]>, FormatError> {
        let Some(keys) = &self.keys else { return Ok(sealed.into()) };
        let (nonce, rest) =
            sealed.split_at_checked(NONCE_BYTES).ok_or(FormatError::Truncated("sealed object"))?;
        let (body, tag) = rest
            .len()
            .checked_sub(TAG_BYTES)
            .and_then(|at| rest.split_at_checked(at))
            .ok_or(FormatError::Truncated("sealed object"))?;
        let mut plain = body.to_vec();
        keys.aead
            .decrypt_in_place_detached(
                XNonce::from_slice(nonce),
                &bound_bytes(context, header),
                &mut plain,
                GenericArray::from_slice(tag),
            )
            .map_err(|_| FormatError::WrongKey(context))?;
        Ok(plain.into())
    }
}

/// What a seal is bound to, beside its plaintext.
fn bound_bytes(context: &'static str, header: &[u8]) -> Vec<u8> {
    [context.as_bytes(), &[0], header].concat()
}
