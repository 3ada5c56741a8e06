//! Where the guest program finds what: addresses, the parameter block, the state block, ports.
//!
//! Addresses are the guest's *linear* addresses. The page tables map them onto the memory regions one after
//! another, so that with one region starting at zero linear and physical are the same; see [`Span`].

use super::GuestParams;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Bytes of a guest page.
pub const PAGE_BYTES: u64 = 4096;
/// Where the program is loaded and entered.
pub const PROGRAM_ADDR: u64 = 0x20_0000;
/// Most bytes the program may have.
pub const PROGRAM_BYTES_MAX: usize = PAGE_BYTES as usize;
/// Where the VMM writes the parameter block: eight little-endian u64, see [`GuestParams::to_block`].
pub const PARAMS_ADDR: u64 = 0x20_1000;
/// Where the program keeps its state, see [`state`].
pub const STATE_ADDR: u64 = 0x20_2000;
/// The addresses an answer reads, u64 each.
pub const ANSWERS_ADDR: u64 = 0x20_3000;
/// The generation of each page, u32 each.
pub const GENERATIONS_ADDR: u64 = 0x21_0000;
/// The first page of pattern.
pub const DATA_ADDR: u64 = 0x100_0000;
/// First word of the parameter block.
pub const PARAMS_MAGIC: u64 = 0x3147_4553_554f_4d44; // "DMOUSEG1", little-endian

/// Least pages an answer reads.
pub const ANSWER_PAGES_MIN: u64 = 256;
/// Most pages an answer reads: its table ends before the table of generations.
pub const ANSWER_PAGES_MAX: u64 = (GENERATIONS_ADDR - ANSWERS_ADDR) / 8;
/// Most pages of pattern: their table of generations ends before the first of them.
pub const PAGES_MAX: u64 = (DATA_ADDR - GENERATIONS_ADDR) / 4;

/// What a VMM that boots by PVH needs beside the program: it is entered in 32-bit mode, with neither paging nor a 64-bit
/// segment. Physical addresses, below the program.
pub mod pvh {
    /// Where the guest is entered.
    pub const ENTRY_ADDR: u64 = 0x10_0000;
    /// Where the pointer to the descriptors of segments lies, and then these.
    pub const DESCRIPTORS_ADDR: u64 = ENTRY_ADDR + 0x100;
    /// The page tables, of three levels, each a page.
    pub const TABLES_ADDR: u64 = ENTRY_ADDR + 0x1000;
}

/// Byte offsets in the state block.
pub mod state {
    /// u32: the current generation.
    pub const GENERATION: u64 = 0;
    /// u64: what an answer's sum must be.
    pub const SUM: u64 = 8;
    /// u32 x 8: the generation of each lane (page number modulo 8).
    pub const LANES: u64 = 16;
    /// u64 x 8: scratch of the verification.
    pub const VALUES: u64 = 64;
    /// u64: where the balloon's registers are, 0 for no balloon.
    pub const BALLOON: u64 = 128;
    /// u32: pages in the balloon.
    pub const HELD: u64 = 136;
    /// u32: the last of them, of which the device has not yet been seen to know.
    pub const POSTED: u64 = 140;
}

/// What the balloon driver uses.
pub mod balloon {
    /// Two queues of one entry each, 128 bytes apart: to give pages back, and to take them again.
    pub const QUEUES_ADDR: u64 = 0x10_0000;
    /// The numbers of the pages in question, u32 each.
    pub const PFNS_ADDR: u64 = 0x10_0400;
    /// A page directory for the GiB of the registers.
    pub const PAGE_DIRECTORY_ADDR: u64 = 0x10_1000;
    /// Where Firecracker puts its devices, 4 KiB each.
    pub const MMIO_ADDR: u64 = 0xd000_0000;
}

/// I/O ports.
pub mod port {
    /// 16550 data register: output, and command bytes.
    pub const SERIAL_DATA: u16 = 0x3f8;
    /// 16550 line status register: bit 0 = a command byte waits.
    pub const SERIAL_STATUS: u16 = 0x3fd;
    /// 32-bit out: the wrong pages of the pass just ended.
    pub const WRONG_COUNT: u16 = 0x5f0;
    /// 32-bit out: the generation that pass found.
    pub const GENERATION: u16 = 0x5f4;
    /// 32-bit out: the number of a wrong page.
    pub const WRONG_PAGE: u16 = 0x5f8;
}

/// What is wrong with a guest's parameters or memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The page count is zero, not a multiple of eight, or too large.
    #[error("a guest of {pages} pages: give a multiple of 8 from {ANSWER_PAGES_MIN} to {PAGES_MAX}")]
    Pages {
        /// The count given.
        pages: u64,
    },
    /// The answer's page count is out of range.
    #[error(
        "an answer over {answer_pages} of {pages} pages: give a multiple of 8 from {ANSWER_PAGES_MIN} to {ANSWER_PAGES_MAX}, no more than there are pages"
    )]
    AnswerPages {
        /// The count given.
        answer_pages: u64,
        /// The guest's pages.
        pages: u64,
    },
    /// Memory is too small.
    #[error(
        "{pages} pages of pattern need {needed_bytes} bytes of guest memory, only {given_bytes} are there: use fewer pages or more memory"
    )]
    TooSmall {
        /// The pages asked for.
        pages: u64,
        /// Bytes that would do.
        needed_bytes: u64,
        /// Bytes there are.
        given_bytes: u64,
    },
    /// A region's place or size does not suit the guest's 2 MiB page tables.
    #[error(
        "memory region at {start:#x} of {bytes} bytes: regions are multiples of 2 MiB, at multiples of 2 MiB, and the first starts at 0"
    )]
    Region {
        /// Guest-physical start.
        start: u64,
        /// Its size.
        bytes: u64,
    },
    /// More memory than the page tables cover.
    #[error("{bytes} bytes of guest memory are more than the {max} the guest's page tables cover")]
    TooLarge {
        /// Bytes there are.
        bytes: u64,
        /// Bytes covered.
        max: u64,
    },
}

/// A run of linear addresses and the memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First linear address.
    pub linear: u64,
    /// First guest-physical address.
    pub physical: u64,
    /// Length.
    pub bytes: u64,
}

/// Bytes the guest's page tables can cover.
pub const LINEAR_BYTES_MAX: u64 = 8 << 30;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// The regions of `memory` as the guest sees them: one after another.
///
/// # Errors
/// [`LayoutError::Region`] or [`LayoutError::TooLarge`].
pub fn spans(memory: &GuestMemoryMmap) -> Result<Vec<Span>, LayoutError> {
    let mut linear = 0;
    let mut spans = Vec::new();
    for region in memory.iter() {
        let (start, bytes) = (region.start_addr().raw_value(), region.len());
        let first_is_zero = linear != 0 || start == 0;
        if !first_is_zero || start % LARGE_PAGE_BYTES != 0 || bytes % LARGE_PAGE_BYTES != 0 {
            return Err(LayoutError::Region { start, bytes });
        }
        spans.push(Span { linear, physical: start, bytes });
        linear += bytes;
        if linear > LINEAR_BYTES_MAX {
            return Err(LayoutError::TooLarge { bytes: linear, max: LINEAR_BYTES_MAX });
        }
    }
    Ok(spans)
}

/// The spans of `memory`, if they hold a guest of these parameters.
///
/// # Errors
/// As [`spans`], and [`LayoutError::TooSmall`].
pub fn fit(params: &GuestParams, memory: &GuestMemoryMmap) -> Result<Vec<Span>, LayoutError> {
    let spans = spans(memory)?;
    let given_bytes = spans.last().map_or(0, |s| s.linear + s.bytes);
    let needed_bytes = params.memory_bytes();
    if given_bytes < needed_bytes {
        return Err(LayoutError::TooSmall { pages: params.pages, needed_bytes, given_bytes });
    }
    Ok(spans)
}

/// The guest-physical address of a linear one, or `None` outside all spans.
pub fn physical(spans: &[Span], linear: u64) -> Option<GuestAddress> {
    let span = spans.iter().find(|s| linear.checked_sub(s.linear).is_some_and(|o| o < s.bytes))?;
    Some(GuestAddress(span.physical + (linear - span.linear)))
}
