//! Which pages a machine will touch first, from what it touched in the session before.

use std::ops::Range;

use crate::{page_set::PageSet, recording::SessionRecord};

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
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
}
