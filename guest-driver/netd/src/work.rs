//! What becomes of the peer's frames.

use std::io;
use std::os::fd::BorrowedFd;

use bare_metal::frame::{EVERY_BYTE, End, Format, Kind, Seen};
use guest_driver::port::{self, MAX_FRAME, MAX_LARGE_FRAME, Offloads};
use guest_driver::{Frame, Port, Slot};
use virtqueue::net::{HDR_F_NEEDS_CSUM, HDR_GSO_NONE, HEADER_LEN, Header};

use crate::stats::{Checked, Stats};
use crate::tap::Nic;

/// Frames that one turn moves in a direction, at most.
pub const BATCH: usize = 32;
/// Room for a packet, and a byte that shows that one was longer.
const PACKET: usize = HEADER_LEN + MAX_LARGE_FRAME + 1;
/// An Ethernet header, and a VLAN tag, which the MTU does not count either.
const ETHERNET: usize = 14 + 4;

/// Why a turn could not be finished.
#[derive(Debug)]
pub enum Stop {
    /// The port is of no use any more.
    Port(port::Error),
    /// The interface is gone.
    Nic(io::Error),
}

impl From<port::Error> for Stop {
    fn from(error: port::Error) -> Self {
        Self::Port(error)
    }
}

/// What work waits for, when it found nothing to do.
#[derive(Debug)]
pub struct Wants<'a> {
    /// Frames from the peer.
    pub frames: bool,
    /// Room in the peer's ring.
    pub room: bool,
    /// Something to read.
    pub fd: Option<BorrowedFd<'a>>,
}

/// Work on a port.
pub trait Work {
    /// Does a bounded piece of it; returns whether anything moved.
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop>;
    /// What it waits for.
    fn wants(&self) -> Wants<'_>;
    /// The peer's rings are there, or are gone.
    fn link(&mut self, up: bool, stats: &mut Stats);
    /// The peer, with this Ethernet address, has moved here from somewhere else.
    fn announce(&mut self, address: [u8; 6]) {
        let _ = address;
    }
    /// Looks after things that change slowly; called about once a second.
    fn refresh(&mut self) {}
    /// What the peer may leave to it, and what it would leave to the peer, as feature bits.
    fn offloads(&self) -> u64 {
        0
    }
    /// Whether nothing is left to do.
    fn done(&self, stats: &Stats) -> bool;
}

/// A packet that shows switches where the address is: a RARP request (RFC 903) for itself, to everybody.
fn rarp(address: [u8; 6]) -> [u8; HEADER_LEN + 60] {
    // Hardware type Ethernet, protocol type IPv4, their lengths, "request reverse".
    const OPERATION: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    const ANY: [u8; 4] = [0; 4];
    let mut packet = [0; HEADER_LEN + 60];
    let fields: [&[u8]; 8] = [
        &[0xff; 6],
        &address,
        &[0x80, 0x35],
        &OPERATION,
        &address,
        &ANY,
        &address,
        &ANY,
    ];
    let mut rest = &mut packet[HEADER_LEN..];
    for field in fields {
        if let Some((to, behind)) = rest.split_at_mut_checked(field.len()) {
            to.copy_from_slice(field);
            rest = behind;
        } else {
            break;
        }
    }
    packet
}

/// Packets on their way.
struct Queue {
    packets: Box<[[u8; PACKET]]>,
    /// Of each, the length of its frame, and what is left to the receiver.
    frames: [(usize, Header); BATCH],
    head: usize,
    tail: usize,
}

impl Queue {
    fn new() -> Self {
        Self {
            packets: vec![[0; PACKET]; BATCH].into_boxed_slice(),
            frames: [(0, Header::NONE); BATCH],
            head: 0,
            tail: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Room for one more packet; only for a queue that was emptied since it was full.
    fn room(&mut self) -> Option<&mut [u8; PACKET]> {
        if self.is_empty() {
            (self.head, self.tail) = (0, 0);
        }
        self.packets.get_mut(self.tail)
    }

    /// The packet in [`Queue::room`] has a frame of `len` bytes, and a header that has been checked.
    fn push(&mut self, len: usize, header: Header) {
        let at = self.tail;
        if let (Some(slot), Some(packet)) = (self.frames.get_mut(at), self.packets.get_mut(at))
            && let Some(to) = packet.first_chunk_mut()
        {
            *to = header.encode();
            *slot = (len, header);
            self.tail += 1;
        }
    }

    /// Takes the packet that waited longest, and says how long its frame is.
    fn pop(&mut self) -> Option<(&[u8], usize)> {
        let at = self.head;
        let (len, _) = *self.frames.get(at..self.tail)?.first()?;
        self.head += 1;
        Some((self.packets.get(at)?.get(..HEADER_LEN + len)?, len))
    }

    /// Throws away what is in it; returns how many that were.
    fn clear(&mut self) -> u64 {
        let waiting = self.tail - self.head;
        (self.head, self.tail) = (0, 0);
        waiting as u64
    }

    /// Sends as much as there is room for, frames of one length and with one header at a time. Returns whether any went.
    fn send<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, port::Error> {
        let before = self.head;
        while let Some((&alike, rest)) = self
            .frames
            .get(self.head..self.tail)
            .and_then(<[(usize, Header)]>::split_first)
        {
            let (len, header) = alike;
            let run = 1 + rest.iter().take_while(|&&next| next == alike).count();
            let packets = self.packets.get(self.head..).unwrap_or(&[]);
            let build = |i: usize, slot: &mut Slot| {
                let frame = packets
                    .get(i)
                    .and_then(|p| p.get(HEADER_LEN..HEADER_LEN + len));
                slot.write(0, frame.unwrap_or(&[]));
            };
            let sent = if header == Header::NONE {
                port.tx_burst(run, len, build)?
            } else {
                port.tx_offloaded(&header, run, len, build)?
            };
            self.head += sent;
            for _ in 0..sent {
                stats.to_peer.add(len);
            }
            if sent < run {
                break;
            }
        }
        Ok(self.head > before)
    }
}

/// The peer's frames go to an interface, and the interface's to the peer.
pub struct Bridge<N> {
    nic: N,
    queue: Queue,
    /// Packets on their way to the interface.
    arrived: Queue,
    /// The longest frame that the interface takes as it is.
    longest: usize,
    /// What the interface was told that it may leave to the peer.
    offloads: Offloads,
    count: Option<u64>,
}

impl<N: Nic> Bridge<N> {
    /// A bridge that is done after `count` frames, both directions together.
    pub fn new(nic: N, count: Option<u64>) -> Self {
        let mut bridge = Self {
            nic,
            queue: Queue::new(),
            arrived: Queue::new(),
            longest: MAX_FRAME,
            offloads: Offloads::default(),
            count,
        };
        bridge.refresh();
        bridge
    }

    /// Lets the interface leave to the peer what that takes.
    fn follow(&mut self, offloads: Offloads) {
        if self.offloads != offloads {
            self.offloads = offloads;
            self.nic.set_offloads(offloads);
        }
    }

    /// Hands what has arrived to the interface.
    fn deliver(&mut self, stats: &mut Stats) -> Result<(), Stop> {
        while let Some((packet, len)) = self.arrived.pop() {
            match self.nic.write(packet) {
                Ok(()) => stats.from_peer.add(len),
                Err(error) if is_gone(&error) => return Err(Stop::Nic(error)),
                Err(_) => stats.dropped.refused += 1,
            }
        }
        Ok(())
    }

    /// Takes up to a batch of packets from the interface.
    fn fill(&mut self, stats: &mut Stats) -> Result<bool, Stop> {
        let mut any = false;
        for _ in 0..BATCH {
            let Some(packet) = self.queue.room() else {
                break;
            };
            let Some(len) = self.nic.read(packet).map_err(Stop::Nic)? else {
                break;
            };
            any = true;
            let Some((header, _)) = packet.split_first_chunk::<HEADER_LEN>() else {
                break;
            };
            let header = Header::decode(*header);
            let offload = header.flags & HDR_F_NEEDS_CSUM != 0 || header.gso_type != HDR_GSO_NONE;
            match len.checked_sub(HEADER_LEN) {
                None | Some(0) => stats.dropped.bad_header += 1,
                // What came before the interface was told of this peer may ask for what it does not take.
                Some(len) if offload => match self.offloads.check_segment(&header, len) {
                    Some(header) => self.queue.push(len, header),
                    None => stats.dropped.bad_header += 1,
                },
                Some(len) if len > MAX_FRAME => stats.dropped.too_long += 1,
                Some(len) => self.queue.push(len, Header::NONE),
            }
        }
        Ok(any)
    }
}

impl<N: Nic> Work for Bridge<N> {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        self.follow(port.offloads());
        let (arrived, longest) = (&mut self.arrived, self.longest);
        let received = port.rx_burst(BATCH, |frame| {
            let len = frame.len();
            let header = frame.header().unwrap_or(Header::NONE);
            let whole = header.gso_type == HDR_GSO_NONE;
            let packet = match arrived.room() {
                Some(packet) if len <= longest || !whole => packet,
                _ => return stats.dropped.too_long += 1,
            };
            if packet
                .get_mut(HEADER_LEN..HEADER_LEN + len)
                .is_some_and(|to| frame.read(0, to))
            {
                arrived.push(len, header);
            }
        })?;
        if received > 0 && !port.whole() {
            stats.dropped.torn += self.arrived.clear();
        }
        self.deliver(stats)?;
        let read = self.queue.is_empty() && self.fill(stats)?;
        let sent = self.queue.send(port, stats)?;
        Ok(received > 0 || read || sent)
    }

    fn wants(&self) -> Wants<'_> {
        let waiting = !self.queue.is_empty();
        Wants {
            frames: true,
            room: waiting,
            // A peer that takes nothing leaves the interface's packets where they are.
            fd: (!waiting).then(|| self.nic.fd()),
        }
    }

    fn link(&mut self, up: bool, stats: &mut Stats) {
        stats.dropped.no_peer += self.queue.clear();
        self.follow(Offloads::default());
        self.nic.set_carrier(up);
        self.refresh();
    }

    fn offloads(&self) -> u64 {
        self.nic.offloads()
    }

    fn announce(&mut self, address: [u8; 6]) {
        // Lost like any other frame where it cannot be had now; the peer's first own frame does the same.
        let _ = self.nic.write(&rarp(address));
    }

    fn refresh(&mut self) {
        if let Some(mtu) = self.nic.mtu() {
            self.longest = (mtu + ETHERNET).min(MAX_FRAME);
        }
    }

    fn done(&self, stats: &Stats) -> bool {
        let moved = stats.from_peer.frames + stats.to_peer.frames;
        self.count.is_some_and(|count| moved >= count)
    }
}

/// Whether an interface that refuses a packet will refuse all others too.
fn is_gone(error: &io::Error) -> bool {
    [libc::EBADF, libc::EBADFD, libc::ENODEV]
        .into_iter()
        .any(|gone| error.raw_os_error() == Some(gone))
}

/// Sends every frame back, its Ethernet addresses exchanged.
pub struct MacSwap {
    queue: Queue,
    count: Option<u64>,
}

impl MacSwap {
    /// Done after `count` frames have gone back.
    #[must_use]
    pub fn new(count: Option<u64>) -> Self {
        Self {
            queue: Queue::new(),
            count,
        }
    }
}

impl Work for MacSwap {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        let mut received = 0;
        if self.queue.is_empty() {
            let queue = &mut self.queue;
            received = port.rx_burst(BATCH, |frame| {
                stats.from_peer.add(frame.len());
                let packet = queue
                    .room()
                    .and_then(|room| room.get_mut(HEADER_LEN..HEADER_LEN + frame.len()));
                let Some(to) = packet else {
                    return;
                };
                if frame.read(0, to) {
                    if let Some((target, source)) = to
                        .get_mut(..12)
                        .and_then(|macs| macs.split_at_mut_checked(6))
                    {
                        target.swap_with_slice(source);
                    }
                    queue.push(frame.len(), Header::NONE);
                }
            })?;
        }
        let sent = self.queue.send(port, stats)?;
        Ok(received > 0 || sent)
    }

    fn wants(&self) -> Wants<'_> {
        let waiting = !self.queue.is_empty();
        Wants {
            frames: !waiting,
            room: waiting,
            fd: None,
        }
    }

    fn link(&mut self, _up: bool, stats: &mut Stats) {
        stats.dropped.no_peer += self.queue.clear();
    }

    fn done(&self, stats: &Stats) -> bool {
        self.count
            .is_some_and(|count| stats.to_peer.frames >= count)
    }
}

/// Takes every frame and looks at none.
#[derive(Debug)]
pub struct Drop {
    count: Option<u64>,
}

impl Drop {
    /// Done after `count` frames.
    #[must_use]
    pub fn new(count: Option<u64>) -> Self {
        Self { count }
    }
}

impl Work for Drop {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        let received = port.rx_burst(BATCH, |frame| stats.from_peer.add(frame.len()))?;
        Ok(received > 0)
    }

    fn wants(&self) -> Wants<'_> {
        ONLY_FRAMES
    }

    fn link(&mut self, _up: bool, _stats: &mut Stats) {}

    fn done(&self, stats: &Stats) -> bool {
        self.count
            .is_some_and(|count| stats.from_peer.frames >= count)
    }
}

const ONLY_FRAMES: Wants<'static> = Wants {
    frames: true,
    room: false,
    fd: None,
};

/// Sends numbered frames of one length, as the bare-metal guest's workloads do (docs/bare-metal.md); with a count, one more says that it was the last.
#[derive(Debug)]
pub struct Source {
    format: Format,
    next: u64,
    count: Option<u64>,
    ended: bool,
}

impl Source {
    /// Frames of `len` bytes; done after `count`.
    #[must_use]
    pub fn new(len: usize, count: Option<u64>) -> Self {
        Self {
            format: Format::new(End::BackEnd, len, 0),
            next: 0,
            count,
            ended: false,
        }
    }
}

impl Work for Source {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        let (format, next) = (&self.format, self.next);
        let left = self
            .count
            .map_or(u64::MAX, |count| count.saturating_sub(next));
        let (kind, batch) = match usize::try_from(left).unwrap_or(BATCH).min(BATCH) {
            0 => (Kind::End, 1),
            batch => (Kind::Data, batch),
        };
        if self.ended {
            return Ok(false);
        }
        let sent = port.tx_burst(batch, format.len(), |i, slot| {
            format.build::<EVERY_BYTE>(slot, kind, next + i as u64);
        })?;
        if kind == Kind::End {
            self.ended = sent == 1;
        } else {
            self.next += sent as u64;
            for _ in 0..sent {
                stats.to_peer.add(format.len());
            }
        }
        Ok(sent > 0)
    }

    fn wants(&self) -> Wants<'_> {
        Wants {
            frames: false,
            room: true,
            fd: None,
        }
    }

    fn link(&mut self, _up: bool, _stats: &mut Stats) {}

    fn done(&self, _stats: &Stats) -> bool {
        self.ended
    }
}

/// Takes the frames of a source and checks every byte of them, and their order.
#[derive(Debug)]
pub struct Sink {
    format: Format,
    next: u64,
    count: Option<u64>,
    /// The source has said that there will be no more.
    ended: bool,
}

impl Sink {
    /// Frames of `len` bytes; done after `count` right ones, or after the one that says that it is the last.
    #[must_use]
    pub fn new(len: usize, count: Option<u64>) -> Self {
        Self {
            format: Format::new(End::FrontEnd, len, 0),
            next: 0,
            count,
            ended: false,
        }
    }

    fn check(&mut self, frame: &Frame, checked: &mut Checked) {
        match self.format.check::<EVERY_BYTE>(frame) {
            Seen::Good(Kind::Data, number) => {
                checked.verified += 1;
                checked.out_of_sequence += u64::from(number != self.next);
                self.next = number.wrapping_add(1);
            }
            Seen::Good(Kind::End, total) => {
                checked.out_of_sequence += u64::from(total != self.next);
                self.ended = true;
            }
            Seen::Stale => checked.other += 1,
            Seen::Corrupt => checked.corrupted += 1,
        }
    }
}

impl Work for Sink {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        let checked = stats.checked.get_or_insert_default();
        let before = (self.next, self.ended, *checked);
        let mut flow = stats.from_peer;
        let received = port.rx_burst(BATCH, |frame| {
            flow.add(frame.len());
            self.check(frame, checked);
        })?;
        if received > 0 && !port.whole() {
            (self.next, self.ended, *checked) = before;
            stats.dropped.torn += flow.frames - stats.from_peer.frames;
        } else {
            stats.from_peer = flow;
        }
        Ok(received > 0)
    }

    fn wants(&self) -> Wants<'_> {
        ONLY_FRAMES
    }

    fn link(&mut self, _up: bool, _stats: &mut Stats) {}

    fn done(&self, stats: &Stats) -> bool {
        let verified = stats.checked.map_or(0, |checked| checked.verified);
        self.ended || self.count.is_some_and(|count| verified >= count)
    }
}

#[cfg(test)]
mod tests;
