//! Announcements: snapshots about to get a name, so that garbage collection keeps what they need.
//!
//! An object with the bytes of the reference to be, deleted when the reference moved or did not. What a writer that died
//! leaves behind counts for a week (672 times [`StoreOptions::lease`](crate::StoreOptions::lease)), by the store's
//! clock, and is then garbage itself: a writer may be stopped, with its machine, at the moment it moves its name, and go on.

use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_core::{Reference, reference};

use crate::{
    error::{Result, StoreError},
    gc::lease::Moment,
    store::{Store, now_unix_ms},
};

/// Announcements this process made.
static ATTEMPTS: AtomicU64 = AtomicU64::new(0);

/// A snapshot that is announced.
pub(crate) struct Announced<'a> {
    store: &'a Store,
    key: String,
    since: Moment,
}

impl Store {
    /// Announces what `reference` will stand for.
    pub(crate) fn announce(&self, reference: &Reference) -> Result<Announced<'_>> {
        let bytes = reference.encode(&self.domain);
        // Two writers may be about to give the same root two names, and neither must end what the other announced.
        let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
        let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let writer = format!("{host} {} {} {attempt}", std::process::id(), now_unix_ms());
        let key =
            self.keys.announced(blake3::Hasher::new().update(&bytes).update(writer.as_bytes()).finalize());
        let since = Moment::now(self.lease);
        self.put_content(&key, bytes)?;
        Ok(Announced { store: self, key, since })
    }

    /// All announcements that still count at `now` by the store's clock, and the keys of those that do not.
    pub(crate) fn announcements(&self, now_unix_ms: u64) -> Result<(Vec<Reference>, Vec<String>)> {
        let (mut valid, mut stale) = (Vec::new(), Vec::new());
        let counts_ms = self.stopped_ms();
        self.backend.list(&self.keys.announced_all(), &mut |meta| {
            let counts = meta.modified_unix_ms.saturating_add(counts_ms) > now_unix_ms;
            if counts { valid.push(meta.key) } else { stale.push(meta.key) }
        })?;
        let mut references = Vec::new();
        let read = |key: String| Ok((self.get_whole(&key, reference::OBJECT_BYTES_MAX)?, key));
        self.side_by_side(valid, read, |(object, key)| {
            // `None`: withdrawn between the listing and now.
            let Some(object) = object else { return Ok(()) };
            let decoded = Reference::decode(&self.domain, None, &object);
            references.push(decoded.map_err(|why| StoreError::Damaged { key, why })?);
            Ok(())
        })?;
        Ok((references, stale))
    }
}

impl Announced<'_> {
    /// Fails if it is so long ago that it is better to begin anew.
    pub(crate) fn check_time(&self) -> Result<()> {
        if !self.since.is_past() {
            return Ok(());
        }
        Err(StoreError::Unavailable {
            doing: format!("moving a name after {}", self.key),
            store: self.store.url().to_owned(),
            why: "proving that all of it is stored took too long".into(),
        })
    }

    /// Ends it. One that cannot be deleted ends by itself.
    pub(crate) fn withdraw(self) {
        if let Err(why) = self.store.backend.delete(&self.key) {
            tracing::warn!(%why, "an announcement stays until it is too old to count");
        }
    }
}
