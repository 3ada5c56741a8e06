//! What Dormouse asks of an object store, and the only place where objects are read, written and deleted.
//!
//! The trait is blocking: fault threads and import workers are plain threads, and a local store needs no async
//! runtime at all. It is small so that tests can stand in for it and inject every fault (see [`faulty`]).

mod aws_profile;
mod classify;
#[cfg(test)]
pub(crate) mod fake_s3;
pub mod faulty;
mod http;
mod local;
pub mod modelled;
pub(crate) mod object;
mod reserve;
mod runner;
mod url;

use std::{fmt::Debug, ops::Range};

use bytes::Bytes;

use crate::error::{Result, StoreError};

pub use self::url::open_url;

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// When it was last written, milliseconds since 1970 UTC, by the store's clock.
    pub modified_unix_ms: u64,
}

/// What a reader saw of a mutable object; a swap succeeds only if it is still so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub(crate) e_tag: Option<String>,
    pub(crate) version: Option<String>,
}

/// Most bytes of a mutable object: a reference, or the collector's lease, which is smaller.
pub const MUTABLE_BYTES_MAX: u64 = dormouse_core::reference::OBJECT_BYTES_MAX;

/// Whether a new object was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is there now, durably.
    Created,
    /// There was one already; it may be one's own, if an answer was lost on its way.
    Exists,
}

/// Objects that were begun and never finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// How many.
    pub files: u64,
    /// Bytes they take.
    pub bytes: u64,
}

/// An object store.
pub trait Backend: Send + Sync + Debug {
    /// The store's URL, for messages.
    fn url(&self) -> &str;

    /// Whether reading costs no round trip: then nothing is fetched ahead.
    fn is_local(&self) -> bool {
        false
    }

    /// Whether it is known that this store keeps the conditions of writes, as a local directory does: then it is not tried
    /// before the first write. A backend around another one says what that one says.
    fn keeps_conditions(&self) -> bool {
        false
    }

    /// The object's bytes, or those in `range`; `None` if there is no such object. A range that reaches past the
    /// end gives what there is.
    fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>>;

    /// The bytes in `range`, handed to `each` in order and as they arrive, until it returns `false`; whether there is
    /// such an object. What arrives before an error is handed over all the same.
    fn get_parts(&self, key: &str, range: Range<u64>, each: &mut dyn FnMut(Bytes) -> bool) -> Result<bool> {
        let whole = self.get(key, Some(range))?;
        Ok(whole.map(each).is_some())
    }

    /// Puts the bytes in `range` into `into`, whose content is forgotten, if they can be had without waiting for a disk
    /// or a network; `false` if not, or if that cannot be told.
    fn get_at_hand(&self, _key: &str, _range: Range<u64>, _into: &mut Vec<u8>) -> bool {
        false
    }

    /// The object as a file of this host, if it is one: who reads it bit by bit then need not look it up each time, and
    /// reads one object whatever becomes of its name.
    fn file(&self, _key: &str) -> Option<std::fs::File> {
        None
    }

    /// The object's size, or `None`.
    fn head(&self, key: &str) -> Result<Option<u64>>;

    /// Writes an immutable object; durable once this returns.
    fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutOutcome>;

    /// Replaces an immutable object whose bytes were found to be damaged.
    fn put_again(&self, key: &str, bytes: Bytes) -> Result<()>;

    /// A mutable object and its version. An empty object is a tombstone and counts as absent, yet has a version. Of one
    /// larger than any may be, [`MUTABLE_BYTES_MAX`] bytes and one more are given, so that it is no more than damaged.
    fn get_versioned(&self, key: &str) -> Result<(Option<Bytes>, Option<Version>)>;

    /// Writes a mutable object if its version is still `expected` (`None`: if there is none yet). Empty `bytes`
    /// remove it. Whether it was written; durable once this returns `true`.
    fn swap(&self, key: &str, expected: Option<&Version>, bytes: Bytes) -> Result<bool>;

    /// As [`Backend::swap`] where that failed for want of room: the bytes, which are fewer than those that are there, go
    /// where those are. A crash in the midst may leave the object damaged, so this is for one that goes away.
    fn swap_without_room(&self, key: &str, _expected: Option<&Version>, _bytes: Bytes) -> Result<bool> {
        Err(StoreError::Full { doing: format!("moving {key}") })
    }

    /// Deletes an object; done as well if there is none.
    fn delete(&self, key: &str) -> Result<()>;

    /// Every object below `prefix`, in no particular order.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta)) -> Result<()>;

    /// The first parts of all keys that have more than one: where the store has anything, there is one.
    fn folders(&self) -> Result<Vec<String>> {
        let mut folders = std::collections::BTreeSet::new();
        self.list("", &mut |meta| {
            folders.extend(meta.key.split_once('/').map(|(folder, _)| folder.to_owned()));
        })?;
        Ok(folders.into_iter().collect())
    }

    /// Deletes what writers that died have left half written below `prefix` and no listing shows, if it was last written
    /// before `before_unix_ms` by the store's clock; with `dry_run` only says what there is. Stores that take objects as a
    /// whole have nothing of the kind.
    fn sweep_leftovers(&self, prefix: &str, before_unix_ms: u64, dry_run: bool) -> Result<Leftovers> {
        let _ = (prefix, before_unix_ms, dry_run);
        Ok(Leftovers::default())
    }

    /// Keeps some room back for [`Backend::release_reserve`], where room can run out so that nothing can be freed. Done as
    /// well where there is none to keep.
    fn keep_reserve(&self) {}

    /// Lets go of the room kept back, since the disk is full; whether there was any.
    fn release_reserve(&self) -> bool {
        false
    }
}
