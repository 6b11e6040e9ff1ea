//! Workloads on two threads, recorded at both ends.

extern crate std;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use std::{format, thread};

use guest_driver::Port;
use guest_driver::joined::{self, JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use guest_driver::net_port::Shape;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};

use super::*;
use crate::frame::{EVERY_BYTE, Format, Kind, Seen};
use crate::tests::{Bed, Thread};
use crate::{Mode, Work};

/// A clock that every look at it moves on.
fn clock() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

const ALL: Limits = Limits {
    frames: 5000,
    snaplen: 1518,
};

/// Runs a workload at each end, the back-end's first, and returns what was recorded there.
fn run(config: &JoinConfig, works: [Work; 2], run: Run, limits: Limits) -> [Log; 2] {
    let bed = Bed::new(config);
    let (front, back): (JoinedFrontEnd<Silent>, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, config, Silent, Silent, false).unwrap();
    let start = Instant::now();
    let runs = works.map(|work| Run { work, ..run });
    fn end<P: Port + Send>(mut link: Thread<P>, run: Run, limits: Limits) -> Log {
        let mut log = Log::new(limits, clock).unwrap();
        let mut outcome = Outcome::default();
        attempt(&mut link, &run, &mut outcome, &mut log).unwrap();
        assert!(outcome.is_clean(), "{outcome:?}");
        log
    }
    thread::scope(|scope| {
        let [back_run, front_run] = runs;
        let back = Thread {
            end: End::BackEnd,
            port: back,
            start,
        };
        let front = Thread {
            end: End::FrontEnd,
            port: front,
            start,
        };
        let back = scope.spawn(move || end(back, back_run, limits));
        let front = scope.spawn(move || end(front, front_run, limits));
        [back.join().unwrap(), front.join().unwrap()]
    })
}

/// A frame of a log: when, whether it was sent, how long, and what was kept.
struct Entry {
    ticks: u64,
    sent: bool,
    len: usize,
    bytes: Vec<u8>,
}

fn entries(log: &Log) -> Vec<Entry> {
    let mut rest = log.bytes();
    let mut all = Vec::new();
    while let Some((head, behind)) = rest.split_first_chunk::<HEAD>() {
        let number = |range: core::ops::Range<usize>| {
            head[range]
                .iter()
                .rev()
                .fold(0, |n, &byte| n << 8 | u64::from(byte))
        };
        let size = |range| usize::try_from(number(range)).unwrap();
        let (bytes, behind) = behind.split_at(size(12..14));
        all.push(Entry {
            ticks: number(0..8),
            sent: number(14..16) == 1,
            len: size(8..12),
            bytes: bytes.to_vec(),
        });
        rest = behind;
    }
    assert_eq!((rest.len(), all.len()), (0, log.frames));
    all
}

/// The frames of one direction: how long, and what was kept.
fn frames(log: &Log, sent: bool) -> Vec<(usize, Vec<u8>)> {
    let of = entries(log).into_iter().filter(|frame| frame.sent == sent);
    of.map(|frame| (frame.len, frame.bytes)).collect()
}

fn counted(count: u64) -> Run {
    Run {
        count,
        id: 3,
        timeout_ms: 20_000,
        ..Run::default()
    }
}

#[test]
fn what_one_end_sent_the_other_received_in_that_order_whatever_the_workload_and_the_rings() {
    for (packed, mode) in [(false, Mode::Poll), (true, Mode::Irq)] {
        for works in [
            [Work::Source, Work::Sink],
            [Work::Sink, Work::Source],
            [Work::Both, Work::Both],
            [Work::RoundTrip, Work::Echo],
        ] {
            let config = JoinConfig {
                packed,
                size: 64,
                ..JoinConfig::default()
            };
            let run_both = Run {
                mode,
                ..counted(700)
            };
            let [back, front] = run(&config, works, run_both, ALL);
            let ways = [frames(&back, true), frames(&front, true)];
            assert_eq!(ways[0], frames(&front, false), "{works:?}");
            assert_eq!(ways[1], frames(&back, false), "{works:?}");
            // And they are the frames of the workload, each once, and its end.
            for (way, from) in ways.iter().zip([End::BackEnd, End::FrontEnd]) {
                let format = Format::new(from, 64, 3);
                for (number, (len, bytes)) in way.iter().enumerate() {
                    let seen = format.check::<EVERY_BYTE>(&Frame::of(bytes));
                    let kind = if number == 700 { Kind::End } else { Kind::Data };
                    assert_eq!(seen, Seen::Good(kind, number as u64));
                    assert_eq!(*len, 64);
                }
                assert!([0, 701].contains(&way.len()), "{works:?}");
            }
            for log in [&back, &front] {
                assert!(entries(log).is_sorted_by_key(|frame| frame.ticks));
                assert!(log.frames >= 701);
            }
        }
    }
}

#[test]
fn only_the_first_frames_and_their_first_bytes_are_kept() {
    let limits = Limits {
        frames: 5,
        snaplen: 100,
    };
    let run_long = Run {
        size: 1518,
        ..counted(40)
    };
    let config = JoinConfig::default();
    let [back, front] = run(&config, [Work::Source, Work::Sink], run_long, limits);
    let sent = frames(&back, true);
    assert_eq!(sent, frames(&front, false));
    let format = Format::new(End::BackEnd, 1518, 3);
    let mut whole = [0; 1518];
    assert_eq!(sent.len(), 5);
    for (number, (len, bytes)) in sent.iter().enumerate() {
        format.build::<EVERY_BYTE>(&mut Slot::of(&mut whole), Kind::Data, number as u64);
        assert_eq!((*len, &bytes[..]), (1518, &whole[..100]));
    }
}

#[test]
fn frames_of_64_kib_are_in_it_with_their_length() {
    let config = JoinConfig {
        size: 256,
        shape: Shape {
            mergeable: true,
            offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
            ..Shape::default()
        },
        ..JoinConfig::default()
    };
    let run_long = Run {
        size: 65549,
        batch: 4,
        ..counted(20)
    };
    for works in [[Work::Source, Work::Sink], [Work::Sink, Work::Source]] {
        let [back, front] = run(&config, works, run_long, ALL);
        let (from, to) = match works[0] {
            Work::Source => (&back, &front),
            _ => (&front, &back),
        };
        let sent = frames(from, true);
        assert_eq!(sent, frames(to, false));
        assert_eq!(sent.len(), 21);
        assert!(
            sent.iter()
                .all(|(len, bytes)| (*len, bytes.len()) == (65549, 1518))
        );
    }
}

#[test]
fn a_burst_that_was_not_whole_leaves_nothing() {
    let mut log = Log::new(ALL, clock).unwrap();
    for (len, whole) in [(60, true), (61, false), (62, true)] {
        log.came(&Frame::of(&[7; 64][..len]));
        assert_eq!(
            log.goes(len, |slot| assert!(slot.write(0, &[8; 2]))).len(),
            len
        );
        log.end(whole);
    }
    let lens = |sent| frames(&log, sent).into_iter().map(|(len, _)| len);
    assert!(lens(true).eq([60, 62]) && lens(false).eq([60, 62]));
    for (len, bytes) in frames(&log, false) {
        assert_eq!(bytes, [7; 64][..len]);
    }
}

#[test]
fn its_record_says_where_it_is() {
    let limits = Limits {
        frames: 2,
        snaplen: 3,
    };
    let mut log = Log::new(limits, || 0x0102_0304_0506_0708).unwrap();
    log.came(&Frame::of(&[0x00, 0x9a, 0xff, 0x10]));
    log.goes(2, |slot| assert!(slot.write(0, &[1, 2])));
    log.end(true);
    // docs/bare-metal.md
    let expected = [
        &[
            8, 7, 6, 5, 4, 3, 2, 1, 4, 0, 0, 0, 3, 0, 0, 0, 0x00, 0x9a, 0xff,
        ][..],
        &[8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 2, 0, 1, 0, 1, 2],
    ];
    assert_eq!(log.bytes(), expected.concat());
    let at = log.bytes().as_ptr().addr();
    assert_eq!(
        format!("{}", log.record(5, 1000)),
        format!(
            "{{\"record\":\"capture\",\"id\":5,\"frames\":2,\"tsc_khz\":1000,\"now\":72623859790382856,\"at\":{at},\"len\":37}}"
        )
    );
}

#[test]
fn without_memory_there_is_no_log() {
    let limits = Limits {
        frames: usize::MAX / 2,
        snaplen: 2,
    };
    assert!(Log::new(limits, clock).is_none());
}
