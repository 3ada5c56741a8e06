//! The guest program as an ELF64 executable, as Firecracker boots it.
//!
//! Two loadable segments and nothing else: the program at [`PROGRAM_ADDR`], the parameter block at
//! [`PARAMS_ADDR`]. No notes: a PVH note would make Firecracker enter it in 32-bit mode.

use super::GuestParams;
use super::layout::{PARAMS_ADDR, PROGRAM_ADDR};

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const PAGE: u64 = 4096;

/// An executable of `program` and its parameters. Pure.
pub fn executable(program: &[u8], params: &GuestParams) -> Vec<u8> {
    let block = params.to_block();
    let program_at = PAGE;
    let params_at = program_at + (program.len() as u64).next_multiple_of(PAGE);
    let mut out = Vec::new();
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        out.extend_from_slice(&half.to_le_bytes()); // executable, x86-64
    }
    out.extend_from_slice(&1u32.to_le_bytes());
    for word in [PROGRAM_ADDR, HEADER_BYTES, 0] {
        out.extend_from_slice(&word.to_le_bytes()); // entry, program headers, no section headers
    }
    out.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, 2, 64, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    let segments = [(program_at, PROGRAM_ADDR, program.len()), (params_at, PARAMS_ADDR, block.len())];
    for (offset, address, length) in segments {
        for word in [1u32, 7] {
            out.extend_from_slice(&word.to_le_bytes()); // load; read, write, execute
        }
        for word in [offset, address, address, length as u64, length as u64, PAGE] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    out.resize(program_at as usize, 0);
    out.extend_from_slice(program);
    out.resize(params_at as usize, 0);
    out.extend_from_slice(&block);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_lie_where_the_headers_say() {
        let params = GuestParams::new(256, 9).expect("valid");
        let elf = executable(&[0x90; 5000], &params);
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"));
        assert_eq!(word(24), PROGRAM_ADDR, "entry");
        let second = HEADER_BYTES as usize + PROGRAM_HEADER_BYTES as usize;
        assert_eq!(word(second + 16), PARAMS_ADDR);
        let at = word(second + 8) as usize;
        assert_eq!(elf[at..], params.to_block());
        assert_eq!(elf[4096..4101], [0x90; 5]);
    }
}
