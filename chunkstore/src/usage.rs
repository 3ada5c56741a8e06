//! What is stored, what it stands for, and what it costs.

use std::collections::HashMap;

use dormouse_core::{
    ImageEntry, PAGE_BYTES, PackId, PackRef, Reference, Root, SectionIndex, pack::HEADER_BYTES,
    section::Extent,
};
use serde::Serialize;

use crate::{
    error::{Result, StoreError},
    snapshot::Snapshot,
    store::Store,
};

/// A snapshot in a listing; read from its reference and root alone.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SnapshotSummary {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub snapshot: String,
    /// The snapshot it was made from.
    pub parent: Option<String>,
    /// When it was captured, milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
    /// When it may be dropped; 0 for never.
    pub expires_unix_ms: u64,
    /// Bytes of all its images.
    pub logical_bytes: u64,
    /// Bytes in pages that are not zero.
    pub nonzero_bytes: u64,
    /// Bytes of its device state.
    pub state_bytes: u64,
    /// Images: name, "memory" or "disk", size.
    pub images: Vec<ImageSummary>,
    /// Device-state blobs: name and size.
    pub states: Vec<StateSummary>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// What is wrong with it, if its reference or root is damaged: then the rest is not known, but for the name (in an
    /// encrypted domain the last part of the reference's key, unless the reference can be read).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

/// An image in a listing.
#[derive(Clone, Debug, Serialize)]
pub struct ImageSummary {
    /// Its name.
    pub id: String,
    /// "memory" or "disk".
    pub kind: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Bytes in pages that are not zero.
    pub nonzero_bytes: u64,
}

/// A device-state blob in a listing.
#[derive(Clone, Debug, Serialize)]
pub struct StateSummary {
    /// Its name.
    pub id: String,
    /// Its size.
    pub bytes: u64,
}

impl SnapshotSummary {
    /// What reference and root say.
    pub fn of(reference: &Reference, root: &Root) -> Self {
        let images: Vec<_> = root
            .images
            .iter()
            .map(|i| ImageSummary {
                id: i.id.to_string(),
                kind: if i.kind == dormouse_core::ImageKind::Memory { "memory" } else { "disk" },
                bytes: i.bytes,
                nonzero_bytes: nonzero_bytes(i),
            })
            .collect();
        SnapshotSummary {
            name: reference.name.to_string(),
            snapshot: reference.snapshot.to_string(),
            parent: root.parent.map(|p| p.to_string()),
            created_unix_ms: root.created_unix_ms,
            expires_unix_ms: reference.expires_unix_ms,
            logical_bytes: images.iter().map(|i| i.bytes).sum(),
            nonzero_bytes: images.iter().map(|i| i.nonzero_bytes).sum(),
            state_bytes: root.blobs.iter().map(|b| b.bytes).sum(),
            states: root
                .blobs
                .iter()
                .map(|b| StateSummary { id: b.id.to_string(), bytes: b.bytes })
                .collect(),
            labels: root.labels.clone(),
            images,
            damaged: None,
        }
    }

    fn damaged(name: String, reference: Option<&Reference>, why: &StoreError) -> Self {
        SnapshotSummary {
            name,
            snapshot: reference.map(|r| r.snapshot.to_string()).unwrap_or_default(),
            expires_unix_ms: reference.map_or(0, |r| r.expires_unix_ms),
            damaged: Some(why.to_string()),
            ..Default::default()
        }
    }
}

/// Bytes of an image in pages that are not zero. Its last page may have more bytes than the image has left.
pub(crate) fn nonzero_bytes(image: &ImageEntry) -> u64 {
    (image.stored_pages() * PAGE_BYTES as u64).min(image.bytes)
}

/// What one snapshot, or all of them, take.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Usage {
    /// Bytes of all images.
    pub logical_bytes: u64,
    /// Bytes in pages that are not zero.
    pub nonzero_bytes: u64,
    /// Bytes in pages that are not zero, each distinct stored page counted once.
    pub unique_bytes: u64,
    /// In all: bytes of every object in the store. For one snapshot: bytes of the frames it needs, its page maps,
    /// device state and root, shared or not.
    pub stored_bytes: u64,
    /// In all: objects in the store. For one snapshot: objects it needs.
    pub objects: u64,
}

/// What a snapshot takes, and what of that is its own.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotUsage {
    /// Its name.
    pub name: String,
    /// What it takes.
    #[serde(flatten)]
    pub usage: Usage,
    /// Bytes of frames that no other snapshot needs.
    pub exclusive_bytes: u64,
    /// Packs its page maps refer to.
    pub packs: u64,
    /// How scattered it is.
    #[serde(flatten)]
    pub scatter: Scatter,
}

/// How scattered a snapshot's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scatter {
    /// Packs that hold its pages, per 64 MiB of them (all of them count as 64 MiB at least).
    pub packs_per_64_mib: f64,
    /// Requests that read all of its pages, per 64 MiB of them: frames in a row, or nearly so, are one.
    pub reads_per_64_mib: f64,
    /// Most packs that the pages of one section of 64 MiB lie in; see [`SECTION_PACKS_MAX`](crate::SECTION_PACKS_MAX).
    pub most_packs_in_a_section: u64,
}

/// What everything takes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UsageReport {
    /// In all.
    #[serde(flatten)]
    pub total: Usage,
    /// Bytes of objects that no snapshot needs, or of frames in packs that none needs; what repacking and garbage
    /// collection can win back.
    pub unreferenced_bytes: u64,
    /// Each snapshot.
    pub snapshots: Vec<SnapshotUsage>,
}

/// Frames of one pack with less than this between them are read at once.
const COALESCED_GAP_BYTES: u64 = 64 << 10;

type Place = (PackId, u32);

/// The frames a snapshot needs: where, stored bytes, and which slots.
#[derive(Debug, Default)]
struct Needs {
    frames: HashMap<Place, (u32, u32)>,
    packs: HashMap<PackId, PackRef>,
    /// Page maps, device state and roots: where, and stored bytes.
    metadata: HashMap<Place, u32>,
    most_packs_in_a_section: u64,
}

impl Needs {
    fn pages(&self) -> u64 {
        self.frames.values().map(|(_, slots)| u64::from(slots.count_ones())).sum()
    }

    /// Packs that hold pages, and reads of those pages, per 64 MiB of them.
    fn scatter(&self) -> Scatter {
        let mut places: Vec<_> =
            self.frames.iter().map(|((pack, offset), (bytes, _))| (pack, *offset, *bytes)).collect();
        places.sort_unstable();
        let (mut packs, mut reads) = (0u64, 0u64);
        let mut last: Option<(&PackId, u64)> = None;
        for (pack, offset, bytes) in places {
            let same_pack = last.filter(|(before, _)| *before == pack);
            packs += u64::from(same_pack.is_none());
            let near = same_pack.is_some_and(|(_, end)| u64::from(offset) <= end + COALESCED_GAP_BYTES);
            reads += u64::from(!near);
            last = Some((pack, u64::from(offset) + u64::from(bytes)));
        }
        let units = ((self.pages() * PAGE_BYTES as u64) as f64 / (64 << 20) as f64).max(1.0);
        Scatter {
            packs_per_64_mib: packs as f64 / units,
            reads_per_64_mib: reads as f64 / units,
            most_packs_in_a_section: self.most_packs_in_a_section,
        }
    }

    fn stored(&self) -> u64 {
        let frames = self.frames.values().map(|(bytes, _)| u64::from(*bytes));
        frames.chain(self.metadata.values().map(|bytes| u64::from(*bytes))).sum()
    }
}

impl Store {
    /// All snapshots, by name, damaged ones as well.
    pub fn list(&self) -> Result<Vec<SnapshotSummary>> {
        let mut all = Vec::new();
        let references = self.references()?;
        if references.good.is_empty() && references.bad.is_empty() {
            self.check_keyrings()?;
            self.hint_at_key()?;
        } else {
            self.warn_of_lost_keyrings();
        }
        for (key, why) in &references.bad {
            let name = key.rsplit('/').next().unwrap_or(key).to_owned();
            all.push(SnapshotSummary::damaged(name, None, why));
        }
        let read = |reference: Reference| {
            let root = self.read_root(reference.root, Some(&reference.name));
            Ok((reference, root))
        };
        self.side_by_side(references.good, read, |(reference, root)| {
            match root {
                Ok(root) => all.push(SnapshotSummary::of(&reference, &root)),
                Err(e) if e.is_retryable() => return Err(e),
                Err(why) => {
                    let name = reference.name.to_string();
                    all.push(SnapshotSummary::damaged(name, Some(&reference), &why));
                }
            }
            Ok(())
        })?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// What is stored and for whom.
    pub fn usage(&self) -> Result<UsageReport> {
        let mut report = UsageReport::default();
        // The listing below is of the domain.
        self.settle_known()?;
        self.check_there()?;
        self.warn_of_lost_keyrings();
        let mut references_bytes = 0;
        let (refs, identity) = (self.keys.refs() + "/", self.keys.identity());
        self.backend.list(self.keys.domain_prefix(), &mut |meta| {
            report.total.objects += 1;
            report.total.stored_bytes += meta.bytes;
            if meta.key.starts_with(&refs) || meta.key == identity {
                references_bytes += meta.bytes;
            }
        })?;
        let mut users: HashMap<Place, u32> = HashMap::new();
        let mut all = Needs::default();
        let mut each = Vec::new();
        for reference in self.references()?.good {
            let root = self.read_root(reference.root, Some(&reference.name))?;
            let needs = self.needs(&Snapshot::new(self.clone(), reference.clone(), root.clone()))?;
            all.metadata.extend(&needs.metadata);
            for (place, (bytes, slots)) in &needs.frames {
                *users.entry(*place).or_default() += 1;
                let seen = all.frames.entry(*place).or_insert((*bytes, 0));
                seen.1 |= slots;
            }
            each.push((SnapshotSummary::of(&reference, &root), needs));
        }
        for (summary, needs) in each {
            let exclusive = needs.frames.iter().filter(|(place, _)| users.get(*place) == Some(&1));
            let usage = Usage {
                logical_bytes: summary.logical_bytes,
                nonzero_bytes: summary.nonzero_bytes,
                unique_bytes: (needs.pages() * PAGE_BYTES as u64).min(summary.nonzero_bytes),
                stored_bytes: needs.stored(),
                // The packs, the root and the reference.
                objects: needs.packs.len() as u64 + 2,
            };
            report.total.logical_bytes += usage.logical_bytes;
            report.total.nonzero_bytes += usage.nonzero_bytes;
            report.snapshots.push(SnapshotUsage {
                scatter: needs.scatter(),
                name: summary.name,
                exclusive_bytes: exclusive.map(|(_, (bytes, _))| u64::from(*bytes)).sum(),
                packs: needs.packs.len() as u64,
                usage,
            });
            all.packs.extend(needs.packs);
        }
        report.total.unique_bytes = (all.pages() * PAGE_BYTES as u64).min(report.total.nonzero_bytes);
        // A pack's header, footer and trailer serve whatever is in it; a pack that nobody needs is waste as a whole.
        let around = |p: &PackRef| p.object_bytes() - u64::from(p.footer_offset) + HEADER_BYTES as u64;
        let around: u64 = all.packs.values().map(around).sum();
        let needed = all.stored() + around + references_bytes;
        report.unreferenced_bytes = report.total.stored_bytes.saturating_sub(needed);
        Ok(report)
    }

    fn needs(&self, snapshot: &Snapshot) -> Result<Needs> {
        snapshot.load_sections()?;
        let root = snapshot.root();
        let mut needs = Needs::default();
        needs.packs.extend(root.packs.iter().map(|p| (p.id, *p)));
        // The root is an object of its own; its name cannot be that of a pack.
        let reference = snapshot.reference();
        needs.metadata.insert((PackId(reference.root.0), 0), reference.root_bytes);
        for piece in root.blobs.iter().flat_map(|b| &b.pieces) {
            needs.metadata.insert((root.packs[piece.pack as usize].id, piece.offset), piece.stored_bytes);
        }
        for (image, entry) in root.images.iter().enumerate() {
            for (index, section) in entry.sections.iter().enumerate() {
                let Some(entry) = section else { continue };
                let pack = root.packs[entry.at.pack as usize].id;
                needs.metadata.insert((pack, entry.at.offset), entry.at.stored_bytes);
                let Some(section) = snapshot.section(image, SectionIndex(index as u32))? else { continue };
                needs.packs.extend(section.packs().iter().map(|p| (p.id, *p)));
                let packs = section.packs().len() as u64;
                needs.most_packs_in_a_section = needs.most_packs_in_a_section.max(packs);
                for (_, extent) in section.extents() {
                    let Extent::Frame { frame, slot, pages } = extent else { continue };
                    let at = section.frames()[frame as usize];
                    let pack = section.packs()[at.pack as usize].id;
                    let slots = (u64::MAX >> (64 - pages)) << slot.get();
                    let need = needs.frames.entry((pack, at.offset)).or_insert((at.stored_bytes, 0));
                    need.1 |= slots as u32;
                }
            }
        }
        Ok(needs)
    }
}

impl Snapshot {
    /// How scattered its pages are. Reads all of its page maps.
    pub fn scatter(&self) -> Result<Scatter> {
        Ok(self.store().needs(self)?.scatter())
    }
}
