# From the boot loader's 32-bit protected mode, paging off, to `boot_main` in long mode.
#
# Two entries, told apart by the word that they leave in %edi:
#   PVH         %ebx = hvm_start_info   (xen/include/public/arch-x86/hvm/start_info.h)
#   Multiboot2  %ebx = information, %eax = 0x36d76289   (Multiboot2 1.6, section 3.3)
#
# The tables made here map the first 4 GiB, writable and executable, three times: at 0, at the
# direct map, and the first of them at the image. `paging` replaces them at once.

.set IMAGE_BASE, 0xffffffff80000000

.section .multiboot2, "a"
.balign 8
header:
    .long 0xe85250d6, 0, header_end - header, -(0xe85250d6 + (header_end - header))
    # Entry address, physical: e_entry is virtual.
    .balign 8
    .word 3, 0
    .long 12, multiboot2_entry - IMAGE_BASE
    # Modules at page boundaries.
    .balign 8
    .word 6, 0
    .long 8
    # Wanted, not demanded: memory map, modules, both kinds of RSDP.
    .balign 8
    .word 1, 1
    .long 24, 6, 3, 14, 15
    .balign 8
    .word 0, 0
    .long 8
header_end:

.section .note.xen, "a", @note
.balign 4
    .long 4, 8, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry - IMAGE_BASE

.section .bss.boot, "aw", @nobits
.balign 4096
boot_pml4:      .skip 4096
boot_pdpt:      .skip 4096
boot_pdpt_high: .skip 4096
boot_pd:        .skip 4 * 4096
boot_stack:     .skip 32768
boot_stack_end:

.section .boot, "ax"
.code32
pvh_entry:
    movl $0, %edi
    jmp 1f

.globl multiboot2_entry
multiboot2_entry:
    movl $1, %edi
    cmpl $0x36d76289, %eax
    jne unfit

1:  cli
    cld
    movl $(boot_stack_end - IMAGE_BASE), %esp

    # Long mode and no-execute, or nothing: CPUID 0x80000001 EDX bits 29 and 20.
    movl $0x80000000, %eax
    pushl %ebx
    cpuid
    cmpl $0x80000001, %eax
    jb unfit
    movl $0x80000001, %eax
    cpuid
    popl %ebx
    andl $0x20100000, %edx
    cmpl $0x20100000, %edx
    jne unfit

    # 2048 entries of 2 MiB: present, writable, large.
    movl $(boot_pd - IMAGE_BASE), %edx
    movl $0x83, %eax
    xorl %ecx, %ecx
2:  movl %eax, (%edx, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jne 2b

    movl $(boot_pdpt - IMAGE_BASE), %edx
    movl $(boot_pd - IMAGE_BASE + 3), %eax
    movl %eax, boot_pdpt_high - IMAGE_BASE + 510 * 8
    xorl %ecx, %ecx
3:  movl %eax, (%edx, %ecx, 8)
    addl $4096, %eax
    incl %ecx
    cmpl $4, %ecx
    jne 3b

    movl $(boot_pdpt - IMAGE_BASE + 3), %eax
    movl %eax, boot_pml4 - IMAGE_BASE
    movl %eax, boot_pml4 - IMAGE_BASE + 256 * 8
    movl $(boot_pdpt_high - IMAGE_BASE + 3), %eax
    movl %eax, boot_pml4 - IMAGE_BASE + 511 * 8

    movl $0x20, %eax                    # CR4: PAE
    movl %eax, %cr4
    movl $(boot_pml4 - IMAGE_BASE), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER: LME, NXE, SCE
    rdmsr
    orl $0x901, %eax
    wrmsr
    movl $0x80010033, %eax              # CR0: PG WP NE ET MP PE
    movl %eax, %cr0
    lgdt boot_gdtr - IMAGE_BASE
    ljmp $8, $(4f - IMAGE_BASE)

.code64
4:  movabsq $5f, %rax
    jmp *%rax
5:  xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movq $boot_stack_end, %rsp
    xorl %ebp, %ebp
    movl %edi, %edi
    movl %ebx, %esi
    call boot_main
    ud2

# Says so on the first serial port, whose set-up is left to the firmware.
.code32
unfit:
    movl $(unfit_text - IMAGE_BASE), %esi
    movw $0x3f8, %dx
6:  lodsb
    testb %al, %al
    jz 7f
    outb %al, %dx
    jmp 6b
7:  cli
    hlt
    jmp 7b

unfit_text: .asciz "core| no 64-bit processor with NX, or no Multiboot2 loader\r\n"
.balign 8
boot_gdt:   .quad 0, 0x00af9b000000ffff
boot_gdtr:  .word 15
            .long boot_gdt - IMAGE_BASE
.code64
