//! Marking: what references need, read side by side.

use std::collections::{HashMap, HashSet};

use dormouse_core::{PackId, Reference, RootId, SectionIndex};

use crate::{
    error::{Result, StoreError},
    snapshot::Snapshot,
    store::Store,
};

/// Snapshots whose roots are in memory at the same time.
const MARK_BATCH: usize = 64;

/// Whose needs are marked: of names, or of announcements.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Names,
    Announcements,
}

#[derive(Default)]
struct Marked {
    /// The last part of each object's key.
    ids: HashSet<String>,
    /// Page maps that were read, by pack and offset. Generations share most of theirs, and none is read twice.
    maps: HashSet<(PackId, u32)>,
}

/// What references need.
#[derive(Default)]
pub(super) struct Live {
    named: Marked,
    /// What only announcements need: it stays, but whoever wants to share it is to go on seeing marks it has.
    announced: Marked,
}

impl Live {
    /// Whether the object is needed whose key ends in `id`.
    pub(super) fn needs(&self, id: &str) -> bool {
        self.is_named(id) || self.announced.ids.contains(id)
    }

    /// Whether a snapshot that has its name needs it.
    pub(super) fn is_named(&self, id: &str) -> bool {
        self.named.ids.contains(id)
    }

    fn knows_map(&self, of: Of, at: &(PackId, u32)) -> bool {
        self.named.maps.contains(at) || (of == Of::Announcements && self.announced.maps.contains(at))
    }

    fn of(&mut self, of: Of) -> &mut Marked {
        match of {
            Of::Names => &mut self.named,
            Of::Announcements => &mut self.announced,
        }
    }
}

impl Store {
    /// Adds to `live` what references need that are not in `seen`; gives all references with their roots.
    pub(super) fn mark(
        &self,
        seen: &HashMap<String, RootId>,
        now_unix_ms: u64,
        live: &mut Live,
        keep: &mut dyn FnMut() -> Result<()>,
    ) -> Result<HashMap<String, RootId>> {
        // Announcements before references: a writer ends the one only when the other has moved.
        let announced = self.announcements(now_unix_ms)?.0;
        let references = self.references()?;
        if let Some((_, error)) = references.bad.into_iter().next() {
            return Err(error);
        }
        let now = references.good.iter().map(|r| (r.name.to_string(), r.root)).collect();
        let mut new = references.good;
        new.retain(|reference| seen.get(reference.name.as_str()) != Some(&reference.root));
        self.mark_all(Of::Names, &new, live, keep, |reference, live| {
            self.mark_current(reference.clone(), live)
        })?;
        self.mark_all(Of::Announcements, &announced, live, keep, |reference, live| {
            match self.mark_one(Of::Announcements, reference, live) {
                // Its writer finds out as well.
                Err(StoreError::Missing { .. }) => Ok(()),
                other => other,
            }
        })?;
        Ok(now)
    }

    /// Marks what references need, reading roots and then page maps side by side. Where anything is missing, `mark_again`
    /// decides what that means.
    fn mark_all(
        &self,
        of: Of,
        references: &[Reference],
        live: &mut Live,
        keep: &mut dyn FnMut() -> Result<()>,
        mark_again: impl Fn(&Reference, &mut Live) -> Result<()>,
    ) -> Result<()> {
        for batch in references.chunks(MARK_BATCH) {
            keep()?;
            let mut snapshots = Vec::new();
            let read = |reference: &Reference| {
                let root = there(self.read_root(reference.root, Some(&reference.name)))?;
                Ok(root.map(|root| Snapshot::new(self.clone(), reference.clone(), root)))
            };
            self.side_by_side(batch.iter().collect(), read, |snapshot| {
                snapshots.extend(snapshot);
                Ok(())
            })?;
            let mut missing = snapshots.len() < batch.len();
            let mut maps = HashMap::new();
            for snapshot in &snapshots {
                let root = snapshot.root();
                let ids = &mut live.of(of).ids;
                ids.extend(root.packs.iter().map(|p| p.id.to_string()));
                ids.insert(snapshot.reference().root.to_string());
                for (image, entry) in root.images.iter().enumerate() {
                    for (index, entry) in (0..).map(SectionIndex).zip(&entry.sections) {
                        let Some(entry) = entry else { continue };
                        let at = (root.packs[entry.at.pack as usize].id, entry.at.offset);
                        if !live.knows_map(of, &at) {
                            maps.insert(at, (snapshot, image, index));
                        }
                    }
                }
            }
            let read = |(at, (snapshot, image, index)): (_, (&Snapshot, usize, SectionIndex))| {
                let map = there(snapshot.read_section(image, index))?;
                let packs =
                    map.map(|map| map.iter().flat_map(|m| m.packs()).map(|p| p.id).collect::<Vec<_>>());
                Ok((at, packs))
            };
            let marked = live.of(of);
            self.side_by_side(maps.into_iter().collect(), read, |(at, packs)| {
                match packs {
                    Some(packs) => {
                        marked.ids.extend(packs.iter().map(PackId::to_string));
                        marked.maps.insert(at);
                    }
                    None => missing = true,
                }
                Ok(())
            })?;
            if missing {
                batch.iter().try_for_each(|reference| mark_again(reference, live))?;
            }
        }
        Ok(())
    }

    /// Marks what a reference needs, or what it stands for by now: what it stood for when it was read may have been
    /// collected meanwhile.
    fn mark_current(&self, mut reference: Reference, live: &mut Live) -> Result<()> {
        loop {
            let missing = match self.mark_one(Of::Names, &reference, live) {
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

    fn mark_one(&self, of: Of, reference: &Reference, live: &mut Live) -> Result<()> {
        let root = self.read_root(reference.root, Some(&reference.name))?;
        let snapshot = Snapshot::new(self.clone(), reference.clone(), root);
        let root = snapshot.root();
        for (image, entry) in root.images.iter().enumerate() {
            for (index, entry) in (0..).zip(&entry.sections) {
                let Some(entry) = entry else { continue };
                let at = (root.packs[entry.at.pack as usize].id, entry.at.offset);
                if live.knows_map(of, &at) {
                    continue;
                }
                let marked = live.of(of);
                if let Some(section) = snapshot.section(image, SectionIndex(index))? {
                    marked.ids.extend(section.packs().iter().map(|p| p.id.to_string()));
                }
                marked.maps.insert(at);
            }
        }
        let ids = &mut live.of(of).ids;
        ids.extend(root.packs.iter().map(|p| p.id.to_string()));
        ids.insert(reference.root.to_string());
        Ok(())
    }
}

/// `None` where an object is missing.
fn there<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(StoreError::Missing { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}
