//! The split virtqueue, VIRTIO 1.3 section 2.7.
//!
//! Three areas: the descriptor table (written by the driver), the available ring (by the driver), the used ring (by the device).
//! [`Driver`] and [`Device`] keep every index and all their bookkeeping in private memory; from the shared areas each reads only what the other
//! side is to write, once.

mod device;
mod driver;
#[cfg(all(test, not(loom)))]
mod tests;

pub use device::Device;
pub use driver::Driver;

use core::sync::atomic::Ordering::Relaxed;

use crate::chain::DESC_LEN;
use crate::{Buffer, Error, Layout, Memory, Region, RingConfig};

/// The split layout (VIRTIO 1.3 section 2.7): powers of two up to [`MAX_SIZE`].
#[derive(Clone, Copy, Debug)]
pub struct Split;

impl Layout for Split {
    type Driver<M: Memory> = Driver<M>;
    type Device<M: Memory> = Device<M>;

    const ALIGN: [usize; 3] = [16, 2, 4];
    const FRESH: u32 = 0;

    fn area_sizes(size: u16) -> Option<[usize; 3]> {
        // No power of two that fits is beyond `MAX_SIZE`. The event fields are always part of the rings.
        size.is_power_of_two().then(|| {
            [
                DESC_LEN * usize::from(size),
                avail_entry(size) + 2,
                used_entry(size) + 2,
            ]
        })
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

/// Largest number of descriptors (section 2.7).
pub const MAX_SIZE: u16 = 32768;

/// Descriptor flag: the chain goes on at `next` (section 2.7.5).
const DESC_NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
const DESC_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
const DESC_INDIRECT: u16 = 4;

/// Offset of `flags`, in the available and in the used ring.
const FLAGS: usize = 0;
/// Offset of `idx`, in the available and in the used ring.
const IDX: usize = 2;
/// The only flag in either ring's `flags`: do not notify (sections 2.7.6 and 2.7.8).
const NO_NOTIFY: u16 = 1;

/// Offset of an entry of the available ring; behind the last one is `used_event`.
#[inline]
fn avail_entry(slot: u16) -> usize {
    4 + 2 * usize::from(slot)
}

/// Offset of an element of the used ring; behind the last one is `avail_event`.
#[inline]
fn used_entry(slot: u16) -> usize {
    4 + 8 * usize::from(slot)
}

/// The three areas, checked.
#[derive(Clone, Copy, Debug)]
struct Areas<R> {
    desc: R,
    avail: R,
    used: R,
}

impl<R> Areas<R> {
    /// Checks size, alignment and place.
    fn new<M: Memory<Region = R>>(memory: &M, config: &RingConfig) -> Result<Self, Error> {
        let [desc, avail, used] = Split::area_sizes(config.size).ok_or(Error::Config)?;
        let [desc_align, avail_align, used_align] = Split::ALIGN;
        let area = |addr, len, align| memory.region(addr, len, align).ok_or(Error::Config);
        Ok(Self {
            desc: area(config.desc, desc, desc_align)?,
            avail: area(config.driver, avail, avail_align)?,
            used: area(config.device, used, used_align)?,
        })
    }
}

/// The second half of a descriptor as one number: length, flags, next.
#[inline]
fn pack(buffer: &Buffer, next: Option<u16>) -> u64 {
    let write = if buffer.device_writes { DESC_WRITE } else { 0 };
    let chain = if next.is_some() { DESC_NEXT } else { 0 };
    u64::from(buffer.len)
        | u64::from(write | chain) << 32
        | u64::from(next.unwrap_or_default()) << 48
}

/// Whether an index that moves from `old` to `new` passes `event` (section 2.7.10). All three count modulo 2^16.
#[inline]
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Asks, in the ring that one side writes and whose event index is at `event`, for a notification when the other passes `next` (sections 2.7.7
/// and 2.7.10). The order of this store and a later look at the other's index is up to the caller.
#[inline]
fn ask(own: &impl Region, event: usize, event_idx: bool, next: u16) {
    if event_idx {
        own.store_u16(event, next, Relaxed);
    } else {
        own.store_u16(FLAGS, 0, Relaxed);
    }
}

/// Asks for none.
#[inline]
fn hush(own: &impl Region, event: usize, event_idx: bool, next: u16) {
    if event_idx {
        // There is no "never": the index just left behind comes last of all.
        own.store_u16(event, next.wrapping_sub(1), Relaxed);
    } else {
        own.store_u16(FLAGS, NO_NOTIFY, Relaxed);
    }
}

/// Whether the side that writes the ring `theirs` wants to hear that our index moved from `old` to `new`.
#[inline]
fn wants(theirs: &impl Region, event: usize, event_idx: bool, new: u16, old: u16) -> bool {
    if event_idx {
        passes(theirs.load_u16(event, Relaxed), new, old)
    } else {
        theirs.load_u16(FLAGS, Relaxed) & NO_NOTIFY == 0
    }
}
