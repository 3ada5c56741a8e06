//! The guest program as an ELF64 executable, as Firecracker and Cloud Hypervisor boot it.
//!
//! Loadable segments and nothing else: the program at [`PROGRAM_ADDR`], the parameter block at [`PARAMS_ADDR`]. For
//! Cloud Hypervisor, which boots by PVH, also a note with a 32-bit entry, and what leads from there to the program. Not for
//! Firecracker, which would heed the note.

use super::GuestParams;
use super::layout::{PARAMS_ADDR, PROGRAM_ADDR, pvh};

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
/// Kinds of segments.
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// Present and writable; and large.
const TABLE: u64 = 3;
const LARGE: u64 = 0x83;
/// None, 64-bit code, data.
const DESCRIPTORS: [u64; 3] = [0, 0x00af_9a00_0000_ffff, 0x00cf_9200_0000_ffff];

struct Segment {
    kind: u32,
    address: u64,
    bytes: Vec<u8>,
}

/// An executable of `program` and its parameters. Pure.
pub fn executable(program: &[u8], params: &GuestParams) -> Vec<u8> {
    written(PROGRAM_ADDR, &loaded(program, params))
}

/// The same for a VMM that boots by PVH; `entry32` is [`super::entry32`]. It covers 1 GiB of memory. Pure.
pub fn pvh_executable(entry32: &[u8], program: &[u8], params: &GuestParams) -> Vec<u8> {
    let mut segments = loaded(program, params);
    segments.push(Segment { kind: LOAD, address: pvh::ENTRY_ADDR, bytes: entry(entry32) });
    segments.push(Segment { kind: NOTE, address: 0, bytes: note() });
    written(pvh::ENTRY_ADDR, &segments)
}

fn loaded(program: &[u8], params: &GuestParams) -> Vec<Segment> {
    let load = |address, bytes: &[u8]| Segment { kind: LOAD, address, bytes: bytes.to_vec() };
    vec![load(PROGRAM_ADDR, program), load(PARAMS_ADDR, &params.to_block())]
}

/// The code at the entry, the segments' descriptors, and page tables that show 1 GiB where it is.
fn entry(entry32: &[u8]) -> Vec<u8> {
    let mut out = entry32.to_vec();
    let at = |address: u64| (address - pvh::ENTRY_ADDR) as usize;
    out.resize(at(pvh::DESCRIPTORS_ADDR), 0);
    let descriptors_at = pvh::DESCRIPTORS_ADDR + 8;
    out.extend_from_slice(&(size_of_val(&DESCRIPTORS) as u16 - 1).to_le_bytes());
    out.extend_from_slice(&(descriptors_at as u32).to_le_bytes());
    out.resize(at(descriptors_at), 0);
    DESCRIPTORS.iter().for_each(|d| out.extend_from_slice(&d.to_le_bytes()));
    out.resize(at(pvh::TABLES_ADDR), 0);
    for level in [1, 2] {
        out.extend_from_slice(&((pvh::TABLES_ADDR + level * PAGE) | TABLE).to_le_bytes());
        out.resize(at(pvh::TABLES_ADDR + level * PAGE), 0);
    }
    (0..512).for_each(|page: u64| out.extend_from_slice(&((page * LARGE_PAGE) | LARGE).to_le_bytes()));
    out
}

/// `XEN_ELFNOTE_PHYS32_ENTRY`, by which a VMM knows where to enter.
fn note() -> Vec<u8> {
    let mut out = Vec::new();
    for word in [4u32, 4, 18] {
        out.extend_from_slice(&word.to_le_bytes()); // bytes of the name and of the value, the kind
    }
    out.extend_from_slice(b"Xen\0");
    out.extend_from_slice(&(pvh::ENTRY_ADDR as u32).to_le_bytes());
    out
}

fn written(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        out.extend_from_slice(&half.to_le_bytes()); // executable, x86-64
    }
    out.extend_from_slice(&1u32.to_le_bytes());
    for word in [entry, HEADER_BYTES, 0] {
        out.extend_from_slice(&word.to_le_bytes()); // entry, program headers, no section headers
    }
    out.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, segments.len() as u16, 64, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = PAGE;
    for Segment { kind, address, bytes } in segments {
        let length = bytes.len() as u64;
        for word in [*kind, 7] {
            out.extend_from_slice(&word.to_le_bytes()); // read, write, execute
        }
        let align = if *kind == NOTE { 4 } else { PAGE };
        for word in [offset, *address, *address, length, length, align] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        offset += length.next_multiple_of(PAGE);
    }
    for Segment { bytes, .. } in segments {
        out.resize(out.len().next_multiple_of(PAGE as usize), 0);
        out.extend_from_slice(bytes);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(elf: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"))
    }

    #[test]
    fn segments_lie_where_the_headers_say() {
        let params = GuestParams::new(256, 9).expect("valid");
        let elf = executable(&[0x90; 5000], &params);
        assert_eq!(word(&elf, 24), PROGRAM_ADDR, "entry");
        let second = HEADER_BYTES as usize + PROGRAM_HEADER_BYTES as usize;
        assert_eq!(word(&elf, second + 16), PARAMS_ADDR);
        let at = word(&elf, second + 8) as usize;
        assert_eq!(elf[at..], params.to_block());
        assert_eq!(elf[4096..4101], [0x90; 5]);
    }

    #[test]
    fn a_vmm_that_boots_by_pvh_finds_its_entry_and_what_leads_from_there() {
        let params = GuestParams::new(256, 9).expect("valid");
        let entry32 = super::super::entry32().expect("x86-64");
        assert!(entry32.len() < 0x100, "it ends before the descriptors");
        let elf = pvh_executable(entry32, &[0x90; 5000], &params);
        let header = |n: usize| HEADER_BYTES as usize + n * PROGRAM_HEADER_BYTES as usize;
        let note = word(&elf, header(3) + 8) as usize;
        assert_eq!(elf[note + 12..note + 16], *b"Xen\0");
        assert_eq!(elf[note + 16..], (pvh::ENTRY_ADDR as u32).to_le_bytes());
        let entry = word(&elf, header(2) + 8) as usize;
        assert_eq!(word(&elf, header(2) + 16), pvh::ENTRY_ADDR);
        assert_eq!(elf[entry..entry + entry32.len()], *entry32);
        // The last of 512 large pages, in the third table.
        let tables = entry + (pvh::TABLES_ADDR - pvh::ENTRY_ADDR) as usize;
        assert_eq!(word(&elf, tables + 3 * 4096 - 8), (511 * LARGE_PAGE) | LARGE);
    }
}
