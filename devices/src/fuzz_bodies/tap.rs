//! A virtio-net over a tap, for which a pair of sockets stands in.

use std::os::unix::net::UnixDatagram;

use virtqueue::net::{HEADER_LEN, Header, Offloads};

use super::*;
use crate::virtio::harness::{QUEUE_RESET, STATUS};
use crate::virtio_net::tap::{Server, TapConfig, TapNet};

const RING_SIZE: u16 = 32;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A driver that sends whatever packets, in whatever pieces, from rings that it breaks, and takes those of a host that sends whatever. The host gets whole packets
/// only, and headers only that fit the packet and what was negotiated.
pub fn fuzz_tap(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let (tap, peer) = UnixDatagram::pair().expect("a socket pair");
    tap.set_nonblocking(true).expect("a socket");
    peer.set_nonblocking(true).expect("a socket");
    let config = TapConfig {
        name: "stand-in".into(),
        server: Server::Thread,
        queue_size: RING_SIZE,
        rings: RingFeatures {
            csum: true,
            tso: true,
            indirect: true,
            ..RingFeatures::default()
        },
        mac: [2, 0, 0, 1, 2, 3],
    };
    let net = TapNet::over(config, tap.into(), host.clone()).expect("a configuration");
    let mut events: Events = EventManager::new().expect("epoll");
    events.add_subscriber(net.subscriber());
    let function = VirtioPci::new(net, host.clone()).expect("a device");
    let driver = Driver::new(function, host.clone());
    driver.enable_msix();
    let mut rings = [1, 4].map(|at| Ring::new(&host, at * RINGS, RING_SIZE));
    // Without offloads, in some.
    let features = driver.offered() & !(u64::from(input.byte()) << 8);
    start(&driver, &rings, features);
    let mut slot = 0;
    while !input.over() {
        match input.byte() % 8 {
            0..=2 => {
                let pieces = 1 + u16::from(input.byte() % 3);
                let ring = &mut rings[1];
                let head = slot;
                for piece in 0..pieces {
                    let (kind, len) = (input.byte(), input.byte());
                    let bytes = input.slice(len.into());
                    let at = ring.buffer(slot);
                    ring.put(at, bytes);
                    let next = (slot + 1) % RING_SIZE;
                    let more = if piece + 1 < pieces { NEXT } else { 0 };
                    let (at, len) = match kind {
                        0..0xc0 => (at, u32::from(len)),
                        // As long as a packet of many segments.
                        0xc0..0xe0 => (at, u32::from(kind & 0x1f) << 12),
                        _ => (u64::from(kind) << 20, u32::MAX >> (kind & 0x1f)),
                    };
                    ring.set_desc(
                        slot,
                        at,
                        len,
                        more | if kind & 0x20 != 0 { WRITE } else { 0 },
                        next,
                    );
                    slot = next;
                }
                ring.publish(head);
                driver.notify(1);
            }
            3 => {
                rings[0].offer(u32::from(input.half()) >> 4);
                driver.notify(0);
            }
            4 => {
                let len = input.byte();
                // One that does not fit is not sent.
                let _ = peer.send(input.slice(len.into()));
            }
            5 => {
                let ring = &rings[usize::from(input.byte() % 2)];
                let at = ring.desc() + u64::from(input.half() % 0x3000);
                let len = input.byte() % 16;
                ring.put(at, input.slice(len.into()));
            }
            6 => match input.byte() % 4 {
                0 => {
                    driver.write(STATUS, &[0]);
                    turn(&mut events);
                    rings = [1, 4].map(|at| Ring::new(&host, at * RINGS, RING_SIZE));
                    rings
                        .iter()
                        .for_each(|ring| ring.put(ring.desc(), &[0; 0x3000]));
                    start(&driver, &rings, features);
                }
                queue => {
                    driver.select((queue % 2).into());
                    driver.write(QUEUE_RESET, &1u16.to_le_bytes());
                }
            },
            _ => {}
        }
        turn(&mut events);
        let mut packet = vec![0; 1 << 17];
        while let Ok(len) = peer.recv(&mut packet) {
            let (head, frame) = packet[..len]
                .split_first_chunk::<HEADER_LEN>()
                .expect("a packet has a header");
            let header = Header::decode(*head);
            let checked = Offloads::of_driver(features).check(&header, frame.len());
            assert_eq!(checked, Some(header), "a header that does not fit");
        }
    }
}

fn start(driver: &Driver, rings: &[Ring; 2], features: u64) {
    assert!(driver.negotiate(features));
    for (queue, ring) in (0..).zip(rings) {
        driver.setup_queue(queue, ring, queue);
    }
    driver.set_status(status::DRIVER_OK);
}
