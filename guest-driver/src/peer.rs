//! The back-end's data path: the device side of the front-end's rings, reached through the window.
//!
//! Unsafe code: buffers are reached by the front-end's addresses; each was checked against the window by the ring code and again, with the
//! length that is used, by [`Linear::ptr`].
#![allow(unsafe_code)]

mod offload;

use alloc::boxed::Box;
use alloc::vec;

use virtqueue::linear::Linear;
use virtqueue::net::{F_MRG_RXBUF, HEADER_LEN, Header, Offloads};
use virtqueue::{Buffer, Chain, DeviceRing};

use crate::bulk;
use crate::port::{Error, Frame, MAX_BURST, MAX_FRAME, Port, Slot};
use crate::virtio_pci::Notify;

/// Most buffers that a burst's chains can have.
const MAX_BUFFERS: usize = 2 * MAX_BURST;
const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;

/// Where le16 `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// What stands before a frame: no offload, one buffer (VIRTIO 1.3, section 5.1.6).
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[NUM_BUFFERS] = 1;
    header
};
/// What reads where nothing may be read. (No device writes such a header.)
const ONES: [u8; HEADER_LEN] = [0xFF; HEADER_LEN];

/// One of the front-end's rings and its call.
#[derive(Debug)]
pub struct Vring<V, N> {
    /// The device side of the ring.
    pub ring: V,
    /// Interrupts the front-end.
    pub call: N,
    /// Whether the front-end's kicks arrive as interrupts; otherwise the ring has to be polled.
    pub kicks: bool,
}

/// The data path of a back-end for virtio-net.
#[derive(Debug)]
pub struct PeerPort<V, N> {
    window: Linear,
    /// The front-end's receive ring (vring 0), into which we send.
    to_peer: Vring<V, N>,
    /// The front-end's transmit ring (vring 1), from which we receive.
    from_peer: Vring<V, N>,
    chains: [Chain; MAX_BURST],
    buffers: [Buffer; MAX_BUFFERS],
    /// A packet whose buffers are in pieces is put together here.
    scratch: Box<[u8]>,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated: a frame may be spread over several chains.
    mergeable: bool,
    /// Frames were spread in the last burst: it takes more chains than frames.
    spreading: bool,
    /// The front-end has its receive buffers mapped for writing only: looking at them is in vain, slow, and told to its guest as a fault.
    unreadable: bool,
    dropped: u64,
    /// Where checksums or segmentation were negotiated, all frames go another way.
    offload: Option<Box<offload::Offload>>,
}

impl<V: DeviceRing, N: Notify> PeerPort<V, N> {
    /// A data path over the front-end's rings; the addresses in them are offsets of `window`. Of the `features` that were negotiated, those count that say
    /// what frames and their headers are like.
    pub fn new(
        window: Linear,
        features: u64,
        to_peer: Vring<V, N>,
        from_peer: Vring<V, N>,
    ) -> Self {
        let mut port = Self {
            window,
            to_peer,
            from_peer,
            chains: [Chain::default(); MAX_BURST],
            buffers: [Buffer::default(); MAX_BUFFERS],
            scratch: vec![0; MAX_PACKET].into_boxed_slice(),
            mergeable: features & F_MRG_RXBUF != 0,
            spreading: false,
            unreadable: false,
            dropped: 0,
            offload: offload::Offload::new(features),
        };
        port.disarm();
        port
    }

    /// Packets that did not fit their buffers, or were no frames.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Puts a frame into chains that are in pieces or too short for it, from `chains[at]` on. Returns how many it took: none where there are
    /// not enough chains.
    #[cold]
    fn spread(
        &mut self,
        at: usize,
        taken: usize,
        len: usize,
        build: impl FnOnce(&mut Slot),
    ) -> usize {
        let packet = HEADER_LEN + len;
        let Some(chains) = self.chains.get(at..taken) else {
            return 0;
        };
        let pieces = |chain: &Chain| pieces(&self.buffers, chain);
        let mut total = 0;
        let needed = chains.iter().position(|chain| {
            total += room(pieces(chain));
            !self.mergeable || total >= packet
        });
        let Some(chains) = needed.and_then(|last| chains.get(..=last)) else {
            return 0;
        };
        let fits = total >= packet;
        if let (Some(scratch), true) = (self.scratch.get_mut(..packet), fits) {
            let (header, frame) = scratch.split_at_mut(HEADER_LEN);
            header.copy_from_slice(&HEADER);
            let count = u16::try_from(chains.len()).unwrap_or(1);
            header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
            // SAFETY: `frame` is ours, and holds `len` bytes.
            build(&mut unsafe { Slot::new(frame.as_mut_ptr(), len) });
            let mut rest = &*scratch;
            for chain in chains {
                let left = scatter(self.window, pieces(chain), rest);
                let written = u32::try_from(rest.len() - left.len()).unwrap_or(0);
                self.to_peer.ring.put(chain.id, written);
                rest = left;
            }
        } else {
            // Too short for any frame of this length, now and ever: back it goes, and the frame is lost.
            let mut nowhere = [0; MAX_FRAME];
            // SAFETY: `nowhere` is ours, and holds the longest frame.
            build(&mut unsafe { Slot::new(nowhere.as_mut_ptr(), len) });
            for chain in chains {
                self.to_peer.ring.put(chain.id, 0);
            }
            self.dropped += 1;
        }
        chains.len()
    }

    /// Where the two rings are (VHOST_USER_GET_VRING_BASE).
    #[must_use]
    pub fn bases(&self) -> [u32; 2] {
        [self.to_peer.ring.base(), self.from_peer.ring.base()]
    }
}

/// Where `len` bytes are that a buffer of the peer must hold.
#[inline(always)]
fn place(window: Linear, buffer: Buffer, len: usize, device_writes: bool) -> Option<*mut u8> {
    let fits = buffer.len as usize >= len && buffer.device_writes == device_writes;
    if fits {
        window.ptr(buffer.addr, len)
    } else {
        None
    }
}

/// A frame that lies in one buffer behind `skip` bytes; `None` where it is none.
#[inline(always)]
fn in_place(window: Linear, buffer: Buffer, skip: usize) -> Option<(*const u8, usize)> {
    let total = buffer.len as usize;
    let len = total.checked_sub(skip).filter(|&len| len <= MAX_FRAME)?;
    let from = place(window, buffer, total, false)?;
    Some((from.wrapping_add(skip).cast_const(), len))
}

/// The buffers of a chain.
#[inline(always)]
fn pieces<'a>(buffers: &'a [Buffer], chain: &Chain) -> &'a [Buffer] {
    let first = usize::from(chain.first);
    let end = first + usize::from(chain.count);
    buffers.get(first..end).unwrap_or(&[])
}

/// How many bytes the device may write into a chain.
fn room(pieces: &[Buffer]) -> usize {
    let writable = pieces.iter().filter(|piece| piece.device_writes);
    writable.map(|piece| piece.len as usize).sum()
}

/// Copies into the pieces of a chain; returns what did not fit.
fn scatter<'a>(window: Linear, pieces: &[Buffer], mut packet: &'a [u8]) -> &'a [u8] {
    for piece in pieces.iter().filter(|piece| piece.device_writes) {
        let (now, rest) = packet.split_at(packet.len().min(piece.len as usize));
        // The ring code checked the whole piece already.
        if let Some(to) = window.ptr(piece.addr, now.len()) {
            // SAFETY: `ptr` checked the range; `now` is our own memory.
            unsafe { bulk::copy(to, now.as_ptr(), now.len()) };
        }
        packet = rest;
    }
    packet
}

/// Copies a packet out of the pieces of a chain; `None` where it is longer than `packet`.
fn gather(window: Linear, pieces: &[Buffer], packet: &mut [u8]) -> Option<usize> {
    let mut at = 0usize;
    for piece in pieces.iter().filter(|piece| !piece.device_writes) {
        let len = piece.len as usize;
        let to = packet.get_mut(at..at.checked_add(len)?)?;
        let from = window.ptr(piece.addr, len)?;
        // SAFETY: `ptr` checked the range; `to` is our own memory.
        unsafe { bulk::copy(to.as_mut_ptr(), from, len) };
        at += len;
    }
    Some(at)
}

impl<V: DeviceRing, N: Notify> Port for PeerPort<V, N> {
    #[inline(always)]
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let (len, count) = (len.min(MAX_FRAME), count.min(MAX_BURST));
        if self.offload.is_some() {
            return self.tx_with_header(Header::NONE, count, len, &mut build);
        }
        let packet = HEADER_LEN + len;
        let written = u32::try_from(packet).unwrap_or(0);
        let mut wanted = if self.spreading { MAX_BURST } else { count };
        self.spreading = false;
        let mut sent = 0;
        loop {
            let ring = &mut self.to_peer.ring;
            let taken = ring.get(&mut self.chains[..wanted], &mut self.buffers)?;
            for chain in &self.chains[..taken] {
                if let [whole] = pieces(&self.buffers, chain)
                    && let Some(to) = place(self.window, *whole, packet, true)
                {
                    bulk::fetch(to, HEADER_LEN);
                    bulk::fetch_to_write(to.wrapping_add(HEADER_LEN), len);
                }
            }
            let mut at = 0;
            while at < taken && sent < count {
                let chain = self.chains[at];
                if let [whole] = pieces(&self.buffers, &chain)
                    && let Some(to) = place(self.window, *whole, packet, true)
                {
                    // A header that is there already is left alone: its line need not travel.
                    // SAFETY: `place` checked that header and frame fit where `to` points.
                    let mut slot = unsafe {
                        if self.unreadable || !bulk::equal(to, HEADER.as_ptr(), HEADER_LEN) {
                            self.unreadable =
                                self.unreadable || bulk::equal(to, ONES.as_ptr(), HEADER_LEN);
                            bulk::copy(to, HEADER.as_ptr(), HEADER_LEN);
                        }
                        Slot::new(to.add(HEADER_LEN), len)
                    };
                    build(sent, &mut slot);
                    self.to_peer.ring.put(chain.id, written);
                    at += 1;
                } else {
                    let used = self.spread(at, taken, len, |slot| build(sent, slot));
                    self.spreading = self.mergeable;
                    if used == 0 {
                        break;
                    }
                    at += used;
                }
                sent += 1;
            }
            if at < taken {
                self.to_peer.ring.unget(taken - at);
            }
            // A chain a frame was not enough: once more, with all that there are.
            if sent == count || !self.spreading || wanted == MAX_BURST {
                break;
            }
            wanted = MAX_BURST;
        }
        if self.to_peer.ring.publish() {
            self.to_peer.call.notify();
        }
        Ok(sent)
    }

    fn offloads(&self) -> Offloads {
        let offload = self.offload.as_ref();
        offload.map_or(Offloads::default(), |offload| offload.send)
    }

    fn tx_offloaded(
        &mut self,
        header: &Header,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let header = self.offloads().check_segment(header, len);
        self.tx_with_header(header.ok_or(Error::Offload)?, count, len, &mut build)
    }

    #[inline(always)]
    fn rx_burst(&mut self, count: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        if self.offload.is_some() {
            return self.rx_with_headers(count, &mut receive);
        }
        let ring = &mut self.from_peer.ring;
        let n = ring.get(&mut self.chains[..count.min(MAX_BURST)], &mut self.buffers)?;
        if n == 0 {
            return Ok(0);
        }
        for chain in &self.chains[..n] {
            if let [whole] = *pieces(&self.buffers, chain)
                && let Some((from, len)) = in_place(self.window, whole, HEADER_LEN)
            {
                bulk::fetch(from, len);
            }
        }
        for chain in &self.chains[..n] {
            let pieces = pieces(&self.buffers, chain);
            let frame = match *pieces {
                [whole] => in_place(self.window, whole, HEADER_LEN),
                [header, frame] if header.len as usize == HEADER_LEN => {
                    in_place(self.window, frame, 0)
                }
                _ => gather(self.window, pieces, &mut self.scratch)
                    .and_then(|len| self.scratch.get(HEADER_LEN..len))
                    .map(|frame| (frame.as_ptr(), frame.len())),
            };
            match frame {
                Some((from, len)) if len > 0 => {
                    // SAFETY: `len` bytes are there, in the window or in our own memory.
                    receive(&unsafe { Frame::new(from, len) });
                }
                _ => self.dropped += 1,
            }
        }
        ring.put_read(&self.chains[..n]);
        if ring.publish() {
            self.from_peer.call.notify();
        }
        Ok(n)
    }

    fn whole(&self) -> bool {
        self.from_peer.ring.present()
    }

    fn drained(&mut self) -> Result<bool, Error> {
        Ok(true) // what was sent lies in the front-end's own memory
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        // A ring whose kicks do not arrive has to be polled: say that there is something to look at.
        let rx = rx && (self.from_peer.ring.enable_kicks() || !self.from_peer.kicks);
        let tx = tx && (self.to_peer.ring.enable_kicks() || !self.to_peer.kicks);
        rx || tx
    }

    fn disarm(&mut self) {
        self.from_peer.ring.disable_kicks();
        self.to_peer.ring.disable_kicks();
    }
}
