# Into ring 3 and back.
#
# `enter_ring3` is a function: it saves what the C ABI wants kept, loads a domain's registers and
# leaves; the next system call, exception or interrupt in ring 3 saves the domain's registers
# where they came from and returns from it. The stack pointer to return with is kept in TSS.rsp0,
# so that an exception in ring 3 pushes its frame just below it.
#
# GS: the core's base is in GS while in ring 0, and in KERNEL_GS_BASE while in ring 3. Exceptions
# that can hit between `swapgs` and the change of privilege (NMI, #MC, #DF, #DB) have stacks of
# their own; NMI does not use GS, the others end the core when they come from ring 0, and look at
# the sign of the base first: the core's is negative, that of ring 3 is 0, which it cannot change.

.text

# extern "C" fn enter_ring3(registers: *mut Registers, by_sysret: u64) -> Left
.globl enter_ring3
.balign 16
enter_ring3:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    mov gs:[{rsp0}], rsp
    mov gs:[{registers}], rdi
    mov rax, [rdi + {rax}]
    mov rbx, [rdi + {rbx}]
    mov rdx, [rdi + {rdx}]
    mov rbp, [rdi + {rbp}]
    mov r8, [rdi + {r8}]
    mov r9, [rdi + {r9}]
    mov r10, [rdi + {r10}]
    mov r12, [rdi + {r12}]
    mov r13, [rdi + {r13}]
    mov r14, [rdi + {r14}]
    mov r15, [rdi + {r15}]
    test esi, esi
    mov rsi, [rdi + {rsi}]
    jz 1f
    mov rcx, [rdi + {rip}]
    mov r11, [rdi + {rflags}]
    mov rsp, [rdi + {rsp}]
    mov rdi, [rdi + {rdi}]
    swapgs
    sysretq
1:  push {user_data}
    push [rdi + {rsp}]
    push [rdi + {rflags}]
    push {user_code}
    push [rdi + {rip}]
    mov rcx, [rdi + {rcx}]
    mov r11, [rdi + {r11}]
    mov rdi, [rdi + {rdi}]
    swapgs
    iretq

# LSTAR. rcx = rip, r11 = rflags; the stack is still the domain's.
.globl syscall_entry
.balign 16
syscall_entry:
    swapgs
    mov gs:[{scratch}], rsp
    mov rsp, gs:[{registers}]
    mov [rsp + {rax}], rax
    mov [rsp + {rbx}], rbx
    mov [rsp + {rdx}], rdx
    mov [rsp + {rsi}], rsi
    mov [rsp + {rdi}], rdi
    mov [rsp + {rbp}], rbp
    mov [rsp + {r8}], r8
    mov [rsp + {r9}], r9
    mov [rsp + {r10}], r10
    mov [rsp + {r12}], r12
    mov [rsp + {r13}], r13
    mov [rsp + {r14}], r14
    mov [rsp + {r15}], r15
    mov [rsp + {rip}], rcx
    mov [rsp + {rflags}], r11
    mov rcx, gs:[{scratch}]
    mov [rsp + {rsp}], rcx
    mov eax, {hypercall}
    jmp 9f

# Every vector has 16 bytes: push an error code if the processor did not, then the vector.
.globl trap_stubs
.balign 16
trap_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
    push 0
    .endif
    push vector
    jmp trap
    .set vector, vector + 1
.endr
    .balign 16

# Stack: vector, error, rip, cs, rflags, rsp, ss.
trap:
    test byte ptr [rsp + 24], 3
    jz 2f
    swapgs
    push rdi
    mov rdi, gs:[{registers}]
    mov [rdi + {rax}], rax
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
    pop rax                             # vector
    pop rdx                             # error
    pop [rdi + {rip}]
    pop rcx
    pop [rdi + {rflags}]
    pop [rdi + {rsp}]
    mov rsp, gs:[{rsp0}]
    push 2                              # DF, AC and NT are still the domain's
    popfq
9:  mov rsp, gs:[{rsp0}]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret                                 # rax = vector or {hypercall}, rdx = error

# From ring 0: an interrupt in `wait_for_interrupt`, or the end.
2:  cmp qword ptr [rsp], 32
    jb 3f
    push rax
    mov rax, [rsp + 8]
    mov gs:[{waited}], rax
    and qword ptr [rsp + 40], ~0x200    # no second one before it is looked at
    pop rax
    add rsp, 16
    iretq
3:  push r15
    push r14
    push r13
    push r12
    push r11
    push r10
    push r9
    push r8
    push rbp
    push rdi
    push rsi
    push rdx
    push rcx
    push rbx
    push rax
    mov ecx, 0xc0000101                 # GS base
    rdmsr
    test edx, edx
    js 4f
    swapgs
4:  cld
    mov rdi, rsp
    xor ebp, ebp
    and rsp, -16
    call core_exception
    ud2

# extern "C" fn wait_for_interrupt(): `sti` takes effect behind the next instruction, so nothing
# is lost between the two.
.globl wait_for_interrupt
.balign 16
wait_for_interrupt:
    mov qword ptr gs:[{waited}], 0
    sti
    hlt
    cli
    ret

# NMI, whatever the state: no stack but its own, no GS, no register.
.globl nmi_entry
.balign 16
nmi_entry:
    cmp byte ptr [rip + STOPPING], 0
    jne 5f
    lock inc dword ptr [rip + STRAY_NMIS]
    iretq
5:  cli
    hlt
    jmp 5b

# extern "C" fn call_on_stack(stack_top: u64, function: extern "C" fn(u64) -> !, argument) -> !
.globl call_on_stack
call_on_stack:
    mov rsp, rdi
    xor ebp, ebp
    mov rdi, rdx
    call rsi
    ud2
