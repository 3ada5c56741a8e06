# The guest program: bare-metal x86-64, position independent, no stack, no interrupts.
#
# Always: %rbp = parameters, %rbx = state. `pattern.rs` is the same arithmetic in Rust, and `layout.rs` has
# every address, offset and port. KVM may have to emulate each instruction, so the loops are short rather
# than pretty: the answer costs 3.25 instructions a page, verification 9.

    .macro putc char
    mov ${DATA_PORT}, %edx
    mov $\char, %al
    out %al, %dx
    .endm

    # Goes to `command` if a byte waits in the serial port. Clobbers %rax, %rdx.
    .macro poll
    mov ${STATUS_PORT}, %edx
    in %dx, %al
    test $1, %al
    jnz .Lcommand
    .endm

    # To the next eight pages: %r13 the pages, %r14 their generations, the lanes' values.
    .macro next_group
    .irp lane, 0, 1, 2, 3, 4, 5, 6, 7
    add %r15, {S_VALUES}+8*\lane(%rbx)
    .endr
    add $32, %r14
    add $32768, %r13
    .endm

    .code64
    mov ${PARAMS}, %ebp
    mov ${STATE}, %ebx
    putc 'B'
    movabs ${MAGIC}, %rax
    cmp %rax, (%rbp)
    jne .Lrefuse

    # Generation 0: every page, and the table of generations.
    xor %eax, %eax
    mov %eax, {S_GENERATION}(%rbx)
    .irp lane, 0, 8, 16, 24
    mov %rax, {S_LANES}+\lane(%rbx)
    .endr
    mov %rax, {S_BALLOON}(%rbx)
    mov %rax, {S_HELD}(%rbx)
    cmp %rax, 56(%rbp)
    jne .Lballoon_find
.Lfill:
    xor %eax, %eax
    mov 16(%rbp), %rdi
    mov 8(%rbp), %rcx
    mov 24(%rbp), %rax
    movabs ${PAGE_STEP}, %r8
    mov ${GENERATIONS}, %esi
1:  mov %rax, (%rdi)
    mov %rax, 2048(%rdi)
    mov %rax, 4088(%rdi)
    movl $0, (%rsi)
    add $4, %rsi
    add %r8, %rax
    add $4096, %rdi
    dec %rcx
    jnz 1b

    # The addresses an answer reads: every STRIDE-th page, wrapping.
    mov 32(%rbp), %rcx
    mov 40(%rbp), %r8
    mov 8(%rbp), %r9
    mov 16(%rbp), %r10
    mov ${ANSWERS}, %edi
    xor %eax, %eax
1:  mov %rax, %rsi
    shl $12, %rsi
    add %r10, %rsi
    mov %rsi, (%rdi)
    add $8, %rdi
    add %r8, %rax
    cmp %r9, %rax
    jb 2f
    sub %r9, %rax
2:  dec %rcx
    jnz 1b
    lea 1f(%rip), %r13
    jmp .Lsum
1:  putc 'R'

.Lmain:
    cmpq $0, {S_BALLOON}(%rbx)
    jne .Lballoon
.Lanswer:
    # Answer: an order-dependent sum over the scattered pages, against the one computed from the formula.
    mov ${ANSWERS}, %esi
    mov 32(%rbp), %ecx
    shr $3, %ecx
    xor %r12d, %r12d
1:  .rept 8
    lodsq
    add (%rax), %r12
    rol $1, %r12
    .endr
    dec %ecx
    jnz 1b
    mov ${DATA_PORT}, %edx
    mov $'A', %al
    cmp {S_SUM}(%rbx), %r12
    je 1f
    mov $'x', %al
1:  out %al, %dx

.Lverify:
    # Verify. %r11 = wrong pages. First the lanes' generations and values, from the current generation.
    xor %r11d, %r11d
    mov {S_GENERATION}(%rbx), %eax
    movabs ${PAGE_STEP}, %r8
    movabs ${GENERATION_STEP}, %r9
    mov 24(%rbp), %r10
    xor %ecx, %ecx
1:  mov %eax, %edx
    sub %ecx, %edx
    and $7, %edx
    mov %eax, %esi
    sub %edx, %esi
    jae 2f
    xor %esi, %esi
2:  cmp {S_LANES}(%rbx,%rcx,4), %esi
    je 3f
    inc %r11d
3:  imul %r9, %rsi
    add %r10, %rsi
    mov %rsi, {S_VALUES}(%rbx,%rcx,8)
    add %r8, %r10
    inc %ecx
    cmp $8, %ecx
    jb 1b
    mov %r8, %r15
    shl $3, %r15
    mov 16(%rbp), %r13
    mov ${GENERATIONS}, %r14d
    mov 8(%rbp), %r12
    shr $3, %r12
    cmpl $0, {S_HELD}(%rbx)
    jne .Lverify_around
.Lgroup:
    .irp lane, 0, 8, 16, 24
    mov \lane(%r14), %rax
    cmp {S_LANES}+\lane(%rbx), %rax
    jne .Lslow
    .endr
    .irp lane, 0, 1, 2, 3, 4, 5, 6, 7
    mov {S_VALUES}+8*\lane(%rbx), %rax
    cmp %rax, 4096*\lane(%r13)
    jne .Lslow
    cmp %rax, 4096*\lane+2048(%r13)
    jne .Lslow
    cmp %rax, 4096*\lane+4088(%r13)
    jne .Lslow
    .endr
.Lnext:
    next_group
    test $7, %r12b
    jnz 1f
    poll
1:  dec %r12
    jnz .Lgroup
.Lverified:
    mov %r11d, %eax
    mov ${WRONG_COUNT_PORT}, %edx
    out %eax, %dx
    mov {S_GENERATION}(%rbx), %eax
    mov ${GENERATION_PORT}, %edx
    out %eax, %dx
    mov ${DATA_PORT}, %edx
    mov $'.', %al
    test %r11d, %r11d
    jz 1f
    mov $'X', %al
1:  out %al, %dx
    mov 48(%rbp), %r12
1:  poll
    pause
    dec %r12
    jnz 1b
    jmp .Lmain

    # Something in this group of eight is wrong: count and name the pages.
.Lslow:
    xor %ecx, %ecx
    mov %r13, %rdi
1:  mov (%r14,%rcx,4), %eax
    cmp {S_LANES}(%rbx,%rcx,4), %eax
    jne 2f
    mov {S_VALUES}(%rbx,%rcx,8), %rax
    cmp %rax, (%rdi)
    jne 2f
    cmp %rax, 2048(%rdi)
    jne 2f
    cmp %rax, 4088(%rdi)
    je 3f
2:  inc %r11d
    mov %rdi, %rax
    sub 16(%rbp), %rax
    shr $12, %rax
    mov ${WRONG_PAGE_PORT}, %edx
    out %eax, %dx
3:  add $4096, %rdi
    inc %ecx
    cmp $8, %ecx
    jb 1b
    jmp .Lnext

.Lcommand:
    mov ${DATA_PORT}, %edx
    in %dx, %al
    cmp $'m', %al
    je .Lmutate
    cmp $'g', %al
    je .Lgeneration
    cmp $'p', %al
    jne .Lmain
    putc 'p'
.Lparked:
    poll
    pause
    jmp .Lparked

    # The next generation: rewrite the pages of one lane.
.Lmutate:
    mov {S_GENERATION}(%rbx), %eax
    inc %eax
    mov %eax, {S_GENERATION}(%rbx)
    mov %eax, %ecx
    and $7, %ecx
    mov %eax, {S_LANES}(%rbx,%rcx,4)
    movabs ${PAGE_STEP}, %r8
    movabs ${GENERATION_STEP}, %r9
    mov %rax, %rdx
    imul %r9, %rdx
    add 24(%rbp), %rdx
    mov %rcx, %rsi
    imul %r8, %rsi
    add %rsi, %rdx
    shl $3, %r8
    mov 16(%rbp), %rdi
    mov %rcx, %rsi
    shl $12, %rsi
    add %rsi, %rdi
    lea {GENERATIONS}(,%rcx,4), %rsi
    mov 8(%rbp), %r12
    shr $3, %r12
    # Pages in the balloon are not this guest's to write: the first of each odd lane.
    test $1, %cl
    jz 1f
    mov {S_HELD}(%rbx), %r10d
    shr $2, %r10d
    sub %r10, %r12
    mov %r10, %r11
    shl $5, %r11
    add %r11, %rsi
    shl $10, %r11
    add %r11, %rdi
    imul %r8, %r10
    add %r10, %rdx
    test %r12, %r12
    jz 2f
1:  mov %rdx, (%rdi)
    mov %rdx, 2048(%rdi)
    mov %rdx, 4088(%rdi)
    mov %eax, (%rsi)
    add $32, %rsi
    add $32768, %rdi
    add %r8, %rdx
    dec %r12
    jnz 1b
2:  lea 1f(%rip), %r13
    jmp .Lsum
1:  putc 'M'
    jmp .Lmain

    # 'g' and the generation in eight hexadecimal digits, then parked.
.Lgeneration:
    putc 'g'
    mov {S_GENERATION}(%rbx), %ecx
    lea .Lparked(%rip), %r13

    # Says %ecx in eight hexadecimal digits. Returns to %r13.
.Lhexadecimal:
    mov ${DATA_PORT}, %edx
    mov $8, %esi
1:  rol $4, %ecx
    mov %ecx, %eax
    and $15, %eax
    add $'0', %eax
    cmp $'9', %eax
    jbe 2f
    add $39, %eax
2:  out %al, %dx
    dec %esi
    jnz 1b
    jmp *%r13

    # S_SUM = what the answer must come to, by the formula alone. Returns to %r13.
.Lsum:
    mov ${ANSWERS}, %esi
    mov 32(%rbp), %rcx
    mov 16(%rbp), %r10
    mov 24(%rbp), %r11
    movabs ${PAGE_STEP}, %r8
    movabs ${GENERATION_STEP}, %r9
    xor %r12d, %r12d
1:  lodsq
    sub %r10, %rax
    shr $12, %rax
    mov %eax, %edi
    and $7, %edi
    mov {S_LANES}(%rbx,%rdi,4), %edi
    imul %r9, %rdi
    imul %r8, %rax
    add %rdi, %rax
    add %r11, %rax
    add %rax, %r12
    rol $1, %r12
    dec %rcx
    jnz 1b
    mov %r12, {S_SUM}(%rbx)
    jmp *%r13

    # The parameter block is not ours.
.Lrefuse:
    putc '!'
1:  hlt
    jmp 1b
