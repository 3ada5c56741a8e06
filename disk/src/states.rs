//! Which pages a layer holds. Two bits per page, in chunks of 64 MiB that cost nothing while all their pages are alike.

use std::{collections::BTreeMap, ops::Range};

/// Pages in one chunk: 64 MiB of disk.
const CHUNK_PAGES: u64 = 16 * 1024;
const PAGES_IN_WORD: u64 = 32;
const CHUNK_WORDS: usize = (CHUNK_PAGES / PAGES_IN_WORD) as usize;

/// What a layer knows of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageState {
    /// Nothing: look in the layer below.
    #[default]
    Absent,
    /// Its bytes are in the layer's data file, at the page's own offset.
    Present,
    /// It reads as zeros, whatever the data file holds there.
    Zero,
}

impl PageState {
    fn bits(self) -> u64 {
        self as u64
    }

    fn of_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => PageState::Absent,
            1 => PageState::Present,
            _ => PageState::Zero,
        }
    }

    /// The state repeated for every page of a word.
    fn word(self) -> u64 {
        self.bits() * 0x5555_5555_5555_5555
    }
}

/// A run of pages in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateRun {
    /// The first page.
    pub first: u64,
    /// How many, at least one.
    pub pages: u64,
    /// Their state, never absent.
    pub state: PageState,
}

#[derive(Clone, Debug)]
enum Chunk {
    All(PageState),
    Mixed(Box<Mixed>),
}

#[derive(Clone, Debug)]
struct Mixed {
    words: [u64; CHUNK_WORDS],
    /// Pages of each state.
    counts: [u32; 3],
}

/// The states of the pages of one layer.
#[derive(Clone, Debug, Default)]
pub struct PageStates {
    chunks: BTreeMap<u64, Chunk>,
}

impl PageStates {
    /// All absent.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether every page is absent.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The state of `page`.
    pub fn get(&self, page: u64) -> PageState {
        match self.chunks.get(&(page / CHUNK_PAGES)) {
            None => PageState::Absent,
            Some(Chunk::All(state)) => *state,
            Some(Chunk::Mixed(mixed)) => mixed.get(page % CHUNK_PAGES),
        }
    }

    /// Puts `pages` into `state`.
    pub fn set(&mut self, pages: Range<u64>, state: PageState) {
        let mut at = pages.start;
        while at < pages.end {
            let number = at / CHUNK_PAGES;
            let end = ((number + 1) * CHUNK_PAGES).min(pages.end);
            if end - at == CHUNK_PAGES {
                self.set_whole(number, state);
            } else {
                self.set_part(number, at % CHUNK_PAGES..at % CHUNK_PAGES + (end - at), state);
            }
            at = end;
        }
    }

    fn set_whole(&mut self, number: u64, state: PageState) {
        if state == PageState::Absent {
            self.chunks.remove(&number);
        } else {
            self.chunks.insert(number, Chunk::All(state));
        }
    }

    fn set_part(&mut self, number: u64, within: Range<u64>, state: PageState) {
        let chunk = self.chunks.entry(number).or_insert(Chunk::All(PageState::Absent));
        if let Chunk::All(all) = *chunk {
            if all == state {
                if all == PageState::Absent {
                    self.chunks.remove(&number);
                }
                return;
            }
            let mut counts = [0; 3];
            counts[all as usize] = CHUNK_PAGES as u32;
            *chunk = Chunk::Mixed(Box::new(Mixed { words: [all.word(); CHUNK_WORDS], counts }));
        }
        let Chunk::Mixed(mixed) = chunk else { return };
        for page in within {
            mixed.set(page, state);
        }
        if u64::from(mixed.counts[state as usize]) == CHUNK_PAGES {
            self.set_whole(number, state);
        }
    }

    /// Pages in `state`, which is not absent.
    pub fn count(&self, state: PageState) -> u64 {
        let of = |chunk: &Chunk| match chunk {
            Chunk::All(all) if *all == state => CHUNK_PAGES,
            Chunk::All(_) => 0,
            Chunk::Mixed(mixed) => u64::from(mixed.counts[state as usize]),
        };
        self.chunks.values().map(of).sum()
    }

    /// How many pages from `page` on, at most `limit`, are in the same state as it.
    pub fn run_length(&self, page: u64, limit: u64) -> u64 {
        let state = self.get(page);
        let mut length = 1;
        while length < limit && self.get(page + length) == state {
            length += 1;
        }
        length
    }

    /// All pages that are not absent, as runs in page order; neighbours in one state are one run.
    pub fn runs(&self) -> Vec<StateRun> {
        let mut runs: Vec<StateRun> = Vec::new();
        let mut push = |first: u64, pages: u64, state: PageState| match runs.last_mut() {
            _ if state == PageState::Absent => {}
            Some(last) if last.state == state && last.first + last.pages == first => last.pages += pages,
            _ => runs.push(StateRun { first, pages, state }),
        };
        for (number, chunk) in &self.chunks {
            let base = number * CHUNK_PAGES;
            match chunk {
                Chunk::All(state) => push(base, CHUNK_PAGES, *state),
                Chunk::Mixed(mixed) => {
                    for (word, at) in mixed.words.iter().zip((base..).step_by(PAGES_IN_WORD as usize)) {
                        match [PageState::Absent, PageState::Present, PageState::Zero]
                            .into_iter()
                            .find(|state| state.word() == *word)
                        {
                            Some(state) => push(at, PAGES_IN_WORD, state),
                            None => (0..PAGES_IN_WORD)
                                .for_each(|page| push(at + page, 1, PageState::of_bits(word >> (2 * page)))),
                        }
                    }
                }
            }
        }
        runs
    }

    /// Takes over what `newer` says.
    pub fn apply(&mut self, newer: &PageStates) {
        for run in newer.runs() {
            self.set(run.first..run.first + run.pages, run.state);
        }
    }

    /// Bytes of memory held.
    pub fn memory_bytes(&self) -> usize {
        let mixed = self.chunks.values().filter(|chunk| matches!(chunk, Chunk::Mixed(_))).count();
        mixed * size_of::<Mixed>() + self.chunks.len() * 4 * size_of::<usize>()
    }
}

impl Mixed {
    fn get(&self, page: u64) -> PageState {
        PageState::of_bits(self.words[(page / PAGES_IN_WORD) as usize] >> (2 * (page % PAGES_IN_WORD)))
    }

    fn set(&mut self, page: u64, state: PageState) {
        let old = self.get(page);
        let (word, shift) = (&mut self.words[(page / PAGES_IN_WORD) as usize], 2 * (page % PAGES_IN_WORD));
        *word = *word & !(3 << shift) | state.bits() << shift;
        self.counts[old as usize] -= 1;
        self.counts[state as usize] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn chunks_of_equal_pages_cost_nothing() {
        let mut states = PageStates::new();
        for page in 0..CHUNK_PAGES {
            states.set(page..page + 1, PageState::Present);
        }
        assert!(states.memory_bytes() < 100);
        assert_eq!(states.runs(), [StateRun { first: 0, pages: CHUNK_PAGES, state: PageState::Present }]);
        states.set(0..CHUNK_PAGES - 1, PageState::Absent);
        states.set(CHUNK_PAGES - 1..CHUNK_PAGES, PageState::Absent);
        assert!(states.is_empty());
    }

    proptest! {
        #[test]
        fn states_agree_with_a_plain_array(
            steps in prop::collection::vec((0u64..40_000, 1u64..20_000, 0u64..3), 1..20)
        ) {
            let mut states = PageStates::new();
            let mut plain = vec![PageState::Absent; 60_000];
            for (first, pages, state) in steps {
                let state = PageState::of_bits(state);
                states.set(first..first + pages, state);
                plain[first as usize..(first + pages) as usize].fill(state);
            }
            let mut seen = vec![PageState::Absent; 60_000];
            for run in states.runs() {
                seen[run.first as usize..(run.first + run.pages) as usize].fill(run.state);
            }
            prop_assert!(seen == plain);
            prop_assert!((0..60_000).all(|page| states.get(page as u64) == plain[page]));
            for state in [PageState::Present, PageState::Zero] {
                prop_assert_eq!(states.count(state), plain.iter().filter(|s| **s == state).count() as u64);
            }
        }
    }
}
