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

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use dormouse_core::{PackId, Reference, RootId, SectionIndex};
use serde::Serialize;

use crate::{
    backend::{ObjectMeta, Version},
    error::{Result, StoreError},
    snapshot::Snapshot,
    store::{Store, now_unix_ms},
};

/// How long an object must have been garbage, by default.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Objects deleted between two renewals of the lease.
const RENEW_EVERY: usize = 200;

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
}

/// What references need.
#[derive(Default)]
struct Live {
    /// The last part of each object's key.
    ids: HashSet<String>,
    /// Page maps that were read, by pack and offset. Generations share most of theirs, and none is read twice.
    maps: HashSet<(PackId, u32)>,
}

pub(crate) struct Lease<'a> {
    store: &'a Store,
    key: String,
    body: String,
    version: Option<Version>,
    /// The store's clock when the lease was last written.
    now_unix_ms: u64,
}

impl Lease<'_> {
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
        Ok(())
    }

    pub(crate) fn release(mut self) -> Result<()> {
        self.store.backend.swap(&self.key, self.version.take().as_ref(), Bytes::new()).map(drop)
    }
}

impl Store {
    /// Deletes what no snapshot needs.
    ///
    /// # Errors
    /// Any reference or root that cannot be read stops the collection before anything is condemned, since what it
    /// needs is not known: mend or remove that snapshot first.
    pub fn gc(&self, options: GcOptions) -> Result<GcReport> {
        let mut report = GcReport { dry_run: options.dry_run, ..Default::default() };
        if !self.settle_known()? {
            return Ok(report);
        }
        if options.dry_run {
            return self.collect(options, now_unix_ms(), &mut report, &mut |_| Ok(())).map(|()| report);
        }
        let mut lease = self.take_lease()?;
        let now = lease.now_unix_ms;
        let done = self.collect(options, now, &mut report, &mut |n| {
            if n % RENEW_EVERY == RENEW_EVERY - 1 { lease.renew() } else { Ok(()) }
        });
        // Whatever came of it, the next collector need not wait.
        let released = lease.release();
        done?;
        released?;
        Ok(report)
    }

    fn collect(
        &self,
        options: GcOptions,
        now: u64,
        report: &mut GcReport,
        before_delete: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let grace_ms = options.grace.as_millis() as u64;
        let old_enough = |modified: u64| grace_ms == 0 || modified.saturating_add(grace_ms) <= now;
        self.expire(options.dry_run, report)?;
        let mut live = Live::default();
        let seen = self.mark(&HashMap::new(), now, &mut live)?;

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

        let mut doomed = Vec::new();
        for (id, meta) in &objects {
            if live.ids.contains(id) {
                report.live_objects += 1;
            } else if let Some(mark) = marks.get(id) {
                if old_enough(mark.modified_unix_ms) {
                    doomed.push(meta);
                }
            } else if old_enough(meta.modified_unix_ms) {
                report.condemned_objects += 1;
                report.condemned_bytes += meta.bytes;
                if !options.dry_run {
                    self.backend.put_new(&self.keys.condemned(&meta.key), Bytes::from(meta.key.clone()))?;
                }
                if grace_ms == 0 {
                    doomed.push(meta);
                }
            }
        }
        let mut names = seen.clone();
        if !options.dry_run {
            names.extend(self.mark(&seen, now, &mut live)?);
        }
        self.collect_streams(&names, options.dry_run, report)?;
        for (n, meta) in doomed.into_iter().enumerate() {
            before_delete(n)?;
            if live.ids.contains(last(&meta.key)) {
                continue;
            }
            report.deleted_objects += 1;
            report.deleted_bytes += meta.bytes;
            if !options.dry_run {
                self.backend.delete(&meta.key)?;
                self.backend.delete(&self.keys.condemned(&meta.key))?;
                marks.remove(last(&meta.key));
            }
        }
        if !options.dry_run {
            let mut stale = self.announcements(now)?.1;
            // Probes of the store's clock that nobody deleted; who is at it now is told to wait.
            let lease = self.keys.gc_lease();
            self.backend.list(lease.rsplit_once('/').map_or("", |(folder, _)| folder), &mut |meta| {
                stale.extend(Some(meta.key).filter(|key| *key != lease));
            })?;
            for stale in stale {
                self.backend.delete(&stale)?;
            }
        }
        // Marks of what is needed again, or gone already.
        for (id, mark) in marks {
            let gone = !objects.contains_key(&id);
            if live.ids.contains(&id) || gone {
                report.rescued_objects += u64::from(!gone);
                if !options.dry_run {
                    self.backend.delete(&mark.key)?;
                }
            }
        }
        Ok(())
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
        for orphan in orphans {
            report.deleted_objects += 1;
            report.deleted_bytes += orphan.bytes;
            if !dry_run {
                self.backend.delete(&orphan.key)?;
            }
        }
        Ok(())
    }

    /// Removes references whose time has come.
    fn expire(&self, dry_run: bool, report: &mut GcReport) -> Result<()> {
        let now = now_unix_ms();
        for reference in self.references()?.good {
            if reference.expires_unix_ms == 0 || reference.expires_unix_ms > now {
                continue;
            }
            if !dry_run {
                let (current, version) = self.reference(&reference.name)?;
                if current.as_ref() != Some(&reference) {
                    continue;
                }
                match self.swap_reference(&reference.name, version.as_ref(), None) {
                    Err(StoreError::Conflict { .. }) => continue,
                    other => other?,
                }
            }
            report.expired.push(reference.name.to_string());
        }
        Ok(())
    }

    /// Adds to `live` what references need that are not in `seen`; gives all references with their roots.
    fn mark(
        &self,
        seen: &HashMap<String, RootId>,
        now_unix_ms: u64,
        live: &mut Live,
    ) -> Result<HashMap<String, RootId>> {
        // Announcements before references: a writer ends the one only when the other has moved.
        for reference in self.announcements(now_unix_ms)?.0 {
            match self.mark_one(&reference, live) {
                // Its writer finds out as well.
                Err(StoreError::Missing { .. }) => {}
                other => other?,
            }
        }
        let references = self.references()?;
        if let Some((_, error)) = references.bad.into_iter().next() {
            return Err(error);
        }
        let mut now = HashMap::new();
        for reference in references.good {
            let root = reference.root;
            now.insert(reference.name.to_string(), root);
            if seen.get(reference.name.as_str()) == Some(&root) {
                continue;
            }
            self.mark_current(reference, live)?;
        }
        Ok(now)
    }

    /// Marks what a reference needs, or what it stands for by now: what it stood for when it was read may have been
    /// collected meanwhile.
    fn mark_current(&self, mut reference: Reference, live: &mut Live) -> Result<()> {
        loop {
            let missing = match self.mark_one(&reference, live) {
                Err(e @ StoreError::Missing { .. }) => e,
                other => return other,
            };
            match self.reference(&reference.name)?.0 {
                None => return Ok(()),
                Some(current) if current != reference => reference = current,
                Some(_) => return Err(missing),
            }
        }
    }

    fn mark_one(&self, reference: &Reference, live: &mut Live) -> Result<()> {
        let root = self.read_root(reference.root, Some(&reference.name))?;
        let snapshot = Snapshot::new(self.clone(), reference.clone(), root);
        let root = snapshot.root();
        for (image, entry) in root.images.iter().enumerate() {
            for (index, entry) in (0..).zip(&entry.sections) {
                let Some(entry) = entry else { continue };
                let at = (root.packs[entry.at.pack as usize].id, entry.at.offset);
                if live.maps.contains(&at) {
                    continue;
                }
                if let Some(section) = snapshot.section(image, SectionIndex(index))? {
                    live.ids.extend(section.packs().iter().map(|p| p.id.to_string()));
                }
                live.maps.insert(at);
            }
        }
        live.ids.extend(root.packs.iter().map(|p| p.id.to_string()));
        live.ids.insert(reference.root.to_string());
        Ok(())
    }

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
        Ok(Lease { store: self, now_unix_ms: self.modified(&key)?, key, body, version })
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

fn last(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}
