//! Front-ends that a test plays, kind and hostile, over real sockets and real memory.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use devices::vhost_user::{
    MemoryRegion, MemoryTable, Message, Payload, SocketRole, U64, VHOST_USER_F_PROTOCOL_FEATURES,
    VringAddr, VringFd, VringState, requests,
};
use virtqueue::net::{F_MRG_RXBUF, HEADER_LEN, features};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, Memory, Region, RingConfig, Used};

use super::memory::Table;
use super::*;
use crate::cli::relay::PortConfig;
use crate::tempdir::TempDir;

const LEN: u64 = 0x10_0000;
/// Guest physical addresses start here: below there is nothing.
const START: u64 = 0x10_0000;
/// User addresses.
const USER: u64 = 0x7000_0000_0000;
const SIZE: u16 = 16;
/// Where the rings are, and where buffers start.
const RINGS: [u64; 2] = [START, START + 0x1_0000];
const BUFFERS: u64 = START + 0x2_0000;
const STRIDE: u64 = 0x1000;
const BASE: u64 = features::VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES;

struct Bench {
    relay: Relay,
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let link = |name: &'static str| {
            let path = directory.path().join(name);
            let role = SocketRole::Listen;
            Link::new(name, PortConfig { path, role }).unwrap()
        };
        let relay = Relay {
            links: [link("a"), link("b")],
            lanes: [Lane::new(), Lane::new()],
        };
        Self { relay, directory }
    }

    fn connect(&self, side: usize) -> UnixStream {
        let path = self.directory.path().join(["a", "b"][side]);
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    /// As the main loop does, without waiting.
    fn work(&mut self) {
        for _ in 0..20 {
            self.relay.links.iter_mut().for_each(Link::service);
            self.relay.turn();
        }
    }

    fn serves(&mut self, side: usize) -> bool {
        self.relay.links[side].rings().is_some()
    }

    /// Waits until a dropped link takes the next front-end.
    fn rest(&self) {
        std::thread::sleep(link::RETRY + Duration::from_millis(20));
    }
}

fn send(stream: &UnixStream, message: &Message) {
    let mut connection = devices::vhost_user::Connection::new(stream.try_clone().unwrap()).unwrap();
    // A relay that has dropped the connection does not read it.
    let _ = connection.send(message);
}

fn memory_table(regions: &[MemoryRegion], file: &File) -> Message {
    let fds = regions.iter().map(|_| file.try_clone().unwrap().into());
    let fds: Vec<OwnedFd> = fds.collect();
    Message::request(requests::SET_MEM_TABLE, &MemoryTable(regions.to_vec())).with_fds(fds)
}

const REGION: MemoryRegion = MemoryRegion {
    guest_address: START,
    size: LEN,
    user_address: USER,
    mmap_offset: 0,
};

/// A front-end with both rings.
struct Peer<L: Layout> {
    stream: UnixStream,
    memory: Table,
    file: File,
    rx: L::Driver<Table>,
    tx: L::Driver<Table>,
    /// Signalled by the relay: call of the receive ring, error of the transmit ring.
    call: File,
    error: File,
    features: u64,
    next: u64,
}

fn eventfd() -> (OwnedFd, File) {
    let fd = sys::eventfd().unwrap();
    (fd.try_clone().unwrap(), fd.into())
}

fn config<L: Layout>(at: u64, features: u64) -> RingConfig {
    let lens = L::area_sizes(SIZE).unwrap().map(|len| len as u64);
    let driver = (at + lens[0]).next_multiple_of(64);
    RingConfig {
        size: SIZE,
        desc: at,
        driver,
        device: (driver + lens[1]).next_multiple_of(64),
        event_idx: features & features::EVENT_IDX != 0,
        in_order: features & features::IN_ORDER != 0,
        indirect: false,
    }
}

impl<L: Layout> Peer<L> {
    fn new(bench: &Bench, side: usize, features: u64) -> Self {
        let layout = if L::FRESH == 0 {
            0
        } else {
            features::RING_PACKED
        };
        let features = BASE | features | layout;
        let file = sys::memory_file(LEN, true).unwrap();
        let memory = Table::map(vec![(REGION, file.try_clone().unwrap().into())]).unwrap();
        let ring = |at| L::driver(memory.clone(), &config::<L>(at, features)).unwrap();
        let (call, their_call) = eventfd();
        let (error, their_error) = eventfd();
        let mut peer = Self {
            stream: bench.connect(side),
            rx: ring(RINGS[0]),
            tx: ring(RINGS[1]),
            memory,
            file,
            call: call.into(),
            error: error.into(),
            features,
            next: BUFFERS,
        };
        peer.set_up(their_call, their_error);
        peer
    }

    fn say(&self, request: u32, payload: &impl Payload) {
        send(&self.stream, &Message::request(request, payload));
    }

    fn set_up(&mut self, call: File, error: File) {
        self.say(requests::SET_FEATURES, &U64(self.features));
        send(&self.stream, &memory_table(&[REGION], &self.file));
        for (index, at) in (0..).zip(RINGS) {
            let config = config::<L>(at, self.features);
            let user = |gpa: u64| gpa - START + USER;
            let state = |num| VringState { index, num };
            self.say(requests::SET_VRING_NUM, &state(SIZE.into()));
            self.say(requests::SET_VRING_BASE, &state(L::FRESH));
            let addr = VringAddr {
                index,
                desc: user(config.desc),
                avail: user(config.driver),
                used: user(config.device),
                ..VringAddr::default()
            };
            self.say(requests::SET_VRING_ADDR, &addr);
            for (request, file) in [
                (requests::SET_VRING_CALL, &call),
                (requests::SET_VRING_ERR, &error),
                (requests::SET_VRING_KICK, &call),
            ] {
                self.line(request, index, file.try_clone().unwrap().into());
            }
            self.say(requests::SET_VRING_ENABLE, &state(1));
        }
    }

    fn line(&self, request: u32, index: u32, fd: OwnedFd) {
        let payload = VringFd {
            index: u8::try_from(index).unwrap(),
            no_fd: false,
        };
        send(
            &self.stream,
            &Message::request(request, &payload).with_fds(vec![fd]),
        );
    }

    fn buffer(&mut self, len: u32, device_writes: bool) -> Buffer {
        let addr = self.next;
        self.next += STRIDE;
        Buffer {
            addr,
            len,
            device_writes,
        }
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        for (at, byte) in (addr..).zip(bytes) {
            let word = self.memory.region(at & !7, 8, 8).unwrap();
            let shift = 8 * (at & 7);
            let old = word.load_u64(0, std::sync::atomic::Ordering::Relaxed);
            let new = old & !(0xff << shift) | u64::from(*byte) << shift;
            word.store_u64(0, new, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let byte = |at: u64| {
            let word = self.memory.region(at & !7, 8, 8).unwrap();
            let word = word.load_u64(0, std::sync::atomic::Ordering::Relaxed);
            word.to_le_bytes()[usize::try_from(at & 7).unwrap()]
        };
        (addr..).take(len).map(byte).collect()
    }

    /// Sends a frame in buffers of these lengths, the header's bytes counted.
    fn transmit(&mut self, frame: &[u8], pieces: &[usize]) {
        let packet = [&[0xee; HEADER_LEN][..], frame].concat();
        let mut rest = &packet[..];
        let mut buffers = Vec::new();
        for &len in pieces {
            let (now, later) = rest.split_at(len.min(rest.len()));
            let buffer = self.buffer(u32::try_from(now.len()).unwrap(), false);
            self.write(buffer.addr, now);
            buffers.push(buffer);
            rest = later;
        }
        assert!(rest.is_empty());
        self.tx.add(&buffers).unwrap();
        self.tx.publish();
    }

    /// Offers a receive buffer; where it is.
    fn offer(&mut self, len: u32) -> u64 {
        let buffer = self.buffer(len, true);
        self.rx.add(&[buffer]).unwrap();
        self.rx.publish();
        self.rx.enable_calls();
        buffer.addr
    }

    fn received(&mut self) -> Vec<u32> {
        let mut used = [Used::default(); 16];
        let n = self.rx.take(&mut used).unwrap();
        used[..n].iter().map(|used| used.len).collect()
    }

    fn sent(&mut self) -> usize {
        self.tx.take(&mut [Used::default(); 16]).unwrap()
    }
}

fn signalled(event: &mut File) -> bool {
    event.read(&mut [0; 8]).is_ok()
}

fn frame(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i % 251).to_le_bytes()[0] ^ seed)
        .collect()
}

fn crosses<A: Layout, B: Layout>(features: u64) {
    let mut bench = Bench::new();
    let mut a = Peer::<A>::new(&bench, 0, features);
    let mut b = Peer::<B>::new(&bench, 1, features);
    bench.work();
    // More than the rings are long, so that they wrap.
    for seed in 0..40 {
        let frame = frame(seed, 60 + usize::from(seed) * 30);
        a.next = BUFFERS;
        b.next = BUFFERS;
        let at = b.offer(2048);
        let split = HEADER_LEN + usize::from(seed);
        match seed % 3 {
            0 => a.transmit(&frame, &[4000]),
            1 => a.transmit(&frame, &[HEADER_LEN, 4000]),
            _ => a.transmit(&frame, &[5, split, 4000]),
        }
        bench.work();
        let len = HEADER_LEN + frame.len();
        assert_eq!(b.received(), [u32::try_from(len).unwrap()]);
        assert_eq!(a.sent(), 1);
        let packet = b.read(at, len);
        assert_eq!(packet[HEADER_LEN..], frame);
        assert_eq!(packet[..HEADER_LEN], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert!(signalled(&mut b.call));
    }
    assert_eq!(bench.relay.lanes[0].frames, 40);
}

#[test]
fn a_frame_arrives_whole_with_a_header_of_its_own_whatever_the_layouts() {
    for features in [0, features::EVENT_IDX, features::IN_ORDER] {
        crosses::<Split, Split>(features);
        crosses::<Split, Packed>(features);
        crosses::<Packed, Split>(features);
        crosses::<Packed, Packed>(features);
    }
}

fn spreads<L: Layout>() {
    let mut bench = Bench::new();
    let mut a = Peer::<L>::new(&bench, 0, 0);
    let mut b = Peer::<L>::new(&bench, 1, F_MRG_RXBUF);
    let frame = frame(7, 250);
    a.transmit(&frame, &[4000]);
    let places = [b.offer(100), b.offer(100)];
    bench.work();
    assert_eq!((b.received().len(), a.sent()), (0, 0), "too little room");
    let last = b.offer(100);
    bench.work();
    assert_eq!(b.received(), [100, 100, 62]);
    assert_eq!(a.sent(), 1);
    let packet = [
        b.read(places[0], 100),
        b.read(places[1], 100),
        b.read(last, 62),
    ]
    .concat();
    assert_eq!(packet[10..HEADER_LEN], [3, 0]);
    assert_eq!(packet[HEADER_LEN..], frame);
}

#[test]
fn a_frame_waits_for_as_many_mergeable_buffers_as_it_needs() {
    spreads::<Split>();
    spreads::<Packed>();
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_next_one_is_not() {
    let mut bench = Bench::new();
    let mut a = Peer::<Split>::new(&bench, 0, 0);
    let mut b = Peer::<Split>::new(&bench, 1, 0);
    b.offer(100);
    a.transmit(&frame(1, 200), &[4000]);
    a.transmit(&frame(2, 60), &[4000]);
    // No frame at all.
    a.transmit(&[], &[HEADER_LEN]);
    bench.work();
    assert_eq!(b.received(), [72]);
    assert_eq!(a.sent(), 3);
    assert_eq!(bench.relay.lanes[0].dropped, 2);
}

#[test]
fn rings_go_on_where_they_were_when_the_memory_table_is_sent_again() {
    let mut bench = Bench::new();
    let mut a = Peer::<Packed>::new(&bench, 0, 0);
    let mut b = Peer::<Split>::new(&bench, 1, 0);
    for seed in 0..5 {
        b.offer(2048);
        a.transmit(&frame(seed, 64), &[4000]);
        bench.work();
        assert_eq!((b.received().len(), a.sent()), (1, 1));
        send(&a.stream, &memory_table(&[REGION], &a.file));
        send(&b.stream, &memory_table(&[REGION], &b.file));
    }
}

/// What a hostile front-end does to rings that are in use; the relay must drop it, tell it, and go on with the other and with the next.
fn breaks<L: Layout>(what: &str, attack: impl Fn(&mut Peer<L>)) {
    for side in [0, 1] {
        let mut bench = Bench::new();
        let mut hostile = Peer::<L>::new(&bench, side, 0);
        let mut other = Peer::<L>::new(&bench, 1 - side, 0);
        bench.work();
        assert!(bench.serves(0) && bench.serves(1), "{what}");
        // So that the receive ring of the hostile one is looked at.
        other.transmit(&frame(1, 60), &[4000]);
        attack(&mut hostile);
        bench.work();
        assert!(!bench.serves(side) && bench.serves(1 - side), "{what}");
        assert!(signalled(&mut hostile.error), "{what}");
        drop(hostile);
        bench.rest();
        let mut next = Peer::<L>::new(&bench, side, 0);
        next.offer(2048);
        bench.work();
        assert_eq!(next.received(), [72], "{what}: what waited arrives");
    }
}

fn wild<L: Layout>() {
    for (addr, len) in [
        (0, 100),
        (START - 8, 16),
        (START + LEN - 8, 16),
        (START + LEN, 100),
        (u64::MAX - 7, 16),
    ] {
        let buffer = |device_writes| Buffer {
            addr,
            len,
            device_writes,
        };
        breaks::<L>("a frame outside its memory", |peer| {
            peer.tx.add(&[buffer(false)]).unwrap();
            peer.tx.publish();
        });
        breaks::<L>("a receive buffer outside its memory", |peer| {
            peer.rx.add(&[buffer(true)]).unwrap();
            peer.rx.publish();
        });
    }
}

#[test]
fn a_buffer_outside_the_memory_table_costs_a_front_end_its_connection() {
    wild::<Split>();
    wild::<Packed>();
}

#[test]
fn an_available_index_that_jumps_costs_a_front_end_its_connection() {
    breaks::<Split>("an index out of range", |peer| {
        let avail = config::<Split>(RINGS[1], 0).driver;
        peer.write(avail + 2, &1000_u16.to_le_bytes());
    });
}

#[test]
fn a_message_that_makes_no_sense_costs_a_front_end_its_connection_and_nobody_else() {
    let mut bench = Bench::new();
    let mut b = Peer::<Split>::new(&bench, 1, 0);
    let file = sys::memory_file(LEN, true).unwrap();
    let open = sys::memory_file(LEN, false).unwrap();
    let state = |index, num| VringState { index, num };
    let eventfd_request =
        |request, fd: OwnedFd| Message::request(request, &VringFd::default()).with_fds(vec![fd]);
    let (_reader, pipe) = std::io::pipe().unwrap();
    let beyond = MemoryRegion {
        size: 2 * LEN,
        ..REGION
    };
    let mut reply = Message::request(requests::GET_FEATURES, &U64(0));
    reply.flags |= devices::vhost_user::flags::REPLY;
    let messages = [
        ("unsealed memory", memory_table(&[REGION], &open)),
        ("memory beyond the file", memory_table(&[beyond], &file)),
        (
            "overlapping regions",
            memory_table(&[REGION, REGION], &file),
        ),
        (
            "a region without its descriptor",
            Message::request(requests::SET_MEM_TABLE, &MemoryTable(vec![REGION])),
        ),
        (
            "features that were not offered",
            Message::request(requests::SET_FEATURES, &U64(features::ACCESS_PLATFORM)),
        ),
        (
            "a vring that is not there",
            Message::request(requests::SET_VRING_NUM, &state(2, 16)),
        ),
        (
            "a vring far away",
            Message::request(requests::GET_VRING_BASE, &state(u32::MAX, 0)),
        ),
        ("a reply", reply),
        ("an unknown request", Message::bare(9999)),
        (
            "a log that was not offered",
            Message::request(requests::SET_LOG_BASE, &U64(0)),
        ),
        (
            "a payload that is too short",
            Message::bare(requests::SET_FEATURES),
        ),
        (
            "a call that is a pipe",
            eventfd_request(requests::SET_VRING_CALL, pipe.into()),
        ),
        (
            "a kick that is memory",
            eventfd_request(requests::SET_VRING_KICK, file.try_clone().unwrap().into()),
        ),
    ];
    for (what, message) in &messages {
        let mut stream = bench.connect(0);
        send(&stream, message);
        bench.work();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        let dropped = end.is_ok()
            || end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(dropped && bench.serves(1), "{what}");
        bench.rest();
    }
    let mut a = Peer::<Split>::new(&bench, 0, 0);
    b.offer(2048);
    a.transmit(&frame(3, 60), &[4000]);
    bench.work();
    assert_eq!(b.received(), [72]);
}

#[test]
fn rings_that_do_not_fit_are_refused_and_so_is_a_legacy_driver() {
    let mut bench = Bench::new();
    for (what, request, num) in [
        ("no power of two", requests::SET_VRING_NUM, 17),
        ("no descriptors", requests::SET_VRING_NUM, 0),
        ("too many", requests::SET_VRING_NUM, u32::MAX),
        ("an index of 32 bits", requests::SET_VRING_BASE, 0x1_0000),
    ] {
        let peer = Peer::<Split>::new(&bench, 0, 0);
        peer.say(request, &VringState { index: 1, num });
        bench.work();
        assert!(!bench.serves(0), "{what}");
        bench.rest();
    }
    let peer = Peer::<Split>::new(&bench, 0, 0);
    peer.say(requests::SET_FEATURES, &U64(VHOST_USER_F_PROTOCOL_FEATURES));
    bench.work();
    assert!(!bench.serves(0));
}

/// A generator of numbers: xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn scribbles<L: Layout>(features: u64) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut bench = Bench::new();
    let mut b = Peer::<L>::new(&bench, 1, F_MRG_RXBUF);
    for _ in 0..15 {
        let mut a = Peer::<L>::new(&bench, 0, features);
        bench.work();
        for _ in 0..200 {
            a.next = BUFFERS;
            if a.tx.free() > 1 && random.next() & 1 == 0 {
                a.transmit(&frame(1, 60), &[4000]);
            }
            // Mostly in the rings, and mostly small numbers: they lead further than large ones.
            let area = [RINGS[1], RINGS[0], BUFFERS][usize::try_from(random.next() % 3).unwrap()];
            let place = area + random.next() % 0x300;
            let value = random.next() >> (random.next() % 64);
            a.write(place, &value.to_le_bytes()[..4]);
            // The driver's own side may find its ring broken, too.
            let _ = a.tx.take(&mut [Used::default(); 8]);
            bench.work();
            if !bench.serves(0) {
                break;
            }
        }
        drop(a);
        bench.work();
        bench.rest();
        assert!(bench.serves(1));
        b.next = BUFFERS;
        while b.rx.free() > 0 {
            b.offer(256);
            b.next = BUFFERS;
        }
        b.received();
    }
}

#[test]
fn a_front_end_that_writes_anything_anywhere_in_its_memory_harms_nobody() {
    scribbles::<Split>(0);
    scribbles::<Packed>(features::EVENT_IDX);
}

#[test]
fn a_front_end_that_sends_random_bytes_harms_nobody() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut bench = Bench::new();
    let _b = Peer::<Split>::new(&bench, 1, 0);
    bench.work();
    for _ in 0..30 {
        let mut stream = bench.connect(0);
        for _ in 0..20 {
            let request = u32::try_from(random.next() % 45).unwrap();
            let len = usize::try_from(random.next() % 48).unwrap();
            let payload: Vec<u8> = (0..len)
                .map(|_| random.next().to_le_bytes()[0] & 3)
                .collect();
            let flags = if random.next().is_multiple_of(16) {
                5
            } else {
                1 + 8
            };
            let mut bytes = Vec::new();
            for word in [request, flags, u32::try_from(len).unwrap()] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(payload);
            // It may be dropped already.
            let _ = stream.write_all(&bytes);
            bench.work();
        }
        drop(stream);
        bench.work();
        bench.rest();
        assert!(bench.serves(1));
    }
}
