//! What the guest program finds when it is entered: memory and registers.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{MiniVmError, kvm};
use dormouse_guest::GuestParams;
use dormouse_guest::layout::{self, Span};

// As in Firecracker: its guest must find the same.
const PML4_ADDR: u64 = 0x9000;
const PDPT_ADDR: u64 = 0xa000;
const PD_ADDR: u64 = 0xb000;

const PRESENT_WRITABLE_ACCESSED: u64 = 0x23;
/// Present, writable, accessed, dirty, 2 MiB. Accessed and dirty are set from the start, so that the tables
/// are not written by merely walking them.
const LARGE_PAGE: u64 = 0xe3;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const PD_COVERS_BYTES: u64 = 1 << 30;

const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
const CR4: u64 = 0x620; // PAE OSFXSR OSXMMEXCPT
const EFER: u64 = 0x500; // LMA LME

/// Writes program, parameters and page tables.
pub(super) fn write_memory(
    memory: &GuestMemoryMmap,
    spans: &[Span],
    params: &GuestParams,
) -> Result<(), MiniVmError> {
    let program = dormouse_guest::program().ok_or(MiniVmError::NoProgram)?;
    // Program and parameters lie low in the first span, where linear and physical are the same.
    memory.write_slice(program, GuestAddress(layout::PROGRAM_ADDR))?;
    memory.write_slice(&params.to_block(), GuestAddress(layout::PARAMS_ADDR))?;
    write_page_tables(memory, spans)
}

fn write_page_tables(memory: &GuestMemoryMmap, spans: &[Span]) -> Result<(), MiniVmError> {
    memory.write_obj(PDPT_ADDR | PRESENT_WRITABLE_ACCESSED, GuestAddress(PML4_ADDR))?;
    for span in spans {
        for offset in (0..span.bytes).step_by(LARGE_PAGE_BYTES as usize) {
            let linear = span.linear + offset;
            let directory = PD_ADDR + linear / PD_COVERS_BYTES * layout::PAGE_BYTES;
            let entry = linear % PD_COVERS_BYTES / LARGE_PAGE_BYTES;
            memory.write_obj((span.physical + offset) | LARGE_PAGE, GuestAddress(directory + entry * 8))?;
            if entry == 0 {
                let entry = linear / PD_COVERS_BYTES;
                let value = directory | PRESENT_WRITABLE_ACCESSED;
                memory.write_obj(value, GuestAddress(PDPT_ADDR + entry * 8))?;
            }
        }
    }
    Ok(())
}

/// 64-bit mode, flat segments, no interrupts, the first instruction of the program.
pub(super) fn set_registers(vcpu: &VcpuFd) -> Result<(), MiniVmError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("read special registers"))?;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x8, type_: 11, l: 1, db: 0, ..data };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.cr0 = CR0;
    sregs.cr3 = PML4_ADDR;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs).map_err(kvm("set special registers"))?;
    let regs = kvm_regs { rip: layout::PROGRAM_ADDR, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(kvm("set registers"))
}
