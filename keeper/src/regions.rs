//! Where a VM's memory lies in its VMM's address space: the list that Firecracker sends with its userfaultfd, and that
//! records of kept VMs have. A pure parser.
//!
//! ```json
//! [{"base_host_virt_addr":140000000000000,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]
//! ```
//! Firecracker 1.12 sends `page_size` and, by the older name, `page_size_kib`; despite that name both hold
//! bytes. Later versions send `page_size` alone. Fields not known here are ignored: the known ones say all
//! that is needed, and each is checked.

use std::ops::Range;

use serde::Deserialize;

/// Most bytes a message may have.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Most regions a message may list.
pub const REGIONS_MAX: usize = 256;
/// First address no process has (five-level page tables).
const HOST_END: u64 = 1 << 56;

/// The size of the pages a region is made of, and so of the least that can be installed in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB, from hugetlbfs.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4 << 10,
            Self::Huge => 2 << 20,
        }
    }

    fn from_bytes(bytes: u64) -> Option<Self> {
        [Self::Small, Self::Huge].into_iter().find(|size| size.bytes() == bytes)
    }
}

/// A region of guest memory. Address, length and offset are multiples of its page size; regions of one list
/// overlap neither in Firecracker's memory nor in the snapshot's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address, in Firecracker's address space.
    pub host: u64,
    /// Length in bytes, not zero.
    pub bytes: u64,
    /// Where its content starts in the snapshot's memory image, in bytes.
    pub offset: u64,
    /// The size of its pages.
    pub page_size: PageSize,
}

impl Region {
    /// Its addresses in Firecracker.
    pub const fn host_range(&self) -> Range<u64> {
        self.host..self.host + self.bytes
    }

    /// Its place in the snapshot's memory image, in bytes.
    pub const fn image_range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

/// Why a message is not a usable region list.
#[derive(Debug, thiserror::Error)]
pub enum RegionsError {
    /// Longer than [`MESSAGE_BYTES_MAX`].
    #[error("the region list has {bytes} bytes, more than the {MESSAGE_BYTES_MAX} allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not the JSON expected.
    #[error("the region list is not Firecracker's JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Zero or too many regions.
    #[error("the region list has {count} regions: 1 to {REGIONS_MAX} are allowed")]
    Count {
        /// How many.
        count: usize,
    },
    /// One region is impossible.
    #[error("region {index}: {what} ({value:#x})")]
    Region {
        /// Its place in the list, from 0.
        index: usize,
        /// What is wrong.
        what: &'static str,
        /// The value that is.
        value: u64,
    },
    /// Two regions share addresses.
    #[error("regions {first} and {second} overlap in {space}")]
    Overlap {
        /// The one that starts first.
        first: usize,
        /// The other.
        second: usize,
        /// `"memory"` or `"the snapshot"`.
        space: &'static str,
    },
}

impl RegionsError {
    /// Whether `bytes` may just have been cut short: more input could make it valid.
    pub fn is_incomplete(&self) -> bool {
        matches!(self, Self::Json(error) if error.is_eof())
    }
}

#[derive(Deserialize)]
struct Wire {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// The regions `message` lists, in its order.
///
/// # Errors
/// [`RegionsError`].
pub fn parse_regions(message: &[u8]) -> Result<Vec<Region>, RegionsError> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(RegionsError::TooLong { bytes: message.len() });
    }
    let wire: Vec<Wire> = serde_json::from_slice(message).map_err(|error| cut_in_number(message, error))?;
    if wire.is_empty() || wire.len() > REGIONS_MAX {
        return Err(RegionsError::Count { count: wire.len() });
    }
    let regions: Vec<Region> =
        wire.iter().enumerate().map(|(index, wire)| check(index, wire)).collect::<Result<_, _>>()?;
    no_overlap(&regions, "memory", Region::host_range)?;
    no_overlap(&regions, "the snapshot", Region::image_range)?;
    Ok(regions)
}

/// What is wrong with `message` instead of `error`, if it ends inside a number. In a field that is ignored `serde_json`
/// takes `4e`, `0.` and `-` for faults even where the message ends. Whether they are shows once a digit follows.
fn cut_in_number(message: &[u8], error: serde_json::Error) -> serde_json::Error {
    if error.is_eof() || !matches!(message.last(), Some(b'e' | b'E' | b'.' | b'+' | b'-')) {
        return error;
    }
    match serde_json::from_slice::<Vec<Wire>>(&[message, b"0"].concat()) {
        Err(cut) if cut.is_eof() => cut,
        _ => error,
    }
}

fn check(index: usize, wire: &Wire) -> Result<Region, RegionsError> {
    let bad = |what, value| RegionsError::Region { index, what, value };
    let page_bytes = match (wire.page_size, wire.page_size_kib) {
        (Some(bytes), Some(old)) if bytes != old => {
            return Err(bad("page_size and page_size_kib differ; both hold bytes", old));
        }
        (Some(bytes), _) | (None, Some(bytes)) => bytes,
        (None, None) => return Err(bad("it has no page_size; is Firecracker older than 1.12?", 0)),
    };
    let page_size = PageSize::from_bytes(page_bytes)
        .ok_or(bad("its page size is neither 4 KiB nor 2 MiB", page_bytes))?;
    let Wire { base_host_virt_addr: host, size: bytes, offset, .. } = *wire;
    if bytes == 0 {
        return Err(bad("its size is zero", bytes));
    }
    for (what, value) in [
        ("its address is not a multiple of its page size", host),
        ("its size is not a multiple of its page size", bytes),
        ("its offset is not a multiple of its page size", offset),
    ] {
        if value % page_bytes != 0 {
            return Err(bad(what, value));
        }
    }
    if host == 0 || host.checked_add(bytes).is_none_or(|end| end > HOST_END) {
        return Err(bad("no process has such addresses", host));
    }
    if offset.checked_add(bytes).is_none_or(|end| end > HOST_END) {
        return Err(bad("no snapshot has such an offset", offset));
    }
    Ok(Region { host, bytes, offset, page_size })
}

fn no_overlap(
    regions: &[Region],
    space: &'static str,
    range: impl Fn(&Region) -> Range<u64>,
) -> Result<(), RegionsError> {
    let mut order: Vec<(Range<u64>, usize)> = regions.iter().map(&range).zip(0..).collect();
    order.sort_by_key(|(range, _)| range.start);
    for pair in order.windows(2) {
        if let [(a, first), (b, second)] = pair
            && a.end > b.start
        {
            return Err(RegionsError::Overlap { first: *first, second: *second, space });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "regions_tests.rs"]
mod tests;
