//! Verified frames on local disk, between memory and a remote store.
//!
//! Each frame is a file of its own, named by the hash of its stored bytes: what is sealed in the store is sealed here.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `DORMFRAM` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | n, stored bytes |
//! | 16 | 16 | frame hash |
//! | 32 | 32 | BLAKE3 of the 32 bytes before and the n bytes after |
//! | 64 | n | the frame as stored |
//!
//! Files are the truth and survive a restart; a torn or damaged one is noticed, deleted and fetched again, so nothing is
//! ever synced. One thread does all the writing, behind a short queue: when the disk cannot keep up, frames are not
//! cached, and nobody waits. It also keeps the bound. Frames read once are *on trial* and go first, oldest first; a
//! second read *keeps* a frame, and kept ones, up to 4/5 of the room, go only when none is on trial: a scan of idle
//! snapshots does not push out what active ones use. After a restart all are on trial, in the order of their last write.
//! One process at a time writes to a cache; others only read from it.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{IoSliceMut, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};

use dormouse_core::{FrameHash, FrameRef};

use crate::page_cache::read_at_hand;

const MAGIC: [u8; 8] = *b"DORMFRAM";
/// Raise it whenever the bytes change: what another version wrote is deleted.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
/// Of which the checksum covers these.
const CHECKED_BYTES: usize = 32;
/// Frames that may wait to be written, of at most 128 KiB each but for page maps.
const QUEUE: usize = 64;

enum Job {
    Insert(FrameHash, Vec<u8>),
    Used(FrameHash),
    Drop(FrameHash),
    Flush(SyncSender<()>),
}

/// Frames on local disk.
#[derive(Debug)]
pub(crate) struct DiskCache {
    dir: PathBuf,
    jobs: Option<SyncSender<Job>>,
    writer: Option<JoinHandle<()>>,
}

impl DiskCache {
    /// Opens the cache in `dir`, which is made, with room for `bytes`. `None` if there can be none.
    pub(crate) fn open(dir: &Path, bytes: u64) -> Option<Self> {
        let lock = fs::create_dir_all(dir).and_then(|()| File::create(dir.join("lock")));
        let lock = lock
            .inspect_err(|why| tracing::warn!(%why, dir = %dir.display(), "no frames are cached on disk"));
        let mut cache = DiskCache { dir: dir.to_owned(), jobs: None, writer: None };
        if lock.as_ref().is_ok_and(|lock| lock.try_lock().is_ok()) {
            let (jobs, queue) = sync_channel(QUEUE);
            let held = lock.ok()?;
            let dir = dir.to_owned();
            let writer = std::thread::Builder::new().name("dormouse-cache".into()).spawn(move || {
                Writer::new(dir, bytes).run(&queue);
                drop(held);
            });
            cache.writer = Some(writer.ok()?);
            cache.jobs = Some(jobs);
        }
        Some(cache)
    }

    /// The frame's stored bytes, if they are here and whole.
    pub(crate) fn get(&self, frame: &FrameRef) -> Option<Vec<u8>> {
        let mut file = File::open(path(&self.dir, frame.hash)).ok()?;
        let mut object = Vec::with_capacity(HEADER_BYTES + frame.stored_bytes as usize + 1);
        let most = (HEADER_BYTES + frame.stored_bytes as usize + 1) as u64;
        let read = (&mut file).take(most).read_to_end(&mut object);
        let whole = read.is_ok()
            && object.len() == HEADER_BYTES + frame.stored_bytes as usize
            && object[..HEADER_BYTES] == header(frame.hash, &object[HEADER_BYTES..]);
        if !whole {
            tracing::info!(frame = %frame.hash, "a cached frame is damaged and will be fetched again");
            self.forget(frame);
            return None;
        }
        self.send(Job::Used(frame.hash));
        object.drain(..HEADER_BYTES);
        Some(object)
    }

    /// Puts the frame's stored bytes into `into`, whose content is forgotten, if they are in the page cache. Their hash is
    /// for the caller to check; what is damaged is for [`DiskCache::get`] to find and to delete.
    pub(crate) fn get_at_hand(&self, frame: &FrameRef, into: &mut Vec<u8>) -> bool {
        let Ok(file) = File::open(path(&self.dir, frame.hash)) else { return false };
        let mut header = [0; HEADER_BYTES];
        into.resize(frame.stored_bytes as usize, 0);
        let parts = &mut [IoSliceMut::new(&mut header), IoSliceMut::new(into)];
        let here =
            read_at_hand(&file, parts, 0) && header[..CHECKED_BYTES] == prologue(frame.hash, into.len());
        if here {
            self.send(Job::Used(frame.hash));
        }
        here
    }

    /// Keeps a frame for later, if the disk is not busy.
    pub(crate) fn put(&self, frame: &FrameRef, stored: &[u8]) {
        self.send(Job::Insert(frame.hash, stored.to_vec()));
    }

    /// Deletes a frame.
    pub(crate) fn forget(&self, frame: &FrameRef) {
        let _ = fs::remove_file(path(&self.dir, frame.hash));
        self.send(Job::Drop(frame.hash));
    }

    /// Waits until everything so far is written.
    pub(crate) fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if let Some(jobs) = &self.jobs
            && jobs.send(Job::Flush(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // A full queue means a busy disk: better not cached than waited for.
            let _ = jobs.try_send(job);
        }
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// What the header says before its checksum.
fn prologue(hash: FrameHash, stored_bytes: usize) -> [u8; CHECKED_BYTES] {
    let mut prologue = [0; CHECKED_BYTES];
    prologue[..8].copy_from_slice(&MAGIC);
    prologue[8..12].copy_from_slice(&VERSION.to_le_bytes());
    prologue[12..16].copy_from_slice(&(stored_bytes as u32).to_le_bytes());
    prologue[16..].copy_from_slice(&hash.0);
    prologue
}

fn header(hash: FrameHash, stored: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..CHECKED_BYTES].copy_from_slice(&prologue(hash, stored.len()));
    let checksum = blake3::Hasher::new().update(&header[..CHECKED_BYTES]).update(stored).finalize();
    header[CHECKED_BYTES..].copy_from_slice(checksum.as_bytes());
    header
}

fn path(dir: &Path, hash: FrameHash) -> PathBuf {
    dir.join(format!("{:02x}", hash.0[0])).join(hash.to_string())
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    used: u64,
    kept: bool,
}

/// The thread that writes, and what it knows of the files.
struct Writer {
    dir: PathBuf,
    room: u64,
    entries: HashMap<FrameHash, Entry>,
    /// By when they were last used.
    trial: BTreeMap<u64, FrameHash>,
    kept: BTreeMap<u64, FrameHash>,
    bytes: u64,
    kept_bytes: u64,
    clock: u64,
}

impl Writer {
    fn new(dir: PathBuf, room: u64) -> Self {
        Writer {
            dir,
            room,
            entries: HashMap::new(),
            trial: BTreeMap::new(),
            kept: BTreeMap::new(),
            bytes: 0,
            kept_bytes: 0,
            clock: 0,
        }
    }

    fn run(&mut self, jobs: &Receiver<Job>) {
        self.scan();
        self.make_room(0);
        for job in jobs {
            match job {
                Job::Insert(hash, stored) => self.insert(hash, &stored),
                Job::Used(hash) => self.used(hash),
                Job::Drop(hash) => self.remove(hash),
                Job::Flush(done) => drop(done.send(())),
            }
        }
    }

    /// Finds what is there since the last time.
    fn scan(&mut self) {
        let mut found = Vec::new();
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for file in folders.filter_map(|f| fs::read_dir(f.path()).ok()).flatten().flatten() {
            let name = file.file_name();
            match (FrameHash::from_hex(&name.to_string_lossy()), file.metadata()) {
                (Some(hash), Ok(meta)) => found.push((meta.modified().ok(), hash, meta.len())),
                // What a crash left half written.
                _ => drop(fs::remove_file(file.path())),
            }
        }
        found.sort_by_key(|(modified, ..)| *modified);
        for (_, hash, bytes) in found {
            self.add(hash, bytes);
        }
    }

    fn insert(&mut self, hash: FrameHash, stored: &[u8]) {
        let bytes = (HEADER_BYTES + stored.len()) as u64;
        if bytes > self.room {
            return;
        }
        let path = path(&self.dir, hash);
        if self.entries.contains_key(&hash) {
            if path.exists() {
                return;
            }
            // Its file is gone: nobody could be told while the queue was full, or it was deleted from outside.
            self.remove(hash);
        }
        self.make_room(bytes);
        let half = path.with_extension("new");
        let write = || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let mut file = File::create(&half)?;
            file.write_all(&header(hash, stored))?;
            file.write_all(stored)?;
            fs::rename(&half, &path)
        };
        match write() {
            Ok(()) => self.add(hash, bytes),
            Err(why) => {
                let _ = fs::remove_file(&half);
                tracing::warn!(%why, "a frame could not be cached on disk");
            }
        }
    }

    fn add(&mut self, hash: FrameHash, bytes: u64) {
        self.clock += 1;
        self.entries.insert(hash, Entry { bytes, used: self.clock, kept: false });
        self.trial.insert(self.clock, hash);
        self.bytes += bytes;
    }

    fn used(&mut self, hash: FrameHash) {
        let Some(entry) = self.entries.get_mut(&hash) else { return };
        self.clock += 1;
        let list = if entry.kept { &mut self.kept } else { &mut self.trial };
        list.remove(&entry.used);
        self.kept_bytes += if entry.kept { 0 } else { entry.bytes };
        (entry.used, entry.kept) = (self.clock, true);
        self.kept.insert(self.clock, hash);
        // Too many are kept: those not used for longest are on trial again, as if they had just come.
        while self.kept_bytes > self.room / 5 * 4 {
            let Some((_, oldest)) = self.kept.pop_first() else { break };
            let Some(entry) = self.entries.get_mut(&oldest) else { continue };
            self.clock += 1;
            self.kept_bytes -= entry.bytes;
            (entry.used, entry.kept) = (self.clock, false);
            self.trial.insert(self.clock, oldest);
        }
    }

    fn make_room(&mut self, bytes: u64) {
        while self.bytes + bytes > self.room {
            let Some(hash) = self.trial.values().next().or(self.kept.values().next()).copied() else {
                return;
            };
            let _ = fs::remove_file(path(&self.dir, hash));
            self.remove(hash);
        }
    }

    fn remove(&mut self, hash: FrameHash) {
        let Some(entry) = self.entries.remove(&hash) else { return };
        self.bytes -= entry.bytes;
        if entry.kept {
            self.kept.remove(&entry.used);
            self.kept_bytes -= entry.bytes;
        } else {
            self.trial.remove(&entry.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dormouse_core::Codec;

    fn frame(seed: u8, bytes: usize) -> (FrameRef, Vec<u8>) {
        let stored = vec![seed; bytes];
        let hash = FrameHash::of(&stored);
        let (offset, stored_bytes, raw_bytes) = (0, bytes as u32, bytes as u32);
        (FrameRef { pack: 0, offset, stored_bytes, raw_bytes, codec: Codec::Raw, hash }, stored)
    }

    fn put(cache: &DiskCache, seed: u8) {
        let (at, stored) = frame(seed, 936);
        cache.put(&at, &stored);
        cache.flush();
    }

    fn has(cache: &DiskCache, seed: u8) -> bool {
        path(&cache.dir, frame(seed, 936).0.hash).exists()
    }

    fn used(cache: &DiskCache, seed: u8) {
        assert!(cache.get(&frame(seed, 936).0).is_some());
        cache.flush();
    }

    #[test]
    fn a_file_is_byte_for_byte_this() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 10_000).unwrap();
        put(&cache, 7);
        let bytes = fs::read(path(dir.path(), frame(7, 936).0.hash)).unwrap();
        assert_eq!(bytes.len(), 1000);
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), GOLDEN, "the bytes changed: raise VERSION");
    }
    const GOLDEN: &str = "93eaa5f2070bfa7cfe992644fd263f5451303cfda72e788232aa2b640d97d7ac";

    #[test]
    fn frames_used_twice_outlive_a_scan_of_others_and_the_bound_holds() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 5_000).unwrap();
        put(&cache, 1);
        put(&cache, 2);
        used(&cache, 1);
        for seed in 10..60 {
            put(&cache, seed);
            let files =
                fs::read_dir(dir.path()).unwrap().flatten().filter_map(|d| fs::read_dir(d.path()).ok());
            let bytes: u64 = files.flatten().map(|f| f.unwrap().metadata().unwrap().len()).sum();
            assert!(bytes <= 5_000, "{bytes}");
        }
        assert!(has(&cache, 1), "an active frame is not evicted by idle ones");
        assert!(!has(&cache, 2) && !has(&cache, 10), "the oldest on trial went first");
        assert!((56..60).all(|seed| has(&cache, seed)));
    }

    #[test]
    fn kept_frames_do_not_take_all_the_room() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 5_000).unwrap();
        for seed in 1..=5 {
            put(&cache, seed);
        }
        (1..=5).for_each(|seed| used(&cache, seed));
        put(&cache, 6);
        assert!(!has(&cache, 1), "of the kept ones the first used is on trial again, and goes");
        assert!((2..=6).all(|seed| has(&cache, seed)));
    }

    #[test]
    fn what_is_there_is_found_again_and_kept_within_a_smaller_bound() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 5_000).unwrap();
        (1..=5).for_each(|seed| put(&cache, seed));
        let second = DiskCache::open(dir.path(), 5_000).unwrap();
        assert!(second.get(&frame(3, 936).0).is_some(), "another process reads");
        put(&second, 9);
        assert!(!has(&second, 9), "and does not write");
        drop((cache, second));
        fs::write(dir.path().join("00").join("half.new"), b"torn").ok();
        let cache = DiskCache::open(dir.path(), 3_000).unwrap();
        cache.flush();
        assert_eq!((1..=5).filter(|seed| has(&cache, *seed)).count(), 3);
    }

    /// Whoever finds a damaged frame deletes its file and says so, unless the queue is full just then.
    #[test]
    fn a_frame_whose_file_went_without_a_word_is_cached_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 10_000).unwrap();
        put(&cache, 1);
        fs::remove_file(path(dir.path(), frame(1, 936).0.hash)).unwrap();
        put(&cache, 1);
        used(&cache, 1);
    }

    #[test]
    fn damage_anywhere_in_a_file_is_noticed_and_the_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path(), 10_000).unwrap();
        let (at, stored) = frame(1, 936);
        put(&cache, 1);
        let path = path(dir.path(), at.hash);
        let whole = fs::read(&path).unwrap();
        let mut spoiled: Vec<Vec<u8>> = (0..whole.len()).map(|n| whole[..n].to_vec()).collect();
        spoiled.push([&whole[..], b"x"].concat());
        spoiled.extend((0..whole.len()).map(|n| {
            let mut bytes = whole.clone();
            bytes[n] ^= 4;
            bytes
        }));
        for bytes in spoiled {
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.get(&at), None);
            assert!(!path.exists());
        }
        cache.flush();
        cache.put(&at, &stored);
        cache.flush();
        assert_eq!(cache.get(&at), Some(stored));
    }
}
