//! What the file of kept page states holds, as bytes: pure functions.
//!
//! ```text
//!      0  magic "DORMPST\0"    8 bytes
//!      8  version              u32, little endian like all numbers
//!     12  zero                 u32
//!     16  cells                u64: pages, each of its region's size, over all regions
//!     24  image                32 bytes: whose pages; the caller's, such as a snapshot's id
//!     56  regions              32 bytes: BLAKE3 of addresses, sizes and places in the image
//!   4096  events               what the kernel was last asked for: messages of 32 bytes, or zeros
//!   8192  states               one byte a cell
//! ```
//! The file is the business of one machine between two boots, so it is not an on-disk format: a process of another
//! version refuses it by name.

use crate::plan::Plan;
use crate::state::PageState;
use crate::sys::event::{Event, MESSAGE_BYTES, parse_all};
use crate::sys::memory::Memory;

const MAGIC: [u8; 8] = *b"DORMPST\0";
/// The version written, and the only one read.
pub const VERSION: u32 = 1;
/// Bytes of the header that mean something.
pub const HEADER_BYTES: usize = 88;
/// Where the kernel's messages begin.
pub const EVENTS_AT: u64 = 4096;
/// Messages there is room for.
pub const EVENTS: usize = 64;
/// Bytes there is room for.
pub const EVENTS_BYTES: usize = EVENTS * MESSAGE_BYTES;
/// Where states begin.
pub const STATES_AT: u64 = 8192;
/// Most cells: a quarter of a PiB in pages of 4 KiB.
pub const CELLS_MAX: u64 = 1 << 36;

const _: () = assert!(EVENTS_BYTES <= (STATES_AT - EVENTS_AT) as usize);

/// What the states are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Pages, each of its region's size.
    pub cells: u64,
    /// Whose pages: the caller's, such as a snapshot's id.
    pub image: [u8; 32],
    /// Which addresses show which pages.
    pub regions: [u8; 32],
}

/// Why a file is not the kept states of a restore.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Something else.
    #[error("it does not hold page states")]
    NotStates,
    /// Another version's.
    #[error(
        "it was written as version {found}, this program reads version {VERSION}: take it up with the program that wrote it"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// Too many cells, or not as many as there is room for.
    #[error("it has {bytes} bytes, which is not the size for {cells} pages")]
    Size {
        /// What it says it has.
        cells: u64,
        /// Its size.
        bytes: u64,
    },
    /// The states of another snapshot.
    #[error("it holds the page states of another snapshot ({}), not of {}", hex(found), hex(wanted))]
    OtherImage {
        /// Whose.
        found: [u8; 32],
        /// Whose were asked for.
        wanted: [u8; 32],
    },
    /// The states of other regions.
    #[error("it holds the page states of other memory regions: is it the file of another VM?")]
    OtherRegions,
    /// A state that is none.
    #[error("page {cell} has the state {byte}, which is none")]
    BadState {
        /// Which page, counted over all regions.
        cell: u64,
        /// What is there.
        byte: u8,
    },
}

fn hex(id: &[u8; 32]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}

impl Header {
    /// The header for `plan` on `memory`.
    pub fn of(plan: &Plan, memory: &Memory, image: [u8; 32]) -> Self {
        let mut hash = blake3::Hasher::new();
        for (spec, region) in plan.regions().zip(memory.regions()) {
            for number in
                [region.start(), region.bytes(), region.page_size().bytes(), spec.image_first.0, spec.pages.0]
            {
                hash.update(&number.to_le_bytes());
            }
        }
        Header { cells: plan.cells(), image, regions: *hash.finalize().as_bytes() }
    }

    /// The size of its file; `None` for more cells than a file may have.
    pub fn file_bytes(&self) -> Option<u64> {
        (self.cells <= CELLS_MAX).then(|| STATES_AT + self.cells.next_multiple_of(4096))
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let parts: [&[u8]; 6] =
            [&MAGIC, &VERSION.to_le_bytes(), &[0; 4], &self.cells.to_le_bytes(), &self.image, &self.regions];
        for (to, from) in out.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        out
    }

    /// Reads the header of a file of `file_bytes` bytes.
    pub fn decode(header: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<Self, LayoutError> {
        let array = |at: usize| header[at..].first_chunk::<32>().copied().unwrap_or_default();
        let word = |at: usize| header[at..].first_chunk::<4>().copied().unwrap_or_default();
        if header[..8] != MAGIC {
            return Err(LayoutError::NotStates);
        }
        let found = u32::from_le_bytes(word(8));
        if found != VERSION || word(12) != [0; 4] {
            return Err(LayoutError::Version { found });
        }
        let cells = u64::from_le_bytes(header[16..].first_chunk().copied().unwrap_or_default());
        let header = Header { cells, image: array(24), regions: array(56) };
        if header.file_bytes() != Some(file_bytes) {
            return Err(LayoutError::Size { cells, bytes: file_bytes });
        }
        Ok(header)
    }

    /// Whether these are the states asked for.
    pub fn check(&self, wanted: &Header) -> Result<(), LayoutError> {
        if self.image != wanted.image {
            return Err(LayoutError::OtherImage { found: self.image, wanted: wanted.image });
        }
        if self.regions != wanted.regions || self.cells != wanted.cells {
            return Err(LayoutError::OtherRegions);
        }
        Ok(())
    }
}

/// The state a page has once the process that left it as `byte` is gone.
///
/// Nobody is on the way to an awaited page any more, and a copy that was under way has happened or not: asked for
/// again, the kernel says `EEXIST` if it has.
pub fn recovered(cell: u64, byte: u8) -> Result<PageState, LayoutError> {
    match PageState::ALL.into_iter().find(|state| *state as u8 == byte) {
        None => Err(LayoutError::BadState { cell, byte }),
        Some(PageState::Awaited | PageState::Copying) => Ok(PageState::Absent),
        Some(state) => Ok(state),
    }
}

/// The address ranges given back according to messages that a process left behind.
///
/// It may or may not have acted on them, and may have acted on all and left them from long ago. That is all the same,
/// as a page once removed stays removed. Descriptors of forks are not touched: their numbers meant that process's.
pub fn removed(events: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    parse_all(events).filter_map(|event| match event {
        Event::Remove { start, end } | Event::Unmap { start, end } => Some((start, end)),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
