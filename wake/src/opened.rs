//! A snapshot opened so that machines wake from it: reference, root, device state and first pages at the same time.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    FirstPages, FirstPagesSource, HeldOut, Recording, SessionRecord, StoredImage, coverage::ONE_IN_OF_BAD,
    predict,
};
use dormouse_chunkstore::{
    Resume, ResumeStream, Snapshot, Store, StoreError, StreamInfo, StreamReport, TouchedRun,
};
use dormouse_core::{ImageKind, Name};
use dormouse_restore::{PageSize, PageSource, RestoreError, WORKING_SET_PAGES_MAX};

use crate::{MEMORY_ID, records::Records, working_set::WORKING_SET_ID};

/// Wakes for each that holds pages out, where that is to be rare.
const RARELY: u32 = 4;
/// Largest working set kept decoded in memory for many machines.
const HOT_BYTES_MAX: u64 = 1 << 30;

/// A snapshot's memory, and its resume stream if it has one that is current. Clones are the same.
#[derive(Clone, Debug)]
pub struct Opened {
    snapshot: Snapshot,
    image: StoredImage,
    index: u32,
    stream: Option<Arc<ResumeStream>>,
    first: Arc<Mutex<Option<FirstPages>>>,
    /// Nothing of the stream is to stay on this host.
    cold: bool,
}

/// Which pages are held out of first pages, to measure how good these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// None.
    None,
    /// A few, by chance.
    Always,
    /// In one wake of four, and in none of the others, whose blocks of 2 MiB can then be installed whole. Always after a
    /// session that found first pages to be mostly in vain.
    Rarely,
}

impl Opened {
    /// Opens the snapshot that `name` stands for; its stream is asked for together with the reference.
    ///
    /// # Errors
    /// The store's, or [`StoreError::NoSuchPart`] for a snapshot without memory.
    pub fn open(store: &Store, name: &Name) -> Result<Self, StoreError> {
        Self::of(store.open_resume(name)?)
    }

    /// From a snapshot that was opened to be resumed.
    ///
    /// # Errors
    /// [`StoreError::NoSuchPart`] for a snapshot without memory.
    pub fn of(resume: Resume) -> Result<Self, StoreError> {
        let Resume { snapshot, stream } = resume;
        let image = StoredImage::new(snapshot.image(ImageKind::Memory, MEMORY_ID)?);
        let images = &snapshot.root().images;
        let at = images.iter().position(|i| i.kind == ImageKind::Memory && i.id.as_str() == MEMORY_ID);
        let index = at.unwrap_or_default() as u32;
        Ok(Self { snapshot, image, index, stream: stream.map(Arc::new), first: Arc::default(), cold: false })
    }

    /// Has nothing of the stream kept on this host's disk once it is read.
    #[must_use]
    pub fn cold(self) -> Self {
        Self { cold: true, ..self }
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The memory image's pages as the store has them.
    pub fn image(&self) -> Arc<dyn PageSource> {
        Arc::new(self.image.clone())
    }

    /// The resume stream.
    pub fn stream(&self) -> Option<&ResumeStream> {
        self.stream.as_deref()
    }

    /// The device-state blob called `id`, from the stream if it can be had there.
    ///
    /// # Errors
    /// The store's.
    pub fn state(&self, id: &str) -> Result<Vec<u8>, StoreError> {
        if let Some(stream) = &self.stream {
            match stream.state(id) {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => {}
                Err(why) => tracing::warn!(%why, "the device state is read without the resume stream"),
            }
        }
        self.snapshot.read_blob(id)
    }

    /// The device-state blob called `usual`, or the only one there is, whatever whoever imported it called it.
    ///
    /// # Errors
    /// The store's; [`StoreError::NoSuchPart`] where several have other names, or there is none.
    pub fn only_state(&self, usual: &str) -> Result<Vec<u8>, StoreError> {
        let blobs = &self.snapshot.root().blobs;
        let states = || blobs.iter().map(|b| b.id.as_str()).filter(|id| *id != WORKING_SET_ID);
        let mut others = states().filter(|id| *id != usual);
        match (states().any(|id| id == usual), others.next(), others.next()) {
            (false, Some(only), None) => self.state(only),
            _ => self.state(usual),
        }
    }

    /// Begins to decode the first pages, so that this is behind what comes before the machine. With `keep` they stay in
    /// this process's memory for any number of machines, if they are not too many.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn decode_ahead(&self, keep: bool) -> Result<(), RestoreError> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = self.decoded(keep)?;
        }
        Ok(())
    }

    /// First pages for one machine; `None` without a stream that brings any.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn first_pages(&self) -> Result<Option<FirstPages>, RestoreError> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match &*first {
            Some(kept) if kept.is_kept() => Ok(Some(kept.clone())),
            Some(_) => Ok(first.take()),
            None => self.decoded(false),
        }
    }

    /// Whether the first pages are kept decoded in this process's memory.
    pub fn is_hot(&self) -> bool {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.as_ref().is_some_and(FirstPages::is_kept)
    }

    fn decoded(&self, keep: bool) -> Result<Option<FirstPages>, RestoreError> {
        let Some(stream) = self.stream.clone() else { return Ok(None) };
        let keep = keep && stream.head().pages() * PageSize::Small.bytes() <= HOT_BYTES_MAX;
        let first = match keep || !self.cold {
            true => FirstPages::decode(stream, self.index, keep)?,
            false => FirstPages::decode_cold(stream, self.index)?,
        };
        Ok((!first.list().is_empty()).then_some(first))
    }

    /// What a restore of this snapshot's memory reads from, with first pages if `stream` asks for them, and how it is
    /// recorded. If `sample`, a few pages are held out of them, to measure how good they are.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn waking(&self, stream: bool, sample: bool, page_size: PageSize) -> Result<Waking, RestoreError> {
        self.waking_with(stream, if sample { Sample::Always } else { Sample::None }, page_size)
    }

    /// As [`waking`](Self::waking). Which of the first pages are held out is for `sample` to say; of pages of 2 MiB none are.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn waking_with(
        &self,
        stream: bool,
        sample: Sample,
        page_size: PageSize,
    ) -> Result<Waking, RestoreError> {
        let recording = Recording::new(self.image(), page_size);
        let first = if stream { self.first_pages()? } else { None };
        let Some(first) = first else { return Ok(Waking { source: self.image(), first: None, recording }) };
        let (seed, held) = match sample {
            // A page of 2 MiB comes whole or not at all, and few of them would say nothing.
            _ if page_size == PageSize::Huge => (0, HeldOut::NONE),
            Sample::None => (0, HeldOut::NONE),
            Sample::Always => self.sample(first.pages()),
            Sample::Rarely => match self.sample(first.pages()) {
                (seed, held) if held.one_in() == ONE_IN_OF_BAD || seed.is_multiple_of(RARELY) => (seed, held),
                _ => (0, HeldOut::NONE),
            },
        };
        let source = FirstPagesSource::new(self.image(), first.clone(), held);
        let recording = recording.with_stream(&first, held, seed);
        Ok(Waking { source: Arc::new(source.clone()), first: Some((first, source)), recording })
    }

    /// The runs of memory pages in a stream, be it of this snapshot or of another of the same machine.
    pub fn memory_runs(&self, stream: &StreamInfo) -> Vec<Range<u64>> {
        stream.touched().into_iter().filter(|run| run.image == self.index).map(|run| run.pages).collect()
    }

    /// Makes the snapshot's resume stream anew from these runs of memory pages, in this order.
    ///
    /// # Errors
    /// The store's; the stream is as it was.
    pub fn build_stream(&self, pages: &[Range<u64>]) -> Result<StreamReport, StoreError> {
        let image = self.index;
        let touched: Vec<_> = pages.iter().map(|p| TouchedRun { image, pages: p.clone() }).collect();
        self.snapshot.store().build_stream(&self.snapshot, &touched)
    }

    fn sample(&self, set_pages: u64) -> (u32, HeldOut) {
        use std::hash::{BuildHasher as _, Hasher as _};
        let seed = std::hash::RandomState::new().build_hasher().finish() as u32;
        let last =
            Records::of(self.snapshot.store()).and_then(|r| r.last(self.snapshot.reference().snapshot));
        (seed, HeldOut::after(seed.into(), set_pages, last.map(|r| r.session.coverage).as_ref()))
    }
}

/// Makes the resume stream of the snapshot that `name` stands for, from what its machine touched in the session before
/// and the memory pages it `dirtied` in it; `None` if nothing is known of a session: what a machine writes is the smaller
/// part of what it needs.
///
/// # Errors
/// The store's; the snapshot is whole without its stream.
pub fn build_predicted_stream(
    store: &Store,
    name: &Name,
    session: Option<&SessionRecord>,
    dirtied: &[Range<u64>],
) -> Result<Option<StreamReport>, StoreError> {
    let pages = session.map(|session| predict(Some(session), dirtied, WORKING_SET_PAGES_MAX));
    let Some(pages) = pages.filter(|pages| !pages.is_empty()) else { return Ok(None) };
    let opened = Opened::of(Resume { snapshot: store.open_snapshot(name)?, stream: None })?;
    opened.build_stream(&pages).map(Some)
}

/// What one machine wakes from.
pub struct Waking {
    /// Its pages: what a plan is made of.
    pub source: Arc<dyn PageSource>,
    /// Its first pages, to be installed once the restore runs.
    pub first: Option<(FirstPages, FirstPagesSource)>,
    /// What will tell what it touched.
    pub recording: Recording,
}

impl std::fmt::Debug for Waking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waking").field("first", &self.first).finish_non_exhaustive()
    }
}
