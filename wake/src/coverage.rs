//! How good a prefetched set of pages is, estimated from the few pages that were left out of it on purpose.
//!
//! A page that is prefetched does not fault, so nobody sees whether the machine needed it. So a small random sample of
//! the set is *held out*: its pages stay absent (their bytes are at hand, so that their faults are the cheapest there
//! are) and whether they fault says what share of the set is needed. All of this is arithmetic; who counts is
//! [`crate::recording`].

use dormouse_core::page::PageIndex;
use serde::{Deserialize, Serialize};

/// One page in this many, or fewer, is held out of a set that is known to be good, or of which nothing is known.
pub const ONE_IN: u32 = 64;
/// Of such a set about this many pages at most: each is a fault that the machine waits for.
pub const SAMPLES_WANTED: u64 = 32;
/// One page in this many is held out of a set that is mostly brought in vain: what is held out and not needed is left
/// out of the next set, so that such a set shrinks faster.
pub const ONE_IN_OF_BAD: u32 = 8;
/// Fewer samples than this say too little to act on.
pub const SAMPLES_MIN: u64 = 16;
/// A set that covers less than this of what was needed is to be made anew.
pub const COVERAGE_WANTED: f64 = 0.95;
/// A set of which more than this was brought in vain is to be made anew.
pub const OVERFETCH_ALLOWED: f64 = 0.2;

/// Which pages are held out: a random sample, the same for the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldOut {
    seed: u64,
    one_in: u32,
}

impl HeldOut {
    /// None at all.
    pub const NONE: HeldOut = HeldOut { seed: 0, one_in: 0 };

    /// One page in `one_in`, by chance that begins at `seed`; 0 for none.
    pub const fn new(seed: u64, one_in: u32) -> Self {
        HeldOut { seed, one_in }
    }

    /// The sample of a resume with a set of `set_pages`: `seed` is its own, and how large it is depends on what the last
    /// one measured.
    pub fn after(seed: u64, set_pages: u64, last: Option<&Coverage>) -> Self {
        let bad = last.and_then(|c| c.overfetch()).is_some_and(|share| share > OVERFETCH_ALLOWED);
        let enough = u32::try_from(set_pages / SAMPLES_WANTED).unwrap_or(u32::MAX);
        HeldOut { seed, one_in: if bad { ONE_IN_OF_BAD } else { ONE_IN.max(enough) } }
    }

    /// Whether `page` is in the sample.
    pub fn holds(self, page: PageIndex) -> bool {
        self.one_in != 0 && mix(self.seed ^ mix(page.0)).is_multiple_of(u64::from(self.one_in))
    }

    /// One page in this many; 0 for none.
    pub fn one_in(self) -> u32 {
        self.one_in
    }
}

/// The finaliser of splitmix64.
fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What was counted in one resume, inside its window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Coverage {
    /// Pages of the set, those held out included.
    pub set_pages: u64,
    /// One page in this many was held out; 0 if none was.
    pub one_in: u32,
    /// Held-out pages that the machine touched.
    pub sampled_touched: u64,
    /// Held-out pages that it did not.
    pub sampled_untouched: u64,
    /// Held-out pages that came with a neighbour before anybody touched them: they say nothing.
    pub sampled_lost: u64,
    /// First touches of pages that are not in the set.
    pub missed: u64,
}

impl Coverage {
    /// Samples that say something.
    pub fn samples(&self) -> u64 {
        self.sampled_touched.saturating_add(self.sampled_untouched)
    }

    /// Share of the set that was prefetched in vain, 0 to 1. `None` without samples.
    pub fn overfetch(&self) -> Option<f64> {
        let samples = self.samples();
        (samples > 0).then(|| (self.sampled_untouched as f64 / samples as f64).min(1.0))
    }

    /// Share of the first touches that the set covers, 0 to 1. `None` without samples, or if nothing was touched.
    ///
    /// Faults count touches outside the set, and a fault brings its frame's neighbours: touches of those are not seen,
    /// so this is an upper bound where a set misses whole neighbourhoods.
    pub fn coverage(&self) -> Option<f64> {
        let covered = self.set_pages as f64 * (1.0 - self.overfetch()?);
        let needed = covered + self.missed as f64;
        (needed > 0.0).then(|| covered / needed)
    }

    /// Whether a set made from what was seen now would be worth its making.
    pub fn wants_another_set(&self) -> bool {
        // If too much was missed even where all of the set was needed, no sample is needed to say so.
        let at_best = self.set_pages as f64 / (self.set_pages as f64 + self.missed as f64);
        if self.missed >= SAMPLES_MIN && at_best < COVERAGE_WANTED {
            return true;
        }
        let below = |share: Option<f64>| share.is_some_and(|c| c < COVERAGE_WANTED);
        let above = |share: Option<f64>| share.is_some_and(|o| o > OVERFETCH_ALLOWED);
        self.samples() >= SAMPLES_MIN && (below(self.coverage()) || above(self.overfetch()))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_samples_nothing_is_claimed() {
        let nothing = Coverage { set_pages: 100, missed: 7, ..Default::default() };
        assert_eq!((nothing.coverage(), nothing.overfetch()), (None, None));
        assert!(!nothing.wants_another_set());
        assert!(!(0..1000).any(|p| HeldOut::NONE.holds(PageIndex(p))));
    }

    #[test]
    fn a_set_is_made_anew_if_it_misses_much_or_is_mostly_in_vain() {
        let good = Coverage { set_pages: 640, sampled_touched: 20, ..Default::default() };
        assert!(!good.wants_another_set());
        assert!(Coverage { missed: 100, ..good }.wants_another_set());
        assert!(Coverage { sampled_untouched: 10, ..good }.wants_another_set());
        let few = Coverage { sampled_touched: 2, sampled_untouched: 2, ..good };
        assert!(!few.wants_another_set(), "four samples say nothing");
        assert!(Coverage { missed: 100, ..few }.wants_another_set(), "faults are seen without samples");
        assert!(
            !Coverage { missed: 10, set_pages: 20, ..few }.wants_another_set(),
            "and a few are not worth it"
        );
    }

    #[test]
    fn a_set_that_is_mostly_in_vain_is_sampled_more() {
        let bad = Coverage { set_pages: 640, sampled_touched: 1, sampled_untouched: 9, ..Default::default() };
        assert_eq!(HeldOut::after(1, 640, Some(&bad)).one_in(), ONE_IN_OF_BAD);
        assert_eq!(HeldOut::after(1, 640, None).one_in(), ONE_IN);
        assert_eq!(HeldOut::after(1, 6400, None).one_in(), 200, "a larger set needs no more samples");
    }

    /// What a resume would count: a set of `set` pages of which each is needed if `needed` says so, and `missed` more.
    fn counted(set: u64, missed: u64, held: HeldOut, needed: impl Fn(u64) -> bool) -> Coverage {
        let mut c = Coverage { set_pages: set, one_in: held.one_in(), missed, ..Default::default() };
        for page in (0..set).filter(|p| held.holds(PageIndex(*p))) {
            if needed(page) { c.sampled_touched += 1 } else { c.sampled_untouched += 1 }
        }
        c
    }

    proptest! {
        #[test]
        fn the_sample_has_about_its_size(seed: u64, one_in in 1u32..200) {
            let held = HeldOut::new(seed, one_in);
            let n = (0..40_000).filter(|p| held.holds(PageIndex(*p))).count() as f64;
            let want = 40_000.0 / f64::from(one_in);
            // Six standard deviations.
            prop_assert!((n - want).abs() <= 6.0 * want.sqrt() + 1.0, "{n} for {want}");
        }

        #[test]
        fn estimates_are_near_the_truth(
            seed: u64, tenths in 0u64..=10, missed in 0u64..20_000
        ) {
            let set = 40_000;
            // Which pages are needed has nothing to do with which are held out.
            let c = counted(set, missed, HeldOut::new(seed, 16), |p| mix(p + 1) % 10 < tenths);
            let needed = (0..set).filter(|p| mix(p + 1) % 10 < tenths).count() as f64;
            let overfetch = 1.0 - needed / set as f64;
            let error = 6.0 * (0.25 / c.samples() as f64).sqrt();
            prop_assert!((c.overfetch().unwrap() - overfetch).abs() <= error);
            if needed + missed as f64 > 0.0 {
                let coverage = needed / (needed + missed as f64);
                let got = c.coverage().unwrap_or(0.0);
                // The covered part is off by at most error * set pages, on either side of the fraction.
                let (low, high) = ((needed - error * set as f64).max(0.0), needed + error * set as f64);
                let bound = |n: f64| if n + missed as f64 > 0.0 { n / (n + missed as f64) } else { 1.0 };
                prop_assert!(got >= bound(low) - 1e-9 && got <= bound(high) + 1e-9, "{got} for {coverage}");
            }
        }

        #[test]
        fn shares_are_shares_and_more_misses_never_look_better(
            set_pages in 0u64..1 << 40, touched in 0u64..1 << 20, untouched in 0u64..1 << 20,
            missed in 0u64..1 << 40, more in 0u64..1 << 20
        ) {
            let one = Coverage {
                set_pages, sampled_touched: touched, sampled_untouched: untouched, missed, ..Default::default()
            };
            let worse = Coverage { missed: missed + more, ..one };
            for share in [one.coverage(), one.overfetch(), worse.coverage()].into_iter().flatten() {
                prop_assert!((0.0..=1.0).contains(&share));
            }
            if let (Some(one), Some(worse)) = (one.coverage(), worse.coverage()) {
                prop_assert!(worse <= one);
            }
        }
    }
}
