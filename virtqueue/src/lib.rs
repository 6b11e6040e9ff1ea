//! Virtqueues for both sides: the driver that offers buffers and the device that uses them.
//!
//! # Layers
//!
//! * [`Memory`] and [`Region`]: how a ring reaches shared memory. [`linear::Linear`] is one stretch of it that is mapped
//!   (a guest's RAM, a window of a BAR, a file shared between two host threads).
//! * [`DriverRing`] and [`DeviceRing`]: the two sides of a ring; [`split`] and [`packed`] implement them.
//! * [`Layout`]: what a user of a ring is generic over.
//! * [`net`]: the virtio-net header.
//!
//! # Trust
//!
//! Each side treats the other as hostile. What the other side wrote is read once, checked, and used from the copy;
//! no loop is bounded by it; a violation is an [`Error`], reported once, and the queue stays broken.
//!
//! The crate copies no payload and allocates nothing while running (a driver allocates once, when it is made): it hands out
//! checked ranges ([`Buffer`]).
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod chain;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz_bodies;
mod layout;
pub mod linear;
#[cfg(all(test, loom))]
mod loom_tests;
pub mod net;
pub mod packed;
pub mod rss;
pub mod split;
#[cfg(any(test, feature = "fuzzing"))]
mod test_memory;
#[cfg(all(test, not(loom)))]
mod tests;

use core::fmt;
use core::sync::atomic::Ordering;

pub use layout::Layout;

/// A device address and a length: an element of a chain (VIRTIO 1.3 sections 2.7.5 and 2.8.4). From a [`DeviceRing`] it has been checked
/// against the ring's [`Memory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Device address of the first byte (guest physical or IO virtual).
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device may write it (VIRTQ_DESC_F_WRITE); otherwise it may read it.
    pub device_writes: bool,
}

/// Shared memory, addressed as the ring's addresses are (VIRTIO 1.3 sections 2.7 and 2.8).
pub trait Memory {
    /// A part of it, checked once and then accessed without further checks of the address.
    type Region: Region;
    /// The range, or `None` where any byte of it is not there or `addr` is not aligned to `align` (a power of two).
    fn region(&self, addr: u64, len: usize, align: usize) -> Option<Self::Region>;
    /// Whether a buffer's range is there. This is the check that every descriptor of a peer goes through.
    fn contains(&self, addr: u64, len: u32) -> bool;
}

/// A checked, aligned part of shared memory: an area of a ring (sections 2.7 and 2.8). Offsets are in bytes, naturally aligned and in bounds: the ring code upholds it, and
/// an implementation may check it in debug builds.
pub trait Region {
    /// Atomic load.
    fn load_u16(&self, offset: usize, order: Ordering) -> u16;
    /// Atomic load.
    fn load_u32(&self, offset: usize, order: Ordering) -> u32;
    /// Atomic load.
    fn load_u64(&self, offset: usize, order: Ordering) -> u64;
    /// Atomic store.
    fn store_u16(&self, offset: usize, value: u16, order: Ordering);
    /// Atomic store.
    fn store_u32(&self, offset: usize, value: u32, order: Ordering);
    /// Atomic store.
    fn store_u64(&self, offset: usize, value: u64, order: Ordering);
    /// `core::sync::atomic::fence`, or the model's.
    fn fence(order: Ordering);
    /// Hints that the line at `offset` is about to be read.
    fn prefetch(&self, _offset: usize) {}
}

/// Where a ring lies (VIRTIO 1.3 section 2.6) and what was negotiated for it (section 6).
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Number of descriptors (sections 2.7 and 2.8).
    pub size: u16,
    /// Device address of the descriptor area (sections 2.7.5 and 2.8.13).
    pub desc: u64,
    /// Device address of the driver area (split: the available ring, section 2.7.6; packed: the driver's event suppression, section 2.8.14).
    pub driver: u64,
    /// Device address of the device area (split: the used ring, section 2.7.8; packed: the device's event suppression, section 2.8.14).
    pub device: u64,
    /// VIRTIO_F_EVENT_IDX was negotiated (sections 2.7.7, 2.7.10 and 2.8.10).
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER was negotiated (sections 2.7.9 and 2.8.8).
    pub in_order: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated (sections 2.7.5.3 and 2.8.7).
    pub indirect: bool,
}

/// A chain that the device has used (VIRTIO 1.3 sections 2.7.8 and 2.8.22).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// The token that [`DriverRing::add`] returned.
    pub id: u16,
    /// Bytes that the device says it wrote; checked not to exceed what the chain lets it write.
    pub len: u32,
}

/// A chain that the driver has made available (VIRTIO 1.3 sections 2.7.5 and 2.8.6): `count` buffers from `first` on in the array that
/// [`DeviceRing::get`] filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Identifies the chain in [`DeviceRing::put`].
    pub id: u16,
    /// Index of its first buffer.
    pub first: u16,
    /// How many buffers it has, at least one.
    pub count: u16,
}

/// What the other side, or a configuration, got wrong: by the section that each names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The ring's size or addresses do not fit the layout (sections 2.7 and 2.8.10.1) or the memory.
    Config,
    /// The other side's index moved further than the ring is long (sections 2.7.6 and 2.7.8), or more descriptors are available than it has
    /// (section 2.8.1).
    IndexOutOfRange,
    /// A descriptor index or id beyond the ring, or one that is not outstanding (sections 2.7.5, 2.7.8, 2.8.6 and 2.8.13).
    BadId,
    /// A descriptor's range is not in memory (sections 2.7.5 and 2.8.4).
    BadAddress,
    /// A chain is longer than the ring or than the caller's array, or has a loop (sections 2.7.5.2, 2.7.5.3.1 and 2.8.17).
    ChainTooLong,
    /// A descriptor with flags that were not negotiated (sections 2.7.5.3.1 and 2.8.19), or a readable one behind a writable one (sections 2.7.4.2 and
    /// 2.8.17).
    BadFlags,
    /// The device reports more bytes than the chain lets it write (sections 2.7.8.2 and 2.8.4), a chain is longer than 4 GiB (section 2.7.5.2), or a
    /// table of descriptors is not a whole number of them, or empty (sections 2.7.5.3 and 2.8.7).
    BadLength,
    /// An earlier violation broke this queue.
    Broken,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "the ring's size or addresses do not fit",
            Self::IndexOutOfRange => "the peer's index moved further than the ring is long",
            Self::BadId => "the peer named a descriptor that is not there or not outstanding",
            Self::BadAddress => "a descriptor points outside the memory",
            Self::ChainTooLong => "a descriptor chain is too long or loops",
            Self::BadFlags => {
                "a descriptor has flags that were not negotiated, or a buffer to read is behind one to write"
            }
            Self::BadLength => "the device reports more bytes than it may write",
            Self::Broken => "the queue is broken by an earlier violation",
        })
    }
}

impl core::error::Error for Error {}

/// The driver's side of a ring (VIRTIO 1.3 sections 2.7.13, 2.7.14, 2.8.21 and 2.8.22).
pub trait DriverRing {
    /// How many more descriptors can be added now (sections 2.7.13.1 and 2.8.21.1).
    fn free(&self) -> u16;
    /// Adds up to `count` chains of one buffer each, as [`DriverRing::add`] would one after the other: `buffer` says what is in the n-th, `added` gets n and its
    /// token. Returns how many there was room for.
    fn add_each(
        &mut self,
        count: usize,
        mut buffer: impl FnMut(usize) -> Buffer,
        mut added: impl FnMut(usize, u16),
    ) -> usize
    where
        Self: Sized,
    {
        for n in 0..count {
            match self.add(&[buffer(n)]) {
                Some(id) => added(n, id),
                None => return n,
            }
        }
        count
    }
    /// Adds a chain of buffers, device-readable ones first (sections 2.7.13.1, 2.7.13.2 and 2.8.21.1). The device does not see it before [`DriverRing::publish`]. Returns the
    /// token by which [`DriverRing::take`] reports it, or `None` where there is no room for the whole chain (or `buffers` is empty).
    fn add(&mut self, buffers: &[Buffer]) -> Option<u16>;
    /// As [`DriverRing::add`], with one descriptor that refers to a table of the buffers (VIRTIO 1.3 sections 2.7.5.3 and 2.8.7). `table` is the
    /// device address of memory for it, aligned to 16 bytes, 16 bytes a buffer; it belongs to the chain until that is
    /// taken. `None` also where VIRTIO_F_INDIRECT_DESC was not negotiated, where the table is not in memory or not aligned, and for more
    /// buffers than the ring has descriptors.
    fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16>;
    /// Makes everything added visible to the device with one shared store (sections 2.7.13.3 and 2.8.21.1). Returns whether the device wants a kick
    /// (sections 2.7.10 and 2.8.10).
    fn publish(&mut self) -> bool;
    /// Takes up to `out.len()` used chains (sections 2.7.14 and 2.8.22); returns how many. Their descriptors are free again.
    fn take(&mut self, out: &mut [Used]) -> Result<usize, Error>;
    /// The same for up to `count`, each of which is shown to `each`.
    fn take_each(&mut self, count: usize, each: impl FnMut(Used)) -> Result<usize, Error>
    where
        Self: Sized;
    /// Asks for no interrupts (sections 2.7.7 and 2.8.10; a hint: one may still come).
    fn disable_calls(&mut self);
    /// Asks for an interrupt at the next used chain (sections 2.7.7 and 2.8.10). Returns whether used chains are there already: then take them first.
    fn enable_calls(&mut self) -> bool;
}

/// The device's side of a ring (VIRTIO 1.3 sections 2.7 and 2.8.12).
pub trait DeviceRing {
    /// Takes available chains (sections 2.7.6 and 2.8.6): each into the next of `chains`, its buffers into `buffers` one behind the other. Stops where either
    /// array is full, and returns how many chains it took. A chain that does not fit in the rest of `buffers` is left for the next call; one that
    /// does not fit an empty array is [`Error::ChainTooLong`]. Every buffer is checked with [`Memory::contains`].
    fn get(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error>;
    /// Takes up to `count` available chains of one buffer each, up to the first of several or with a table, which is left for [`DeviceRing::get`] (sections 2.7.6 and
    /// 2.8.6). Shows id and buffer of each to `each`; returns how many. Every buffer is checked with [`Memory::contains`].
    fn get_each(&mut self, count: usize, each: impl FnMut(u16, Buffer)) -> Result<usize, Error>
    where
        Self: Sized;
    /// Puts back the last `n` chains that [`DeviceRing::get`] and [`DeviceRing::get_each`] returned, as if they had not been taken. The driver sees nothing of it.
    fn unget(&mut self, n: usize);
    /// Marks a chain used with `written` bytes (sections 2.7.8 and 2.8.13). The driver does not see it before [`DeviceRing::publish`]. With VIRTIO_F_IN_ORDER chains are
    /// put in the order in which they were taken (sections 2.7.9 and 2.8.8).
    /// An id that was not taken is the caller's mistake: the driver may get to see it, nothing else happens.
    fn put(&mut self, id: u16, written: u32);
    /// Marks chains used with `written` bytes each, in the order in which they were taken; the same as [`DeviceRing::put`] of each.
    fn put_each(&mut self, ids: impl Iterator<Item = u16>, written: u32)
    where
        Self: Sized,
    {
        for id in ids {
            self.put(id, written);
        }
    }
    /// Marks chains used that held nothing for the device to write, in the order in which they were taken; the same as
    /// [`DeviceRing::put`] of each with 0 bytes. With VIRTIO_F_IN_ORDER one used element stands for all of them (sections 2.7.9 and 2.8.8).
    fn put_read(&mut self, chains: &[Chain]);
    /// [`DeviceRing::put_read`] by id.
    fn put_read_each(&mut self, ids: impl ExactSizeIterator<Item = u16> + DoubleEndedIterator)
    where
        Self: Sized;
    /// Makes everything put visible to the driver with one shared store (sections 2.7.8 and 2.8.1). Returns whether the driver wants a call
    /// (sections 2.7.7 and 2.8.10).
    fn publish(&mut self) -> bool;
    /// Asks for no kicks (sections 2.7.10 and 2.8.10; a hint: one may still come).
    fn disable_kicks(&mut self);
    /// Asks for a kick at the next available chain (sections 2.7.10 and 2.8.10). Returns whether chains are there already: then get them first.
    fn enable_kicks(&mut self) -> bool;
    /// Whether the ring's memory is still there. Memory that was taken away from a device reads as ones (docs/device.md, section 10), which a ring that a driver keeps does not: so what was
    /// read before this, out of memory that goes at the same moment, was what the driver had put there.
    fn present(&self) -> bool;
    /// The ring's position, as VHOST_USER_GET_VRING_BASE reports it (vhost-user, not VIRTIO); [`Layout::device_at`] says what it is made of.
    fn base(&self) -> u32;
}

#[cfg(doctest)]
#[doc = include_str!("../../docs/virtqueue.md")]
mod examples {}
