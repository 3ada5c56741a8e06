//! The lease that sees to it that one collector runs at a time, by the store's own clock.
//!
//! Its owner may be stopped at any instant, with its machine, and go on when somebody else has long taken over. So it asks
//! before whatever only the owner may do ([`Held::renew`]), looks at a clock that goes on while machines sleep
//! ([`Moment`]), and who inherits a lease that was never given back leaves standing what protects from its predecessor
//! (`gc/mod.rs`).

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};

use super::owner::Owner;
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

/// Attempts to give a lease back that is being renewed at the same time.
const GIVE_BACK_ATTEMPTS: usize = 4;
/// Times the store's clock is looked at anew, as others delete what was written for it.
const PROBE_TRIES_MAX: u32 = 8;

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
        self.is_past_after(self.age())
    }

    fn is_past_after(&self, age: Duration) -> bool {
        age >= self.good
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
        lease.store.leased.set(None);
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
    /// # Errors
    /// [`StoreError::Busy`] while somebody else has it.
    pub(crate) fn take_lease(&self) -> Result<Lease<'_>> {
        self.prove_conditions()?;
        let key = self.keys.gc_lease();
        let (body, version) = self.backend.get_versioned(&key)?;
        let inherited = body.is_some();
        if let Some(body) = body.filter(|body| body != UNSETTLED) {
            self.check_is_free(&key, &body)?;
        }
        let owner = Owner::this_process();
        let body = format!("{owner} 0");
        let renewed = Moment::now(self.lease);
        self.leased.set(Some(owner.to_string()));
        if !self.backend.swap(&key, version.as_ref(), Bytes::from(body.clone()))? {
            return Err(lost());
        }
        let version = self.version_of_mine(&key, &body)?;
        let mut lease = Lease { store: self, key, body, version, now_unix_ms: 0, renewed, inherited };
        match self.modified(&lease.key) {
            Ok(now) => lease.now_unix_ms = now,
            Err(why) => {
                // Nothing was done with it.
                let released = Held(Some(lease)).release();
                return Err(released.err().unwrap_or(why));
            }
        }
        Ok(lease)
    }

    /// An error unless who has the lease is dead.
    fn check_is_free(&self, key: &str, body: &Bytes) -> Result<()> {
        let owner = Owner::decode(body);
        if owner.is_dead() {
            tracing::info!(%owner, "who collected garbage is dead; its lease is taken over");
            return Ok(());
        }
        let taken = match self.modified(key) {
            Ok(taken) => taken,
            Err(why) => {
                // It was given back or taken since it was read, or the listing leaves it out.
                let is_still_there = self.backend.get_versioned(key)?.0.as_ref() == Some(body);
                return Err(if is_still_there { why } else { lost() });
            }
        };
        // Whose clock says what: only the store's own times are compared, with a probe written now. Even these may be of two
        // nodes with a clock each.
        let now = self.probe_clock()?;
        let silent_ms = self.lease.as_millis() as u64 + self.skew_ms();
        if taken.saturating_add(silent_ms) > now {
            return Err(StoreError::Busy { owner: owner.for_people(), minutes: silent_ms / 60_000 });
        }
        Ok(())
    }

    /// Gives back the lease of a collector or a repacker of this process, which is about to be killed: for signals. It
    /// fails then, if it goes on. Whether there was one.
    ///
    /// # Errors
    /// The store's.
    pub fn give_back_lease(&self) -> Result<bool> {
        let Some(owner) = self.leased.take() else { return Ok(false) };
        let key = self.keys.gc_lease();
        for _ in 0..GIVE_BACK_ATTEMPTS {
            let (body, version) = self.backend.get_versioned(&key)?;
            if body.is_none_or(|body| Owner::decode(&body).to_string() != owner) {
                return Ok(false);
            }
            // Requests of this process may still be on their way: whoever is next has to reckon with them.
            if self.backend.swap(&key, version.as_ref(), Bytes::from_static(UNSETTLED))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The version of a lease that was just written. Whoever has taken it over since is not mistaken for oneself.
    fn version_of_mine(&self, key: &str, body: &str) -> Result<Option<Version>> {
        match self.backend.get_versioned(key)? {
            (Some(now), version) if now == body.as_bytes() => Ok(version),
            _ => Err(lost()),
        }
    }

    /// When an object was written that is there, by the store's clock.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if the listing does not show it: that says nothing of its age.
    fn modified(&self, key: &str) -> Result<u64> {
        let mut modified = None;
        let prefix = key.rsplit_once('/').map_or("", |(prefix, _)| prefix);
        self.backend.list(prefix, &mut |meta| {
            if meta.key == key {
                modified = Some(meta.modified_unix_ms);
            }
        })?;
        modified.ok_or_else(|| StoreError::Unavailable {
            doing: format!("looking when {key} was written"),
            store: self.url().to_owned(),
            why: "its listing does not show an object that is there".into(),
        })
    }

    /// The store's clock. A collector that ends meanwhile takes a probe for one that was left behind and deletes it: then
    /// another one is written.
    fn probe_clock(&self) -> Result<u64> {
        /// Probes of this process, so that two at one moment are not one object.
        static PROBES: AtomicU64 = AtomicU64::new(0);
        let mut tries_left = PROBE_TRIES_MAX;
        loop {
            let number = PROBES.fetch_add(1, Ordering::Relaxed);
            let (lease, pid) = (self.keys.gc_lease(), std::process::id());
            let key = format!("{lease}-clock-{pid}-{number}-{}", now_unix_ms());
            self.put_mark(&key, Bytes::from_static(b"clock"))?;
            let now = self.modified(&key);
            tries_left -= 1;
            if now.is_err() && tries_left > 0 && self.backend.head(&key)?.is_none() {
                continue;
            }
            self.backend.delete(&key)?;
            return now;
        }
    }
}

/// Whose lease it is, while this process has one: for who ends it before it can give the lease back.
#[derive(Debug, Default)]
pub(crate) struct Leased(Mutex<Option<String>>);

impl Leased {
    fn set(&self, owner: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_out_is_acted_on_for_half_a_lease_and_no_longer() {
        let nanosecond = Duration::from_nanos(1);
        // Nobody is asked to be faster than half a minute, however short the lease.
        for (lease_s, good_s) in [(900, 450), (60, 30), (10, 30), (0, 30)] {
            let good = Duration::from_secs(good_s);
            let moment = Moment::now(Duration::from_secs(lease_s));
            assert!(!moment.is_past_after(good - nanosecond), "a lease of {lease_s} s");
            assert!(moment.is_past_after(good), "a lease of {lease_s} s");
        }
        // The clock that is looked at is that of this machine's start.
        let (started, to_come) = (Duration::ZERO, awake_or_asleep() + Duration::from_secs(3600));
        assert!(Moment { since: started, good: nanosecond }.is_past());
        assert!(!Moment { since: to_come, good: nanosecond }.is_past());
    }
}
