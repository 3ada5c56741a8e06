//! Guest memory, in `vm-memory`'s types, over mappings that a userfaultfd serves.

use std::io;
use std::sync::Arc;

use dormouse_restore::{Mapping, PageSize};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory and the mappings below it.
///
/// Clones of the memory do not keep the mappings: this does. When it is dropped while clones live on, the
/// mappings stay for the rest of the process's life, so that the clones never dangle.
#[derive(Debug)]
pub(crate) struct GuestMapping {
    memory: GuestMemoryMmap,
    regions: Vec<(Arc<MmapRegion>, Arc<Mapping>)>,
}

impl GuestMapping {
    /// Maps `regions`, (guest-physical start, bytes), without touching them.
    ///
    /// # Errors
    /// The kernel's; `InvalidInput` for regions that overlap or are not whole pages.
    pub(crate) fn new(regions: &[(GuestAddress, usize)]) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let mut mapped = Vec::with_capacity(regions.len());
        let mut guest = Vec::with_capacity(regions.len());
        for &(start, bytes) in regions {
            let mapping = Arc::new(Mapping::new((bytes / 4096) as u64, PageSize::Small)?);
            if mapping.bytes() != bytes {
                return Err(invalid(format!("a region of {bytes} bytes is not whole pages of 4096")));
            }
            let address = mapping.addr() as *mut u8;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: the range is a mapping of just these bytes with this protection. It outlives the region:
            // it is unmapped only by `drop` below, once nobody else holds the region.
            let raw =
                unsafe { MmapRegion::build_raw(address, bytes, libc::PROT_READ | libc::PROT_WRITE, flags) };
            let region = Arc::new(raw.map_err(|e| invalid(e.to_string()))?);
            let one = GuestRegionMmap::with_arc(Arc::clone(&region), start);
            guest.push(one.ok_or_else(|| invalid(format!("the region at {:#x} wraps around", start.0)))?);
            mapped.push((region, mapping));
        }
        let memory = GuestMemoryMmap::from_regions(guest).map_err(|e| invalid(e.to_string()))?;
        Ok(Self { memory, regions: mapped })
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The mappings, in the order in which the regions were given.
    pub(crate) fn mappings(&self) -> Vec<Arc<Mapping>> {
        self.regions.iter().map(|(_, mapping)| Arc::clone(mapping)).collect()
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        self.memory = GuestMemoryMmap::new();
        for (region, mapping) in self.regions.drain(..) {
            // Fails if anybody, even by a weak reference, could still get at the region.
            if Arc::into_inner(region).is_none() {
                std::mem::forget(mapping);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn clones_of_the_memory_outlive_what_made_it() {
        let mapping =
            GuestMapping::new(&[(GuestAddress(0), 8192), (GuestAddress(1 << 32), 4096)]).expect("mapped");
        let memory = mapping.memory().clone();
        let weak: Vec<_> = mapping.mappings().iter().map(Arc::downgrade).collect();
        drop(mapping);
        assert_eq!(memory.num_regions(), 2);
        memory.write_obj(7u64, GuestAddress(1 << 32)).expect("still mapped");
        assert!(weak.iter().all(|w| w.strong_count() == 1));
    }

    #[test]
    fn mappings_go_with_the_last_holder() {
        let mapping = GuestMapping::new(&[(GuestAddress(0), 8192)]).expect("mapped");
        let weak = Arc::downgrade(&mapping.mappings()[0]);
        drop(mapping);
        assert_eq!(weak.strong_count(), 0);
    }
}
