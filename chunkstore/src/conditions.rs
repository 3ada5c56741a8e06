//! Whether a store keeps the conditions of writes, found out before anything is written to it.
//!
//! That two writers of one name do not lose each other's snapshots, and that collectors do not delete what writers rely on,
//! rests on "create only if there is none" and "replace only if it is still so". Some servers and proxies ignore
//! both and answer "done". So a writer tries them once for each store on an object that means nothing, and remembers that they
//! are kept beside the other caches of that store.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use dormouse_core::Domain;

use crate::{
    backend::PutOutcome,
    error::{Result, StoreError},
    keys::Keys,
    store::{Store, now_unix_ms},
};

/// Attempts in which somebody deletes the object that conditions are tried on, as a collector may.
const ATTEMPTS: usize = 3;
/// What tells apart the attempts of one process.
static TRIALS: AtomicU64 = AtomicU64::new(0);

impl Store {
    /// Makes sure that the store keeps the conditions of writes. Asks it the first time only.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] if it does not; why it cannot be found out.
    pub(crate) fn prove_conditions(&self) -> Result<()> {
        if self.backend.keeps_conditions() || self.conditions.get().is_some() {
            return Ok(());
        }
        let (note, place) = (self.conditions_note(), place());
        let is_noted =
            note.as_ref().is_some_and(|note| std::fs::read(note).is_ok_and(|n| n == place.as_bytes()));
        if !is_noted {
            self.try_conditions()?;
            if let Some(note) = note
                && let Err(why) = note
                    .parent()
                    .map_or(Ok(()), std::fs::create_dir_all)
                    .and_then(|()| std::fs::write(&note, &place))
            {
                tracing::debug!(%why, "that the store keeps conditions will be found out again");
            }
        }
        let _ = self.conditions.set(());
        Ok(())
    }

    fn conditions_note(&self) -> Option<PathBuf> {
        self.domain.0.cache_base().map(|base| base.join("conditions"))
    }

    fn try_conditions(&self) -> Result<()> {
        for _ in 0..ATTEMPTS {
            // Where a collector looks for what nobody deleted. A domain that is not founded yet has no collector.
            let lease =
                if self.settle()? { self.keys.gc_lease() } else { Keys::new(&Domain::plain()).gc_lease() };
            let (process, trial) = (std::process::id(), TRIALS.fetch_add(1, Ordering::Relaxed));
            let key = format!("{lease}-conditions-{process}-{}-{trial}", now_unix_ms());
            self.backend.put_new(&key, Bytes::from_static(b"1"))?;
            let tried = self.try_conditions_on(&key);
            if let Err(why) = self.backend.delete(&key) {
                tracing::info!(%why, key, "an object that means nothing was left behind");
            }
            if tried? {
                return Ok(());
            }
        }
        let (doing, store) = ("trying the conditions of writes".into(), self.url().to_owned());
        let why = "what was written for that is gone again and again".into();
        Err(StoreError::Unavailable { doing, store, why })
    }

    /// Whether the object was there all the time; then conditions are kept.
    fn try_conditions_on(&self, key: &str) -> Result<bool> {
        let breaks = |what: &str| {
            Err(StoreError::Unsupported { store: self.url().to_owned(), why: format!("it {what}") })
        };
        let second = self.backend.put_new(key, Bytes::from_static(b"2"))?;
        let (Some(found), version) = self.backend.get_versioned(key)? else { return Ok(false) };
        if second == PutOutcome::Created || found != "1" {
            return breaks("replaces an object that was to be made only if there is none");
        }
        if version.as_ref().is_none_or(|v| v.e_tag.is_none() && v.version.is_none()) {
            return breaks("gives objects no version by which a write could be conditional");
        }
        if !self.backend.swap(key, version.as_ref(), Bytes::from_static(b"3"))? {
            return match self.backend.get_versioned(key)? {
                (None, _) => Ok(false),
                _ => breaks("does not replace an object that is as it was expected to be"),
            };
        }
        if self.backend.swap(key, version.as_ref(), Bytes::from_static(b"4"))? {
            return breaks("replaces an object that is no longer as it was expected to be");
        }
        Ok(true)
    }
}

/// What tells stores of the same URL apart: where the environment says that they are.
fn place() -> String {
    let is_place = |name: &str| {
        ["AWS_", "AZURE_", "GOOGLE_"].iter().any(|cloud| name.starts_with(cloud))
            && ["ENDPOINT", "URL", "ACCOUNT_NAME"].iter().any(|part| name.contains(part))
    };
    let mut said: Vec<String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| is_place(name))
        .map(|(name, value)| format!("{name}={}", value.to_string_lossy()))
        .collect();
    said.sort();
    format!("kept by the store at {}\n", blake3::hash(said.join("\n").as_bytes()).to_hex())
}
