//! The responder at either end of a joined pair, asked by smoltcp as a client and by frames made by hand.

extern crate std;

use std::string::String;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant as Clock;
use std::vec;
use std::vec::Vec;
use std::{format, thread};

use guest_driver::joined::{self, JoinConfig, Silent};
use guest_driver::{Frame, Port};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use virtqueue::net::{HDR_F_NEEDS_CSUM, Header};

use super::{DEFAULT_SOURCE, Frames, MTU, pattern};
use crate::frame::End;
use crate::record::{Responded, ResultRecord};
use crate::tests::Bed;
use crate::{Link, Mode, Outcome, Run, Work, execute};

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// An end whose peer leaves when the test says so.
struct Thread<'a, P> {
    ports: Vec<P>,
    over: &'a AtomicBool,
    start: Clock,
}

impl<P: Port> Link for Thread<'_, P> {
    type Port = P;

    fn end(&self) -> End {
        End::BackEnd
    }

    fn port(&mut self) -> Option<&mut P> {
        self.pair(0)
    }

    fn pair(&mut self, index: usize) -> Option<&mut P> {
        let over = self.over.load(Ordering::Acquire);
        self.ports.get_mut(index).filter(|_| !over)
    }

    fn use_pairs(&mut self, count: usize) -> bool {
        count <= self.ports.len()
    }

    fn service(&mut self) {
        thread::yield_now(); // two threads may share one core here
    }

    fn sleep(&mut self, _until: u64) {
        thread::yield_now();
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap()
    }

    fn ticks_per_ms(&self) -> u64 {
        1000
    }
}

/// Runs the responder on `port` while `client` runs.
fn beside<P: Port + Send>(port: P, run: Run, client: impl FnOnce()) -> Outcome {
    beside_pairs(vec![port], run, client)
}

/// The same on several pairs.
fn beside_pairs<P: Port + Send>(ports: Vec<P>, run: Run, client: impl FnOnce()) -> Outcome {
    /// Also ends the responder where the client panics.
    struct Leave<'a>(&'a AtomicBool);
    impl Drop for Leave<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let over = AtomicBool::new(false);
    let mut link = Thread {
        ports,
        over: &over,
        start: Clock::now(),
    };
    thread::scope(|scope| {
        let responder = scope.spawn(move || execute(&mut link, &run).unwrap());
        {
            let _leave = Leave(&over);
            client();
        }
        responder.join().unwrap()
    })
}

fn run() -> Run {
    Run {
        work: Work::Respond,
        ..Run::default()
    }
}

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A host beside the responder.
struct Client<P> {
    port: P,
    frames: Frames,
    interface: Interface,
    start: Clock,
}

impl<P: Port> Client<P> {
    fn new(port: P) -> Self {
        let mut frames = Frames::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(PEER)));
        let mut interface = Interface::new(config, &mut frames, Instant::ZERO);
        interface.update_ip_addrs(|all| {
            all.push(IpCidr::new(IpAddress::v4(10, 0, 0, 2), 24))
                .unwrap();
        });
        Self {
            port,
            frames,
            interface,
            start: Clock::now(),
        }
    }

    /// Connects to a service, sends `data`, closes its half, and returns what came until the other half was closed.
    fn talk(&mut self, service: u16, local: u16, data: &[u8]) -> Vec<u8> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 16384]);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
        let socket = sockets.get_mut::<tcp::Socket>(handle);
        // What it acknowledges last goes out before it is dropped.
        socket.set_ack_delay(None);
        let to = (IpAddress::v4(10, 0, 0, 1), service);
        socket.connect(self.interface.context(), to, local).unwrap();
        let (mut sent, mut got) = (0, Vec::new());
        let start = Clock::now();
        loop {
            assert!(start.elapsed() < PATIENCE, "sent {sent}, got {}", got.len());
            let frames = &mut self.frames;
            self.port.rx_burst(32, |frame| frames.take(frame)).unwrap();
            let now =
                Instant::from_millis(i64::try_from(self.start.elapsed().as_millis()).unwrap());
            self.interface.poll(now, &mut self.frames, &mut sockets);
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            if socket.can_send() && sent < data.len() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if sent == data.len() && matches!(socket.state(), tcp::State::Established) {
                socket.close();
            }
            let mut piece = [0; 4096];
            while let Ok(n @ 1..) = socket.recv_slice(&mut piece) {
                got.extend_from_slice(&piece[..n]);
            }
            let closed = matches!(socket.state(), tcp::State::TimeWait | tcp::State::Closed);
            self.interface.poll(now, &mut self.frames, &mut sockets);
            self.frames.flush(&mut self.port).unwrap();
            if closed && self.frames.leaving.is_empty() {
                return got;
            }
            thread::yield_now();
        }
    }
}

fn random(len: u64) -> Vec<u8> {
    (0..len).map(|at| pattern(at + (1 << 40))).collect()
}

/// All three services over one pair of rings; `respond_at_front` says at which end the responder is.
fn services(packed: bool, respond_at_front: bool, mode: Mode) {
    let config = JoinConfig {
        packed,
        size: 64,
        ..JoinConfig::default()
    };
    let bed = Bed::new(&config);
    let (front, back) = joined::join(bed.memory, 0, &config, Silent, Silent, false).unwrap();
    let count = 300_001;
    let run = Run {
        count,
        mode,
        ..run()
    };
    fn client<P: Port>(port: P, count: u64) -> impl FnOnce() {
        move || {
            let mut client = Client::new(port);
            let data = random(200_003);
            assert!(
                client.talk(7, 50_000, &data) == data,
                "the echo is not what was sent"
            );
            assert_eq!(client.talk(9, 50_001, &data), []);
            let got = client.talk(19, 50_002, &[]);
            let want: Vec<u8> = (0..count).map(pattern).collect();
            assert!(got == want, "{} bytes, or wrong ones", got.len());
            // More than there are sockets, one after the other: each is used again.
            for local in 51_000..51_020 {
                assert_eq!(client.talk(7, local, b"again"), b"again");
            }
        }
    }
    let outcome = if respond_at_front {
        beside(front, run, client(back, count))
    } else {
        beside(back, run, client(front, count))
    };
    let counts = outcome.responded.unwrap();
    assert_eq!(
        (counts.connections, counts.dropped, counts.rx_bytes),
        (23, 0, 2 * 200_003 + 20 * 5)
    );
    assert_eq!(counts.tx_bytes, 200_003 + count + 20 * 5);
    assert!(outcome.is_clean());
}

#[test]
fn a_back_end_serves_tcp_over_split_rings() {
    services(false, false, Mode::Poll);
}

#[test]
fn a_back_end_serves_tcp_over_packed_rings_and_sleeps_between_frames() {
    services(true, false, Mode::Irq);
}

#[test]
fn a_front_end_serves_tcp_over_split_rings_and_sleeps_between_frames() {
    services(false, true, Mode::Irq);
}

#[test]
fn a_front_end_serves_tcp_over_packed_rings() {
    services(true, true, Mode::Poll);
}

#[test]
fn what_comes_on_a_pair_is_answered_on_that_pair() {
    for mode in [Mode::Poll, Mode::Irq] {
        let config = JoinConfig {
            size: 64,
            ..JoinConfig::default()
        };
        let beds = [Bed::new(&config), Bed::new(&config), Bed::new(&config)];
        let joined = beds
            .iter()
            .map(|bed| joined::join(bed.memory, 0, &config, Silent, Silent, false).unwrap());
        let (fronts, backs): (Vec<_>, Vec<_>) = joined.unzip();
        let run = Run {
            queues: 3,
            mode,
            ..run()
        };
        let outcome = beside_pairs(backs, run, || {
            // A client that looks at one pair alone, from which it has its answers.
            let mut clients: Vec<_> = fronts.into_iter().map(Client::new).collect();
            for (client, local) in clients.iter_mut().rev().zip(50_000..) {
                let data = random(20_000 + u64::from(local));
                assert!(client.talk(7, local, &data) == data);
            }
        });
        assert_eq!(outcome.responded.unwrap().connections, 3);
    }
}

/// The sum of the words of a header, as RFC 1071 wants it, for the frames made by hand.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(high) << 8 | u32::from(low),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    u16::try_from(!sum & 0xffff).unwrap().to_be_bytes()
}

fn ethernet(to: [u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&to[..], &PEER, &ethertype, payload].concat()
}

fn arp_request() -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    let body = [&fixed[..], &PEER, &[10, 0, 0, 2], &[0; 6], &[10, 0, 0, 1]].concat();
    ethernet([0xff; 6], [8, 6], &body)
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [
        0x45, 0, len[0], len[1], 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
    ];
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    ethernet(OURS, [8, 0], &[&header[..], payload].concat())
}

fn ping(sequence: u8, data: &[u8]) -> Vec<u8> {
    let mut message = [&[8, 0, 0, 0, 0x12, 0x34, 0, sequence], data].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    ipv4(1, &message)
}

fn send<P: Port>(port: &mut P, frame: &[u8]) {
    let start = Clock::now();
    while port
        .tx_burst(1, frame.len(), |_, slot| {
            slot.write(0, frame);
        })
        .unwrap()
        == 0
    {
        assert!(start.elapsed() < PATIENCE);
        thread::yield_now();
    }
}

fn receive<P: Port>(port: &mut P) -> Vec<u8> {
    let start = Clock::now();
    let mut got = Vec::new();
    while port
        .rx_burst(1, |frame: &Frame| {
            got = vec![0; frame.len()];
            assert!(frame.read(0, &mut got));
        })
        .unwrap()
        == 0
    {
        assert!(start.elapsed() < PATIENCE, "no answer");
        thread::yield_now();
    }
    got
}

/// Runs the responder at the back-end beside a client that makes its frames by hand.
fn by_hand(client: impl FnOnce(&mut joined::JoinedFrontEnd<Silent>)) -> Responded {
    let config = JoinConfig {
        size: 64,
        ..JoinConfig::default()
    };
    let bed = Bed::new(&config);
    let (mut front, back) = joined::join(bed.memory, 0, &config, Silent, Silent, false).unwrap();
    let outcome = beside(back, run(), || {
        send(&mut front, &arp_request());
        let reply = receive(&mut front);
        let fixed = [0, 1, 8, 0, 6, 4, 0, 2];
        let body = [&fixed[..], &OURS, &[10, 0, 0, 1], &PEER, &[10, 0, 0, 2]].concat();
        let want = [&PEER[..], &OURS, &[8, 6], &body].concat();
        assert_eq!(reply, want);
        client(&mut front);
    });
    outcome.responded.unwrap()
}

#[track_caller]
fn expect_echo(port: &mut impl Port, sequence: u8, data: &[u8]) {
    send(port, &ping(sequence, data));
    let reply = receive(port);
    assert_eq!(reply[..14], [&PEER[..], &OURS, &[8, 0]].concat());
    assert_eq!(reply[26..34], [10, 0, 0, 1, 10, 0, 0, 2]);
    assert_eq!(reply[34..36], [0, 0], "no echo reply");
    assert_eq!(reply[38..42], [0x12, 0x34, 0, sequence]);
    assert_eq!(reply[42..], *data);
    // Right where the sum over all, the checksum included, is zero.
    assert_eq!(checksum(&reply[14..34]), [0, 0]);
    assert_eq!(checksum(&reply[34..]), [0, 0]);
}

#[test]
fn pings_of_every_length_that_fits_are_answered_whole() {
    let counts = by_hand(|port| {
        for (sequence, len) in (0..).zip([0, 1, 56, 511, 1471, 1472]) {
            expect_echo(port, sequence, &random(len));
        }
    });
    assert_eq!(
        (counts.rx_frames, counts.tx_frames, counts.dropped),
        (7, 7, 0)
    );
}

#[test]
fn frames_that_lie_about_their_length_or_end_too_early_get_no_answer_and_do_no_harm() {
    let mut hostile = Vec::new();
    let whole = ping(9, &random(200));
    // Cut off anywhere from the end of the Ethernet header on.
    hostile.extend((14..whole.len()).map(|len| whole[..len].to_vec()));
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = whole.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        // The header's checksum is right again, so that it is the lie that is looked at.
        frame[24..26].fill(0);
        let end = (14 + usize::from(frame[14] & 15) * 4).clamp(34, frame.len());
        let sum = checksum(&frame[14..end]);
        frame[24..26].copy_from_slice(&sum);
        frame
    };
    hostile.extend([
        with(16, &[0xff, 0xff]), // IP: total length beyond the frame
        with(16, &[0, 0]),
        with(16, &[0, 19]),
        with(14, &[0x44]), // a header of 16 bytes
        with(14, &[0x40]),
        with(14, &[0x65]),        // version 6
        with(20, &[0x3f, 0xff]),  // a fragment far behind
        with(30, &[10, 0, 0, 3]), // for somebody else
    ]);
    // TCP and UDP headers of nonsense, to each service and to nobody.
    for protocol in [6, 17, 2, 255] {
        for len in [0, 1, 7, 8, 19, 20, 60] {
            hostile.push(ipv4(protocol, &vec![0xff; len]));
            hostile.push(ipv4(protocol, &vec![0; len]));
        }
    }
    // ARP with lengths of addresses that are not what they say.
    for at in 14..22 {
        let mut frame = arp_request();
        frame[at] = 0xff;
        hostile.push(frame);
    }
    let (few, many) = (13, 3);
    let counts = by_hand(|port| {
        for frame in &hostile {
            send(port, frame);
        }
        for len in 1..=few {
            send(port, &whole[..len]);
        }
        for len in [MTU + 1, MTU + 2, MTU + 4] {
            send(port, &vec![0xaa; len]);
        }
        // The answer to this is the last that comes: to those above there may be refusals (TCP resets, ICMP errors).
        send(port, &ping(77, b"still there"));
        for _ in 0..=hostile.len() {
            let reply = receive(port);
            if reply.get(34..42) == Some(&[0, 0, reply[36], reply[37], 0x12, 0x34, 0, 77]) {
                assert_eq!(reply[42..], *b"still there");
                return;
            }
            assert_ne!(
                reply.get(38..42),
                Some(&[0x12, 0x34, 0, 9][..]),
                "a broken ping was answered"
            );
        }
        panic!("it does not answer any more");
    });
    let (few, hostile) = (
        u64::try_from(few).unwrap(),
        u64::try_from(hostile.len()).unwrap(),
    );
    assert_eq!((counts.dropped, counts.connections), (few + many, 0));
    assert_eq!(counts.rx_frames, 2 + few + many + hostile);
}

#[test]
fn a_ring_without_room_holds_the_answers_up_and_loses_none_of_the_waiting_ones() {
    /// Takes nothing until it is told to.
    struct Stuck {
        open: bool,
        sent: Vec<Vec<u8>>,
    }
    impl Port for Stuck {
        fn tx_burst(
            &mut self,
            count: usize,
            len: usize,
            mut build: impl FnMut(usize, &mut guest_driver::Slot),
        ) -> Result<usize, guest_driver::port::Error> {
            if !self.open {
                return Ok(0);
            }
            // One at a time, so that the rest has to wait for the next turn.
            let config = JoinConfig::default();
            let bed = Bed::new(&config);
            let (mut front, mut back) =
                joined::join(bed.memory, 0, &config, Silent, Silent, false).unwrap();
            let sent = front.tx_burst(count.min(1), len, &mut build)?;
            back.rx_burst(1, |frame| {
                let mut bytes = vec![0; frame.len()];
                assert!(frame.read(0, &mut bytes));
                self.sent.push(bytes);
            })?;
            Ok(sent)
        }

        fn rx_burst(
            &mut self,
            _count: usize,
            _receive: impl FnMut(&Frame),
        ) -> Result<usize, guest_driver::port::Error> {
            Ok(0)
        }

        fn drained(&mut self) -> Result<bool, guest_driver::port::Error> {
            Ok(true)
        }

        fn arm(&mut self, _rx: bool, _tx: bool) -> bool {
            true
        }

        fn disarm(&mut self) {}
    }
    let mut host = super::Host::new(run().address, DEFAULT_SOURCE, 1);
    let mut port = Stuck {
        open: false,
        sent: Vec::new(),
    };
    host.frames.take(&Frame::of(&arp_request()));
    for sequence in 0..200 {
        host.frames
            .take(&Frame::of(&ping(sequence, &[sequence; 8])));
    }
    host.poll(Instant::ZERO);
    assert_eq!(host.frames.flush(&mut port), Ok(0));
    assert_eq!(host.frames.leaving.len(), super::MAX_WAITING);
    assert_eq!(host.frames.arrived.len(), 201 - super::MAX_WAITING);
    port.open = true;
    for _ in 0..1000 {
        host.frames.flush(&mut port).unwrap();
        host.poll(Instant::ZERO);
    }
    let sequences: Vec<u8> = port.sent[1..].iter().map(|frame| frame[41]).collect();
    assert_eq!(sequences, (0..200).collect::<Vec<u8>>());
    assert_eq!(host.frames.counts.tx_frames, 201);
}

/// A TCP segment to a service, with a right checksum.
fn tcp(from: u16, to: u16, sequence: u32, ack: u32, flags: u8, rest: &[u8]) -> Vec<u8> {
    let mut segment = [&from.to_be_bytes()[..], &to.to_be_bytes()].concat();
    segment.extend(sequence.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend([0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(rest);
    ipv4(6, &tcp_sum(segment))
}

/// The segment with the checksum that it should have.
fn tcp_sum(mut segment: Vec<u8>) -> Vec<u8> {
    segment[16..18].fill(0);
    let len = u16::try_from(segment.len()).unwrap().to_be_bytes();
    let pseudo = [10, 0, 0, 2, 10, 0, 0, 1, 0, 6, len[0], len[1]];
    let sum = checksum(&[&pseudo[..], &segment].concat());
    segment[16..18].copy_from_slice(&sum);
    segment
}

#[test]
fn no_garbled_conversation_makes_it_panic_grow_or_stop_answering() {
    let (syn, ack, psh, fin) = (2, 16, 8, 1);
    let mut host = super::Host::new(run().address, DEFAULT_SOURCE, 1);
    let mut state = 0;
    let mut random = move |below: u64| {
        state += 1;
        crate::study::mix(state) % below
    };
    // What it said last on a connection: both ports, its next number, and ours.
    let mut talks: Vec<[u32; 4]> = Vec::new();
    let mut spoken = 0;
    for turn in 0..40_000u32 {
        let services = [7, 9, 19, 20];
        let service = services[usize::try_from(random(4)).unwrap()];
        let local = u16::try_from(40_000 + random(8)).unwrap();
        let mut frame = match random(8) {
            0 => arp_request(),
            1 => ping(u8::try_from(turn % 256).unwrap(), &[7; 64]),
            2 => tcp(local, service, turn, 0, syn, &[]),
            _ if talks.is_empty() => tcp(local, service, turn, turn, ack, &[1; 9]),
            _ => {
                let at = usize::try_from(random(talks.len() as u64)).unwrap();
                let talk = &mut talks[at];
                let [from, to, theirs, ours] = *talk;
                let data = vec![9; usize::try_from(random(1400)).unwrap()];
                let flags = match random(6) {
                    0 => ack | fin,
                    1 => u8::try_from(random(256)).unwrap(),
                    _ => ack | psh,
                };
                talk[3] = ours.wrapping_add(u32::try_from(data.len()).unwrap());
                let near = u32::try_from(random(3)).unwrap();
                tcp(
                    u16::try_from(from).unwrap(),
                    u16::try_from(to).unwrap(),
                    ours.wrapping_add(near),
                    theirs.wrapping_sub(near),
                    flags,
                    &data,
                )
            }
        };
        // Half of them are changed somewhere, and most of those get right checksums afterwards.
        if random(2) == 0 {
            for _ in 0..=random(3) {
                let at = usize::try_from(random(frame.len().min(80) as u64)).unwrap();
                frame[at] = u8::try_from(random(256)).unwrap();
            }
            if random(4) != 0 && frame.len() >= 54 && frame[23] == 6 {
                frame[24..26].fill(0);
                let sum = checksum(&frame[14..34]);
                frame[24..26].copy_from_slice(&sum);
                let segment = tcp_sum(frame[34..].to_vec());
                frame.splice(34.., segment);
            }
            frame.truncate(
                usize::try_from(random(2 * frame.len() as u64))
                    .unwrap()
                    .max(1),
            );
        }
        host.frames.take(&Frame::of(&frame));
        host.poll(Instant::from_millis(i64::from(turn) * 20));
        for frame in host.frames.leaving.drain(..) {
            let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
            if frame.len() >= 54 && frame[23] == 6 && frame[47] & 4 == 0 {
                spoken += 1;
                let (to, from) = (word(34) >> 16, word(34) & 0xffff);
                let len = u32::try_from(frame.len()).unwrap() - 34 - u32::from(frame[46] >> 4) * 4;
                let one = u32::from(frame[47] & (syn | fin) != 0);
                let theirs = word(38).wrapping_add(len + one);
                talks.retain(|talk| talk[..2] != [from, to]);
                talks.push([from, to, theirs, word(42)]);
                let excess = talks.len().saturating_sub(32);
                talks.drain(..excess);
            }
        }
        assert!(host.frames.arrived.is_empty());
    }
    assert!(spoken > 1000, "{spoken}: nothing was said");
    let counts = host.frames.counts;
    assert!(
        counts.connections > 10 && counts.rx_bytes > 10_000,
        "{counts:?}"
    );
    host.frames.take(&Frame::of(&arp_request()));
    host.frames.take(&Frame::of(&ping(1, b"still there")));
    host.poll(Instant::from_millis(1 << 30));
    let mut answers = host.frames.leaving.iter();
    assert!(answers.any(|frame| frame.ends_with(b"still there")));
}

#[test]
fn the_record_has_what_the_responder_counted() {
    let responded = Responded {
        rx_frames: 1,
        tx_frames: 2,
        dropped: 3,
        partial: 7,
        large: 8,
        other_pairs: 9,
        connections: 4,
        rx_bytes: 5,
        tx_bytes: 6,
    };
    let outcome = Outcome {
        responded: Some(responded),
        ..Outcome::default()
    };
    let record: String = format!("{}", ResultRecord(&run(), &outcome));
    assert_eq!(
        record,
        r#"{"record":"result","id":0,"work":"respond","responded":{"rx_frames":1,"other_pairs":9,"tx_frames":2,"dropped":3,"partial":7,"large":8,"connections":4,"rx_bytes":5,"tx_bytes":6},"timeout":0}"#
    );
}

/// A segment that leaves its checksum, and more, to the receiver.
fn partial(len: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..len - 54).map(|at| at.to_le_bytes()[0]).collect();
    let mut frame = tcp(999, 7, 5, 0, 0x02, &payload);
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend(u16::try_from(frame.len() - 34).unwrap().to_be_bytes());
    let [high, low] = checksum(&pseudo);
    frame[50..52].copy_from_slice(&[!high, !low]);
    frame
}

#[test]
fn a_partial_checksum_is_completed_and_then_as_right_as_a_whole_one() {
    for len in [54, 55, 1514, 65_535] {
        let mut frame = partial(len);
        let header = Header {
            flags: HDR_F_NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..Header::NONE
        };
        super::complete(&mut frame, &header);
        let mut all = frame[26..34].to_vec();
        all.extend([0, 6]);
        all.extend(u16::try_from(len - 34).unwrap().to_be_bytes());
        all.extend(&frame[34..]);
        assert_eq!(checksum(&all), [0, 0], "{len}");
    }
}
