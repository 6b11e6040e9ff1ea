//! Each kind of work on one end of joined rings, the test at the other and in place of the kernel.

use std::slice;

use guest_driver::joined::{JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use guest_driver::net_port::Shape;
use virtqueue::net::{GUEST_OFFLOADS, HDR_GSO_TCPV4, HOST_OFFLOADS};

use super::*;
use crate::testing::*;

struct Rig<W> {
    front: JoinedFrontEnd<Silent>,
    back: JoinedBackEnd<Silent>,
    work: W,
    stats: Stats,
}

impl<W: Work> Rig<W> {
    fn new(config: &JoinConfig, work: W) -> Self {
        let (front, back) = join(config, Silent, Silent);
        Self {
            front,
            back,
            work,
            stats: Stats::default(),
        }
    }

    /// Turns until nothing moves.
    fn turn(&mut self) {
        for _ in 0..1000 {
            if !self.work.turn(&mut self.back, &mut self.stats).unwrap() {
                return;
            }
        }
        panic!("work that never ends");
    }
}

#[test]
fn frames_cross_the_bridge_unchanged_and_in_order_many_times_round_the_rings() {
    const LENS: [usize; 6] = [60, 60, 1514, 14, 1514, 1518];
    for config in configs() {
        let (nic, kernel) = socket();
        let mut rig = Rig::new(&config, Bridge::new(nic, None));
        let mut number = 0;
        for _ in 0..100 {
            let frames: Vec<_> = LENS
                .into_iter()
                .map(|len| {
                    number += 1;
                    frame(number, len)
                })
                .collect();
            let with_headers: Vec<_> = frames.iter().map(|frame| packet(frame)).collect();
            assert_eq!(send(&mut rig.front, &frames), LENS.len());
            for packet in &with_headers {
                kernel.send(packet).unwrap();
            }
            rig.turn();
            assert_eq!(packets(&kernel), with_headers, "{config:?}");
            assert_eq!(receive(&mut rig.front), frames, "{config:?}");
            assert!(rig.front.drained().unwrap());
        }
        let bytes = 100 * LENS.iter().sum::<usize>() as u64;
        let flow = crate::stats::Flow { frames: 600, bytes };
        assert_eq!((rig.stats.from_peer, rig.stats.to_peer), (flow, flow));
        assert_eq!(rig.stats.dropped, Default::default());
    }
}

#[test]
fn a_peer_that_has_moved_is_announced_by_a_frame_from_its_address_to_everybody() {
    let (nic, kernel) = socket();
    let mut bridge = Bridge::new(nic, None);
    bridge.announce([2, 0, 0, 0xab, 0xcd, 0xef]);
    let mut frame = vec![0xff; 6];
    frame.extend([
        2, 0, 0, 0xab, 0xcd, 0xef, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3,
    ]);
    frame.extend([2, 0, 0, 0xab, 0xcd, 0xef, 0, 0, 0, 0]);
    frame.extend([2, 0, 0, 0xab, 0xcd, 0xef, 0, 0, 0, 0]);
    frame.resize(60, 0);
    let header = vec![0; HEADER_LEN];
    assert_eq!(packets(&kernel), [[header, frame].concat()]);
}

#[test]
fn what_the_mtu_does_not_allow_goes_nowhere_and_is_counted() {
    let (mut nic, kernel) = socket();
    nic.mtu = 1000;
    let mut rig = Rig::new(&JoinConfig::default(), Bridge::new(nic, None));
    // A frame may have a VLAN tag beside its Ethernet header.
    let frames = [1014, 1018, 1019, 1518, 60].map(|len| frame(len, len));
    assert_eq!(send(&mut rig.front, &frames), 5);
    rig.turn();
    let passed = [0, 1, 4].map(|i: usize| packet(&frames[i]));
    assert_eq!(packets(&kernel), passed);
    assert_eq!(rig.stats.dropped.too_long, 2);

    // The MTU follows the interface.
    rig.work.nic.mtu = 1500;
    rig.work.refresh();
    assert_eq!(send(&mut rig.front, &frames[2..]), 3);
    rig.turn();
    assert_eq!(packets(&kernel).len(), 3);
    assert_eq!(rig.stats.dropped.too_long, 2);

    // Towards the peer, the ring's frames set the limit.
    for len in [1518, 1519, 2000] {
        kernel.send(&packet(&frame(1, len))).unwrap();
    }
    rig.turn();
    assert_eq!(receive(&mut rig.front), [frame(1, 1518)]);
    assert_eq!(rig.stats.dropped.too_long, 4);
}

/// Rings over which everything may be left to the other side.
fn offloaded() -> JoinConfig {
    JoinConfig {
        size: 256,
        shape: Shape {
            mergeable: true,
            offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
            ..Shape::default()
        },
        ..JoinConfig::default()
    }
}

#[test]
fn what_is_left_to_the_other_side_crosses_the_bridge_with_its_header_and_no_lie_does() {
    let (nic, kernel) = socket();
    let mut rig = Rig::new(&offloaded(), Bridge::new(nic, None));
    rig.work.link(true, &mut rig.stats);
    let header = Header {
        flags: HDR_F_NEEDS_CSUM,
        gso_type: HDR_GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    for len in [1514, 9000, 65549] {
        let out = frame(len, len);
        let with_header = [&header.encode()[..], &out].concat();
        // The peer's, longer than any MTU.
        let build = |_, slot: &mut Slot| assert!(slot.write(0, &out));
        assert_eq!(rig.front.tx_offloaded(&header, 1, len, build), Ok(1));
        rig.turn();
        assert_eq!(packets(&kernel), slice::from_ref(&with_header));
        // The kernel's, and among them some that make no sense.
        for lie in [
            Header {
                csum_start: u16::MAX,
                ..header
            },
            Header {
                gso_type: 0x81,
                ..header
            },
            Header {
                gso_size: 0,
                ..header
            },
        ] {
            kernel.send(&[&lie.encode()[..], &out].concat()).unwrap();
        }
        kernel.send(&with_header).unwrap();
        let mut got = Vec::new();
        for _ in 0..5 {
            rig.turn();
            let take = |frame: &Frame| {
                let mut bytes = vec![0; frame.len()];
                assert!(frame.read(0, &mut bytes));
                got.push((frame.header(), bytes));
            };
            rig.front.rx_burst(8, take).unwrap();
        }
        assert_eq!(got, [(Some(header), out)]);
    }
    assert_eq!(rig.stats.dropped.bad_header, 9);
    let all = Offloads::of_device(GUEST_OFFLOADS);
    assert_eq!(rig.work.nic.offloads, [all]);
    // The next peer may take less.
    rig.work.link(false, &mut rig.stats);
    assert_eq!(rig.work.nic.offloads, [all, Offloads::default()]);
}

#[test]
fn packets_that_need_an_offload_or_hold_no_frame_go_nowhere_and_are_counted() {
    let (nic, kernel) = socket();
    let mut rig = Rig::new(&JoinConfig::default(), Bridge::new(nic, None));
    let good = frame(1, 100);
    for (at, value) in [(0, 1), (1, 1), (1, 0x80)] {
        let mut bad = packet(&good);
        bad[at] = value;
        kernel.send(&bad).unwrap();
    }
    kernel.send(&[0; 12]).unwrap();
    kernel.send(&[0; 5]).unwrap();
    // Says only that the checksum is right.
    let mut validated = packet(&good);
    validated[0] = 2;
    kernel.send(&validated).unwrap();
    rig.turn();
    assert_eq!(receive(&mut rig.front), [good]);
    assert_eq!(rig.stats.dropped.bad_header, 5);
}

#[test]
fn a_peer_that_takes_nothing_loses_nothing_and_fills_no_memory() {
    for config in configs() {
        let (nic, kernel) = socket();
        let mut rig = Rig::new(&config, Bridge::new(nic, None));
        let mut sent = Vec::new();
        let mut got = Vec::new();
        let mut stuck = 0;
        while got.len() < 400 {
            // The kernel's end is full after a while: that is where packets wait.
            let next = frame(sent.len(), 60 + 1000 * (sent.len() % 2));
            if sent.len() < 400 && kernel.send(&packet(&next)).is_ok() {
                sent.push(next);
                continue;
            }
            rig.turn();
            let waiting = rig.work.wants().room;
            stuck += usize::from(waiting);
            assert_ne!(rig.work.wants().fd.is_some(), waiting);
            got.extend(receive(&mut rig.front));
        }
        assert!(stuck > 0, "the ring was full at least once");
        assert!(got == sent, "all in order, {config:?}");
        assert_eq!(rig.stats.dropped, Default::default());
    }
}

#[test]
fn frames_that_wait_for_a_peer_that_leaves_are_counted_and_the_next_peer_does_not_get_them() {
    let config = JoinConfig {
        size: 16,
        ..JoinConfig::default()
    };
    let (nic, kernel) = socket();
    let carrier = nic.carrier.clone();
    let mut rig = Rig::new(&config, Bridge::new(nic, None));
    rig.work.link(true, &mut rig.stats);
    for number in 0..20 {
        // Fewer than 20 fit into a socket's queue on some hosts.
        while kernel.send(&packet(&frame(number, 60))).is_err() {
            rig.turn();
        }
    }
    rig.turn();
    rig.work.link(false, &mut rig.stats);
    assert_eq!(*carrier.lock().unwrap(), [true, false]);
    assert_eq!(rig.stats.to_peer.frames + rig.stats.dropped.no_peer, 20);
    assert_eq!(rig.stats.to_peer.frames, 16);
    (rig.front, rig.back) = join(&config, Silent, Silent);
    rig.work.link(true, &mut rig.stats);
    kernel.send(&packet(&frame(99, 60))).unwrap();
    rig.turn();
    assert_eq!(receive(&mut rig.front), [frame(99, 60)]);
}

/// An interface that answers every write with an error.
struct Refusing(Socket, i32);

impl Nic for Refusing {
    fn read(&mut self, _packet: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(None)
    }
    fn write(&mut self, _packet: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(self.1))
    }
    fn mtu(&self) -> Option<usize> {
        None
    }
    fn offloads(&self) -> u64 {
        0
    }
    fn set_offloads(&mut self, _offloads: Offloads) {}
    fn set_carrier(&mut self, _up: bool) {}
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
}

#[test]
fn an_interface_that_is_down_costs_the_frame_and_one_that_is_gone_ends_the_work() {
    for (errno, fatal) in [
        (libc::EIO, false),
        (libc::ENOBUFS, false),
        (libc::EBADFD, true),
    ] {
        let (nic, _kernel) = socket();
        let mut rig = Rig::new(
            &JoinConfig::default(),
            Bridge::new(Refusing(nic, errno), None),
        );
        assert_eq!(send(&mut rig.front, &[frame(1, 60)]), 1);
        let result = rig.work.turn(&mut rig.back, &mut rig.stats);
        assert_eq!(matches!(result, Err(Stop::Nic(_))), fatal, "{errno}");
        assert_eq!(rig.stats.dropped.refused, u64::from(!fatal));
        assert_eq!(rig.stats.from_peer.frames, 0);
    }
}

#[test]
fn mac_swap_sends_every_frame_back_with_its_addresses_exchanged() {
    for config in configs() {
        let mut rig = Rig::new(&config, MacSwap::new(Some(300)));
        for round in 0..100 {
            let frames: Vec<_> = [60, 1518, 13].map(|len| frame(round, len)).into();
            assert_eq!(send(&mut rig.front, &frames), 3);
            assert!(!rig.work.done(&rig.stats));
            rig.turn();
            let swapped: Vec<Vec<u8>> = frames
                .iter()
                .map(|frame| [&frame[6..12], &frame[..6], &frame[12..]].concat())
                .collect();
            assert_eq!(receive(&mut rig.front), swapped, "{config:?}");
        }
        assert!(rig.work.done(&rig.stats));
    }
}

#[test]
fn mac_swap_takes_no_more_than_it_can_send_back() {
    for config in configs() {
        let mut rig = Rig::new(&config, MacSwap::new(None));
        let frames: Vec<_> = (0..200).map(|number| frame(number, 64)).collect();
        let mut sent = 0;
        let mut got = Vec::new();
        // Nothing is received until nothing moves any more.
        for _ in 0..50 {
            sent += send(&mut rig.front, &frames[sent..]);
            rig.turn();
            if sent == 200 {
                break;
            }
            if !rig.work.wants().room {
                continue;
            }
            got.extend(receive(&mut rig.front));
        }
        rig.turn();
        got.extend(receive(&mut rig.front));
        for _ in 0..10 {
            rig.turn();
            got.extend(receive(&mut rig.front));
        }
        assert_eq!(got.len(), 200, "{config:?}");
        for (frame, back) in frames.iter().zip(&got) {
            assert_eq!(frame[12..], back[12..]);
        }
    }
}

#[test]
fn drop_takes_everything_and_counts_it() {
    for config in configs() {
        let mut rig = Rig::new(&config, Drop::new(Some(90)));
        for round in 0..30 {
            assert!(!rig.work.done(&rig.stats));
            let frames: Vec<_> = [60, 1518, 100].map(|len| frame(round, len)).into();
            assert_eq!(send(&mut rig.front, &frames), 3);
            rig.turn();
        }
        assert!(rig.work.done(&rig.stats) && rig.front.drained().unwrap());
        let flow = crate::stats::Flow {
            frames: 90,
            bytes: 30 * 1678,
        };
        assert_eq!(rig.stats.from_peer, flow);
    }
}

#[test]
fn source_sends_its_count_of_numbered_frames_and_one_that_says_so() {
    for config in configs() {
        let mut rig = Rig::new(&config, Source::new(200, Some(500)));
        let format = Format::new(End::BackEnd, 200, 0);
        let mut next = 0;
        let mut ended = None;
        while ended.is_none() {
            rig.turn();
            rig.front
                .rx_burst(256, |frame| match format.check::<EVERY_BYTE>(frame) {
                    Seen::Good(Kind::Data, number) => {
                        assert_eq!(number, next);
                        next += 1;
                    }
                    Seen::Good(Kind::End, count) => ended = Some(count),
                    seen => panic!("{seen:?}"),
                })
                .unwrap();
        }
        assert_eq!((next, ended), (500, Some(500)));
        assert!(rig.work.done(&rig.stats));
        assert_eq!(rig.stats.to_peer.frames, 500);
    }
}

/// A sink's view of these frames of a sequence of six: what each is, and a byte to damage.
fn sink(frames: &[(Kind, u64, Option<usize>)]) -> (Checked, bool) {
    let mut rig = Rig::new(&JoinConfig::default(), Sink::new(100, None));
    let format = Format::new(End::FrontEnd, 100, 0);
    for &(kind, number, damage) in frames {
        let sent = rig.front.tx_burst(1, 100, |_, slot| {
            format.build::<EVERY_BYTE>(slot, kind, number);
            if let Some(at) = damage {
                slot.write(at, &[0xee]);
            }
        });
        assert_eq!(sent, Ok(1));
    }
    rig.turn();
    (rig.stats.checked.unwrap(), rig.work.done(&rig.stats))
}

#[test]
fn sink_sees_what_is_lost_doubled_overtaken_or_changed() {
    use Kind::{Data, End};
    let good = |number| (Data, number, None);
    let whole = [good(0), good(1), good(2), (End, 3, None)];
    let counts = |c: Checked| (c.verified, c.out_of_sequence, c.corrupted);
    assert_eq!(
        sink(&whole),
        (
            Checked {
                verified: 3,
                ..Checked::default()
            },
            true
        )
    );
    let cases: [(&[_], _); 5] = [
        (&[good(0), good(2)], (2, 1, 0)),
        (&[good(0), good(0), good(1)], (3, 1, 0)),
        (&[good(1), good(0), good(2)], (3, 3, 0)),
        (&[good(0), (End, 2, None)], (1, 1, 0)),
        (
            &[good(0), (Data, 1, Some(99)), (Data, 1, Some(3))],
            (1, 0, 2),
        ),
    ];
    for (frames, want) in cases {
        assert_eq!(counts(sink(frames).0), want, "{frames:?}");
    }
    assert!(!sink(&[good(0)]).1, "more may come");
}

#[test]
fn frames_of_a_burst_during_which_the_window_went_go_nowhere() {
    for config in configs() {
        for at in 0..3 {
            let gone = |work: &mut dyn FnMut(&mut Vanishing, &mut Stats)| {
                let (mut front, port, memory) = join_in(&config, Silent, Silent);
                let format = Format::new(End::FrontEnd, 100, 0);
                let sent = front.tx_burst(3, 100, |i, slot| {
                    format.build::<EVERY_BYTE>(slot, Kind::Data, i as u64);
                });
                assert_eq!(sent, Ok(3));
                let mut stats = Stats::default();
                work(&mut Vanishing { port, memory, at }, &mut stats);
                assert_eq!((stats.dropped.torn, stats.from_peer.frames), (3, 0));
                stats
            };
            let (nic, kernel) = socket();
            let mut bridge = Bridge::new(nic, None);
            gone(&mut |port, stats| assert!(bridge.turn(port, stats).unwrap()));
            assert!(packets(&kernel).is_empty(), "{config:?}");
            let mut sink = Sink::new(100, None);
            let stats = gone(&mut |port, stats| assert!(sink.turn(port, stats).unwrap()));
            assert_eq!(stats.checked, Some(Checked::default()), "{config:?}");
        }
    }
}

#[test]
fn frames_of_a_burst_behind_which_the_ring_is_there_are_passed_on() {
    for config in configs() {
        let (nic, kernel) = socket();
        let (mut front, port, memory) = join_in(&config, Silent, Silent);
        let frames = [frame(1, 100), frame(2, 60)];
        assert_eq!(send(&mut front, &frames), 2);
        let mut port = Vanishing {
            port,
            memory,
            at: usize::MAX,
        };
        let mut stats = Stats::default();
        let mut bridge = Bridge::new(nic, None);
        assert!(bridge.turn(&mut port, &mut stats).unwrap());
        assert_eq!(packets(&kernel), frames.map(|frame| packet(&frame)));
        assert_eq!((stats.dropped.torn, stats.from_peer.frames), (0, 2));
    }
}
