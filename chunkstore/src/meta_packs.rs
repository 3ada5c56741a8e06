//! Packs of metadata: page maps and device state, apart from pages, so that what a resume reads first lies together.

use std::collections::HashMap;

use dormouse_core::{ChunkId, FrameRef, PackBuilder, PackId, PackRef, frame::EncodedFrame, pack::FrameKind};

use crate::{
    error::{Result, StoreError},
    import::Packing,
    store::Store,
};

/// Packs of metadata (page maps and device state), apart from those of pages: what a resume reads first lies
/// together.
pub(crate) struct MetaPacks<'a> {
    store: &'a Store,
    packing: Packing,
    builder: PackBuilder,
    /// Frames in the open pack, by the number they will be asked for by.
    open: Vec<(usize, FrameRef)>,
    placed: HashMap<usize, (PackRef, FrameRef)>,
    next: usize,
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
}

impl<'a> MetaPacks<'a> {
    pub(crate) fn new(store: &'a Store, packing: Packing) -> Self {
        let builder = packing.new_pack(&store.domain);
        MetaPacks {
            store,
            packing,
            builder,
            open: Vec::new(),
            placed: HashMap::new(),
            next: 0,
            objects: 0,
            bytes: 0,
        }
    }

    pub(crate) fn push(&mut self, kind: FrameKind, frame: &EncodedFrame) -> Result<usize> {
        self.push_chunks(kind, frame, Vec::new())
    }

    /// Adds a frame, of pages if `chunks` names any; gives its number.
    pub(crate) fn push_chunks(
        &mut self,
        kind: FrameKind,
        frame: &EncodedFrame,
        chunks: Vec<ChunkId>,
    ) -> Result<usize> {
        let number = self.next;
        self.next += 1;
        self.open.push((number, self.builder.push(kind, frame, chunks)));
        if self.builder.is_full() {
            self.close()?;
        }
        Ok(number)
    }

    pub(crate) fn close(&mut self) -> Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.builder, self.packing.new_pack(&self.store.domain));
        let (pack, bytes, _) = full.finish(&self.store.domain);
        self.objects += 1;
        self.bytes += bytes.len() as u64;
        self.store.put_content(&self.store.keys.pack(pack.id), bytes)?;
        self.placed.extend(self.open.drain(..).map(|(number, at)| (number, (pack, at))));
        Ok(())
    }

    pub(crate) fn get(&self, number: usize) -> Result<(PackRef, FrameRef)> {
        self.placed.get(&number).copied().ok_or(StoreError::Bug("a page map was not stored"))
    }

    pub(crate) fn packs(&self) -> impl Iterator<Item = PackRef> + '_ {
        self.placed.values().map(|(pack, _)| *pack)
    }
}

/// A root's table of packs, filled as they are referred to.
#[derive(Default)]
pub(crate) struct PackTable {
    pub(crate) packs: Vec<PackRef>,
    numbers: HashMap<PackId, u32>,
}

impl PackTable {
    pub(crate) fn place(&mut self, (pack, at): (PackRef, FrameRef)) -> FrameRef {
        let packs = &mut self.packs;
        let number = *self.numbers.entry(pack.id).or_insert_with(|| {
            packs.push(pack);
            packs.len() as u32 - 1
        });
        FrameRef { pack: number, ..at }
    }
}
