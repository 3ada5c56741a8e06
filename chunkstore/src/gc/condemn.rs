//! Marking what is going to be deleted, as far as there is room for marks.

use std::collections::HashSet;

use bytes::Bytes;

use crate::{
    backend::ObjectMeta,
    error::{Result, StoreError},
    store::Store,
};

/// Marks that are given up again where the disk is full: as much as the lease's renewal needs.
const GIVEN_UP: usize = 2;

impl Store {
    /// Marks objects; gives the keys of those for which there was no room. What is not marked for certain must not be
    /// deleted: writers would not see that it goes.
    pub(super) fn condemn(&self, objects: &[&ObjectMeta]) -> Result<HashSet<String>> {
        let mark = |meta: &ObjectMeta| match self.put_mark(&self.keys.condemned(&meta.key), mark_of(meta)) {
            Err(StoreError::Full { .. }) => Ok(false),
            marked => marked.map(|()| true),
        };
        let (mut marked, mut unmarked) = (Vec::new(), Vec::new());
        let work = |meta| Ok((meta, mark(meta)?));
        self.side_by_side(objects.to_vec(), work, |(meta, is_marked)| {
            if is_marked {
                marked.push(meta)
            } else {
                unmarked.push(meta)
            }
            Ok(())
        })?;
        if unmarked.is_empty() {
            return Ok(HashSet::new());
        }
        if marked.is_empty() {
            // Several at the same time take more room than one: the largest by themselves, as long as there is any.
            unmarked.sort_by_key(|meta| meta.bytes);
            while let Some(meta) = unmarked.pop() {
                if !mark(meta)? {
                    unmarked.push(meta);
                    break;
                }
                marked.push(meta);
            }
        }
        for _ in 0..GIVEN_UP.min(marked.len().saturating_sub(1)) {
            if let Some(meta) = marked.pop() {
                self.backend.delete(&self.keys.condemned(&meta.key))?;
                unmarked.push(meta);
            }
        }
        Ok(unmarked.into_iter().map(|meta| meta.key.clone()).collect())
    }
}

fn mark_of(meta: &ObjectMeta) -> Bytes {
    Bytes::from(meta.key.clone())
}
