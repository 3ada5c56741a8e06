# The balloon driver of the guest program: virtio 1 over Firecracker's MMIO transport, no interrupts. Used only if
# the parameters ask for it. Part of the same program as `program.S`, with its macros and conventions.
#
# The n-th page given back is number 2n + 1, so that every one has neighbours that stay, in the same frames. They
# are given back and taken again at most 256 at once and once a pass, last in, first out; always four of each
# group of eight. Each queue has one entry: a descriptor at 0, the avail ring at 0x20, the used ring at 0x40.

    # Waits until the device has used what was last put into `queue`.
    .macro wait_used queue
    mov ${BALLOON_QUEUES}+0x80*\queue, %edi
9:  pause
    mov 0x22(%rdi), %ax
    cmp 0x42(%rdi), %ax
    jne 9b
    .endm

    # %rax = the word that page %rsi carried when it was last this guest's. %r8, %r9: the steps. Clobbers %rdx.
    .macro old_word
    mov {GENERATIONS}(,%rsi,4), %eax
    imul %r9, %rax
    mov %rsi, %rdx
    imul %r8, %rdx
    add %rdx, %rax
    add 24(%rbp), %rax
    .endm

    # Of the pages from the %edx-th on: %rsi = the number of the first, %rdi = its address.
    .macro first_page
    lea 1(,%rdx,2), %esi
    mov %rsi, %rdi
    shl $12, %rdi
    add 16(%rbp), %rdi
    .endm

    # Finds the device and starts it. Firecracker maps the first GiB, devices are in the last of four: one more
    # page directory, with one uncached 2 MiB page.
.Lballoon_find:
    mov ${BALLOON_PD}, %edi
    mov ${MMIO}+0x93, %eax
    mov %rax, 1024(%rdi)
    mov %cr3, %rax
    and $-4096, %rax
    mov (%rax), %rax
    and $-4096, %eax
    add $3, %edi
    mov %rdi, 24(%rax)
    mov ${MMIO}, %r14d
    mov $16, %ecx
1:  mov (%r14), %eax
    cmp $0x74726976, %eax
    jne 2f
    mov 8(%r14), %eax
    cmp $5, %eax
    je 3f
2:  add $4096, %r14d
    dec %ecx
    jnz 1b
    jmp .Lrefuse
    # Reset, acknowledge, driver; nothing but VERSION_1; features ok; queues; driver ok.
3:  movl $0, 0x70(%r14)
    movl $1, 0x70(%r14)
    movl $3, 0x70(%r14)
    movl $0, 0x24(%r14)
    movl $0, 0x20(%r14)
    movl $1, 0x24(%r14)
    movl $1, 0x20(%r14)
    movl $11, 0x70(%r14)
    mov ${BALLOON_QUEUES}, %edi
    .irp queue, 0, 1
    movl ${BALLOON_PFNS}, 0x80*\queue(%rdi)
    movw $1, 0x80*\queue+0x20(%rdi)
    movl $\queue, 0x30(%r14)
    movl $1, 0x38(%r14)
    movl ${BALLOON_QUEUES}+0x80*\queue, 0x80(%r14)
    movl $0, 0x84(%r14)
    movl ${BALLOON_QUEUES}+0x80*\queue+0x20, 0x90(%r14)
    movl $0, 0x94(%r14)
    movl ${BALLOON_QUEUES}+0x80*\queue+0x40, 0xa0(%r14)
    movl $0, 0xa4(%r14)
    movl $1, 0x44(%r14)
    .endr
    movl $15, 0x70(%r14)
    mov 0x70(%r14), %eax
    cmp $15, %eax
    jne .Lrefuse
    mov %r14, {S_BALLOON}(%rbx)
    jmp .Lfill

    # Before every pass. First, what was given back in the last one: once it is acknowledged, it reads as zero.
.Lballoon:
    mov {S_BALLOON}(%rbx), %r14
    mov {S_POSTED}(%rbx), %ecx
    test %ecx, %ecx
    jz .Lballoon_wanted
    wait_used 0
    mov {S_HELD}(%rbx), %edx
    sub %ecx, %edx
    first_page
1:  mov (%rdi), %rax
    or 2048(%rdi), %rax
    or 4088(%rdi), %rax
    jz 2f
    putc 'X'
2:  add $8192, %rdi
    dec %ecx
    jnz 1b
    mov %ecx, {S_POSTED}(%rbx)
    mov {S_HELD}(%rbx), %eax
    mov %eax, 0x104(%r14)
    putc 'i'

    # More or less than it has? Never more than every other page, and whole groups.
.Lballoon_wanted:
    mov 0x100(%r14), %eax
    mov 8(%rbp), %rcx
    shr $1, %rcx
    cmp %ecx, %eax
    cmova %ecx, %eax
    and $-4, %eax
    mov {S_HELD}(%rbx), %edx
    mov $256, %ecx
    sub %edx, %eax
    je .Lballoon_done
    jb .Ltake

    # Give back the %ecx pages from the %edx-th on.
    cmp %ecx, %eax
    cmovb %eax, %ecx
    mov %ecx, {S_POSTED}(%rbx)
    add %ecx, {S_HELD}(%rbx)
    xor %r10d, %r10d
    lea 1f(%rip), %r13
    jmp .Lpost
    # Until it is acknowledged, each reads as it was or as zero, and this guest's reads race with the device.
1:  old_word
    mov (%rdi), %rdx
    test %rdx, %rdx
    jz 2f
    cmp %rdx, %rax
    je 2f
    putc 'X'
2:  add $8192, %rdi
    add $2, %rsi
    dec %ecx
    jnz 1b
.Lballoon_done:
    cmpl $0, {S_HELD}(%rbx)
    jne .Lverify
    jmp .Lanswer

    # Take back the last %ecx pages: they read as zero or, where a snapshot came between, as they were. They get
    # the word of their lane. Says `d` and how many were zero.
.Ltake:
    neg %eax
    cmp %ecx, %eax
    cmovb %eax, %ecx
    sub %ecx, %edx
    mov %edx, {S_HELD}(%rbx)
    mov $1, %r10d
    lea 1f(%rip), %r13
    jmp .Lpost
1:  mov %rdi, %r15
    wait_used 1
    xor %r12d, %r12d
1:  old_word
    mov (%r15), %rdx
    cmp 2048(%r15), %rdx
    jne 2f
    cmp 4088(%r15), %rdx
    jne 2f
    cmp %rdx, %rax
    je 3f
    inc %r12d
    test %rdx, %rdx
    jz 3f
    dec %r12d
2:  putc 'X'
3:  mov %esi, %eax
    and $7, %eax
    mov {S_LANES}(%rbx,%rax,4), %eax
    mov %eax, {GENERATIONS}(,%rsi,4)
    old_word
    mov %rax, (%r15)
    mov %rax, 2048(%r15)
    mov %rax, 4088(%r15)
    add $8192, %r15
    add $2, %rsi
    dec %ecx
    jnz 1b
    mov {S_HELD}(%rbx), %eax
    mov %eax, 0x104(%r14)
    putc 'd'
    mov %r12d, %ecx
    lea .Lballoon_done(%rip), %r13
    jmp .Lhexadecimal

    # Puts the numbers of the %ecx pages from the %edx-th on into queue %r10d. Returns to %r13 with %rsi, %rdi as
    # `first_page`, and the steps in %r8, %r9.
.Lpost:
    first_page
    mov %rdi, %rax
    shr $12, %rax
    mov ${BALLOON_PFNS}, %edi
    mov %ecx, %r8d
1:  mov %eax, (%rdi)
    add $4, %rdi
    add $2, %eax
    dec %r8d
    jnz 1b
    mov %r10d, %edi
    shl $7, %edi
    add ${BALLOON_QUEUES}, %edi
    lea (,%rcx,4), %eax
    mov %eax, 8(%rdi)
    incw 0x22(%rdi)
    mov %r10d, 0x50(%r14)
    first_page
    movabs ${PAGE_STEP}, %r8
    movabs ${GENERATION_STEP}, %r9
    jmp *%r13

    # The part of the verification where every other page is in the balloon: the even lanes alone.
.Lverify_around:
    mov {S_HELD}(%rbx), %edi
    shr $2, %edi
1:  .irp lane, 0, 2, 4, 6
    mov 4*\lane(%r14), %eax
    cmp {S_LANES}+4*\lane(%rbx), %eax
    jne 2f
    mov {S_VALUES}+8*\lane(%rbx), %rax
    cmp %rax, 4096*\lane(%r13)
    jne 2f
    cmp %rax, 4096*\lane+2048(%r13)
    jne 2f
    cmp %rax, 4096*\lane+4088(%r13)
    je 3f
2:  inc %r11d
3:
    .endr
    next_group
    poll
    dec %r12
    jz .Lverified
    dec %edi
    jnz 1b
    jmp .Lgroup
