//! Import: images and device state become a snapshot.
//!
//! Threads, each handing on to the next through a bounded queue, so that memory does not grow with the images:
//! read and hash (one a core) -> lay out (the caller) -> compress (one a core) -> pack (one) -> upload (a few).
//! Then, in this order: page maps, root, reference. Nothing refers to anything that is not stored durably.

mod blocks;
mod commit;
mod dirty;
mod drafts;
mod layout;
mod pack_writer;
mod request;
mod stragglers;
mod watched;

use std::{collections::BTreeMap, num::NonZero, thread};

use crossbeam::channel::{Receiver, Sender, bounded};
use dormouse_core::{PageCount, limits::SECTIONS_MAX};

pub(crate) use self::layout::MAP_LEVEL;
pub(crate) use self::pack_writer::{Failure, Packing, RawJob, compress_frames, fill_packs, upload_packs};
pub use self::request::{
    BlobBytes, BlobSource, DEFAULT_LEVEL, Dirty, ImageSource, ImportReport, ImportRequest,
};
pub use self::stragglers::SECTION_PACKS_MAX;
use self::{
    blocks::{BlockQueue, ImageFile},
    drafts::matching,
    layout::{BaseImage, Layout, Layouter},
};
use crate::{
    error::{Result, StoreError},
    index::Index,
    progress::Progress,
    refs::Found,
    snapshot::Snapshot,
    store::Store,
};

/// How often an import starts over when garbage collection took what it shared.
const RACES_MAX: usize = 10;
/// Blocks, and frames, that may be ahead of one that is late, for each core: what is done out of order waits in memory.
pub(crate) const AHEAD: usize = 8;
/// Packs uploaded at the same time. One is 12 MiB.
const UPLOADS: usize = 4;

impl Store {
    /// Makes a snapshot. When this returns, the snapshot is durable in the store; if it fails, the store is as it
    /// was but for objects that nothing refers to.
    ///
    /// # Errors
    /// See [`StoreError`]; [`StoreError::Usage`] where the request contradicts itself.
    pub fn import(&self, request: &ImportRequest, progress: &dyn Progress) -> Result<ImportReport> {
        check(request)?;
        if let Some(parent) = &request.parent
            && !self.settle_known()?
        {
            return Err(self.no_such(parent));
        }
        self.found()?;
        let index = Index::open(self.cache_dir());
        let mut races = 0;
        loop {
            match self.import_once(request, &index, Packing::of_attempt(races), progress) {
                Err(StoreError::LostRace { packs }) if races < RACES_MAX => {
                    races += 1;
                    tracing::info!(packs, races, "shared packs were collected meanwhile; importing again");
                }
                done => return done,
            }
        }
    }

    fn import_once(
        &self,
        request: &ImportRequest,
        index: &Index,
        packing: Packing,
        progress: &dyn Progress,
    ) -> Result<ImportReport> {
        let Found { reference: current, sequence, mut version } = self.find(&request.name)?;
        if current.is_some() && !request.replace && request.parent.as_ref() != Some(&request.name) {
            return Err(StoreError::Exists { name: request.name.to_string() });
        }
        let parent = request.parent.as_ref().map(|p| self.open_snapshot(p)).transpose()?;
        if parent.is_none() {
            self.learn_packs(index)?;
        }
        let images = request.images.iter().map(|image| ImageFile::open(image, request.allow_changing));
        let images = images.collect::<Result<Vec<_>>>()?;
        let sections: usize = images.iter().map(|image| PageCount(image.pages()).sections() as usize).sum();
        if sections > SECTIONS_MAX {
            return Err(StoreError::Usage(
                "the images have more than 64 TiB together, which is all a snapshot holds; leave some of them out".into(),
            ));
        }
        if self.found_identity()? && current.is_none() {
            version = self.find(&request.name)?.version;
        }
        progress.begin(images.iter().map(ImageFile::work_bytes).sum());
        let bases = bases(request, &images, parent.as_ref())?;
        let done = self.lay_out(request, index, &images, bases, packing, progress).and_then(|layout| {
            images.iter().try_for_each(ImageFile::check_unchanged)?;
            self.commit(
                request,
                &images,
                parent.as_ref(),
                layout,
                (sequence, version),
                index,
                packing,
                progress,
            )
        });
        match (&done, &parent) {
            // It was repacked meanwhile, and what it stood for collected: it is all there, elsewhere.
            (Err(StoreError::Missing { .. }), Some(parent))
                if self.reference(&parent.reference().name)?.0.as_ref() != Some(parent.reference()) =>
            {
                Err(StoreError::LostRace { packs: 1 })
            }
            _ => done,
        }
    }

    /// Runs the pipeline.
    fn lay_out(
        &self,
        request: &ImportRequest,
        index: &Index,
        images: &[ImageFile],
        bases: Vec<Option<BaseImage<'_>>>,
        packing: Packing,
        progress: &dyn Progress,
    ) -> Result<Layout> {
        let cores = thread::available_parallelism().map_or(2, NonZero::get);
        let failure = Failure::default();
        let (block_done, block_permits) = permits(AHEAD * cores);
        let was_zero = images.iter().zip(&bases).map(|(image, base)| {
            let sections = 0..PageCount(image.pages()).sections() as usize;
            sections.map(|i| base.as_ref().is_none_or(|base| base.is_zero(i))).collect()
        });
        let queue = BlockQueue::new(images, was_zero.collect(), block_permits);
        let laid_out = thread::scope(|scope| {
            let (block_out, blocks) = bounded(cores);
            let (raw_out, raw) = bounded(2 * cores);
            let (frame_out, frames) = bounded(2 * cores);
            let (pack_out, packs) = bounded(1);
            let (stored_out, stored) = crossbeam::channel::unbounded();
            let (frame_done, frame_permits) = permits(AHEAD * cores);
            let (queue, failure, domain) = (&queue, &failure, &*self.domain);
            for _ in 0..cores {
                let (block_out, raw, frame_out) = (block_out.clone(), raw.clone(), frame_out.clone());
                let permits = frame_permits.clone();
                scope.spawn(move || {
                    while let Some(block) = queue.next_block(domain) {
                        if failure.is_set() || block_out.send(block).is_err() {
                            return;
                        }
                    }
                });
                scope.spawn(move || compress_frames(domain, request.level, &raw, &permits, &frame_out));
            }
            // The channels must close when their last user ends; these are not users.
            drop((block_out, raw, frame_out));
            scope.spawn(move || fill_packs(domain, packing, &frames, frame_done, &pack_out));
            for _ in 0..UPLOADS {
                let (packs, stored_out) = (packs.clone(), stored_out.clone());
                scope.spawn(move || upload_packs(self, &packs, &stored_out, failure));
            }
            drop((packs, stored_out));
            // Whichever way this ends: who waits for a permit then is told.
            let block_done = block_done;
            let mut layouter = Layouter::new(self, index, images, bases, raw_out, stored, progress);
            let mut early = BTreeMap::new();
            let mut next = 0;
            for block in blocks {
                let block = block?;
                early.insert(block.sequence, block);
                while let Some(block) = early.remove(&next) {
                    next += 1;
                    // There are as many permits as there is room for.
                    let _ = block_done.try_send(());
                    if failure.is_set() || !layouter.add(&block)? {
                        return Ok(None);
                    }
                }
            }
            if failure.is_set() { Ok(None) } else { layouter.finish().map(Some) }
        });
        // What went wrong in another thread comes first: the layout only noticed that nobody listens.
        failure.take()?;
        laid_out?.ok_or(StoreError::Bug("the import stopped without a reason"))
    }
}

/// Permits for so many items to be under way between two stages. A worker takes one before it takes an item, and the stage
/// that puts items back into order gives one for each it has passed on: none is far ahead of one that is late.
pub(crate) fn permits(most: usize) -> (Sender<()>, Receiver<()>) {
    let (give, take) = bounded(most);
    (0..most).for_each(|_| {
        let _ = give.try_send(());
    });
    (give, take)
}

fn check(request: &ImportRequest) -> Result<()> {
    let usage = |why: &str| Err(StoreError::Usage(why.to_owned()));
    if request.images.is_empty() {
        return usage("a snapshot needs at least one image: pass --memory FILE or --disk ID=FILE");
    }
    for (i, image) in request.images.iter().enumerate() {
        // A memory and a disk are told apart by name as well.
        if request.images[..i].iter().any(|other| other.id == image.id) {
            return usage(&format!("the image {} is given twice", image.id));
        }
        if image.dirty.is_some() && request.parent.is_none() {
            return usage("dirty pages are relative to a parent: pass --parent NAME");
        }
    }
    for (i, blob) in request.blobs.iter().enumerate() {
        if request.blobs[..i].iter().any(|other| other.id == blob.id) {
            return usage(&format!("the state {} is given twice", blob.id));
        }
    }
    use dormouse_core::limits::{BLOBS_MAX, IMAGES_MAX, LABEL_BYTES_MAX, LABELS_MAX};
    for (i, (key, _)) in request.labels.iter().enumerate() {
        if request.labels[..i].iter().any(|(other, _)| other == key) {
            return usage(&format!("the label {key} is given twice"));
        }
    }
    let labels_fit =
        request.labels.iter().all(|(k, v)| k.len() <= LABEL_BYTES_MAX && v.len() <= LABEL_BYTES_MAX);
    if request.images.len() > IMAGES_MAX || request.blobs.len() > BLOBS_MAX {
        return usage("a snapshot holds at most 256 images and 256 states");
    }
    if request.labels.len() > LABELS_MAX || !labels_fit {
        return usage("a snapshot holds at most 64 labels of at most 1024 bytes each");
    }
    Ok(())
}

fn bases<'a>(
    request: &ImportRequest,
    files: &[ImageFile],
    parent: Option<&'a Snapshot>,
) -> Result<Vec<Option<BaseImage<'a>>>> {
    let base = |(image, file): (&ImageSource, &ImageFile)| {
        let found = parent.and_then(|snapshot| {
            let image = matching(snapshot, image.kind, image.id.as_str())?;
            Some(BaseImage { snapshot, image })
        });
        let same_size = |base: &BaseImage<'_>| base.snapshot.root().images[base.image].bytes == file.bytes;
        if image.dirty.is_some() && !found.as_ref().is_some_and(same_size) {
            let why = format!(
                "the parent has no image {} of {} bytes that the dirty pages could be relative to",
                image.id, file.bytes
            );
            return Err(StoreError::Usage(why));
        }
        Ok(found)
    };
    request.images.iter().zip(files).map(base).collect()
}
