//! The data path of a virtio-net driver (VIRTIO 1.3, section 5.1.6).
//!
//! Unsafe code: buffers are reached by address. Each block stands on the one check that [`NetPort::new`] makes of the whole pool.
#![allow(unsafe_code)]

mod free;
pub(crate) mod offload;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::net::{HEADER_LEN, Header, Offloads};
use virtqueue::{Buffer, DriverRing, Used};

use self::free::Free;
use crate::bulk;
use crate::mapper::{Fixed, Mapper};
use crate::port::{Error as PortError, Frame, GROUP, MAX_BURST, MAX_FRAME, Notices, Port, Slot};
use crate::virtio_iommu;
use crate::virtio_pci::{Error, Notify};

/// Bytes from one buffer to the next: room for header, frame and an indirect table, and an odd number of cache lines, so that the starts
/// of a ring's buffers spread over all sets of the caches. (Buffers that are mapped one by one are a page apart.)
pub const BUFFER_STRIDE: usize = 27 * 64;
/// Where a packet starts in its buffer: the header ends a cache line and the frame starts the next. Headers hardly ever change, and who fills a buffer looks
/// before it writes one: so the header's line stays in both caches, and a short frame is one line that travels.
pub(crate) const FRONT: usize = 64 - HEADER_LEN;
/// Header and frame.
const PACKET: u16 = 1530;
const _: () = assert!(PACKET as usize == HEADER_LEN + MAX_FRAME);
/// Where a transmit buffer has its indirect table of two descriptors, behind the start of the packet.
const TABLE: u16 = 1532;
const _: () = assert!(FRONT + TABLE as usize + 2 * 16 <= BUFFER_STRIDE && TABLE >= PACKET);
const _: () = assert!((FRONT + TABLE as usize).is_multiple_of(16));
/// Where the header says over how many buffers a received frame is spread.
const NUM_BUFFERS: usize = 10;
const HEADER: u16 = 12;
const _: () = assert!(HEADER as usize == HEADER_LEN);

/// How a frame to send is given to the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TxShape {
    /// Header and frame in one descriptor.
    #[default]
    Direct,
    /// A chain of two descriptors: header, frame.
    Chain,
    /// One descriptor, whose indirect table has those two. (Without INDIRECT_DESC: as a chain.)
    Indirect,
}

/// How frames are laid out in buffers.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Of frames to send.
    pub tx: TxShape,
    /// Bytes of a receive buffer, header included. Where it is shorter than a frame, only mergeable buffers receive long ones.
    pub rx_buffer: u16,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated: a frame may be spread over several buffers.
    pub mergeable: bool,
    /// The features that leave checksums and segmentation to the other side: those that the caller can make use of, and then those of them that were negotiated.
    pub offloads: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            tx: TxShape::Direct,
            rx_buffer: PACKET,
            mergeable: false,
            offloads: 0,
        }
    }
}

/// Notes which buffer a descriptor stands for. It is hardly ever another than last time.
#[inline(always)]
fn note(buffer_of: &mut [u16], id: u16, buffer: u16) {
    if let Some(noted) = buffer_of.get_mut(usize::from(id))
        && *noted != buffer
    {
        *noted = buffer;
    }
}

/// One direction of the data path.
#[derive(Debug)]
struct Half<D, N, M> {
    ring: D,
    doorbell: N,
    mapper: M,
    /// Device address and mapped address of the first buffer.
    addr: u64,
    ptr: *mut u8,
    /// Which buffer a descriptor id stands for while it is with the device.
    buffer_of: Vec<u16>,
    notices: Notices,
}

impl<D: DriverRing, N: Notify, M: Mapper> Half<D, N, M> {
    fn new(memory: Linear, (ring, addr, doorbell): (D, u64, N), mapper: M) -> Result<Self, Error> {
        let buffers = usize::from(ring.free());
        let ptr = memory.ptr(addr, buffers * M::STRIDE).ok_or(Error::Memory)?;
        Ok(Self {
            ring,
            doorbell,
            mapper,
            addr,
            ptr,
            buffer_of: vec![0; buffers],
            notices: Notices::default(),
        })
    }

    /// Where the packet of a buffer is.
    #[inline(always)]
    fn ptr(&self, buffer: u16) -> *mut u8 {
        // SAFETY: buffer numbers are below `buffer_of.len()`, and the pool of that many was checked in `new`.
        unsafe { self.ptr.add(usize::from(buffer) * M::STRIDE + FRONT) }
    }

    /// A part of a buffer.
    #[inline(always)]
    fn piece(&self, buffer: u16, offset: u16, len: u16, device_writes: bool) -> Buffer {
        Buffer {
            addr: self.addr
                + (usize::from(buffer) * M::STRIDE + FRONT + usize::from(offset)) as u64,
            len: u32::from(len),
            device_writes,
        }
    }

    /// Notes which buffer a descriptor stands for; `false` where there was no descriptor.
    #[inline(always)]
    fn note(&mut self, id: Option<u16>, buffer: u16) -> bool {
        match id.and_then(|id| self.buffer_of.get_mut(usize::from(id))) {
            Some(slot) => {
                *slot = buffer;
                true
            }
            None => false,
        }
    }

    /// Which buffer a used descriptor stands for.
    #[inline(always)]
    fn buffer(&self, used: Used) -> u16 {
        let id = usize::from(used.id);
        self.buffer_of.get(id).copied().unwrap_or(0)
    }

    /// Which buffers the first `n` used descriptors stand for.
    fn buffers<'a>(&self, used: &[Used], n: usize, to: &'a mut [u16; MAX_BURST]) -> &'a [u16] {
        for (to, &used) in to.iter_mut().zip(used.iter().take(n)) {
            *to = self.buffer(used);
        }
        to.get(..n).unwrap_or(&[])
    }

    /// Lets the device reach buffers.
    fn map(&mut self, buffers: &[u16]) -> Result<(), virtio_iommu::Error> {
        self.mapper.map(self.addr, buffers)
    }

    /// Takes buffers away from the device.
    fn unmap(&mut self, buffers: &[u16]) -> Result<(), virtio_iommu::Error> {
        self.mapper.unmap(self.addr, buffers)
    }

    #[inline(always)]
    fn publish(&mut self) {
        let wanted = self.ring.publish();
        self.tell(wanted);
    }

    /// A burst is over; the device wants to be notified of it, or not.
    #[inline(always)]
    fn tell(&mut self, wanted: bool) {
        if wanted {
            self.doorbell.notify();
        }
        self.notices.count(wanted);
    }
}

/// A frame that is being put together from several buffers.
#[derive(Debug)]
struct Partial {
    frame: Box<[u8]>,
    len: usize,
    /// Buffers that are still to come.
    missing: u16,
}

impl Partial {
    /// Adds the contents of a buffer. What is beyond the longest frame is counted, not kept.
    ///
    /// # Safety
    /// `len` bytes from `from` are mapped.
    unsafe fn push(&mut self, from: *const u8, len: usize) {
        if let Some(to) = self.frame.get_mut(self.len..self.len + len) {
            // SAFETY: the caller's promise; `to` is ours.
            unsafe { bulk::copy(to.as_mut_ptr(), from, len) };
        }
        self.len += len;
    }
}

/// The data path of a virtio-net driver: buffers of [`Mapper::STRIDE`] bytes, as many as the ring has descriptors.
#[derive(Debug)]
pub struct NetPort<D, N, M = Fixed> {
    rx: Half<D, N, M>,
    tx: Half<D, N, M>,
    shape: Shape,
    /// Transmit buffers that are not with the device.
    tx_free: Free,
    /// What was taken from a ring last.
    used: [Used; MAX_BURST],
    /// How many receive buffers are taken at once, where they are there and fewer are asked for; those, and how many they are.
    group: usize,
    came: [Used; GROUP],
    taken: usize,
    /// The first so many of them have been shown; when all have, they go back.
    shown: usize,
    partial: Partial,
    /// Where checksums or segmentation were negotiated, all frames go another way.
    offload: Option<Box<offload::Offload>>,
}

// SAFETY: the pointers are into memory that belongs to no thread; the port is used by one at a time.
unsafe impl<D: Send, N: Send, M: Send> Send for NetPort<D, N, M> {}

impl<D: DriverRing, N: Notify> NetPort<D, N> {
    /// A data path whose buffers the device can reach all the time; otherwise as [`NetPort::with_mapper`].
    pub fn new(
        memory: Linear,
        shape: Shape,
        rx: (D, u64, N),
        tx: (D, u64, N),
    ) -> Result<Self, Error> {
        Self::with_mapper(memory, shape, rx, tx, Fixed)
    }
}

impl<D: DriverRing, N: Notify, M: Mapper> NetPort<D, N, M> {
    /// A data path over two empty rings, each with the device address of its pool (ring size times [`Mapper::STRIDE`] zeroed
    /// bytes that nobody else uses) and its notification.
    pub fn with_mapper(
        memory: Linear,
        shape: Shape,
        rx: (D, u64, N),
        tx: (D, u64, N),
        mapper: M,
    ) -> Result<Self, Error> {
        let rx = Half::new(memory, rx, mapper.clone())?;
        let tx = Half::new(memory, tx, mapper)?;
        let tx_free = Free::all(tx.ring.free());
        let buffers = (rx.buffer_of.len(), tx.buffer_of.len());
        // A frame over dozens of buffers that are mapped one by one is of no use to anybody.
        let offload = if M::DYNAMIC {
            None
        } else {
            offload::Offload::new(&shape, buffers.0, buffers.1)
        };
        let mut port = Self {
            rx,
            tx,
            shape: Shape {
                // Section 5.1.6.3.1: what cannot be merged has to hold a whole frame.
                rx_buffer: match shape.mergeable {
                    true => shape.rx_buffer.clamp(HEADER + 1, PACKET),
                    false => PACKET,
                },
                ..shape
            },
            tx_free,
            used: [Used::default(); MAX_BURST],
            // Of a short ring, the device waits for each; and what is mapped one by one is not unmapped before it is looked at.
            group: match M::DYNAMIC {
                true => 1,
                false => GROUP.min(buffers.0 / GROUP).max(1),
            },
            came: [Used::default(); GROUP],
            taken: 0,
            shown: 0,
            partial: Partial {
                frame: vec![0; MAX_FRAME].into_boxed_slice(),
                len: 0,
                missing: 0,
            },
            offload,
        };
        port.disarm();
        Ok(port)
    }

    /// Gives all receive buffers to the device.
    pub fn fill(&mut self) -> Result<(), virtio_iommu::Error> {
        let buffers: Vec<u16> = (0..self.rx.ring.free()).collect();
        self.rx.map(&buffers)?;
        for buffer in buffers {
            self.add_rx(buffer);
        }
        self.rx.publish();
        Ok(())
    }

    #[inline(always)]
    fn add_rx(&mut self, buffer: u16) {
        let piece = self.rx.piece(buffer, 0, self.shape.rx_buffer, true);
        let id = self.rx.ring.add(&[piece]);
        self.rx.note(id, buffer);
    }

    /// Takes up to `count` used receive buffers, and asks for what is in them, so that the lines of all travel at the same time. From here on the ids in `used` are
    /// the buffers' numbers.
    #[inline(always)]
    fn take_rx(&mut self, count: usize) -> Result<usize, PortError> {
        let Self { rx, used, .. } = self;
        let (first, buffer_of) = (rx.ptr, &rx.buffer_of);
        let mut places = used.iter_mut();
        let n = rx.ring.take_each(count, |used| {
            let id = buffer_of.get(usize::from(used.id)).copied().unwrap_or(0);
            let frame = first.wrapping_add(usize::from(id) * M::STRIDE + FRONT + HEADER_LEN);
            bulk::fetch(frame, (used.len as usize).saturating_sub(HEADER_LEN));
            if let Some(place) = places.next() {
                *place = Used { id, ..used };
            }
        })?;
        Ok(n)
    }

    /// Gives the first `n` buffers of `used` back to the device.
    #[inline(always)]
    fn give_back(&mut self, n: usize) {
        let Self {
            rx, used, shape, ..
        } = self;
        let Half {
            ring,
            addr,
            buffer_of,
            ..
        } = rx;
        let used = used.get(..n).unwrap_or_default();
        let buffer = |i: usize| used.get(i).map_or(0, |used| used.id);
        let piece = |i| Buffer {
            addr: *addr + (usize::from(buffer(i)) * M::STRIDE + FRONT) as u64,
            len: u32::from(shape.rx_buffer),
            device_writes: true,
        };
        ring.add_each(n, piece, |i, id| note(buffer_of, id, buffer(i)));
    }

    /// Gives the packets in the first `built` free buffers to the device, a descriptor each. Returns for how many there was room.
    #[inline(always)]
    fn add_direct(&mut self, built: usize, packet: u16) -> usize {
        let Self { tx, tx_free, .. } = self;
        let Half {
            ring,
            addr,
            buffer_of,
            ..
        } = tx;
        let buffers = tx_free.first(built);
        let buffer = |n: usize| buffers.get(n).copied().unwrap_or(0);
        let piece = |n| Buffer {
            addr: *addr + (usize::from(buffer(n)) * M::STRIDE + FRONT) as u64,
            len: u32::from(packet),
            device_writes: false,
        };
        ring.add_each(buffers.len(), piece, |n, id| note(buffer_of, id, buffer(n)))
    }

    /// The same in chains or through indirect tables. (Where a table had to be a chain after all, not all fit.)
    #[inline(never)]
    fn add_pieces(&mut self, built: usize, packet: u16) -> usize {
        let mut added = 0;
        while let Some(&buffer) = self.tx_free.first(built).get(added)
            && self.add_tx(buffer, packet)
        {
            added += 1;
        }
        added
    }

    /// Gives a packet to the device; `false` where the ring is full.
    #[inline(always)]
    fn add_tx(&mut self, buffer: u16, packet: u16) -> bool {
        let id = if self.shape.tx == TxShape::Direct {
            self.tx.ring.add(&[self.tx.piece(buffer, 0, packet, false)])
        } else {
            let pieces = [
                self.tx.piece(buffer, 0, HEADER, false),
                self.tx.piece(buffer, HEADER, packet - HEADER, false),
            ];
            let table = self.tx.piece(buffer, TABLE, 0, false).addr;
            let indirect = self.shape.tx == TxShape::Indirect;
            let id = if indirect {
                self.tx.ring.add_indirect(table, &pieces)
            } else {
                None
            };
            id.or_else(|| self.tx.ring.add(&pieces))
        };
        self.tx.note(id, buffer)
    }

    /// Takes back the transmit buffers that the device is done with, a burst of them at most; returns how many.
    #[inline(always)]
    fn reclaim(&mut self) -> Result<usize, PortError> {
        let n = self.tx.ring.take(&mut self.used)?;
        if M::DYNAMIC {
            let mut buffers = [0; MAX_BURST];
            let buffers = self.tx.buffers(&self.used, n, &mut buffers);
            self.tx.unmap(buffers)?;
        }
        for &used in self.used.iter().take(n) {
            let buffer = self.tx.buffer(used);
            match &mut self.offload {
                Some(offload) => offload.release(buffer, &mut self.tx_free),
                None => self.tx_free.put(buffer),
            }
        }
        Ok(n)
    }

    /// Takes one buffer of a frame that is spread over several: the first, or one more. Returns the frame when it is whole.
    #[cold]
    fn merge(&mut self, buffer: u16, len: usize) -> Option<&[u8]> {
        let skip = if self.partial.missing == 0 {
            self.partial.len = 0;
            self.partial.missing = self.num_buffers(buffer);
            HEADER_LEN
        } else {
            0
        };
        // SAFETY: the ring checked that `len` does not exceed the buffer.
        unsafe {
            self.partial
                .push(self.rx.ptr(buffer).add(skip), len.saturating_sub(skip))
        };
        self.partial.missing -= 1;
        if self.partial.missing > 0 {
            return None;
        }
        self.partial.frame.get(..self.partial.len)
    }

    /// The numbers of the first `n` buffers of `used`.
    fn taken<'a>(&self, n: usize, to: &'a mut [u16; MAX_BURST]) -> &'a [u16] {
        for (to, used) in to.iter_mut().zip(self.used.iter().take(n)) {
            *to = used.id;
        }
        to.get(..n).unwrap_or(&[])
    }

    /// Shows the frame in a buffer, and asks for the one in the next; `false` where the frame goes on there.
    #[inline(always)]
    fn show(&mut self, used: Used, next: Option<Used>, receive: &mut impl FnMut(&Frame)) -> bool {
        let Used { id: buffer, len } = used;
        // The ring checked it against the buffer's length.
        let len = usize::try_from(len).unwrap_or(0);
        let whole =
            !self.shape.mergeable || self.partial.missing == 0 && self.num_buffers(buffer) == 1;
        let frame = if whole {
            // What is shorter than a header is no frame: an empty one is shown.
            let len = len.saturating_sub(HEADER_LEN);
            if let Some(next) = next {
                bulk::fetch_next(self.rx.ptr(next.id).wrapping_add(HEADER_LEN), len);
            }
            // SAFETY: header and frame lie in the buffer.
            unsafe { Frame::new(self.rx.ptr(buffer).add(HEADER_LEN), len) }
        } else {
            match self.merge(buffer, len) {
                Some(frame) => Frame::of(frame),
                None => return false,
            }
        };
        receive(&frame);
        true
    }

    /// Receives fewer frames than a group. Beside the path of bursts, whose code it would spread.
    #[inline(never)]
    fn rx_group(
        &mut self,
        count: usize,
        receive: &mut impl FnMut(&Frame),
    ) -> Result<usize, PortError> {
        if self.shown == self.taken {
            let n = self.take_rx(self.group)?;
            for (came, used) in self.came.iter_mut().zip(&self.used) {
                *came = *used;
            }
            (self.shown, self.taken) = (0, n);
        }
        let end = self.taken.min(self.shown + count);
        let mut frames = 0;
        while self.shown < end {
            let at = self.shown;
            let next = self.came.get(at + 1).filter(|_| at + 1 < self.taken);
            if let Some(&used) = self.came.get(at) {
                frames += usize::from(self.show(used, next.copied(), receive));
            }
            self.shown += 1;
        }
        if self.shown == self.taken && self.taken > 0 {
            for (came, used) in self.came.iter().zip(&mut self.used) {
                *used = *came;
            }
            self.give_back(self.taken);
            self.rx.publish();
            (self.shown, self.taken) = (0, 0);
        }
        Ok(frames)
    }

    /// Sends with buffers that are mapped while the device has them: all of a burst before the first is given to it.
    fn tx_mapped(
        &mut self,
        count: usize,
        len: usize,
        packet: u16,
        build: &mut impl FnMut(usize, &mut Slot),
    ) -> Result<usize, PortError> {
        let mut buffers = [0; MAX_BURST];
        let room = match self.shape.tx {
            TxShape::Direct | TxShape::Indirect => usize::from(self.tx.ring.free()),
            TxShape::Chain => usize::from(self.tx.ring.free()) / 2,
        };
        let mut built = 0;
        let free = self.tx_free.first(count.min(room));
        for (to, &buffer) in buffers.iter_mut().zip(free) {
            *to = buffer;
            // SAFETY: header and frame fit in the buffer, which is not with the device.
            let mut slot = unsafe { Slot::new(self.tx.ptr(buffer).add(HEADER_LEN), len) };
            build(built, &mut slot);
            built += 1;
        }
        let (buffers, _) = buffers.split_at(built);
        self.tx.map(buffers)?;
        let added = buffers
            .iter()
            .take_while(|&&buffer| self.add_tx(buffer, packet))
            .count();
        // Where an indirect table had to be a chain after all, not all fitted.
        let (_, left) = buffers.split_at(added);
        if !left.is_empty() {
            self.tx.unmap(left)?;
        }
        self.tx_free.take(added);
        if added > 0 {
            self.tx.publish();
        }
        Ok(added)
    }

    /// Over how many buffers the frame is spread that starts in `buffer`; at least one.
    #[inline(always)]
    fn num_buffers(&self, buffer: u16) -> u16 {
        // SAFETY: the header lies in the buffer.
        u16::from_le(unsafe { bulk::load::<u16>(self.rx.ptr(buffer).add(NUM_BUFFERS)) }).max(1)
    }
}

impl<D: DriverRing, N: Notify, M: Mapper> Port for NetPort<D, N, M> {
    #[inline(always)]
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, PortError> {
        let len = len.min(MAX_FRAME);
        if self.offload.is_some() {
            return self.tx_with_header(Header::NONE, count, len, &mut build);
        }
        let packet = u16::try_from(HEADER_LEN + len).unwrap_or(PACKET);
        let descriptors = if self.shape.tx == TxShape::Direct {
            count
        } else {
            2 * count
        };
        if usize::from(self.tx.ring.free()) < descriptors {
            self.reclaim()?;
        }
        if M::DYNAMIC {
            return self.tx_mapped(count, len, packet, &mut build);
        }
        let room = match self.shape.tx {
            TxShape::Direct | TxShape::Indirect => usize::from(self.tx.ring.free()),
            TxShape::Chain => usize::from(self.tx.ring.free()) / 2,
        };
        let buffers = self.tx_free.first(count.min(room));
        let built = buffers.len();
        for &buffer in buffers {
            bulk::fetch_to_write(self.tx.ptr(buffer).wrapping_add(HEADER_LEN), len);
        }
        // The header in front of each stays as the pool came: all zero, no offload. (num_buffers is the receiver's business.)
        for (n, &buffer) in buffers.iter().enumerate() {
            let frame = self.tx.ptr(buffer).wrapping_add(HEADER_LEN);
            if let Some(&next) = buffers.get(n + 1) {
                bulk::fetch_next_to_write(self.tx.ptr(next).wrapping_add(HEADER_LEN), len);
            }
            // SAFETY: header and frame fit in the buffer, which is not with the device.
            build(n, &mut unsafe { Slot::new(frame, len) });
        }
        let sent = match self.shape.tx {
            TxShape::Direct => self.add_direct(built, packet),
            TxShape::Chain | TxShape::Indirect => self.add_pieces(built, packet),
        };
        self.tx_free.take(sent);
        if sent > 0 {
            self.tx.publish();
        }
        Ok(sent)
    }

    fn offloads(&self) -> Offloads {
        let offload = self.offload.as_ref();
        offload.map_or(Offloads::default(), |offload| offload.send)
    }

    // Beside the path of frames that leave nothing to the peer, whose code it would spread.
    #[inline(never)]
    fn tx_offloaded(
        &mut self,
        header: &Header,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, PortError> {
        let header = self.offloads().check_segment(header, len);
        let header = header.filter(|_| self.offload.is_some());
        self.tx_with_header(header.ok_or(PortError::Offload)?, count, len, &mut build)
    }

    #[inline(always)]
    fn rx_burst(
        &mut self,
        count: usize,
        mut receive: impl FnMut(&Frame),
    ) -> Result<usize, PortError> {
        let count = count.min(MAX_BURST);
        if self.offload.is_some() {
            return self.rx_with_headers(count, &mut receive);
        }
        if (1..self.group).contains(&count) || self.shown < self.taken {
            return self.rx_group(count, &mut receive);
        }
        let n = self.take_rx(count)?;
        if n == 0 {
            return Ok(0);
        }
        let mut buffers = [0; MAX_BURST];
        if M::DYNAMIC {
            // Taken away from the device before anybody looks.
            self.rx.unmap(self.taken(n, &mut buffers))?;
        }
        let mut frames = 0;
        for i in 0..n {
            let next = self.used.get(i + 1).filter(|_| i + 1 < n).copied();
            frames += usize::from(self.show(self.used[i], next, &mut receive));
        }
        if M::DYNAMIC {
            self.rx.map(self.taken(n, &mut buffers))?;
        }
        self.give_back(n);
        self.rx.publish();
        Ok(frames)
    }

    fn rx_room(&self) -> usize {
        self.rx.buffer_of.len()
    }

    fn drained(&mut self) -> Result<bool, PortError> {
        // Each buffer comes back once: the ring takes no other.
        while self.reclaim()? > 0 {}
        Ok(self.tx_free.len() == self.tx.buffer_of.len())
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        let received = self.offload.as_ref().is_some_and(|o| o.has_received());
        let received = received || self.shown < self.taken;
        let rx = rx && (received || self.rx.ring.enable_calls());
        let tx = tx && self.tx.ring.enable_calls();
        rx || tx
    }

    fn disarm(&mut self) {
        self.rx.ring.disable_calls();
        self.tx.ring.disable_calls();
    }

    fn notices(&self) -> [Notices; 2] {
        [self.tx.notices, self.rx.notices]
    }
}
