//! Memory of our own process: guest memory of an own VMM, of the tests, and files that a VMM maps too.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_core::page::PAGE_BYTES;
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::plan::PageSize;

const HUGE_BYTES: usize = PageSize::Huge.bytes() as usize;

/// A private anonymous mapping, or a shared one of a memory file, unmapped on drop. Nothing is allocated until it
/// is touched.
///
/// Its bytes may change under us at any time (a guest runs on them), so they are only ever read and written
/// as atomic words, never lent out as slices.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
    /// Where it begins in what is mapped.
    offset: usize,
    bytes: usize,
    page_size: PageSize,
}

impl Mapping {
    /// Maps `pages` pages of 4 KiB, backed by pages of `page_size`, of which it must be a multiple. Begins on a
    /// boundary of 2 MiB unless it is smaller, so that the kernel can back it by pages of that size.
    ///
    /// With 2 MiB pages the kernel must have that many free (`/proc/sys/vm/nr_hugepages`), else touching the
    /// memory, or installing into it, fails; without them this call may already fail.
    pub fn new(pages: u64, page_size: PageSize) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidInput, "not a positive number of whole pages");
        if pages == 0 || !pages.is_multiple_of(page_size.pages()) {
            return Err(bad());
        }
        let bytes = usize::try_from(pages).ok().and_then(|p| p.checked_mul(PAGE_BYTES)).ok_or_else(bad)?;
        if page_size == PageSize::Huge {
            // Reserved, unlike small pages: a hugetlb page that is not there at install time is SIGBUS.
            let map = MmapOptions::new().len(bytes).huge(Some(HUGE_BYTES.ilog2() as u8)).map_anon()?;
            return Ok(Mapping { map: map.into(), offset: 0, bytes, page_size });
        }
        let slack = if bytes < HUGE_BYTES { 0 } else { HUGE_BYTES };
        let all = bytes.checked_add(slack).ok_or_else(bad)?;
        let map = MmapRaw::from(MmapOptions::new().len(all).no_reserve_swap().map_anon()?);
        let offset = if slack == 0 { 0 } else { map.as_ptr().align_offset(HUGE_BYTES) };
        if offset > slack {
            return Err(bad());
        }
        Ok(Mapping { map, offset, bytes, page_size })
    }

    /// Maps `pages` pages of 4 KiB of `file`, a file in memory, from byte `offset` on. What is installed here is
    /// there for everybody who maps the file.
    ///
    /// The file must be sealed against shrinking: whoever touches a page past its end gets SIGBUS.
    pub fn shared(file: impl AsFd, offset: u64, pages: u64) -> io::Result<Self> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
        let bytes = usize::try_from(pages).ok().and_then(|p| p.checked_mul(PAGE_BYTES)).filter(|b| *b > 0);
        let bytes = bytes.ok_or_else(|| bad("not a positive number of whole pages"))?;
        let end = offset.checked_add(bytes as u64).ok_or_else(|| bad("past the end of addresses"))?;
        let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(rustix::fs::SealFlags::SHRINK);
        if !sealed || rustix::fs::fstat(&file)?.st_size.cast_unsigned() < end {
            return Err(bad("the file can be, or is, shorter than what is to be mapped"));
        }
        let file = file.as_fd();
        let map = MmapOptions::new().offset(offset).len(bytes).no_reserve_swap().map_raw(&file)?;
        Ok(Mapping { map, offset: 0, bytes, page_size: PageSize::Small })
    }

    /// The address of the first byte, for handing to KVM.
    pub fn addr(&self) -> u64 {
        self.map.as_ptr() as u64 + self.offset as u64
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The size of the pages behind it.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn word(&self, offset: usize) -> Option<&AtomicU64> {
        if !offset.is_multiple_of(8) || offset.checked_add(8)? > self.bytes {
            return None;
        }
        // SAFETY: the word lies inside the mapping, as checked above.
        let word = unsafe { self.map.as_mut_ptr().add(self.offset + offset) };
        // SAFETY: aligned (mappings start on a page), inside memory that lives as long as `self`, and
        // only ever accessed atomically by us.
        Some(unsafe { AtomicU64::from_ptr(word.cast()) })
    }

    /// The word at byte `offset`, or `None` if that is unaligned or outside. Waits if its page is absent.
    pub fn load(&self, offset: usize) -> Option<u64> {
        self.word(offset).map(|w| w.load(Ordering::Relaxed))
    }

    /// Writes the word at byte `offset`; false if that is unaligned or outside. Waits if its page is absent.
    pub fn store(&self, offset: usize, value: u64) -> bool {
        self.word(offset).map(|w| w.store(value, Ordering::Relaxed)).is_some()
    }

    /// Copies page `page` (of 4 KiB, from the start) to `into`; false if it is outside. Waits if it is absent.
    pub fn read_page(&self, page: u64, into: &mut [u8; PAGE_BYTES]) -> bool {
        let Some(at) = usize::try_from(page).ok().and_then(|p| p.checked_mul(PAGE_BYTES)) else {
            return false;
        };
        for (i, word) in into.chunks_exact_mut(8).enumerate() {
            match self.load(at + i * 8) {
                Some(value) => word.copy_from_slice(&value.to_ne_bytes()),
                None => return false,
            }
        }
        true
    }

    /// Gives `pages` pages (of 4 KiB) from `first` on back to the kernel, as a balloon does.
    ///
    /// Waits until the REMOVE event has been read, where the memory is registered with such events.
    pub fn discard(&self, first: u64, pages: u64) -> io::Result<()> {
        let (at, bytes) = self.range(first, pages)?;
        // SAFETY: DONTNEED turns the range's bytes to zero (or to faults); all readers use atomics and
        // expect any bytes.
        unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, at, bytes) }
    }

    /// Leaves `pages` pages (of 4 KiB) from `first` on out of core dumps. To the kernel they are a mapping of their
    /// own from then on.
    pub fn leave_out_of_dumps(&self, first: u64, pages: u64) -> io::Result<()> {
        let (at, bytes) = self.range(first, pages)?;
        self.map.advise_range(Advice::DontDump, at, bytes)
    }

    /// Where `pages` pages from `first` on begin in what is mapped, and their bytes.
    fn range(&self, first: u64, pages: u64) -> io::Result<(usize, usize)> {
        let all = (self.bytes / PAGE_BYTES) as u64;
        if first.checked_add(pages).is_none_or(|end| end > all) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "range outside the mapping"));
        }
        Ok((self.offset + first as usize * PAGE_BYTES, pages as usize * PAGE_BYTES))
    }
}

/// Addresses that hold nothing and never will: a mapping without any access rights, which memmap2 does not make.
#[derive(Debug)]
pub(super) struct Nowhere {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

impl Nowhere {
    pub(super) fn new(page_size: PageSize) -> io::Result<Self> {
        let (bytes, access) = (page_size.bytes() as usize, ProtFlags::empty());
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Nowhere { start, bytes })
    }
    pub(super) fn addr(&self) -> u64 {
        self.start.as_ptr() as u64
    }
    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64
    }
}

impl Drop for Nowhere {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size, and nothing can borrow from it.
        let done = unsafe { munmap(self.start.as_ptr(), self.bytes) };
        debug_assert!(done.is_ok());
    }
}
