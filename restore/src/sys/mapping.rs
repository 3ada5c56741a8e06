//! Memory of our own process: guest memory of an own VMM, of the tests, and files that a VMM maps too.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_core::page::PAGE_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::plan::PageSize;

/// A private anonymous mapping, or a shared one of a memory file, unmapped on drop. Nothing is allocated until it
/// is touched.
///
/// Its bytes may change under us at any time (a guest runs on them), so they are only ever read and written
/// as atomic words, never lent out as slices.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<AtomicU64>,
    bytes: usize,
    page_size: PageSize,
}

// SAFETY: the mapping belongs to no thread, and all access to its bytes goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pages` pages of 4 KiB, backed by pages of `page_size`, of which it must be a multiple.
    ///
    /// With 2 MiB pages the kernel must have that many free (`/proc/sys/vm/nr_hugepages`), else touching the
    /// memory, or installing into it, fails; without them this call may already fail.
    pub fn new(pages: u64, page_size: PageSize) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidInput, "not a positive number of whole pages");
        if pages == 0 || !pages.is_multiple_of(page_size.pages()) {
            return Err(bad());
        }
        let bytes = usize::try_from(pages).ok().and_then(|p| p.checked_mul(PAGE_BYTES)).ok_or_else(bad)?;
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if page_size == PageSize::Huge {
            // Reserved, unlike small pages: a hugetlb page that is not there at install time is SIGBUS.
            flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        let start = NonNull::new(start.cast()).ok_or_else(bad)?;
        Ok(Mapping { start, bytes, page_size })
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
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists; its bytes may
        // change at any time, which this type allows for.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, flags, file, offset) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| bad("mapped nowhere"))?;
        Ok(Mapping { start, bytes, page_size: PageSize::Small })
    }

    /// The address of the first byte, for handing to KVM.
    pub fn addr(&self) -> u64 {
        self.start.as_ptr() as u64
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
        let word = unsafe { self.start.add(offset / 8) };
        // SAFETY: aligned (mappings start on a page), inside memory that lives as long as `self`, and
        // only ever accessed atomically by us.
        Some(unsafe { word.as_ref() })
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
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "range outside the mapping");
        let all = (self.bytes / PAGE_BYTES) as u64;
        if first.checked_add(pages).is_none_or(|end| end > all) {
            return Err(outside());
        }
        let words = first as usize * PAGE_BYTES / 8;
        // SAFETY: inside the mapping, as checked above.
        let start = unsafe { self.start.add(words) };
        // SAFETY: DONTNEED turns the range's bytes to zero (or to faults); all readers use atomics and
        // expect any bytes.
        unsafe { madvise(start.as_ptr().cast(), pages as usize * PAGE_BYTES, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size, and nothing borrows from `self` any more.
        let done = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(done.is_ok());
    }
}

/// Addresses that hold nothing and never will: a mapping without any access rights.
#[derive(Debug)]
pub(super) struct Nowhere(Mapping);

impl Nowhere {
    pub(super) fn new(page_size: PageSize) -> io::Result<Self> {
        let bytes = page_size.bytes() as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // Never read: no method of the inner Mapping is offered.
        Ok(Nowhere(Mapping { start, bytes, page_size: PageSize::Small }))
    }
    pub(super) fn addr(&self) -> u64 {
        self.0.addr()
    }
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes as u64
    }
}
