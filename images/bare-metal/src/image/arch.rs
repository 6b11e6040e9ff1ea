//! The processor: privileged entry code, the gate into it, interrupts, the heap's and compiler's needs.
//!
//! Unsafe code: this is the bottom of a freestanding program; what hardware and the boot protocol promise is stated at each block.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm, x86_64::_rdtsc};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static entry_points: [u64; 37];
    static mut idt: [[u64; 2]; 256];
    static pending_events: AtomicU32;
    static fault_info: [AtomicU64; 5];
    static image_end: u8;
    static pdpt: [AtomicU64; 512];
}

/// Bytes that one entry of the page directory pointer table maps.
pub const GIB: u64 = 1 << 30;
/// Memory that boot.s has mapped.
pub const MAPPED_AT_BOOT: u64 = 4 * GIB;
/// What one page directory pointer table can map.
pub const MAPPABLE: u64 = 512 * GIB;

/// What interrupts have noted.
pub mod event {
    /// A ring made progress.
    pub const QUEUE: u32 = 1;
    /// A device's configuration changed.
    pub const CONFIG: u32 = 2;
    /// The control channel has input.
    pub const CONTROL: u32 = 4;
    /// The timer expired.
    pub const TIMER: u32 = 8;
}

/// Vector of [`event::QUEUE`].
pub const VECTOR_QUEUE: u8 = 0x40;
/// Vector of [`event::CONFIG`].
pub const VECTOR_CONFIG: u8 = 0x41;
/// Vector of [`event::CONTROL`].
pub const VECTOR_CONTROL: u8 = 0x42;

/// Fills the interrupt table. Until then, a fault would end the VM without a word.
pub fn init_interrupts() {
    let vectors = (0..32usize).chain(0x40..0x44).chain([0xff]);
    for (i, vector) in vectors.enumerate() {
        // SAFETY: boot.s defines the entry points, and the table, which nobody else touches; interrupts that
        // could come meanwhile are masked at their sources.
        unsafe {
            let entry = entry_points[i];
            // Offset 15:0, selector 8, interrupt gate of CPL 0, offset 31:16, then 63:32.
            idt[vector][0] =
                entry & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (entry >> 16 & 0xffff) << 48;
            idt[vector][1] = entry >> 32;
        }
    }
}

/// Takes the events among `mask` that were noted since the last time; clears them.
pub fn take_events(mask: u32) -> u32 {
    // SAFETY: boot.s defines it; interrupts only set bits, in one instruction.
    unsafe { pending_events.fetch_and(!mask, Ordering::SeqCst) & mask }
}

/// Notes an event that was taken once more.
pub fn note_event(event: u32) {
    // SAFETY: boot.s defines it; interrupts only set bits, in one instruction.
    unsafe { pending_events.fetch_or(event, Ordering::SeqCst) };
}

/// Vector, error code, instruction pointer and CR2 of the fault that was taken.
pub fn fault() -> [u64; 4] {
    // SAFETY: boot.s defines it.
    core::array::from_fn(|i| unsafe { fault_info[i].load(Ordering::Relaxed) })
}

/// Maps the GiB that `addr` lies in, writable, to itself, with the page directory that `directory` gives (a zeroed page whose
/// address is also its physical one) if it is not mapped yet. `None` where it cannot be mapped.
pub fn map_gib(addr: u64, directory: impl FnOnce() -> Option<*mut u64>) -> Option<()> {
    const PRESENT_WRITABLE_USER: u64 = 0x7;
    const LARGE: u64 = 0x80;
    // SAFETY: boot.s defines it.
    let entry = unsafe { pdpt.get(usize::try_from(addr / GIB).ok()?)? };
    if entry.load(Ordering::Relaxed) == 0 {
        let pages = directory()?;
        for i in 0..512usize {
            let page = (addr & !(GIB - 1)) + (i as u64) * (2 << 20);
            // SAFETY: a page has 512 entries, and this one is new.
            unsafe { pages.add(i).write(page | LARGE | PRESENT_WRITABLE_USER) };
        }
        entry.store(
            pages.addr() as u64 | PRESENT_WRITABLE_USER,
            Ordering::SeqCst,
        );
    }
    Some(())
}

/// The first address behind the image.
pub fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

/// The time-stamp counter.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: every x86-64 has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Goes through the gate: see boot.s for the requests.
#[inline(always)]
fn gate(request: u64, port: u16, count: u64, address: u64) -> u64 {
    let mut rax = request;
    // SAFETY: the gate changes these registers only, and memory only where the callers below say.
    unsafe {
        asm!(
            "hlt",
            inout("rax") rax,
            inout("rcx") count => _,
            inout("rdx") u64::from(port) => _,
            inout("rsi") address => _,
            inout("rdi") address => _,
        );
    }
    rax
}

/// Sleeps until an event is noted; returns at once where one is.
pub fn sleep() {
    gate(0, 0, 0, 0);
}

/// Notes [`event::TIMER`] when the time-stamp counter shows `at`.
pub fn arm_timer(at: u64) {
    gate(5, 0, at, 0);
}

/// Writes bytes to a port.
pub fn write_port(port: u16, bytes: &[u8]) {
    gate(1, port, bytes.len() as u64, bytes.as_ptr().addr() as u64);
}

/// Reads bytes from a port.
pub fn read_port(port: u16, bytes: &mut [u8]) {
    gate(
        2,
        port,
        bytes.len() as u64,
        bytes.as_mut_ptr().addr() as u64,
    );
}

/// Writes one byte to a port.
pub fn out8(port: u16, value: u8) {
    gate(4, port, u64::from(value), 0);
}

/// Memory routines that the compiler calls.
mod compiler {
    use super::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's contract is that of the C function.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _, options(nostack))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if to.addr().wrapping_sub(from.addr()) >= len {
            // SAFETY: going forward is right where `to` does not lie behind `from` within `len`.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: going backward is right otherwise; the direction flag is restored.
        unsafe {
            asm!(
                "std", "rep movsb", "cld",
                inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
                inout("rcx") len => _, options(nostack)
            );
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's contract is that of the C function.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") value.to_le_bytes()[0], inout("rcx") len => _, options(nostack))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        let mut i = 0;
        while i < len {
            // SAFETY: the caller's contract is that of the C function. Volatile, or this loop becomes a call to itself.
            let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
            i += 1;
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        // SAFETY: as above.
        unsafe { memcmp(a, b, len) }
    }
}
