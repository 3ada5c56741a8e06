//! What a guest touched, from what its VMM asks for.
//!
//! Cloud Hypervisor asks for the page of a fault as it comes and, when none waits, for the next page it has not asked for
//! yet. So a request that is not the next in order is of a page that the guest touched. One that is may be either, and
//! counts as the VMM's own: what is missed thereby comes early next time as well.

use super::memory::MemorySlot;

const PAGE: u64 = 4096;

/// Which pages of a slot were asked for.
#[derive(Debug)]
struct Asked {
    pages: u64,
    /// One bit a page.
    bits: Vec<u64>,
    /// All before it were asked for.
    next: u64,
}

impl Asked {
    fn has(&self, page: u64) -> bool {
        self.bits.get((page / 64) as usize).is_some_and(|word| (word >> (page % 64)) & 1 == 1)
    }

    /// The next page in order; `None` at the end.
    fn next(&mut self) -> Option<u64> {
        while self.next < self.pages && self.has(self.next) {
            self.next += 1;
        }
        (self.next < self.pages).then_some(self.next)
    }
}

/// Follows the requests of a VMM.
#[derive(Debug)]
pub(super) struct Touches {
    slots: Vec<Asked>,
    /// The slot that the VMM is going through.
    current: Option<usize>,
}

impl Touches {
    pub(super) fn new<'s>(slots: impl Iterator<Item = &'s MemorySlot>) -> Self {
        let asked = |slot: &MemorySlot| {
            let pages = slot.bytes / PAGE;
            Asked { pages, bits: vec![0; pages.div_ceil(64) as usize], next: 0 }
        };
        Touches { slots: slots.map(asked).collect(), current: None }
    }

    /// The VMM asks for page `page` of slot number `slot`. Whether the guest touched it, and for the first time.
    pub(super) fn asked(&mut self, slot: usize, page: u64) -> bool {
        // Where it has come to the end of a slot, it goes on with any other.
        let current = self.current.filter(|at| self.slots.get_mut(*at).is_some_and(|s| s.next().is_some()));
        let Some(asked) = self.slots.get_mut(slot) else { return false };
        let in_order = current.is_none_or(|at| at == slot) && asked.next() == Some(page);
        if in_order {
            self.current = Some(slot);
        }
        let again = asked.has(page);
        if let Some(word) = asked.bits.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
        !in_order && !again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(slot: u32, pages: u64) -> MemorySlot {
        MemorySlot {
            slot,
            address: u64::from(slot) << 32,
            bytes: pages * PAGE,
            file_offset: 0,
            pluggable: false,
        }
    }

    /// Which of these requests are of pages touched.
    fn touched(requests: &[(usize, u64)]) -> Vec<(usize, u64)> {
        let mut touches = Touches::new([slot(0, 100), slot(1, 8)].iter());
        requests.iter().copied().filter(|(slot, page)| touches.asked(*slot, *page)).collect()
    }

    #[test]
    fn what_is_out_of_order_was_touched() {
        let requests = [(0, 0), (0, 1), (0, 50), (0, 2), (1, 3), (0, 3), (0, 51), (0, 52), (0, 4)];
        assert_eq!(touched(&requests), [(0, 50), (1, 3), (0, 51), (0, 52)]);
    }

    #[test]
    fn the_vmm_leaves_out_what_was_touched_and_goes_on_with_another_slot_at_the_end() {
        let mut requests = vec![(1, 0), (1, 1), (1, 4), (1, 2), (1, 3), (1, 5), (1, 6), (1, 7)];
        requests.extend((0..100).map(|page| (0, page)));
        assert_eq!(touched(&requests), [(1, 4)]);
    }

    #[test]
    fn a_page_asked_for_again_was_given_back_and_counts_once() {
        assert_eq!(touched(&[(0, 0), (0, 9), (0, 9), (0, 0), (7, 1)]), [(0, 9)]);
    }
}
