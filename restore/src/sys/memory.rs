//! The guest memory of one VM: a userfaultfd and the regions registered with it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::mapping::Mapping;
use super::region::RegisteredRegion;
use super::uffd::{Uffd, UffdError};
use crate::plan::PageSize;

/// A userfaultfd and the regions registered with it, in the order of the plan.
#[derive(Debug)]
pub struct Memory {
    uffd: Uffd,
    regions: Vec<RegisteredRegion>,
}

/// A region as a VMM announces it: a range of *its* address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnouncedRegion {
    /// Address of the first byte.
    pub address: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// What backs it.
    pub page_size: PageSize,
}

impl Memory {
    /// Registers mappings of this process with `uffd`.
    pub fn own(uffd: Uffd, mappings: &[Arc<Mapping>]) -> Result<Self, UffdError> {
        let regions = mappings.iter().map(|m| uffd.register(m)).collect::<Result<_, _>>()?;
        Ok(Memory { uffd, regions })
    }

    /// Takes over the userfaultfd of another process and the regions it says it registered.
    ///
    /// Overlapping regions are refused, as one page would then have two states.
    pub fn adopt(fd: OwnedFd, announced: &[AnnouncedRegion]) -> Result<Self, UffdError> {
        let uffd = Uffd::adopt(fd)?;
        let mut regions = Vec::with_capacity(announced.len().min(crate::plan::REGIONS_MAX));
        for r in announced.iter().take(crate::plan::REGIONS_MAX + 1) {
            regions.push(uffd.announced(r.address, r.bytes, r.page_size)?);
        }
        let mut sorted: Vec<&RegisteredRegion> = regions.iter().collect();
        sorted.sort_by_key(|r| r.start());
        for pair in sorted.windows(2) {
            if let [a, b] = pair
                && a.start() + a.bytes() > b.start()
            {
                return Err(UffdError::Overlap { first: a.start(), second: b.start() });
            }
        }
        Ok(Memory { uffd, regions })
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[RegisteredRegion] {
        &self.regions
    }

    /// The region that `address` lies in, and the page (of its size) within it.
    pub fn find(&self, address: u64) -> Option<(usize, u64)> {
        let index =
            self.regions.iter().position(|r| (r.start()..r.start() + r.bytes()).contains(&address))?;
        let region = &self.regions[index];
        Some((index, (address - region.start()) / region.page_size().bytes()))
    }
}
