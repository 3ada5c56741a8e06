//! The guest program's bytes, assembled into this binary's read-only data by `global_asm!`.
//!
//! So neither an assembler nor a linker script is needed on the user's machine, and the constants the
//! program and the host share have one source: `guest::layout`.

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use crate::layout::{self, balloon, port, state};
    use crate::pattern;

    std::arch::global_asm!(
        ".pushsection .rodata.dormouse_guest, \"a\", @progbits",
        ".balign 16",
        ".hidden dormouse_guest_start",
        ".globl dormouse_guest_start",
        "dormouse_guest_start:",
        include_str!("../program.S"),
        include_str!("../balloon.S"),
        ".hidden dormouse_guest_end",
        ".globl dormouse_guest_end",
        "dormouse_guest_end:",
        ".popsection",
        PARAMS = const layout::PARAMS_ADDR,
        STATE = const layout::STATE_ADDR,
        ANSWERS = const layout::ANSWERS_ADDR,
        GENERATIONS = const layout::GENERATIONS_ADDR,
        MAGIC = const layout::PARAMS_MAGIC,
        PAGE_STEP = const pattern::PAGE_STEP,
        GENERATION_STEP = const pattern::GENERATION_STEP,
        S_GENERATION = const state::GENERATION,
        S_SUM = const state::SUM,
        S_LANES = const state::LANES,
        S_VALUES = const state::VALUES,
        S_BALLOON = const state::BALLOON,
        S_HELD = const state::HELD,
        S_POSTED = const state::POSTED,
        BALLOON_QUEUES = const balloon::QUEUES_ADDR,
        BALLOON_PFNS = const balloon::PFNS_ADDR,
        BALLOON_PD = const balloon::PAGE_DIRECTORY_ADDR,
        MMIO = const balloon::MMIO_ADDR,
        DATA_PORT = const port::SERIAL_DATA,
        STATUS_PORT = const port::SERIAL_STATUS,
        WRONG_COUNT_PORT = const port::WRONG_COUNT,
        GENERATION_PORT = const port::GENERATION,
        WRONG_PAGE_PORT = const port::WRONG_PAGE,
        options(att_syntax)
    );

    std::arch::global_asm!(
        ".pushsection .rodata.dormouse_guest_entry, \"a\", @progbits",
        ".balign 16",
        ".hidden dormouse_guest_entry_start",
        ".globl dormouse_guest_entry_start",
        "dormouse_guest_entry_start:",
        include_str!("../entry32.S"),
        ".hidden dormouse_guest_entry_end",
        ".globl dormouse_guest_entry_end",
        "dormouse_guest_entry_end:",
        ".popsection",
        TABLES = const layout::pvh::TABLES_ADDR,
        DESCRIPTORS = const layout::pvh::DESCRIPTORS_ADDR,
        PROGRAM = const layout::PROGRAM_ADDR,
        options(att_syntax)
    );

    unsafe extern "C" {
        static dormouse_guest_start: u8;
        static dormouse_guest_end: u8;
        static dormouse_guest_entry_start: u8;
        static dormouse_guest_entry_end: u8;
    }

    pub(crate) fn bytes() -> &'static [u8] {
        let start = &raw const dormouse_guest_start;
        let end = &raw const dormouse_guest_end;
        let length = (end as usize).saturating_sub(start as usize);
        // SAFETY: the two symbols bound one run of initialised, never written bytes of this binary's
        // read-only data, in this order (see the assembly above).
        unsafe { std::slice::from_raw_parts(start, length) }
    }

    pub(crate) fn entry32() -> &'static [u8] {
        let start = &raw const dormouse_guest_entry_start;
        let end = &raw const dormouse_guest_entry_end;
        let length = (end as usize).saturating_sub(start as usize);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(start, length) }
    }
}

/// The program's machine code, position independent, or `None` where this build has none (it is x86-64).
pub(crate) fn bytes() -> Option<&'static [u8]> {
    #[cfg(target_arch = "x86_64")]
    return Some(x86_64::bytes());
    #[cfg(not(target_arch = "x86_64"))]
    return None;
}

/// What enters it from 32-bit protected mode, to be loaded at [`layout::pvh::ENTRY_ADDR`](crate::layout::pvh).
pub(crate) fn entry32() -> Option<&'static [u8]> {
    #[cfg(target_arch = "x86_64")]
    return Some(x86_64::entry32());
    #[cfg(not(target_arch = "x86_64"))]
    return None;
}
