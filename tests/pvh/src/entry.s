# From the PVH entry, and from a start-up interrupt, to long mode; and what exceptions do.

.section .note.xen, "a", @note
.balign 4
    .long 4, 8, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.bss
.balign 4096
pml4:       .skip 4096
pdpt:       .skip 4096
pd:         .skip 4 * 4096
            .skip 16384
stack:      .skip 16384
stack2:
# eax, ecx, edx, ebx, esi, edi, ebp, eflags, cr0, cr3, cr4, efer, apic base, dr6, dr7, and the answers
# of hypercalls from 32-bit code: version, features with their pointer, poll, an unknown one.
.globl ENTRY_STATE
ENTRY_STATE: .skip 20 * 4
features:   .skip 8
.globl FAULTED, SKIP, EVENTS, INTERRUPTS, SECOND
FAULTED:    .skip 8
SKIP:       .skip 8
EVENTS:     .skip 8
INTERRUPTS: .skip 8
SECOND:     .skip 8

.data
.balign 16
gdt:        .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdtr:       .word 31
            .long gdt, 0
.globl IDT
.balign 16
IDT:        .skip 4096
idtr:       .word 4095
            .quad IDT

.text
.code32
.globl pvh_entry
pvh_entry:
    mov dword ptr [ENTRY_STATE], eax
    mov dword ptr [ENTRY_STATE + 4], ecx
    mov dword ptr [ENTRY_STATE + 8], edx
    mov dword ptr [ENTRY_STATE + 12], ebx
    mov dword ptr [ENTRY_STATE + 16], esi
    mov dword ptr [ENTRY_STATE + 20], edi
    mov dword ptr [ENTRY_STATE + 24], ebp
    mov esp, offset stack
    pushfd
    pop dword ptr [ENTRY_STATE + 28]
    mov eax, cr0
    mov dword ptr [ENTRY_STATE + 32], eax
    mov eax, cr3
    mov dword ptr [ENTRY_STATE + 36], eax
    mov eax, cr4
    mov dword ptr [ENTRY_STATE + 40], eax
    mov ecx, 0xc0000080
    rdmsr
    mov dword ptr [ENTRY_STATE + 44], eax
    mov ecx, 0x1b
    rdmsr
    mov dword ptr [ENTRY_STATE + 48], eax
    mov eax, dr6
    mov dword ptr [ENTRY_STATE + 52], eax
    mov eax, dr7
    mov dword ptr [ENTRY_STATE + 56], eax

    mov eax, 17                         # xen_version: version
    xor ebx, ebx
    vmmcall
    mov dword ptr [ENTRY_STATE + 60], eax
    mov eax, 17                         # xen_version: get_features
    mov ebx, 6
    mov ecx, offset features
    vmmcall
    or eax, dword ptr [features + 4]
    mov dword ptr [ENTRY_STATE + 64], eax
    mov eax, 29                         # sched_op: poll, whose structure has a pointer
    mov ebx, 3
    vmmcall
    mov dword ptr [ENTRY_STATE + 68], eax
    mov eax, 99
    vmmcall
    mov dword ptr [ENTRY_STATE + 72], eax

    mov edx, offset pd                  # 4 GiB, one to one, by pages of 2 MiB
    mov eax, 0x83
    xor ecx, ecx
1:  mov [edx + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 1b
    mov eax, offset pd + 3
    xor ecx, ecx
2:  mov [pdpt + ecx * 8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jne 2b
    mov eax, offset pdpt + 3
    mov dword ptr [pml4], eax
    lgdt [gdtr]

go_long:                                # esp is set
    mov eax, offset pml4
    mov cr3, eax
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80000011
    mov cr0, eax
    ljmp 8, offset long_mode
.code64
long_mode:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    lidt [idtr]
    cmp rsp, offset stack
    jne 3f
    mov edi, offset ENTRY_STATE
    call main
3:  call second

# Copied to page 8.
.globl trampoline, trampoline_end
.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        # lgdt, with an address of 16 bits
    .word 0x8000 + (9f - trampoline)
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # far jump of 32 bits
    .long trampoline32
    .word 24
9:  .word 31
    .long gdt
trampoline_end:
.code32
trampoline32:
    mov eax, 16
    mov ds, eax
    mov ss, eax
    mov esp, offset stack2
    jmp go_long

.code64
# #UD and #GP: behind the instruction, whose length is in SKIP; 0: unexpected.
.globl on_undefined, on_protection, on_event, on_interrupt, on_other
on_protection:
    add rsp, 8
on_undefined:
    push rax
    mov rax, [SKIP]
    test rax, rax
    jz on_other
    add [rsp + 8], rax
    inc qword ptr [FAULTED]
    pop rax
    iretq
# The event vector: GS is at this vCPU's vcpu_info.
on_event:
    mov byte ptr gs:[0], 0
    lock inc qword ptr [EVENTS]
    iretq
on_interrupt:
    push rax
    push rcx
    push rdx
    lock inc qword ptr [INTERRUPTS]
    mov ecx, 0x80b                      # end of interrupt
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
on_other:
    mov al, '!'
    out 0xe9, al
    mov al, 10
    out 0xe9, al
4:  hlt
    jmp 4b
