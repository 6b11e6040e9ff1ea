//! The packed virtqueue, VIRTIO 1.3 section 2.8.
//!
//! One ring of descriptors, which both sides write: the driver makes them available, the device writes used ones over what it has read. Which of the two
//! a descriptor is, two flags say, and what they mean changes each time around (section 2.8.1). [`Driver`] and
//! [`Device`] keep positions and all their bookkeeping in private memory, and neither reads back what it wrote.
//!
//! A batch is published with one store: that of the second half of its first descriptor (length, id and flags), which is held back
//! until everything behind it is written. The other side waits at this one.

mod device;
mod driver;
#[cfg(all(test, not(loom)))]
mod tests;

pub use device::Device;
pub use driver::Driver;

use core::hint::cold_path;

use crate::chain::DESC_LEN;
use crate::{Buffer, Error, Layout, Memory, RingConfig};

/// Largest number of descriptors (section 2.8).
pub const MAX_SIZE: u16 = 32768;

/// Descriptor flag: the chain goes on in the next descriptor (section 2.8.6).
const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer (section 2.8.3).
const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors (section 2.8.7).
const INDIRECT: u16 = 4;
/// Descriptor flag: the driver's wrap counter when it made the descriptor available (section 2.8.1).
const AVAIL: u16 = 1 << 7;
/// Descriptor flag: its inverse, or the device's wrap counter when it used the descriptor.
const USED: u16 = 1 << 15;

/// Size of an event suppression structure in bytes.
const EVENT_LEN: usize = 4;

/// Event flags (section 2.8.10), where they are in the structure: notify always.
const EVENT_ENABLE: u32 = 0;
/// Notify never.
const EVENT_DISABLE: u32 = 1 << 16;
/// Notify of one descriptor.
const EVENT_DESC: u32 = 2 << 16;
/// The bits that are flags.
const EVENT_FLAGS: u32 = 3 << 16;

/// The packed layout (VIRTIO 1.3 section 2.8): any size up to [`MAX_SIZE`].
#[derive(Clone, Copy, Debug)]
pub struct Packed;

impl Layout for Packed {
    type Driver<M: Memory> = Driver<M>;
    type Device<M: Memory> = Device<M>;

    const ALIGN: [usize; 3] = [16, EVENT_LEN, EVENT_LEN];
    const FRESH: u32 = 0x8000_8000;

    fn area_sizes(size: u16) -> Option<[usize; 3]> {
        let fits = (1..=MAX_SIZE).contains(&size);
        fits.then(|| [DESC_LEN * usize::from(size), EVENT_LEN, EVENT_LEN])
    }

    fn driver_at<M: Memory>(memory: M, config: &RingConfig, base: u32) -> Result<Driver<M>, Error> {
        Driver::with_base(memory, config, base)
    }

    fn device<M: Memory>(memory: M, config: &RingConfig) -> Result<Device<M>, Error> {
        Device::new(memory, config)
    }

    fn device_at<M: Memory>(memory: M, config: &RingConfig, base: u32) -> Result<Device<M>, Error> {
        Device::with_base(memory, config, base)
    }
}

/// The three areas, checked.
#[derive(Clone, Copy, Debug)]
struct Areas<R> {
    desc: R,
    /// The driver's event suppression.
    driver: R,
    /// The device's event suppression.
    device: R,
}

impl<R> Areas<R> {
    /// Checks size, alignment and place.
    fn new<M: Memory<Region = R>>(memory: &M, config: &RingConfig) -> Result<Self, Error> {
        let [desc, driver, device] = Packed::area_sizes(config.size).ok_or(Error::Config)?;
        let [desc_align, driver_align, device_align] = Packed::ALIGN;
        let area = |addr, len, align| memory.region(addr, len, align).ok_or(Error::Config);
        Ok(Self {
            desc: area(config.desc, desc, desc_align)?,
            driver: area(config.driver, driver, driver_align)?,
            device: area(config.device, device, device_align)?,
        })
    }
}

/// A place in the ring and the wrap counter there (section 2.8.1), as they are in event suppression structures (section 2.8.14) and in
/// a ring's base: 15 bits, and the counter on top. (As one number it is stored and loaded as one, by code that waits for it.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position(u16);

/// The wrap counter in a [`Position`].
const WRAP: u16 = 1 << 15;

impl Position {
    /// Where both sides of a ring start.
    const START: Self = Self(WRAP);

    /// The two positions of a base: available and used.
    fn from_base(base: u32, size: u16) -> Result<[Self; 2], Error> {
        let [a0, a1, u0, u1] = base.to_le_bytes();
        let positions = [[a0, a1], [u0, u1]].map(|half| Self(u16::from_le_bytes(half)));
        if positions.iter().all(|position| position.slot() < size) {
            Ok(positions)
        } else {
            Err(Error::Config)
        }
    }

    #[inline]
    fn slot(self) -> u16 {
        self.0 & !WRAP
    }

    #[inline]
    fn wrap(self) -> bool {
        self.0 & WRAP != 0
    }

    /// The same place one turn before or behind.
    fn other_turn(self) -> Self {
        Self(self.0 ^ WRAP)
    }

    /// One descriptor further. The end of the ring is a branch and no selection: the processor then knows the next place at once.
    #[inline]
    fn next(self, size: u16) -> Self {
        if self.slot().wrapping_add(1) == size {
            cold_path();
            Self(self.0 & WRAP ^ WRAP)
        } else {
            Self(self.0.wrapping_add(1))
        }
    }

    /// `count` descriptors further, at most a whole turn. One is a branch for the same reason: where the count comes from the ring, the
    /// next place would have to wait for it.
    #[inline]
    fn step(self, count: u16, size: u16) -> Self {
        if count == 1 {
            return self.next(size);
        }
        cold_path();
        // Neither is more than 2^15.
        let slot = self.slot().wrapping_add(count);
        let wrap = self.0 & WRAP;
        if slot < size {
            Self(slot | wrap)
        } else {
            Self(slot.wrapping_sub(size) | wrap ^ WRAP)
        }
    }

    /// `count` descriptors back, at most a whole turn.
    #[inline]
    fn back(self, count: u16, size: u16) -> Self {
        if count <= self.slot() {
            Self(self.0.wrapping_sub(count))
        } else {
            self.other_turn().step(size.wrapping_sub(count), size)
        }
    }

    /// How far ahead of `from` it is, taken to be less than a turn behind and less than two turns ahead.
    #[inline]
    fn ahead(self, from: Self, size: u16) -> i32 {
        let turn = if self.wrap() == from.wrap() { 0 } else { size };
        i32::from(self.slot()) - i32::from(from.slot()) + i32::from(turn)
    }

    /// The offset of the descriptor.
    #[inline]
    fn offset(self) -> usize {
        DESC_LEN * usize::from(self.slot())
    }

    /// The flags that make a descriptor here available, in a descriptor's second half.
    #[inline]
    fn available(self) -> u64 {
        in_word(if self.wrap() { AVAIL } else { USED })
    }

    /// The flags that make a descriptor here used.
    #[inline]
    fn used(self) -> u64 {
        in_word(if self.wrap() { AVAIL | USED } else { 0 })
    }
}

/// A [`Position`] as loops use it: the offset of a descriptor, and the flags that it has there in one of the two states.
#[derive(Clone, Copy)]
struct Cursor {
    at: usize,
    state: u64,
    end: usize,
}

impl Cursor {
    /// For descriptors that are available.
    #[inline]
    fn available(position: Position, size: u16) -> Self {
        Self {
            at: position.offset(),
            state: position.available(),
            end: DESC_LEN * usize::from(size),
        }
    }

    /// For used ones.
    #[inline]
    fn used(position: Position, size: u16) -> Self {
        Self {
            state: position.used(),
            ..Self::available(position, size)
        }
    }

    /// One descriptor further.
    #[inline]
    fn advance(&mut self) {
        self.at = self.at.wrapping_add(DESC_LEN);
        if self.at == self.end {
            cold_path();
            self.at = 0;
            // Both flags change from one turn to the next, in either state.
            self.state ^= STATE;
        }
    }

    /// `count` descriptors further, at most a whole turn.
    #[inline]
    fn skip(&mut self, count: u16) {
        if count == 1 {
            return self.advance();
        }
        cold_path();
        self.at = self.at.wrapping_add(DESC_LEN * usize::from(count));
        if self.at >= self.end {
            self.at = self.at.wrapping_sub(self.end);
            self.state ^= STATE;
        }
    }

    /// The place. (In either state the driver's flag is the wrap counter.)
    #[inline]
    fn position(self) -> Position {
        // Less than 2^15.
        let slot = u16::try_from(self.at / DESC_LEN).unwrap_or_default();
        let wrap = if self.state & in_word(AVAIL) != 0 {
            WRAP
        } else {
            0
        };
        Position(slot | wrap)
    }
}

/// The two flags that say what a descriptor is.
const STATE: u64 = in_word(AVAIL | USED);

/// Flags, where they are in the second half of a descriptor.
#[inline]
const fn in_word(flags: u16) -> u64 {
    (flags as u64) << 48
}

/// The second half of a descriptor as one number (section 2.8.13): length, id, flags.
#[inline]
fn pack(len: u32, id: u16, flags: u64) -> u64 {
    u64::from(len) | u64::from(id) << 32 | flags
}

/// The length, in a descriptor's second half.
#[inline]
fn len_of(word: u64) -> u32 {
    let [b0, b1, b2, b3, ..] = word.to_le_bytes();
    u32::from_le_bytes([b0, b1, b2, b3])
}

/// The id, in a descriptor's second half.
#[inline]
fn id_of(word: u64) -> u16 {
    let [_, _, _, _, b4, b5, ..] = word.to_le_bytes();
    u16::from_le_bytes([b4, b5])
}

/// The flag of a buffer, in a descriptor's second half.
#[inline]
fn write_flag(buffer: &Buffer) -> u64 {
    if buffer.device_writes {
        in_word(WRITE)
    } else {
        0
    }
}

/// The event suppression structure (section 2.8.14) of a side that wants to hear of the descriptor at `next`.
#[inline]
fn wish(next: Position, event_idx: bool) -> u32 {
    if event_idx {
        EVENT_DESC | u32::from(next.0)
    } else {
        EVENT_ENABLE
    }
}

/// Whether the side that wrote `event` wants to hear of the `count` descriptors from `first` on (section 2.8.10). Used descriptors may be fewer
/// than the places that they stand for, and an event may name any of the places.
#[inline]
fn wants(event: u32, event_idx: bool, first: Position, count: u16, size: u16) -> bool {
    match event & EVENT_FLAGS {
        EVENT_DISABLE => false,
        EVENT_DESC if event_idx => {
            let [b0, b1, ..] = event.to_le_bytes();
            let at = Position(u16::from_le_bytes([b0, b1]));
            (0..i32::from(count)).contains(&at.ahead(first, size))
        }
        // What has no meaning here is no wish for silence.
        _ => true,
    }
}
