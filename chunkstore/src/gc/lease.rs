//! The lease that sees to it that one collector runs at a time, by the store's own clock.

use std::time::Instant;

use bytes::Bytes;

use crate::{
    backend::Version,
    error::{Result, StoreError},
    store::{Store, now_unix_ms},
};

/// The right to collect garbage, or to move what others may share.
pub(crate) struct Lease<'a> {
    store: &'a Store,
    key: String,
    body: String,
    version: Option<Version>,
    /// The store's clock when the lease was last written.
    pub(super) now_unix_ms: u64,
    renewed: Instant,
}

impl Lease<'_> {
    /// Renews the lease if it is time.
    pub(crate) fn keep(&mut self) -> Result<()> {
        if self.renewed.elapsed() < self.store.lease / 4 { Ok(()) } else { self.renew() }
    }

    /// Fails if somebody else has taken over.
    pub(crate) fn renew(&mut self) -> Result<()> {
        let (owner, sequence) = self.body.split_once(' ').unwrap_or((&self.body, "0"));
        let next = sequence.parse::<u64>().unwrap_or(0) + 1;
        let body = format!("{owner} {next}");
        if !self.store.backend.swap(&self.key, self.version.as_ref(), Bytes::from(body.clone()))? {
            return Err(StoreError::Conflict { name: "the garbage collector's lease".into() });
        }
        self.version = self.store.backend.get_versioned(&self.key)?.1;
        self.body = body;
        self.renewed = Instant::now();
        Ok(())
    }

    pub(crate) fn release(mut self) -> Result<()> {
        self.store.backend.swap(&self.key, self.version.take().as_ref(), Bytes::new()).map(drop)
    }
}

impl Store {
    pub(crate) fn take_lease(&self) -> Result<Lease<'_>> {
        let key = self.keys.gc_lease();
        let (body, version) = self.backend.get_versioned(&key)?;
        if let Some(body) = body {
            let taken = self.modified(&key)?;
            // Whose clock says what: only the store's own times are compared, with a probe written now.
            let now = self.probe_clock()?;
            if taken.saturating_add(self.lease.as_millis() as u64) > now {
                let owner = String::from_utf8_lossy(&body).into_owned();
                return Err(StoreError::Usage(format!(
                    "garbage is being collected by {owner}; try again when it is done, or {} minutes after it died",
                    self.lease.as_secs() / 60
                )));
            }
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let body = format!("{}/{}/{} 0", host.trim(), std::process::id(), now_unix_ms());
        if !self.backend.swap(&key, version.as_ref(), Bytes::from(body.clone()))? {
            return Err(StoreError::Conflict { name: "the garbage collector's lease".into() });
        }
        let version = self.backend.get_versioned(&key)?.1;
        Ok(Lease {
            store: self,
            now_unix_ms: self.modified(&key)?,
            renewed: Instant::now(),
            key,
            body,
            version,
        })
    }

    fn modified(&self, key: &str) -> Result<u64> {
        let mut modified = 0;
        let prefix = key.rsplit_once('/').map_or("", |(prefix, _)| prefix);
        self.backend.list(prefix, &mut |meta| {
            if meta.key == key {
                modified = meta.modified_unix_ms;
            }
        })?;
        Ok(modified)
    }

    fn probe_clock(&self) -> Result<u64> {
        let key = format!("{}-clock-{}-{}", self.keys.gc_lease(), std::process::id(), now_unix_ms());
        self.backend.put_new(&key, Bytes::from_static(b"clock"))?;
        let now = self.modified(&key);
        self.backend.delete(&key)?;
        now
    }
}
