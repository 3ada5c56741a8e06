//! Roots of snapshots whose parts were written anew, elsewhere: the same snapshots.

use dormouse_core::{FrameRef, PackRef, Root};

use crate::{
    error::{Result, StoreError},
    meta_packs::{MetaPacks, PackTable},
};

/// Where a part of a root is to be found.
enum Part {
    Kept(PackRef, FrameRef),
    New(usize),
}

/// A root in the making: its parts in the order of images and sections, then of blobs and pieces.
#[derive(Default)]
pub(crate) struct NewRoot {
    parts: Vec<Part>,
    changed: bool,
}

impl NewRoot {
    /// The next part stays where it is.
    pub(crate) fn keep(&mut self, pack: PackRef, at: FrameRef) {
        self.parts.push(Part::Kept(pack, at));
    }

    /// The next part was written anew, under this number.
    pub(crate) fn take(&mut self, number: usize) {
        self.parts.push(Part::New(number));
        self.changed = true;
    }

    /// The root of the same snapshot; `None` if all of it is where it was.
    pub(crate) fn finish(self, old: &Root, meta: &MetaPacks<'_>) -> Result<Option<Root>> {
        if !self.changed {
            return Ok(None);
        }
        let mut root = old.clone();
        let mut table = PackTable::default();
        let mut parts = self.parts.into_iter();
        let mut place = |at: &mut FrameRef| {
            *at = table.place(match parts.next() {
                Some(Part::Kept(pack, at)) => (pack, at),
                Some(Part::New(number)) => meta.get(number)?,
                None => return Err(StoreError::Bug("a part of a root is missing")),
            });
            Ok(())
        };
        for section in root.images.iter_mut().flat_map(|i| &mut i.sections).flatten() {
            place(&mut section.at)?;
        }
        for piece in root.blobs.iter_mut().flat_map(|b| &mut b.pieces) {
            place(piece)?;
        }
        root.packs = table.packs;
        // No reader would accept what fails this.
        root.check()?;
        Ok(Some(root))
    }
}
