//! Garbage collection: condemn, grace, delete.
//!
//! 1. *Mark*: from all references, what is needed.
//! 2. *Condemn*: each object that nothing needs, and that is older than the grace time, gets a mark beside it.
//! 3. *Mark again*: references that appeared meanwhile protect what they need.
//! 4. *Delete* what was condemned at least the grace time ago and is still not needed; then its mark.
//!
//! A writer announces its snapshot first, looks for marks, and for the objects, afterwards, and moves its reference
//! last (`import/commit.rs`, `announce.rs`). Either step 3 sees the announcement or the reference, or the writer sees
//! the mark of step 2: no order of events loses a snapshot that was acknowledged. Only one collector may run at a time, which a lease object sees to.

mod condemn;
pub(crate) mod lease;
mod mark;
mod owner;

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use dormouse_core::RootId;
use serde::Serialize;

use self::{lease::Held, mark::Live};
use crate::{
    backend::ObjectMeta,
    error::{Result, StoreError},
    keys::KEYRING_PREFIX,
    store::{Store, now_unix_ms},
};

/// How long an object must have been garbage, by default.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Objects deleted before it is asked whether the lease has to be renewed.
const DELETE_BATCH: usize = 1000;
/// A mark holds a key. What somebody else put there is cut.
const MARK_BYTES_MAX: u64 = 1024;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct GcOptions {
    /// How long an object must have been garbage before it is deleted. Zero deletes at once; a writer that was
    /// about to share it then starts over.
    pub grace: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        GcOptions { grace: DEFAULT_GRACE, dry_run: false }
    }
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GcReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Snapshots that had expired and were removed.
    pub expired: Vec<String>,
    /// Objects looked at.
    pub objects: u64,
    /// Objects that are needed.
    pub live_objects: u64,
    /// Objects newly condemned, and their bytes.
    pub condemned_objects: u64,
    /// Bytes of those.
    pub condemned_bytes: u64,
    /// Objects deleted.
    pub deleted_objects: u64,
    /// Bytes of those.
    pub deleted_bytes: u64,
    /// Objects that had been condemned and are needed again.
    pub rescued_objects: u64,
    /// Files that writers which died left half written in a local directory, and that were deleted.
    pub leftover_files: u64,
    /// Bytes of those.
    pub leftover_bytes: u64,
}

impl GcReport {
    /// Adds what another round did.
    fn add(&mut self, round: GcReport) {
        self.expired.extend(round.expired);
        // Every round looks at all that is left.
        self.objects = self.objects.max(round.objects);
        self.live_objects = round.live_objects;
        self.condemned_objects += round.condemned_objects;
        self.condemned_bytes += round.condemned_bytes;
        self.deleted_objects += round.deleted_objects;
        self.deleted_bytes += round.deleted_bytes;
        self.rescued_objects += round.rescued_objects;
        self.leftover_files += round.leftover_files;
        self.leftover_bytes += round.leftover_bytes;
    }
}

/// Whether there was room for marks on all that was to be marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Enough,
    Short,
}

impl Store {
    /// Deletes what no snapshot needs.
    ///
    /// # Errors
    /// Any reference or root that cannot be read stops the collection before anything is condemned, since what it
    /// needs is not known: mend or remove that snapshot first.
    pub fn gc(&self, options: GcOptions) -> Result<GcReport> {
        self.check_there()?;
        let mut report = GcReport { dry_run: options.dry_run, ..Default::default() };
        if !self.settle_known()? {
            return Ok(report);
        }
        if options.dry_run {
            self.collect(options, now_unix_ms(), &mut report, &mut Held(None))?;
            return Ok(report);
        }
        loop {
            let mut round = GcReport::default();
            let done = self.collect_once(options, &mut round);
            report.add(round);
            match done {
                Ok(Room::Enough) => break,
                // What it freed is room for more marks.
                Ok(Room::Short) => {}
                Err(StoreError::Full { .. }) if self.backend.release_reserve() => {
                    tracing::info!("the disk is full; what was kept back for that is let go");
                }
                Err(why) => return Err(why),
            }
        }
        self.backend.keep_reserve();
        Ok(report)
    }

    fn collect_once(&self, options: GcOptions, report: &mut GcReport) -> Result<Room> {
        let lease = self.take_lease()?;
        let now = lease.now_unix_ms;
        let mut held = Held(Some(lease));
        let done = self.collect(options, now, report, &mut held);
        // Whatever came of it, the next collector need not wait.
        let released = held.release();
        let done = done?;
        released?;
        Ok(done)
    }

    fn collect(
        &self,
        options: GcOptions,
        now: u64,
        report: &mut GcReport,
        held: &mut Held<'_>,
    ) -> Result<Room> {
        let grace_ms = options.grace.as_millis() as u64;
        let old_enough = |modified: u64| grace_ms == 0 || modified.saturating_add(grace_ms) <= now;
        self.expire(now, options.dry_run, report)?;
        let mut live = Live::default();
        let seen = self.mark(&HashMap::new(), now, &mut live, &mut || held.keep())?;

        let mut objects: HashMap<String, ObjectMeta> = HashMap::new();
        for prefix in [self.keys.packs(), self.keys.roots()] {
            self.backend.list(&prefix, &mut |meta| {
                objects.insert(last(&meta.key).to_owned(), meta);
            })?;
        }
        report.objects = objects.len() as u64;
        let mut marks: HashMap<String, ObjectMeta> = HashMap::new();
        self.backend.list(&self.keys.condemned_all(), &mut |meta| {
            marks.insert(last(&meta.key).to_owned(), meta);
        })?;

        let (mut doomed, mut condemned) = (Vec::new(), Vec::new());
        for (id, meta) in &objects {
            if live.needs(id) {
                report.live_objects += 1;
            } else if let Some(mark) = marks.get(id) {
                if old_enough(mark.modified_unix_ms) {
                    doomed.push(meta);
                }
            } else if old_enough(meta.modified_unix_ms) {
                report.condemned_objects += 1;
                report.condemned_bytes += meta.bytes;
                condemned.push(meta);
                if grace_ms == 0 {
                    doomed.push(meta);
                }
            }
        }
        let unmarked = if options.dry_run { HashSet::new() } else { self.condemn(&condemned)? };
        if !unmarked.is_empty() {
            condemned.retain(|meta| !unmarked.contains(&meta.key));
            doomed.retain(|meta| !unmarked.contains(&meta.key));
            report.condemned_objects = condemned.len() as u64;
            report.condemned_bytes = condemned.iter().map(|meta| meta.bytes).sum();
            if doomed.is_empty() {
                return Err(StoreError::Full { doing: "marking what is to be deleted".into() });
            }
        }
        let mut names = seen.clone();
        if !options.dry_run {
            names.extend(self.mark(&seen, now, &mut live, &mut || held.keep())?);
        }
        // Had somebody taken over since the lease was taken, others would have acted on what is marked otherwise by now.
        held.renew()?;
        self.collect_streams(&names, options.dry_run, report)?;
        // What was condemned just now and is needed after all is not to frighten writers until the next collection.
        let rescued = doomed.iter().filter(|meta| live.is_named(last(&meta.key)));
        let rescued: Vec<&ObjectMeta> =
            rescued.filter(|meta| !marks.contains_key(last(&meta.key))).copied().collect();
        if !options.dry_run {
            report.rescued_objects += rescued.len() as u64;
            let unmark = |meta: &ObjectMeta| self.backend.delete(&self.keys.condemned(&meta.key));
            self.side_by_side(rescued, unmark, |()| Ok(()))?;
        }
        doomed.retain(|meta| !live.needs(last(&meta.key)));
        report.deleted_objects += doomed.len() as u64;
        report.deleted_bytes += doomed.iter().map(|meta| meta.bytes).sum::<u64>();
        let freed = doomed.len();
        if options.dry_run {
            doomed.clear();
        }
        let mut deleted = Vec::new();
        for batch in doomed.chunks(DELETE_BATCH) {
            // Whoever took over meanwhile knows better what is needed.
            held.renew()?;
            let is_mine = held.watch();
            let delete = |meta: &ObjectMeta| is_mine().and_then(|()| self.backend.delete(&meta.key));
            self.side_by_side(batch.to_vec(), delete, |()| Ok(()))?;
            batch.iter().for_each(|meta| drop(marks.remove(last(&meta.key))));
            deleted.extend(batch.iter().map(|meta| self.keys.condemned(&meta.key)));
        }
        if !options.dry_run {
            let mut stale = self.announcements(now)?.1;
            // Probes of the store's clock that nobody deleted; who is at it now is told to wait.
            let lease = self.keys.gc_lease();
            self.backend.list(lease.rsplit_once('/').map_or("", |(folder, _)| folder), &mut |meta| {
                stale.extend(Some(meta.key).filter(|key| *key != lease));
            })?;
            self.side_by_side(stale, |key| self.backend.delete(&key), |()| Ok(()))?;
        }
        // A writer that was silent for longer than the lease is taken for dead, and so is what it was writing.
        let before = now.saturating_sub(self.lease.as_millis() as u64 + self.skew_ms());
        for prefix in [self.keys.domain_prefix(), KEYRING_PREFIX] {
            let swept = self.backend.sweep_leftovers(prefix, before, options.dry_run)?;
            report.leftover_files += swept.files;
            report.leftover_bytes += swept.bytes;
        }
        // Marks of what is needed again, or was gone already: by who was stopped or died before it was done.
        let (mut needless, mut gone) = (Vec::new(), Vec::new());
        for (id, mark) in marks {
            if live.is_named(&id) {
                report.rescued_objects += u64::from(objects.contains_key(&id));
                needless.push(mark.key);
            } else if !objects.contains_key(&id) {
                let is_old = mark.modified_unix_ms.saturating_add(self.stopped_ms()) <= now;
                if is_old { needless.push(mark.key) } else { gone.push(mark.key) }
            }
        }
        if options.dry_run {
            return Ok(Room::Enough);
        }
        if held.is_inherited() {
            // A predecessor that goes on after all deletes what it had condemned. As long as the marks stand, nobody stores
            // the same again under the same name and relies on it: they stand for a week from now.
            gone.extend(deleted);
            let stand = |key: String| match self.backend.get(&key, Some(0..MARK_BYTES_MAX))? {
                Some(mark) => self.backend.put_again(&key, mark),
                None => Ok(()),
            };
            self.side_by_side(gone, stand, |()| Ok(()))?;
        } else {
            needless.extend(deleted);
        }
        for batch in needless.chunks(DELETE_BATCH) {
            held.renew()?;
            let is_mine = held.watch();
            let delete = |key: &String| is_mine().and_then(|()| self.backend.delete(key));
            self.side_by_side(batch.iter().collect(), delete, |()| Ok(()))?;
        }
        held.settle();
        let is_short = !unmarked.is_empty() && grace_ms == 0 && freed > 0;
        Ok(if is_short { Room::Short } else { Room::Enough })
    }

    /// Deletes resume streams of names that are gone. Streams are derived, so this needs neither grace nor care.
    fn collect_streams(
        &self,
        names: &HashMap<String, RootId>,
        dry_run: bool,
        report: &mut GcReport,
    ) -> Result<()> {
        let kept: HashSet<String> = names.keys().map(|name| self.domain.name_key(name)).collect();
        let mut orphans = Vec::new();
        self.backend.list(&self.keys.streams(), &mut |meta| {
            if !kept.contains(last(&meta.key)) {
                orphans.push(meta);
            }
        })?;
        report.deleted_objects += orphans.len() as u64;
        report.deleted_bytes += orphans.iter().map(|orphan| orphan.bytes).sum::<u64>();
        if dry_run {
            return Ok(());
        }
        // Names that another host removed are not forgotten here either: it is a guest's memory.
        self.cool_others(&kept);
        self.side_by_side(orphans, |orphan| self.backend.delete(&orphan.key), |()| Ok(()))
    }

    /// Removes references whose time has come, by the store's clock: one host whose clock is wrong is not to end what
    /// others keep. What was to be kept until a time of another clock, which may be behind, is kept a little longer.
    fn expire(&self, now: u64, dry_run: bool, report: &mut GcReport) -> Result<()> {
        for reference in self.references()?.good {
            let expires = reference.expires_unix_ms;
            if expires == 0 || expires.saturating_add(self.skew_ms()) > now {
                continue;
            }
            if !dry_run {
                let found = self.find(&reference.name)?;
                if found.reference.as_ref() != Some(&reference) {
                    continue;
                }
                let sequence = found.sequence.saturating_add(1);
                match self.swap_for_tombstone(&reference.name, found.version.as_ref(), sequence) {
                    Err(StoreError::Conflict { .. }) => continue,
                    other => other?,
                }
                self.cool(&reference.name);
            }
            report.expired.push(reference.name.to_string());
        }
        Ok(())
    }
}

fn last(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}
