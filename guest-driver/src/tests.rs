//! The two data paths against each other, and the back-end against front-ends that a test plays by hand.
#![allow(unsafe_code)] // tests look at shared memory

extern crate std;

use std::vec;
use std::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, RingConfig, Used};

use crate::joined::{self, JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use crate::net_port::{BUFFER_STRIDE, FRONT, Shape, TxShape};
use crate::peer::{PeerPort, Vring};
use crate::port::{Frame, MAX_FRAME, Port};

/// Runs each of these for both layouts.
macro_rules! both_layouts {
    ($($name:ident),* $(,)?) => {
        mod split_rings {
            $(#[test]
            fn $name() {
                super::$name::<super::Split>();
            })*
        }
        mod packed_rings {
            $(#[test]
            fn $name() {
                super::$name::<super::Packed>();
            })*
        }
    };
}

mod group;
mod offload;

/// Zeroed memory, aligned to a page, at device address 0x10000.
struct Bed {
    _words: Vec<[u64; 512]>,
    memory: Linear,
}

const START: u64 = 0x10000;

impl Bed {
    fn new(len: u64) -> Self {
        let pages = usize::try_from(len).unwrap().div_ceil(4096) + 1;
        let mut words = vec![[0u64; 512]; pages];
        let base = words.as_mut_ptr().cast::<u8>();
        let skip = base.align_offset(4096);
        // SAFETY: the vector lives as long as the bed and is not touched otherwise.
        let memory = unsafe { Linear::new(base.add(skip), START, ((pages - 1) * 4096) as u64) };
        Self {
            _words: words,
            memory,
        }
    }
}

fn send(port: &mut impl Port, frames: &[Vec<u8>]) -> usize {
    let len = frames[0].len();
    port.tx_burst(frames.len(), len, |i, slot| {
        assert!(slot.write(0, &frames[i]))
    })
    .unwrap()
}

fn receive(port: &mut impl Port, count: usize) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    port.rx_burst(count, |frame: &Frame| {
        let mut bytes = vec![0; frame.len()];
        assert!(frame.read(0, &mut bytes));
        got.push(bytes);
    })
    .unwrap();
    got
}

fn frames(count: usize, len: usize, salt: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| {
            (0..len)
                .map(|j| (i * 31 + j * 7 + salt).to_le_bytes()[0])
                .collect()
        })
        .collect()
}

/// Every way in which two ends can be joined that changes what happens to a frame.
fn configs(size: u16) -> impl Iterator<Item = JoinConfig> {
    let flags = [false, true];
    let shapes = [TxShape::Direct, TxShape::Chain, TxShape::Indirect];
    let rings = flags.into_iter().flat_map(move |packed| {
        flags.into_iter().map(move |in_order| JoinConfig {
            packed,
            size: if packed { size + 3 } else { size },
            in_order,
            event_idx: in_order,
            indirect: true,
            ..JoinConfig::default()
        })
    });
    rings.flat_map(move |config| {
        shapes.into_iter().flat_map(move |tx| {
            [(false, 1530), (true, 1530), (true, 300)].map(|(mergeable, rx_buffer)| JoinConfig {
                shape: Shape {
                    tx,
                    rx_buffer,
                    mergeable,
                    offloads: 0,
                },
                ..config
            })
        })
    })
}

fn join(config: &JoinConfig) -> (Bed, JoinedFrontEnd<Silent>, JoinedBackEnd<Silent>) {
    let bed = Bed::new(joined::memory_needed(config).unwrap());
    let (front, back) = joined::join(bed.memory, START, config, Silent, Silent, false).unwrap();
    (bed, front, back)
}

#[test]
fn frames_arrive_unchanged_in_both_directions_many_times_round_the_ring() {
    for config in configs(64) {
        let (_bed, mut front, mut back) = join(&config);
        for round in 0..60 {
            for (count, len) in [(30, 60), (7, 64), (10, 1518)] {
                let out = frames(count, len, round);
                assert_eq!(send(&mut back, &out), count, "{config:?}");
                assert_eq!(receive(&mut front, 64), out, "{config:?}");
                assert_eq!(send(&mut front, &out), count, "{config:?}");
                assert!(!front.drained().unwrap());
                assert_eq!(receive(&mut back, 64), out, "{config:?}");
                assert!(front.drained().unwrap());
            }
        }
    }
}

#[test]
fn a_full_ring_takes_no_more_and_loses_nothing() {
    for config in configs(16) {
        let (_bed, mut front, mut back) = join(&config);
        let out = frames(60, 100, 0);
        let room = usize::from(config.size);
        assert_eq!(send(&mut back, &out), room);
        assert_eq!(send(&mut back, &out[room..]), 0);
        assert_eq!(receive(&mut front, 60), out[..room]);
        let room = if config.shape.tx == TxShape::Chain {
            room / 2
        } else {
            room
        };
        assert_eq!(send(&mut front, &out), room);
        assert_eq!(send(&mut front, &out[room..]), 0);
        assert_eq!(receive(&mut back, 5), out[..5]);
        assert_eq!(send(&mut front, &out[room..]), 5);
        assert_eq!(receive(&mut back, 60), out[5..room + 5]);
    }
}

#[test]
fn a_frame_for_which_there_are_not_enough_buffers_waits_for_them() {
    for config in configs(16).filter(|config| config.shape.rx_buffer == 300) {
        let (_bed, mut front, mut back) = join(&config);
        let out = frames(8, 1518, 1);
        let fit = usize::from(config.size) / 6; // 1530 bytes in buffers of 300
        assert_eq!(send(&mut back, &out), fit, "{config:?}");
        assert_eq!(send(&mut back, &out[fit..]), 0);
        // A burst of one buffer at a time: the frame shows when its last one has come.
        let mut got = Vec::new();
        for _ in 0..6 * fit {
            got.extend(receive(&mut front, 1));
        }
        assert_eq!(got, out[..fit]);
        assert_eq!(send(&mut back, &out[fit..]), fit);
        assert_eq!(receive(&mut front, 64), out[fit..2 * fit]);
    }
}

#[test]
fn a_lying_buffer_count_shows_no_frame_that_is_too_long() {
    let config = JoinConfig {
        shape: Shape {
            mergeable: true,
            ..Shape::default()
        },
        ..JoinConfig::default()
    };
    let (bed, mut front, mut back) = join(&config);
    let out = frames(16, 1518, 1);
    assert_eq!(send(&mut back, &out), 16);
    // The first receive pool begins behind the first ring; each frame says it goes on for ever.
    let areas = Split::area_sizes(config.size).unwrap();
    let pool = areas
        .iter()
        .map(|len| len.next_multiple_of(4096) as u64)
        .sum::<u64>()
        + START;
    for buffer in 0..16 {
        let header = bed
            .memory
            .ptr(pool + buffer * BUFFER_STRIDE as u64 + FRONT as u64, 12)
            .unwrap();
        // SAFETY: the pointer was checked, and both ends are idle.
        unsafe { header.add(10).cast::<u16>().write_unaligned(u16::MAX) };
    }
    assert_eq!(receive(&mut front, 64), Vec::<Vec<u8>>::new());
}

/// A front-end played by hand: rings and 64 KiB of buffers in one bed.
struct ByHand<L: Layout> {
    bed: Bed,
    rx: L::Driver<Linear>,
    tx: L::Driver<Linear>,
    back: PeerPort<L::Device<Linear>, Silent>,
}

const BUFFERS: u64 = START + 0x8000;

impl<L: Layout> ByHand<L> {
    fn new() -> Self {
        Self::new_with(0)
    }

    /// With these features.
    fn new_with(features: u64) -> Self {
        Self::new_in(false, features)
    }

    /// In order, or in any.
    fn new_in(in_order: bool, features: u64) -> Self {
        let bed = Bed::new(0x20000);
        let [rx, tx] = Self::rings(in_order);
        Self {
            rx: L::driver(bed.memory, &rx).unwrap(),
            tx: L::driver(bed.memory, &tx).unwrap(),
            back: Self::back(&bed, in_order, features, [L::FRESH; 2]),
            bed,
        }
    }

    fn rings(in_order: bool) -> [RingConfig; 2] {
        [START, START + 0x3000].map(|at| RingConfig {
            size: 16,
            desc: at,
            driver: at + 0x1000,
            device: at + 0x2000,
            event_idx: false,
            in_order,
            indirect: false,
        })
    }

    /// A back-end that begins at `bases`.
    fn back(
        bed: &Bed,
        in_order: bool,
        features: u64,
        bases: [u32; 2],
    ) -> PeerPort<L::Device<Linear>, Silent> {
        let [rx, tx] = Self::rings(in_order);
        let vring = |config, base| Vring {
            ring: L::device_at(bed.memory, &config, base).unwrap(),
            call: Silent,
            kicks: true,
            record: None,
        };
        let [to_peer, from_peer] = [vring(rx, bases[0]), vring(tx, bases[1])];
        PeerPort::new(bed.memory, features, to_peer, from_peer)
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        // SAFETY: `ptr` checked the range; nobody writes it now.
        unsafe { std::slice::from_raw_parts(self.bed.memory.ptr(addr, len).unwrap(), len) }.to_vec()
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        // SAFETY: `ptr` checked the range; nobody else touches it now.
        unsafe {
            self.bed
                .memory
                .ptr(addr, bytes.len())
                .unwrap()
                .copy_from(bytes.as_ptr(), bytes.len())
        };
    }
}

fn piece(offset: u64, len: u32, device_writes: bool) -> Buffer {
    Buffer {
        addr: BUFFERS + offset,
        len,
        device_writes,
    }
}

fn used(ring: &mut impl DriverRing) -> Vec<Used> {
    let mut out = [Used::default(); 16];
    let n = ring.take(&mut out).unwrap();
    out[..n].to_vec()
}

fn a_frame_is_scattered_over_a_chain_and_gathered_from_one<L: Layout>() {
    let mut hand = ByHand::<L>::new();
    let frame = &frames(1, 200, 3)[0];
    let id = hand
        .rx
        .add(&[
            piece(0, 12, true),
            piece(0x1000, 50, true),
            piece(0x2000, 500, true),
        ])
        .unwrap();
    hand.rx.publish();
    assert_eq!(send(&mut hand.back, std::slice::from_ref(frame)), 1);
    assert_eq!(used(&mut hand.rx), [Used { id, len: 212 }]);
    assert_eq!(
        hand.bytes(BUFFERS, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(hand.bytes(BUFFERS + 0x1000, 50), frame[..50]);
    assert_eq!(hand.bytes(BUFFERS + 0x2000, 150), frame[50..]);
    assert_eq!(hand.bytes(BUFFERS + 0x2000 + 150, 350), vec![0; 350]);

    hand.put(BUFFERS + 0x3000, frame);
    let id = hand
        .tx
        .add(&[
            piece(0, 12, false),
            piece(0x3000, 80, false),
            piece(0x3050, 120, false),
        ])
        .unwrap();
    hand.tx.publish();
    assert_eq!(receive(&mut hand.back, 4), std::slice::from_ref(frame));
    assert_eq!(used(&mut hand.tx), [Used { id, len: 0 }]);
}

fn buffers_that_cannot_hold_a_frame_come_back_empty_and_untouched<L: Layout>() {
    let mut hand = ByHand::<L>::new();
    let frame = &frames(1, 200, 3)[0];
    for pieces in [
        &[piece(0, 211, true)][..],
        &[piece(0, 12, true), piece(0x100, 199, true)],
        &[piece(0, 400, false)],
    ] {
        hand.rx.add(pieces).unwrap();
        hand.rx.publish();
        assert_eq!(send(&mut hand.back, std::slice::from_ref(frame)), 1);
        assert_eq!(used(&mut hand.rx)[0].len, 0);
        assert_eq!(hand.bytes(BUFFERS + 300, 100), vec![0; 100]);
    }
    assert_eq!(hand.back.dropped(), 3);
}

fn what_is_no_frame_is_not_shown<L: Layout>() {
    let mut hand = ByHand::<L>::new();
    let too_long = u32::try_from(MAX_FRAME + 13).unwrap();
    for pieces in [
        &[piece(0, 12, false)][..],
        &[piece(0, 3, false)],
        &[piece(0, too_long, false)],
        &[piece(0, 100, true)],
        &[piece(0, 1000, false), piece(0x1000, 1000, false)],
    ] {
        hand.tx.add(pieces).unwrap();
        hand.tx.publish();
        assert_eq!(receive(&mut hand.back, 4), Vec::<Vec<u8>>::new());
        assert_eq!(used(&mut hand.tx).len(), 1);
    }
    assert_eq!(hand.back.dropped(), 5);
}

fn an_address_beyond_the_window_breaks_the_ring_and_touches_nothing<L: Layout>() {
    for addr in [0, START - 8, START + 0x1ffff, u64::MAX - 5] {
        let mut hand = ByHand::<L>::new();
        hand.tx
            .add(&[Buffer {
                addr,
                len: 64,
                device_writes: false,
            }])
            .unwrap();
        hand.tx.publish();
        let mut seen = 0;
        assert!(hand.back.rx_burst(4, |_| seen += 1).is_err());
        assert!(hand.back.rx_burst(4, |_| seen += 1).is_err());
        assert_eq!(seen, 0);
    }
}

/// What a back-end reads of buffers that it may only write is all-ones, and so may be what lay in a buffer before.
fn every_frame_has_its_header_whatever_its_buffer_reads_as<L: Layout>() {
    let mut hand = ByHand::<L>::new();
    let all = frames(3, 200, 3);
    let offsets = [0, 0x1000, 0x2000];
    for (offset, before) in offsets.into_iter().zip([0xFF, 0x00, 0xFF]) {
        hand.put(BUFFERS + offset, &[before; 300]);
        hand.rx.add(&[piece(offset, 300, true)]).unwrap();
    }
    hand.rx.publish();
    assert_eq!(send(&mut hand.back, &all), 3);
    for (offset, frame) in offsets.into_iter().zip(&all) {
        assert_eq!(
            hand.bytes(BUFFERS + offset, 12),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
        );
        assert_eq!(hand.bytes(BUFFERS + offset + 12, 200), *frame);
    }
}

both_layouts!(
    a_frame_is_scattered_over_a_chain_and_gathered_from_one,
    buffers_that_cannot_hold_a_frame_come_back_empty_and_untouched,
    what_is_no_frame_is_not_shown,
    an_address_beyond_the_window_breaks_the_ring_and_touches_nothing,
    every_frame_has_its_header_whatever_its_buffer_reads_as,
);

#[test]
fn a_ring_whose_kicks_do_not_arrive_is_never_slept_on() {
    for config in configs(16) {
        let (_bed, mut front, mut back) = join(&config);
        assert!(back.arm(true, false), "no kicks here");
        assert!(!front.arm(true, false));
        send(&mut back, &frames(1, 64, 0));
        assert!(front.arm(true, false), "a frame is there already");
    }
}

/// Counts how often it was rung.
#[derive(Clone, Default)]
struct Bell(std::sync::Arc<core::sync::atomic::AtomicU64>);

impl Bell {
    fn rung(&self) -> u64 {
        self.0.load(core::sync::atomic::Ordering::Relaxed)
    }
}

impl crate::virtio_pci::Notify for Bell {
    fn notify(&self) {
        self.0.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn each_burst_is_counted_as_one_that_notified_or_one_that_was_not_to() {
    use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};
    let all = [0, HOST_OFFLOADS | GUEST_OFFLOADS];
    for (packed, offloads) in [
        (false, all[0]),
        (true, all[0]),
        (false, all[1]),
        (true, all[1]),
    ] {
        let config = JoinConfig {
            packed,
            size: 64,
            shape: Shape {
                mergeable: true,
                offloads,
                ..Shape::default()
            },
            ..JoinConfig::default()
        };
        let bed = Bed::new(joined::memory_needed(&config).unwrap());
        let bells = [Bell::default(), Bell::default()];
        let [kicks, calls] = bells.clone();
        let (mut front, mut back) =
            joined::join(bed.memory, START, &config, kicks, calls, true).unwrap();
        let frames = vec![vec![7; 60]; 3];
        let turn = |front: &mut JoinedFrontEnd<Bell>, back: &mut JoinedBackEnd<Bell>| {
            for _ in 0..5 {
                assert_eq!(send(front, &frames), 3);
                assert_eq!(receive(back, 8), frames);
                assert_eq!(send(back, &frames), 3);
                assert_eq!(receive(front, 8), frames);
                // Nothing to do is no burst.
                assert!(receive(back, 8).is_empty() && receive(front, 8).is_empty());
            }
        };
        let before = [front.notices(), back.notices()];
        front.disarm();
        back.disarm();
        turn(&mut front, &mut back);
        let since = |now: [crate::port::Notices; 2], before: [crate::port::Notices; 2]| {
            [0, 1].map(|i| {
                let since = now[i].since(before[i]);
                (since.given, since.suppressed)
            })
        };
        for (now, before) in [front.notices(), back.notices()].into_iter().zip(before) {
            assert_eq!(since(now, before), [(0, 5); 2], "{config:?}");
        }
        // And where the other side asks for them, each is what was rung.
        let rung = [&bells[0], &bells[1]].map(Bell::rung);
        let before = [front.notices(), back.notices()];
        for _ in 0..4 {
            front.arm(true, true);
            back.arm(true, true);
            turn(&mut front, &mut back);
        }
        for (i, now) in [front.notices(), back.notices()].into_iter().enumerate() {
            let [sent, received] = since(now, before[i]);
            assert_eq!(sent.0 + received.0, bells[i].rung() - rung[i], "{config:?}");
            assert!(sent.0 > 0, "{config:?}");
            assert_eq!((sent.0 + sent.1, received.0 + received.1), (20, 20));
        }
    }
}
