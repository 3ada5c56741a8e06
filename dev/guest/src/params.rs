//! What the guest program is told.

use super::layout::{
    ANSWER_PAGES_MAX, ANSWER_PAGES_MIN, DATA_ADDR, LayoutError, PAGE_BYTES, PAGES_MAX, PARAMS_MAGIC,
};

/// What the guest program is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestParams {
    /// Pages of pattern, from [`DATA_ADDR`] up; a multiple of 8.
    pub pages: u64,
    /// Makes one guest's pattern differ from another's.
    pub seed: u64,
    /// Pages one answer reads, a multiple of 8.
    pub answer_pages: u64,
    /// Times the idle loop polls for a command before the next answer and pass; at least 1.
    pub idle_polls: u64,
    /// Drive a virtio balloon. Only Firecracker can have one; where none is found, the guest says `!`.
    pub balloon: bool,
}

impl GuestParams {
    /// A guest of `pages` pages, answering over 256 of them.
    ///
    /// # Errors
    /// [`LayoutError::Pages`].
    pub fn new(pages: u64, seed: u64) -> Result<Self, LayoutError> {
        Self { pages, seed, answer_pages: ANSWER_PAGES_MIN, idle_polls: 64, balloon: false }.checked()
    }

    /// These parameters, if they are usable.
    ///
    /// # Errors
    /// [`LayoutError::Pages`] or [`LayoutError::AnswerPages`].
    pub fn checked(self) -> Result<Self, LayoutError> {
        let Self { pages, answer_pages, .. } = self;
        if !(ANSWER_PAGES_MIN..=PAGES_MAX).contains(&pages) || pages % 8 != 0 {
            return Err(LayoutError::Pages { pages });
        }
        let max = ANSWER_PAGES_MAX.min(pages);
        if !(ANSWER_PAGES_MIN..=max).contains(&answer_pages) || answer_pages % 8 != 0 {
            return Err(LayoutError::AnswerPages { answer_pages, pages });
        }
        Ok(Self { idle_polls: self.idle_polls.max(1), ..self })
    }

    /// Pages from one page of an answer to the next: near the golden section of all pages, and without a
    /// common factor, so that the walk is scattered and meets no page twice.
    pub fn answer_stride(&self) -> u64 {
        let mut stride = (self.pages * 618 / 1000).max(1);
        while gcd(stride, self.pages) != 1 {
            stride += 1;
        }
        stride
    }

    /// Bytes of linear memory the guest needs.
    pub fn memory_bytes(&self) -> u64 {
        DATA_ADDR + self.pages * PAGE_BYTES
    }

    /// The parameter block: magic, pages, data address, seed, answer pages, answer stride, idle polls,
    /// whether to drive a balloon.
    pub fn to_block(&self) -> [u8; 64] {
        let words = [
            PARAMS_MAGIC,
            self.pages,
            DATA_ADDR,
            self.seed,
            self.answer_pages,
            self.answer_stride(),
            self.idle_polls.max(1),
            u64::from(self.balloon),
        ];
        let mut block = [0; 64];
        for (to, word) in block.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        block
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
