//! Dirty pages as runs.

use std::collections::BTreeSet;

const PAGE_BYTES: u64 = dormouse_core::PAGE_BYTES as u64;

/// A run of pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRun {
    /// Guest-physical address of the first page.
    pub physical: u64,
    /// Length in bytes, a multiple of 4096.
    pub bytes: u64,
}

/// Appends the runs of set bits of `words` (bit 0 of word 0 is the page at `start`) to `runs`.
pub fn runs_of_bitmap(words: &[u64], start: u64, runs: &mut Vec<DirtyRun>) {
    for (index, word) in words.iter().enumerate() {
        let mut left = *word;
        while left != 0 {
            let bit = u64::from(left.trailing_zeros());
            push(runs, start + (index as u64 * 64 + bit) * PAGE_BYTES);
            left &= left - 1;
        }
    }
}

/// The runs of a set of page numbers.
pub fn join(pages: BTreeSet<u64>) -> Vec<DirtyRun> {
    let mut runs = Vec::new();
    for page in pages {
        push(&mut runs, page * PAGE_BYTES);
    }
    runs
}

fn push(runs: &mut Vec<DirtyRun>, physical: u64) {
    match runs.last_mut() {
        Some(last) if last.physical + last.bytes == physical => last.bytes += PAGE_BYTES,
        _ => runs.push(DirtyRun { physical, bytes: PAGE_BYTES }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join_across_words_and_gaps_part() {
        let mut runs = Vec::new();
        runs_of_bitmap(&[1 << 63 | 1, 0b11], 0x10_0000, &mut runs);
        let expected = [(0x10_0000, 1), (0x10_0000 + 63 * 4096, 3)]
            .map(|(physical, pages)| DirtyRun { physical, bytes: pages * 4096 });
        assert_eq!(runs, expected);
    }
}
