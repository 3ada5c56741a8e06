//! Which pages a reader will want next: those behind a run that it reads in order. Pure.

use std::ops::Range;

/// Runs followed at the same time.
const RUNS: usize = 4;
/// Pages asked for when a run is first seen to go on.
const FIRST_PAGES: u64 = 64;

#[derive(Clone, Copy, Debug, Default)]
struct Run {
    /// The page after the last that was read.
    next: u64,
    /// The page after the last that was asked for ahead.
    asked: u64,
    window: u64,
}

/// Follows the runs of one disk's readers.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    runs: [Run; RUNS],
    oldest: usize,
}

impl ReadAhead {
    /// Notes that `read` was read, and tells what to fetch ahead, at most `window_max` pages. The window doubles while the
    /// run goes on, and is asked for again when half of it is read.
    pub(super) fn note(&mut self, read: Range<u64>, window_max: u64, disk_pages: u64) -> Range<u64> {
        let nothing = read.end..read.end;
        let goes_on = |run: &&mut Run| run.next > 0 && (run.next == read.start || run.next == read.start + 1);
        let Some(run) = self.runs.iter_mut().find(goes_on) else {
            self.runs[self.oldest] = Run { next: read.end, asked: read.end, window: 0 };
            self.oldest = (self.oldest + 1) % RUNS;
            return nothing;
        };
        run.next = run.next.max(read.end);
        let from = run.asked.max(run.next);
        if from - run.next > run.window / 2 {
            return nothing;
        }
        run.window = (run.window * 2).max(FIRST_PAGES).min(window_max);
        let until = (run.next + run.window).min(disk_pages).max(from);
        run.asked = until;
        from..until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_in_order_widens_the_window() {
        let mut ahead = ReadAhead::default();
        assert!(ahead.note(8..16, 512, 1 << 20).is_empty());
        assert_eq!(ahead.note(16..24, 512, 1 << 20), 24..88);
        let mut asked = 88;
        for at in (24..4_000).step_by(8) {
            let more = ahead.note(at..at + 8, 512, 1 << 20);
            if !more.is_empty() {
                assert_eq!(more.start, asked, "nothing is asked for twice or left out");
                asked = more.end;
            }
            assert!(asked > at + 8 && asked <= at + 8 + 512);
        }
    }

    #[test]
    fn reading_at_random_asks_for_nothing() {
        let mut ahead = ReadAhead::default();
        for at in [90, 3, 70, 11, 50, 90, 2] {
            assert!(ahead.note(at..at + 1, 512, 100).is_empty());
        }
    }

    #[test]
    fn two_readers_in_order_are_both_followed() {
        let mut ahead = ReadAhead::default();
        ahead.note(0..8, 512, 10_000);
        ahead.note(5_000..5_008, 512, 10_000);
        assert!(!ahead.note(8..16, 512, 10_000).is_empty());
        assert!(!ahead.note(5_008..5_016, 512, 10_000).is_empty());
        assert!(ahead.note(9_992..10_000, 512, 10_000).is_empty());
        assert!(ahead.note(9_999..10_000, 512, 10_000).is_empty(), "the disk ends here");
    }
}
