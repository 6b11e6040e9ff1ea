//! The driver's data path where checksums or segmentation were negotiated: every frame has a header that says something, and may be as long as an IP packet. Such a
//! frame is sent from as many buffers of the pool as it takes, as one chain; one that was received over several is looked at where it lies.
//!
//! Unsafe code: as in the module above; all pieces are parts of the pool.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use virtqueue::net::{HEADER_LEN, Header, MAX_LARGE_FRAME, Offloads};
use virtqueue::{Buffer, DriverRing, Used};

use super::free::Free;
use super::{HEADER, Half, NetPort, PACKET, Shape, TxShape};
use crate::bulk;
use crate::mapper::Mapper;
use crate::pieces::{Piece, strip};
use crate::port::{Error, Frame, MAX_BURST, MAX_FRAME, Slot};
use crate::virtio_pci::Notify;

/// How many buffers of so many bytes the longest frame takes.
pub(crate) fn buffers_of_longest(bytes: u16) -> usize {
    (HEADER_LEN + MAX_LARGE_FRAME).div_ceil(usize::from(bytes.max(1)))
}

/// Most buffers that a frame to send takes.
const MAX_PIECES: usize = (HEADER_LEN + MAX_LARGE_FRAME).div_ceil(PACKET as usize);
/// Descriptors of them, with one for the header.
pub(crate) const MAX_DESCRIPTORS: usize = MAX_PIECES + 1;
// A table of them fits in a buffer, which starts where a table may.
const _: () = assert!(16 * MAX_DESCRIPTORS <= PACKET as usize);
/// Where in a buffer.
const TABLE: u16 = 12;
const _: () = assert!((super::FRONT + TABLE as usize).is_multiple_of(16));
/// How many used buffers are taken at once at least: one frame may be dozens.
const LOOK: usize = 16;
/// Behind the last buffer of a frame there is none.
const LAST: u16 = u16::MAX;

/// What a port has for such frames.
#[derive(Debug)]
pub(super) struct Offload {
    /// What may be left to the device, and what it may leave to us.
    pub(super) send: Offloads,
    receive: Offloads,
    /// For each transmit buffer that is with the device, the next of the same frame.
    next: Vec<u16>,
    /// Used receive buffers that were not looked at: those from `at` on, up to `taken`.
    used: [Used; MAX_BURST],
    at: usize,
    taken: usize,
    /// The buffers of a frame of which some are still to come, as many as `missing`, how much is in each, and its header.
    held: Vec<(u16, u32)>,
    missing: u16,
    header: Header,
    /// Of one frame.
    pieces: Vec<Piece>,
}

impl Offload {
    /// `None` where nothing of the kind was negotiated.
    pub(super) fn new(shape: &Shape, rx: usize, tx: usize) -> Option<Box<Self>> {
        let send = Offloads::of_driver(shape.offloads);
        let receive = Offloads::of_device(shape.offloads);
        let any = send.csum() || receive.csum();
        any.then(|| {
            Box::new(Self {
                send,
                receive,
                next: vec![LAST; tx],
                used: [Used::default(); MAX_BURST],
                at: 0,
                taken: 0,
                held: Vec::with_capacity(rx),
                missing: 0,
                header: Header::NONE,
                pieces: Vec::with_capacity(rx.max(MAX_PIECES)),
            })
        })
    }

    /// Whether a look at the ring is not needed to find something that was received.
    pub(super) fn has_received(&self) -> bool {
        self.at < self.taken
    }

    /// All buffers of the frame that starts in `first`, which is with us again.
    pub(super) fn release(&mut self, first: u16, free: &mut Free) {
        let mut buffer = first;
        // No frame has more.
        for _ in 0..=MAX_PIECES {
            free.put(buffer);
            let Some(next) = self.next.get_mut(usize::from(buffer)) else {
                return;
            };
            buffer = core::mem::replace(next, LAST);
            if buffer == LAST {
                return;
            }
        }
    }

    /// Remembers that `buffers` make up a frame.
    fn link(&mut self, buffers: &[u16]) {
        for pair in buffers.windows(2) {
            if let [buffer, next] = *pair
                && let Some(slot) = self.next.get_mut(usize::from(buffer))
            {
                *slot = next;
            }
        }
    }
}

impl<D: DriverRing, N: Notify, M: Mapper> Half<D, N, M> {
    /// The header in front of a buffer's packet: written where it is not there already.
    #[inline(always)]
    fn put_header(&self, buffer: u16, header: &[u8; HEADER_LEN]) {
        // SAFETY: the header lies in the buffer.
        unsafe {
            let to = self.ptr(buffer);
            if !bulk::equal(to, header.as_ptr(), HEADER_LEN) {
                bulk::copy(to, header.as_ptr(), HEADER_LEN);
            }
        }
    }
}

impl<D: DriverRing, N: Notify, M: Mapper> NetPort<D, N, M> {
    /// Sends frames behind a header that has been checked. The device sees each as soon as it is complete where they are long.
    pub(super) fn tx_with_header(
        &mut self,
        header: Header,
        count: usize,
        len: usize,
        build: &mut impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let header = header.encode();
        let packet = HEADER_LEN + len;
        let (mut sent, mut notify) = (0, false);
        if packet <= usize::from(PACKET) {
            let descriptors = 1 + usize::from(self.shape.tx != TxShape::Direct);
            if usize::from(self.tx.ring.free()) < descriptors * count {
                self.reclaim()?;
            }
            for &buffer in self.tx_free.first(count) {
                bulk::fetch_to_write(self.tx.ptr(buffer).wrapping_add(HEADER_LEN), len);
            }
        }
        while sent < count {
            let build = |slot: &mut Slot| build(sent, slot);
            let went = match u16::try_from(packet) {
                Ok(packet) if packet <= PACKET => self.send_short(&header, packet, build),
                _ => self.send_long(&header, packet, build)?,
            };
            if !went {
                break;
            }
            sent += 1;
            if len > MAX_FRAME {
                notify |= self.tx.ring.publish();
            }
        }
        if sent > 0 {
            notify |= self.tx.ring.publish();
            self.tx.tell(notify);
        }
        Ok(sent)
    }

    /// Sends a frame from one buffer; `false` where there is none, or no room in the ring.
    #[inline(always)]
    fn send_short(
        &mut self,
        header: &[u8; HEADER_LEN],
        packet: u16,
        build: impl FnOnce(&mut Slot),
    ) -> bool {
        let &[buffer] = self.tx_free.first(1) else {
            return false;
        };
        self.tx.put_header(buffer, header);
        let len = usize::from(packet) - HEADER_LEN;
        // SAFETY: header and frame fit in the buffer, which is not with the device.
        build(&mut unsafe { Slot::new(self.tx.ptr(buffer).add(HEADER_LEN), len) });
        let added = self.add_tx(buffer, packet);
        self.tx_free.take(usize::from(added));
        added
    }

    /// Sends a frame from several buffers; `false` where there are not enough, or no room in the ring.
    fn send_long(
        &mut self,
        header: &[u8; HEADER_LEN],
        packet: usize,
        build: impl FnOnce(&mut Slot),
    ) -> Result<bool, Error> {
        let buffers = packet.div_ceil(usize::from(PACKET)).min(MAX_PIECES);
        let indirect = self.shape.tx == TxShape::Indirect;
        let with_table = buffers + usize::from(indirect);
        let apart = self.shape.tx != TxShape::Direct;
        // Where the ring takes no tables, a chain goes.
        let descriptors = buffers + usize::from(apart);
        if usize::from(self.tx.ring.free()) < descriptors || self.tx_free.len() < with_table {
            self.reclaim()?;
        }
        let taken = self.tx_free.first(with_table);
        let Some(offload) = self.offload.as_mut().filter(|_| taken.len() == with_table) else {
            return Ok(false);
        };
        let (mine, table) = taken.split_at(buffers);
        let [first, ..] = *mine else {
            return Ok(false);
        };
        // The descriptors and where they are, one behind the other.
        let mut list = [Buffer::default(); MAX_DESCRIPTORS];
        let mut count = 0;
        let mut add = |piece| {
            if let Some(slot) = list.get_mut(count) {
                *slot = piece;
                count += 1;
            }
        };
        offload.pieces.clear();
        let mut left = packet;
        for &buffer in mine {
            let len = PACKET.min(u16::try_from(left).unwrap_or(PACKET));
            left -= usize::from(len);
            let ptr = self.tx.ptr(buffer);
            offload.pieces.push(Piece {
                ptr,
                len: usize::from(len),
            });
            if apart && buffer == first {
                add(self.tx.piece(buffer, 0, HEADER, false));
                add(self.tx.piece(buffer, HEADER, len - HEADER, false));
            } else {
                add(self.tx.piece(buffer, 0, len, false));
            }
        }
        self.tx.put_header(first, header);
        // SAFETY: the pieces are buffers of the pool, which are not with the device.
        if let Some(mut slot) = unsafe { Slot::in_pieces(strip(&mut offload.pieces, HEADER_LEN)) } {
            build(&mut slot);
        }
        let list = list.get(..count).unwrap_or(&[]);
        let ring = &mut self.tx.ring;
        let through_table = match *table {
            [table] => {
                let addr = self.tx.addr
                    + (usize::from(table) * M::STRIDE + super::FRONT + usize::from(TABLE)) as u64;
                ring.add_indirect(addr, list)
            }
            _ => None,
        };
        let used_table = through_table.is_some();
        let id = through_table.or_else(|| ring.add(list));
        if !self.tx.note(id, first) {
            return Ok(false);
        }
        offload.link(mine);
        if let ([table], [.., last]) = (table, mine)
            && used_table
        {
            offload.link(&[*last, *table]);
        }
        self.tx_free.take(buffers + usize::from(used_table));
        Ok(true)
    }

    /// Receives frames with what their headers say.
    pub(super) fn rx_with_headers(
        &mut self,
        count: usize,
        receive: &mut impl FnMut(&Frame),
    ) -> Result<usize, Error> {
        let Some(offload) = &mut self.offload else {
            return Err(Error::Offload);
        };
        let mut half = Receiving {
            rx: &mut self.rx,
            buffer: self.shape.rx_buffer,
            mergeable: self.shape.mergeable,
            given: 0,
            notify: false,
        };
        let mut frames = 0;
        while frames < count {
            if !offload.has_received() {
                let look = (count - frames).clamp(LOOK, MAX_BURST);
                offload.taken = half.rx.ring.take(&mut offload.used[..look])?;
                offload.at = 0;
                for &used in offload.used.iter().take(offload.taken) {
                    let packet = half.rx.ptr(half.rx.buffer(used));
                    bulk::fetch(packet, HEADER_LEN);
                    let len = (used.len as usize).saturating_sub(HEADER_LEN);
                    bulk::fetch(packet.wrapping_add(HEADER_LEN), len);
                }
            }
            let Some(&used) = offload
                .used
                .get(offload.at)
                .filter(|_| offload.has_received())
            else {
                break;
            };
            offload.at += 1;
            frames += usize::from(half.take(offload, used, receive));
        }
        if half.given > 0 {
            half.notify |= half.rx.ring.publish();
        }
        if frames > 0 || half.notify {
            half.rx.tell(half.notify);
        }
        Ok(frames)
    }
}

/// The receive half during a burst.
struct Receiving<'a, D, N, M> {
    rx: &'a mut Half<D, N, M>,
    /// Bytes of a buffer, as the device has them.
    buffer: u16,
    mergeable: bool,
    /// Buffers that went back and that the device does not see yet.
    given: usize,
    notify: bool,
}

impl<D: DriverRing, N: Notify, M: Mapper> Receiving<'_, D, N, M> {
    /// Gives a buffer back to the device.
    #[inline(always)]
    fn give(&mut self, buffer: u16) {
        let piece = self.rx.piece(buffer, 0, self.buffer, true);
        let id = self.rx.ring.add(&[piece]);
        self.rx.note(id, buffer);
        self.given += 1;
    }

    /// Takes one used buffer; returns whether a frame was shown.
    #[inline(always)]
    fn take(
        &mut self,
        offload: &mut Offload,
        used: Used,
        receive: &mut impl FnMut(&Frame),
    ) -> bool {
        let buffer = self.rx.buffer(used);
        // The ring checked it against the buffer's length.
        let len = used.len as usize;
        if offload.missing > 0 {
            return self.merge(offload, (buffer, used.len), receive);
        }
        let mut bytes = [0; HEADER_LEN];
        // SAFETY: the header lies in the buffer.
        unsafe { bulk::copy(bytes.as_mut_ptr(), self.rx.ptr(buffer), HEADER_LEN) };
        let header = Header::decode(bytes);
        let buffers = if self.mergeable {
            header.num_buffers
        } else {
            1
        };
        if buffers > 1 {
            // A count that no ring has buffers for would hold all there are for ever.
            if usize::from(buffers) > self.rx.buffer_of.len() {
                self.give(buffer);
                return false;
            }
            (offload.missing, offload.header) = (buffers, header);
            return self.merge(offload, (buffer, used.len), receive);
        }
        let checked = len
            .checked_sub(HEADER_LEN)
            .and_then(|len| Some((len, offload.receive.check_segment(&header, len)?)));
        if let Some((len, header)) = checked {
            // SAFETY: header and frame lie in the buffer.
            receive(&unsafe {
                Frame::with_header(self.rx.ptr(buffer).add(HEADER_LEN), len, header)
            });
        }
        self.give(buffer);
        checked.is_some()
    }

    /// Takes one buffer of a frame that is spread over several: the first, or one more. The buffers go back when it has been looked at.
    fn merge(
        &mut self,
        offload: &mut Offload,
        held: (u16, u32),
        receive: &mut impl FnMut(&Frame),
    ) -> bool {
        offload.held.push(held);
        offload.missing -= 1;
        if offload.missing > 0 {
            return false;
        }
        offload.pieces.clear();
        let pieces = offload.held.iter().map(|&(buffer, len)| Piece {
            ptr: self.rx.ptr(buffer),
            len: len as usize,
        });
        offload.pieces.extend(pieces);
        // A header that is not all in the first buffer is none.
        let whole = offload
            .pieces
            .first()
            .is_some_and(|first| first.len >= HEADER_LEN);
        let frame = strip(&mut offload.pieces, HEADER_LEN);
        let len = crate::pieces::total(frame);
        let header = offload
            .receive
            .check_segment(&offload.header, len)
            .filter(|_| whole);
        // SAFETY: the pieces lie in buffers that are with us until they are given back below.
        let frame = header.and_then(|header| unsafe { Frame::in_pieces(frame, header) });
        if let Some(frame) = &frame {
            receive(frame);
        }
        let shown = frame.is_some();
        for at in 0..offload.held.len() {
            if let Some(&(buffer, _)) = offload.held.get(at) {
                self.give(buffer);
            }
        }
        offload.held.clear();
        self.notify |= self.rx.ring.publish();
        self.given = 0;
        shown
    }
}
