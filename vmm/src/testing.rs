//! A tiny guest and a VM to run it in, for the tests of this crate.
#![allow(unsafe_code)] // assembled guest code, memfds
#![allow(clippy::unwrap_used)]

use std::arch::global_asm;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::host::{Host, SharedRegion};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{self, Kernel};
use crate::host::{Machine, open_kvm};
use crate::memory::{HugePages, Memory, MemoryConfig};
use crate::vcpu;

/// Where [`elf`] puts its code.
pub(crate) const CODE: u64 = 0x10_0000;

/// Assembles a guest: `name()` is its code.
macro_rules! guest {
    ($name:ident, $start:literal, $end:literal, $($line:literal)*) => {
        global_asm!(
            ".pushsection .rodata.test_guests, \"a\", @progbits",
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
