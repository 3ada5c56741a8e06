//! Ways to put pages into guest memory.

use std::sync::{Arc, OnceLock};

use crate::counters::Counters;
use crate::outcome::Outcome;
use crate::plan::{PageSize, Span};
use crate::sys::memory::Memory;
use crate::sys::region::RegionPages;

/// Puts pages into guest memory. Each call is one attempt: what to do about its [`Outcome`] is decided above.
///
/// An installer only ever fills pages that are missing, and wakes who waits for what it filled.
pub trait Installer: Send + Sync {
    /// Installs `bytes`, which are as long as `at`.
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome;
    /// Installs zeros.
    fn zero(&self, at: Span) -> Outcome;
    /// Makes touching the missing pages an error.
    fn poison(&self, at: Span) -> Outcome;
    /// Wakes who waits.
    fn wake(&self, at: Span);
}

/// Installs through the userfaultfd, into any process.
#[derive(Debug)]
pub struct UffdCopy {
    memory: Arc<Memory>,
    counters: Arc<Counters>,
    /// Zeros for a 2 MiB page, which UFFDIO_ZEROPAGE cannot make.
    huge_zeros: OnceLock<Box<[u8]>>,
}

impl UffdCopy {
    /// An installer into `memory`.
    pub fn new(memory: Arc<Memory>, counters: Arc<Counters>) -> Self {
        UffdCopy { memory, counters, huge_zeros: OnceLock::new() }
    }

    fn pages(&self, at: Span) -> Option<RegionPages<'_>> {
        self.memory.regions().get(at.region())?.pages(at.first_in_region(), at.cells())
    }
}

impl Installer for UffdCopy {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        let Some(pages) = self.pages(at) else { return Outcome::Refused(libc::EINVAL) };
        self.counters.copy_ioctls.add(1);
        pages.copy(bytes)
    }

    fn zero(&self, at: Span) -> Outcome {
        let Some(region) = self.memory.regions().get(at.region()) else {
            return Outcome::Refused(libc::EINVAL);
        };
        if region.page_size() == PageSize::Huge {
            let zeros = self.huge_zeros.get_or_init(|| vec![0; PageSize::Huge.bytes() as usize].into());
            return match self.copy(at.part(0, 1), zeros) {
                Outcome::Done if at.cells() > 1 => Outcome::Partial(1),
                outcome => outcome,
            };
        }
        let Some(pages) = self.pages(at) else { return Outcome::Refused(libc::EINVAL) };
        self.counters.zero_ioctls.add(1);
        pages.zero()
    }

    fn poison(&self, at: Span) -> Outcome {
        self.pages(at).map_or(Outcome::Refused(libc::EINVAL), |p| p.poison())
    }

    fn wake(&self, at: Span) {
        self.counters.wake_ioctls.add(1);
        if let Some(pages) = self.pages(at) {
            pages.wake();
        }
    }
}
