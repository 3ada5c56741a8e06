//! The dedup index: which page this host knows to be stored where.
//!
//! A cache and nothing more: it may be deleted, it may be behind, and what it says of packs that were collected
//! since is found out before an import is acknowledged. Kept in an embedded database, which all of a process share;
//! where another process has that open, or it cannot be opened now, in memory. Each entry carries a checksum of its own, because nobody looks at a page again
//! that an entry says is stored already: one wrong bit would give a snapshot another page.

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

use self::on_disk::Handle;

mod on_disk;

const CHUNKS: TableDefinition<'_, [u8; 32], &[u8]> = TableDefinition::new("chunks-v2");
const PACKS: TableDefinition<'_, [u8; 32], ()> = TableDefinition::new("packs-v2");

/// Bytes of an entry's checksum, over the chunk id as well.
const CHECKSUM_BYTES: usize = 8;

#[derive(Debug)]
pub(crate) struct Index {
    database: Option<Handle>,
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
        Index { database: dir.and_then(Handle::open), memory: Mutex::default() }
    }

    fn ask<T>(&self, ask: impl FnOnce(&Database) -> Option<T>) -> Option<T> {
        self.database.as_ref()?.ask(ask)
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
        let known = self.ask(|database| {
            let table = database.begin_read().ok()?.open_table(PACKS).ok()?;
            table.get(pack.0).ok().flatten().map(drop)
        });
        known.is_some()
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
        let mut entries = Vec::new();
        each_page(pack, footer, |id, place| entries.push((id, encode(&id, &place))));
        entries.sort_by_key(|(id, _)| *id);
        self.ask(|database| {
            let mut write = database.begin_write().ok()?;
            // A cache need not survive a power cut; it is only ever behind.
            write.set_durability(Durability::None).ok()?;
            {
                let mut chunks = write.open_table(CHUNKS).ok()?;
                for (id, value) in entries {
                    if chunks.get(id.0).ok()?.is_none_or(|old| decode(&id, old.value()).is_none()) {
                        chunks.insert(id.0, value.as_slice()).ok()?;
                    }
                }
                write.open_table(PACKS).ok()?.insert(pack.id.0, ()).ok()?;
            }
            write.commit().ok()
        })
    }

    /// Looks pages up, all in one read of the database.
    pub(crate) fn look_up(&self, ids: &[ChunkId], mut found: impl FnMut(usize, PagePlace)) {
        let stored = self.ask(|database| {
            let table = database.begin_read().ok()?.open_table(CHUNKS).ok()?;
            let entry = |id: &ChunkId| decode(id, table.get(id.0).ok()??.value());
            Some(ids.iter().map(entry).collect::<Vec<_>>())
        });
        let stored = stored.unwrap_or_default();
        let memory = self.memory();
        for (i, id) in ids.iter().enumerate() {
            let place = memory.chunks.get(id).copied().or_else(|| stored.get(i).copied().flatten());
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
        let stored = self.ask(|database| {
            let table = database.begin_read().ok()?.open_table(CHUNKS).ok()?;
            let mut stored = Vec::new();
            for (id, value) in table.iter().ok()?.flatten() {
                let id = ChunkId(id.value());
                stored.extend(decode(&id, value.value()).filter(wanted).map(|place| (id, place)));
            }
            Some(stored)
        });
        found.extend(stored.unwrap_or_default());
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
        let forget = self.ask(|database| {
            let write = database.begin_write().ok()?;
            {
                let gone =
                    |id, value: &[u8]| decode(&ChunkId(id), value).is_none_or(|p| packs.contains(&p.pack.id));
                write.open_table(CHUNKS).ok()?.retain(|id, value| !gone(id, value)).ok()?;
                write.open_table(PACKS).ok()?.retain(|id, ()| !packs.contains(&PackId(id))).ok()?;
            }
            write.commit().ok()
        });
        if forget.is_some() {
            self.memory().forgotten.clear();
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

fn checksum(id: &ChunkId, entry: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::Hasher::new().update(&id.0).update(entry).finalize();
    let mut first = [0; CHECKSUM_BYTES];
    first.copy_from_slice(&hash.as_bytes()[..CHECKSUM_BYTES]);
    first
}

fn encode(id: &ChunkId, place: &PagePlace) -> Vec<u8> {
    let mut w = Writer::new();
    PackRef::write_table(&mut w, std::slice::from_ref(&place.pack));
    FrameRef { pack: 0, ..place.frame }.write(&mut w);
    w.u8(place.slot.get() as u8);
    let mut entry = w.finish();
    entry.extend_from_slice(&checksum(id, &entry));
    entry
}

/// `None` as well for what is not the entry that was written for this id.
fn decode(id: &ChunkId, bytes: &[u8]) -> Option<PagePlace> {
    let (entry, sum) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM_BYTES)?)?;
    if checksum(id, entry) != sum {
        return None;
    }
    let mut r = Reader::new(entry, "index entry");
    let packs = PackRef::read_table(&mut r).ok()?;
    let frame = FrameRef::read(&mut r, packs.len()).ok()?;
    let slot = Slot::new(usize::from(r.u8().ok()?))?;
    r.end().ok()?;
    Some(PagePlace { pack: *packs.first()?, frame, slot })
}

#[cfg(test)]
mod tests {
    use dormouse_core::{Codec, FrameHash};

    use super::*;

    #[test]
    fn an_entry_with_any_bit_flipped_is_no_entry() {
        let pack = PackRef { id: PackId([7; 32]), footer_offset: 9 << 20, footer_bytes: 700 };
        let frame = FrameRef {
            pack: 0,
            offset: 70_000,
            stored_bytes: 40_000,
            raw_bytes: 128 << 10,
            codec: Codec::Zstd,
            hash: FrameHash([9; 16]),
        };
        let (id, place) = (ChunkId([3; 32]), PagePlace { pack, frame, slot: Slot::new(5).unwrap() });
        let entry = encode(&id, &place);
        assert_eq!(decode(&id, &entry), Some(place));
        for bit in 0..entry.len() * 8 {
            let mut flipped = entry.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&id, &flipped), None, "bit {bit}");
        }
        assert_eq!(decode(&ChunkId([4; 32]), &entry), None, "the entry of another page");
        assert_eq!(decode(&id, &entry[..CHECKSUM_BYTES - 1]), None);
    }
}
