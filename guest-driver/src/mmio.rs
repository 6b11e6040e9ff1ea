//! Device registers.
//!
//! Unsafe code: registers are raw addresses. Each access is one plain `mov`, whatever the compiler thinks of the surrounding code: an
//! access that leaves the guest is decoded from the instruction, and a hypervisor need not decode others.
#![allow(unsafe_code)]

use core::arch::asm;
use core::ptr::NonNull;

/// A mapped range of registers.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping of device registers belongs to no thread; every access is one instruction.
unsafe impl Send for Registers {}

/// Defines one width of access; out of range reads as all-ones and writes nowhere, as on the bus.
macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $reg:literal, $size:literal, $class:ident) => {
        /// Reads a register; all-ones beyond the range or off its natural alignment.
        #[inline]
        pub fn $read(&self, offset: usize) -> $type {
            if !self.holds(offset, size_of::<$type>()) {
                return <$type>::MAX;
            }
            let value: $type;
            // SAFETY: `holds` keeps the access inside the mapping that `new` was promised.
            unsafe {
                asm!(
                    concat!("mov {value", $reg, "}, ", $size, " ptr [{address}]"),
                    address = in(reg) self.base.as_ptr().add(offset),
                    value = out($class) value,
                    options(nostack, preserves_flags)
                );
            }
            value
        }

        /// Writes a register; nothing happens beyond the range or off its natural alignment.
        #[inline]
        pub fn $write(&self, offset: usize, value: $type) {
            if !self.holds(offset, size_of::<$type>()) {
                return;
            }
            // SAFETY: as in the read.
            unsafe {
                asm!(
                    concat!("mov ", $size, " ptr [{address}], {value", $reg, "}"),
                    address = in(reg) self.base.as_ptr().add(offset),
                    value = in($class) value,
                    options(nostack, preserves_flags)
                );
            }
        }
    };
}

impl Registers {
    /// Registers at `base`.
    ///
    /// # Safety
    /// `len` bytes from `base` stay mapped as long as the value or a copy of it lives, and nothing in them is Rust's.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// The part of the range from `offset` on; `None` where it is not inside.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: `offset` is inside the mapping.
        let base = unsafe { self.base.add(offset) };
        Some(Self { base, len })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no register at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn holds(&self, offset: usize, size: usize) -> bool {
        offset.is_multiple_of(size) && self.len >= size && offset <= self.len - size
    }

    access!(read_u8, write_u8, u8, "", "byte", reg_byte);
    access!(read_u16, write_u16, u16, ":x", "word", reg);
    access!(read_u32, write_u32, u32, ":e", "dword", reg);
}
