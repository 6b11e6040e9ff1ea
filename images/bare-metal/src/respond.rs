//! The responder: a small host on the link. It answers ARP and pings, and serves three ports of TCP (docs/bare-metal.md), so that a peer whose
//! guest is somebody else's system has someone to talk to. The protocols are smoltcp's.
//!
//! A peer may leave checksums and segmentation to this host (VIRTIO 1.3, section 5.1.6.2). The checksum is completed, and then verified like any other; TCP takes a segment of any length.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use guest_driver::port::MAX_LARGE_FRAME;
use guest_driver::{Frame, Port, port};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address, Ipv4Cidr};

use virtqueue::net::{HDR_F_NEEDS_CSUM, HDR_GSO_NONE, Header};

use crate::record::{Outcome, Responded};
use crate::study::mix;
use crate::workload::{Link, SERVICE_EVERY, Stopped, pause};
use crate::{Address, Run};

/// Bytes of an Ethernet header.
const HEADER: usize = 14;
/// Longest frame: a header, and an IP packet of 1500 bytes.
const MTU: usize = HEADER + 1500;
/// Frames that wait for room in the ring before the protocols are held up.
const MAX_WAITING: usize = 64;
/// Connections at one time, for each service.
const CONNECTIONS: usize = 6;
/// Bytes of a connection's buffer in either direction.
const BUFFER: usize = 32 << 10;
/// A connection whose other end says nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest sleep.
const LONGEST_MS: u64 = 1000;
/// What a source sends where nothing else was asked for, in bytes.
pub const DEFAULT_SOURCE: u64 = 1 << 20;

/// What is done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// Sends back what comes.
    Echo,
    /// Takes what comes.
    Discard,
    /// Sends a pattern, then closes.
    Source,
}

impl Service {
    const ALL: [Self; 3] = [Self::Echo, Self::Discard, Self::Source];

    fn port(self) -> u16 {
        match self {
            Self::Echo => 7,
            Self::Discard => 9,
            Self::Source => 19,
        }
    }
}

/// Byte `at` of what a source sends: byte `at mod 8`, from the lowest on, of `mix(at / 8)`.
#[must_use]
pub fn pattern(at: u64) -> u8 {
    let [byte, ..] = (mix(at / 8) >> (8 * (at % 8))).to_le_bytes();
    byte
}

/// Frames on their way between the port and the protocols, whole, in memory of our own: nobody changes them any more.
#[derive(Debug, Default)]
struct Frames {
    arrived: VecDeque<Vec<u8>>,
    leaving: VecDeque<Vec<u8>>,
    counts: Responded,
}

impl Frames {
    fn take(&mut self, frame: &Frame) {
        self.counts.rx_frames += 1;
        let header = frame.header().unwrap_or(Header::NONE);
        let longest = if header.gso_type == HDR_GSO_NONE {
            MTU
        } else {
            MAX_LARGE_FRAME
        };
        if !(HEADER..=longest).contains(&frame.len()) {
            self.counts.dropped += 1;
            return;
        }
        let mut bytes = vec![0; frame.len()];
        if frame.read(0, &mut bytes) {
            self.counts.large += u64::from(bytes.len() > MTU);
            if header.flags & HDR_F_NEEDS_CSUM != 0 {
                self.counts.partial += 1;
                complete(&mut bytes, &header);
            }
            self.arrived.push_back(bytes);
        }
    }

    /// Sends what waits, as far as there is room.
    fn flush<P: Port>(&mut self, port: &mut P) -> Result<usize, port::Error> {
        let mut total = 0;
        while let Some(len) = self.leaving.front().map(Vec::len) {
            // A burst is of frames of one length.
            let alike = self.leaving.iter().take_while(|frame| frame.len() == len);
            let count = alike.count();
            let sent = port.tx_burst(count, len, |i, slot| {
                if let Some(frame) = self.leaving.get(i) {
                    slot.write(0, frame);
                }
            })?;
            self.leaving.drain(..sent.min(count));
            total += sent;
            if sent < count {
                break;
            }
        }
        self.counts.tx_frames += total as u64;
        Ok(total)
    }
}

/// Completes a checksum whose field has the sum over the pseudo-header (VIRTIO 1.3, section 5.1.6.2). The header has been checked against the frame.
fn complete(frame: &mut [u8], header: &Header) {
    let start = usize::from(header.csum_start);
    let field = start + usize::from(header.csum_offset);
    let sum = sum(frame.get(start..).unwrap_or(&[]));
    if let Some(field) = frame.get_mut(field..field + 2) {
        // Zero would mean that there is none, for UDP; for TCP, its other form is the same.
        let checksum = if sum == 0xffff { sum } else { !sum };
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The sum of 16-bit words in ones' complement (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let words = pairs
        .iter()
        .map(|&pair| u64::from(u16::from_be_bytes(pair)));
    let last = rest.iter().map(|&byte| u64::from(byte) << 8);
    let mut sum: u64 = words.chain(last).sum();
    while let (high @ 1.., low) = (sum >> 16, sum & 0xffff) {
        sum = high + low;
    }
    u16::try_from(sum).unwrap_or(0)
}

/// A frame for the protocols.
struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, look: F) -> R {
        look(&self.0)
    }
}

/// Room for a frame of theirs.
struct Room<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, build: F) -> R {
        let mut frame = vec![0; len];
        let result = build(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Frames {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Arrived, Room<'_>)> {
        if self.leaving.len() >= MAX_WAITING {
            return None;
        }
        let frame = self.arrived.pop_front()?;
        Some((Arrived(frame), Room(&mut self.leaving)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        (self.leaving.len() < MAX_WAITING).then_some(Room(&mut self.leaving))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// One socket and what it is for.
struct Served {
    handle: SocketHandle,
    service: Service,
    /// The connection that it has was counted.
    counted: bool,
    /// How much of the pattern was sent.
    sent: u64,
}

impl Served {
    /// Does what the service is; returns whether there may be something to send now.
    fn step(&mut self, socket: &mut tcp::Socket, length: u64, counts: &mut Responded) -> bool {
        if !socket.is_open() {
            self.counted = false;
            self.sent = 0;
            // It is closed, and the port is not 0: nothing that it could refuse.
            return socket.listen(self.service.port()).is_ok();
        }
        if !self.counted && socket.may_send() {
            self.counted = true;
            counts.connections += 1;
        }
        let (mut taken, mut given) = (0, 0);
        // Each turn empties a buffer or fills one; nothing arrives meanwhile.
        loop {
            let mut piece = [0; 2048];
            let room = match self.service {
                Service::Echo => piece
                    .len()
                    .min(socket.send_capacity() - socket.send_queue()),
                Service::Discard | Service::Source => piece.len(),
            };
            let Ok(got @ 1..) = socket.recv_slice(&mut piece[..room]) else {
                break;
            };
            taken += got;
            if self.service == Service::Echo {
                given += socket.send_slice(&piece[..got]).unwrap_or(0);
            }
        }
        let over = match self.service {
            Service::Source => {
                while self.sent < length && socket.can_send() {
                    let sent = socket.send(|room| {
                        let mut count = 0;
                        for (byte, at) in room.iter_mut().zip(self.sent..length) {
                            *byte = pattern(at);
                            count += 1;
                        }
                        (count, count)
                    });
                    let Ok(sent @ 1..) = sent else {
                        break;
                    };
                    self.sent += sent as u64;
                    given += sent;
                }
                self.sent == length
            }
            Service::Echo | Service::Discard => !socket.may_recv() && socket.recv_queue() == 0,
        };
        // Before a connection is there, nothing may be received either.
        let closing = over
            && matches!(
                socket.state(),
                tcp::State::Established | tcp::State::CloseWait
            );
        if closing {
            socket.close();
        }
        counts.rx_bytes += taken as u64;
        counts.tx_bytes += given as u64;
        closing || taken + given > 0
    }
}

/// The host: its protocols and its services.
struct Host {
    frames: Frames,
    interface: Interface,
    sockets: SocketSet<'static>,
    served: Vec<Served>,
    source: u64,
}

impl Host {
    /// `seed` is for what TCP wants hard to guess.
    fn new(address: Address, source: u64, seed: u64) -> Self {
        let mut frames = Frames::default();
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(address.mac)));
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut frames, Instant::ZERO);
        let [a, b, c, d] = address.ip;
        let network = Ipv4Cidr::new(Ipv4Address::new(a, b, c, d), address.prefix);
        interface.update_ip_addrs(|all| {
            // There is room for one.
            let _ = all.push(IpCidr::Ipv4(network));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut served = Vec::new();
        for service in Service::ALL {
            for _ in 0..CONNECTIONS {
                let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
                let mut socket = tcp::Socket::new(buffer(), buffer());
                socket.set_timeout(Some(SILENCE));
                socket.set_keep_alive(Some(SILENCE / 4));
                served.push(Served {
                    handle: sockets.add(socket),
                    service,
                    counted: false,
                    sent: 0,
                });
            }
        }
        let mut host = Self {
            frames,
            interface,
            sockets,
            served,
            source,
        };
        host.serve();
        host
    }

    /// Has every service look at its connections; returns whether there may be something to send now.
    fn serve(&mut self) -> bool {
        let mut more = false;
        for served in &mut self.served {
            let socket = self.sockets.get_mut::<tcp::Socket>(served.handle);
            more |= served.step(socket, self.source, &mut self.frames.counts);
        }
        more
    }

    /// Deals with what arrived and with what the time brought. Returns when that has to be done again at the latest.
    fn poll(&mut self, now: Instant) -> Option<Duration> {
        let changed = self
            .interface
            .poll(now, &mut self.frames, &mut self.sockets);
        if changed == PollResult::SocketStateChanged && self.serve() {
            self.interface
                .poll(now, &mut self.frames, &mut self.sockets);
        }
        self.interface.poll_delay(now, &self.sockets)
    }
}

/// Sleeps until frames arrive on any pair (`rx`), there is room to send on pair `tx`, or the clock shows `until`. Where there is no port any more, the
/// next turn says so.
fn wait<L: Link>(link: &mut L, pairs: usize, rx: bool, tx: Option<usize>, until: u64) {
    let mut ready = link.port().is_none();
    for pair in 0..pairs {
        let port = link.pair(pair);
        ready |= port.is_some_and(|port| port.arm(rx, tx == Some(pair)));
    }
    if !ready {
        link.sleep(until);
        link.service();
    }
    for pair in 0..pairs {
        if let Some(port) = link.pair(pair) {
            port.disarm();
        }
    }
}

/// Answers what comes on any of `run.queues` pairs, until the peer goes or a command waits. One pair after the other has its turn; what is sent
/// goes out on the pair on which a frame came last, which answers a flow where it comes (VIRTIO 1.3, section 5.1.6.5.6).
#[inline(never)]
pub(crate) fn respond<L: Link>(link: &mut L, run: &Run) -> Result<Outcome, Stopped> {
    let length = match run.count {
        0 => DEFAULT_SOURCE,
        count => count,
    };
    let start = link.now();
    let ticks_per_ms = link.ticks_per_ms().max(1);
    let mut host = Host::new(run.address, length, mix(start));
    let mut wake = start;
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    let pairs = usize::from(run.queues.max(1));
    // The pair whose turn it is, how many in a row had nothing to do, and the one on which a frame came last.
    let (mut pair, mut quiet, mut answer) = (0, 0, 0);
    while link.port().is_some() {
        let mut came = 0;
        if host.frames.arrived.is_empty()
            && let Some(port) = link.pair(pair)
        {
            let frames = &mut host.frames;
            came = port
                .rx_burst(run.batch, |frame| frames.take(frame))
                .map_err(Stopped::Port)?;
            if pair > 0 {
                frames.counts.other_pairs += came as u64;
            }
        }
        let now = link.now();
        let waiting = !host.frames.arrived.is_empty();
        if waiting || now >= wake {
            let ms = i64::try_from((now - start) / ticks_per_ms).unwrap_or(i64::MAX / 1000);
            let delay = host.poll(Instant::from_millis(ms));
            let delay = delay.map_or(LONGEST_MS, |delay| delay.total_millis());
            wake = now + delay.min(LONGEST_MS) * ticks_per_ms;
        }
        if came > 0 {
            answer = pair;
        }
        if link.pair(answer).is_none() {
            // It went out of use.
            answer = 0;
        }
        let Some(port) = link.pair(answer) else {
            break;
        };
        let sent = host.frames.flush(port).map_err(Stopped::Port)?;
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
            if link.called() {
                break;
            }
        }
        let full = !host.frames.leaving.is_empty();
        if came + sent > 0 || !full && !host.frames.arrived.is_empty() {
            (idle_turns, quiet) = (0, 0);
            if !full && host.frames.arrived.is_empty() {
                pair = (pair + 1) % pairs;
            }
            continue;
        }
        pair = (pair + 1) % pairs;
        quiet += 1;
        if quiet < pairs {
            continue;
        }
        quiet = 0;
        if link.gone() {
            break;
        }
        if run.sleeps(idle_turns) {
            if wake > now {
                let rx = host.frames.arrived.is_empty();
                wait(link, pairs, rx, full.then_some(answer), wake);
            }
            if link.called() {
                break;
            }
        } else {
            pause(idle_turns);
            idle_turns = idle_turns.saturating_add(1);
        }
    }
    Ok(Outcome {
        responded: Some(host.frames.counts),
        ..Outcome::default()
    })
}

#[cfg(test)]
mod tests;
