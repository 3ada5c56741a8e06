//! The lease that sees to it that one collector runs at a time, by the store's own clock.
//!
//! Its owner may be stopped at any instant, with its machine, and go on when somebody else has long taken over. So it asks
//! before whatever only the owner may do ([`Held::renew`]), looks at a clock that goes on while machines sleep
//! ([`Moment`]), and who inherits a lease that was never given back leaves standing what protects from its predecessor
//! (`gc/mod.rs`).

use std::time::Duration;

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};

use crate::{
    backend::Version,
    error::{Result, StoreError},
    store::{Store, now_unix_ms},
};

/// Nobody is asked to be faster than this, whatever is taken for dead.
const SHORTEST_LEASE: Duration = Duration::from_secs(60);

/// A lease that nobody has, and that was taken over from somebody who may go on after all. To versions that do not know it,
/// it is somebody's who died.
const UNSETTLED: &[u8] = b"nobody, after somebody who may be stopped 0";

/// A moment at which something was found out that may be acted on for half a lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    since: Duration,
    good: Duration,
}

impl Moment {
    pub(crate) fn now(lease: Duration) -> Self {
        Moment { since: awake_or_asleep(), good: lease.max(SHORTEST_LEASE) / 2 }
    }

    fn age(&self) -> Duration {
        awake_or_asleep().saturating_sub(self.since)
    }

    /// Whether it is too long ago by now.
    pub(crate) fn is_past(&self) -> bool {
        self.age() >= self.good
    }
}

/// The time since this machine was started. Other than `Instant` it goes on while the machine sleeps.
fn awake_or_asleep() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// The right to collect garbage, or to move what others may share.
pub(crate) struct Lease<'a> {
    store: &'a Store,
    key: String,
    body: String,
    version: Option<Version>,
    /// The store's clock when the lease was taken.
    pub(super) now_unix_ms: u64,
    renewed: Moment,
    /// Whether it was never given back by who had it before, nor by anybody before that, since a collector settled it.
    inherited: bool,
}

/// A lease, or none where nothing is going to be changed.
pub(crate) struct Held<'a>(pub(crate) Option<Lease<'a>>);

impl Held<'_> {
    /// Renews the lease if it is time.
    pub(crate) fn keep(&mut self) -> Result<()> {
        match &mut self.0 {
            Some(lease) if lease.renewed.age() >= lease.store.lease / 4 => lease.renew(),
            _ => Ok(()),
        }
    }

    /// Renews the lease: what was found out since it was taken holds, and nobody else has acted on anything since.
    ///
    /// # Errors
    /// If somebody else has taken over.
    pub(crate) fn renew(&mut self) -> Result<()> {
        self.0.as_mut().map_or(Ok(()), Lease::renew)
    }

    /// Fails once the lease was last renewed so long ago that somebody else may soon have it. For many threads.
    pub(crate) fn watch(&self) -> impl Fn() -> Result<()> + Sync + 'static {
        let renewed = self.0.as_ref().map(|lease| lease.renewed);
        move || if renewed.is_some_and(|renewed| renewed.is_past()) { Err(lost()) } else { Ok(()) }
    }

    /// Whether who had it before may be stopped, and go on where it was.
    pub(super) fn is_inherited(&self) -> bool {
        self.0.as_ref().is_some_and(|lease| lease.inherited && lease.store.stopped_ms() > 0)
    }

    /// What protects from who had it before stands by itself from now on.
    pub(super) fn settle(&mut self) {
        self.0.iter_mut().for_each(|lease| lease.inherited = false);
    }

    /// Gives it back, so that the next one need not wait. Only a collector settles what it inherited: after anybody else,
    /// or one that failed, the next one inherits it.
    pub(crate) fn release(self) -> Result<()> {
        let unsettled = self.is_inherited();
        let Some(mut lease) = self.0 else { return Ok(()) };
        let body = if unsettled { Bytes::from_static(UNSETTLED) } else { Bytes::new() };
        lease.store.backend.swap(&lease.key, lease.version.take().as_ref(), body).map(drop)
    }
}

impl Lease<'_> {
    fn renew(&mut self) -> Result<()> {
        let (owner, sequence) = self.body.split_once(' ').unwrap_or((&self.body, "0"));
        let next = sequence.parse::<u64>().unwrap_or(0) + 1;
        let body = format!("{owner} {next}");
        // Before it is written, not after: nobody knows how long the answer is on its way.
        let renewed = Moment::now(self.store.lease);
        if !self.store.backend.swap(&self.key, self.version.as_ref(), Bytes::from(body.clone()))? {
            return Err(lost());
        }
        self.version = self.store.version_of_mine(&self.key, &body)?;
        self.body = body;
        self.renewed = renewed;
        Ok(())
    }
}

fn lost() -> StoreError {
    StoreError::Conflict { name: "the garbage collector's lease".into() }
}

impl Store {
    pub(crate) fn take_lease(&self) -> Result<Lease<'_>> {
        let key = self.keys.gc_lease();
        let (body, version) = self.backend.get_versioned(&key)?;
        let inherited = body.is_some();
        if let Some(body) = body.filter(|body| body != UNSETTLED) {
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
        let renewed = Moment::now(self.lease);
        if !self.backend.swap(&key, version.as_ref(), Bytes::from(body.clone()))? {
            return Err(lost());
        }
        let version = self.version_of_mine(&key, &body)?;
        let now_unix_ms = self.modified(&key)?;
        Ok(Lease { store: self, key, body, version, now_unix_ms, renewed, inherited })
    }

    /// The version of a lease that was just written. Whoever has taken it over since is not mistaken for oneself.
    fn version_of_mine(&self, key: &str, body: &str) -> Result<Option<Version>> {
        match self.backend.get_versioned(key)? {
            (Some(now), version) if now == body.as_bytes() => Ok(version),
            _ => Err(lost()),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_out_is_acted_on_for_half_a_lease_and_no_longer() {
        let lease = Duration::from_secs(900);
        let mut moment = Moment::now(lease);
        assert!(!moment.is_past());
        moment.since = moment.since.saturating_sub(lease / 2);
        assert!(moment.is_past() || moment.since.is_zero());
        assert!(!Moment::now(Duration::ZERO).is_past(), "nobody is asked to be faster than half a minute");
    }
}
