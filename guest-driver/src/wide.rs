//! Accesses of one instruction each, from 1 to 64 bytes, for whoever studies what a window lets through.
//!
//! Unsafe code: each access is one instruction whatever the compiler thinks of the surrounding code; addresses were checked against a [`Linear`].
#![allow(unsafe_code)]

use core::arch::asm;

use virtqueue::linear::Linear;

use crate::bulk;

/// Bytes of the widest access.
pub const MAX_WIDTH: usize = 64;

/// Whether this processor has accesses of this many bytes.
#[must_use]
pub fn has(width: usize) -> bool {
    matches!(width, 1 | 2 | 4 | 8 | 16 | 32 | 64) && width <= bulk::width().max(16)
}

/// Moves `width` bytes through a register with one load and one store; nothing for a width that is not one of the seven.
///
/// # Safety
/// Both ranges are mapped; the processor has the width ([`has`]).
#[inline(never)]
unsafe fn transfer(to: *mut u8, from: *const u8, width: usize) {
    /// One width: a load and a store.
    macro_rules! through {
        ($load:literal, $store:literal) => {
            asm!($load, $store, from = in(reg) from, to = in(reg) to, out("rax") _, out("xmm0") _, options(nostack, preserves_flags))
        };
    }
    // SAFETY: the caller's promises.
    unsafe {
        match width {
            1 => through!("mov al, byte ptr [{from}]", "mov byte ptr [{to}], al"),
            2 => through!("mov ax, word ptr [{from}]", "mov word ptr [{to}], ax"),
            4 => through!("mov eax, dword ptr [{from}]", "mov dword ptr [{to}], eax"),
            8 => through!("mov rax, qword ptr [{from}]", "mov qword ptr [{to}], rax"),
            16 => through!(
                "movdqu xmm0, xmmword ptr [{from}]",
                "movdqu xmmword ptr [{to}], xmm0"
            ),
            32 => through!(
                "vmovdqu ymm0, ymmword ptr [{from}]",
                "vmovdqu ymmword ptr [{to}], ymm0"
            ),
            64 => through!(
                "vmovdqu64 zmm0, zmmword ptr [{from}]",
                "vmovdqu64 zmmword ptr [{to}], zmm0"
            ),
            _ => {}
        }
    }
}

/// Reads `width` bytes at a device address with one load. `None` where they are not inside, or the processor has no such load.
#[inline]
#[must_use]
pub fn read(memory: &Linear, addr: u64, width: usize) -> Option<[u8; MAX_WIDTH]> {
    let from = memory.ptr(addr, width).filter(|_| has(width))?;
    let mut bytes = [0; MAX_WIDTH];
    // SAFETY: `ptr` checked the range; `bytes` is ours and as wide as the widest access.
    unsafe { transfer(bytes.as_mut_ptr(), from, width) };
    Some(bytes)
}

/// Writes the first `width` bytes with one store. `false` where they are not inside, or the processor has no such store.
#[inline]
pub fn write(memory: &Linear, addr: u64, width: usize, bytes: &[u8; MAX_WIDTH]) -> bool {
    let Some(to) = memory.ptr(addr, width).filter(|_| has(width)) else {
        return false;
    };
    // SAFETY: as for the read.
    unsafe { transfer(to, bytes.as_ptr(), width) };
    true
}

/// Reads a little-endian word of 8 bytes with one load; `None` where it is not inside.
#[inline]
#[must_use]
pub fn read_word(memory: &Linear, addr: u64) -> Option<u64> {
    let [a, b, c, d, e, f, g, h, ..] = read(memory, addr, 8)?;
    Some(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

/// Writes a little-endian word of 8 bytes with one store; `false` where it is not inside.
#[inline]
pub fn write_word(memory: &Linear, addr: u64, value: u64) -> bool {
    let mut bytes = [0; MAX_WIDTH];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    write(memory, addr, 8, &bytes)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn every_width_moves_exactly_its_bytes() {
        bulk::detect();
        let mut words = vec![0u64; 64];
        // SAFETY: the vector outlives the test and is not touched otherwise.
        let memory = unsafe { Linear::new(words.as_mut_ptr().cast(), 0x1000, 512) };
        let pattern: [u8; MAX_WIDTH] = core::array::from_fn(|i| i.to_le_bytes()[0] + 1);
        for width in [1, 2, 4, 8, 16, 32, 64].into_iter().filter(|&w| has(w)) {
            for at in (0..64).chain([512 - width as u64]) {
                let blank = [0; MAX_WIDTH];
                for clear in 0..8 {
                    for step in [16, 0] {
                        write(&memory, 0x1000 + clear * 64 + step, 16, &blank);
                        write(&memory, 0x1000 + clear * 64 + step + 32, 16, &blank);
                    }
                }
                assert!(write(&memory, 0x1000 + at, width, &pattern));
                let got = read(&memory, 0x1000 + at, width).unwrap();
                assert_eq!(got[..width], pattern[..width]);
                assert_eq!(got[width..], blank[width..]);
                let sum: u64 = (0..512)
                    .map(|i| u64::from(read(&memory, 0x1000 + i, 1).unwrap()[0]))
                    .sum();
                let wanted = (1..=width as u64).sum::<u64>();
                assert_eq!(sum, wanted, "width {width} at {at} wrote beside itself");
            }
            assert!(read(&memory, 0x1000 + 513 - width as u64, width).is_none());
            assert!(!write(&memory, 0xfff, width, &pattern));
        }
        assert!(read(&memory, 0x1000, 3).is_none());
    }
}
