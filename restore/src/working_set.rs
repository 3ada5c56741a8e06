//! Which pages the guest touched first, in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse_core::page::PageIndex;

/// Pages in a working set at most, unless the caller says otherwise: 256 MiB.
pub const WORKING_SET_PAGES_MAX: u64 = 64 << 10;

/// Pages in the order of their first touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// The pages; of a 2 MiB page, its first.
    pub pages: Vec<PageIndex>,
    /// First touches that came while the record was full. Those after its window are not counted.
    pub dropped: u64,
}

/// Pages that are recorded together.
const BLOCK_PAGES: usize = 1024;

/// Records first touches, bounded in number and time: an unbounded record would end as the whole machine.
///
/// The thread that answers faults writes it, behind a lock. Whoever reads it meanwhile holds that lock for no longer than
/// it takes to copy one block, however many pages there are: full blocks are shared.
#[derive(Debug)]
pub(crate) struct Recorder {
    seen: Seen,
    cap: usize,
    until: Instant,
}

/// What was recorded up to some moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    full: Vec<Arc<Vec<PageIndex>>>,
    last: Vec<PageIndex>,
    dropped: u64,
}

impl Seen {
    fn pages(&self) -> usize {
        self.full.len() * BLOCK_PAGES + self.last.len()
    }

    /// As one list.
    pub(crate) fn working_set(&self) -> WorkingSet {
        let mut pages = Vec::with_capacity(self.pages());
        self.full.iter().for_each(|block| pages.extend_from_slice(block));
        pages.extend_from_slice(&self.last);
        WorkingSet { pages, dropped: self.dropped }
    }
}

impl Recorder {
    pub(crate) fn new(cap: usize, window: Duration) -> Self {
        let now = Instant::now();
        let until = now.checked_add(window).unwrap_or(now);
        Recorder { seen: Seen::default(), cap, until }
    }

    pub(crate) fn touched(&mut self, page: PageIndex, at: Instant) {
        if at > self.until {
            return;
        }
        if self.seen.pages() >= self.cap {
            self.seen.dropped += 1;
            return;
        }
        self.seen.last.push(page);
        if self.seen.last.len() == BLOCK_PAGES {
            let block = std::mem::replace(&mut self.seen.last, Vec::with_capacity(BLOCK_PAGES));
            self.seen.full.push(Arc::new(block));
        }
    }

    pub(crate) fn so_far(&self) -> Seen {
        self.seen.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_bounded_in_number_and_time() {
        let mut recorder = Recorder::new(2, Duration::from_secs(3600));
        let now = Instant::now();
        for page in [7, 3, 5] {
            recorder.touched(PageIndex(page), now);
        }
        recorder.touched(PageIndex(9), now + Duration::from_secs(7200));
        assert_eq!(
            recorder.so_far().working_set(),
            WorkingSet { pages: vec![PageIndex(7), PageIndex(3)], dropped: 1 }
        );
    }

    /// All pages were copied under the lock that answering a fault takes.
    #[test]
    #[cfg_attr(miri, ignore = "a long record takes a minute there")]
    fn reading_a_long_record_copies_no_more_than_a_block() {
        let mut recorder = Recorder::new(100_000, Duration::from_secs(3600));
        let now = Instant::now();
        let all: Vec<_> = (0..50_000).map(PageIndex).collect();
        all.iter().for_each(|page| recorder.touched(*page, now));
        let (first, second) = (recorder.so_far(), recorder.so_far());
        assert!(first.last.len() < BLOCK_PAGES);
        assert_eq!(first.full.len(), 50_000 / BLOCK_PAGES);
        assert!(first.full.iter().zip(&second.full).all(|(a, b)| Arc::ptr_eq(a, b)));
        assert_eq!(first.working_set(), WorkingSet { pages: all, dropped: 0 });
    }
}
