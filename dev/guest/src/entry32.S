# How the guest program is entered where a VMM boots by PVH: in 32-bit protected mode with flat segments, without
# paging. `elf.rs` puts the page tables and the segments' descriptors where this expects them.

    .code32
    mov ${TABLES}, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdt {DESCRIPTORS}
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmp $8, ${PROGRAM}
    .code64
