//! Which pages the guest touched first, in order, and which it will touch next time.

use std::{
    collections::BTreeMap,
    ops::Range,
    time::{Duration, Instant},
};

use dormouse_core::page::PageIndex;

use crate::recording::SessionRecord;

/// Pages in a predicted working set at most, unless the caller says otherwise: 256 MiB.
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

/// What a machine will touch first after a session: what it faulted for, then what its stream had brought, but for what
/// is known not to have been needed, then the pages it `dirtied`; at most `most` pages, each once.
///
/// Faults come first because they are what is known for certain; pages written late in a long session are the likeliest
/// to be in vain, so they come last and are the first to be cut off.
pub fn predict(session: Option<&SessionRecord>, dirtied: &[Range<u64>], most: u64) -> Vec<Range<u64>> {
    let (mut set, mut left_out, mut predicted) = (PageSet::default(), PageSet::default(), Vec::new());
    for page in session.into_iter().flat_map(|s| &s.unneeded) {
        left_out.insert(*page..page.saturating_add(1));
    }
    let of = |runs: &[(u64, u64)]| -> Vec<Range<u64>> {
        runs.iter().map(|(first, pages)| *first..first.saturating_add(*pages)).collect()
    };
    let missed = session.map(|s| of(&s.missed)).unwrap_or_default();
    let streamed = session.map(|s| of(&s.streamed)).unwrap_or_default();
    // Left out of the stream only: a page that was written is needed all the same.
    let streamed = streamed.into_iter().flat_map(|run| left_out.missing_in(run));
    for run in missed.into_iter().chain(streamed).chain(dirtied.iter().cloned()) {
        for part in set.missing_in(run) {
            let left = most.saturating_sub(set.pages());
            let part = part.start..part.end.min(part.start.saturating_add(left));
            if part.is_empty() {
                return predicted;
            }
            set.insert(part.clone());
            predicted.push(part);
        }
    }
    predicted
}

/// A set of pages, as runs that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// End by start.
    runs: BTreeMap<u64, u64>,
    pages: u64,
}

impl PageSet {
    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether `page` is in it.
    pub fn contains(&self, page: u64) -> bool {
        self.runs.range(..=page).next_back().is_some_and(|(_, end)| page < *end)
    }

    /// The parts of `run` that are not in it, ascending.
    pub fn missing_in(&self, run: Range<u64>) -> Vec<Range<u64>> {
        let (mut missing, mut at) = (Vec::new(), run.start);
        let before = self.runs.range(..=run.start).next_back();
        for (start, end) in before.into_iter().chain(self.runs.range(run.start.saturating_add(1)..)) {
            if at >= run.end || *start >= run.end {
                break;
            }
            if at < *start {
                missing.push(at..*start);
            }
            at = at.max(*end);
        }
        if at < run.end {
            missing.push(at..run.end);
        }
        missing
    }

    /// Adds `run`; the parts of it that were not there, ascending.
    pub fn insert(&mut self, run: Range<u64>) -> Vec<Range<u64>> {
        if run.is_empty() {
            return Vec::new();
        }
        let new = self.missing_in(run.clone());
        self.pages += new.iter().map(|r| r.end - r.start).sum::<u64>();
        let (mut start, mut end) = (run.start, run.end);
        // All that touch it become one with it.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            self.runs.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.runs.insert(start, end);
        new
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_set_is_a_set_of_pages(runs in proptest::collection::vec((0u64..300, 0u64..40), 0..40)) {
            let (mut set, mut model) = (PageSet::default(), BTreeSet::new());
            for (first, pages) in runs {
                let new: Vec<u64> = set.insert(first..first + pages).into_iter().flatten().collect();
                let want: Vec<u64> = (first..first + pages).filter(|p| model.insert(*p)).collect();
                prop_assert_eq!(new, want);
                prop_assert_eq!(set.pages(), model.len() as u64);
                prop_assert!((0..400).all(|p| set.contains(p) == model.contains(&p)));
                let ends: Vec<_> = set.runs.iter().collect();
                prop_assert!(ends.windows(2).all(|w| w[0].1 < w[1].0), "{ends:?}");
            }
        }

        #[test]
        fn a_prediction_has_each_page_once_and_no_more_than_asked_for(
            missed in proptest::collection::vec((0u64..300, 0u64..40), 0..9),
            streamed in proptest::collection::vec((0u64..300, 0u64..40), 0..9),
            unneeded in proptest::collection::vec(0u64..300, 0..20),
            dirtied in proptest::collection::vec((0u64..300, 0u64..40), 0..9),
            most in 0u64..400,
        ) {
            let all = |runs: &[(u64, u64)]| -> BTreeSet<u64> { runs.iter().flat_map(|(f, n)| *f..f + n).collect() };
            let dirty: Vec<_> = dirtied.iter().map(|(f, n)| *f..f + n).collect();
            let unneeded_set: BTreeSet<u64> = unneeded.iter().copied().collect();
            let mut want = all(&missed);
            want.extend(all(&streamed).difference(&unneeded_set));
            want.extend(all(&dirtied));
            let record = SessionRecord { missed: missed.clone(), streamed, unneeded, ..Default::default() };
            let got: Vec<u64> = predict(Some(&record), &dirty, most).into_iter().flatten().collect();
            prop_assert_eq!(got.len(), got.iter().collect::<BTreeSet<_>>().len());
            prop_assert_eq!(got.len() as u64, most.min(want.len() as u64));
            prop_assert!(got.iter().all(|p| want.contains(p)));
            // Faults come first, and in their order.
            let faults = all(&missed);
            prop_assert!(got.iter().take(faults.len()).all(|p| faults.contains(p)));
        }
    }

    #[test]
    fn a_record_of_nonsense_does_no_harm() {
        let missed = vec![(u64::MAX, u64::MAX), (0, u64::MAX), (5, u64::MAX)];
        let record = SessionRecord { missed, unneeded: vec![u64::MAX], ..Default::default() };
        let got = predict(Some(&record), std::slice::from_ref(&(0..u64::MAX)), 10);
        assert_eq!(got.iter().map(|r| r.end - r.start).sum::<u64>(), 10);
    }

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
