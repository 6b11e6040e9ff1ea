# The privileged part of the guest: entry, tables, interrupt and fault entries.
#
# Everything here runs at CPL 0, which some hypervisors emulate at about a microsecond an instruction; everything else of
# the guest runs at CPL 3. Hence no code here but what CPL 3 cannot do, and no instruction that an emulator is likely to lack.

.set KERNEL_CODE, 0x08
.set USER_DATA,   0x18 | 3
.set USER_CODE,   0x20 | 3
.set TASK,        0x28
# Above a page that is not mapped; below it lie what the boot protocol left, above it the rest of conventional memory.
.set USER_STACK,  0x80000

.section .boot, "ax"
.global _start
_start:                                 # 64-bit mode, interrupts off, rsi = boot parameters
    cli
    mov rdi, rsi
    lea rax, [pml4]
    mov cr3, rax
    lea rsp, [kernel_stack_top]
    lgdt [gdt_pointer]
    lidt [idt_pointer]

    lea rax, [tss]                      # the base of the TSS descriptor is in pieces
    mov word ptr [gdt_task + 2], ax
    shr rax, 16
    mov byte ptr [gdt_task + 4], al
    mov byte ptr [gdt_task + 7], ah
    mov ax, TASK
    ltr ax
    mov ax, USER_DATA
    mov ds, ax
    mov es, ax

    mov rax, cr0                        # floating point and vectors on
    and eax, 0xfffffff3
    or eax, 0x22
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    mov eax, 1
    cpuid
    test ecx, 1 << 26                   # XSAVE
    jz 1f
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 0xe7                       # x87, SSE, AVX, AVX-512: as much as there is
    xor edx, edx
    xor ecx, ecx
    xsetbv
1:
    mov ecx, 0x1b                       # x2APIC mode
    rdmsr
    or eax, 0xc00
    wrmsr
    xor edx, edx
    mov ecx, 0x80f                      # APIC on, spurious vector 0xff
    mov eax, 0x1ff
    wrmsr
    mov ecx, 0x835                      # no interrupts from the legacy controller
    mov eax, 0x10000
    wrmsr
    mov ecx, 0x832                      # timer: TSC deadline
    mov eax, 0x40043
    wrmsr

    push USER_DATA
    push USER_STACK - 8
    push 0x202
    push USER_CODE
    lea rax, [user_main]
    push rax
    iretq

# The gate. CPL 3 executes `hlt` with a request in rax; that is a general protection fault, which ends up here with interrupts
# off. rax, rcx, rdx, rsi and rdi may change.
#   0 sleep until an interrupt is pending      3 in:  al <- port dx
#   1 outs: rcx bytes from rsi to port dx      4 out: cl -> port dx
#   2 ins: rcx bytes from port dx to rdi       5 arm the timer at TSC value rcx
gate:
    push rbx
    mov rbx, [rsp + 16]
    cmp byte ptr [rbx], 0xf4
    pop rbx
    jne fault_13
    inc qword ptr [rsp + 8]             # behind the hlt
    cmp eax, 1
    jb gate_sleep
    je gate_outs
    cmp eax, 3
    jb gate_ins
    je gate_in
    cmp eax, 5
    jb gate_out
    mov eax, ecx
    mov rdx, rcx
    shr rdx, 32
    mov ecx, 0x6e0
    wrmsr
    jmp gate_done
gate_sleep:
    cmp dword ptr [pending_events], 0
    jne gate_done
    sti                                 # takes effect behind hlt: nothing can be missed in between
    hlt
    cli
    jmp gate_done
gate_outs:
    cld
    rep outsb
    jmp gate_done
gate_ins:
    cld
    rep insb
    jmp gate_done
gate_in:
    in al, dx
    jmp gate_done
gate_out:
    mov eax, ecx
    out dx, al
gate_done:
    add rsp, 8
    iretq

# Interrupts: note the event, end the interrupt.
.macro interrupt bit
    or dword ptr [pending_events], \bit
    jmp end_of_interrupt
.endm
interrupt_queue:
    interrupt 1
interrupt_config:
    interrupt 2
interrupt_control:
    interrupt 4
interrupt_timer:
    interrupt 8
end_of_interrupt:
    push rax
    push rcx
    push rdx
    xor eax, eax
    xor edx, edx
    mov ecx, 0x80b
    wrmsr
    pop rdx
    pop rcx
    pop rax
interrupt_spurious:
    iretq

# Faults: leave what happened in fault_info and go on at CPL 3 in user_fault.
fault_common:                           # vector, error code, rip, cs, rflags, rsp, ss
    mov [fault_info + 32], rax
    mov rax, [rsp]
    mov [fault_info], rax
    mov rax, [rsp + 8]
    mov [fault_info + 8], rax
    mov rax, [rsp + 16]
    mov [fault_info + 16], rax
    mov rax, cr2
    mov [fault_info + 24], rax
    lea rsp, [kernel_stack_top]
    push USER_DATA
    push USER_STACK - 8
    push 0x2
    push USER_CODE
    lea rax, [user_fault]
    push rax
    iretq

.altmacro
.macro fault_entry number
fault_\number:
    .if (\number == 8) || (\number == 10) || (\number == 11) || (\number == 12) || (\number == 13) || (\number == 14) || (\number == 17) || (\number == 21)
    .else
    push 0
    .endif
    push \number
    jmp fault_common
.endm
.macro fault_address number
    .quad fault_\number
.endm
.set n, 0
.rept 32
    fault_entry %n
    .set n, n + 1
.endr

.section .tables, "aw"
.balign 4096
# Identity mapping of 4 GiB for CPL 3: the first 2 MiB by 4 KiB pages with holes (page 0, and the one below the stack), the rest by
# 2 MiB pages (not every hypervisor has larger ones). What lies above is added when it is wanted.
.global pdpt
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .quad pt + 7
    .set n, 1
    .rept 2047
    .quad (n << 21) | 0x87
    .set n, n + 1
    .endr
pt:
    .quad 0
    .set n, 1
    .rept 511
    .if n == 0x3f
    .quad 0
    .else
    .quad (n << 12) | 7
    .endif
    .set n, n + 1
    .endr

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 code, CPL 0
    .quad 0x00cf93000000ffff            # 0x10 data, CPL 0
    .quad 0x00cff3000000ffff            # 0x18 data, CPL 3
    .quad 0x00affb000000ffff            # 0x20 code, CPL 3
gdt_task:
    .quad 0x0000890000000067            # 0x28 task state
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

.balign 16
tss:
    .long 0
    .quad kernel_stack_top              # where an interrupt from CPL 3 continues
    .fill 23, 4, 0

# For user_main, which fills the interrupt table: entries 0..31, then 0x40..0x43, then 0xff.
.balign 8
.global entry_points
entry_points:
    .set n, 0
    .rept 13
    fault_address %n
    .set n, n + 1
    .endr
    .quad gate
    .set n, 14
    .rept 18
    fault_address %n
    .set n, n + 1
    .endr
    .quad interrupt_queue, interrupt_config, interrupt_control, interrupt_timer, interrupt_spurious

.section .bss, "aw", @nobits
.balign 64
.global pending_events
pending_events: .skip 64
.global fault_info
fault_info: .skip 64
.balign 4096
.global idt
idt: .skip 4096
.skip 4096
kernel_stack_top:
