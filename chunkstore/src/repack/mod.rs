//! Repacking: live pages of wasteful packs move into new, dense ones; no snapshot changes its identity.
//!
//! Packs are chosen that were filled at the fast level of an import, that hold mostly garbage, or both. Their live
//! pages are compressed anew, page maps and roots that refer to them are rewritten, and each reference moves to the
//! new root by compare-and-swap. The old objects become garbage. The collector's lease is held meanwhile, so that
//! nothing is condemned that this is about to refer to.

mod moves;

use std::collections::HashMap;

use dormouse_core::{
    FrameRef, PackId, PackRef, Reference, Root, SectionIndex, Slot,
    frame::EncodedFrame,
    pack::{FrameKind, TRAILER_BYTES, is_dense},
    section::{Extent, PagePlace},
};
use serde::Serialize;

use self::moves::{Moves, Victim, rewrite};
use crate::{
    error::{Result, StoreError},
    import::Packing,
    index::Index,
    meta_packs::{MetaPacks, PackTable},
    progress::Progress,
    snapshot::Snapshot,
    store::{Store, now_unix_ms},
};

/// The level of dense packs; see `docs/DENSITY.md`.
pub const DENSE_LEVEL: i32 = 15;
/// Packs with less than this share of live bytes are rewritten even if they are dense.
const LIVE_SHARE_MIN: f64 = 0.7;
/// Level for page maps of dense snapshots.
const DENSE_MAP_LEVEL: i32 = 19;

/// How to repack.
#[derive(Clone, Copy, Debug)]
pub struct RepackOptions {
    /// zstd level for what is rewritten.
    pub level: i32,
    /// Only say what would be done.
    pub dry_run: bool,
}

impl Default for RepackOptions {
    fn default() -> Self {
        RepackOptions { level: DENSE_LEVEL, dry_run: false }
    }
}

/// What repacking did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepackReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Page packs looked at.
    pub packs: u64,
    /// Page packs whose live pages were moved, and their bytes.
    pub rewritten_packs: u64,
    /// Bytes of those.
    pub rewritten_bytes: u64,
    /// Page packs made.
    pub new_packs: u64,
    /// Bytes of all objects made.
    pub new_bytes: u64,
    /// Snapshots that refer to the new packs now.
    pub moved_snapshots: u64,
    /// Snapshots that somebody else moved meanwhile, and that were left as they are.
    pub skipped_snapshots: Vec<String>,
}

/// The frames of a pack that somebody needs, by offset, and which of their slots.
type LiveFrames = HashMap<u32, (FrameRef, u32)>;

impl Store {
    /// Moves live pages out of wasteful packs. Run [`Store::gc`] afterwards to win the room.
    pub fn repack(&self, options: RepackOptions, progress: &dyn Progress) -> Result<RepackReport> {
        let mut report = RepackReport { dry_run: options.dry_run, ..Default::default() };
        if !self.settle_known()? {
            return Ok(report);
        }
        let mut lease = if options.dry_run { None } else { Some(self.take_lease()?) };
        let done = self.repack_leased(options, progress, &mut report, &mut || match &mut lease {
            Some(lease) => lease.renew(),
            None => Ok(()),
        });
        let released = lease.map_or(Ok(()), |l| l.release());
        done?;
        released?;
        Ok(report)
    }

    fn repack_leased(
        &self,
        options: RepackOptions,
        progress: &dyn Progress,
        report: &mut RepackReport,
        renew: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let references = self.references()?;
        if let Some((_, error)) = references.bad.into_iter().next() {
            return Err(error);
        }
        let mut snapshots = Vec::new();
        let read = |reference: Reference| {
            let root = self.read_root(reference.root, Some(&reference.name))?;
            Ok(Snapshot::new(self.clone(), reference, root))
        };
        self.side_by_side(references.good, read, |snapshot| {
            snapshots.push(snapshot);
            Ok(())
        })?;
        snapshots.sort_by_key(|s| (s.root().created_unix_ms, s.reference().name.clone()));

        let victims = self.choose(&snapshots, report)?;
        if victims.is_empty() || options.dry_run {
            return Ok(());
        }
        let mut moves = self.order(&snapshots, &victims)?;
        self.group_similar(&mut moves)?;
        progress.begin((moves.order.len() * dormouse_core::PAGE_BYTES) as u64);
        let places = self.move_pages(&victims, &moves, options.level, progress, report)?;
        renew()?;

        let mut sections = HashMap::new();
        let mut meta = MetaPacks::new(self, Packing::dense());
        let mut moved = Vec::new();
        for snapshot in &snapshots {
            if uses(snapshot, &victims)? {
                moved.push((
                    snapshot,
                    self.move_maps(snapshot, &moves, &places, &mut sections, &mut meta, options)?,
                ));
            }
        }
        meta.close()?;
        report.new_bytes += meta.bytes;
        for (snapshot, maps) in moved {
            renew()?;
            self.move_root(snapshot, maps, &meta, report)?;
        }
        let index = Index::open(self.cache_dir());
        index.forget(&victims.keys().copied().collect());
        Ok(())
    }

    /// Which packs are worth rewriting.
    fn choose(&self, snapshots: &[Snapshot], report: &mut RepackReport) -> Result<HashMap<PackId, Victim>> {
        let mut live: HashMap<PackId, (PackRef, LiveFrames)> = HashMap::new();
        for snapshot in snapshots {
            snapshot.load_sections()?;
            each_extent(snapshot, |pack, frame, slot, pages| {
                let frames = &mut live.entry(pack.id).or_insert_with(|| (pack, HashMap::new())).1;
                let slots = (u64::MAX >> (64 - pages)) << slot.get();
                frames.entry(frame.offset).or_insert((frame, 0)).1 |= slots as u32;
            })?;
        }
        report.packs = live.len() as u64;
        let look = |(pack, frames): (PackRef, LiveFrames)| {
            let key = self.keys.pack(pack.id);
            let end = pack.object_bytes();
            let trailer = self.backend.get(&key, Some(end - TRAILER_BYTES as u64..end))?;
            let trailer = trailer
                .ok_or_else(|| StoreError::Missing { key: key.clone(), referrer: "a page map".into() })?;
            let dense = is_dense(&trailer).map_err(|why| StoreError::Damaged { key, why })?;
            let live_bytes: f64 = frames
                .values()
                .map(|(f, slots)| {
                    f64::from(f.stored_bytes) * f64::from(slots.count_ones()) / (f.pages().max(1) as f64)
                })
                .sum();
            let wasteful = !dense || live_bytes < LIVE_SHARE_MIN * f64::from(pack.footer_offset);
            Ok(if wasteful { Some(Victim { pack, footer: self.read_footer(&pack)? }) } else { None })
        };
        let mut victims = HashMap::new();
        self.side_by_side(live.into_values().collect(), look, |victim| {
            victims.extend(victim.map(|victim| (victim.pack.id, victim)));
            Ok(())
        })?;
        report.rewritten_packs = victims.len() as u64;
        report.rewritten_bytes = victims.values().map(|v| v.pack.object_bytes()).sum();
        Ok(victims)
    }

    /// Rewrites a snapshot's page maps; gives for each section and blob piece its number in `meta`.
    fn move_maps(
        &self,
        snapshot: &Snapshot,
        moves: &Moves,
        places: &[PagePlace],
        done: &mut HashMap<(PackId, u32), usize>,
        meta: &mut MetaPacks<'_>,
        options: RepackOptions,
    ) -> Result<Vec<usize>> {
        let root = snapshot.root();
        let mut numbers = Vec::new();
        for (image, entry) in root.images.iter().enumerate() {
            for (index, section_entry) in entry.sections.iter().enumerate() {
                let Some(section_entry) = section_entry else { continue };
                let pack = root.packs[section_entry.at.pack as usize].id;
                // Generations share sections, and go on sharing them.
                if let Some(number) = done.get(&(pack, section_entry.at.offset)) {
                    numbers.push(*number);
                    continue;
                }
                let section = snapshot.section(image, SectionIndex(index as u32))?;
                let section = section.ok_or(StoreError::Bug("a section is not where its root says"))?;
                let rewritten = rewrite(&section, moves, places)?;
                let frame = EncodedFrame::encode(&self.domain, &rewritten.encode(), DENSE_MAP_LEVEL);
                let number = meta.push(FrameKind::Section, &frame)?;
                done.insert((pack, section_entry.at.offset), number);
                numbers.push(number);
            }
        }
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            let pack = root.packs[piece.pack as usize].id;
            if let Some(number) = done.get(&(pack, piece.offset)) {
                numbers.push(*number);
                continue;
            }
            let raw = self.read_frame(pack, piece)?;
            let number =
                meta.push(FrameKind::Blob, &EncodedFrame::encode(&self.domain, &raw, options.level))?;
            done.insert((pack, piece.offset), number);
            numbers.push(number);
        }
        Ok(numbers)
    }

    /// Writes a snapshot's new root and moves its reference there.
    fn move_root(
        &self,
        snapshot: &Snapshot,
        numbers: Vec<usize>,
        meta: &MetaPacks<'_>,
        report: &mut RepackReport,
    ) -> Result<()> {
        let mut root: Root = snapshot.root().clone();
        let mut table = PackTable::default();
        let mut numbers = numbers.into_iter();
        let mut place = |at: &mut FrameRef| {
            let number = numbers.next().ok_or(StoreError::Bug("a page map was not written"))?;
            *at = table.place(meta.get(number)?);
            Ok::<_, StoreError>(())
        };
        for section in root.images.iter_mut().flat_map(|i| &mut i.sections).flatten() {
            place(&mut section.at)?;
        }
        for piece in root.blobs.iter_mut().flat_map(|b| &mut b.pieces) {
            place(piece)?;
        }
        root.packs = table.packs;
        let old = snapshot.reference();
        match self.point_to(old, &root)? {
            Some(root_bytes) => {
                report.moved_snapshots += 1;
                report.new_bytes += root_bytes;
            }
            None => report.skipped_snapshots.push(old.name.to_string()),
        }
        Ok(())
    }

    /// Moves a reference to a root of the same snapshot; the root's bytes, or `None` if somebody else moved it meanwhile.
    pub(crate) fn point_to(&self, old: &Reference, root: &Root) -> Result<Option<u64>> {
        if root.snapshot_id(&self.domain) != old.snapshot {
            return Err(StoreError::Bug("a snapshot's identity would change"));
        }
        let (id, object) = root.encode(&self.domain);
        let root_bytes = object.len() as u32;
        self.put_content(&self.keys.root(id), object)?;
        let new = Reference {
            sequence: old.sequence + 1,
            root: id,
            root_bytes,
            written_unix_ms: now_unix_ms(),
            ..old.clone()
        };
        let (current, version) = self.reference(&old.name)?;
        if current.as_ref() != Some(old) {
            return Ok(None);
        }
        match self.swap_reference(&old.name, version.as_ref(), Some(&new)) {
            Err(StoreError::Conflict { .. }) => Ok(None),
            moved => moved.map(|()| Some(u64::from(root_bytes))),
        }
    }
}

/// Every run of stored pages of a snapshot, in the order of its images.
fn each_extent(snapshot: &Snapshot, mut each: impl FnMut(PackRef, FrameRef, Slot, u64)) -> Result<()> {
    for (image, entry) in snapshot.root().images.iter().enumerate() {
        for index in 0..entry.sections.len() as u32 {
            let Some(section) = snapshot.section(image, SectionIndex(index))? else { continue };
            for (_, extent) in section.extents() {
                if let Extent::Frame { frame, slot, pages } = extent {
                    let at = section.frames()[frame as usize];
                    each(section.packs()[at.pack as usize], at, slot, pages);
                }
            }
        }
    }
    Ok(())
}

fn uses(snapshot: &Snapshot, victims: &HashMap<PackId, Victim>) -> Result<bool> {
    let mut uses = false;
    each_extent(snapshot, |pack, _, _, _| uses |= victims.contains_key(&pack.id))?;
    Ok(uses)
}
