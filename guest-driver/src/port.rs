//! What a workload sends and receives frames through, whichever end it is at.
//!
//! Unsafe code: a frame lies in memory that the peer can write. [`Frame`] and [`Slot`] are the checked ranges that the data paths
//! made; they copy in and out and lend no reference.
#![allow(unsafe_code)]

use core::fmt;
use core::marker::PhantomData;

use crate::{bulk, virtio_iommu};

/// Whether `len` bytes from `offset` on are inside `total`.
#[inline(always)]
fn holds(total: usize, offset: usize, len: usize) -> bool {
    len <= total && offset <= total - len
}

/// A received frame, without the virtio-net header. It may lie in the peer's memory and change while it is looked at.
#[derive(Debug)]
pub struct Frame<'a> {
    ptr: *const u8,
    len: usize,
    _memory: PhantomData<&'a ()>,
}

impl<'a> Frame<'a> {
    /// A frame in memory of our own.
    #[must_use]
    pub fn of(bytes: &'a [u8]) -> Self {
        Self {
            ptr: bytes.as_ptr(),
            len: bytes.len(),
            _memory: PhantomData,
        }
    }

    /// A frame in shared memory.
    ///
    /// # Safety
    /// `len` bytes from `ptr` stay mapped for the frame's lifetime.
    #[inline(always)]
    pub(crate) unsafe fn new(ptr: *const u8, len: usize) -> Self {
        Self {
            ptr,
            len,
            _memory: PhantomData,
        }
    }

    /// Length in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out, as many as `to` holds; `false` (and nothing copied) where the frame is shorter.
    #[inline(always)]
    #[must_use]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> bool {
        let fits = self.holds(offset, to.len());
        if fits {
            // SAFETY: `holds` keeps the range inside the frame; `to` is ours alone.
            unsafe { bulk::copy(to.as_mut_ptr(), self.ptr.add(offset), to.len()) };
        }
        fits
    }

    /// A little-endian word; `None` beyond the end.
    #[inline(always)]
    #[must_use]
    pub fn u64(&self, offset: usize) -> Option<u64> {
        // SAFETY: `holds` keeps the load inside the frame.
        self.holds(offset, 8)
            .then(|| u64::from_le(unsafe { bulk::load(self.ptr.add(offset)) }))
    }

    /// A little-endian word; `None` beyond the end.
    #[inline(always)]
    #[must_use]
    pub fn u32(&self, offset: usize) -> Option<u32> {
        // SAFETY: `holds` keeps the load inside the frame.
        self.holds(offset, 4)
            .then(|| u32::from_le(unsafe { bulk::load(self.ptr.add(offset)) }))
    }

    /// Whether the bytes from `offset` on are `expected`.
    #[inline(always)]
    #[must_use]
    pub fn matches(&self, offset: usize, expected: &[u8]) -> bool {
        // SAFETY: `holds` keeps the range inside the frame.
        self.holds(offset, expected.len())
            && unsafe { bulk::equal(self.ptr.add(offset), expected.as_ptr(), expected.len()) }
    }

    #[inline(always)]
    fn holds(&self, offset: usize, len: usize) -> bool {
        holds(self.len, offset, len)
    }
}

/// Room for a frame that is being built, perhaps right in the peer's buffer.
#[derive(Debug)]
pub struct Slot<'a> {
    ptr: *mut u8,
    len: usize,
    _memory: PhantomData<&'a ()>,
}

impl<'a> Slot<'a> {
    /// Room in memory of our own.
    #[must_use]
    #[inline(always)]
    pub fn of(bytes: &'a mut [u8]) -> Self {
        Self {
            ptr: bytes.as_mut_ptr(),
            len: bytes.len(),
            _memory: PhantomData,
        }
    }

    /// Room in shared memory.
    ///
    /// # Safety
    /// `len` bytes from `ptr` stay mapped for the slot's lifetime, and no reference to them exists.
    #[inline(always)]
    pub(crate) unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self {
            ptr,
            len,
            _memory: PhantomData,
        }
    }

    /// Length of the frame that is to be built, in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no room at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes in; what does not fit is not written, and then `false` comes back.
    #[inline(always)]
    pub fn write(&mut self, offset: usize, from: &[u8]) -> bool {
        let fits = holds(self.len, offset, from.len());
        if fits {
            // SAFETY: the range is inside the slot; `from` is ours.
            unsafe { bulk::copy(self.ptr.add(offset), from.as_ptr(), from.len()) };
        }
        fits
    }

    /// Writes a little-endian word; `false` (and nothing written) where it does not fit.
    #[inline(always)]
    pub fn put_u64(&mut self, offset: usize, value: u64) -> bool {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes a little-endian word; `false` (and nothing written) where it does not fit.
    #[inline(always)]
    pub fn put_u32(&mut self, offset: usize, value: u32) -> bool {
        self.write(offset, &value.to_le_bytes())
    }
}

/// Why a port is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The peer broke a ring rule.
    Ring(virtqueue::Error),
    /// A buffer could not be mapped for the device, or not be taken away from it.
    Iommu(virtio_iommu::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "ring: {error}"),
            Self::Iommu(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for Error {}

impl From<virtqueue::Error> for Error {
    fn from(error: virtqueue::Error) -> Self {
        Self::Ring(error)
    }
}

impl From<virtio_iommu::Error> for Error {
    fn from(error: virtio_iommu::Error) -> Self {
        Self::Iommu(error)
    }
}

/// One end of a connection that carries Ethernet frames.
///
/// Both bursts make what they did visible to the peer with one store, and notify it at most once. After an
/// error the port is of no use.
pub trait Port {
    /// Sends up to `count` frames of `len` bytes (at most 1518): `build` is called for each that there is room for, with its number from 0 on. Returns how many
    /// were sent; fewer than `count` when the ring is full.
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error>;

    /// Receives up to `count` frames, each shown to `receive`. Returns how many there were.
    fn rx_burst(&mut self, count: usize, receive: impl FnMut(&Frame)) -> Result<usize, Error>;

    /// Whether the peer has taken everything that was sent, so that its memory may go away.
    fn drained(&mut self) -> Result<bool, Error>;

    /// Asks for an interrupt when frames arrive (`rx`) or room to send appears (`tx`). Returns whether that is so already: then no
    /// interrupt may come, and the caller goes on.
    fn arm(&mut self, rx: bool, tx: bool) -> bool;

    /// Asks for no more interrupts.
    fn disarm(&mut self);
}

/// One of two kinds of port, chosen when the device is set up: the choice costs a branch a burst.
#[derive(Debug)]
pub enum Either<A, B> {
    /// Over split rings.
    Split(A),
    /// Over packed rings.
    Packed(B),
}

impl<A: Port, B: Port> Port for Either<A, B> {
    #[inline(always)]
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        match self {
            Self::Split(port) => port.tx_burst(count, len, build),
            Self::Packed(port) => port.tx_burst(count, len, build),
        }
    }

    #[inline(always)]
    fn rx_burst(&mut self, count: usize, receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        match self {
            Self::Split(port) => port.rx_burst(count, receive),
            Self::Packed(port) => port.rx_burst(count, receive),
        }
    }

    fn drained(&mut self) -> Result<bool, Error> {
        match self {
            Self::Split(port) => port.drained(),
            Self::Packed(port) => port.drained(),
        }
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        match self {
            Self::Split(port) => port.arm(rx, tx),
            Self::Packed(port) => port.arm(rx, tx),
        }
    }

    fn disarm(&mut self) {
        match self {
            Self::Split(port) => port.disarm(),
            Self::Packed(port) => port.disarm(),
        }
    }
}

/// Largest frame, in bytes.
pub const MAX_FRAME: usize = 1518;
/// Largest burst.
pub const MAX_BURST: usize = 256;
