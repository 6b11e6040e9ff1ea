//! The device in a machine, reached by a driver of the ring core; a pair of sockets stands in for the tap.

mod real;

use std::os::unix::net::UnixDatagram;

use event_manager::{EventManager, SubscriberOps};
use virtqueue::net::{
    F_HOST_TSO4, F_MRG_RXBUF, HDR_F_NEEDS_CSUM, HDR_GSO_TCPV4, HEADER_LEN, Header, features,
};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, RingConfig, Used};
use vm_memory::{Bytes, GuestAddress};

use super::memory::Ram;
use super::*;
use crate::fake::{FakeHost, MEMORY_SIZE};
use crate::virtio::harness::{DEVICE, Driver, QUEUE_RESET, STATUS};
use crate::virtio::{VirtioPci, status};

const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;
const SIZE: u16 = 128;
/// Bytes of a buffer, all of which lie side by side.
const BUFFER: u64 = 2048;
/// A frame of which the stand-in does not take twenty.
const LARGE: usize = 10_000;

fn area(queue: u16) -> u64 {
    0x2_0000 * (u64::from(queue) + 1)
}

fn buffer(queue: u16, slot: usize) -> u64 {
    0x10_0000 * (u64::from(queue) + 1) + BUFFER * slot as u64
}

/// The guest's side of a queue.
struct Queue {
    ring: Box<dyn DriverRing>,
    config: RingConfig,
    added: usize,
    /// The slot of each chain that is out, by its token.
    out: Vec<(u16, usize)>,
}

struct World {
    net: Arc<TapNet>,
    driver: Driver,
    host: Arc<FakeHost>,
    manager: EventManager<Box<dyn MutEventSubscriber + Send>>,
    /// The host's end of the tap.
    peer: UnixDatagram,
    features: u64,
    to_guest: Queue,
    from_guest: Queue,
}

fn queue(host: &FakeHost, index: u16, negotiated: u64) -> Queue {
    let has = |bit| negotiated & bit != 0;
    let config = RingConfig {
        size: SIZE,
        desc: area(index),
        driver: area(index) + 0x8000,
        device: area(index) + 0x1_0000,
        event_idx: has(features::EVENT_IDX),
        in_order: has(features::IN_ORDER),
        indirect: has(features::INDIRECT_DESC),
    };
    let ram = Ram(host.memory().clone());
    let ring: Box<dyn DriverRing> = if has(features::RING_PACKED) {
        Box::new(Packed::driver(ram, &config).unwrap())
    } else {
        Box::new(Split::driver(ram, &config).unwrap())
    };
    Queue {
        ring,
        config,
        added: 0,
        out: Vec::new(),
    }
}

impl World {
    fn with_port(rings: RingFeatures, accepted: u64, port: Port, peer: UnixDatagram) -> Self {
        let config = TapConfig {
            name: "stand-in".into(),
            server: Server::Thread,
            queue_size: SIZE,
            rings,
            mac: [2, 0, 0, 1, 2, 3],
        };
        let host = FakeHost::new();
        let net = TapNet::with_port(config, port, host.clone()).unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(net.subscriber());
        let function = VirtioPci::new(net.clone(), host.clone()).unwrap();
        let driver = Driver::new(function, host.clone());
        driver.enable_msix();
        let mut world = Self {
            features: driver.offered() & accepted,
            to_guest: queue(&host, TO_GUEST, 0),
            from_guest: queue(&host, FROM_GUEST, 0),
            net,
            driver,
            host,
            manager,
            peer,
        };
        world.start();
        world
    }

    fn new(rings: RingFeatures, accepted: u64) -> Self {
        let (tap, peer) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        peer.set_nonblocking(true).unwrap();
        Self::with_port(rings, accepted, Port::stand_in(tap.into()), peer)
    }

    /// Drives the device from nothing to DRIVER_OK, with rings that are empty.
    fn start(&mut self) {
        assert!(self.driver.negotiate(self.features));
        self.to_guest = queue(&self.host, TO_GUEST, self.features);
        self.from_guest = queue(&self.host, FROM_GUEST, self.features);
        self.set_up(TO_GUEST);
        self.set_up(FROM_GUEST);
        self.driver.set_status(status::DRIVER_OK);
        self.turn();
    }

    fn set_up(&self, index: u16) {
        let config = match index {
            TO_GUEST => &self.to_guest.config,
            _ => &self.from_guest.config,
        };
        self.driver.set_vector(index, index + 1);
        self.driver.write(24, &config.size.to_le_bytes());
        let areas = [(32, config.desc), (40, config.driver), (48, config.device)];
        for (offset, address) in areas {
            self.driver.write(offset, &address.to_le_bytes());
        }
        self.driver.write(28, &1u16.to_le_bytes());
    }

    /// Lets the thread do what it can, and not more than it should ever need.
    fn turn(&mut self) {
        for _ in 0..1000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the thread does not come to rest");
    }

    /// Offers a buffer of `len` bytes.
    fn offer(&mut self, len: u32) {
        let queue = &mut self.to_guest;
        let slot = queue.added % usize::from(SIZE);
        let addr = buffer(TO_GUEST, slot);
        let piece = Buffer {
            addr,
            len,
            device_writes: true,
        };
        let token = queue.ring.add(&[piece]).expect("room");
        queue.out.push((token, slot));
        queue.added += 1;
        if queue.ring.publish() {
            self.driver.notify(TO_GUEST);
        }
    }

    /// Sends a packet, its header in one buffer and the frame in others of at most [`BUFFER`] bytes.
    fn send(&mut self, header: Header, frame: &[u8]) {
        let queue = &mut self.from_guest;
        let pieces = 1 + frame.len().div_ceil(usize::try_from(BUFFER).unwrap());
        let first = queue.added;
        queue.added = (queue.added + pieces) % 192;
        let first = if first + pieces > 256 { 0 } else { first };
        let base = buffer(FROM_GUEST, first);
        let memory = self.host.memory();
        memory
            .write_slice(&header.encode(), GuestAddress(base))
            .unwrap();
        memory
            .write_slice(frame, GuestAddress(base + BUFFER))
            .unwrap();
        let mut chain = vec![Buffer {
            addr: base,
            len: u32::try_from(HEADER_LEN).unwrap(),
            device_writes: false,
        }];
        for (at, part) in (1..).zip(frame.chunks(usize::try_from(BUFFER).unwrap())) {
            chain.push(Buffer {
                addr: base + BUFFER * at,
                len: u32::try_from(part.len()).unwrap(),
                device_writes: false,
            });
        }
        queue.ring.add(&chain).expect("room");
        if queue.ring.publish() {
            self.driver.notify(FROM_GUEST);
        }
        self.turn();
    }

    /// Chains of the transmit queue that came back.
    fn sent(&mut self) -> usize {
        let mut used = [Used::default(); 64];
        self.from_guest.ring.take(&mut used).unwrap()
    }

    /// A frame that the guest received: its header, and what follows.
    fn received(&mut self) -> Option<(Header, Vec<u8>)> {
        let first = self.take()?;
        let (head, rest) = first.split_at(HEADER_LEN);
        let header = Header::decode(head.try_into().unwrap());
        let mut frame = rest.to_vec();
        for _ in 1..header.num_buffers {
            frame.extend(self.take().expect("the rest of a frame"));
        }
        Some((header, frame))
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let mut used = [Used::default()];
        if self.to_guest.ring.take(&mut used).unwrap() == 0 {
            return None;
        }
        let [used] = used;
        let out = &mut self.to_guest.out;
        let at = out.iter().position(|&(id, _)| id == used.id).unwrap();
        let (_, slot) = out.swap_remove(at);
        let mut bytes = vec![0; usize::try_from(used.len).unwrap()];
        let from = GuestAddress(buffer(TO_GUEST, slot));
        self.host.memory().read_slice(&mut bytes, from).unwrap();
        Some(bytes)
    }

    /// What the host sends to the guest.
    fn host_sends(&mut self, header: Header, frame: &[u8]) {
        let packet = [&header.encode()[..10], &[0xee; 2], frame].concat();
        self.peer.send(&packet).unwrap();
        self.turn();
    }

    /// What the host got from the guest.
    fn at_host(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut packet = vec![0; 70_000];
        let len = self.peer.recv(&mut packet).ok()?;
        let (head, frame) = packet[..len].split_at(HEADER_LEN);
        Some((Header::decode(head.try_into().unwrap()), frame.to_vec()))
    }

    fn needs_reset(&self) -> bool {
        self.driver.u8(STATUS) & status::NEEDS_RESET != 0
    }

    fn reset(&mut self) {
        self.driver.write(20, &[0]);
        self.turn();
        assert_eq!(self.driver.u8(STATUS), 0, "the reset is not complete");
    }
}

/// A frame that tells where each of its bytes belongs.
fn frame(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 7 + at / 251) % 251).unwrap())
        .collect()
}

fn tso() -> Header {
    Header {
        flags: HDR_F_NEEDS_CSUM,
        gso_type: HDR_GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

/// Runs a test with split and with packed rings.
fn each_layout(test: impl Fn(RingFeatures)) {
    for packed in [false, true] {
        for event_idx in [false, true] {
            test(RingFeatures {
                packed,
                event_idx,
                ..RingFeatures::default()
            });
        }
    }
}

#[test]
fn frames_and_what_is_still_to_be_done_to_them_go_through_both_ways() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        for round in 0..300 {
            let frame = frame(60 + round);
            let header = if round % 2 == 0 {
                tso()
            } else {
                Header::default()
            };
            world.send(header, &frame);
            assert_eq!(world.at_host(), Some((header, frame.clone())));
            assert_eq!(world.sent(), 1);
            world.offer(2048);
            world.host_sends(header, &frame);
            let header = Header {
                num_buffers: 1,
                ..header
            };
            assert_eq!(world.received(), Some((header, frame)));
        }
        let stats = world.net.stats();
        assert_eq!((stats.sent, stats.received), (300, 300));
        assert_eq!((stats.sent_dropped, stats.received_dropped), (0, 0));
        assert!(!world.needs_reset());
    });
}

#[test]
fn a_frame_of_64_kib_goes_through_in_one_piece_both_ways() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        let frame = frame(65_536 + 14);
        world.send(tso(), &frame);
        assert_eq!(world.at_host(), Some((tso(), frame.clone())));
        let need = (frame.len() + HEADER_LEN).div_ceil(1526);
        for _ in 0..need {
            world.offer(1526);
        }
        world.host_sends(tso(), &frame);
        let (header, got) = world.received().unwrap();
        assert_eq!(usize::from(header.num_buffers), need);
        assert_eq!((header.gso_type, header.gso_size), (HDR_GSO_TCPV4, 1448));
        assert!(got == frame);
    });
}

#[test]
fn what_the_guest_may_not_send_is_dropped_and_counted_and_the_next_frame_goes() {
    let mut world = World::new(RingFeatures::default(), !F_HOST_TSO4);
    let beyond = Header {
        csum_start: 59,
        ..Header {
            gso_type: 0,
            ..tso()
        }
    };
    world.send(tso(), &frame(1514));
    world.send(beyond, &frame(60));
    world.send(Header::default(), &frame(13));
    world.send(Header::default(), &[]);
    world.send(
        Header::default(),
        &frame(served::MAX_PACKET - HEADER_LEN + 1),
    );
    assert_eq!(world.at_host(), None);
    world.send(Header::default(), &frame(60));
    assert_eq!(world.at_host(), Some((Header::default(), frame(60))));
    assert_eq!(world.sent(), 6);
    let stats = world.net.stats();
    assert_eq!((stats.sent, stats.sent_dropped), (1, 5));
}

#[test]
fn frames_wait_for_buffers_without_keeping_the_thread_awake() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        // `turn` fails where the thread does not come to rest.
        for len in [60, 3000, 61] {
            world.host_sends(Header::default(), &frame(len));
        }
        world.offer(1526);
        world.turn();
        assert_eq!(world.received().map(|(_, got)| got), Some(frame(60)));
        world.offer(1526);
        world.turn();
        assert!(world.received().is_none(), "a part of a frame");
        world.offer(1526);
        world.offer(1526);
        world.turn();
        assert_eq!(world.received().map(|(_, got)| got), Some(frame(3000)));
        assert_eq!(world.received().map(|(_, got)| got), Some(frame(61)));
        assert_eq!(world.net.stats().received_dropped, 0);
    });
}

#[test]
fn a_frame_that_no_buffers_can_hold_is_dropped_and_the_next_one_comes() {
    for mergeable in [false, true] {
        let features = if mergeable { u64::MAX } else { !F_MRG_RXBUF };
        let mut world = World::new(RingFeatures::default(), features);
        // Without merging: the one buffer is too small. With it: all that there can be are.
        for _ in 0..SIZE {
            world.offer(64);
        }
        world.host_sends(Header::default(), &frame(64 * usize::from(SIZE)));
        assert_eq!(world.net.stats().received_dropped, 1);
        world.host_sends(Header::default(), &frame(50));
        assert_eq!(world.received().map(|(_, got)| got), Some(frame(50)));
    }
}

#[test]
fn a_full_tap_holds_the_sender_up_and_loses_nothing() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        for len in 0..20 {
            world.send(Header::default(), &frame(LARGE + len));
        }
        let before = world.net.stats().sent;
        assert!(before < 20, "the stand-in takes everything");
        for len in 0..20 {
            assert_eq!(world.at_host().map(|(_, f)| f), Some(frame(LARGE + len)));
            world.turn();
        }
        let mut sent = 0;
        while let more @ 1.. = world.sent() {
            sent += more;
        }
        assert_eq!((sent, world.net.stats().sent_dropped), (20, 0));
    });
}

#[test]
fn without_guest_csum_the_guest_is_told_nothing_of_checksums() {
    let mut world = World::new(RingFeatures::default(), features::VERSION_1);
    world.offer(2048);
    let valid = Header {
        flags: virtqueue::net::HDR_F_DATA_VALID,
        ..Header::default()
    };
    world.host_sends(valid, &frame(60));
    let plain = Header {
        num_buffers: 1,
        ..Header::default()
    };
    assert_eq!(world.received(), Some((plain, frame(60))));
}

#[test]
fn a_reset_with_frames_on_the_way_leaves_the_old_rings_alone_and_the_next_driver_starts_anew() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        // One waits for buffers, and more than the stand-in takes wait for it.
        world.host_sends(Header::default(), &frame(60));
        for _ in 0..20 {
            world.send(Header::default(), &frame(LARGE));
        }
        assert!(world.net.stats().sent < 20, "the stand-in takes everything");
        world.reset();
        let before = ring_bytes(&world);
        world.host_sends(Header::default(), &frame(61));
        world.driver.notify(TO_GUEST);
        world.driver.notify(FROM_GUEST);
        while world.at_host().is_some() {}
        world.turn();
        assert!(ring_bytes(&world) == before, "a ring was touched");
        world.start();
        world.send(Header::default(), &frame(80));
        assert_eq!(world.at_host().map(|(_, f)| f), Some(frame(80)));
        world.offer(2048);
        world.turn();
        assert_eq!(world.received().map(|(_, got)| got), Some(frame(61)));
    });
}

fn ring_bytes(world: &World) -> Vec<u8> {
    let mut bytes = vec![0; 0x4_0000];
    let start = GuestAddress(area(TO_GUEST));
    world.host.memory().read_slice(&mut bytes, start).unwrap();
    bytes
}

#[test]
fn one_queue_is_reset_while_the_other_goes_on() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        for round in 0..3 {
            world.send(Header::default(), &frame(60));
            assert!(world.at_host().is_some());
            world.driver.select(FROM_GUEST);
            world.driver.write(QUEUE_RESET, &1u16.to_le_bytes());
            world.turn();
            assert_eq!(world.driver.u16(QUEUE_RESET), 0);
            world.offer(2048);
            world.host_sends(Header::default(), &frame(61 + round));
            let got = world.received().map(|(_, got)| got);
            assert_eq!(got, Some(frame(61 + round)));
            world.from_guest = queue(&world.host, FROM_GUEST, world.features);
            world.set_up(FROM_GUEST);
            world.turn();
        }
        world.send(Header::default(), &frame(62));
        assert_eq!(world.at_host().map(|(_, f)| f), Some(frame(62)));
    });
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    each_layout(|rings| {
        let mut world = World::new(rings, u64::MAX);
        let outside = Buffer {
            addr: MEMORY_SIZE - 8,
            len: 16,
            device_writes: false,
        };
        world.from_guest.ring.add(&[outside]).unwrap();
        world.from_guest.ring.publish();
        world.driver.notify(FROM_GUEST);
        world.turn();
        assert!(world.needs_reset());
        world.reset();
        world.start();
        world.send(Header::default(), &frame(60));
        assert_eq!(world.at_host().map(|(_, f)| f), Some(frame(60)));
    });
}

#[test]
fn a_ring_that_cannot_be_stops_the_device() {
    let mut world = World::new(RingFeatures::default(), u64::MAX);
    world.reset();
    assert!(world.driver.negotiate(world.features));
    world.from_guest.config.desc = MEMORY_SIZE - 16;
    world.set_up(TO_GUEST);
    world.set_up(FROM_GUEST);
    world.driver.set_status(status::DRIVER_OK);
    world.turn();
    assert!(world.needs_reset());
}

#[test]
fn a_tap_that_fails_takes_the_link_down_and_the_thread_lives() {
    // It can be read and written, but nobody can wait for it.
    let file = std::fs::File::open("/dev/null").unwrap();
    let (peer, _) = UnixDatagram::pair().unwrap();
    let port = Port::stand_in(file.into());
    let mut world = World::with_port(RingFeatures::default(), u64::MAX, port, peer);
    for _ in 0..2 {
        assert_eq!(world.driver.u16(DEVICE + 6) & LINK_UP, 0);
        assert!(!world.needs_reset());
        world.reset();
        world.start();
    }
}

#[test]
fn segmentation_without_checksums_is_no_set_of_features() {
    let world = World::new(RingFeatures::default(), u64::MAX);
    assert!(world.net.accepts(world.features));
    assert!(!world.net.accepts(world.features & !F_CSUM));
    assert!(!world.net.accepts(world.features & !F_GUEST_CSUM));
    assert!(world.net.accepts(world.features & !OFFLOADS));
}
