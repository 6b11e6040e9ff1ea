//! The configuration space of a type-0 function (PCI Local Bus 3.0, section 6).

use std::ops::Range;

use super::{BARS, Error};

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Where the first capability goes: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Smallest memory BAR: the lower bits of the register have other meanings.
const MIN_BAR: u64 = 16;

/// What the header says that a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The bits of the command register that mean something here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// The function answers at its memory BARs.
    pub memory: bool,
    /// The function may write to memory, which is also how it sends its interrupts.
    pub bus_master: bool,
}

/// What a BAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit memory, not prefetchable.
    Memory32,
    /// 64-bit memory, prefetchable; it takes the next register too.
    Memory64,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// 256 bytes of registers, of which a mask says what the guest can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes.
    next: usize,
    /// The pointer that is to lead to it.
    link: usize,
}

impl ConfigSpace {
    /// A function without BARs, capabilities or an interrupt pin.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; BARS],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        config.put(0x00, &identity.vendor.to_le_bytes());
        config.put(0x02, &identity.device.to_le_bytes());
        // The lowest 24 bits of the class lie above the revision.
        config.put(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        config.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        config.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        config.allow(COMMAND, &command.to_le_bytes());
        config.allow(CACHE_LINE, &[0xff]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The 32-bit register at `offset`; zero for one that is not there.
    #[must_use]
    pub fn u32_at(&self, offset: u16) -> u32 {
        let mut register = [0; 4];
        self.read(offset, &mut register);
        u32::from_le_bytes(register)
    }

    /// Adds a memory BAR of `size` bytes, a power of two, which must fit the kind.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), Error> {
        let error = Error::Bar(index);
        let at = usize::from(index);
        let (registers, largest) = match kind {
            BarKind::Memory32 => (1, 1 << 31),
            BarKind::Memory64 => (2, 1 << 63),
        };
        let taken = |i: usize| {
            self.bars[i].is_some()
                || i > 0
                    && matches!(
                        self.bars[i - 1],
                        Some(Bar {
                            kind: BarKind::Memory64,
                            ..
                        })
                    )
        };
        if at + registers > BARS || (at..at + registers).any(taken) {
            return Err(error);
        }
        if !size.is_power_of_two() || !(MIN_BAR..=largest).contains(&size) {
            return Err(error);
        }
        // Only address bits can be written, so that a guest that writes all-ones reads back the size.
        let mask = (!(size - 1)).to_le_bytes();
        let register = BAR0 + 4 * at;
        self.allow(register, &mask[..4 * registers]);
        if kind == BarKind::Memory64 {
            self.bytes[register] = 0b1100;
        }
        self.bars[at] = Some(Bar { kind, size });
        Ok(())
    }

    /// Appends a capability: `body` is what follows the ID and the next pointer, and `writable` (as long as `body` or shorter) says
    /// which of its bits the guest can write. Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, Error> {
        let at = self.next;
        let end = at + 2 + body.len();
        let (Ok(pointer), true) = (
            u8::try_from(at),
            end <= SIZE && writable.len() <= body.len(),
        ) else {
            return Err(Error::Capabilities);
        };
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[self.link] = pointer;
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        Ok(u16::from(pointer))
    }

    /// Reads any bytes; those behind the space are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> Command {
        let command = self.u16_at(COMMAND);
        Command {
            memory: command & COMMAND_MEMORY != 0,
            bus_master: command & COMMAND_BUS_MASTER != 0,
        }
    }

    /// What each BAR decodes now, as [`super::PciFunction::bars`] reports it. Address 0 counts as none.
    #[must_use]
    pub fn bars(&self) -> [Option<Range<u64>>; BARS] {
        let mut ranges = [const { None }; BARS];
        if !self.command().memory {
            return ranges;
        }
        for ((range, bar), offset) in ranges
            .iter_mut()
            .zip(&self.bars)
            .zip((0x10u16..).step_by(4))
        {
            let Some(bar) = bar else { continue };
            let mut base = u64::from(self.u32_at(offset) & !0xf);
            if bar.kind == BarKind::Memory64 {
                base |= u64::from(self.u32_at(offset + 4)) << 32;
            }
            *range = base
                .checked_add(bar.size)
                .filter(|_| base != 0)
                .map(|end| base..end);
        }
        ranges
    }
}
