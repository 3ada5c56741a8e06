//! Pages: the unit of deduplication and of every address in Dormouse.

use std::ops::Range;

/// Bytes in a page. Guest memory and disks are cut at multiples of this, whatever the host's page size.
pub const PAGE_BYTES: usize = 4096;

/// Most pages one frame can hold; a frame is at most 128 KiB raw.
pub const FRAME_PAGES_MAX: usize = 32;

/// Most raw bytes one frame can hold.
pub const FRAME_BYTES_MAX: usize = FRAME_PAGES_MAX * PAGE_BYTES;

/// Pages one page-map section covers: 64 MiB of an image.
pub const SECTION_PAGES: u64 = 16 * 1024;

/// Most pages an image may have: 16 TiB. A larger count in an object is damage or an attack.
pub const IMAGE_PAGES_MAX: u64 = 1 << 32;

/// The number of a page within its image, counted from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Byte offset of the page's start within its image.
    pub const fn byte_offset(self) -> u64 {
        self.0 * PAGE_BYTES as u64
    }

    /// The section that maps this page.
    pub const fn section(self) -> SectionIndex {
        SectionIndex((self.0 / SECTION_PAGES) as u32)
    }

    /// The page's place within its section, below [`SECTION_PAGES`].
    pub const fn in_section(self) -> usize {
        (self.0 % SECTION_PAGES) as usize
    }
}

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The pages needed to hold `bytes`; a last, partial page counts as one.
    pub const fn covering(bytes: u64) -> Self {
        PageCount(bytes.div_ceil(PAGE_BYTES as u64))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_BYTES as u64
    }

    /// The number of sections that map this many pages.
    pub const fn sections(self) -> u32 {
        self.0.div_ceil(SECTION_PAGES) as u32
    }
}

/// The number of a page-map section within its image, counted from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionIndex(pub u32);

impl SectionIndex {
    /// The pages this section maps in an image of `image` pages.
    pub fn pages(self, image: PageCount) -> Range<u64> {
        let first = u64::from(self.0) * SECTION_PAGES;
        first.min(image.0)..(first + SECTION_PAGES).min(image.0)
    }
}

/// The place of a page within a frame, below [`FRAME_PAGES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u8);

impl Slot {
    /// A slot, or `None` if `slot` is not below [`FRAME_PAGES_MAX`].
    pub const fn new(slot: usize) -> Option<Self> {
        if slot < FRAME_PAGES_MAX { Some(Slot(slot as u8)) } else { None }
    }

    /// The slot of a place, which is `frame * FRAME_PAGES_MAX + slot`.
    pub(crate) const fn of_place(place: u32) -> Self {
        Slot((place % FRAME_PAGES_MAX as u32) as u8)
    }

    /// The slot's number.
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

/// Whether all bytes of `page` are zero.
pub fn is_zero(page: &[u8]) -> bool {
    let mut words = page.chunks_exact(32);
    words.all(|w| w == [0; 32]) && words.remainder().iter().all(|&b| b == 0)
}
