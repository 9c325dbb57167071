# Into a hardware-virtualized guest and back: AMD64 APM volume 2, section 15.5.
#
# With the global interrupt flag clear nothing interrupts us, so that segment registers, task
# register and system call registers may be the guest's for a while. Interrupts are enabled below
# it, because with V_INTR_MASKING that is what lets them end the guest's run; at the last moment,
# because QEMU 7.2 with a thread for each processor may set the global flag again: it executes
# FXRSTOR of any processor by a change to the first one's word with that flag, without a lock.

.text

# extern "C" fn enter_guest(registers: *mut Registers, vmcb: u64, host: u64)
# The processor itself has rax, rsp, rip and rflags of the guest in the VMCB.
.globl enter_guest
.balign 16
enter_guest:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    push rdi
    push rdx
    mov rax, rsi
    clgi
    vmload rax
    mov rbx, [rdi + {rbx}]
    mov rcx, [rdi + {rcx}]
    mov rdx, [rdi + {rdx}]
    mov rsi, [rdi + {rsi}]
    mov rbp, [rdi + {rbp}]
    mov r8, [rdi + {r8}]
    mov r9, [rdi + {r9}]
    mov r10, [rdi + {r10}]
    mov r11, [rdi + {r11}]
    mov r12, [rdi + {r12}]
    mov r13, [rdi + {r13}]
    mov r14, [rdi + {r14}]
    mov r15, [rdi + {r15}]
    mov rdi, [rdi + {rdi}]
    sti
    vmrun rax
    vmsave rax
    push rdi
    mov rdi, [rsp + 16]
    mov [rdi + {rbx}], rbx
    mov [rdi + {rcx}], rcx
    mov [rdi + {rdx}], rdx
    mov [rdi + {rsi}], rsi
    mov [rdi + {rbp}], rbp
    mov [rdi + {r8}], r8
    mov [rdi + {r9}], r9
    mov [rdi + {r10}], r10
    mov [rdi + {r11}], r11
    mov [rdi + {r12}], r12
    mov [rdi + {r13}], r13
    mov [rdi + {r14}], r14
    mov [rdi + {r15}], r15
    pop [rdi + {rdi}]
    pop rax
    vmload rax
    pop rdi
    cli
    stgi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret

# extern "C" fn take_interrupt(): takes one interrupt that is pending; its handler notes the
# vector, and lets no second one in.
.globl take_interrupt
.balign 16
take_interrupt:
    mov qword ptr gs:[{waited}], 0
    sti
    nop
    nop
    cli
    ret
