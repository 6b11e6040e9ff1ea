//! A tiny guest and a VM to run it in, for the tests of this crate.
#![allow(unsafe_code)] // assembled guest code, memfds
#![allow(clippy::unwrap_used)]

use std::arch::global_asm;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::host::{Files, Host, SharedRegion, Window};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{self, Kernel};
use crate::host::{Machine, open_kvm};
use crate::memory::{HugePages, Memory, MemoryConfig};
use crate::vcpu;
use crate::vcpu::refused::{Mmio, Next, Refused, raise_undefined, refused_at};

/// Where [`elf`] puts its code.
pub(crate) const CODE: u64 = 0x10_0000;

/// Assembles a guest: `name()` is its code.
macro_rules! guest {
    ($name:ident, $start:literal, $end:literal, $($line:literal)*) => {
        global_asm!(
            ".pushsection .rodata.test_guests, \"a\", @progbits",
            // Alignment inside a guest is alignment of its start, whatever lies before it.
            ".balign 32",
            concat!(".globl ", $start), concat!($start, ":"),
            $($line,)*
            concat!(".globl ", $end), concat!($end, ":"),
            ".popsection",
        );
        /// The guest's code.
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both labels lie in one read-only section, the second behind the first.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

// Does what the host tells it: port 0x510 gives the operation (0: read, 1: write), 0x514 the address, 0x51c the value to write;
// what was read goes to 0x518. Interrupts are on; the handler, at offset 16, writes to port 0x520 and ends the interrupt.
guest!(
    monitor, "vmm_test_monitor", "vmm_test_monitor_end",
    "sti"
    "jmp 2f"
    ".balign 16"
    "push rax"
    "push rdx"
    "mov dx, 0x520"
    "out dx, al"
    "mov edx, 0xfee000b0"
    "mov dword ptr [rdx], 0"
    "pop rdx"
    "pop rax"
    "iretq"
    "2:"
    "mov dx, 0x510"
    "in eax, dx"
    "mov ecx, eax"
    "mov dx, 0x514"
    "in eax, dx"
    "mov ebx, eax"
    "test ecx, ecx"
    "jnz 3f"
    "mov eax, dword ptr [rbx]"
    "mov dx, 0x518"
    "out dx, eax"
    "jmp 2b"
    "3:"
    "mov dx, 0x51c"
    "in eax, dx"
    "mov dword ptr [rbx], eax"
    "jmp 2b"
);
const HANDLER: u64 = CODE + 16;

guest!(power_off, "vmm_test_power_off", "vmm_test_power_off_end",
    "mov al, 42" "mov dx, 0xf4" "out dx, al" "hlt");
guest!(reset, "vmm_test_reset", "vmm_test_reset_end",
    "mov al, 0xfe" "mov dx, 0x64" "out dx, al" "hlt");
// The sleep type alone first, which does nothing.
guest!(soft_off, "vmm_test_soft_off", "vmm_test_soft_off_end",
    "mov dx, 0x600" "mov al, 0x14" "out dx, al" "mov al, 0x34" "out dx, al" "hlt");
// The code there means the same in 64-bit mode as in real mode.
guest!(reset_vector, "vmm_test_reset_vector", "vmm_test_reset_vector_end",
    "mov eax, 0xffff0" "jmp rax");
guest!(
    triple_fault,
    "vmm_test_triple_fault",
    "vmm_test_triple_fault_end",
    "ud2"
);
guest!(spin, "vmm_test_spin", "vmm_test_spin_end",
    "2:" "pause" "jmp 2b");
// Powers off with the low byte of the 32-bit value at the address in RSI plus 0x228 (cmd_line_ptr) dereferenced: the first
// character of the command line.
guest!(first_of_cmdline, "vmm_test_cmdline", "vmm_test_cmdline_end",
    "mov eax, dword ptr [rsi + 0x228]" "mov al, byte ptr [rax]" "mov dx, 0xf4" "out dx, al" "hlt");
// Echoes COM2 and powers off with code 7 after a line that begins with `q`.
guest!(
    echo, "vmm_test_echo", "vmm_test_echo_end",
    "xor ebx, ebx"
    "2:"
    "mov dx, 0x2fd"
    "in al, dx"
    "test al, 1"
    "jz 2b"
    "mov dx, 0x2f8"
    "in al, dx"
    "out dx, al"
    "cmp al, 0x71"
    "jne 3f"
    "mov ebx, 1"
    "3:"
    "cmp al, 10"
    "jne 2b"
    "test ebx, ebx"
    "jz 2b"
    "mov al, 7"
    "mov dx, 0xf4"
    "out dx, al"
    "hlt"
);
// Writes `ab` to COM2, waits for a byte on COM2, writes `cd` and a newline, and powers off.
guest!(
    half_line, "vmm_test_half_line", "vmm_test_half_line_end",
    "mov dx, 0x2f8"
    "mov al, 0x61"
    "out dx, al"
    "mov al, 0x62"
    "out dx, al"
    "2:"
    "mov dx, 0x2fd"
    "in al, dx"
    "test al, 1"
    "jz 2b"
    "mov dx, 0x2f8"
    "mov al, 0x63"
    "out dx, al"
    "mov al, 0x64"
    "out dx, al"
    "mov al, 10"
    "out dx, al"
    "mov dx, 0xf4"
    "xor eax, eax"
    "out dx, al"
    "hlt"
);

// Pieces of 32 bytes for CPL 3 (see `Op`), and exception handlers for CPL 0. RBX is an address in a window, RCX a buffer in RAM.
guest!(
    pieces, "vmm_test_pieces", "vmm_test_pieces_end",
    "xor eax, eax" "mov al, byte ptr [rbx]" "jmp 9f" ".balign 32"
    "xor eax, eax" "mov ax, word ptr [rbx]" "jmp 9f" ".balign 32"
    "mov eax, dword ptr [rbx]" "jmp 9f" ".balign 32"
    "mov rax, qword ptr [rbx]" "jmp 9f" ".balign 32"
    "mov byte ptr [rbx], al" "jmp 9f" ".balign 32"
    "mov word ptr [rbx], ax" "jmp 9f" ".balign 32"
    "mov dword ptr [rbx], eax" "jmp 9f" ".balign 32"
    "mov qword ptr [rbx], rax" "jmp 9f" ".balign 32"
    "vmovdqu ymm7, ymmword ptr [rbx]" "vmovdqu ymmword ptr [rcx], ymm7" "jmp 9f" ".balign 32"
    "vmovdqu ymm7, ymmword ptr [rcx]" "vmovdqu ymmword ptr [rbx], ymm7" "jmp 9f" ".balign 32"
    "vmovdqu64 zmm21, zmmword ptr [rbx]" "vmovdqu64 zmmword ptr [rcx], zmm21" "jmp 9f" ".balign 32"
    "vmovdqu64 zmm21, zmmword ptr [rcx]" "vmovdqu64 zmmword ptr [rbx], zmm21" "jmp 9f" ".balign 32"
    "vmovdqu ymm1, ymmword ptr [rcx]" "vpxor ymm1, ymm1, ymmword ptr [rbx]" "vmovdqu ymmword ptr [rcx], ymm1" "jmp 9f" ".balign 32"
    "vmovdqu xmm1, xmmword ptr [rcx]" "vmovhps qword ptr [rbx], xmm1" "jmp 9f" ".balign 32"
    "lock xadd dword ptr [rbx], eax" "jmp 9f" ".balign 32"
    "mov rsi, rbx" "mov rdi, rcx" "mov rcx, rax" "rep movsb" "jmp 9f" ".balign 32"
    "kmovq k1, rax" "vmovdqu8 zmm3, zmmword ptr [rcx]" "vmovdqu8 zmmword ptr [rbx] {{k1}}, zmm3" "jmp 9f" ".balign 32"
    "kmovq k1, rax" "vmovdqu8 zmm3, zmmword ptr [rcx]" "vmovdqu8 zmm3 {{k1}}, zmmword ptr [rbx]" "jmp 8f" ".balign 32"
    // Hammers: counts in RAX, at RBX; what it reads is added up at RCX.
    "2:" "inc rax" "mov qword ptr [rbx], rax" "mov rdx, qword ptr [rbx]" "mov qword ptr [rcx], rax" "mov qword ptr [rcx + 8], rdx" "jmp 2b" ".balign 32"
    // Touches RAX pages from RBX on.
    "2:" "mov edx, dword ptr [rbx]" "add rbx, 4096" "dec rax" "jnz 2b" "jmp 9f" ".balign 32"
    // Loads and stores 32 bytes at RBX for ever, from and to RCX.
    "2:" "vmovdqu ymm7, ymmword ptr [rcx]" "vmovdqu ymmword ptr [rbx], ymm7" "vmovdqu ymm6, ymmword ptr [rbx]" "inc qword ptr [rcx]" "jmp 2b" ".balign 32"
    "ud2" ".balign 32"
    // Reads 16 pages, every other one, for ever, and counts at RCX.
    "2:" "mov rdx, rbx" "mov esi, 16" "3:" "mov eax, dword ptr [rdx]" "add rdx, 8192" "dec esi" "jnz 3b" "inc qword ptr [rcx]" "jmp 2b" ".balign 32"
    "8:" "vmovdqu8 zmmword ptr [rcx], zmm3"
    "9:" "mov dword ptr [r15], eax" "2:" "pause" "jmp 2b" ".balign 32"
    "mov eax, 6" "mov dword ptr [r14], eax" "hlt" ".balign 32"
    "mov eax, 13" "mov dword ptr [r14], eax" "hlt" ".balign 32"
    "mov eax, 14" "mov dword ptr [r14], eax" "hlt" ".balign 32"
);

/// A piece of [`pieces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Load8,
    Load16,
    Load32,
    Load64,
    Store8,
    Store16,
    Store32,
    Store64,
    LoadYmm,
    StoreYmm,
    LoadZmm,
    StoreZmm,
    /// XORs 32 bytes at RBX to the buffer.
    Xor,
    /// Stores bytes 8..16 of the buffer in a way that only the processor knows.
    StoreHigh,
    Exchange,
    /// Copies RAX bytes from RBX to the buffer.
    CopyString,
    /// RAX is the mask of bytes.
    StoreMasked,
    /// The buffer's bytes stay where the mask in RAX has none.
    LoadMasked,
    Hammer,
    Touch,
    HammerYmm,
    Undefined,
    Sweep,
}

const HANDLERS: u64 = 24;

/// KVM, or a clear line on why this test cannot run.
pub(crate) fn kvm() -> Kvm {
    open_kvm().unwrap_or_else(|error| panic!("this test runs a VM: {error}"))
}

/// An ELF image with `code` at [`CODE`] as its only segment.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    let mut put = |bytes: &[u8]| image.extend_from_slice(bytes);
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    put(&CODE.to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&0u64.to_le_bytes());
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes());
    put(&7u32.to_le_bytes());
    let len = code.len() as u64;
    for quad in [120, CODE, CODE, len, len + 0x1000, 0x1000] {
        put(&quad.to_le_bytes());
    }
    put(code);
    image
}

/// [`elf`] for [`Kernel::Image`].
pub(crate) fn image(code: &[u8]) -> Kernel {
    Kernel::Image(elf(code).leak())
}

pub(crate) fn ram(size: u64) -> MemoryConfig {
    MemoryConfig {
        size,
        hugepages: HugePages::Off,
        prefault: false,
        dma: 0,
    }
}

/// A memfd with `pages`, each filled with its 32-bit value; sealed against shrinking or not.
pub(crate) fn memfd(pages: &[u32], sealed: bool) -> Arc<File> {
    // SAFETY: the name is a NUL-terminated constant; the descriptor is new.
    let mut file = unsafe {
        let fd = libc::memfd_create(
            c"test".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        );
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    for page in pages {
        file.write_all(&page.to_le_bytes().repeat(1024)).unwrap();
    }
    if sealed {
        // SAFETY: a fcntl without pointers.
        let result =
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        assert_eq!(result, 0);
    }
    Arc::new(file)
}

pub(crate) fn region(file: &Arc<File>, file_offset: u64, len: u64) -> SharedRegion {
    SharedRegion {
        file: Arc::clone(file),
        file_offset,
        len,
    }
}

/// A VM with 4 MiB of RAM that runs [`monitor`].
pub(crate) struct Monitor {
    pub(crate) machine: Machine,
    vcpu: VcpuFd,
    /// Addresses of accesses that left the guest.
    pub(crate) missed: Vec<u64>,
    /// How many interrupts the guest has taken.
    pub(crate) interrupts: u32,
}

/// The vector that [`Monitor`] handles.
pub(crate) const VECTOR: u8 = 0x40;

impl Monitor {
    pub(crate) fn new() -> Self {
        const IDT: u64 = 0x3_0000;
        let machine = Machine::new(&kvm(), Memory::new(&ram(4 << 20)).unwrap()).unwrap();
        let vcpu = machine.vm().create_vcpu(0).unwrap();
        vcpu::set_up(machine.vm(), machine.cpuid(), &vcpu, 0, 1).unwrap();
        let entry = boot::load(machine.memory(), 4 << 20, &image(monitor()), None, "").unwrap();
        boot::set_registers(&vcpu, entry).unwrap();
        // An interrupt gate to the handler: selector 0x10, present, ring 0.
        let gate = HANDLER & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | (HANDLER >> 16 & 0xFFFF) << 48;
        let at = GuestAddress(IDT + u64::from(VECTOR) * 16);
        machine.memory().write_obj(gate, at).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.idt.base, sregs.idt.limit) = (IDT, 256 * 16 - 1);
        vcpu.set_sregs(&sregs).unwrap();
        let mut monitor = Monitor {
            machine,
            vcpu,
            missed: Vec::new(),
            interrupts: 0,
        };
        // Spurious vector register: software-enables the local APIC.
        monitor.poke(0xFEE0_00F0, 0x1FF);
        monitor
    }

    /// The guest's MSI to its own handler.
    pub(crate) fn message() -> devices::host::MsiMessage {
        devices::host::MsiMessage {
            address: 0xFEE0_0000,
            data: VECTOR.into(),
        }
    }

    /// What the guest reads at `address`.
    pub(crate) fn peek(&mut self, address: u64) -> u32 {
        self.operate(0, address, 0).unwrap()
    }

    /// Has the guest write.
    pub(crate) fn poke(&mut self, address: u64, value: u32) {
        self.operate(1, address, value);
    }

    fn operate(&mut self, operation: u32, address: u64, value: u32) -> Option<u32> {
        let low = u32::try_from(address).unwrap();
        let mut written = false;
        for _ in 0..1000 {
            match self.vcpu.run().unwrap() {
                // The next operation is asked for: the write is done. The answer is given again.
                VcpuExit::IoIn(0x510, data) => {
                    data.copy_from_slice(&(if written { 0u32 } else { operation }).to_le_bytes());
                    if written {
                        // Reads RAM at 0: nothing of interest, and leaves the guest where it asks anew.
                        return self.operate(0, 0, 0);
                    }
                }
                VcpuExit::IoIn(0x514, data) => data.copy_from_slice(&low.to_le_bytes()),
                VcpuExit::IoIn(0x51C, data) => {
                    data.copy_from_slice(&value.to_le_bytes());
                    written = true;
                }
                VcpuExit::IoOut(0x518, data) => {
                    return Some(u32::from_le_bytes(data.try_into().unwrap()));
                }
                VcpuExit::IoOut(0x520, _) => self.interrupts += 1,
                VcpuExit::MmioRead(gpa, data) => {
                    data.fill(0xFF);
                    self.missed.push(gpa);
                }
                VcpuExit::MmioWrite(gpa, _) => self.missed.push(gpa),
                other => panic!("{other:?}"),
            }
        }
        panic!("the guest does not answer");
    }

    /// How many interrupts the guest has taken since the start, once it has taken `at_least`. KVM delivers what was pending when an
    /// eventfd became an irqfd from a thread of its own, so that this can take a moment.
    pub(crate) fn interrupts(&mut self, at_least: u32) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.interrupts < at_least && Instant::now() < deadline {
            self.peek(0);
        }
        // One too many would come in this time.
        let settled = Instant::now() + Duration::from_millis(30);
        while Instant::now() < settled {
            self.peek(0);
        }
        self.interrupts
    }
}

/// What is at the other end of the accesses that leave a [`User`]: a window, as a device's BAR, and nothing else.
pub(crate) struct Bar {
    pub(crate) window: Arc<dyn Window>,
    pub(crate) base: AtomicU64,
    pub(crate) size: u64,
    /// Accesses that the window refused: address, length, whether it was a write.
    pub(crate) missed: Mutex<Vec<(u64, usize, bool)>>,
    /// When it refuses a read or a write.
    pub(crate) on_miss: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Bar {
    fn miss(&self, gpa: u64, len: usize, write: bool) {
        self.missed.lock().unwrap().push((gpa, len, write));
        if let Some(act) = &mut *self.on_miss.lock().unwrap() {
            act();
        }
    }

    fn offset(&self, gpa: u64) -> Option<u64> {
        gpa.checked_sub(self.base.load(Ordering::SeqCst))
            .filter(|at| *at < self.size)
    }
}

impl Mmio for Bar {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(offset) = self.offset(gpa)
            && !self.window.read(offset, data)
        {
            self.miss(gpa, data.len(), false);
            self.window.read(offset, data);
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some(offset) = self.offset(gpa)
            && !self.window.write(offset, data)
        {
            self.miss(gpa, data.len(), true);
            self.window.write(offset, data);
        }
    }
}

/// A VM with 4 MiB of RAM whose vCPU runs [`pieces`] at CPL 3, with everything below 4 GiB mapped for it.
pub(crate) struct User {
    pub(crate) machine: Arc<Machine>,
    vcpu: VcpuFd,
    refused: Refused,
    pub(crate) bar: Arc<Bar>,
    /// Whether the processor has AVX-512.
    pub(crate) avx512: bool,
    /// Returns of KVM_RUN.
    pub(crate) exits: u64,
}

impl User {
    /// Where a piece's buffer is.
    pub(crate) const BUFFER: u64 = 0x20_0000;
    const GDT: u64 = 0x3_1000;
    const IDT: u64 = 0x3_0000;
    const TASK: u64 = 0x3_2000;
    const TABLES: u64 = 0x4_0000;
    const DONE: u64 = 0xE000_0000;
    const EXCEPTION: u64 = 0xE000_0008;

    /// With a window of `size` bytes at `base`.
    pub(crate) fn new(base: u64, size: u64) -> Self {
        Self::with_files(base, size, Files::Sealed)
    }

    /// With a window that shows these files.
    pub(crate) fn with_files(base: u64, size: u64, files: Files) -> Self {
        let machine = Machine::new(&kvm(), Memory::new(&ram(4 << 20)).unwrap()).unwrap();
        let window = machine.window(size, files).unwrap();
        window.place(Some(base)).unwrap();
        let vcpu = machine.vm().create_vcpu(0).unwrap();
        vcpu::set_up(machine.vm(), machine.cpuid(), &vcpu, 0, 1).unwrap();
        let memory = machine.memory();
        boot::load(memory, 4 << 20, &image(pieces()), None, "").unwrap();
        let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        let tables = Self::TABLES;
        put(tables, tables + 0x1007);
        for gib in 0..4 {
            put(
                tables + 0x1000 + gib * 8,
                (tables + 0x2000 + gib * 0x1000) | 7,
            );
        }
        for page in 0..2048 {
            put(tables + 0x2000 + page * 8, page << 21 | 0x87);
        }
        let gdt = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8903_2000_0067,
            0,
        ];
        for (at, entry) in (Self::GDT..).step_by(8).zip(gdt) {
            put(at, entry);
        }
        // RSP0
        put(Self::TASK + 4, 0x3_8000);
        for (vector, number) in [6, 13, 14].into_iter().zip(0..) {
            let handler = CODE + (HANDLERS + number) * 32;
            let gate =
                handler & 0xFFFF | 0x08 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48;
            put(Self::IDT + vector * 16, gate);
        }
        // SAFETY: CPUID has no side effects.
        let supported = std::arch::x86_64::__cpuid_count(0xD, 0).eax & 0xE7;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = supported.into();
        let bar = Bar {
            window,
            base: AtomicU64::new(base),
            size,
            missed: Mutex::default(),
            on_miss: Mutex::default(),
        };
        let user = User {
            refused: Refused::new(machine.windows(), machine.memory()),
            machine: Arc::new(machine),
            vcpu,
            bar: Arc::new(bar),
            avx512: supported == 0xE7,
            exits: 0,
        };
        user.to_user();
        user.vcpu.set_xcrs(&xcrs).unwrap();
        user
    }

    fn to_user(&self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        let data = kvm_segment {
            limit: 0xFFFF_FFFF,
            selector: 0x1B,
            type_: 3,
            present: 1,
            dpl: 3,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cs = kvm_segment {
            selector: 0x23,
            type_: 11,
            db: 0,
            l: 1,
            ..data
        };
        sregs.tr = kvm_segment {
            base: Self::TASK,
            limit: 0x67,
            selector: 0x28,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (Self::GDT, 7 * 8 - 1);
        (sregs.idt.base, sregs.idt.limit) = (Self::IDT, 32 * 16 - 1);
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = Self::TABLES;
        sregs.cr4 = 0x4_0620;
        sregs.efer |= 0x500;
        self.vcpu.set_sregs(&sregs).unwrap();
    }

    /// Runs a piece to its end; returns RAX, or the number of the exception that it raised.
    pub(crate) fn call(&mut self, op: Op, rbx: u64, rax: u64) -> Result<u64, u64> {
        self.run(op, rbx, rax, None).expect("it ends")
    }

    /// Runs a piece until it ends or `stop` is set and the vCPU's thread is interrupted or leaves the guest.
    pub(crate) fn run(
        &mut self,
        op: Op,
        rbx: u64,
        rax: u64,
        stop: Option<&AtomicBool>,
    ) -> Option<Result<u64, u64>> {
        self.to_user();
        let regs = kvm_regs {
            rax,
            rbx,
            rcx: Self::BUFFER,
            r14: Self::EXCEPTION,
            r15: Self::DONE,
            rsp: 0x3_9000,
            rip: CODE + op as u64 * 32,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                return None;
            }
            self.exits += 1;
            let result = self.vcpu.run();
            let refused = refused_at(&result).is_some();
            let next = match result {
                _ if refused => self.refused.fault(&mut self.vcpu, &*self.bar),
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    self.bar.mmio_read(gpa, data);
                    self.refused.answered(&mut self.vcpu);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    let value = u64::from(data.first().copied().unwrap_or(0));
                    if gpa == Self::DONE || gpa == Self::EXCEPTION {
                        self.refused.returned(&mut self.vcpu);
                        // Completes the access, so that the registers can be set.
                        self.vcpu.set_kvm_immediate_exit(1);
                        assert!(self.vcpu.run().is_err());
                        self.vcpu.set_kvm_immediate_exit(0);
                        let rax = self.vcpu.get_regs().unwrap().rax;
                        return Some(if gpa == Self::DONE {
                            Ok(rax)
                        } else {
                            Err(value)
                        });
                    }
                    self.bar.mmio_write(gpa, data);
                    self.refused.answered(&mut self.vcpu);
                    continue;
                }
                Ok(VcpuExit::InternalError) => self.refused.unemulated(&mut self.vcpu, &*self.bar),
                Err(e) if e.errno() == libc::EINTR => {
                    self.refused.returned(&mut self.vcpu);
                    continue;
                }
                other => {
                    let text = format!("{other:?}");
                    panic!("{text} at {:x?}", self.vcpu.get_regs().unwrap());
                }
            };
            match next {
                Next::Run => {}
                Next::Undefined => raise_undefined(&self.vcpu).unwrap(),
                Next::Real => panic!(
                    "the vCPU cannot go on: {:x?}",
                    self.vcpu.get_regs().unwrap()
                ),
            }
        }
    }

    pub(crate) fn buffer(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        let memory = self.machine.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(Self::BUFFER))
            .unwrap();
        bytes
    }

    pub(crate) fn set_buffer(&self, bytes: &[u8; 64]) {
        let memory = self.machine.memory();
        memory
            .write_slice(bytes, GuestAddress(Self::BUFFER))
            .unwrap();
    }

    /// What has been refused since the last time.
    pub(crate) fn missed(&self) -> Vec<(u64, usize, bool)> {
        std::mem::take(&mut *self.bar.missed.lock().unwrap())
    }
}
