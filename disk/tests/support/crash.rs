//! Files in memory that know what of them is durable, and every state a crash may leave them in.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use dormouse_disk::file::{Directory, DiskFile};

const SECTOR: usize = 512;

/// One change that was not synced yet.
#[derive(Clone)]
enum Change {
    /// At most a sector: a write may be torn between sectors.
    Write(u64, Vec<u8>),
    Truncate(u64),
    Punch(u64, u64),
}

#[derive(Clone, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Clone, Default)]
struct World {
    /// Files by number, and which name stands for which; names have unsynced changes of their own.
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced_names: Vec<(String, Option<usize>)>,
    syncs: u64,
    fail_sync_in: Option<u64>,
    full: bool,
}

type Hook = Box<dyn FnMut(&Files) + Send>;

/// A directory in memory.
#[derive(Default)]
pub(crate) struct Files {
    world: Arc<Mutex<World>>,
    before_sync: Arc<Mutex<Option<Hook>>>,
}

struct Handle {
    world: Arc<Mutex<World>>,
    before_sync: Arc<Mutex<Option<Hook>>>,
    number: usize,
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, content) => {
            let end = *at as usize + content.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*at as usize..end].copy_from_slice(content);
        }
        Change::Truncate(length) => bytes.resize(*length as usize, 0),
        Change::Punch(at, length) => {
            let end = ((at + length) as usize).min(bytes.len());
            bytes[(*at as usize).min(end)..end].fill(0);
        }
    }
}

impl World {
    fn sync_counted(&mut self) -> io::Result<()> {
        self.syncs += 1;
        if let Some(left) = &mut self.fail_sync_in {
            if *left == 0 {
                self.fail_sync_in = None;
                return Err(io::Error::other("this sync fails"));
            }
            *left -= 1;
        }
        Ok(())
    }
}

impl Files {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Calls `hook` before each sync takes effect, with a copy of the files.
    pub(crate) fn before_sync(&self, hook: impl FnMut(&Files) + Send + 'static) {
        *self.before_sync.lock().unwrap() = Some(Box::new(hook));
    }

    /// A copy that goes its own way.
    pub(crate) fn copy(&self) -> Arc<Files> {
        let world = self.world.lock().unwrap().clone();
        Arc::new(Files { world: Arc::new(Mutex::new(world)), before_sync: Arc::default() })
    }

    /// Syncs done so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.world.lock().unwrap().syncs
    }

    /// Fails the sync after the next `after`; like Linux, what it should have written is lost but stays in the cache.
    pub(crate) fn fail_sync(&self, after: u64) {
        self.world.lock().unwrap().fail_sync_in = Some(after);
    }

    /// Whether writes fail for lack of space.
    pub(crate) fn set_full(&self, full: bool) {
        self.world.lock().unwrap().full = full;
    }

    /// How many changes are not durable yet.
    pub(crate) fn unsynced(&self) -> usize {
        let world = self.world.lock().unwrap();
        world.files.iter().map(|file| file.unsynced.len()).sum::<usize>() + world.unsynced_names.len()
    }

    /// What a crash leaves if, of the changes that are not durable, it keeps those that `keeps` says yes to.
    pub(crate) fn after_crash(&self, mut keeps: impl FnMut() -> bool) -> Arc<Files> {
        let mut world = self.world.lock().unwrap().clone();
        for file in &mut world.files {
            let mut bytes = std::mem::take(&mut file.durable);
            for change in file.unsynced.drain(..) {
                if keeps() {
                    apply(&mut bytes, &change);
                }
            }
            (file.now, file.durable) = (bytes.clone(), bytes);
        }
        world.names = std::mem::take(&mut world.durable_names);
        for (name, file) in std::mem::take(&mut world.unsynced_names) {
            if keeps() {
                match file {
                    Some(file) => drop(world.names.insert(name, file)),
                    None => drop(world.names.remove(&name)),
                }
            }
        }
        world.durable_names = world.names.clone();
        Arc::new(Files { world: Arc::new(Mutex::new(world)), before_sync: Arc::default() })
    }

    /// The content of a file.
    pub(crate) fn content(&self, name: &str) -> Option<Vec<u8>> {
        let world = self.world.lock().unwrap();
        world.names.get(name).map(|file| world.files[*file].now.clone())
    }

    /// Puts a file there, durably.
    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut world = self.world.lock().unwrap();
        let number = world.files.len();
        world.files.push(Content { now: bytes.clone(), durable: bytes, unsynced: Vec::new() });
        world.names.insert(name.to_owned(), number);
        world.durable_names.insert(name.to_owned(), number);
    }

    fn handle(&self, number: usize) -> Arc<dyn DiskFile> {
        Arc::new(Handle { world: self.world.clone(), before_sync: self.before_sync.clone(), number })
    }
}

fn call_hook(world: &Arc<Mutex<World>>, hook: &Mutex<Option<Hook>>) {
    if let Some(hook) = &mut *hook.lock().unwrap() {
        hook(&Files { world: world.clone(), before_sync: Arc::default() });
    }
}

impl Directory for Files {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let number = self.world.lock().unwrap().names.get(name).copied();
        Ok(number.map(|number| self.handle(number)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut world = self.world.lock().unwrap();
        let number = world.files.len();
        world.files.push(Content::default());
        world.names.insert(name.to_owned(), number);
        world.unsynced_names.push((name.to_owned(), Some(number)));
        drop(world);
        Ok(self.handle(number))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut world = self.world.lock().unwrap();
        if world.names.remove(name).is_some() {
            world.unsynced_names.push((name.to_owned(), None));
        }
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.world.lock().unwrap().names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        call_hook(&self.world, &self.before_sync);
        let mut world = self.world.lock().unwrap();
        world.sync_counted()?;
        world.durable_names = world.names.clone();
        world.unsynced_names.clear();
        Ok(())
    }
}

impl Handle {
    fn change(&self, changes: impl Iterator<Item = Change>) -> io::Result<()> {
        let mut world = self.world.lock().unwrap();
        if world.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = &mut world.files[self.number];
        for change in changes {
            apply(&mut file.now, &change);
            file.unsynced.push(change);
        }
        Ok(())
    }
}

impl DiskFile for Handle {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let world = self.world.lock().unwrap();
        let bytes = world.files[self.number].now.get(offset as usize..offset as usize + into.len());
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let sectors = bytes.chunks(SECTOR).zip((offset..).step_by(SECTOR));
        self.change(sectors.map(|(bytes, at)| Change::Write(at, bytes.to_vec())))
    }

    fn sync(&self) -> io::Result<()> {
        call_hook(&self.world, &self.before_sync);
        let mut world = self.world.lock().unwrap();
        let result = world.sync_counted();
        let file = &mut world.files[self.number];
        file.unsynced.clear();
        result?;
        file.durable = file.now.clone();
        Ok(())
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.change(std::iter::once(Change::Truncate(length)))
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(std::iter::once(Change::Punch(offset, length)))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.world.lock().unwrap().files[self.number].now.len() as u64)
    }
}
