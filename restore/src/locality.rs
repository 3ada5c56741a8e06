//! Whether the guest walks through memory or jumps about: how much a fault should bring with it at once.
//!
//! Copying a frame's 31 other pages takes longer than all the rest of a fault. A guest that jumps should not wait for
//! them; one that walks would fault on each. As with a file's read-ahead, the addresses tell.

use crate::source::Extent;

/// Runs remembered: about as many walks may go on side by side.
const RECENT: usize = 8;

/// The runs of the last faults.
#[derive(Debug, Default)]
pub(crate) struct Locality {
    recent: [Option<(u64, u64)>; RECENT],
    next: usize,
}

impl Locality {
    /// Whether the fault on `page` goes on from, or comes back to, the run of one of the last faults; its own run
    /// is `extent`.
    pub(crate) fn walks(&mut self, page: u64, extent: &Extent) -> bool {
        let (first, end) = (extent.first.0, extent.end());
        let near = |&(from, to): &(u64, u64)| page + 1 >= from && page <= to;
        match self.recent.iter_mut().flatten().find(|run| near(run)) {
            Some(run) => {
                *run = (first, end);
                true
            }
            None => {
                self.recent[self.next] = Some((first, end));
                self.next = (self.next + 1) % RECENT;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use dormouse_core::page::PageIndex;

    use super::*;

    fn runs_of_32(page: u64) -> Extent {
        Extent::zero(PageIndex(page / 32 * 32), 32)
    }

    fn walks(pages: impl IntoIterator<Item = u64>) -> Vec<bool> {
        let mut locality = Locality::default();
        pages.into_iter().map(|page| locality.walks(page, &runs_of_32(page))).collect()
    }

    #[test]
    fn jumps_are_jumps() {
        assert_eq!(walks((0..100).map(|i| i * 77 + 16)), [false; 100]);
    }

    #[test]
    fn a_walk_is_known_from_its_second_fault_on_forwards_and_backwards() {
        assert_eq!(walks([5, 6, 32, 64, 96]), [false, true, true, true, true]);
        assert_eq!(walks([100, 99, 95, 63, 31]), [false, true, true, true, true]);
    }

    #[test]
    fn walks_side_by_side_do_not_hide_each_other() {
        let pages = (0..10).flat_map(|step| (0..4).map(move |walk| walk * 32_000 + step * 32));
        assert_eq!(walks(pages).into_iter().filter(|walks| !walks).count(), 4);
    }

    #[test]
    fn the_first_and_last_pages_do_not_overflow() {
        assert_eq!(walks([0, u64::MAX - 40, 0]), [false, false, true]);
    }
}
