//! Registered guest memory, and the only ways to install into it.

use std::sync::Arc;

use super::abi::{self, RangeOp};
use super::mapping::{Mapping, Nowhere};
use super::staging::Staging;
use super::uffd::{Inner, Uffd, UffdError};
use crate::outcome::{Outcome, classify};
use crate::plan::PageSize;

/// A range of a VM's address space whose missing pages fault to us. Holds the userfaultfd open, and the
/// memory mapped if it is our own.
#[derive(Debug)]
pub struct RegisteredRegion {
    inner: Arc<Inner>,
    start: u64,
    bytes: u64,
    page_size: PageSize,
    own: Option<Arc<Mapping>>,
}

impl RegisteredRegion {
    pub(super) fn new(
        uffd: &Uffd,
        start: u64,
        bytes: u64,
        page_size: PageSize,
        own: Option<Arc<Mapping>>,
    ) -> Result<Self, UffdError> {
        let page_bytes = page_size.bytes();
        let aligned = start.is_multiple_of(page_bytes) && bytes.is_multiple_of(page_bytes);
        if bytes == 0 || !aligned || start.checked_add(bytes).is_none() {
            return Err(UffdError::BadRange { address: start, bytes, page_bytes });
        }
        Ok(RegisteredRegion { inner: uffd.0.clone(), start, bytes, page_size, own })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Address of the first byte, in the VM's address space.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its page size.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Whether it is memory of this process.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// `pages` pages (of the region's size) from the `first`-th on, or `None` if they are not all inside.
    pub fn pages(&self, first: u64, pages: u64) -> Option<RegionPages<'_>> {
        let unit = self.page_size.bytes();
        let end = first.checked_add(pages)?.checked_mul(unit)?;
        (pages > 0 && end <= self.bytes).then(|| RegionPages {
            region: self,
            start: self.start + first * unit,
            bytes: pages * unit,
        })
    }

    /// Stops faults to us: pages missing from here on are zero pages. Whoever waits is woken.
    pub fn unregister(&self) -> Result<(), UffdError> {
        self.inner
            .uffd
            .unregister(self.start as *mut libc::c_void, self.bytes as usize)
            .map_err(|e| UffdError::Io { what: "unregistering a region", error: std::io::Error::other(e) })
    }

    /// Whether a thread of the VM is about to give memory back, and waits for its event to be read, or will. The
    /// kernel counts these, and answers EAGAIN to every install meanwhile. Installs nothing.
    pub fn is_changing(&self) -> bool {
        let probe = |nowhere| abi::copy_from_nowhere(self.inner.fd(), self.start, &nowhere);
        Nowhere::new(self.page_size).is_ok_and(|nowhere| probe(nowhere) == Some(libc::EAGAIN))
    }

    /// Whether the VM's address space still exists. Installs nothing.
    pub fn is_alive(&self) -> bool {
        match Nowhere::new(self.page_size) {
            Ok(nowhere) => abi::copy_from_nowhere(self.inner.fd(), self.start, &nowhere) != Some(libc::ESRCH),
            // Not to be told; the next install will say.
            Err(_) => true,
        }
    }
}

/// Pages checked to lie inside their registered region.
#[derive(Clone, Copy, Debug)]
pub struct RegionPages<'r> {
    region: &'r RegisteredRegion,
    start: u64,
    bytes: u64,
}

impl RegionPages<'_> {
    fn outcome(&self, (errno, progress): (Option<i32>, i64)) -> Outcome {
        classify(errno, progress, self.bytes, self.region.page_size.bytes())
    }

    /// Installs `bytes`, which must be as long as the pages, in one UFFDIO_COPY, and wakes who waits.
    pub fn copy(&self, bytes: &[u8]) -> Outcome {
        if bytes.len() as u64 != self.bytes {
            return Outcome::Refused(libc::EINVAL);
        }
        // SAFETY: the range lies inside a region its owner registered with this userfaultfd to be filled.
        self.outcome(unsafe { abi::copy(self.region.inner.fd(), self.start, bytes) })
    }

    /// Installs these 2 MiB, which must begin on a boundary of that size, by moving the pages of `staging` here as one:
    /// no byte is copied, and `staging` is empty afterwards. Wakes who waits. Own memory of small pages only; Linux 6.8.
    pub fn move_from(&self, staging: &mut Staging) -> Outcome {
        let whole = self.bytes == Staging::BYTES as u64 && self.start.is_multiple_of(self.bytes);
        if !whole || !self.region.is_own() || self.region.page_size != PageSize::Small {
            return Outcome::Unsupported(libc::EINVAL);
        }
        // SAFETY: the target lies inside a registered region of our own process; the source is private anonymous memory
        // that is held exclusively (`&mut`), and whose type allows its bytes to turn to zero.
        self.outcome(unsafe {
            abi::move_pages(self.region.inner.fd(), self.start, staging.addr(), self.bytes)
        })
    }

    /// Installs zero pages in one UFFDIO_ZEROPAGE and wakes who waits. Not for 2 MiB pages.
    pub fn zero(&self) -> Outcome {
        // SAFETY: as in `copy`.
        self.outcome(unsafe { abi::range(self.region.inner.fd(), RangeOp::Zero, self.start, self.bytes) })
    }

    /// Poisons the pages that are missing: touching them raises SIGBUS. Wakes who waits. Linux 6.6.
    pub fn poison(&self) -> Outcome {
        // SAFETY: as in `copy`.
        self.outcome(unsafe { abi::range(self.region.inner.fd(), RangeOp::Poison, self.start, self.bytes) })
    }

    /// Wakes who waits for these pages; who still misses them faults again.
    pub fn wake(&self) {
        let woken = self.region.inner.uffd.wake(self.start as *mut libc::c_void, self.bytes as usize);
        // Fails only for ranges that are empty or unaligned, which these are not.
        debug_assert!(woken.is_ok());
    }
}
