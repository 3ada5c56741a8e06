//! The dedup index: which page this host knows to be stored where.
//!
//! A cache and nothing more: it may be deleted, it may be behind, and what it says of packs that were collected
//! since is found out before an import is acknowledged. Kept in an embedded database; where another process has
//! that open, or it is damaged, in memory.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{Mutex, PoisonError},
};

use dormouse_core::{
    ChunkId, FrameRef, PackFooter, PackId, PackRef, Slot,
    section::PagePlace,
    wire::{Reader, Writer},
};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

const CHUNKS: TableDefinition<'_, [u8; 32], &[u8]> = TableDefinition::new("chunks-v1");
const PACKS: TableDefinition<'_, [u8; 32], ()> = TableDefinition::new("packs-v1");

/// Bytes the database may keep in memory.
const DATABASE_CACHE_BYTES: usize = 24 << 20;

#[derive(Debug)]
pub(crate) struct Index {
    database: Option<Database>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    chunks: HashMap<ChunkId, PagePlace>,
    packs: HashSet<PackId>,
    forgotten: HashSet<PackId>,
    /// Packs that were lost while this index was open: they may still be listed, and are not to be learned again.
    lost: HashSet<PackId>,
}

impl Index {
    /// Opens the index in `dir`, or one in memory.
    pub(crate) fn open(dir: Option<&Path>) -> Self {
        let database = dir.and_then(|dir| match open_database(dir) {
            Ok(database) => Some(database),
            Err(why) => {
                tracing::info!(%why, "the dedup index on disk is not usable now, one in memory is used");
                None
            }
        });
        Index { database, memory: Mutex::default() }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the pages of a pack are in the index.
    pub(crate) fn knows(&self, pack: PackId) -> bool {
        let memory = self.memory();
        if memory.packs.contains(&pack) || memory.lost.contains(&pack) {
            return true;
        }
        drop(memory);
        let known = || {
            let table = self.database.as_ref()?.begin_read().ok()?.open_table(PACKS).ok()?;
            table.get(pack.0).ok().flatten().map(drop)
        };
        known().is_some()
    }

    /// Adds the pages of a pack that is in the store.
    pub(crate) fn add(&self, pack: &PackRef, footer: &PackFooter) {
        if self.write(pack, footer).is_none() {
            let mut memory = self.memory();
            each_page(pack, footer, |id, place| {
                memory.chunks.entry(id).or_insert(place);
            });
        }
        self.memory().packs.insert(pack.id);
    }

    fn write(&self, pack: &PackRef, footer: &PackFooter) -> Option<()> {
        let mut write = self.database.as_ref()?.begin_write().ok()?;
        // A cache need not survive a power cut; it is only ever behind.
        write.set_durability(Durability::None).ok()?;
        {
            let mut chunks = write.open_table(CHUNKS).ok()?;
            let mut entries = Vec::new();
            each_page(pack, footer, |id, place| entries.push((id, encode(&place))));
            entries.sort_by_key(|(id, _)| *id);
            for (id, value) in entries {
                if chunks.get(id.0).ok()?.is_none() {
                    chunks.insert(id.0, value.as_slice()).ok()?;
                }
            }
            write.open_table(PACKS).ok()?.insert(pack.id.0, ()).ok()?;
        }
        write.commit().ok()
    }

    /// Looks pages up, all in one read of the database.
    pub(crate) fn look_up(&self, ids: &[ChunkId], mut found: impl FnMut(usize, PagePlace)) {
        let table = || self.database.as_ref()?.begin_read().ok()?.open_table(CHUNKS).ok();
        let table = table();
        let memory = self.memory();
        for (i, id) in ids.iter().enumerate() {
            let stored = || decode(table.as_ref()?.get(id.0).ok()??.value());
            let place = memory.chunks.get(id).copied().or_else(stored);
            let lost = |pack| memory.forgotten.contains(&pack) || memory.lost.contains(&pack);
            if let Some(place) = place.filter(|p| !lost(p.pack.id)) {
                found(i, place);
            }
        }
    }

    /// Which pages it knows to lie in these packs, where.
    pub(crate) fn pages_in(&self, packs: &HashSet<PackId>) -> Vec<(ChunkId, PagePlace)> {
        let wanted = |place: &PagePlace| packs.contains(&place.pack.id);
        let memory = self.memory();
        let mut found: Vec<_> =
            memory.chunks.iter().filter(|(_, place)| wanted(place)).map(|(id, p)| (*id, *p)).collect();
        let table = || self.database.as_ref()?.begin_read().ok()?.open_table(CHUNKS).ok();
        if let Some(table) = table() {
            for (id, value) in table.iter().into_iter().flatten().flatten() {
                found.extend(decode(value.value()).filter(wanted).map(|place| (ChunkId(id.value()), place)));
            }
        }
        found
    }

    /// Forgets packs that are about to be deleted, and does not learn them again as long as it is open.
    pub(crate) fn lose(&self, packs: &HashSet<PackId>) {
        self.memory().lost.extend(packs);
        self.forget(packs);
    }

    /// Forgets packs that are no longer in the store.
    pub(crate) fn forget(&self, packs: &HashSet<PackId>) {
        {
            let mut memory = self.memory();
            memory.chunks.retain(|_, place| !packs.contains(&place.pack.id));
            memory.packs.retain(|p| !packs.contains(p));
            memory.forgotten.extend(packs);
        }
        let forget = || {
            let write = self.database.as_ref()?.begin_write().ok()?;
            {
                let gone = |value: &[u8]| decode(value).is_none_or(|p| packs.contains(&p.pack.id));
                write.open_table(CHUNKS).ok()?.retain(|_, value| !gone(value)).ok()?;
                write.open_table(PACKS).ok()?.retain(|id, ()| !packs.contains(&PackId(id))).ok()?;
            }
            write.commit().ok()
        };
        if forget().is_some() {
            self.memory().forgotten.clear();
        }
    }
}

fn open_database(dir: &Path) -> Result<Database, String> {
    std::fs::create_dir_all(dir).map_err(|e| format!("making {}: {e}", dir.display()))?;
    let path = dir.join("index.redb");
    let create = || Database::builder().set_cache_size(DATABASE_CACHE_BYTES).create(&path);
    match create() {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err("another process has it open".into()),
        // Damaged or of another version: it is only a cache, so a new one is as good.
        Err(first) => {
            std::fs::remove_file(&path).map_err(|e| format!("{first}; removing it: {e}"))?;
            create().map_err(|e| format!("{first}; making it anew: {e}"))
        }
    }
}

fn each_page(pack: &PackRef, footer: &PackFooter, mut each: impl FnMut(ChunkId, PagePlace)) {
    for frame in &footer.frames {
        for (i, id) in frame.chunks.iter().enumerate() {
            if let Some(slot) = Slot::new(i) {
                each(*id, PagePlace { pack: *pack, frame: frame.at, slot });
            }
        }
    }
}

fn encode(place: &PagePlace) -> Vec<u8> {
    let mut w = Writer::new();
    PackRef::write_table(&mut w, std::slice::from_ref(&place.pack));
    FrameRef { pack: 0, ..place.frame }.write(&mut w);
    w.u8(place.slot.get() as u8);
    w.finish()
}

fn decode(bytes: &[u8]) -> Option<PagePlace> {
    let mut r = Reader::new(bytes, "index entry");
    let packs = PackRef::read_table(&mut r).ok()?;
    let frame = FrameRef::read(&mut r, packs.len()).ok()?;
    let slot = Slot::new(usize::from(r.u8().ok()?))?;
    r.end().ok()?;
    Some(PagePlace { pack: *packs.first()?, frame, slot })
}
