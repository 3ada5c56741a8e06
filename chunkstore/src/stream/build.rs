//! Building a stream from a snapshot and the pages its machine is known to touch first.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use bytes::Bytes;
use dormouse_core::{
    Name, PAGE_BYTES, PageIndex,
    frame::EncodedFrame,
    limits::BLOB_PIECE_BYTES,
    root,
    stream::{STREAM_FRAME_PAGES_MAX, StreamBlob, StreamBuilder, StreamHead, StreamLimits, StreamPart},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, StoreError},
    snapshot::{Image, Pages, Snapshot},
    store::Store,
};

/// Frames encoded before they are put into the stream: 256 MiB of pages.
const FRAMES_AT_ONCE: usize = 1024;
/// Frames read from a remote store at the same time.
const REMOTE_READERS: usize = 8;
/// First touches are ordered coarsely: between clones the set of pages is stable and their fine order is not, and
/// long runs install faster. Within this many pages of the order, pages are sorted by their place.
const ORDER_PAGES: u64 = 2048;

/// Pages touched one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TouchedRun {
    /// Index into the root's images.
    pub image: u32,
    /// Which pages.
    pub pages: Range<u64>,
}

/// What a stream holds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StreamReport {
    /// Pages in it.
    pub pages: u64,
    /// Bytes of those pages.
    pub raw_bytes: u64,
    /// Bytes of the object.
    pub stored_bytes: u64,
    /// Frames in it.
    pub frames: u64,
}

/// A stream that is stored.
#[derive(Clone, Debug)]
pub struct StreamInfo {
    /// What it is of, and what is in it.
    pub head: StreamHead,
    /// Bytes of the object.
    pub stored_bytes: u64,
}

impl StreamInfo {
    /// The pages in it, in its order.
    pub fn touched(&self) -> Vec<TouchedRun> {
        let runs = self.head.frames.iter().flat_map(|f| match &f.part {
            StreamPart::State { .. } => Vec::new(),
            StreamPart::Pages { image, runs } => {
                runs.iter().map(|pages| TouchedRun { image: *image, pages: pages.clone() }).collect()
            }
        });
        runs.collect()
    }
}

impl Store {
    /// Makes the resume stream of a snapshot, in place of the one it has. `touched` is in the order of first touch;
    /// pages outside an image are left out, and so are the last ones of more than a stream can hold.
    ///
    /// # Errors
    /// The store's; [`StoreError::Conflict`] if the name has moved on to another snapshot; [`StoreError::Usage`] if its
    /// device state alone is more than a stream can hold. The stream is then as it was.
    pub fn build_stream(&self, snapshot: &Snapshot, touched: &[TouchedRun]) -> Result<StreamReport> {
        self.build_stream_within(snapshot, touched, &StreamLimits::default())
    }

    fn build_stream_within(
        &self,
        snapshot: &Snapshot,
        touched: &[TouchedRun],
        limits: &StreamLimits,
    ) -> Result<StreamReport> {
        let reference = snapshot.reference();
        let root = snapshot.root();
        let key = self.keys.root(reference.root);
        let root_object = self
            .get_whole(&key, root::OBJECT_BYTES_MAX)?
            .ok_or_else(|| StoreError::Missing { key, referrer: format!("snapshot {}", reference.name) })?;
        let blobs =
            root.blobs.iter().map(|b| StreamBlob { id: b.id.clone(), bytes: b.bytes, content: b.content });
        let mut builder =
            StreamBuilder::new(reference.snapshot, reference.root, root_object.to_vec(), blobs.collect());
        for (i, blob) in root.blobs.iter().enumerate() {
            for piece in snapshot.read_blob(blob.id.as_str())?.chunks(BLOB_PIECE_BYTES) {
                let frame = EncodedFrame::encode_for_speed(&self.domain, piece);
                let part = StreamPart::State { blob: i as u32 };
                if !builder.fits(&part, &frame, limits) {
                    return Err(StoreError::Usage(format!(
                        "the device state of {} takes up more than the {} MiB that a resume stream may have; the snapshot \
                         resumes without one, only slower",
                        reference.name,
                        limits.bytes >> 20
                    )));
                }
                builder.push(&part, &frame);
            }
        }
        let images: Vec<Image> = snapshot.images().collect();
        let mut report = StreamReport { frames: root.blobs.len() as u64, ..Default::default() };
        let frames = frames_of(&coalesce(touched, &images));
        'full: for frames in frames.chunks(FRAMES_AT_ONCE) {
            for ((image, runs), frame) in frames.iter().zip(self.encoded(frames, &images)?) {
                let part = StreamPart::Pages { image: *image, runs: runs.clone() };
                if !builder.fits(&part, &frame, limits) {
                    tracing::info!(name = %reference.name, pages = report.pages, "a resume stream is full");
                    break 'full;
                }
                report.pages += runs.iter().map(|r| r.end - r.start).sum::<u64>();
                report.frames += 1;
                builder.push(&part, &frame);
            }
        }
        let object = builder.finish(&self.domain);
        report.raw_bytes = report.pages * PAGE_BYTES as u64;
        report.stored_bytes = object.len() as u64;
        // A stream of what the name stood for before would only push out a newer one.
        if self.reference(&reference.name)?.0.is_none_or(|now| now.snapshot != reference.snapshot) {
            return Err(StoreError::Conflict { name: reference.name.to_string() });
        }
        let object = Bytes::from(object);
        self.backend.put_again(&self.keys.stream(&self.domain, &reference.name), object.clone())?;
        self.keep_stream(&reference.name, &object);
        Ok(report)
    }

    /// Reads, decodes and encodes on several threads: reads of a remote store are mostly waiting.
    fn encoded(&self, frames: &[(u32, Vec<Range<u64>>)], images: &[Image]) -> Result<Vec<EncodedFrame>> {
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let workers = if self.backend.is_local() { cores } else { cores.max(REMOTE_READERS) };
        let next = AtomicUsize::new(0);
        let work = || {
            let (mut done, mut raw) = (Vec::new(), Vec::with_capacity(STREAM_FRAME_PAGES_MAX * PAGE_BYTES));
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((image, runs)) = frames.get(index) else { return Ok(done) };
                raw.clear();
                for run in runs {
                    read_pages(&images[*image as usize], run.clone(), &mut raw)?;
                }
                done.push((index, EncodedFrame::encode_for_speed(&self.domain, &raw)));
            }
        };
        let parts: Vec<Result<Vec<_>>> = thread::scope(|scope| {
            let spawned: Vec<_> = (1..workers.min(frames.len())).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let panicked = |_| Err(StoreError::Bug("a thread that built a resume stream panicked"));
            [mine].into_iter().chain(spawned.into_iter().map(|t| t.join().unwrap_or_else(panicked))).collect()
        });
        let mut all: Vec<(usize, EncodedFrame)> = Vec::with_capacity(frames.len());
        for part in parts {
            all.extend(part?);
        }
        all.sort_unstable_by_key(|(index, _)| *index);
        Ok(all.into_iter().map(|(_, frame)| frame).collect())
    }

    /// What the stream stored for `name` is of and holds, be it current or not; `None` if there is none.
    ///
    /// # Errors
    /// The store's; [`StoreError::Damaged`] for a stream that is no use any more.
    pub fn stream_info(&self, name: &Name) -> Result<Option<StreamInfo>> {
        self.settle()?;
        let key = self.keys.stream(&self.domain, name);
        let Some(stored_bytes) = self.backend.head(&key)? else { return Ok(None) };
        Ok(self.stream_head(&key, None)?.map(|head| StreamInfo { head, stored_bytes }))
    }

    /// Deletes the stream of `name`; whether there was one. The snapshot resumes without it, only slower.
    ///
    /// # Errors
    /// The store's.
    pub fn remove_stream(&self, name: &Name) -> Result<bool> {
        self.settle()?;
        let key = self.keys.stream(&self.domain, name);
        let there = self.backend.head(&key)?.is_some();
        if there {
            self.backend.delete(&key)?;
        }
        self.cool(name);
        Ok(there)
    }
}

/// Each page once, in coarse order of first touch, as runs.
fn coalesce(touched: &[TouchedRun], images: &[Image]) -> Vec<TouchedRun> {
    let mut seen: Vec<std::collections::HashSet<u64>> = images.iter().map(|_| Default::default()).collect();
    let mut runs: Vec<TouchedRun> = Vec::new();
    let mut window: Vec<(u32, u64)> = Vec::new();
    let mut close = |window: &mut Vec<(u32, u64)>| {
        window.sort_unstable();
        for (image, page) in window.drain(..) {
            match runs.last_mut() {
                Some(last) if last.image == image && last.pages.end == page => last.pages.end += 1,
                _ => runs.push(TouchedRun { image, pages: page..page + 1 }),
            }
        }
    };
    for run in touched {
        let (Some(image), Some(seen)) = (images.get(run.image as usize), seen.get_mut(run.image as usize))
        else {
            continue;
        };
        for page in run.pages.start..run.pages.end.min(image.pages().0) {
            if seen.insert(page) {
                window.push((run.image, page));
                if window.len() as u64 == ORDER_PAGES {
                    close(&mut window);
                }
            }
        }
    }
    close(&mut window);
    runs
}

/// Cuts runs into frames of one image and at most 64 pages each.
fn frames_of(runs: &[TouchedRun]) -> Vec<(u32, Vec<Range<u64>>)> {
    let mut frames: Vec<(u32, Vec<Range<u64>>)> = Vec::new();
    let mut left = 0;
    for run in runs {
        let mut pages = run.pages.clone();
        while pages.start < pages.end {
            if left == 0 || frames.last().is_none_or(|(image, _)| *image != run.image) {
                frames.push((run.image, Vec::new()));
                left = STREAM_FRAME_PAGES_MAX as u64;
            }
            let take = left.min(pages.end - pages.start);
            if let Some((_, runs)) = frames.last_mut() {
                runs.push(pages.start..pages.start + take);
            }
            pages.start += take;
            left -= take;
        }
    }
    frames
}

fn read_pages(image: &Image, pages: Range<u64>, raw: &mut Vec<u8>) -> Result<()> {
    let mut page = pages.start;
    while page < pages.end {
        let left = pages.end - page;
        page += match image.locate(PageIndex(page))? {
            Pages::Zero { pages } => {
                let pages = pages.min(left);
                raw.resize(raw.len() + pages as usize * PAGE_BYTES, 0);
                pages
            }
            Pages::Stored { at, slot, pages } => {
                let pages = pages.min(left);
                let frame = image.frame(&at)?;
                let bytes = frame.pages(slot, pages as usize);
                raw.extend_from_slice(
                    bytes.ok_or(StoreError::Bug("a page map refers past the end of a frame"))?,
                );
                pages
            }
        };
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a frame of one run is what is meant")]
mod tests {
    use dormouse_core::{ImageId, ImageKind};

    use super::*;
    use crate::{BlobBytes, BlobSource, ImageSource, ImportRequest, NoProgress, StoreOptions};

    #[test]
    fn runs_are_cut_at_frames_and_at_images() {
        let runs = [
            TouchedRun { image: 0, pages: 0..100 },
            TouchedRun { image: 0, pages: 200..210 },
            TouchedRun { image: 1, pages: 5..6 },
        ];
        let frames = frames_of(&runs);
        assert_eq!(frames, [(0, vec![0..64]), (0, vec![64..100, 200..210]), (1, vec![5..6])]);
    }

    #[test]
    fn a_stream_is_filled_up_to_what_readers_accept_and_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open("memory://", StoreOptions::default()).unwrap();
        let mut noise = blake3::Hasher::new().finalize_xof();
        let mut random = |bytes: usize| {
            let mut filled = vec![0; bytes];
            noise.fill(&mut filled);
            filled
        };
        let (path, id) = (dir.path().join("memory"), |id| ImageId::new(id).unwrap());
        std::fs::write(&path, random(300 * PAGE_BYTES)).unwrap();
        let name = Name::new("m").unwrap();
        let mut request = ImportRequest::new(name.clone());
        request.images = vec![ImageSource { id: id("memory"), kind: ImageKind::Memory, path, dirty: None }];
        request.blobs = vec![BlobSource { id: id("vmstate"), bytes: BlobBytes::Memory(random(5000)) }];
        store.import(&request, &NoProgress).unwrap();
        let snapshot = store.open_snapshot(&name).unwrap();
        let touched = [TouchedRun { image: 0, pages: 0..300 }];
        let all = store.build_stream(&snapshot, &touched).unwrap();
        assert_eq!((all.pages, all.frames), (300, 6), "five of pages, one of state");
        let readers = StreamLimits::default();
        let built = |limits: StreamLimits| store.build_stream_within(&snapshot, &touched, &limits);
        for limits in [
            StreamLimits { bytes: all.stored_bytes * 2 / 3, ..readers },
            StreamLimits { frames: 4, ..readers },
        ] {
            let report = built(limits).unwrap();
            assert_eq!((report.pages, report.frames), (192, 4), "{limits:?}");
            assert!(report.stored_bytes <= limits.bytes);
            let resume = store.open_resume(&name).unwrap();
            assert_eq!(resume.stream.unwrap().head().pages(), 192, "the first ones");
        }
        // Not even its state: the one there was stays.
        for limits in [
            StreamLimits { bytes: 5000, ..readers },
            StreamLimits { frames: 0, ..readers },
            StreamLimits { head_bytes: 500, ..readers },
        ] {
            assert!(matches!(built(limits), Err(StoreError::Usage(_))), "{limits:?}");
            let resume = store.open_resume(&name).unwrap();
            assert_eq!(resume.stream.unwrap().head().pages(), 192);
        }
    }
}
