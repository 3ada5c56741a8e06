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
/// The store's; [`OpenKeptError::NoKeyring`] if it has none for the key, as where a volume is not mounted yet;
/// [`OpenKeptError::OtherStore`] if it was kept from another one, or under another key.
pub fn open(kept: &KeptSnapshot, store: &Store) -> Result<Snapshot, OpenKeptError> {
    // What was noted can only be read in the domain that the keyring opens.
    if !store.knows_key()? {
        return Err(OpenKeptError::NoKeyring { name: kept.name.clone(), store: store.url().to_owned() });
    }
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
    /// The store has no keyring for the key in use.
    #[error(
        "snapshot {name} cannot be opened: {store} does not know the key in use; bring the store back, or give the key \
         it was woken with"
    )]
    NoKeyring {
        /// What it was called.
        name: String,
        /// The store asked.
        store: String,
    },
    /// The store's own.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dormouse_chunkstore::{
        ImageSource, ImportRequest, NoProgress, StoreOptions,
        backend::{
            faulty::{Fault, FaultyBackend},
            open_url,
        },
    };
    use dormouse_core::{DomainKey, ImageId, ImageKind, Name};

    use super::*;

    fn import(store: &Store, name: &Name) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [1; 4096]).expect("written");
        let mut request = ImportRequest::new(name.clone());
        let (id, path) = (ImageId::new("memory").expect("an id"), file.path().to_owned());
        request.images.push(ImageSource { id, kind: ImageKind::Memory, path, dirty: None });
        store.import(&request, &NoProgress).expect("imported");
    }

    /// A store that could not be asked for its keyring counted as another one, and its VMs were given up for good.
    #[test]
    fn a_keyring_that_cannot_be_read_yet_is_no_other_store() {
        let backend = open_url("memory://").expect("a store");
        let key = |byte| StoreOptions { key: Some(DomainKey::new([byte; 32])), ..Default::default() };
        let name = Name::new("monday").expect("a name");
        let writer = Store::with_backend(backend.clone(), key(7));
        import(&writer, &name);
        let kept = note(&writer.open_snapshot(&name).expect("the snapshot"));

        let away = Arc::new(FaultyBackend::new(backend.clone(), |_, _, _| Some(Fault::Fail)));
        let store = Store::with_backend_unasked(away.clone(), key(7));
        let error = open(&kept, &store).expect_err("the store is away");
        assert!(matches!(error, OpenKeptError::Store(StoreError::Unavailable { .. })), "{error}");
        away.set_plan(|_, _, _| None);
        assert_eq!(open(&kept, &store).expect("it is back").reference().name, name);

        let empty = Store::with_backend_unasked(open_url("memory://").expect("a store"), key(7));
        assert!(matches!(open(&kept, &empty), Err(OpenKeptError::NoKeyring { .. })));
        let other = Store::with_backend(backend, key(8));
        import(&other, &name);
        assert!(matches!(open(&kept, &other), Err(OpenKeptError::OtherStore { .. })));
    }
}
