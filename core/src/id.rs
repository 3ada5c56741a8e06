//! Identities: what things are called by the hash of what they hold.

use std::fmt;

/// A BLAKE3-256 digest.
pub type Digest = [u8; 32];

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Bytes in an identity of this kind.
            pub const BYTES: usize = $len;

            /// Reads the hexadecimal form; `None` if it is not one.
            pub fn from_hex(hex: &str) -> Option<Self> {
                let bytes = hex.as_bytes();
                if bytes.len() != 2 * $len || !bytes.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                    return None;
                }
                let mut out = [0u8; $len];
                for (i, byte) in out.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()?;
                }
                Some($name(out))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

identity! {
    /// What a page is known by: BLAKE3-256 of its 4096 bytes, keyed when its domain is encrypted.
    ChunkId, 32
}
identity! {
    /// The first 128 bits of BLAKE3 over a frame's stored bytes: checked before anything is decoded.
    ///
    /// Half of a digest is enough here: a reference is only ever made by the writer of the frame, so an
    /// attacker would need a second preimage (2^128), never a mere collision.
    FrameHash, 16
}
identity! {
    /// A pack's name: BLAKE3-256 of its footer as stored, which lists the hash of every frame in it.
    PackId, 32
}
identity! {
    /// A root object's name: BLAKE3-256 of its bytes as stored. Changes when a snapshot is laid out anew.
    RootId, 32
}
identity! {
    /// A snapshot's identity: the hash of its logical content, whatever packs it lies in.
    SnapshotId, 32
}

impl FrameHash {
    /// Hashes a frame's stored bytes.
    pub fn of(stored: &[u8]) -> Self {
        let digest = blake3::hash(stored);
        let mut out = [0; Self::BYTES];
        out.copy_from_slice(&digest.as_bytes()[..Self::BYTES]);
        FrameHash(out)
    }
}

impl PackId {
    /// Hashes a footer as stored.
    pub fn of(footer: &[u8]) -> Self {
        PackId(*blake3::hash(footer).as_bytes())
    }
}

impl RootId {
    /// Hashes a root object as stored.
    pub fn of(object: &[u8]) -> Self {
        RootId(*blake3::hash(object).as_bytes())
    }
}
