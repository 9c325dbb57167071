# Where a secondary processor starts, in real mode: copied to TRAMPOLINE, one page below 1 MiB.
# The first processor fills the slots at the end before each start; see `smp`.

.section .rodata.trampoline, "a"
.globl trampoline_start
trampoline_start:
.code16
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl TRAMPOLINE + (9f - trampoline_start)
    movl $0xa0, %eax                    # CR4: PAE PGE
    movl %eax, %cr4
    movl TRAMPOLINE + (trampoline_slots - trampoline_start), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER: LME, NXE, SCE
    rdmsr
    orl $0x901, %eax
    wrmsr
    movl $0x80010033, %eax              # CR0: PG WP NE ET MP PE
    movl %eax, %cr0
    ljmpl $8, $(TRAMPOLINE + (2f - trampoline_start))
.code64
2:  xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movq TRAMPOLINE + (trampoline_slots - trampoline_start) + 8, %rsp
    movq TRAMPOLINE + (trampoline_slots - trampoline_start) + 16, %rax
    movq TRAMPOLINE + (trampoline_slots - trampoline_start) + 24, %rdi
    xorl %ebp, %ebp
    pushq $0                            # as after a call
    jmp *%rax
.balign 8
8:  .quad 0, 0x00af9b000000ffff
9:  .word 15
    .long TRAMPOLINE + (8b - trampoline_start)
.balign 8
.globl trampoline_slots
trampoline_slots:                       # CR3, stack, first instruction, its argument
    .quad 0, 0, 0, 0
.globl trampoline_end
trampoline_end:
.text
