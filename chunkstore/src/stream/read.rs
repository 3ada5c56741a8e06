//! Reading a stream: what a resume begins with.

use std::{
    borrow::Cow,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use bytes::Bytes;
use dormouse_core::{
    FormatError, Name, PAGE_BYTES, PageIndex, Reference, Root,
    content::blob_content,
    stream::{PREFIX_BYTES, StreamFrame, StreamHead, StreamPart},
};

use super::{fetch::Fetcher, local::LocalStream};
use crate::{
    error::{Result, StoreError},
    snapshot::Snapshot,
    store::Store,
    tail,
};

/// Bytes read first of a stream on this host: enough for the head of most.
const LOCAL_FIRST_BYTES: u64 = 128 << 10;

/// A snapshot opened to be resumed, with its stream if it has one that is current.
#[derive(Debug)]
pub struct Resume {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Its first pages and device state.
    pub stream: Option<ResumeStream>,
}

/// A stream being read.
#[derive(Debug)]
pub struct ResumeStream {
    store: Store,
    name: Name,
    key: String,
    head: StreamHead,
    from: Origin,
}

/// Where a stream's bytes come from.
#[derive(Debug)]
enum Origin {
    /// A remote store, which brings them as it can.
    Fetched(Arc<Fetcher>),
    /// The warm tier: this host's disk, below the cache directory.
    Kept(LocalStream),
    /// A store that is a directory of this host.
    File(File),
}

impl Drop for ResumeStream {
    fn drop(&mut self) {
        if let Origin::Fetched(fetcher) = &self.from {
            fetcher.stop();
        }
    }
}

impl Store {
    /// Opens a snapshot to be resumed: reference and stream are asked for at the same time, and the stream brings the
    /// root. Without a stream, or with one that is damaged or of another snapshot, the root is read by itself.
    ///
    /// A stream that this host has on disk is not asked for, as long as it is of the snapshot that the name stands for.
    pub fn open_resume(&self, name: &Name) -> Result<Resume> {
        if let Some(local) = self.local_stream(name) {
            let Some(reference) = self.reference_soon(name)? else {
                // Another host removed it.
                self.cool(name);
                return Err(self.no_such(name));
            };
            if local.head.snapshot == reference.snapshot {
                self.stream_used(&local);
                return self.open_local(reference, local);
            }
            local.discard();
        }
        let key = self.keys.stream(&self.domain, name);
        let fetcher = (!self.backend.is_local()).then(|| Fetcher::start(self.backend.clone(), key.clone()));
        let opened = self.open_with(name, &key, fetcher.clone());
        if !matches!(&opened, Ok(Resume { stream: Some(_), .. })) {
            fetcher.iter().for_each(|f| f.stop());
        }
        opened
    }

    /// What `name` stands for now, asked again while the store is slow, and then with all patience there is.
    fn reference_soon(&self, name: &Name) -> Result<Option<Reference>> {
        if !self.backend.is_local() {
            let unavailable = |why| StoreError::Unavailable {
                doing: format!("reading the reference of {name}"),
                store: self.url().to_owned(),
                why,
            };
            let (store, of) = (self.clone(), name.clone());
            match tail::climb(&self.slots, unavailable, move |_| store.reference(&of)) {
                Err(StoreError::Unavailable { .. }) => {}
                other => return Ok(other?.0),
            }
        }
        Ok(self.reference(name)?.0)
    }

    fn open_local(&self, reference: Reference, mut local: LocalStream) -> Result<Resume> {
        let frames = std::mem::take(&mut local.head.frames);
        let head = StreamHead { frames, ..local.head.clone() };
        let root = match self.root_of(&head, &reference) {
            Some(root) => root,
            None => self.read_root(reference.root, Some(&reference.name))?,
        };
        let (name, key) = (reference.name.clone(), self.keys.stream(&self.domain, &reference.name));
        let snapshot = Snapshot::new(self.waited_for(), reference, root);
        let stream = ResumeStream { store: self.clone(), name, key, head, from: Origin::Kept(local) };
        Ok(Resume { snapshot, stream: Some(stream) })
    }

    fn open_with(&self, name: &Name, key: &str, fetcher: Option<Arc<Fetcher>>) -> Result<Resume> {
        let reference = self.reference_soon(name)?.ok_or_else(|| self.no_such(name))?;
        let head = match self.stream_head(key, fetcher.as_ref()) {
            Ok(head) => head.filter(|h| h.snapshot == reference.snapshot),
            Err(why) => {
                tracing::warn!(%name, %why, "the resume stream is not usable; resuming without it");
                None
            }
        };
        let root = match head.as_ref().and_then(|head| self.root_of(head, &reference)) {
            Some(root) => root,
            None => self.read_root(reference.root, Some(name))?,
        };
        let snapshot = Snapshot::new(self.waited_for(), reference, root);
        let (store, name, key) = (self.clone(), name.clone(), key.to_owned());
        // Opened after its head was read: if it was replaced in between, its frames do not prove themselves, and are
        // asked of the store by name.
        let file = || self.backend.file(&key).map(Origin::File);
        let from = fetcher.map(Origin::Fetched).or_else(file);
        let stream = head.zip(from).map(|(head, from)| ResumeStream { store, name, key, head, from });
        Ok(Resume { snapshot, stream })
    }

    /// The root that a stream carries, if it is the one the reference is at. Its name is the hash of its bytes, so
    /// the reference vouches for it.
    fn root_of(&self, head: &StreamHead, reference: &Reference) -> Option<Root> {
        if head.root != reference.root {
            return None;
        }
        Root::decode(&self.domain, reference.root, &head.root_object).ok()
    }

    pub(super) fn stream_head(
        &self,
        key: &str,
        fetcher: Option<&Arc<Fetcher>>,
    ) -> Result<Option<StreamHead>> {
        let damaged = |why| StoreError::Damaged { key: key.to_owned(), why };
        let read = |range: Range<u64>| match fetcher {
            Some(fetcher) => match fetcher.bytes(range) {
                Err(StoreError::Missing { .. }) => Ok(None),
                other => other.map(Some),
            },
            None => self.backend.get(key, Some(range)),
        };
        let Some(mut start) = read(0..LOCAL_FIRST_BYTES)? else { return Ok(None) };
        let prefix =
            start.get(..PREFIX_BYTES).ok_or_else(|| damaged(FormatError::Truncated("resume stream")))?;
        let end = StreamHead::end(prefix).map_err(damaged)? as u64;
        if end > start.len() as u64 {
            let Some(whole) = read(0..end)? else { return Ok(None) };
            start = whole;
        }
        let head = StreamHead::decode(&self.domain, &start).map_err(damaged)?;
        if let Some(fetcher) = fetcher {
            fetcher.set_total(head.object_bytes(end));
        }
        Ok(Some(head))
    }
}

/// Takes decoded pages: image, first page, bytes. Called from several threads.
pub type InstallRun<'a> = dyn Fn(u32, PageIndex, &[u8]) -> Result<()> + Sync + 'a;

/// Consecutive pages, decoded.
#[derive(Clone, Debug)]
pub struct HotRun {
    /// Index into the root's images.
    pub image: u32,
    /// The first page.
    pub first: PageIndex,
    /// Their bytes.
    pub bytes: Vec<u8>,
}

impl ResumeStream {
    /// What is in it.
    pub fn head(&self) -> &StreamHead {
        &self.head
    }

    /// The object of the root that it was built from.
    pub(crate) fn into_root_object(mut self) -> Vec<u8> {
        std::mem::take(&mut self.head.root_object)
    }

    /// Bytes of the whole object.
    pub fn stored_bytes(&self) -> u64 {
        self.head.object_bytes(PREFIX_BYTES as u64)
    }

    /// Whether it is read from this host's cache.
    pub fn is_warm(&self) -> bool {
        matches!(self.from, Origin::Kept(_))
    }

    /// Keeps it on this host's disk if all of it has been read from a remote store; it is read from there next time.
    pub fn keep(&self) {
        let Origin::Fetched(fetcher) = &self.from else { return };
        if let Ok(object) = fetcher.bytes(0..self.stored_bytes()) {
            self.store.keep_stream(&self.name, &object);
        }
    }

    /// The frame's stored bytes: those that arrived, or those of a file, read into `buffer`, which is used again for the
    /// next one. What cannot be read is empty, does not decode, and is then asked of the store.
    fn stored<'b>(
        &self,
        frame: &StreamFrame,
        arrived: Option<&'b Bytes>,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Cow<'b, [u8]>> {
        let range = frame.at.range();
        let file = match &self.from {
            Origin::Fetched(fetcher) => {
                return match arrived {
                    Some(bytes) => Ok(Cow::Borrowed(bytes)),
                    None => Ok(Cow::Owned(fetcher.bytes(range)?.into())),
                };
            }
            Origin::Kept(local) => &local.file,
            Origin::File(file) => file,
        };
        buffer.resize(frame.at.stored_bytes as usize, 0);
        if let Err(why) = file.read_exact_at(buffer, range.start) {
            tracing::info!(%why, name = %self.name, "a resume stream on this host cannot be read");
            buffer.clear();
        }
        Ok(Cow::Borrowed(buffer))
    }

    fn decode(&self, frame: &StreamFrame, raw: &mut Vec<u8>) -> Result<()> {
        let mut buffer = Vec::new();
        let stored = self.stored(frame, None, &mut buffer)?;
        self.decode_stored(frame, &stored, raw)
    }

    fn decode_stored(&self, frame: &StreamFrame, stored: &[u8], raw: &mut Vec<u8>) -> Result<()> {
        let mut decoded = frame.at.decode_into(&self.store.domain, stored, raw);
        if let Err(why) = &decoded
            && !matches!(self.from, Origin::Fetched(_))
        {
            tracing::info!(%why, name = %self.name, "a resume stream is not as it was; the store is asked");
            if let Origin::Kept(local) = &self.from {
                local.discard();
            }
            let stored = self.store.backend.get(&self.key, Some(frame.at.range()))?;
            let missing = || StoreError::Missing { key: self.key.clone(), referrer: "a resume".into() };
            decoded = frame.at.decode_into(&self.store.domain, &stored.ok_or_else(missing)?, raw);
        }
        decoded.map_err(|why| StoreError::Damaged { key: self.key.clone(), why })
    }

    /// The device-state blob called `id`, verified; `None` if the stream has none of that name.
    pub fn state(&self, id: &str) -> Result<Option<Vec<u8>>> {
        let Some(index) = self.head.blobs.iter().position(|b| b.id.as_str() == id) else { return Ok(None) };
        let (mut bytes, mut piece) = (Vec::new(), Vec::new());
        for frame in &self.head.frames {
            if frame.part == (StreamPart::State { blob: index as u32 }) {
                self.decode(frame, &mut piece)?;
                bytes.extend_from_slice(&piece);
            }
        }
        if blob_content(&self.store.domain, &bytes) != self.head.blobs[index].content {
            let why = FormatError::HashMismatch("device state");
            return Err(StoreError::Damaged { key: self.key.clone(), why });
        }
        Ok(Some(bytes))
    }

    /// Takes a frame from `wanted`: the next, or of those that are still on their way the first to arrive, with its bytes.
    fn take_frame(&self, wanted: &Mutex<Vec<(usize, Range<u64>)>>) -> Result<Option<(usize, Option<Bytes>)>> {
        if let Origin::Fetched(fetcher) = &self.from {
            return Ok(fetcher.take_ready(wanted)?.map(|(frame, bytes)| (frame, Some(bytes))));
        }
        let mut wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(if wanted.is_empty() { None } else { Some((wanted.remove(0).0, None)) })
    }

    fn install_frame(
        &self,
        frame: &StreamFrame,
        stored: &[u8],
        raw: &mut Vec<u8>,
        install: &InstallRun<'_>,
    ) -> Result<()> {
        let StreamPart::Pages { image, runs } = &frame.part else { return Ok(()) };
        self.decode_stored(frame, stored, raw)?;
        let mut at = 0;
        for run in runs {
            let bytes = (run.end - run.start) as usize * PAGE_BYTES;
            install(*image, PageIndex(run.start), &raw[at..at + bytes])?;
            at += bytes;
        }
        Ok(())
    }

    /// Decodes all frames of pages on `workers` threads, in the order in which they arrive, and hands each run to `install` as (image, first
    /// page, bytes). Ends with the first error of either side.
    pub fn for_each_run(&self, workers: usize, install: &InstallRun<'_>) -> Result<()> {
        let frames = &self.head.frames;
        let pages = (0..frames.len()).filter(|f| matches!(frames[*f].part, StreamPart::Pages { .. }));
        let wanted = Mutex::new(pages.map(|f| (f, frames[f].at.range())).collect::<Vec<_>>());
        let failed = Mutex::new(None);
        let work = || {
            let (mut buffer, mut raw) = (Vec::new(), Vec::new());
            loop {
                let done = match self.take_frame(&wanted) {
                    Ok(None) => return,
                    Ok(Some((frame, arrived))) => self
                        .stored(&frames[frame], arrived.as_ref(), &mut buffer)
                        .and_then(|stored| self.install_frame(&frames[frame], &stored, &mut raw, install)),
                    Err(error) => Err(error),
                };
                if let Err(error) = done {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    wanted.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..workers.max(1) {
                scope.spawn(work);
            }
            work();
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}
