//! The end of an import: page maps, root, reference, and the proof that nothing shared was collected meanwhile.
//!
//! Garbage collection marks what it is about to delete, looks at all references and announcements once more, and only
//! then deletes. A writer announces its snapshot, only then looks for marks, and moves its reference last, when what it
//! will stand for is proven to be there. Whichever of the two comes second sees the other, so a name never stands for
//! packs that are being deleted, and one that is moved keeps what it stood for until the new is safe.

use std::collections::HashSet;

use dormouse_core::{
    BlobEntry, Domain, ImageEntry, PackId, PackRef, Reference, Root, SectionEntry,
    frame::EncodedFrame,
    limits::{BLOB_BYTES_MAX, BLOB_PIECE_BYTES},
    pack::FrameKind,
};

use super::{
    blocks::ImageFile,
    layout::{LaidOut, Layout},
    pack_writer::Packing,
    request::{BlobBytes, BlobSource, ImportReport, ImportRequest},
    watched::Watched,
};
use crate::{
    backend::Version,
    error::{Result, StoreError},
    index::Index,
    meta_packs::{MetaPacks, PackTable},
    progress::Progress,
    snapshot::Snapshot,
    store::{Store, now_unix_ms},
    usage::nonzero_bytes,
};

impl Store {
    #[expect(clippy::too_many_arguments, reason = "each is one of the things a snapshot is made of")]
    pub(super) fn commit(
        &self,
        request: &ImportRequest,
        files: &[ImageFile],
        parent: Option<&Snapshot>,
        layout: Layout,
        (sequence, version): (u64, Option<Version>),
        index: &Index,
        packing: Packing,
        progress: &dyn Progress,
    ) -> Result<ImportReport> {
        let mut meta = MetaPacks::new(self, packing);
        let mut blobs = Vec::new();
        for blob in &request.blobs {
            blobs.push(store_blob(&mut meta, &self.domain, blob, request)?);
        }
        enum Placed {
            Zero,
            Same(SectionEntry, PackRef),
            New(usize, [u8; 32], u32),
        }
        let mut sections = Vec::new();
        for image in layout.sections {
            let mut placed = Vec::with_capacity(image.len());
            for section in image {
                placed.push(match section {
                    LaidOut::Zero => Placed::Zero,
                    LaidOut::Same(entry, pack) => Placed::Same(entry, pack),
                    LaidOut::New { frame, content, stored_pages } => {
                        Placed::New(meta.push(FrameKind::Section, &frame)?, content, stored_pages)
                    }
                });
            }
            sections.push(placed);
        }
        meta.close()?;

        let mut table = PackTable::default();
        let mut images = Vec::new();
        for ((source, file), placed) in request.images.iter().zip(files).zip(sections) {
            let mut entries = Vec::with_capacity(placed.len());
            for section in placed {
                entries.push(match section {
                    Placed::Zero => None,
                    Placed::Same(entry, pack) => {
                        Some(SectionEntry { at: table.place((pack, entry.at)), ..entry })
                    }
                    Placed::New(number, content, stored_pages) => {
                        Some(SectionEntry { content, at: table.place(meta.get(number)?), stored_pages })
                    }
                });
            }
            images.push(ImageEntry {
                id: source.id.clone(),
                kind: source.kind,
                bytes: file.bytes,
                sections: entries,
            });
        }
        let mut entries = Vec::new();
        for (mut entry, pieces) in blobs {
            for number in pieces {
                entry.pieces.push(table.place(meta.get(number)?));
            }
            entries.push(entry);
        }
        let mut labels = request.labels.clone();
        labels.sort();
        let root = Root {
            parent: parent.map(|p| p.reference().snapshot),
            created_unix_ms: now_unix_ms(),
            labels,
            images,
            blobs: entries,
            packs: table.packs,
        };
        // No reader would accept what fails this.
        root.check()?;
        let (root_id, root_object) = root.encode(&self.domain);
        let root_bytes = root_object.len() as u64;
        self.put_content(&self.keys.root(root_id), root_object)?;

        let reference = Reference {
            name: request.name.clone(),
            sequence: sequence.saturating_add(1),
            snapshot: root.snapshot_id(&self.domain),
            root: root_id,
            root_bytes: root_bytes as u32,
            written_unix_ms: now_unix_ms(),
            expires_unix_ms: request.expires_unix_ms,
            newer: None,
        };
        let mut own: HashSet<PackRef> = layout.stored.iter().copied().collect();
        own.extend(meta.packs());
        progress.naming();
        let announced = self.announce(&reference)?;
        let proven = self.find_lost(&own, &layout.reused, request, parent, root_id).and_then(|lost| {
            if lost.is_empty() {
                return Ok(());
            }
            index.lose(&lost);
            Err(StoreError::LostRace { packs: lost.len() })
        });
        let moved = proven.and_then(|()| {
            announced.check_time()?;
            let moved = self.swap_reference(&request.name, version.as_ref(), &reference);
            moved.map_err(|e| match e {
                StoreError::Unavailable { store, why, .. } => {
                    StoreError::InDoubt { name: request.name.to_string(), store, why }
                }
                // It was free a moment ago. Whoever took it then is told of as if it had been before.
                StoreError::Conflict { name }
                    if !request.replace
                        && request.parent.as_ref() != Some(&request.name)
                        && matches!(self.reference(&request.name), Ok((Some(_), _))) =>
                {
                    StoreError::Exists { name }
                }
                e => e,
            })
        });
        match moved {
            // It may move yet, if the request is still on its way: the announcement stays until it is too old.
            Err(e @ (StoreError::Unavailable { .. } | StoreError::InDoubt { .. })) => return Err(e),
            moved => {
                announced.withdraw();
                moved?;
            }
        }

        self.backend.keep_reserve();
        let reference_bytes = reference.encode(&self.domain).len() as u64;
        let mut report = ImportReport::of(&request.name, reference.snapshot);
        report.logical_bytes = files.iter().map(|f| f.bytes).sum();
        report.nonzero_bytes = root.images.iter().map(nonzero_bytes).sum();
        report.new_bytes = (layout.new_pages * dormouse_core::PAGE_BYTES as u64).min(report.nonzero_bytes);
        report.gathered_bytes = layout.gathered_pages * dormouse_core::PAGE_BYTES as u64;
        report.gathered_reads = layout.gathered_reads;
        report.read_bytes = layout.read_bytes;
        report.stored_bytes = layout.stored_bytes + meta.bytes + root_bytes + reference_bytes;
        report.objects = layout.stored.len() as u64 + meta.objects + 2;
        Ok(report)
    }

    /// Which of the packs a new snapshot needs are gone, cut short or marked for deletion. Called after it was announced.
    fn find_lost(
        &self,
        own: &HashSet<PackRef>,
        reused: &HashSet<PackRef>,
        request: &ImportRequest,
        parent: Option<&Snapshot>,
        root: dormouse_core::RootId,
    ) -> Result<HashSet<PackId>> {
        let mut needed: HashSet<PackRef> = own.union(reused).copied().collect();
        // As long as the parent's reference stood, whatever is reached through it was never garbage.
        if let (Some(name), Some(parent)) = (&request.parent, parent)
            && *name != request.name // The swap sees to that one.
            && self.reference(name)?.0.as_ref() != Some(parent.reference())
        {
            needed.extend(self.packs_of(parent)?);
        }
        let mut marked = HashSet::new();
        self.backend.list(&self.keys.condemned_all(), &mut |meta| {
            marked.extend(meta.key.rsplit('/').next().map(str::to_owned));
        })?;
        let mut lost = HashSet::new();
        let look = |pack: PackRef| {
            // A footer that this host has known for long says nothing of what became of its pack.
            let lost = marked.contains(&pack.id.to_string())
                || self.backend.head(&self.keys.pack(pack.id))? != Some(pack.object_bytes());
            Ok(lost.then_some(pack.id))
        };
        // While it is announced, time runs.
        self.side_by_side(needed.into_iter().collect(), look, |id| {
            lost.extend(id);
            Ok(())
        })?;
        let root_lost =
            marked.contains(&root.to_string()) || self.backend.head(&self.keys.root(root))?.is_none();
        if root_lost && lost.is_empty() {
            // Made anew by the next attempt, at another time and so under another name.
            lost.insert(PackId(root.0));
        }
        Ok(lost)
    }

    /// Every pack that a snapshot needs.
    fn packs_of(&self, snapshot: &Snapshot) -> Result<HashSet<PackRef>> {
        snapshot.load_sections()?;
        let mut packs: HashSet<PackRef> = snapshot.root().packs.iter().copied().collect();
        for (image, entry) in snapshot.root().images.iter().enumerate() {
            for index in 0..entry.sections.len() as u32 {
                if let Some(section) = snapshot.section(image, dormouse_core::SectionIndex(index))? {
                    packs.extend(section.packs());
                }
            }
        }
        Ok(packs)
    }

    /// Reads the footers of packs that the index does not know, newest first and up to a bound, so that a host with
    /// an empty cache shares what others stored.
    pub(super) fn learn_packs(&self, index: &Index) -> Result<()> {
        let mut unknown = Vec::new();
        self.backend.list(&self.keys.packs(), &mut |meta| {
            let id = meta.key.rsplit('/').next().and_then(PackId::from_hex);
            if let Some(id) = id.filter(|id| !index.knows(*id)) {
                unknown.push((meta.modified_unix_ms, id, meta.bytes));
            }
        })?;
        unknown.sort_by_key(|(modified, ..)| std::cmp::Reverse(*modified));
        unknown.truncate(LEARN_PACKS_MAX);
        // What cannot be read is not shared; `verify` is who complains about it.
        let read = |(_, id, bytes)| match self.footer_of_unknown(id, bytes) {
            Ok(read) => Ok(Some(read)),
            Err(why) if why.is_retryable() => Err(why),
            Err(why) => {
                tracing::warn!(%why, "a pack is not shared");
                Ok(None)
            }
        };
        self.side_by_side(unknown, read, |read| {
            read.iter().for_each(|(pack, footer)| index.add(pack, footer));
            Ok(())
        })
    }
}

/// Most packs whose footers are read before an import without a parent: about 48 GiB of stored pages.
const LEARN_PACKS_MAX: usize = 4096;

/// Stores a blob in pieces; gives its entry, still without places, and the numbers of its pieces.
fn store_blob(
    meta: &mut MetaPacks<'_>,
    domain: &Domain,
    source: &BlobSource,
    request: &ImportRequest,
) -> Result<(BlobEntry, Vec<usize>)> {
    let watched = match &source.bytes {
        BlobBytes::Memory(_) => None,
        BlobBytes::File(path) => Some(Watched::open(path, request.allow_changing)?),
    };
    let mut reader: Box<dyn std::io::Read + '_> = match (&source.bytes, &watched) {
        (BlobBytes::Memory(bytes), _) => Box::new(&bytes[..]),
        (BlobBytes::File(_), Some(watched)) => Box::new(&watched.file),
        (BlobBytes::File(_), None) => return Err(StoreError::Bug("a state's file was not opened")),
    };
    let (mut hasher, mut bytes, mut pieces) = (domain.content_hasher(), 0, Vec::new());
    loop {
        let mut piece = Vec::with_capacity(BLOB_PIECE_BYTES);
        let read = std::io::Read::read_to_end(
            &mut std::io::Read::take(&mut reader, BLOB_PIECE_BYTES as u64),
            &mut piece,
        );
        if let (Err(e), BlobBytes::File(path)) = (read, &source.bytes) {
            return Err(StoreError::file("reading", path, e));
        }
        if piece.is_empty() {
            break;
        }
        bytes += piece.len() as u64;
        if bytes > BLOB_BYTES_MAX {
            return Err(StoreError::Usage(format!("the state {} is larger than 1 GiB", source.id)));
        }
        hasher.update(&piece);
        pieces.push(meta.push(FrameKind::Blob, &EncodedFrame::encode(domain, &piece, request.level))?);
    }
    watched.as_ref().map_or(Ok(()), Watched::check)?;
    let content = *hasher.finalize().as_bytes();
    Ok((BlobEntry { id: source.id.clone(), content, bytes, pieces: Vec::new() }, pieces))
}
