//! The snapshot of a VM that outlives its server: noted for a keeper, and opened again.

use dormouse_chunkstore::{Snapshot, Store, StoreError};
use dormouse_core::Reference;
use dormouse_keeper::KeptSnapshot;

/// Notes an opened snapshot.
pub fn note(snapshot: &Snapshot) -> KeptSnapshot {
    let reference = snapshot.reference();
    let encoded = reference.encode(snapshot.store().domain());
    KeptSnapshot {
        name: reference.name.to_string(),
        snapshot: reference.snapshot.to_string(),
        reference: encoded.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

/// Opens it again. If it was laid out anew meanwhile, its name leads to it, unless that was moved.
///
/// # Errors
/// The store's; [`OpenKeptError::OtherStore`] if it was kept from another one, or under another key.
pub fn open(kept: &KeptSnapshot, store: &Store) -> Result<Snapshot, OpenKeptError> {
    let pairs = kept
        .reference
        .as_bytes()
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|text| u8::from_str_radix(text, 16).ok()));
    let bytes: Option<Vec<u8>> = pairs.collect();
    let reference = bytes.and_then(|bytes| Reference::decode(store.domain(), None, &bytes).ok());
    let reference = reference.filter(|r| Some(r.snapshot) == kept.id());
    let other = || OpenKeptError::OtherStore { name: kept.name.clone(), store: store.url().to_owned() };
    let reference = reference.ok_or_else(other)?;
    let (name, id) = (reference.name.clone(), reference.snapshot);
    match store.open_reference(reference) {
        Err(missing @ StoreError::Missing { .. }) => match store.open_snapshot(&name) {
            Ok(moved) if moved.reference().snapshot == id => Ok(moved),
            _ => Err(missing.into()),
        },
        opened => Ok(opened?),
    }
}

/// Why the snapshot of a kept VM cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenKeptError {
    /// The store is another one, or opened under another key.
    #[error(
        "snapshot {name} was not kept from {store}, or under another key: give the store and key it was woken from"
    )]
    OtherStore {
        /// What it was called.
        name: String,
        /// The store asked.
        store: String,
    },
    /// The store's own.
    #[error(transparent)]
    Store(#[from] StoreError),
}
