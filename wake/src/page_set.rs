//! A set of pages as runs.

use std::{collections::BTreeMap, ops::Range};

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
    }
}
