//! Bringing similar pages together, so that they are compressed in one frame.
//!
//! Page dedup sees whole, aligned pages. A page cache over a file system with 1 KiB blocks (the default of small
//! ext4 images) holds the disk's bytes shifted by a block or two: no page is equal, and yet nearly every byte is
//! there already. Four hashes a page, one for each KiB, find such pages, and zstd does the rest once they share a
//! frame. Measured in `docs/DENSITY.md`: a tenth of the bytes, with no change to the format or to decoding.

use std::collections::{HashMap, VecDeque};

use dormouse_core::{FRAME_PAGES_MAX, PAGE_BYTES};

/// Blocks a page is looked at in.
const BLOCKS: usize = 4;
/// Pages that share a block and are looked at; more common blocks say little.
const SHARERS_MAX: usize = 200;
/// Pages one page brings into its group.
const BROUGHT_MAX: usize = 8;

/// A hash of each KiB of a page; 0 where it is all zero. A collision costs a little density and nothing else.
pub(crate) type Signature = [u32; BLOCKS];

/// The signature of a page.
pub(crate) fn signature(page: &[u8]) -> Signature {
    let mut signature = [0; BLOCKS];
    for (hash, block) in signature.iter_mut().zip(page.chunks_exact(PAGE_BYTES / BLOCKS)) {
        if block.iter().any(|b| *b != 0) {
            let digest = blake3::hash(block);
            let [a, b, c, d, ..] = *digest.as_bytes();
            *hash = u32::from_le_bytes([a, b, c, d]) | 1;
        }
    }
    signature
}

/// An order of all pages in which those that share blocks lie together, in groups of at most a frame; otherwise the
/// order stays as it is.
pub(crate) fn grouped(signatures: &[Signature]) -> Vec<usize> {
    let mut holders: HashMap<u32, Vec<usize>> = HashMap::new();
    for (page, signature) in signatures.iter().enumerate() {
        for block in signature.iter().filter(|b| **b != 0) {
            let pages = holders.entry(*block).or_default();
            if pages.len() < SHARERS_MAX {
                pages.push(page);
            }
        }
    }
    let mut placed = vec![false; signatures.len()];
    let mut order = Vec::with_capacity(signatures.len());
    for first in 0..signatures.len() {
        if std::mem::replace(&mut placed[first], true) {
            continue;
        }
        let (mut queue, mut taken) = (VecDeque::from([first]), 0);
        while let Some(page) = queue.pop_front() {
            order.push(page);
            taken += 1;
            let mut shared: HashMap<usize, usize> = HashMap::new();
            for block in signatures[page].iter().filter(|b| **b != 0) {
                for other in holders.get(block).into_iter().flatten().filter(|p| !placed[**p]) {
                    *shared.entry(*other).or_default() += 1;
                }
            }
            let mut closest: Vec<(usize, usize)> = shared.into_iter().map(|(page, n)| (n, page)).collect();
            closest.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
            for (_, other) in closest.into_iter().take(BROUGHT_MAX) {
                if taken + queue.len() >= FRAME_PAGES_MAX {
                    break;
                }
                placed[other] = true;
                queue.push_back(other);
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_share_a_block_come_together_and_none_is_lost() {
        let signatures = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [2, 3, 4, 13], [0; 4], [13, 0, 0, 0]];
        assert_eq!(grouped(&signatures), [0, 3, 5, 1, 2, 4]);
    }

    #[test]
    fn a_block_that_everyone_has_does_not_make_one_group_of_all() {
        let signatures: Vec<Signature> = (0..1000u32).map(|i| [7, i * 2 + 101, 0, 0]).collect();
        let mut order = grouped(&signatures);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }

    #[test]
    fn shifted_content_has_common_blocks() {
        let bytes: Vec<u8> = (0..2 * PAGE_BYTES).map(|i| (i / 7 % 251) as u8).collect();
        let (a, b) = (signature(&bytes[..PAGE_BYTES]), signature(&bytes[1024..1024 + PAGE_BYTES]));
        assert_eq!(a[1..], b[..3]);
    }
}
