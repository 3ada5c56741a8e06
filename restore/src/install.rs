//! Ways to put pages into guest memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::counters::Counters;
use crate::outcome::Outcome;
use crate::plan::{PageSize, Span};
use crate::sys::memory::Memory;
use crate::sys::region::RegionPages;
use crate::sys::staging::Staging;

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
    /// Whether it can, and should, install 2 MiB of small pages as one: see [`move_block`](Self::move_block).
    fn moves(&self) -> bool {
        false
    }
    /// Installs the 2 MiB put together in `block`, as one. Where that fails, `block` is as it was but for pages that
    /// were installed.
    fn move_block(&self, _at: Span, _block: &mut Staging) -> Outcome {
        Outcome::Unsupported(libc::EOPNOTSUPP)
    }
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

/// Installs into this process: blocks of 2 MiB by moving them into guest memory whole, all else as [`UffdCopy`].
///
/// A block costs about half of what copying its pages does, and the guest then runs on a page of 2 MiB. A page that is
/// half written cannot be seen: guest memory never shows anything of a block before the kernel has moved all of it.
#[derive(Debug)]
pub struct UffdMove {
    copy: UffdCopy,
    refused: AtomicBool,
}

impl UffdMove {
    /// An installer into `memory`, which must be of this process; otherwise nothing is moved.
    pub fn new(memory: Arc<Memory>, counters: Arc<Counters>) -> Self {
        let own = memory.regions().iter().all(|region| region.is_own());
        let refused = AtomicBool::new(!own || !Staging::may_be_one_page());
        UffdMove { copy: UffdCopy::new(memory, counters), refused }
    }
}

impl Installer for UffdMove {
    fn copy(&self, at: Span, bytes: &[u8]) -> Outcome {
        self.copy.copy(at, bytes)
    }

    fn zero(&self, at: Span) -> Outcome {
        self.copy.zero(at)
    }

    fn poison(&self, at: Span) -> Outcome {
        self.copy.poison(at)
    }

    fn wake(&self, at: Span) {
        self.copy.wake(at);
    }

    fn moves(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    fn move_block(&self, at: Span, block: &mut Staging) -> Outcome {
        let Some(pages) = self.copy.pages(at) else { return Outcome::Refused(libc::EINVAL) };
        self.copy.counters.move_ioctls.add(1);
        let outcome = pages.move_from(block);
        if let Outcome::Unsupported(errno) = outcome {
            // A kernel before 6.8, or memory of another kind: it will not do so later either.
            tracing::debug!(errno, "blocks are copied, not moved");
            self.refused.store(true, Ordering::Relaxed);
        }
        outcome
    }
}
