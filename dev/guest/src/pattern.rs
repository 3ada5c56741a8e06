//! The pattern the guest's pages carry, as pure functions. `program.S` computes the same.
//!
//! A page of number `i`, last rewritten in generation `g`, carries the word
//! `seed + i * PAGE_STEP + g * GENERATION_STEP` (modulo 2^64) at byte offsets 0, 2048 and 4088. Going from
//! generation `g - 1` to `g` rewrites the pages with `i % 8 == g % 8`.

/// Added from page to page.
pub const PAGE_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Added from generation to generation.
pub const GENERATION_STEP: u64 = 0xc2b2_ae3d_27d4_eb4f;
/// Byte offsets of a page at which its word stands.
pub const WORD_OFFSETS: [u64; 3] = [0, 2048, 4088];
/// Pages are rewritten in turn, one of this many lanes a generation.
pub const LANES: u64 = 8;

/// The word of page `page` as rewritten in `generation`.
pub fn word(seed: u64, page: u64, generation: u32) -> u64 {
    seed.wrapping_add(page.wrapping_mul(PAGE_STEP))
        .wrapping_add(u64::from(generation).wrapping_mul(GENERATION_STEP))
}

/// The generation in which `page` was last rewritten when the guest is in `current`; 0 if never.
pub fn generation_of(page: u64, current: u32) -> u32 {
    let since = current.wrapping_sub(page as u32) & (LANES as u32 - 1);
    current.saturating_sub(since)
}

/// The sum an answer over `pages` comes to in generation `current`.
pub fn answer_sum(seed: u64, current: u32, pages: impl IntoIterator<Item = u64>) -> u64 {
    pages.into_iter().fold(0u64, |sum, page| {
        sum.wrapping_add(word(seed, page, generation_of(page, current))).rotate_left(1)
    })
}

/// The numbers of the pages an answer reads, in order.
pub fn answer_pages(pages: u64, stride: u64, count: u64) -> impl Iterator<Item = u64> {
    (0..count).scan(0, move |at, _| {
        let page = *at;
        *at = (*at + stride) % pages.max(1);
        Some(page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_generation_rewrites_its_own_lane_and_nothing_else() {
        for current in 1..40u32 {
            for page in 0..64 {
                let (before, now) = (generation_of(page, current - 1), generation_of(page, current));
                let rewritten = page % LANES == u64::from(current) % LANES;
                assert_eq!(now, if rewritten { current } else { before }, "page {page} in {current}");
            }
        }
    }

    #[test]
    fn an_answer_meets_no_page_twice() {
        let params = crate::GuestParams::new(4096, 1).expect("valid");
        let mut met: Vec<u64> =
            answer_pages(params.pages, params.answer_stride(), params.answer_pages).collect();
        met.sort_unstable();
        met.dedup();
        assert_eq!(met.len() as u64, params.answer_pages);
        assert!(met.iter().any(|&p| p > 3800) && met[0] == 0, "scattered over all of it");
    }
}
