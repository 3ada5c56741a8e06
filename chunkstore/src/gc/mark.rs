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

/// What references need.
#[derive(Default)]
pub(super) struct Live {
    /// The last part of each object's key.
    pub(super) ids: HashSet<String>,
    /// Page maps that were read, by pack and offset. Generations share most of theirs, and none is read twice.
    maps: HashSet<(PackId, u32)>,
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
        self.mark_all(&announced, live, keep, |reference, live| match self.mark_one(reference, live) {
            // Its writer finds out as well.
            Err(StoreError::Missing { .. }) => Ok(()),
            other => other,
        })?;
        let references = self.references()?;
        if let Some((_, error)) = references.bad.into_iter().next() {
            return Err(error);
        }
        let now = references.good.iter().map(|r| (r.name.to_string(), r.root)).collect();
        let mut new = references.good;
        new.retain(|reference| seen.get(reference.name.as_str()) != Some(&reference.root));
        self.mark_all(&new, live, keep, |reference, live| self.mark_current(reference.clone(), live))?;
        Ok(now)
    }

    /// Marks what references need, reading roots and then page maps side by side. Where anything is missing, `mark_again`
    /// decides what that means.
    fn mark_all(
        &self,
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
                live.ids.extend(root.packs.iter().map(|p| p.id.to_string()));
                live.ids.insert(snapshot.reference().root.to_string());
                for (image, entry) in root.images.iter().enumerate() {
                    for (index, entry) in (0..).map(SectionIndex).zip(&entry.sections) {
                        let Some(entry) = entry else { continue };
                        let at = (root.packs[entry.at.pack as usize].id, entry.at.offset);
                        if !live.maps.contains(&at) {
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
            self.side_by_side(maps.into_iter().collect(), read, |(at, packs)| {
                match packs {
                    Some(packs) => {
                        live.ids.extend(packs.iter().map(PackId::to_string));
                        live.maps.insert(at);
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
}

/// `None` where an object is missing.
fn there<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(StoreError::Missing { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}
