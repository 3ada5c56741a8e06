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
    gc::lease::Held,
    import::Packing,
    index::Index,
    meta_packs::MetaPacks,
    new_root::NewRoot,
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
    /// Rewrite no more bytes of packs than this, but one pack at least; `None` for all there are. Page maps come on top.
    pub max_bytes: Option<u64>,
}

impl Default for RepackOptions {
    fn default() -> Self {
        RepackOptions { level: DENSE_LEVEL, dry_run: false, max_bytes: None }
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
    /// Page packs worth rewriting that are left for the next time.
    pub left_packs: u64,
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

/// A pack worth rewriting.
struct Wasteful {
    /// Whether most of it is in use, and it only is not dense.
    in_use: bool,
    /// How many others are mapped before it.
    first_seen: usize,
    victim: Victim,
}

impl Store {
    /// Moves live pages out of wasteful packs. Run [`Store::gc`] afterwards to win the room.
    pub fn repack(&self, options: RepackOptions, progress: &dyn Progress) -> Result<RepackReport> {
        self.check_there()?;
        let mut report = RepackReport { dry_run: options.dry_run, ..Default::default() };
        if !self.settle_known()? {
            return Ok(report);
        }
        let mut held = Held(if options.dry_run { None } else { Some(self.take_lease()?) });
        let done = self.repack_leased(options, progress, &mut report, &mut held);
        let released = held.release();
        done?;
        released?;
        Ok(report)
    }

    fn repack_leased(
        &self,
        options: RepackOptions,
        progress: &dyn Progress,
        report: &mut RepackReport,
        held: &mut Held<'_>,
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

        let victims = self.choose(&snapshots, options.max_bytes, held, report)?;
        if victims.is_empty() || options.dry_run {
            return Ok(());
        }
        let mut moves = self.order(&snapshots, &victims)?;
        self.group_similar(&mut moves, &mut || held.keep())?;
        progress.begin((moves.order.len() * dormouse_core::PAGE_BYTES) as u64);
        let packing = Packing::dense();
        let how = (packing, options.level);
        let places = self.move_pages(&victims, &moves, how, progress, &mut || held.keep(), report)?;

        let mut sections = HashMap::new();
        let mut meta = MetaPacks::new(self, packing);
        let mut moved = Vec::new();
        for snapshot in &snapshots {
            held.keep()?;
            if uses(snapshot, &victims)? {
                let moves = (&moves, &places[..]);
                let root = self.move_maps(snapshot, moves, &victims, &mut sections, &mut meta, options)?;
                moved.push((snapshot, root));
            }
        }
        meta.close()?;
        report.new_bytes += meta.bytes;
        for (snapshot, root) in moved {
            let Some(root) = root.finish(snapshot.root(), &meta)? else { continue };
            match self.point_to(snapshot.reference(), &root, held)? {
                Some(root_bytes) => {
                    report.moved_snapshots += 1;
                    report.new_bytes += root_bytes;
                }
                None => report.skipped_snapshots.push(snapshot.reference().name.to_string()),
            }
        }
        let index = Index::open(self.cache_dir());
        index.forget(&victims.keys().copied().collect());
        Ok(())
    }

    /// Which packs are worth rewriting.
    fn choose(
        &self,
        snapshots: &[Snapshot],
        max_bytes: Option<u64>,
        held: &mut Held<'_>,
        report: &mut RepackReport,
    ) -> Result<HashMap<PackId, Victim>> {
        let mut live: HashMap<PackId, (usize, PackRef, LiveFrames)> = HashMap::new();
        for snapshot in snapshots {
            held.keep()?;
            snapshot.load_sections()?;
            each_extent(snapshot, |pack, frame, slot, pages| {
                let first_seen = live.len();
                let frames = live.entry(pack.id).or_insert_with(|| (first_seen, pack, HashMap::new()));
                let frames = &mut frames.2;
                let slots = (u64::MAX >> (64 - pages)) << slot.get();
                frames.entry(frame.offset).or_insert((frame, 0)).1 |= slots as u32;
            })?;
        }
        report.packs = live.len() as u64;
        let look = |(first_seen, pack, frames): (usize, PackRef, LiveFrames)| {
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
            let in_use = live_bytes >= LIVE_SHARE_MIN * f64::from(pack.footer_offset);
            if dense && in_use {
                return Ok(None);
            }
            let victim = Victim { pack, footer: self.read_footer(&pack)? };
            Ok(Some(Wasteful { in_use, first_seen, victim }))
        };
        let mut wasteful = Vec::new();
        self.side_by_side(live.into_values().collect(), look, |victim| {
            wasteful.extend(victim);
            Ok(())
        })?;
        // What is mostly garbage first; of the rest, what the oldest snapshots share, which lies together.
        wasteful.sort_by_key(|w| (w.in_use, w.first_seen));
        let (mut victims, mut bytes) = (HashMap::new(), 0);
        for Wasteful { victim, .. } in wasteful {
            bytes += victim.pack.object_bytes();
            if victims.is_empty() || max_bytes.is_none_or(|most| bytes <= most) {
                report.rewritten_packs += 1;
                report.rewritten_bytes += victim.pack.object_bytes();
                victims.insert(victim.pack.id, victim);
            } else {
                report.left_packs += 1;
            }
        }
        Ok(victims)
    }

    /// Rewrites a snapshot's page maps: all of them, or with a bound on what is rewritten those whose pages moved.
    fn move_maps(
        &self,
        snapshot: &Snapshot,
        (moves, places): (&Moves, &[PagePlace]),
        victims: &HashMap<PackId, Victim>,
        done: &mut HashMap<(PackId, u32), usize>,
        meta: &mut MetaPacks<'_>,
        options: RepackOptions,
    ) -> Result<NewRoot> {
        let root = snapshot.root();
        let all = options.max_bytes.is_none();
        let mut new = NewRoot::default();
        for (image, entry) in root.images.iter().enumerate() {
            for (index, section_entry) in entry.sections.iter().enumerate() {
                let Some(section_entry) = section_entry else { continue };
                let pack = root.packs[section_entry.at.pack as usize];
                // Generations share sections, and go on sharing them.
                if let Some(number) = done.get(&(pack.id, section_entry.at.offset)) {
                    new.take(*number);
                    continue;
                }
                let section = snapshot.section(image, SectionIndex(index as u32))?;
                let section = section.ok_or(StoreError::Bug("a section is not where its root says"))?;
                if !all && !section.packs().iter().any(|p| victims.contains_key(&p.id)) {
                    new.keep(pack, section_entry.at);
                    continue;
                }
                let rewritten = rewrite(&section, moves, places)?;
                let frame = EncodedFrame::encode(&self.domain, &rewritten.encode(), DENSE_MAP_LEVEL);
                let number = meta.push(FrameKind::Section, &frame)?;
                done.insert((pack.id, section_entry.at.offset), number);
                new.take(number);
            }
        }
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            let pack = root.packs[piece.pack as usize];
            if let Some(number) = done.get(&(pack.id, piece.offset)) {
                new.take(*number);
                continue;
            }
            if !all {
                new.keep(pack, *piece);
                continue;
            }
            let raw = self.read_frame(pack.id, piece)?;
            let number =
                meta.push(FrameKind::Blob, &EncodedFrame::encode(&self.domain, &raw, options.level))?;
            done.insert((pack.id, piece.offset), number);
            new.take(number);
        }
        Ok(new)
    }

    /// Moves a reference to a root of the same snapshot; the root's bytes, or `None` if somebody else moved it meanwhile.
    ///
    /// What is new was needed by nobody so far, and has a name that nothing had before ([`Packing`]). That nobody collected it is sure as long as the lease was never lost; for
    /// who takes it over from now on, since this process may be stopped right here, it is announced before that is asked.
    pub(crate) fn point_to(&self, old: &Reference, root: &Root, held: &mut Held<'_>) -> Result<Option<u64>> {
        if root.snapshot_id(&self.domain) != old.snapshot {
            return Err(StoreError::Bug("a snapshot's identity would change"));
        }
        let (id, object) = root.encode(&self.domain);
        let root_bytes = object.len() as u32;
        self.put_content(&self.keys.root(id), object)?;
        let new = Reference {
            sequence: old.sequence.saturating_add(1),
            root: id,
            root_bytes,
            written_unix_ms: now_unix_ms(),
            ..old.clone()
        };
        let announced = self.announce(&new)?;
        let moved = held.renew().and_then(|()| {
            let (current, version) = self.reference(&old.name)?;
            if current.as_ref() != Some(old) {
                return Ok(None);
            }
            announced.check_time()?;
            match self.swap_reference(&old.name, version.as_ref(), &new) {
                Err(StoreError::Conflict { .. }) => Ok(None),
                moved => moved.map(|()| Some(u64::from(root_bytes))),
            }
        });
        // It may move yet, if the request is still on its way: the announcement stays until it is too old.
        if !matches!(moved, Err(StoreError::Unavailable { .. })) {
            announced.withdraw();
        }
        moved
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
