//! Loading a vCPU's floating-point state.

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

/// Sets the state kept in the 4 KiB `KVM_GET_XSAVE` gives.
///
/// # Errors
/// KVM's.
pub(crate) fn set(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel reads more than the 4 KiB of `xsave` only if the process enabled dynamic features
    // (AMX) by `arch_prctl`, which nothing here does.
    unsafe { vcpu.set_xsave(xsave) }
}
