//! What a workload sends and receives frames through, whichever end it is at.
//!
//! Unsafe code: a frame lies in memory that the peer can write. [`Frame`] and [`Slot`] are the checked ranges that the data paths
//! made; they copy in and out and lend no reference.
#![allow(unsafe_code)]

use core::fmt;
use core::marker::PhantomData;

use virtqueue::net::Header;
pub use virtqueue::net::{MAX_FRAME, MAX_LARGE_FRAME, Offloads};

use crate::line::{LINE, Line};
use crate::pieces::{Piece, total, walk};
use crate::{bulk, virtio_iommu};

/// Whether `len` bytes from `offset` on are inside `total`.
#[inline(always)]
fn holds(total: usize, offset: usize, len: usize) -> bool {
    len <= total && offset <= total - len
}

/// A received frame, without the virtio-net header. It may lie in the peer's memory and change while it is looked at.
#[derive(Debug)]
pub struct Frame<'a> {
    /// All of it, or the first stretch of it.
    ptr: *const u8,
    len: usize,
    /// Where it goes on.
    rest: &'a [Piece],
    header: Option<Header>,
    _memory: PhantomData<&'a ()>,
}

impl<'a> Frame<'a> {
    /// A frame in memory of our own.
    #[must_use]
    pub fn of(bytes: &'a [u8]) -> Self {
        Self {
            ptr: bytes.as_ptr(),
            len: bytes.len(),
            rest: &[],
            header: None,
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
            rest: &[],
            header: None,
            _memory: PhantomData,
        }
    }

    /// A frame in shared memory, and its header, which has been checked.
    ///
    /// # Safety
    /// As for [`Frame::new`].
    #[inline(always)]
    pub(crate) unsafe fn with_header(ptr: *const u8, len: usize, header: Header) -> Self {
        Self {
            ptr,
            len,
            rest: &[],
            header: Some(header).filter(|header| *header != Header::NONE),
            _memory: PhantomData,
        }
    }

    /// A frame in several stretches of shared memory; `None` where there is none.
    ///
    /// # Safety
    /// The pieces stay mapped for the frame's lifetime.
    #[inline(always)]
    pub(crate) unsafe fn in_pieces(pieces: &'a [Piece], header: Header) -> Option<Self> {
        let (first, rest) = pieces.split_first()?;
        // SAFETY: the caller's promise.
        let first = unsafe { Self::with_header(first.ptr, first.len, header) };
        Some(Self { rest, ..first })
    }

    /// What the sender left to be done, checked against the frame and the features; `None` where it left nothing.
    #[inline(always)]
    #[must_use]
    pub fn header(&self) -> Option<Header> {
        self.header
    }

    /// Length in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        if self.rest.is_empty() {
            self.len
        } else {
            self.len + total(self.rest)
        }
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
        fits || self.read_pieces(offset, to)
    }

    /// A little-endian word; `None` beyond the end.
    #[inline(always)]
    #[must_use]
    pub fn u64(&self, offset: usize) -> Option<u64> {
        if self.holds(offset, 8) {
            // SAFETY: `holds` keeps the load inside the frame.
            return Some(u64::from_le(unsafe { bulk::load(self.ptr.add(offset)) }));
        }
        let mut bytes = [0; 8];
        self.read_pieces(offset, &mut bytes)
            .then(|| u64::from_le_bytes(bytes))
    }

    /// A little-endian word; `None` beyond the end.
    #[inline(always)]
    #[must_use]
    pub fn u32(&self, offset: usize) -> Option<u32> {
        if self.holds(offset, 4) {
            // SAFETY: `holds` keeps the load inside the frame.
            return Some(u32::from_le(unsafe { bulk::load(self.ptr.add(offset)) }));
        }
        let mut bytes = [0; 4];
        self.read_pieces(offset, &mut bytes)
            .then(|| u32::from_le_bytes(bytes))
    }

    /// Whether the bytes from `offset` on are `expected`.
    #[inline(always)]
    #[must_use]
    pub fn matches(&self, offset: usize, expected: &[u8]) -> bool {
        if self.holds(offset, expected.len()) {
            // SAFETY: `holds` keeps the range inside the frame.
            return unsafe { bulk::equal(self.ptr.add(offset), expected.as_ptr(), expected.len()) };
        }
        !self.rest.is_empty()
            && self.matches_with(offset, expected.len(), |at| {
                expected.get(at..).unwrap_or(&[])
            })
    }

    /// Whether `len` bytes from `offset` on are those that `expected` gives: from the byte of that number on, any number of them but none.
    #[must_use]
    pub fn matches_with<'b>(
        &self,
        offset: usize,
        len: usize,
        expected: impl Fn(usize) -> &'b [u8],
    ) -> bool {
        walk(self.pieces(), offset, len, |part, done| {
            chunks(part, done, &expected, |at, expected| {
                // SAFETY: the chunk lies in a part of the frame.
                unsafe { bulk::equal(at, expected.as_ptr(), expected.len()) }
            })
        })
    }

    fn pieces(&self) -> impl Iterator<Item = Piece> + use<'a> {
        let first = Piece {
            ptr: self.ptr.cast_mut(),
            len: self.len,
        };
        core::iter::once(first).chain(self.rest.iter().copied())
    }

    /// [`Frame::read`] of what is not in the first stretch alone.
    fn read_pieces(&self, offset: usize, to: &mut [u8]) -> bool {
        !self.rest.is_empty()
            && holds(self.len(), offset, to.len())
            && walk(self.pieces(), offset, to.len(), |part, done| {
                let to = to.get_mut(done..done + part.len);
                // SAFETY: the part lies in the frame; `to` is ours, and as long.
                to.map(|to| unsafe { bulk::copy(to.as_mut_ptr(), part.ptr, part.len) })
                    .is_some()
            })
    }

    /// The first 64 bytes, each loaded once; `None` where the frame is shorter.
    #[inline(always)]
    #[must_use]
    pub fn first_line(&self) -> Option<Line> {
        // SAFETY: `holds` keeps the load inside the frame.
        self.holds(0, LINE).then(|| unsafe { Line::load(self.ptr) })
    }

    #[inline(always)]
    fn holds(&self, offset: usize, len: usize) -> bool {
        holds(self.len, offset, len)
    }
}

/// Calls `each` with the parts of a piece and with as many bytes as each has, which `source` gives by their number; `done` is that of the piece's first.
/// Stops where `each` says `false`, or the source has nothing; returns whether it did not.
fn chunks<'b>(
    part: Piece,
    done: usize,
    source: impl Fn(usize) -> &'b [u8],
    mut each: impl FnMut(*mut u8, &'b [u8]) -> bool,
) -> bool {
    let mut at = 0;
    while at < part.len {
        let bytes = source(done + at);
        let bytes = bytes.get(..part.len - at).unwrap_or(bytes);
        if bytes.is_empty() || !each(part.ptr.wrapping_add(at), bytes) {
            return false;
        }
        at += bytes.len();
    }
    true
}

/// Room for a frame that is being built, perhaps right in the peer's buffer.
#[derive(Debug)]
pub struct Slot<'a> {
    /// All of it, or the first stretch of it.
    ptr: *mut u8,
    len: usize,
    /// Where it goes on.
    rest: &'a [Piece],
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
            rest: &[],
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
            rest: &[],
            _memory: PhantomData,
        }
    }

    /// Room in several stretches of shared memory; `None` where there is none.
    ///
    /// # Safety
    /// As for [`Slot::new`], for each piece.
    #[inline(always)]
    pub(crate) unsafe fn in_pieces(pieces: &'a [Piece]) -> Option<Self> {
        let (first, rest) = pieces.split_first()?;
        // SAFETY: the caller's promise.
        let first = unsafe { Self::new(first.ptr, first.len) };
        Some(Self { rest, ..first })
    }

    /// Length of the frame that is to be built, in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        if self.rest.is_empty() {
            self.len
        } else {
            self.len + total(self.rest)
        }
    }

    /// Whether there is no room at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes in; what does not fit is not written, and then `false` comes back.
    #[inline(always)]
    pub fn write(&mut self, offset: usize, from: &[u8]) -> bool {
        let fits = holds(self.len, offset, from.len());
        if fits {
            // SAFETY: the range is inside the slot; `from` is ours.
            unsafe { bulk::copy(self.ptr.add(offset), from.as_ptr(), from.len()) };
        }
        fits || (!self.rest.is_empty()
            && self.write_with(offset, from.len(), |at| from.get(at..).unwrap_or(&[])))
    }

    /// Copies in `len` bytes, which `source` gives: from the byte of that number on, any number of them but none. What does not fit is not written, and then
    /// `false` comes back.
    pub fn write_with<'b>(
        &mut self,
        offset: usize,
        len: usize,
        source: impl Fn(usize) -> &'b [u8],
    ) -> bool {
        let first = Piece {
            ptr: self.ptr,
            len: self.len,
        };
        let pieces = core::iter::once(first).chain(self.rest.iter().copied());
        holds(self.len(), offset, len)
            && walk(pieces, offset, len, |part, done| {
                chunks(part, done, &source, |to, from| {
                    // SAFETY: the chunk lies in a part of the slot; `from` is ours.
                    unsafe { bulk::copy(to, from.as_ptr(), from.len()) };
                    true
                })
            })
    }

    /// Writes the first 64 bytes; `false` (and nothing written) where they do not fit.
    #[inline(always)]
    pub fn put_first_line(&mut self, line: Line) -> bool {
        let fits = holds(self.len, 0, LINE);
        if fits {
            // SAFETY: they are inside the slot.
            unsafe { line.store(self.ptr) };
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
    /// What was to be left to the peer was not negotiated, or does not fit the frame.
    Offload,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "ring: {error}"),
            Self::Iommu(error) => error.fmt(f),
            Self::Offload => f.write_str("the peer does not take frames with this header"),
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

/// What became of the notifications of a ring at this end: those that its bursts gave (kicks of a driver, calls of a device), and bursts behind which the other end
/// had asked for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// The other end was notified.
    pub given: u64,
    /// It did not want to be.
    pub suppressed: u64,
}

impl Notices {
    /// Counts a burst.
    #[inline(always)]
    pub(crate) fn count(&mut self, wanted: bool) {
        self.given += u64::from(wanted);
        self.suppressed += u64::from(!wanted);
    }

    /// What was counted since it was so; all of it where it was counted anew.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let since = |now: u64, before| now.checked_sub(before).unwrap_or(now);
        Self {
            given: since(self.given, before.given),
            suppressed: since(self.suppressed, before.suppressed),
        }
    }
}

impl core::ops::AddAssign for Notices {
    fn add_assign(&mut self, other: Self) {
        self.given += other.given;
        self.suppressed += other.suppressed;
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

    /// What may be left to the peer.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    /// As [`Port::tx_burst`], with frames whose checksum or segmentation is left to the peer: `header` says what (its num_buffers does not count). They may be as long
    /// as [`MAX_LARGE_FRAME`] where they are left to be segmented. Long ones become visible one by one. [`Error::Offload`] where [`Port::offloads`] has no such thing.
    fn tx_offloaded(
        &mut self,
        _header: &Header,
        _count: usize,
        _len: usize,
        _build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        Err(Error::Offload)
    }

    /// Receives up to `count` frames, each shown to `receive`. Returns how many there were.
    fn rx_burst(&mut self, count: usize, receive: impl FnMut(&Frame)) -> Result<usize, Error>;

    /// How many frames can be there at most that have not been received yet.
    fn rx_room(&self) -> usize {
        usize::MAX
    }

    /// Whether what the last [`Port::rx_burst`] showed was there all the time. A burst that lies in the peer's memory is not one where that memory was taken away meanwhile: it
    /// ends in ones (docs/device.md, section 10). Frames are passed on to somebody who cannot tell only after this.
    fn whole(&self) -> bool {
        true // one's own memory stays
    }

    /// Whether the peer has taken everything that was sent, so that its memory may go away.
    fn drained(&mut self) -> Result<bool, Error>;

    /// Asks for an interrupt when frames arrive (`rx`) or room to send appears (`tx`). Returns whether that is so already: then no
    /// interrupt may come, and the caller goes on.
    fn arm(&mut self, rx: bool, tx: bool) -> bool;

    /// Asks for no more interrupts.
    fn disarm(&mut self);

    /// What became of the notifications: of the ring that sends, of the one that receives.
    fn notices(&self) -> [Notices; 2] {
        Default::default()
    }
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

    fn rx_room(&self) -> usize {
        match self {
            Self::Split(port) => port.rx_room(),
            Self::Packed(port) => port.rx_room(),
        }
    }

    fn offloads(&self) -> Offloads {
        match self {
            Self::Split(port) => port.offloads(),
            Self::Packed(port) => port.offloads(),
        }
    }

    fn tx_offloaded(
        &mut self,
        header: &Header,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        match self {
            Self::Split(port) => port.tx_offloaded(header, count, len, build),
            Self::Packed(port) => port.tx_offloaded(header, count, len, build),
        }
    }

    #[inline(always)]
    fn rx_burst(&mut self, count: usize, receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        match self {
            Self::Split(port) => port.rx_burst(count, receive),
            Self::Packed(port) => port.rx_burst(count, receive),
        }
    }

    fn whole(&self) -> bool {
        match self {
            Self::Split(port) => port.whole(),
            Self::Packed(port) => port.whole(),
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

    fn notices(&self) -> [Notices; 2] {
        match self {
            Self::Split(port) => port.notices(),
            Self::Packed(port) => port.notices(),
        }
    }
}

/// Largest burst.
pub const MAX_BURST: usize = 256;

/// Where frames are taken one at a time, those that are there come out of the ring so many at once, and go back at once: as many descriptors of a packed ring
/// as share a cache line. The other side, which is at work on the next of them, so loses the line once, and not for each.
pub(crate) const GROUP: usize = 4;
