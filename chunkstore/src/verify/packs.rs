//! Checking packs, by what snapshots need of them and by what they say of themselves.

use std::collections::{BTreeSet, HashSet};

use dormouse_core::{
    ChunkId, FrameHash, FrameRef, PackFooter, is_zero,
    pack::{FrameKind, check_object},
};

use super::{Findings, Wanted};
use crate::{error::Result, store::Store};

impl Store {
    pub(super) fn check_presence(&self, want: &Wanted, findings: &mut Findings) -> Result<u64> {
        let key = self.keys.pack(want.pack.id);
        let there = match self.backend.head(&key) {
            Ok(there) => there,
            Err(e) => {
                findings.note(self, &key, e, want.everyone())?;
                return Ok(0);
            }
        };
        match there {
            None => findings.add(&key, &"it is missing", want.everyone()),
            Some(bytes) if bytes != want.pack.object_bytes() => {
                let why = format!("it has {bytes} bytes instead of {}", want.pack.object_bytes());
                findings.add(&key, &why, want.everyone());
            }
            Some(_) => {}
        }
        Ok(0)
    }

    /// Reads a whole pack and checks all there is to check.
    pub(super) fn check_pack(&self, want: &Wanted, findings: &mut Findings) -> Result<u64> {
        let key = self.keys.pack(want.pack.id);
        // One byte more shows that there is more.
        let object = match self.backend.get(&key, Some(0..want.pack.object_bytes() + 1)) {
            Ok(Some(object)) => object,
            Ok(None) => {
                findings.add(&key, &"it is missing", want.everyone());
                return Ok(0);
            }
            Err(e) => {
                findings.note(self, &key, e, want.everyone())?;
                return Ok(0);
            }
        };
        match check_object(&self.domain, want.pack.id, &object) {
            Ok((footer, damaged)) => self.check_frames(want, &key, &object, &footer, &damaged, findings),
            Err(why) => {
                // Frames may be whole though what is around them is not, and it is frames that snapshots need.
                let hurt: BTreeSet<usize> = want
                    .frames
                    .values()
                    .filter(|need| !is_whole(&object, &need.at))
                    .flat_map(|need| need.who.iter().copied())
                    .collect();
                findings.add(&key, &why, hurt);
            }
        }
        Ok(object.len() as u64)
    }

    fn check_frames(
        &self,
        want: &Wanted,
        key: &str,
        object: &[u8],
        footer: &PackFooter,
        damaged: &[usize],
        findings: &mut Findings,
    ) {
        let damaged: HashSet<usize> = damaged.iter().copied().collect();
        let mut seen = 0;
        for (i, frame) in footer.frames.iter().enumerate() {
            let needed = want.frames.get(&frame.at.offset);
            let who = || needed.iter().flat_map(|need| need.who.iter().copied()).collect::<Vec<_>>();
            seen += usize::from(needed.is_some());
            if damaged.contains(&i) {
                let range = frame.at.range();
                let why = format!("bytes {}..{} do not have the hash of their frame", range.start, range.end);
                findings.add(key, &why, who());
                continue;
            }
            if needed.is_some_and(|need| need.at.hash != frame.at.hash) {
                findings.add(key, &"a frame is not the one a page map refers to", who());
            }
            let range = frame.at.range();
            let raw = frame.at.decode(&self.domain, &object[range.start as usize..range.end as usize]);
            match raw {
                Err(why) => findings.add(key, &why, who()),
                Ok(raw) if frame.kind == FrameKind::Pages => {
                    let pages = raw.chunks_exact(dormouse_core::PAGE_BYTES);
                    let right =
                        |(page, id): (&[u8], &ChunkId)| self.domain.chunk_id(page) == *id && !is_zero(page);
                    if !pages.zip(&frame.chunks).all(right) {
                        findings.add(key, &"a page does not have the id its footer lists", who());
                    }
                }
                Ok(_) => {}
            }
        }
        if seen != want.frames.len() {
            let offsets: HashSet<u32> = footer.frames.iter().map(|f| f.at.offset).collect();
            let lost = want.frames.iter().filter(|(offset, _)| !offsets.contains(offset));
            let who = lost.flat_map(|(_, need)| need.who.iter().copied());
            findings.add(key, &"a frame that a page map refers to is not in it", who);
        }
    }
}

/// Whether a frame has its hash, in a pack whose footer cannot be trusted.
fn is_whole(object: &[u8], frame: &FrameRef) -> bool {
    let range = frame.range();
    let stored = object.get(range.start as usize..range.end as usize);
    stored.is_some_and(|bytes| FrameHash::of(bytes) == frame.hash)
}
