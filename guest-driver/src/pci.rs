//! PCI functions on bus 0: finding them, their BARs, their capabilities, MSI-X (PCI 3.0, chapter 6).

use core::fmt;
use core::ptr::NonNull;

use crate::mmio::Registers;
use crate::{MsiMessage, Platform};

const COMMAND: u16 = 0x04;
const STATUS_CAPABILITIES: u32 = 1 << (16 + 4);
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;
const COMMAND_NO_INTX: u32 = 1 << 10;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const CAP_MSIX: u8 = 0x11;
/// A capability takes at least four bytes, so configuration space holds no more of them.
const MAX_CAPABILITIES: usize = 48;

/// A function that was found.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Device * 8 + function, on bus 0.
    pub number: u8,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00:{:02x}.{} [{:04x}:{:04x}]",
            self.number >> 3,
            self.number & 7,
            self.vendor,
            self.device
        )
    }
}

/// A memory BAR.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Bus address.
    pub addr: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The single-function devices on bus 0.
pub fn functions<P: Platform>(platform: &P) -> impl Iterator<Item = Function> + '_ {
    (0..32u8).filter_map(move |device| {
        let number = device << 3;
        let id = platform.config_read(number, 0);
        let (vendor, device) = (low(id), low(id >> 16));
        (vendor != 0xffff).then_some(Function {
            number,
            vendor,
            device,
        })
    })
}

impl Function {
    /// Turns on memory decoding and bus mastering.
    pub fn enable<P: Platform>(&self, platform: &P) {
        let command = platform.config_read(self.number, COMMAND) & 0xffff;
        let wanted = command | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        platform.config_write(self.number, COMMAND, wanted);
    }

    /// Where memory BAR `index` is and how large; `None` for an I/O or absent BAR. Sizing takes the BAR off the bus for a moment.
    #[must_use]
    pub fn bar<P: Platform>(&self, platform: &P, index: u8) -> Option<Bar> {
        if index > 5 {
            return None;
        }
        let register = BAR0 + 4 * u16::from(index);
        let command = platform.config_read(self.number, COMMAND) & 0xffff;
        platform.config_write(self.number, COMMAND, command & !COMMAND_MEMORY);
        let probe = |register: u16| {
            let old = platform.config_read(self.number, register);
            platform.config_write(self.number, register, u32::MAX);
            let mask = platform.config_read(self.number, register);
            platform.config_write(self.number, register, old);
            (old, mask)
        };
        let (low, low_mask) = probe(register);
        let wide = low & 0x7 == 0x4 && index < 5;
        let (high, high_mask) = if wide {
            probe(register + 4)
        } else {
            (0, u32::MAX)
        };
        platform.config_write(self.number, COMMAND, command);
        if low & 1 != 0 || low_mask == 0 {
            return None;
        }
        let addr = u64::from(high) << 32 | u64::from(low & !0xf);
        let mask = u64::from(high_mask) << 32 | u64::from(low_mask & !0xf);
        Some(Bar {
            addr,
            size: mask.wrapping_neg(),
        })
    }

    /// The capabilities: where each starts, and its ID.
    pub fn capabilities<'a, P: Platform>(
        &self,
        platform: &'a P,
    ) -> impl Iterator<Item = (u16, u8)> + 'a {
        let number = self.number;
        let present = platform.config_read(number, COMMAND) & STATUS_CAPABILITIES != 0;
        let mut next = if present {
            platform.config_read(number, CAPABILITIES) & 0xfc
        } else {
            0
        };
        (0..MAX_CAPABILITIES).map_while(move |_| {
            let offset = u16::try_from(next).ok().filter(|&offset| offset >= 0x40)?;
            let header = platform.config_read(number, offset);
            next = header >> 8 & 0xfc;
            Some((offset, byte(header)))
        })
    }

    /// The MSI-X table, with interrupts turned on and every vector masked; `None` where the function has no MSI-X.
    #[must_use]
    pub fn msix<P: Platform>(&self, platform: &P) -> Option<Msix> {
        let (offset, _) = self
            .capabilities(platform)
            .find(|&(_, id)| id == CAP_MSIX)?;
        let control = platform.config_read(self.number, offset);
        let vectors = low(control >> 16 & 0x7ff) + 1;
        let place = platform.config_read(self.number, offset + 4);
        let bar = self.bar(platform, byte(place & 7))?;
        let len = usize::from(vectors) * 16;
        let table = map(platform, bar, u64::from(place & !7), len)?;
        for vector in 0..usize::from(vectors) {
            table.write_u32(vector * 16 + 12, 1);
        }
        platform.config_write(self.number, offset, control & 0x3fff_ffff | 1 << 31);
        Some(Msix { table, vectors })
    }
}

/// The MSI-X table of a function.
#[derive(Debug)]
pub struct Msix {
    table: Registers,
    vectors: u16,
}

impl Msix {
    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Gives a vector its message and unmasks it; nothing happens beyond the table.
    pub fn set(&self, vector: u16, message: MsiMessage) {
        if vector >= self.vectors {
            return;
        }
        let entry = usize::from(vector) * 16;
        self.table.write_u32(entry + 12, 1);
        self.table.write_u32(entry, low32(message.address));
        self.table
            .write_u32(entry + 4, low32(message.address >> 32));
        self.table.write_u32(entry + 8, message.data);
        self.table.write_u32(entry + 12, 0);
    }
}

/// Maps a part of a BAR as registers; `None` where it does not lie in it.
#[allow(unsafe_code)] // hands a mapping that the platform made to the type that accesses it
pub(crate) fn map<P: Platform>(
    platform: &P,
    bar: Bar,
    offset: u64,
    len: usize,
) -> Option<Registers> {
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    if end > bar.size {
        return None;
    }
    let base: NonNull<u8> = platform.map(bar.addr + offset, end - offset)?;
    // SAFETY: the platform mapped `len` bytes of a BAR, for ever.
    Some(unsafe { Registers::new(base, len) })
}

fn byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

fn low(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

pub(crate) fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
