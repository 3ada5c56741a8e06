//! Memory of our own in which 2 MiB of guest memory are put together, to be installed as one.

use std::io;
use std::sync::OnceLock;

use memmap2::{Advice, MmapMut, MmapOptions};

use crate::plan::PageSize;

/// 2 MiB on a boundary of that size, of one page where the kernel has such pages to give. Nobody else ever sees them:
/// what is put together here reaches a guest whole or not at all.
#[derive(Debug)]
pub struct Staging {
    map: MmapMut,
    /// Where they begin in what is mapped.
    offset: usize,
}

impl Staging {
    /// Their number of bytes.
    pub const BYTES: usize = PageSize::Huge.bytes() as usize;

    /// New ones, all zero. Nothing is allocated before [`populate`](Self::populate) or the first write.
    pub fn new() -> io::Result<Self> {
        let map = MmapOptions::new().len(2 * Self::BYTES).no_reserve_swap().map_anon()?;
        let offset = map.as_ptr().align_offset(Self::BYTES);
        if offset > Self::BYTES {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Without it, they are of small pages.
        let _ = map.advise_range(Advice::HugePage, offset, Self::BYTES);
        Ok(Staging { map, offset })
    }

    /// Whether the kernel may give a process pages of 2 MiB that asks for them. Moving small ones costs more than
    /// copying them.
    pub fn may_be_one_page() -> bool {
        static MAY: OnceLock<bool> = OnceLock::new();
        *MAY.get_or_init(|| {
            let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
            enabled.is_ok_and(|text| text.contains("[always]") || text.contains("[madvise]"))
        })
    }

    /// Has the kernel allocate them at once, where they were moved away or never written to.
    pub fn populate(&self) {
        // Linux 5.14; otherwise they come with the first write.
        let _ = self.map.advise_range(Advice::PopulateWrite, self.offset, Self::BYTES);
    }

    /// Their bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.get(self.offset..self.offset + Self::BYTES).unwrap_or_default()
    }

    /// Their bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.get_mut(self.offset..self.offset + Self::BYTES).unwrap_or_default()
    }

    pub(super) fn addr(&self) -> u64 {
        self.bytes().as_ptr() as u64
    }
}
