//! Handing guest memory to KVM.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

/// A VM together with the memory its slots point at, so that the memory cannot go first.
pub(crate) struct VmWithMemory {
    // Declared (and so dropped) before the memory its slots refer to.
    vm: VmFd,
    memory: GuestMemoryMmap,
}

impl VmWithMemory {
    /// Makes each region of `memory` a slot of `vm`, numbered in address order, with dirty logging on or off.
    ///
    /// # Errors
    /// KVM's, for the first region it refuses.
    pub(crate) fn attach(
        vm: VmFd,
        memory: GuestMemoryMmap,
        log_dirty: bool,
    ) -> Result<Self, kvm_ioctls::Error> {
        for (slot, region) in memory.iter().enumerate() {
            let region = slot_of(slot as u32, region, log_dirty)?;
            // SAFETY: the range is a live mapping of `region.memory_size` bytes owned by `memory`, which the
            // returned value keeps for as long as the VM; guest and host access it through volatile accesses.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(Self { vm, memory })
    }

    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

fn slot_of(
    slot: u32,
    region: &GuestRegionMmap,
    log_dirty: bool,
) -> Result<kvm_userspace_memory_region, kvm_ioctls::Error> {
    let host =
        region.get_host_address(MemoryRegionAddress(0)).map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))?;
    Ok(kvm_userspace_memory_region {
        slot,
        flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: host as u64,
    })
}
