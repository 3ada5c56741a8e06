//! Objects that the store does not give out, as apart from damage: their bytes may be what they should be. Whoever reads
//! many objects names these and goes on with the rest.

use serde::Serialize;

use super::{Findings, reason};
use crate::{
    error::{Result, StoreError},
    store::Store,
};

/// Why an object cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UnreadableKind {
    /// It lies in an archive tier, and can be read once it is restored from there.
    Archived,
    /// The store does not permit it, while it answers other requests.
    Unreadable,
}

/// An object that is there, as far as is known, and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The object's key.
    pub object: String,
    /// Why it cannot be read.
    pub kind: UnreadableKind,
    /// The same in words, with what to do about it.
    pub why: String,
    /// The snapshots that cannot be restored whole as long as that is so.
    pub hurts: Vec<String>,
}

/// Whether the object itself is missing or is not what it should be.
pub(super) fn is_damage(error: &StoreError) -> bool {
    matches!(error, StoreError::Damaged { .. } | StoreError::Missing { .. } | StoreError::Format(_))
}

impl Findings {
    /// Notes what came of reading an object.
    ///
    /// # Errors
    /// `error`, where it concerns the whole store.
    pub(super) fn note(
        &mut self,
        store: &Store,
        object: &str,
        error: StoreError,
        hurts: impl IntoIterator<Item = usize>,
    ) -> Result<()> {
        if is_damage(&error) {
            self.add(object, &reason(&error), hurts);
            return Ok(());
        }
        let error = store.of_one_object(error)?;
        let kind = match error {
            StoreError::Archived { .. } => UnreadableKind::Archived,
            _ => UnreadableKind::Unreadable,
        };
        let found = self.unreadable.entry(object.to_owned());
        found.or_insert_with(|| (kind, error.to_string(), Default::default())).2.extend(hurts);
        Ok(())
    }
}

impl Store {
    /// The error back, if it says of one object alone that it cannot be read.
    ///
    /// # Errors
    /// `error`, where it concerns the whole store, or may.
    pub(crate) fn of_one_object(&self, error: StoreError) -> Result<StoreError> {
        match error {
            StoreError::Archived { .. } => Ok(error),
            // Credentials that are wrong or too old permit no listing either.
            StoreError::Denied { .. } if self.backend.folders().is_ok() => Ok(error),
            _ => Err(error),
        }
    }
}
