//! What can be wrong with bytes that claim to be Dormouse's.

use thiserror::Error;

/// Why an object could not be decoded. Decoders never panic and never guess.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// The first bytes are not those of this kind of object.
    #[error("not a Dormouse {0}: its first bytes are something else")]
    NotThisKind(&'static str),
    /// The object needs a newer reader.
    #[error(
        "{what} needs a reader of format version {needs}, this one reads up to {reads}; use a newer dormouse"
    )]
    TooNew {
        /// The kind of object.
        what: &'static str,
        /// The oldest reader version that can read it.
        needs: u16,
        /// The version this build reads.
        reads: u16,
    },
    /// The object uses features this build does not know.
    #[error("{what} uses unknown features (flags {flags:#x}); use a newer dormouse")]
    UnknownFlags {
        /// The kind of object.
        what: &'static str,
        /// The flags that are not known.
        flags: u32,
    },
    /// The object ends before it should.
    #[error("{0} is truncated")]
    Truncated(&'static str),
    /// There are bytes after the end.
    #[error("{0} has bytes after its end")]
    TrailingBytes(&'static str),
    /// A length or count is above its limit.
    #[error("{what} has {value}, above the limit of {limit}")]
    OverLimit {
        /// What was counted.
        what: &'static str,
        /// The value found.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes do not have the hash their reference carries.
    #[error("{0} is damaged: its bytes do not have the hash that refers to them")]
    HashMismatch(&'static str),
    /// A field has a value that means nothing.
    #[error("{what} is malformed: {why}")]
    Malformed {
        /// The kind of object.
        what: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// Verified bytes could not be decompressed to the length promised.
    #[error("{0} does not decompress to what its reference says")]
    Undecodable(&'static str),
    /// Authenticated decryption failed.
    #[error("{0} cannot be decrypted with this key: it belongs to another key or was tampered with")]
    WrongKey(&'static str),
    /// The object is encrypted and no key was given.
    #[error("{0} is encrypted and no key was given; pass --key-file or set DORMOUSE_KEY_FILE")]
    KeyMissing(&'static str),
    /// A name breaks the rules for names.
    #[error("{what} name {name:?} is not allowed: {why}")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name as given, cut short.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
}
