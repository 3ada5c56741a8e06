//! A disk: a base image under a stack of overlay layers.
//!
//! A request is cut at multiples of 128 KiB, and each piece is done under the lock of its place. No lock is held while
//! the base is waited for: after the wait the piece looks again at what lies over the base, so a fetch that returns late
//! never hides a newer write.

mod read;
mod seal;
mod status;
mod write;

use std::{
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use dormouse_core::PAGE_BYTES;

pub use self::{seal::SealedLayer, status::SectorKind};
use crate::{
    budget::Budget,
    error::{DiskError, Result},
    fetch::{Base, Counters, Fetchers},
    file::Directory,
    layer::Layer,
    map::Identity,
    source::PageSource,
    stack::Stack,
    states::PageState,
};

/// Pages under one lock: 128 KiB.
const PIECE_PAGES: u64 = 32;
const PIECE_BYTES: u64 = PIECE_PAGES * PAGE_BYTES as u64;
const LOCKS: usize = 64;

/// How long a request waits, and how far a disk reads ahead.
#[derive(Clone, Debug)]
pub struct Policy {
    /// How long a request waits for the base before it fails. The request after it waits anew.
    pub base_wait_max: Duration,
    /// How long a write waits for local space before it fails.
    pub space_wait_max: Duration,
    /// Most pages fetched ahead of a reader that reads in order; 0 for none.
    pub read_ahead_pages_max: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            base_wait_max: Duration::from_secs(60),
            space_wait_max: Duration::from_secs(600),
            read_ahead_pages_max: 512,
        }
    }
}

/// What a disk is made of.
pub struct DiskOptions {
    /// The base.
    pub source: Arc<dyn PageSource>,
    /// What the disk is.
    pub identity: Identity,
    /// Where its overlay is; `None` for a disk that takes no writes.
    pub overlay: Option<Arc<dyn Directory>>,
    /// The threads that fetch for it.
    pub fetchers: Arc<Fetchers>,
    /// The local space that it shares.
    pub budget: Arc<Budget>,
    /// How long it waits.
    pub policy: Policy,
}

/// An attached disk. Requests may come from any number of threads.
pub struct Disk {
    base: Arc<Base>,
    identity: Identity,
    overlay: Option<Overlay>,
    budget: Arc<Budget>,
    policy: Policy,
    locks: [RwLock<()>; LOCKS],
}

struct Overlay {
    directory: Arc<dyn Directory>,
    stack: RwLock<Stack>,
    /// One seal at a time.
    sealing: Mutex<()>,
}

/// Where a page's newest content is.
enum Holder<'a> {
    Layer(&'a Layer),
    Zeros,
    Base,
}

impl Disk {
    /// Opens a disk, and its overlay as the last flush left it.
    pub fn open(options: DiskOptions) -> Result<Self> {
        let DiskOptions { source, identity, overlay, fetchers, budget, policy } = options;
        identity.check().map_err(DiskError::Identity)?;
        let overlay = match overlay {
            None => None,
            Some(directory) => {
                let stack = Stack::open(&*directory, &identity)?;
                budget.charge(stack.held_bytes());
                Some(Overlay { directory, stack: RwLock::new(stack), sealing: Mutex::new(()) })
            }
        };
        let base = Arc::new(Base::new(source, fetchers, policy.base_wait_max, identity.pages()));
        let locks = std::array::from_fn(|_| RwLock::new(()));
        Ok(Disk { base, identity, overlay, budget, policy, locks })
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.identity.size_bytes
    }

    /// Whether it takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.overlay.is_none()
    }

    /// What it has asked its base for.
    pub fn counters(&self) -> &Counters {
        self.base.counters()
    }

    /// Bytes of memory that the disk holds for as long as it is attached.
    pub fn memory_bytes(&self) -> usize {
        let layers = self.overlay.as_ref().map_or(0, |overlay| {
            let stack = overlay.read();
            stack.layers().map(|layer| layer.memory_bytes()).sum()
        });
        size_of::<Self>() + layers
    }

    /// Makes all writes that were acknowledged before durable. After it failed once it never succeeds again.
    pub fn flush(&self) -> Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.read().live.flush(),
            None => Ok(()),
        }
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.size_bytes();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(DiskError::OutOfRange { offset, length, size }),
        }
    }

    fn writable(&self) -> Result<&Overlay> {
        self.overlay.as_ref().ok_or(DiskError::ReadOnly)
    }

    fn lock_of(&self, page: u64) -> &RwLock<()> {
        &self.locks[(page / PIECE_PAGES) as usize % LOCKS]
    }

    fn read_lock(&self, page: u64) -> RwLockReadGuard<'_, ()> {
        self.lock_of(page).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self, page: u64) -> RwLockWriteGuard<'_, ()> {
        self.lock_of(page).write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(overlay) = &self.overlay {
            self.budget.give_back(overlay.read().held_bytes());
        }
    }
}

impl Overlay {
    fn read(&self) -> RwLockReadGuard<'_, Stack> {
        self.stack.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Stack> {
        self.stack.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stack {
    /// The layers, the newest first.
    fn layers(&self) -> impl Iterator<Item = &Arc<Layer>> {
        std::iter::once(&self.live).chain(self.sealed.iter().rev())
    }

    fn held_bytes(&self) -> u64 {
        self.layers().map(|layer| layer.held_bytes()).sum()
    }

    fn holder(&self, page: u64) -> Holder<'_> {
        for layer in self.layers() {
            match layer.state(page) {
                PageState::Absent => {}
                PageState::Present => return Holder::Layer(layer),
                PageState::Zero => return Holder::Zeros,
            }
        }
        Holder::Base
    }
}

/// The parts of `offset..end` that lie between multiples of `step`.
fn pieces(offset: u64, end: u64, step: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let until = ((at / step + 1) * step).min(end);
        (at < end).then(|| std::mem::replace(&mut at, until)..until)
    })
}
