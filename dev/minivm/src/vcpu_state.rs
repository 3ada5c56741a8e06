//! A vCPU's state, out of KVM and back into it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{MiniVmError, kvm};
use dormouse_guest::GuestError;
use dormouse_guest::state::{Section, State, StateError, StateKind};

/// Most model-specific registers a state may carry.
const MSRS_MAX: usize = 1024;

/// Reads everything this KVM has of a vCPU that is not running. What it lacks is left out.
pub(super) fn save(kvm_fd: &Kvm, vcpu: &mut VcpuFd) -> Result<State, MiniVmError> {
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("read CPU features"))?;
    let regs = vcpu.get_regs().map_err(kvm("read registers"))?;
    let sregs = vcpu.get_sregs().map_err(kvm("read special registers"))?;
    let events = vcpu.get_vcpu_events().map_err(kvm("read pending events"))?;
    let mut sections = vec![
        (Section::Cpuid, cpuid.as_slice().as_bytes().to_vec()),
        (Section::Regs, regs.as_bytes().to_vec()),
        (Section::Sregs, sregs.as_bytes().to_vec()),
        (Section::Msrs, read_msrs(kvm_fd, vcpu)?.as_slice().as_bytes().to_vec()),
        (Section::VcpuEvents, events.as_bytes().to_vec()),
    ];
    let optional = [
        (Section::Xsave, vcpu.get_xsave().map(|v| v.as_bytes().to_vec())),
        (Section::Xcrs, vcpu.get_xcrs().map(|v| v.as_bytes().to_vec())),
        (Section::DebugRegs, vcpu.get_debug_regs().map(|v| v.as_bytes().to_vec())),
        (Section::MpState, vcpu.get_mp_state().map(|v| v.as_bytes().to_vec())),
    ];
    for (section, bytes) in optional {
        match bytes {
            Ok(bytes) => sections.push((section, bytes)),
            Err(error) => tracing::debug!(?section, %error, "this KVM has no such state"),
        }
    }
    Ok(State { kind: StateKind::KvmX86_64, sections })
}

/// The registers KVM names and can read. It stops at one it cannot, which is then skipped.
fn read_msrs(kvm_fd: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, MiniVmError> {
    let list = kvm_fd.get_msr_index_list().map_err(kvm("list model-specific registers"))?;
    let mut wanted: Vec<kvm_msr_entry> = list
        .as_slice()
        .iter()
        .take(MSRS_MAX)
        .map(|&index| kvm_msr_entry { index, ..Default::default() })
        .collect();
    let mut read = Vec::new();
    while !wanted.is_empty() {
        let mut batch = msrs(&wanted)?;
        let done = vcpu.get_msrs(&mut batch).map_err(kvm("read model-specific registers"))?;
        read.extend_from_slice(&batch.as_slice()[..done.min(wanted.len())]);
        wanted.drain(..(done + 1).min(wanted.len()));
    }
    Ok(read)
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, MiniVmError> {
    Msrs::from_entries(entries).map_err(|_| MiniVmError::Kvm {
        what: "take so many model-specific registers",
        error: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

/// Loads `state` into a fresh vCPU, in the order KVM needs: features first, pending events last.
pub(super) fn load(vcpu: &VcpuFd, state: &State) -> Result<(), GuestError> {
    let entries: Vec<kvm_cpuid_entry2> = list(state, Section::Cpuid, KVM_MAX_CPUID_ENTRIES)?;
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| StateError::Content { section: Section::Cpuid, what: "too many entries" })?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPU features"))?;
    vcpu.set_sregs(&required(state, Section::Sregs)?).map_err(kvm("set special registers"))?;
    vcpu.set_regs(&required(state, Section::Regs)?).map_err(kvm("set registers"))?;
    if let Some(xcrs) = optional(state, Section::Xcrs)? {
        vcpu.set_xcrs(&xcrs).map_err(kvm("set extended control registers"))?;
    }
    if let Some(xsave) = optional(state, Section::Xsave)? {
        load_xsave(vcpu, &xsave)?;
    }
    if let Some(debug) = optional(state, Section::DebugRegs)? {
        vcpu.set_debug_regs(&debug).map_err(kvm("set debug registers"))?;
    }
    load_msrs(vcpu, list(state, Section::Msrs, MSRS_MAX)?)?;
    if let Some(mp_state) = optional(state, Section::MpState)? {
        vcpu.set_mp_state(mp_state).map_err(kvm("set the vCPU's run state"))?;
    }
    let events = required(state, Section::VcpuEvents)?;
    vcpu.set_vcpu_events(&events).map_err(kvm("set pending events"))?;
    Ok(())
}

fn load_xsave(vcpu: &VcpuFd, xsave: &kvm_bindings::kvm_xsave) -> Result<(), MiniVmError> {
    crate::sys::xsave::set(vcpu, xsave).map_err(kvm("set floating-point state"))
}

/// KVM stops at a register it cannot set. One that already has its value does not matter; any other does.
fn load_msrs(vcpu: &VcpuFd, mut wanted: Vec<kvm_msr_entry>) -> Result<(), MiniVmError> {
    while !wanted.is_empty() {
        let done = vcpu.set_msrs(&msrs(&wanted)?).map_err(kvm("set model-specific registers"))?;
        if let Some(refused) = wanted.get(done) {
            let mut now = msrs(&[kvm_msr_entry { index: refused.index, ..Default::default() }])?;
            let read = vcpu.get_msrs(&mut now).map_err(kvm("read a model-specific register"))?;
            if read != 1 || now.as_slice()[0].data != refused.data {
                tracing::warn!(index = refused.index, data = refused.data, "KVM keeps its own value");
            }
        }
        wanted.drain(..(done + 1).min(wanted.len()));
    }
    Ok(())
}

fn required<T: FromBytes>(state: &State, section: Section) -> Result<T, StateError> {
    optional(state, section)?.ok_or(StateError::Content { section, what: "missing" })
}

fn optional<T: FromBytes>(state: &State, section: Section) -> Result<Option<T>, StateError> {
    let Some(bytes) = state.section(section) else { return Ok(None) };
    let what = "not of the size of the kernel's structure";
    T::read_from_bytes(bytes).map(Some).map_err(|_| StateError::Content { section, what })
}

fn list<T: FromBytes + IntoBytes + Immutable>(
    state: &State,
    section: Section,
    max: usize,
) -> Result<Vec<T>, StateError> {
    let bytes = state.section(section).ok_or(StateError::Content { section, what: "missing" })?;
    let entry = size_of::<T>();
    if bytes.len() % entry != 0 || bytes.len() / entry > max {
        return Err(StateError::Content {
            section,
            what: "not a list of the kernel's structure, or too long",
        });
    }
    let read =
        |bytes| T::read_from_bytes(bytes).map_err(|_| StateError::Content { section, what: "unreadable" });
    bytes.chunks_exact(entry).map(read).collect()
}
