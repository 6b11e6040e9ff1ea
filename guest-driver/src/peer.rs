//! The back-end's data path: the device side of the front-end's rings, reached through the window.
//!
//! Unsafe code: buffers are reached by the front-end's addresses; each was checked against the window by the ring code and again, with the
//! length that is used, by [`Linear::ptr`].
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec;

use virtqueue::linear::Linear;
use virtqueue::net::HEADER_LEN;
use virtqueue::{Buffer, Chain, DeviceRing};

use crate::bulk;
use crate::port::{Frame, MAX_BURST, MAX_FRAME, Port, Slot};
use crate::virtio_pci::Notify;

/// Most buffers that a burst's chains can have.
const MAX_BUFFERS: usize = 2 * MAX_BURST;
const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;

/// What stands before a frame: no offload, one buffer (VIRTIO 1.3, section 5.1.6.1).
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[10] = 1;
    header
};

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
    dropped: u64,
}

impl<V: DeviceRing, N: Notify> PeerPort<V, N> {
    /// A data path over the front-end's rings; the addresses in them are offsets of `window`.
    pub fn new(window: Linear, to_peer: Vring<V, N>, from_peer: Vring<V, N>) -> Self {
        let mut port = Self {
            window,
            to_peer,
            from_peer,
            chains: [Chain::default(); MAX_BURST],
            buffers: [Buffer::default(); MAX_BUFFERS],
            scratch: vec![0; MAX_PACKET].into_boxed_slice(),
            dropped: 0,
        };
        port.disarm();
        port
    }

    /// Packets that did not fit their buffers, or were no frames.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
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

/// Copies a packet into the pieces of a chain; `false`, and nothing written, where they are too short.
fn scatter(window: Linear, pieces: &[Buffer], mut packet: &[u8]) -> bool {
    let room: usize = pieces
        .iter()
        .filter(|piece| piece.device_writes)
        .map(|piece| piece.len as usize)
        .sum();
    if room < packet.len() {
        return false;
    }
    for piece in pieces.iter().filter(|piece| piece.device_writes) {
        let (now, rest) = packet.split_at(packet.len().min(piece.len as usize));
        let Some(to) = window.ptr(piece.addr, now.len()) else {
            return false;
        };
        // SAFETY: `ptr` checked the range; `now` is our own memory.
        unsafe { bulk::copy(to, now.as_ptr(), now.len()) };
        packet = rest;
    }
    packet.is_empty()
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
    ) -> Result<usize, virtqueue::Error> {
        let len = len.min(MAX_FRAME);
        let packet = HEADER_LEN + len;
        let ring = &mut self.to_peer.ring;
        let n = ring.get(&mut self.chains[..count.min(MAX_BURST)], &mut self.buffers)?;
        if n == 0 {
            return Ok(0);
        }
        let mut sent = 0;
        for chain in &self.chains[..n] {
            let first = usize::from(chain.first);
            let pieces = self
                .buffers
                .get(first..first + usize::from(chain.count))
                .unwrap_or(&[]);
            let written = if let [whole] = pieces
                && let Some(to) = place(self.window, *whole, packet, true)
            {
                // SAFETY: `place` checked that header and frame fit where `to` points.
                let mut slot = unsafe {
                    bulk::copy(to, HEADER.as_ptr(), HEADER_LEN);
                    Slot::new(to.add(HEADER_LEN), len)
                };
                build(sent, &mut slot);
                true
            } else {
                let (header, frame) = self.scratch.split_at_mut(HEADER_LEN);
                header.copy_from_slice(&HEADER);
                // SAFETY: the scratch is ours, and holds the longest frame.
                build(sent, &mut unsafe { Slot::new(frame.as_mut_ptr(), len) });
                scatter(self.window, pieces, &self.scratch[..packet])
            };
            self.dropped += u64::from(!written);
            ring.put(
                chain.id,
                if written {
                    u32::try_from(packet).unwrap_or(0)
                } else {
                    0
                },
            );
            sent += 1;
        }
        if ring.publish() {
            self.to_peer.call.notify();
        }
        Ok(sent)
    }

    #[inline(always)]
    fn rx_burst(
        &mut self,
        count: usize,
        mut receive: impl FnMut(&Frame),
    ) -> Result<usize, virtqueue::Error> {
        let ring = &mut self.from_peer.ring;
        let n = ring.get(&mut self.chains[..count.min(MAX_BURST)], &mut self.buffers)?;
        if n == 0 {
            return Ok(0);
        }
        for chain in &self.chains[..n] {
            let first = usize::from(chain.first);
            let pieces = self
                .buffers
                .get(first..first + usize::from(chain.count))
                .unwrap_or(&[]);
            let packet = if let [whole] = pieces
                && whole.len as usize <= MAX_PACKET
            {
                place(self.window, *whole, whole.len as usize, false)
                    .map(|from| (from.cast_const(), whole.len as usize))
            } else {
                gather(self.window, pieces, &mut self.scratch)
                    .map(|len| (self.scratch.as_ptr(), len))
            };
            match packet {
                Some((from, len)) if len > HEADER_LEN => {
                    // SAFETY: `len` bytes are there, and more than a header.
                    receive(&unsafe { Frame::new(from.add(HEADER_LEN), len - HEADER_LEN) });
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

    fn drained(&mut self) -> Result<bool, virtqueue::Error> {
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
