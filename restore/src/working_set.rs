//! Which pages the guest touched first, in order.

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

/// Records first touches, bounded in number and time: an unbounded record would end as the whole machine.
#[derive(Debug)]
pub(crate) struct Recorder {
    set: WorkingSet,
    cap: usize,
    until: Instant,
}

impl Recorder {
    pub(crate) fn new(cap: usize, window: Duration) -> Self {
        let now = Instant::now();
        let until = now.checked_add(window).unwrap_or(now);
        Recorder { set: WorkingSet::default(), cap, until }
    }

    pub(crate) fn touched(&mut self, page: PageIndex, at: Instant) {
        if at > self.until {
            return;
        }
        if self.set.pages.len() < self.cap {
            self.set.pages.push(page);
        } else {
            self.set.dropped += 1;
        }
    }

    pub(crate) fn so_far(&self) -> WorkingSet {
        self.set.clone()
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
        assert_eq!(recorder.so_far(), WorkingSet { pages: vec![PageIndex(7), PageIndex(3)], dropped: 1 });
    }
}
