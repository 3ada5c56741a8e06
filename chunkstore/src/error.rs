//! What can go wrong with a store, sorted by what the caller can do about it.

use dormouse_core::FormatError;
use thiserror::Error;

/// The result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A store operation failed.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No snapshot has this name.
    #[error("no snapshot is called {name:?} in {store}; `dormouse ls` shows those that are")]
    NoSuchSnapshot {
        /// The name.
        name: String,
        /// The store's URL.
        store: String,
    },
    /// Nothing was ever stored there, though there might have been.
    #[error(
        "there is no store at {store}: nothing was ever stored there, or it is not mounted; see that the address is right \
         (the first import makes a store)"
    )]
    NothingStored {
        /// The store's URL.
        store: String,
    },
    /// There are encrypted domains that no keyring opens.
    #[error(
        "{store} has domains that no keyring opens ({domains}): put the objects below keys/ back, from a copy of the \
         store; only if that domain is to be given up, delete it to go on without"
    )]
    KeyringLost {
        /// The domains, at least one of which it is.
        domains: String,
        /// The store's URL.
        store: String,
    },
    /// Something is about to be stored without encryption beside what is encrypted.
    #[error(
        "{store} is used with keys ({known}) and none was given, so this would be stored in the clear; pass --key-file or \
         set DORMOUSE_KEY_FILE, or pass --no-encryption if that is what you want"
    )]
    InTheClear {
        /// Public identifiers of keys that the store knows.
        known: String,
        /// The store's URL.
        store: String,
    },
    /// The snapshot has no image or device state of this name.
    #[error("snapshot {snapshot:?} has no {kind} called {id:?}; it has {has}")]
    NoSuchPart {
        /// The snapshot.
        snapshot: String,
        /// "memory", "disk" or "state".
        kind: &'static str,
        /// What was asked for.
        id: String,
        /// What there is.
        has: String,
    },
    /// The store does not know this key, but others.
    #[error(
        "{store} has nothing that key {key} opens; the keys it knows are {known} (`dormouse key id` shows which one a \
         key file holds)"
    )]
    UnknownKey {
        /// Public identifier of the key in use.
        key: String,
        /// Those that the store knows.
        known: String,
        /// The store's URL.
        store: String,
    },
    /// Nothing is stored without encryption, and no key was given.
    #[error(
        "everything in {store} is encrypted and no key was given; pass --key-file or set DORMOUSE_KEY_FILE (the keys \
         it knows are {known})"
    )]
    KeyNeeded {
        /// Public identifiers of keys that the store knows.
        known: String,
        /// The store's URL.
        store: String,
    },
    /// The key was taken out of use.
    #[error("key {key} was replaced by key {successor}; use that one")]
    KeyRetired {
        /// Public identifier of the key in use.
        key: String,
        /// Public identifier of the one that took its place.
        successor: String,
    },
    /// An object is missing though something refers to it.
    #[error(
        "{key} is missing from the store, though {referrer} needs it; `dormouse verify` shows whom it hurts"
    )]
    Missing {
        /// The object's key.
        key: String,
        /// What refers to it.
        referrer: String,
    },
    /// An object is not what the reference to it says.
    #[error("{key} is damaged: {why}; `dormouse verify` shows whom it hurts")]
    Damaged {
        /// The object's key.
        key: String,
        /// What is wrong with it.
        why: FormatError,
    },
    /// Somebody else moved the name at the same time.
    #[error("{name:?} was changed by somebody else at the same moment; look at it and try again")]
    Conflict {
        /// The name.
        name: String,
    },
    /// The name is taken, and nobody said that it may be moved.
    #[error(
        "a snapshot called {name} exists; choose another name, pass --replace, or make it the parent with --parent {name}"
    )]
    Exists {
        /// The name.
        name: String,
    },
    /// Somebody else collects garbage or repacks, which one at a time may do.
    #[error(
        "garbage is being collected by {owner}; try again when it is done, or {minutes} minutes after it died"
    )]
    Busy {
        /// Who it is: a process and its host.
        owner: String,
        /// How long it may say nothing before it is taken for dead.
        minutes: u64,
    },
    /// Pages that were to be shared were collected as garbage while the import ran.
    #[error("packs this import shares were collected meanwhile ({packs}); run the import again")]
    LostRace {
        /// How many.
        packs: usize,
    },
    /// The backend could not be reached, or not in time. Trying again may help.
    #[error("{doing} failed: the store at {store} did not answer ({why}); nothing was lost, try again")]
    Unavailable {
        /// The operation.
        doing: String,
        /// The store's URL.
        store: String,
        /// What it said.
        why: String,
    },
    /// A name was about to be moved and the backend did not answer, nor could it be asked whether it moved: it may have,
    /// and it may move yet. What it would stand for is stored in either case.
    #[error(
        "the store at {store} did not answer when {name:?} was moved ({why}): it may have moved or not; look at it, or \
         try again"
    )]
    InDoubt {
        /// The name.
        name: String,
        /// The store's URL.
        store: String,
        /// What it said.
        why: String,
    },
    /// The backend refuses.
    #[error("{doing} is not permitted by the store at {store}: {why}")]
    Denied {
        /// The operation.
        doing: String,
        /// The store's URL.
        store: String,
        /// What it said.
        why: String,
    },
    /// The object is there, in an archive tier: it can be read once somebody has had it restored from there.
    #[error(
        "{doing} failed: the object lies in an archive tier of the store at {store} ({why}); restore it from the archive \
         tier, and let no lifecycle rule move the store's objects there"
    )]
    Archived {
        /// The operation.
        doing: String,
        /// The store's URL.
        store: String,
        /// What it said.
        why: String,
    },
    /// The bucket or container does not exist.
    #[error(
        "there is no store at {store} ({why}); make the bucket or container, or see that the URL is right"
    )]
    NoSuchStore {
        /// The store's URL.
        store: String,
        /// What it said.
        why: String,
    },
    /// The store cannot do what is asked of it, or does not keep its word; no other attempt will end otherwise.
    #[error(
        "the store at {store} cannot keep snapshots safely: {why}; use one that honours the conditions of writes \
         (If-None-Match and If-Match)"
    )]
    Unsupported {
        /// The store's URL.
        store: String,
        /// What it does or says.
        why: String,
    },
    /// The way to the store is configured wrongly: a region, an endpoint, plain HTTP without permission.
    #[error("{doing} failed: the store at {store} is not configured rightly ({why}); {remedy}")]
    Config {
        /// The operation.
        doing: String,
        /// The store's URL.
        store: String,
        /// What it or the client said.
        why: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// No room left.
    #[error(
        "{doing} failed: the disk is full, or the quota used up; the store is as it was before, free some room and try \
         again"
    )]
    Full {
        /// The operation.
        doing: String,
    },
    /// A file on this machine could not be read or written.
    #[error("{doing} {path}: {source}")]
    File {
        /// "reading", "writing".
        doing: &'static str,
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file was written to while it was imported: what was read is no state that it ever had.
    #[error(
        "{path} changed while it was imported: {how}; nothing was stored. Stop what writes to it, or import a copy (or \
         pass --allow-changing to store what is read all the same)"
    )]
    Changed {
        /// The file.
        path: String,
        /// What is different.
        how: String,
    },
    /// Bytes could not be decoded, before it is known which object they belong to.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Dormouse contradicts itself. Nothing was acknowledged.
    #[error("internal error, please report it: {0}")]
    Bug(&'static str),
    /// The request makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl StoreError {
    /// Whether the same call may succeed later without anybody mending anything.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            StoreError::Unavailable { .. }
                | StoreError::InDoubt { .. }
                | StoreError::LostRace { .. }
                | StoreError::Busy { .. }
        )
    }

    pub(crate) fn file(doing: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::StorageFull {
            return StoreError::Full { doing: format!("{doing} {}", path.display()) };
        }
        StoreError::File { doing, path: path.display().to_string(), source }
    }
}
