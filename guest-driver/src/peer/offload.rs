//! The back-end's data path where checksums or segmentation were negotiated: every frame has a header that says something, and may be as long as an IP packet,
//! over several chains or a chain of several buffers. It is written and read right where it lies.
//!
//! Unsafe code: as in the module above; a [`Piece`] is what [`Linear::ptr`] checked.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec;

use virtqueue::linear::Linear;
use virtqueue::net::{HEADER_LEN, Header, Offloads};
use virtqueue::{Buffer, Chain, DeviceRing};

use super::{MAX_BUFFERS, ONES, PeerPort, pieces, place, room};
use crate::bulk;
use crate::pieces::{Piece, strip, walk};
use crate::port::{Error, Frame, MAX_BURST, MAX_FRAME, Slot};
use crate::virtio_pci::Notify;

/// What a port has for such frames.
#[derive(Debug)]
pub(super) struct Offload {
    /// What may be left to the front-end, and what it may leave to us.
    pub(super) send: Offloads,
    receive: Offloads,
    /// Of one frame.
    pieces: Box<[Piece]>,
    /// How many chains the last frame took.
    chains: usize,
}

impl Offload {
    /// `None` where nothing of the kind was negotiated.
    pub(super) fn new(features: u64) -> Option<Box<Self>> {
        let send = Offloads::of_device(features);
        let receive = Offloads::of_driver(features);
        let any = send.csum() || receive.csum();
        any.then(|| {
            Box::new(Self {
                send,
                receive,
                pieces: vec![Piece::NONE; MAX_BUFFERS].into_boxed_slice(),
                chains: 1,
            })
        })
    }
}

/// How a frame came to its chains.
enum Put {
    /// It is there, or lost because a chain is too short for it, and took so many.
    Took(usize),
    /// There are not enough.
    Lacks,
}

/// A frame that is to be sent, and where to.
struct Outgoing<'a> {
    window: Linear,
    header: Header,
    len: usize,
    mergeable: bool,
    unreadable: &'a mut bool,
    dropped: &'a mut u64,
}

impl Outgoing<'_> {
    /// Writes the header for `chains` chains, unless it is there already: then its line need not travel.
    ///
    /// # Safety
    /// It fits where `to` points.
    #[inline(always)]
    unsafe fn put_header(&mut self, to: *mut u8, chains: u16) {
        let header = Header {
            num_buffers: chains,
            ..self.header
        }
        .encode();
        // SAFETY: the caller's promise.
        unsafe {
            if *self.unreadable || !bulk::equal(to, header.as_ptr(), HEADER_LEN) {
                *self.unreadable = *self.unreadable || bulk::equal(to, ONES.as_ptr(), HEADER_LEN);
                bulk::copy(to, header.as_ptr(), HEADER_LEN);
            }
        }
    }

    /// Builds the frame in the first of `chains`, or in as many as it takes, and marks them used.
    #[inline(always)]
    fn put<V: DeviceRing>(
        &mut self,
        ring: &mut V,
        (chains, buffers): (&[Chain], &[Buffer]),
        parts: &mut [Piece],
        build: impl FnOnce(&mut Slot),
    ) -> Put {
        let packet = HEADER_LEN + self.len;
        let [first, ..] = chains else {
            return Put::Lacks;
        };
        if let [whole] = pieces(buffers, first)
            && let Some(to) = place(self.window, *whole, packet, true)
        {
            // SAFETY: `place` checked that header and frame fit where `to` points.
            unsafe {
                self.put_header(to, 1);
                build(&mut Slot::new(to.add(HEADER_LEN), self.len));
            }
            ring.put(first.id, u32::try_from(packet).unwrap_or(0));
            return Put::Took(1);
        }
        self.spread(ring, (chains, buffers), parts, build)
    }

    /// The same over several buffers.
    fn spread<V: DeviceRing>(
        &mut self,
        ring: &mut V,
        (chains, buffers): (&[Chain], &[Buffer]),
        parts: &mut [Piece],
        build: impl FnOnce(&mut Slot),
    ) -> Put {
        let packet = HEADER_LEN + self.len;
        let (mut used, mut count, mut found) = (0, 0, 0);
        for chain in chains {
            used += 1;
            for buffer in pieces(buffers, chain).iter().filter(|b| b.device_writes) {
                let len = (buffer.len as usize).min(packet - found);
                // The ring code checked the whole buffer already.
                if let Some(ptr) = self.window.ptr(buffer.addr, len)
                    && let Some(part) = parts.get_mut(count).filter(|_| len > 0)
                {
                    *part = Piece { ptr, len };
                    count += 1;
                    found += len;
                }
            }
            if found == packet || !self.mergeable {
                break;
            }
        }
        let chains = chains.get(..used).unwrap_or(&[]);
        let (Some(parts), true) = (parts.get_mut(..count), found == packet) else {
            if self.mergeable {
                return Put::Lacks;
            }
            // Too short for any frame of this length, now and ever: back it goes, and the frame is lost.
            chains.iter().for_each(|chain| ring.put(chain.id, 0));
            *self.dropped += 1;
            return Put::Took(used);
        };
        let merged = u16::try_from(used).unwrap_or(1);
        match parts.first() {
            // SAFETY: the piece has room for it.
            Some(first) if first.len >= HEADER_LEN => unsafe { self.put_header(first.ptr, merged) },
            _ => {
                let header = Header {
                    num_buffers: merged,
                    ..self.header
                }
                .encode();
                walk(parts.iter().copied(), 0, HEADER_LEN, |part, at| {
                    // SAFETY: the part is in the window, and `at + part.len` does not exceed the header's length.
                    unsafe { bulk::copy(part.ptr, header.as_ptr().add(at), part.len) };
                    true
                });
            }
        }
        // SAFETY: the pieces are in the window, which stays.
        if let Some(mut slot) = unsafe { Slot::in_pieces(strip(parts, HEADER_LEN)) } {
            build(&mut slot);
        }
        let mut left = packet;
        for chain in chains {
            let written = room(pieces(buffers, chain)).min(left);
            ring.put(chain.id, u32::try_from(written).unwrap_or(0));
            left -= written;
        }
        Put::Took(used)
    }
}

impl<V: DeviceRing, N: Notify> PeerPort<V, N> {
    /// Sends frames behind a header that has been checked. The front-end sees each as soon as it is complete where they are long.
    pub(super) fn tx_with_header(
        &mut self,
        header: Header,
        count: usize,
        len: usize,
        build: &mut impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let Some(offload) = &mut self.offload else {
            return Err(Error::Offload);
        };
        let count = count.min(MAX_BURST);
        let vring = &mut self.to_peer;
        let mut outgoing = Outgoing {
            window: self.window,
            header,
            len,
            mergeable: self.mergeable,
            unreadable: &mut self.unreadable,
            dropped: &mut self.dropped,
        };
        let mut wanted = (offload.chains * count).clamp(1, MAX_BURST);
        // Large packets become visible one by one; but a record says where the burst ends, so that with one they do at its end.
        let each = len > MAX_FRAME && vring.record.is_none();
        let (mut sent, mut notify) = (0, false);
        while sent < count {
            let (chains, buffers) = (&mut self.chains[..wanted], &mut self.buffers);
            let taken = vring.taking(|ring| ring.get(chains, buffers))?;
            if len <= MAX_FRAME {
                for chain in self.chains.iter().take(taken.min(count - sent)) {
                    if let [whole] = pieces(&self.buffers, chain) {
                        let to = self.window.ptr(whole.addr, whole.len as usize);
                        let to = to.unwrap_or(core::ptr::null_mut());
                        bulk::fetch(to, HEADER_LEN);
                        bulk::fetch_to_write(to.wrapping_add(HEADER_LEN), len);
                    }
                }
            }
            let mut at = 0;
            while sent < count {
                let chains = self.chains.get(at..taken).unwrap_or(&[]);
                let buffers = (chains, &self.buffers[..]);
                let build = |slot: &mut Slot| build(sent, slot);
                match outgoing.put(&mut vring.ring, buffers, &mut offload.pieces, build) {
                    Put::Took(chains) => {
                        offload.chains = chains;
                        at += chains;
                        sent += 1;
                        if each {
                            notify |= vring.ring.publish();
                        }
                    }
                    Put::Lacks => break,
                }
            }
            if at < taken {
                vring.ring.unget(taken - at);
            }
            if let Some(log) = &self.log {
                log.sent(&self.chains[..at], &self.buffers, HEADER_LEN + len);
            }
            if at == 0 {
                match (taken == wanted, wanted == MAX_BURST) {
                    // So many were not enough: once more, with all that there are.
                    (true, false) => wanted = MAX_BURST,
                    // Nor will any be: no frame of this length ever gets there.
                    (true, true) => {
                        *outgoing.dropped += 1;
                        sent += 1;
                    }
                    (false, _) => break,
                }
            }
        }
        let wanted = vring.publish() || notify;
        if wanted {
            vring.call.notify();
        }
        if sent > 0 {
            self.notices[0].count(wanted);
        }
        if let Some(log) = &self.log {
            log.ring(0);
        }
        Ok(sent)
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
        let chains = &mut self.chains[..count.min(MAX_BURST)];
        let buffers = &mut self.buffers;
        let n = self.from_peer.taking(|ring| ring.get(chains, buffers))?;
        if n == 0 {
            return Ok(0);
        }
        for chain in &self.chains[..n] {
            if let [first, ..] = pieces(&self.buffers, chain)
                && let Some(from) = self.window.ptr(first.addr, first.len as usize)
            {
                bulk::fetch(from, HEADER_LEN);
                bulk::fetch(from.wrapping_add(HEADER_LEN), first.len as usize);
            }
        }
        for chain in &self.chains[..n] {
            let buffers = pieces(&self.buffers, chain);
            match incoming(self.window, buffers, &mut offload.pieces, offload.receive) {
                Some(frame) => receive(&frame),
                None => self.dropped += 1,
            }
        }
        self.from_peer.ring.put_read(&self.chains[..n]);
        self.received();
        Ok(n)
    }
}

/// The frame in a chain, with what its header says; `None` where it is none, or where that makes no sense.
#[inline(always)]
fn incoming<'a>(
    window: Linear,
    buffers: &[Buffer],
    parts: &'a mut [Piece],
    allowed: Offloads,
) -> Option<Frame<'a>> {
    let mut count = 0;
    for buffer in buffers.iter().filter(|buffer| !buffer.device_writes) {
        let len = buffer.len as usize;
        let ptr = window.ptr(buffer.addr, len)?;
        *parts.get_mut(count)? = Piece { ptr, len };
        count += 1;
    }
    let parts = parts.get_mut(..count)?;
    let mut bytes = [0; HEADER_LEN];
    let whole = walk(parts.iter().copied(), 0, HEADER_LEN, |part, at| {
        // SAFETY: the part is in the window, and `at + part.len` does not exceed the header's length.
        unsafe { bulk::copy(bytes.as_mut_ptr().add(at), part.ptr, part.len) };
        true
    });
    let frame = strip(parts, HEADER_LEN);
    let header = allowed.check_segment(&Header::decode(bytes), crate::pieces::total(frame))?;
    // SAFETY: the pieces are in the window, which stays.
    unsafe { Frame::in_pieces(frame, header) }.filter(|_| whole)
}
