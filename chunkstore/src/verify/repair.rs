//! Repair: what is damaged is written again, into new packs, as far as any copy of it can be reached.
//!
//! Nothing is overwritten and no snapshot changes its identity: as in repacking, frames go into new packs, page maps and
//! roots that refer to them are written anew, and references move by compare-and-swap. A damaged pack is left by all who
//! needed it, with what is still whole in it, and becomes garbage. Only a root goes back under its own name, which is the
//! hash of its bytes. What cannot be read is left alone: it may be whole. The collector's lease is held meanwhile.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use dormouse_core::{Name, Reference, RootId, root};
use serde::Serialize;

use super::{
    Damage, Examination, VerifyDepth, VerifyReport, lost::Source, reason, unreadable::is_damage, work::Work,
};
use crate::{
    error::Result, gc::lease::Held, index::Index, progress::Progress, snapshot::Snapshot, store::Store,
};

/// Where to look, beside the store and this host's caches.
#[derive(Clone, Debug, Default)]
pub struct RepairOptions {
    /// Image files that may hold pages that are missing.
    pub from: Vec<PathBuf>,
}

/// What was had back of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// The object's key.
    pub object: String,
    /// Pages.
    pub pages: u64,
    /// Page maps, of 64 MiB each.
    pub page_maps: u64,
    /// Pieces of device state.
    pub state_pieces: u64,
    /// Where they were found.
    pub sources: BTreeSet<Source>,
}

/// What was damaged, what of it was repaired, and what is left.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepairReport {
    /// What is there now; its damages are those that could not be repaired.
    #[serde(flatten)]
    pub left: VerifyReport,
    /// What was damaged.
    pub found: Vec<Damage>,
    /// What was had back.
    pub repaired: Vec<Repaired>,
    /// Objects written, references apart.
    pub new_objects: u64,
    /// Bytes of those.
    pub new_bytes: u64,
    /// Snapshots that refer to the new objects now.
    pub moved_snapshots: u64,
    /// Snapshots that somebody else moved meanwhile, and that were left as they are.
    pub skipped_snapshots: Vec<String>,
}

impl Store {
    /// Checks one snapshot or all, by content, and restores what is damaged from wherever it can be had: the object
    /// itself, this host's cache, other packs, resume streams, and the files in `options`.
    ///
    /// # Errors
    /// Where the store as a whole cannot be read, and [`StoreError::Busy`](crate::StoreError::Busy) while garbage is being collected. What cannot be
    /// repaired is no error: it is in the report.
    pub fn repair(
        &self,
        name: Option<&Name>,
        options: &RepairOptions,
        progress: &dyn Progress,
    ) -> Result<RepairReport> {
        self.check_there()?;
        let mut report = RepairReport::default();
        if !self.settle_known()? {
            report.left = self.verify(name, VerifyDepth::Content, progress)?;
            return Ok(report);
        }
        let mut held = Held(Some(self.take_lease()?));
        let done = self.repair_leased(name, options, progress, &mut report, &mut held);
        let released = held.release();
        done?;
        released?;
        Ok(report)
    }

    fn repair_leased(
        &self,
        name: Option<&Name>,
        options: &RepairOptions,
        progress: &dyn Progress,
        report: &mut RepairReport,
        held: &mut Held<'_>,
    ) -> Result<()> {
        if name.is_none()
            && let Some(why) = self.check_identity()?.filter(is_damage)
        {
            // What it says is of no weight; that it is there is.
            self.write_identity(true)?;
            let object = self.keys.identity();
            report.found.push(Damage { object: object.clone(), why: reason(&why), hurts: Vec::new() });
            report.repaired.push(Repaired { object, ..Default::default() });
        }
        self.restore_roots(name, report)?;
        let mut found = self.examine(name, VerifyDepth::Content, progress, &mut || held.keep())?;
        let mut damages = None;
        // A page map that was had back shows which pages it needs: they are next.
        while self.repair_round(&found, options, report, held)? {
            let now = self.examine(name, VerifyDepth::Content, progress, &mut || held.keep())?;
            damages.get_or_insert(std::mem::replace(&mut found, now).finish().damages);
        }
        report.left = found.finish();
        report.found.extend(damages.unwrap_or_else(|| report.left.damages.clone()));
        Ok(())
    }

    /// Puts back roots that are whole but for what follows them, or that resume streams have a copy of.
    fn restore_roots(&self, name: Option<&Name>, report: &mut RepairReport) -> Result<()> {
        let references = match name {
            Some(name) => {
                self.reference(name).ok().and_then(|(reference, _)| reference).into_iter().collect()
            }
            None => self.readable_references()?.good,
        };
        for reference in references {
            let why = match self.read_root(reference.root, Some(&reference.name)) {
                Err(why) if is_damage(&why) => why,
                Err(why) => {
                    self.of_one_object(why)?;
                    continue;
                }
                Ok(_) => continue,
            };
            let Some((object, source)) = self.copy_of_root(&reference)? else { continue };
            let key = self.keys.root(reference.root);
            report.new_objects += 1;
            report.new_bytes += object.len() as u64;
            self.put_content(&key, object)?;
            let hurts = vec![reference.name.to_string()];
            report.found.push(Damage { object: key.clone(), why: reason(&why), hurts });
            let sources = BTreeSet::from([source]);
            report.repaired.push(Repaired { object: key, sources, ..Default::default() });
        }
        Ok(())
    }

    /// The bytes of a damaged root, from wherever they can be had.
    fn copy_of_root(&self, reference: &Reference) -> Result<Option<(Vec<u8>, Source)>> {
        let bytes = u64::from(reference.root_bytes).min(root::OBJECT_BYTES_MAX);
        let start = match self.backend.get(&self.keys.root(reference.root), Some(0..bytes)) {
            Ok(start) => start.unwrap_or_default(),
            Err(why) if why.is_retryable() => return Err(why),
            Err(_) => Default::default(),
        };
        if RootId::of(&start) == reference.root {
            return Ok(Some((start.into(), Source::SameObject)));
        }
        let Ok(resume) = self.open_resume(&reference.name) else { return Ok(None) };
        // The bytes that the stream carries, and not the same root encoded once more: another version made others of it.
        let object = resume.stream.map(|stream| stream.into_root_object()).unwrap_or_default();
        Ok((RootId::of(&object) == reference.root).then_some((object, Source::ResumeStream)))
    }

    /// Repairs what can be; whether any snapshot is better off than before.
    fn repair_round(
        &self,
        found: &Examination,
        options: &RepairOptions,
        report: &mut RepairReport,
        held: &mut Held<'_>,
    ) -> Result<bool> {
        let bad = found.bad_packs();
        let mut work = Work::new(self, &bad);
        let mut hurt = BTreeSet::new();
        let mut is_all_read = found.findings.unreadable.is_empty();
        for want in bad.iter().filter_map(|id| found.wanted.get(id)) {
            is_all_read &= self.salvage(want, &mut work)?;
            hurt.extend(want.everyone());
        }
        let mut snapshots = Vec::new();
        for reference in hurt.iter().filter_map(|me| found.references.get(me)) {
            let root = match self.read_root(reference.root, Some(&reference.name)) {
                Ok(root) => root,
                Err(e) => {
                    self.of_one_object(e)?;
                    is_all_read = false;
                    continue;
                }
            };
            snapshots.push(Snapshot::new(self.without_disk(), reference.clone(), root));
        }
        let incomplete = self.find_lost_frames(&snapshots, options, &mut work)?;
        work.pages.close()?;
        let mut done = HashMap::new();
        let mut roots = Vec::new();
        for snapshot in &snapshots {
            let root = work.recovered.remap(snapshot, &work.pages, &mut work.meta, &mut done)?;
            roots.push((snapshot, root));
        }
        work.meta.close()?;
        report.new_objects += work.pages.objects + work.meta.objects;
        report.new_bytes += work.pages.bytes + work.meta.bytes;
        let mut moved = false;
        for (snapshot, root) in roots {
            let Some(root) = root.finish(snapshot.root(), &work.meta)? else { continue };
            match self.point_to(snapshot.reference(), &root, held)? {
                Some(root_bytes) => {
                    moved = true;
                    report.moved_snapshots += 1;
                    report.new_objects += 1;
                    report.new_bytes += root_bytes;
                }
                None => report.skipped_snapshots.push(snapshot.reference().name.to_string()),
            }
        }
        for (pack, mut repaired) in work.repaired {
            repaired.object = self.keys.pack(pack);
            match report.repaired.iter_mut().find(|r| r.object == repaired.object) {
                None => report.repaired.push(repaired),
                Some(before) => {
                    before.pages += repaired.pages;
                    before.page_maps += repaired.page_maps;
                    before.state_pieces += repaired.state_pieces;
                    before.sources.extend(repaired.sources);
                }
            }
        }
        // Of a pack that not everything was had back of, the index may know what is still to be looked for. What page maps need
        // that cannot be read, nobody knows.
        if is_all_read {
            Index::open(self.cache_dir()).forget(&bad.difference(&incomplete).copied().collect());
        }
        Ok(moved)
    }
}
