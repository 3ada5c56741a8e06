//! A store: one backend, one dedup domain, and this host's caches of both.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dormouse_core::{
    Domain, DomainKey, FormatError, FrameRef, Name, PackFooter, PackId, PackRef, Reference, Root, RootId,
    pack::{TRAILER_BYTES, parse_trailer},
    root,
};

use crate::{
    backend::{Backend, PutOutcome, open_url},
    disk_cache::DiskCache,
    error::{Result, StoreError},
    frame_cache::FrameCache,
    gc::lease::Leased,
    keyring::{Access, TheDomain, TheKeys},
    snapshot::Snapshot,
    tail::Slots,
};

/// Longer than any writer takes between announcing a snapshot and moving its name.
const DEFAULT_LEASE: Duration = Duration::from_secs(15 * 60);

/// Whose clocks may differ by how much of a lease: ten minutes of the default one. Those of the nodes of one store, which
/// say when an object was written, and those of hosts, which say when a snapshot expires.
const SKEW_LEASES: (u64, u64) = (2, 3);

/// Attempts to write an object of which the store says that it is there, and does not have it.
const WRITES_MAX: usize = 4;

/// How many leases a process may be stopped for (a machine that sleeps, a VM that is moved) and then go on without harm
/// to what others did meanwhile: a week of the default ones.
const STOPPED_LEASES: u64 = 7 * 24 * 4;

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The user's key, which the domain's own is wrapped under; `None` for the domain without encryption.
    pub key: Option<DomainKey>,
    /// Where this host keeps its dedup index; `None` to keep it in memory only. All of it can be deleted.
    pub cache_dir: Option<PathBuf>,
    /// Most bytes of decoded frames kept in memory.
    pub frame_cache_bytes: u64,
    /// Most bytes of frames kept below `cache_dir`, as stored, if the store is a remote one; 0 for none.
    pub disk_cache_bytes: u64,
    /// A collector that was silent for this long is taken for dead: another one takes over. A writer about to move a
    /// name, and what a dead collector was about to delete, are reckoned with for 672 times as long: a week by default.
    pub lease: Duration,
    /// Whether to store in the clear, where `key` is `None`, also beside what is encrypted: in a store that has keyrings.
    pub no_encryption: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            key: None,
            cache_dir: None,
            frame_cache_bytes: 128 << 20,
            disk_cache_bytes: 4 << 30,
            lease: DEFAULT_LEASE,
            no_encryption: false,
        }
    }
}

/// A store opened in one domain. Cheap to clone; all clones share caches.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) domain: TheDomain,
    pub(crate) keys: TheKeys,
    pub(crate) frames: Arc<FrameCache>,
    pub(crate) lease: Duration,
    /// Set once it is known that the store keeps the conditions of writes; see [`crate::conditions`].
    pub(crate) conditions: Arc<OnceLock<()>>,
    /// The collector's lease, while this process has it.
    pub(crate) leased: Arc<Leased>,
    /// How many more reads a machine waits for may be asked for.
    pub(crate) slots: Arc<Slots>,
    pub(crate) no_encryption: bool,
    disk: Arc<OnceLock<Option<DiskCache>>>,
    pub(crate) disk_bytes: u64,
    /// Frames are read for a machine that waits for them.
    waited_for: bool,
}

impl Store {
    /// Opens the store at `url`. Nothing is written, and a local directory is made by the first write. With
    /// a key its keyring is read; without one, nothing.
    ///
    /// # Errors
    /// A URL that is none, or a directory that is none; a keyring that is damaged or cannot be read, or a key
    /// that was taken out of use. A key that the store does not know is not one: an import may be what comes next.
    pub fn open(url: &str, options: StoreOptions) -> Result<Self> {
        let store = Self::unsettled(open_url(url)?, options);
        store.settle()?;
        Ok(store)
    }

    /// A store on a backend that is open already. As [`Store::open`], but what is wrong with the keyring is told by the
    /// first operation.
    pub fn with_backend(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        let store = Self::unsettled(backend, options);
        if let Err(why) = store.settle() {
            tracing::debug!(%why, "the keyring will be asked for again");
        }
        store
    }

    /// As [`Store::with_backend`], and nothing is asked before the first operation: for who must not wait.
    pub fn with_backend_unasked(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        Self::unsettled(backend, options)
    }

    /// Whether the store knows the key in use, from its keyring, which is read if that was not done yet; without a key,
    /// `true`. Until it is known nothing that was stored with it can be told apart from what was not.
    ///
    /// # Errors
    /// The keyring cannot be read, or the key was taken out of use.
    pub fn knows_key(&self) -> Result<bool> {
        self.settle()
    }

    fn unsettled(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        // Different stores must not share an index; different domains do not, either.
        let place = blake3::hash(backend.url().as_bytes()).to_hex();
        let access = Access::new(options.key, options.cache_dir.map(|d| d.join(&place[..16])));
        let frames = Arc::new(FrameCache::new(options.frame_cache_bytes));
        Store {
            backend,
            domain: TheDomain(access.clone()),
            keys: TheKeys(access),
            frames,
            lease: options.lease,
            conditions: Arc::default(),
            leased: Arc::default(),
            slots: Arc::default(),
            no_encryption: options.no_encryption,
            disk: Arc::default(),
            disk_bytes: options.disk_cache_bytes,
            waited_for: false,
        }
    }

    /// The store's URL.
    pub fn url(&self) -> &str {
        self.backend.url()
    }

    /// The dedup domain.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Opens the snapshot that `name` stands for now: one read of the reference, one of the root.
    pub fn open_snapshot(&self, name: &Name) -> Result<Snapshot> {
        let (reference, _) = self.reference(name)?;
        let reference = reference.ok_or_else(|| self.no_such(name))?;
        let root = self.read_root(reference.root, Some(name))?;
        Ok(Snapshot::new(self.clone(), reference, root))
    }

    /// Opens the very snapshot that `reference` stood for when it was read, whatever its name stands for now.
    pub fn open_reference(&self, reference: Reference) -> Result<Snapshot> {
        self.settle()?;
        let root = self.read_root(reference.root, Some(&reference.name))?;
        Ok(Snapshot::new(self.clone(), reference, root))
    }

    /// Where this host keeps what it can rebuild of the domain; all of it may be deleted at any time.
    pub fn cache_dir(&self) -> Option<&std::path::Path> {
        self.domain.0.cache_dir()
    }

    /// Frames on local disk, if the store is remote and there is a place for them. Opened when first asked for, since
    /// the domain is known by then.
    pub(crate) fn disk(&self) -> Option<&DiskCache> {
        let open = || {
            let dir = self.cache_dir().filter(|_| self.disk_bytes > 0 && !self.backend.is_local())?;
            DiskCache::open(&dir.join("frames"), self.disk_bytes)
        };
        self.disk.get_or_init(open).as_ref()
    }

    /// The same store, read past the frames on local disk.
    pub(crate) fn without_disk(&self) -> Self {
        Store { disk: Arc::new(OnceLock::from(None)), ..self.clone() }
    }

    /// The same store, its frames read for a machine that waits for them; see [`crate::tail`].
    pub(crate) fn waited_for(&self) -> Self {
        Store { waited_for: !self.backend.is_local(), ..self.clone() }
    }

    /// Waits until the frames read so far are on local disk, if they are to be. What is not is only fetched again.
    pub fn flush_caches(&self) {
        if let Some(disk) = self.disk() {
            disk.flush();
        }
    }

    /// Milliseconds for which what a process may still do that is taken for dead is reckoned with.
    pub(crate) fn stopped_ms(&self) -> u64 {
        self.lease.as_millis() as u64 * STOPPED_LEASES
    }

    /// By how many milliseconds clocks may differ.
    pub(crate) fn skew_ms(&self) -> u64 {
        self.lease.as_millis() as u64 * SKEW_LEASES.0 / SKEW_LEASES.1
    }

    pub(crate) fn no_such(&self, name: &Name) -> StoreError {
        // There may be a better reason than that the name is wrong.
        if let Err(why) = self.settle_known().and_then(|_| self.hint_at_key()) {
            return why;
        }
        StoreError::NoSuchSnapshot { name: name.to_string(), store: self.url().to_owned() }
    }

    /// A whole object, of at most `limit` bytes: whoever can write the store can put there what no memory holds, and
    /// nothing is allocated for that.
    pub(crate) fn get_whole(&self, key: &str, limit: u64) -> Result<Option<Bytes>> {
        let object = self.backend.get(key, Some(0..limit + 1))?;
        if object.as_ref().is_none_or(|object| object.len() as u64 <= limit) {
            return Ok(object);
        }
        let value = self.backend.head(key)?.unwrap_or(limit + 1);
        let why = FormatError::OverLimit { what: "object bytes", value, limit };
        Err(StoreError::Damaged { key: key.to_owned(), why })
    }

    pub(crate) fn read_root(&self, id: RootId, name: Option<&Name>) -> Result<Root> {
        let key = self.keys.root(id);
        let object = self.get_whole(&key, root::OBJECT_BYTES_MAX)?.ok_or_else(|| StoreError::Missing {
            key: key.clone(),
            referrer: name.map_or_else(|| "a reference".to_owned(), |n| format!("snapshot {n}")),
        })?;
        Root::decode(&self.domain, id, &object).map_err(|why| StoreError::Damaged { key, why })
    }

    pub(crate) fn read_footer(&self, pack: &PackRef) -> Result<PackFooter> {
        let key = self.keys.pack(pack.id);
        let stored = self
            .backend
            .get(&key, Some(pack.footer_range()))?
            .ok_or_else(|| StoreError::Missing { key: key.clone(), referrer: "a page map".into() })?;
        PackFooter::decode(&self.domain, pack.id, &stored).map_err(|why| StoreError::Damaged { key, why })
    }

    /// The footer of a pack known only by name and size.
    pub(crate) fn footer_of_unknown(&self, id: PackId, object_bytes: u64) -> Result<(PackRef, PackFooter)> {
        let key = self.keys.pack(id);
        let damaged = |why| StoreError::Damaged { key: key.clone(), why };
        let trailer_at = object_bytes
            .checked_sub(TRAILER_BYTES as u64)
            .ok_or_else(|| damaged(FormatError::Truncated("pack")))?;
        let trailer = self
            .backend
            .get(&key, Some(trailer_at..object_bytes))?
            .ok_or_else(|| StoreError::Missing { key: key.clone(), referrer: "a listing".into() })?;
        let pack = parse_trailer(&self.domain, id, object_bytes, &trailer).map_err(damaged)?;
        Ok((pack, self.read_footer(&pack)?))
    }

    /// Reads, verifies and decodes one frame, past the frames in memory.
    pub(crate) fn read_frame(&self, pack: PackId, frame: &FrameRef) -> Result<Vec<u8>> {
        let disk = self.disk();
        if let Some(stored) = disk.and_then(|disk| disk.get(frame)) {
            match frame.decode(&self.domain, &stored) {
                Ok(raw) => return Ok(raw),
                // Not what it was: the store has the truth.
                Err(_) => disk.iter().for_each(|disk| disk.forget(frame)),
            }
        }
        let key = self.keys.pack(pack);
        let stored = if self.waited_for {
            crate::tail::get(&self.backend, &self.slots, &key, frame.range())
        } else {
            self.backend.get(&key, Some(frame.range()))
        };
        let stored =
            stored?.ok_or_else(|| StoreError::Missing { key: key.clone(), referrer: "a page map".into() })?;
        let raw = frame.decode(&self.domain, &stored).map_err(|why| StoreError::Damaged { key, why })?;
        if let Some(disk) = disk {
            disk.put(frame, &stored);
        }
        Ok(raw)
    }

    /// Reads, verifies and decodes frames of one pack, in the order in which they lie there, in one request; past all
    /// caches, since whoever asks for so many at once will not ask again.
    pub(crate) fn read_frames(&self, pack: PackId, frames: &[FrameRef]) -> Result<Vec<Vec<u8>>> {
        let (Some(first), Some(last)) = (frames.first(), frames.last()) else { return Ok(Vec::new()) };
        let key = self.keys.pack(pack);
        let start = first.range().start;
        let stored = self
            .backend
            .get(&key, Some(start..last.range().end))?
            .ok_or_else(|| StoreError::Missing { key: key.clone(), referrer: "a page map".into() })?;
        let decode = |frame: &FrameRef| {
            let range = (frame.range().start - start) as usize..(frame.range().end - start) as usize;
            let stored = stored.get(range).ok_or(FormatError::Truncated("frame"));
            let decoded = stored.and_then(|stored| frame.decode(&self.domain, stored));
            decoded.map_err(|why| StoreError::Damaged { key: key.clone(), why })
        };
        frames.iter().map(decode).collect()
    }

    /// Writes an object whose name is the hash of its content. If one is there already it must be the same, byte
    /// for byte; one that is damaged is written again, which is right whoever else writes it: none but these bytes have
    /// this name.
    pub(crate) fn put_content(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        let bytes = Bytes::from(bytes);
        for _ in 0..WRITES_MAX {
            let first = self.backend.put_new(key, bytes.clone());
            let outcome = match first {
                // The answer may have been lost on its way: writing the same bytes again does no harm.
                Err(e) if e.is_retryable() => self.backend.put_new(key, bytes.clone())?,
                other => other?,
            };
            if outcome == PutOutcome::Created {
                return Ok(());
            }
            match self.backend.get(key, Some(0..bytes.len() as u64 + 1))? {
                Some(there) if there == bytes => return Ok(()),
                Some(_) => {
                    tracing::warn!(key, "an object was damaged and has been written again");
                    return self.backend.put_again(key, bytes);
                }
                // Two writes at the same moment, neither of which was done, or one that was deleted since.
                None => {}
            }
        }
        Err(self.never_there(key))
    }

    /// Writes an object that matters by being there, whatever it holds.
    pub(crate) fn put_mark(&self, key: &str, bytes: Bytes) -> Result<()> {
        for _ in 0..WRITES_MAX {
            if self.backend.put_new(key, bytes.clone())? == PutOutcome::Created
                || self.backend.head(key)?.is_some()
            {
                return Ok(());
            }
        }
        Err(self.never_there(key))
    }

    fn never_there(&self, key: &str) -> StoreError {
        let (doing, store) = (format!("writing {key}"), self.url().to_owned());
        StoreError::Unavailable {
            doing,
            store,
            why: "it says that there is one already, and does not have it".into(),
        }
    }
}

/// Milliseconds since 1970 UTC.
pub(crate) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
