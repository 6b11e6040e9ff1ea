//! The two data paths against each other, and the back-end against front-ends that a test plays by hand.
#![allow(unsafe_code)] // tests look at shared memory

extern crate std;

use std::vec;
use std::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::{Buffer, DriverRing, RingConfig, Used, split};

use crate::joined::{self, Silent};
use crate::peer::{PeerPort, Vring};
use crate::port::{Frame, MAX_FRAME, Port};

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

#[test]
fn frames_arrive_unchanged_in_both_directions_many_times_round_the_ring() {
    let size = 64;
    let bed = Bed::new(joined::memory_needed(size));
    let (mut front, mut back) = joined::join(bed.memory, START, size, false).unwrap();
    for round in 0..200 {
        for len in [60, 64, 1518] {
            let out = frames(32, len, round);
            assert_eq!(send(&mut back, &out), 32);
            assert_eq!(receive(&mut front, 64), out);
            assert_eq!(send(&mut front, &out), 32);
            assert!(!front.drained().unwrap());
            assert_eq!(receive(&mut back, 64), out);
            assert!(front.drained().unwrap());
        }
    }
}

#[test]
fn a_full_ring_takes_no_more_and_loses_nothing() {
    let size = 16;
    let bed = Bed::new(joined::memory_needed(size));
    let (mut front, mut back) = joined::join(bed.memory, START, size, false).unwrap();
    let out = frames(40, 100, 0);
    assert_eq!(send(&mut back, &out), 16);
    assert_eq!(send(&mut back, &out[16..]), 0);
    assert_eq!(receive(&mut front, 40), out[..16]);
    assert_eq!(send(&mut front, &out), 16);
    assert_eq!(send(&mut front, &out[16..]), 0);
    assert_eq!(receive(&mut back, 5), out[..5]);
    assert_eq!(send(&mut front, &out[16..]), 5);
    assert_eq!(receive(&mut back, 40), out[5..21]);
}

/// A front-end played by hand: rings and 64 KiB of buffers in one bed.
struct ByHand {
    bed: Bed,
    rx: split::Driver<Linear>,
    tx: split::Driver<Linear>,
    back: PeerPort<split::Device<Linear>, Silent>,
}

const BUFFERS: u64 = START + 0x8000;

impl ByHand {
    fn new() -> Self {
        let bed = Bed::new(0x20000);
        let config = |at: u64| RingConfig {
            size: 16,
            desc: at,
            driver: at + 0x1000,
            device: at + 0x2000,
            event_idx: false,
            in_order: false,
        };
        let (rx, tx) = (config(START), config(START + 0x3000));
        let vring = |config| Vring {
            ring: split::Device::new(bed.memory, config).unwrap(),
            call: Silent,
            kicks: true,
        };
        let back = PeerPort::new(bed.memory, vring(&rx), vring(&tx));
        Self {
            rx: split::Driver::new(bed.memory, &rx).unwrap(),
            tx: split::Driver::new(bed.memory, &tx).unwrap(),
            back,
            bed,
        }
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

#[test]
fn a_frame_is_scattered_over_a_chain_and_gathered_from_one() {
    let mut hand = ByHand::new();
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

#[test]
fn buffers_that_cannot_hold_a_frame_come_back_empty_and_untouched() {
    let mut hand = ByHand::new();
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

#[test]
fn what_is_no_frame_is_not_shown() {
    let mut hand = ByHand::new();
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

#[test]
fn an_address_beyond_the_window_breaks_the_ring_and_touches_nothing() {
    for addr in [0, START - 8, START + 0x1ffff, u64::MAX - 5] {
        let mut hand = ByHand::new();
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

#[test]
fn a_ring_whose_kicks_do_not_arrive_is_never_slept_on() {
    let size = 16;
    let bed = Bed::new(joined::memory_needed(size));
    let (mut front, mut back) = joined::join(bed.memory, START, size, false).unwrap();
    assert!(back.arm(true, false), "no kicks here");
    assert!(!front.arm(true, false));
    send(&mut back, &frames(1, 64, 0));
    assert!(front.arm(true, false), "a frame is there already");
}
