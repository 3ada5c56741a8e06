//! What there is to check, read side by side: references, roots, each page map once however many snapshots share it, and
//! then the packs.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dormouse_core::{
    FormatError, FrameRef, Name, PackId, PackRef, Reference, Root, Section, SectionIndex, pack::FrameKind,
    section::Extent,
};

use super::{Examination, Findings, Need, VerifyDepth, Wanted};
use crate::{
    error::{Result, StoreError},
    parallel::each,
    progress::Progress,
    store::Store,
};

/// Snapshots whose roots are in memory at the same time.
const ROOTS_AT_ONCE: usize = 64;
/// Packs that are in memory at the same time, 12 MiB each.
const PACKS_AT_ONCE: usize = 8;

/// A page map, and who has it.
struct Map {
    pack: PackRef,
    at: FrameRef,
    uses: Vec<MapUse>,
}

/// What a root says of a page map.
struct MapUse {
    /// The snapshot.
    me: usize,
    /// Pages its image has there.
    pages: u64,
    /// Pages that are not zero.
    stored_pages: u64,
}

impl MapUse {
    fn check(&self, map: &Section) -> Result<(), FormatError> {
        if map.end_page() as u64 > self.pages || map.stored_pages() != self.stored_pages {
            let why = "it does not hold the pages its root says";
            return Err(FormatError::Malformed { what: "page-map section", why });
        }
        Ok(())
    }
}

type Maps = HashMap<(PackId, u32), Map>;

impl Examination {
    fn want(&mut self, pack: &PackRef, at: &FrameRef, kind: FrameKind, who: impl IntoIterator<Item = usize>) {
        let wanted = || Wanted { pack: *pack, frames: BTreeMap::new() };
        let frames = &mut self.wanted.entry(pack.id).or_insert_with(wanted).frames;
        let need = || Need { at: *at, kind, who: BTreeSet::new() };
        frames.entry(at.offset).or_insert_with(need).who.extend(who);
    }

    /// Notes what a root needs; page maps are still to be read.
    fn note_root(&mut self, me: usize, root: &Root, maps: &mut Maps) {
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            self.want(&root.packs[piece.pack as usize], piece, FrameKind::Blob, [me]);
        }
        for image in &root.images {
            for (index, entry) in (0..).map(SectionIndex).zip(&image.sections) {
                let Some(entry) = entry else { continue };
                let pack = root.packs[entry.at.pack as usize];
                self.want(&pack, &entry.at, FrameKind::Section, [me]);
                let pages = index.pages(image.pages());
                let (pages, stored_pages) = (pages.end - pages.start, u64::from(entry.stored_pages));
                let map = maps.entry((pack.id, entry.at.offset));
                let map = map.or_insert_with(|| Map { pack, at: entry.at, uses: Vec::new() });
                map.uses.push(MapUse { me, pages, stored_pages });
            }
        }
    }

    /// Notes what a page map needs.
    fn note_map(&mut self, store: &Store, map: &Map, read: Result<Section>) -> Result<()> {
        let key = &store.keys.pack(map.pack.id);
        let users = || map.uses.iter().map(|of| of.me);
        let section = match read {
            Ok(section) => section,
            Err(e) => return self.findings.note(store, key, e, users()),
        };
        let mut who = Vec::new();
        for of in &map.uses {
            match of.check(&section) {
                Ok(()) => who.push(of.me),
                Err(why) => self.findings.add(key, &why, [of.me]),
            }
        }
        for (_, extent) in section.extents() {
            if let Extent::Frame { frame, .. } = extent {
                let at = &section.frames()[frame as usize];
                self.want(&section.packs()[at.pack as usize], at, FrameKind::Pages, who.iter().copied());
            }
        }
        Ok(())
    }
}

impl Store {
    /// Looks at one snapshot, or all. Calls `keep` all the while.
    pub(super) fn examine(
        &self,
        name: Option<&Name>,
        depth: VerifyDepth,
        progress: &dyn Progress,
        keep: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Examination> {
        let store = self.without_disk();
        let mut found = Examination::default();
        let mut maps = Maps::new();
        let references: Vec<(usize, Reference)> = self.references_of(name, &mut found)?;
        for batch in references.chunks(ROOTS_AT_ONCE) {
            keep()?;
            let read = |(me, reference): &(usize, Reference)| {
                Ok((*me, reference.clone(), store.read_root(reference.root, Some(&reference.name))))
            };
            store.side_by_side(batch.iter().collect(), read, |(me, reference, root)| {
                self.note_snapshot(me, reference, root, &mut found, &mut maps)
            })?;
        }
        let read = |map: Map| {
            let section = store.read_section(&map.pack, &map.at);
            Ok((map, section))
        };
        store.side_by_side(maps.into_values().collect(), read, |(map, section)| {
            keep()?;
            found.note_map(self, &map, section)
        })?;
        let Examination { report, findings, wanted, .. } = &mut found;
        progress.begin(wanted.values().map(|w| w.pack.object_bytes()).sum());
        let check = |want: &Wanted| {
            let mut findings = Findings::default();
            let bytes = match depth {
                VerifyDepth::Structure => self.check_presence(want, &mut findings)?,
                VerifyDepth::Content => self.check_pack(want, &mut findings)?,
            };
            Ok((want.pack.object_bytes(), bytes, findings))
        };
        let take = |(object_bytes, bytes, more)| {
            keep()?;
            report.objects += 1;
            report.checked_bytes += bytes;
            findings.merge(more);
            progress.advance(object_bytes);
            Ok(())
        };
        let packs = wanted.values().collect();
        match depth {
            VerifyDepth::Structure => self.side_by_side(packs, check, take)?,
            VerifyDepth::Content => each(PACKS_AT_ONCE, packs, check, take)?,
        }
        Ok(found)
    }

    /// The references to look at, each with its number; what is wrong with any of them is noted.
    fn references_of(&self, name: Option<&Name>, found: &mut Examination) -> Result<Vec<(usize, Reference)>> {
        let Examination { findings, names, .. } = found;
        let mut references = Vec::new();
        match name {
            Some(name) => match self.reference(name) {
                Ok((reference, _)) => references.push(reference.ok_or_else(|| self.no_such(name))?),
                Err(StoreError::Damaged { key, why }) => {
                    names.push(name.to_string());
                    findings.add(&key, &why, [0]);
                }
                Err(e) => {
                    // One of a keyring concerns the whole domain.
                    self.settle()?;
                    names.push(name.to_string());
                    findings.note(self, &self.keys.reference(&self.domain, name), e, [0])?;
                }
            },
            None => {
                if let Some(why) = self.check_identity()? {
                    findings.note(self, &self.keys.identity(), why, [])?;
                }
                for domain in self.unopened_domains()? {
                    findings.add(
                        &domain,
                        &"there are more domains than keyrings: one that opens it may be lost",
                        [],
                    );
                }
                let all = self.readable_references()?;
                for (key, error) in all.bad.into_iter().chain(all.unreadable) {
                    names.push(key.rsplit('/').next().unwrap_or(&key).to_owned());
                    findings.note(self, &key, error, [names.len() - 1])?;
                }
                references = all.good;
            }
        }
        let first = names.len();
        names.extend(references.iter().map(|reference| reference.name.to_string()));
        Ok((first..).zip(references).collect())
    }

    fn note_snapshot(
        &self,
        me: usize,
        reference: Reference,
        root: Result<Root>,
        found: &mut Examination,
        maps: &mut Maps,
    ) -> Result<()> {
        found.report.snapshots += 1;
        found.report.objects += 2;
        let key = self.keys.root(reference.root);
        let root = match root {
            Ok(root) => root,
            Err(e) => return found.findings.note(self, &key, e, [me]),
        };
        found.report.checked_bytes += u64::from(reference.root_bytes);
        if root.snapshot_id(&self.domain) != reference.snapshot {
            found.findings.add(&key, &FormatError::HashMismatch("reference"), [me]);
        }
        found.note_root(me, &root, maps);
        found.references.insert(me, reference);
        Ok(())
    }
}
