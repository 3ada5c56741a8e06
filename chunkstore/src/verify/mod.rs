//! Verify: what is damaged, and whom it hurts; and, if asked, what of it can be had back.

mod lost;
mod remap;
mod repair;
mod work;

pub use self::lost::Source;
pub use self::repair::{RepairOptions, RepairReport, Repaired};

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use dormouse_core::{
    ChunkId, FormatError, FrameHash, FrameRef, Name, PackFooter, PackId, PackRef, Reference, SectionIndex,
    is_zero,
    pack::{FrameKind, check_object},
    section::Extent,
};
use serde::Serialize;

use crate::{
    error::{Result, StoreError},
    progress::Progress,
    snapshot::Snapshot,
    store::Store,
};

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyDepth {
    /// References, roots, page maps, and that every pack is there at its size.
    Structure,
    /// Also every byte of every pack, decoded, and every page against its id.
    Content,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's key.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
    /// The snapshots that cannot be restored whole because of it.
    pub hurts: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VerifyReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Objects looked at.
    pub objects: u64,
    /// Bytes read and checked.
    pub checked_bytes: u64,
    /// What is wrong; empty if nothing is.
    pub damages: Vec<Damage>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }
}

/// A frame that snapshots need.
#[derive(Debug)]
struct Need {
    at: FrameRef,
    kind: FrameKind,
    /// Indices of the snapshots.
    who: BTreeSet<usize>,
}

/// A pack, and the frames of it that snapshots need, by offset.
#[derive(Debug)]
struct Wanted {
    pack: PackRef,
    frames: BTreeMap<u32, Need>,
}

impl Wanted {
    fn everyone(&self) -> BTreeSet<usize> {
        self.frames.values().flat_map(|need| need.who.iter().copied()).collect()
    }
}

/// What there is, what of it is needed, and what is wrong with it.
#[derive(Default)]
struct Examination {
    report: VerifyReport,
    findings: Findings,
    /// Of all snapshots, those included that cannot be read.
    names: Vec<String>,
    /// Those that can be read, by index into `names`.
    references: BTreeMap<usize, Reference>,
    wanted: HashMap<PackId, Wanted>,
}

impl Examination {
    /// Packs with which anything is wrong.
    fn bad_packs(&self) -> BTreeSet<PackId> {
        let objects = self.findings.damages.keys().map(|(object, _)| object);
        let packs = objects.filter(|object| object.contains("/packs/"));
        packs.filter_map(|object| PackId::from_hex(object.rsplit('/').next()?)).collect()
    }

    fn finish(mut self) -> VerifyReport {
        let name = |i: usize| self.names.get(i).cloned();
        let damage = |((object, why), hurts): ((String, String), BTreeSet<usize>)| Damage {
            object,
            why,
            hurts: hurts.into_iter().filter_map(name).collect(),
        };
        self.report.damages = self.findings.damages.into_iter().map(damage).collect();
        self.report
    }
}

#[derive(Default)]
struct Findings {
    /// (object, why) -> indices of snapshots.
    damages: BTreeMap<(String, String), BTreeSet<usize>>,
}

impl Findings {
    fn add(&mut self, object: &str, why: &dyn std::fmt::Display, hurts: impl IntoIterator<Item = usize>) {
        self.damages.entry((object.to_owned(), why.to_string())).or_default().extend(hurts);
    }
}

impl Store {
    /// Checks one snapshot or all of them, and with all of them also objects that nothing refers to. Reports what is
    /// wrong and goes on; fails only where the store itself does not answer.
    pub fn verify(
        &self,
        name: Option<&Name>,
        depth: VerifyDepth,
        progress: &dyn Progress,
    ) -> Result<VerifyReport> {
        Ok(self.examine(name, depth, progress)?.finish())
    }

    fn examine(
        &self,
        name: Option<&Name>,
        depth: VerifyDepth,
        progress: &dyn Progress,
    ) -> Result<Examination> {
        let mut found = Examination::default();
        let Examination { report, findings, names, wanted, references: readable } = &mut found;
        let mut references = Vec::new();
        match name {
            Some(name) => match self.reference(name) {
                Ok((reference, _)) => references.push(reference.ok_or_else(|| self.no_such(name))?),
                Err(StoreError::Damaged { key, why }) => {
                    names.push(name.to_string());
                    findings.add(&key, &why, [0]);
                }
                Err(e) => return Err(e),
            },
            None => {
                let all = self.references()?;
                for (key, error) in &all.bad {
                    names.push(key.rsplit('/').next().unwrap_or(key).to_owned());
                    findings.add(key, &reason(error), [names.len() - 1]);
                }
                references = all.good;
            }
        }
        for reference in references {
            let me = names.len();
            names.push(reference.name.to_string());
            report.snapshots += 1;
            report.objects += 2;
            let root = match self.read_root(reference.root, Some(&reference.name)) {
                Ok(root) => root,
                Err(e) if e.is_retryable() => return Err(e),
                Err(e) => {
                    findings.add(&self.keys.root(reference.root), &reason(&e), [me]);
                    continue;
                }
            };
            report.checked_bytes += u64::from(reference.root_bytes);
            if root.snapshot_id(&self.domain) != reference.snapshot {
                let why = FormatError::HashMismatch("reference");
                findings.add(&self.keys.root(reference.root), &why, [me]);
            }
            self.gather(&Snapshot::new(self.without_disk(), reference.clone(), root), me, wanted, findings)?;
            readable.insert(me, reference);
        }
        progress.begin(wanted.values().map(|w| w.pack.object_bytes()).sum());
        for want in wanted.values() {
            report.objects += 1;
            report.checked_bytes += match depth {
                VerifyDepth::Structure => self.check_presence(want, findings)?,
                VerifyDepth::Content => self.check_pack(want, findings)?,
            };
            progress.advance(want.pack.object_bytes());
        }
        Ok(found)
    }

    /// Notes every frame a snapshot needs.
    fn gather(
        &self,
        snapshot: &Snapshot,
        me: usize,
        wanted: &mut HashMap<PackId, Wanted>,
        findings: &mut Findings,
    ) -> Result<()> {
        let root = snapshot.root();
        let mut want = |pack: &PackRef, at: &FrameRef, kind: FrameKind| {
            let entry =
                wanted.entry(pack.id).or_insert_with(|| Wanted { pack: *pack, frames: BTreeMap::new() });
            let need = || Need { at: *at, kind, who: BTreeSet::new() };
            entry.frames.entry(at.offset).or_insert_with(need).who.insert(me);
        };
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            want(&root.packs[piece.pack as usize], piece, FrameKind::Blob);
        }
        for (image, entry) in root.images.iter().enumerate() {
            for (index, section_entry) in entry.sections.iter().enumerate() {
                let Some(section_entry) = section_entry else { continue };
                let pack = &root.packs[section_entry.at.pack as usize];
                want(pack, &section_entry.at, FrameKind::Section);
                match snapshot.section(image, SectionIndex(index as u32)) {
                    Ok(None) => {}
                    Ok(Some(section)) => {
                        if section.stored_pages() != u64::from(section_entry.stored_pages) {
                            let why = "a page map does not have the pages its root says";
                            findings.add(&self.keys.pack(pack.id), &why, [me]);
                        }
                        for (_, extent) in section.extents() {
                            if let Extent::Frame { frame, .. } = extent {
                                let at = &section.frames()[frame as usize];
                                want(&section.packs()[at.pack as usize], at, FrameKind::Pages);
                            }
                        }
                    }
                    Err(e) if e.is_retryable() => return Err(e),
                    Err(e) => findings.add(&self.keys.pack(pack.id), &reason(&e), [me]),
                }
            }
        }
        Ok(())
    }

    fn check_presence(&self, want: &Wanted, findings: &mut Findings) -> Result<u64> {
        let key = self.keys.pack(want.pack.id);
        match self.backend.head(&key)? {
            None => findings.add(&key, &"it is missing", want.everyone()),
            Some(bytes) if bytes != want.pack.object_bytes() => {
                let why = format!("it has {bytes} bytes instead of {}", want.pack.object_bytes());
                findings.add(&key, &why, want.everyone());
            }
            Some(_) => {}
        }
        Ok(0)
    }

    /// Reads a whole pack and checks all there is to check.
    fn check_pack(&self, want: &Wanted, findings: &mut Findings) -> Result<u64> {
        let key = self.keys.pack(want.pack.id);
        let Some(object) = self.backend.get(&key, None)? else {
            findings.add(&key, &"it is missing", want.everyone());
            return Ok(0);
        };
        match check_object(&self.domain, want.pack.id, &object) {
            Ok((footer, damaged)) => self.check_frames(want, &key, &object, &footer, &damaged, findings),
            Err(why) => {
                // Frames may be whole though what is around them is not, and it is frames that snapshots need.
                let hurt: BTreeSet<usize> = want
                    .frames
                    .values()
                    .filter(|need| !is_whole(&object, &need.at))
                    .flat_map(|need| need.who.iter().copied())
                    .collect();
                findings.add(&key, &why, hurt);
            }
        }
        Ok(object.len() as u64)
    }

    fn check_frames(
        &self,
        want: &Wanted,
        key: &str,
        object: &[u8],
        footer: &PackFooter,
        damaged: &[usize],
        findings: &mut Findings,
    ) {
        let damaged: HashSet<usize> = damaged.iter().copied().collect();
        let mut seen = 0;
        for (i, frame) in footer.frames.iter().enumerate() {
            let needed = want.frames.get(&frame.at.offset);
            let who = || needed.iter().flat_map(|need| need.who.iter().copied()).collect::<Vec<_>>();
            seen += usize::from(needed.is_some());
            if damaged.contains(&i) {
                let range = frame.at.range();
                let why = format!("bytes {}..{} do not have the hash of their frame", range.start, range.end);
                findings.add(key, &why, who());
                continue;
            }
            if needed.is_some_and(|need| need.at.hash != frame.at.hash) {
                findings.add(key, &"a frame is not the one a page map refers to", who());
            }
            let range = frame.at.range();
            let raw = frame.at.decode(&self.domain, &object[range.start as usize..range.end as usize]);
            match raw {
                Err(why) => findings.add(key, &why, who()),
                Ok(raw) if frame.kind == FrameKind::Pages => {
                    let pages = raw.chunks_exact(dormouse_core::PAGE_BYTES);
                    let right =
                        |(page, id): (&[u8], &ChunkId)| self.domain.chunk_id(page) == *id && !is_zero(page);
                    if !pages.zip(&frame.chunks).all(right) {
                        findings.add(key, &"a page does not have the id its footer lists", who());
                    }
                }
                Ok(_) => {}
            }
        }
        if seen != want.frames.len() {
            let offsets: HashSet<u32> = footer.frames.iter().map(|f| f.at.offset).collect();
            let lost = want.frames.iter().filter(|(offset, _)| !offsets.contains(offset));
            let who = lost.flat_map(|(_, need)| need.who.iter().copied());
            findings.add(key, &"a frame that a page map refers to is not in it", who);
        }
    }
}

/// Whether a frame has its hash, in a pack whose footer cannot be trusted.
fn is_whole(object: &[u8], frame: &FrameRef) -> bool {
    let range = frame.range();
    let stored = object.get(range.start as usize..range.end as usize);
    stored.is_some_and(|bytes| FrameHash::of(bytes) == frame.hash)
}

/// The reason alone, where the message names the object as well.
fn reason(error: &StoreError) -> String {
    match error {
        StoreError::Damaged { why, .. } => why.to_string(),
        StoreError::Missing { .. } => "it is missing".into(),
        other => other.to_string(),
    }
}
