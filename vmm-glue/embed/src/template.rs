//! One snapshot for any number of machines, its first pages where a policy says.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_chunkstore::{Snapshot, Store, StoreError};
use dormouse_core::Name;
use vm_memory::GuestAddress;

use super::wake::{Wake, WakeError, Woken, wake_opened};
use dormouse_wake::Opened;

/// Where first pages are kept between machines. The nearer, the faster the next machine wakes, and the dearer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// Decoded in this process's memory, up to 1 GiB: each machine costs the copying of them and nothing else.
    Hot,
    /// On this host's disk, where they do not make way for others (until [`Store::cool`]).
    Warm,
    /// In the object store only.
    Cold,
    /// Warm while there is room; hot from the second machine on.
    #[default]
    AsNeeded,
}

/// Where first pages are now, as seen from this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Decoded in its memory.
    Hot,
    /// On its host's disk.
    Warm,
    /// In the object store only.
    Cold,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Hot => "hot",
            Tier::Warm => "warm",
            Tier::Cold => "cold",
        })
    }
}

/// A snapshot opened so that machines wake from it.
#[derive(Debug)]
pub struct Template {
    opened: Opened,
    keep: Keep,
    wakes: AtomicU64,
}

impl Template {
    /// Opens the snapshot that `name` stands for now, and begins to bring its first pages where `keep` says.
    ///
    /// # Errors
    /// The store's; a snapshot without memory; no thread could be started.
    pub fn open(store: &Store, name: &Name, keep: Keep) -> Result<Self, WakeError> {
        match keep {
            // A local store is its own disk, and nothing has to be brought; a store without a cache cannot.
            Keep::Warm => match store.warm(name) {
                Err(StoreError::Usage(why)) => {
                    tracing::debug!(why, "first pages are not brought to this host")
                }
                other => drop(other?),
            },
            Keep::Cold => drop(store.cool(name)),
            Keep::Hot | Keep::AsNeeded => {}
        }
        let opened = Opened::open(store, name)?;
        let opened = if keep == Keep::Cold { opened.cold() } else { opened };
        if keep == Keep::Hot {
            opened.decode_ahead(true)?;
        }
        Ok(Self { opened, keep, wakes: AtomicU64::new(0) })
    }

    /// Wakes a machine: as [`super::wake()`].
    ///
    /// # Errors
    /// [`WakeError`].
    pub fn wake(&self, regions: &[(GuestAddress, usize)], wake: Wake) -> Result<Woken, WakeError> {
        let first = self.wakes.fetch_add(1, Ordering::Relaxed) == 0;
        if self.keep == Keep::AsNeeded && !first {
            self.opened.decode_ahead(true)?;
        }
        wake_opened(self.opened.clone(), regions, wake)
    }

    /// The device state called `id`, as it was given to [`super::Sleep::state`].
    ///
    /// # Errors
    /// The store's.
    pub fn state(&self, id: &str) -> Result<Vec<u8>, StoreError> {
        self.opened.state(id)
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        self.opened.snapshot()
    }

    /// Where its first pages are now.
    pub fn tier(&self) -> Tier {
        let reference = self.snapshot().reference();
        match self.snapshot().store().tier(&reference.name, reference.snapshot) {
            _ if self.opened.is_hot() => Tier::Hot,
            dormouse_chunkstore::Tier::Warm => Tier::Warm,
            dormouse_chunkstore::Tier::Cold => Tier::Cold,
        }
    }
}
