//! A small VMM of Dormouse's own: one x86-64 vCPU, no interrupts, a serial port.
//!
//! It is the example of linking Dormouse into a VMM, and a peer for tests. It takes memory it is given and
//! does not care how pages get there: a userfaultfd registered on that mapping serves KVM's accesses as well.
//!
//! ```no_run
//! # use dormouse_guest::*;
//! # use dormouse_minivm::*;
//! # fn demo(memory: vm_memory::GuestMemoryMmap, state: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//! let shell = VmShell::create()?; // needs no memory: do it while the snapshot opens
//! let mut vm = MiniVm::restore(shell, memory, state, Dirty::Tracked)?;
//! vm.send(Command::Answer);
//! vm.resume()?;
//! vm.console().wait_for(b'A', 1, std::time::Duration::from_secs(5))?;
//! # Ok(()) }
//! ```
//!
//! For tests and the demo; not published. All `unsafe` of the crate is in `sys`.
#![deny(unsafe_code)]

mod boot;
mod run;
#[expect(
    unsafe_code,
    reason = "memory slots, a signal handler and a vCPU's state are given to the kernel by address"
)]
mod sys;
pub mod timeline;
mod vcpu_state;

pub use dormouse_vmm_common::dirty;

use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::sys::memslot::VmWithMemory;
use dormouse_guest::state::{State, StateKind};
use dormouse_guest::{Command, Console, DirtyRun, Guest, GuestError, GuestKind, GuestParams, layout};
use run::Runner;
pub use timeline::{Phase, Timeline};

/// What went wrong in the VMM.
#[derive(Debug, thiserror::Error)]
pub enum MiniVmError {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm cannot be opened ({0}): is KVM there, and may this user read and write it?")]
    NoKvm(kvm_ioctls::Error),
    /// A KVM call failed.
    #[error("KVM refused to {what}: {error}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// KVM's answer.
        error: kvm_ioctls::Error,
    },
    /// Guest memory could not be written at boot.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// No thread or signal handler could be had.
    #[error("no thread for the guest: {0}")]
    Thread(std::io::Error),
    /// The guest has ended, by itself or because KVM could not run it.
    #[error("the guest has ended: {reason}")]
    Ended {
        /// What ended it.
        reason: String,
    },
    /// This build has no guest program.
    #[error("this build has no guest program: it is x86-64 code")]
    NoProgram,
}

impl From<MiniVmError> for GuestError {
    fn from(error: MiniVmError) -> Self {
        GuestError::Vmm(error.into())
    }
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MiniVmError {
    move |error| MiniVmError::Kvm { what, error }
}

/// Whether KVM is to record which pages the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// Yes: [`Guest::take_dirty`] gives them.
    Tracked,
    /// No.
    Untracked,
}

/// A VM with its vCPU, without memory or state: everything that can be made before a snapshot is open.
pub struct VmShell {
    kvm: Kvm,
    vm: VmFd,
    vcpu: VcpuFd,
    timeline: Timeline,
}

impl VmShell {
    /// Creates it, with a timeline that begins now.
    ///
    /// # Errors
    /// [`MiniVmError::NoKvm`] or [`MiniVmError::Kvm`].
    pub fn create() -> Result<Self, MiniVmError> {
        Self::create_with(Timeline::new())
    }

    /// Creates it, adding to `timeline`, which may have begun before this process (see [`Timeline`]).
    ///
    /// # Errors
    /// [`MiniVmError::NoKvm`] or [`MiniVmError::Kvm`].
    pub fn create_with(timeline: Timeline) -> Result<Self, MiniVmError> {
        crate::sys::kick::install().map_err(MiniVmError::Thread)?;
        let kvm_fd = Kvm::new().map_err(MiniVmError::NoKvm)?;
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        timeline.mark(Phase::VmCreated);
        let vcpu = vm.create_vcpu(0).map_err(kvm("create a vCPU"))?;
        timeline.mark(Phase::VcpuCreated);
        Ok(Self { kvm: kvm_fd, vm, vcpu, timeline })
    }
}

/// A virtual machine running the guest program. Dropping it ends it.
pub struct MiniVm {
    // Before `vm`: the vCPU thread must have ended when the slots go.
    runner: Runner,
    vm: VmWithMemory,
    kvm: Kvm,
    dirty: Dirty,
    timeline: Timeline,
}

impl MiniVm {
    /// A machine that will boot the guest program in `memory`, writing program, parameters and page tables.
    ///
    /// # Errors
    /// [`GuestError::Layout`] if `memory` does not suit `params`, else [`GuestError::Vmm`].
    pub fn boot(
        shell: VmShell,
        memory: GuestMemoryMmap,
        params: &GuestParams,
        dirty: Dirty,
    ) -> Result<Self, GuestError> {
        let params = params.checked()?;
        let spans = layout::fit(&params, &memory)?;
        boot::write_memory(&memory, &spans, &params)?;
        let cpuid = shell
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("list CPU features"))?;
        shell.vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPU features"))?;
        boot::set_registers(&shell.vcpu)?;
        shell.timeline.mark(Phase::StateSet);
        Ok(Self::assemble(shell, memory, dirty)?)
    }

    /// A machine that goes on where the one that gave `state` was paused. Touches no guest memory.
    ///
    /// # Errors
    /// [`GuestError::State`] if `state` is damaged or not this kind's, else [`GuestError::Vmm`].
    pub fn restore(
        shell: VmShell,
        memory: GuestMemoryMmap,
        state: &[u8],
        dirty: Dirty,
    ) -> Result<Self, GuestError> {
        let state = State::decode_for(state, StateKind::KvmX86_64)?;
        vcpu_state::load(&shell.vcpu, &state)?;
        shell.timeline.mark(Phase::StateSet);
        Ok(Self::assemble(shell, memory, dirty)?)
    }

    fn assemble(shell: VmShell, memory: GuestMemoryMmap, dirty: Dirty) -> Result<Self, MiniVmError> {
        let VmShell { kvm: kvm_fd, vm, vcpu, timeline } = shell;
        let vm =
            VmWithMemory::attach(vm, memory, dirty == Dirty::Tracked).map_err(kvm("take a memory region"))?;
        timeline.mark(Phase::MemoryAttached);
        let runner = Runner::new(vcpu, Console::default(), timeline.clone());
        Ok(Self { runner, vm, kvm: kvm_fd, dirty, timeline })
    }

    /// When what happened on the way to the first answer.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.vm.memory()
    }

    fn collect_dirty(&self) -> Result<Vec<DirtyRun>, MiniVmError> {
        let mut runs = Vec::new();
        for (slot, region) in self.vm.memory().iter().enumerate() {
            let words = self
                .vm
                .vm()
                .get_dirty_log(slot as u32, region.len() as usize)
                .map_err(kvm("give its dirty log"))?;
            dirty::runs_of_bitmap(&words, region.start_addr().0, &mut runs);
        }
        Ok(runs)
    }
}

impl Guest for MiniVm {
    fn kind(&self) -> GuestKind {
        GuestKind::Kvm
    }

    fn console(&self) -> &Console {
        self.runner.console()
    }

    fn send(&self, command: Command) {
        self.runner.console().push_input(command.byte());
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(self.runner.resume()?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(self.runner.pause()?)
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let vcpu = self.runner.paused_vcpu().ok_or(GuestError::Running)?;
        Ok(vcpu_state::save(&self.kvm, vcpu)?.encode())
    }

    fn take_dirty(&mut self) -> Result<Option<Vec<DirtyRun>>, GuestError> {
        self.runner.paused_vcpu().ok_or(GuestError::Running)?;
        match self.dirty {
            Dirty::Tracked => Ok(Some(self.collect_dirty()?)),
            Dirty::Untracked => Ok(None),
        }
    }
}

/// A handle to stop flags, shared by the machine and its vCPU thread.
type Flag = Arc<std::sync::atomic::AtomicBool>;
