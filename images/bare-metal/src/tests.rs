//! Workloads on two threads over a joined pair, whole and with faults put in between.

extern crate std;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use std::vec;
use std::vec::Vec;
use std::{format, thread};

use guest_driver::joined::{self, JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use guest_driver::net_port::Shape;
use guest_driver::port::{Error, Notices};
use guest_driver::{Frame, Port, Slot};
use virtqueue::linear::Linear;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};

use crate::frame::{EVERY_BYTE, End, Format, Kind, MAX_FRAME, Seen};
use crate::record::ResultRecord;
use crate::study::windows::Churned;
use crate::workload::{Receiver, Stopped};
use crate::{Link, Mode, Outcome, Payload, Run, Source, Work, attempt, execute};

pub struct Thread<P> {
    pub end: End,
    pub port: P,
    pub start: Instant,
}

impl<P: Port> Link for Thread<P> {
    type Port = P;

    fn end(&self) -> End {
        self.end
    }

    fn port(&mut self) -> Option<&mut P> {
        Some(&mut self.port)
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

fn join_config() -> JoinConfig {
    JoinConfig {
        size: 64,
        ..JoinConfig::default()
    }
}

/// Memory for a joined pair.
pub struct Bed {
    _words: Vec<[u64; 512]>,
    pub memory: Linear,
}

impl Bed {
    pub fn new(config: &JoinConfig) -> Self {
        let len = joined::memory_needed(config).unwrap();
        let pages = usize::try_from(len).unwrap() / 4096 + 1;
        let mut words = vec![[0u64; 512]; pages];
        let base = words.as_mut_ptr().cast::<u8>();
        let skip = base.align_offset(4096);
        #[allow(unsafe_code)]
        // SAFETY: the vector outlives the test's threads and is not touched otherwise.
        let memory = unsafe { Linear::new(base.add(skip), 0, len) };
        Self {
            _words: words,
            memory,
        }
    }
}

fn bed() -> Bed {
    Bed::new(&join_config())
}

/// Runs one workload at each end; `meddle` gets the front-end's port in its place.
fn run_with<P: Port + Send>(
    front: Run,
    back: Run,
    meddle: impl FnOnce(JoinedFrontEnd<Silent>) -> P,
) -> (Outcome, Outcome) {
    run_over(&join_config(), front, back, meddle)
}

/// The same over other rings.
fn run_over<P: Port + Send>(
    config: &JoinConfig,
    front: Run,
    back: Run,
    meddle: impl FnOnce(JoinedFrontEnd<Silent>) -> P,
) -> (Outcome, Outcome) {
    let bed = Bed::new(config);
    let (front_port, back_port): (_, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, config, Silent, Silent, false).unwrap();
    let start = Instant::now();
    let mut front_end = Thread {
        end: End::FrontEnd,
        port: meddle(front_port),
        start,
    };
    let mut back_end = Thread {
        end: End::BackEnd,
        port: back_port,
        start,
    };
    thread::scope(|scope| {
        let front = scope.spawn(move || execute(&mut front_end, &front).unwrap());
        let back = scope.spawn(move || execute(&mut back_end, &back).unwrap());
        (front.join().unwrap(), back.join().unwrap())
    })
}

fn run(work: Work) -> Run {
    Run {
        work,
        id: 3,
        count: 20_000,
        timeout_ms: 5000,
        ..Run::default()
    }
}

#[test]
fn what_begins_behind_the_end_is_not_timed() {
    let bed = bed();
    let (port, mut back): (JoinedFrontEnd<Silent>, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let mut link = Thread {
        end: End::FrontEnd,
        port,
        start: Instant::now(),
    };
    let run = Run {
        count: 0,
        warmup_ms: 5,
        ..run(Work::Sink)
    };
    let mut receiver = Receiver::new(&link, &run, 0);
    let format = Format::new(End::BackEnd, run.size, run.id);
    let sent = back.tx_burst(2, run.size, |i, slot| {
        let kind = if i == 0 { Kind::Data } else { Kind::End };
        format.build::<EVERY_BYTE>(slot, kind, i as u64);
    });
    assert_eq!(sent, Ok(2));
    let mut frames = Vec::new();
    link.port
        .rx_burst(2, |frame| frames.push(receiver.take::<EVERY_BYTE>(frame)))
        .unwrap();
    assert_eq!(frames.len(), 2);
    // The other half of a run goes on for longer than this one had to warm up.
    receiver.tick(2_000);
    receiver.tick(8_000);
    let received = receiver.finish(1_000);
    assert_eq!((received.ticks, received.frames), (0, 0));
    assert_eq!((received.verified, received.lost), (1, 0));
}

#[test]
fn everything_that_is_sent_arrives_in_each_direction_polling_and_sleeping() {
    for mode in [Mode::Poll, Mode::Irq, Mode::Adaptive] {
        for size in [60, 64, 65, 1518] {
            let with = |work| Run {
                size,
                mode,
                ..run(work)
            };
            let (front, back) = run_with(with(Work::Sink), with(Work::Source), |port| port);
            assert!(front.is_clean() && back.is_clean());
            assert_eq!(front.received.unwrap().verified, 20_000);
            assert_eq!(back.sent.unwrap().frames, 20_000);
            let (front, back) = run_with(with(Work::Source), with(Work::Sink), |port| port);
            assert!(front.is_clean() && back.is_clean());
            assert_eq!(back.received.unwrap().verified, 20_000);
        }
    }
}

#[test]
fn both_directions_at_once_lose_nothing() {
    let (front, back) = run_with(run(Work::Both), run(Work::Both), |port| port);
    assert!(front.is_clean() && back.is_clean());
    assert_eq!(front.received.unwrap().verified, 20_000);
    assert_eq!(back.received.unwrap().verified, 20_000);
}

fn offload_config() -> JoinConfig {
    JoinConfig {
        shape: Shape {
            mergeable: true,
            offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
            ..Shape::default()
        },
        ..join_config()
    }
}

#[test]
fn frames_of_64_kib_and_partial_checksums_arrive_in_each_direction_with_their_headers() {
    for (size, offload, count) in [
        (65_536, false, 200),
        (MAX_FRAME, false, 50),
        (1519, false, 500),
        (64, true, 2000),
        (64, false, 2000),
    ] {
        let with = |work| Run {
            size,
            offload,
            count,
            timeout_ms: 30_000,
            ..run(work)
        };
        for (front, back) in [
            (Work::Both, Work::Both),
            (Work::Echo, Work::RoundTrip),
            (Work::RoundTrip, Work::Echo),
        ] {
            let config = offload_config();
            let (front, back) = run_over(&config, with(front), with(back), |port| port);
            assert!(front.is_clean() && back.is_clean(), "{size}: {front:?}");
            assert_eq!(front.received.unwrap().verified, count);
            assert_eq!(back.received.unwrap().verified, count);
        }
    }
}

#[test]
fn frames_of_64_kib_at_a_given_rate_arrive_and_come_back() {
    let with = |work, rate| Run {
        size: 65_536,
        count: 200,
        rate,
        timeout_ms: 30_000,
        ..run(work)
    };
    for (front, back) in [(Work::Sink, Work::Source), (Work::Echo, Work::RoundTrip)] {
        let (front, back) = (with(front, 0), with(back, 20_000));
        let (front, back) = run_over(&offload_config(), front, back, |port| port);
        assert!(front.is_clean() && back.is_clean(), "{front:?} {back:?}");
        assert_eq!(front.received.unwrap().verified, 200);
    }
}

#[test]
fn a_header_that_is_not_the_sender_s_makes_a_frame_corrupt() {
    let sent = |offload| Run {
        offload,
        count: 100,
        timeout_ms: 500,
        ..run(Work::Source)
    };
    for offload in [false, true] {
        let sink = Run {
            work: Work::Sink,
            ..sent(!offload)
        };
        let (front, _) = run_over(&offload_config(), sink, sent(offload), |port| port);
        assert_eq!(front.received.unwrap().verified, 0);
    }
}

#[test]
fn what_the_peer_does_not_take_is_not_sent() {
    let bed = bed();
    let (front, back): (JoinedFrontEnd<Silent>, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let long = Run {
        size: 65_536,
        ..run(Work::Source)
    };
    let start = Instant::now();
    let mut front = Thread {
        end: End::FrontEnd,
        port: front,
        start,
    };
    assert_eq!(execute(&mut front, &long).unwrap_err(), Stopped::NoOffload);
    let mut back = Thread {
        end: End::BackEnd,
        port: back,
        start,
    };
    assert_eq!(execute(&mut back, &long).unwrap_err(), Stopped::NoOffload);
}

#[test]
fn a_timed_run_stops_by_itself_and_counts_what_it_timed() {
    let timed = |work| Run {
        count: 0,
        ms: 50,
        warmup_ms: 10,
        ..run(work)
    };
    let (front, back) = run_with(timed(Work::Sink), timed(Work::Source), |port| port);
    let received = front.received.unwrap();
    assert!(front.is_clean() && back.is_clean());
    assert!(received.frames > 0 && received.frames < received.verified);
    assert!(
        (20_000..500_000).contains(&received.ticks),
        "{} us",
        received.ticks
    );
}

#[test]
fn a_round_trip_times_every_frame_it_got_back() {
    let few = |work| Run {
        count: 2000,
        ..run(work)
    };
    for (front, back) in [(Work::Echo, Work::RoundTrip), (Work::RoundTrip, Work::Echo)] {
        let (front, back) = run_with(few(front), few(back), |port| port);
        assert!(front.is_clean() && back.is_clean());
        let times = front.round_trips.or(back.round_trips).unwrap();
        assert_eq!(times.count(), 2000);
        assert!(times.quantile(500) <= times.quantile(990));
    }
}

#[test]
fn frames_that_are_due_are_sent_then_and_timed_from_then() {
    // The clock of these threads ticks once in a microsecond.
    let of = |work, rate| {
        if work == Work::Echo || work == Work::Sink {
            0
        } else {
            rate
        }
    };
    let paced = |work, mode| Run {
        rate: of(work, 20_000),
        mode,
        count: 0,
        ms: 100,
        warmup_ms: 10,
        ..run(work)
    };
    for mode in [Mode::Poll, Mode::Irq, Mode::Adaptive] {
        let (front, back) = run_with(
            paced(Work::Echo, mode),
            paced(Work::RoundTrip, mode),
            |port| port,
        );
        assert!(front.is_clean() && back.is_clean(), "{mode:?} {back:?}");
        // Each that was due, however late the machine let it be sent; those of the warm-up are checked and not timed.
        assert_eq!(back.sent.unwrap().frames, 2200);
        assert_eq!(back.received.unwrap().verified, 2200);
        assert_eq!(back.round_trips.unwrap().count(), 2000);
        let (front, back) = run_with(paced(Work::Sink, mode), paced(Work::Source, mode), |port| {
            port
        });
        assert!(front.is_clean() && back.is_clean(), "{mode:?} {front:?}");
        assert_eq!(front.received.unwrap().verified, 2200);
        assert!(back.sent.unwrap().ticks >= 110_000);
    }
    let counted = |work| Run {
        rate: of(work, 1_000_000),
        count: 3000,
        ..run(work)
    };
    let (_, back) = run_with(counted(Work::Echo), counted(Work::RoundTrip), |port| port);
    assert_eq!(back.round_trips.unwrap().count(), 3000);
}

/// An echo's port that looks away for a while, once.
struct Sleepy {
    inner: JoinedFrontEnd<Silent>,
    bursts: u32,
}

impl Port for Sleepy {
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        self.inner.tx_burst(count, len, build)
    }

    fn rx_burst(&mut self, count: usize, receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        let came = self.inner.rx_burst(count, receive)?;
        self.bursts += u32::from(came > 0);
        if came > 0 && self.bursts == 50 {
            thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(came)
    }

    fn drained(&mut self) -> Result<bool, Error> {
        self.inner.drained()
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        self.inner.arm(rx, tx)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}

#[test]
fn a_frame_that_waits_for_one_that_is_late_is_late_too() {
    let a_fifth_is_late = |rate| {
        let trip = |work, rate| Run {
            rate,
            count: 2000,
            ..run(work)
        };
        let sleepy = |inner| Sleepy { inner, bursts: 0 };
        let (front, back) = run_with(trip(Work::Echo, 0), trip(Work::RoundTrip, rate), sleepy);
        assert!(front.is_clean() && back.is_clean(), "{back:?}");
        let times = back.round_trips.unwrap();
        assert_eq!(times.count(), 2000);
        // In microseconds.
        times.quantile(850) >= 10_000
    };
    // A quarter of these 200 ms the other end looks away: what was due in the first 40 of those 50 ms, a fifth of all, is 10 ms late or more.
    assert!(a_fifth_is_late(10_000));
    // A closed loop sends nothing meanwhile, and sees one.
    assert!(!a_fifth_is_late(0));
}

#[test]
fn a_rate_is_for_what_can_keep_it() {
    let bed = bed();
    let (port, _back): (_, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let mut link = Thread {
        end: End::FrontEnd,
        port,
        start: Instant::now(),
    };
    for work in [Work::Sink, Work::Both, Work::Echo] {
        let paced = Run {
            rate: 1,
            ..run(work)
        };
        assert_eq!(execute(&mut link, &paced).unwrap_err(), Stopped::NoRate);
    }
}

#[test]
fn a_sink_that_hears_nothing_gives_up() {
    let (front, _) = run_with(
        Run {
            timeout_ms: 20,
            ..run(Work::Sink)
        },
        Run {
            count: 0,
            ms: 0,
            work: Work::Source,
            id: 9,
            ..Run::default()
        },
        |port| port,
    );
    assert!(front.timeout && !front.is_clean());
}

#[test]
fn frames_that_are_copied_or_looked_at_in_part_arrive_as_the_others_do() {
    for payload in [Payload::EveryByte, Payload::Headers] {
        for source in [Source::Build, Source::Copy] {
            for (size, batch) in [(60, 1), (64, 32), (200, 7), (1518, 256)] {
                let with = |work| Run {
                    size,
                    batch,
                    payload,
                    source,
                    count: 5000,
                    ..run(work)
                };
                let (front, back) = run_with(with(Work::Both), with(Work::Both), |port| port);
                assert!(
                    front.is_clean() && back.is_clean(),
                    "{payload:?} {source:?}"
                );
                assert_eq!(front.received.unwrap().verified, 5000);
                assert_eq!(back.received.unwrap().verified, 5000);
                let (front, back) = run_with(with(Work::Echo), with(Work::Both), |port| port);
                assert!(
                    front.is_clean() && back.is_clean(),
                    "{payload:?} {source:?}"
                );
                assert_eq!(back.received.unwrap().verified, 5000);
            }
        }
    }
}

#[test]
fn a_mix_is_sent_in_its_proportions_whatever_room_the_ring_has() {
    for source in [Source::Build, Source::Copy] {
        // The ring has 64 entries: bursts end where it is full.
        for batch in [1, 7, 48, 256] {
            let unit = 12 * batch;
            let mix = Run {
                imix: true,
                source,
                batch,
                count: 10 * unit as u64,
                ..run(Work::Source)
            };
            let sink = Run {
                work: Work::Sink,
                ..mix
            };
            let seen = [const { AtomicU64::new(0) }; 3];
            let (front, back) = run_with(sink, mix, |inner| Lengths { inner, seen: &seen });
            assert!(front.is_clean() && back.is_clean(), "{front:?}");
            assert_eq!(front.received.unwrap().verified, 10 * unit as u64);
            // The end frame is short.
            let [short, middle, long] = seen.map(AtomicU64::into_inner);
            let batch = batch as u64;
            assert_eq!(
                [short - 1, middle, long],
                [70 * batch, 40 * batch, 10 * batch]
            );
        }
    }
}

#[test]
fn a_mix_is_for_what_sends_and_receives_and_a_frame_of_no_length_of_it_is_corrupt() {
    let mix = |work| Run {
        imix: true,
        ..run(work)
    };
    let bed = bed();
    let (port, mut back): (JoinedFrontEnd<Silent>, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let mut link = Thread {
        end: End::FrontEnd,
        port,
        start: Instant::now(),
    };
    for work in [Work::Echo, Work::RoundTrip] {
        assert_eq!(execute(&mut link, &mix(work)).unwrap_err(), Stopped::NoMix);
    }
    let mut receiver = Receiver::new(&link, &mix(Work::Sink), 0);
    let mut seen = Vec::new();
    for len in [64, 570, 1518, 571] {
        let format = Format::new(End::BackEnd, len, 3);
        let sent = back.tx_burst(1, len, |_, slot| {
            format.build::<EVERY_BYTE>(slot, Kind::Data, 0)
        });
        assert_eq!(sent, Ok(1));
        link.port
            .rx_burst(1, |frame| seen.push(receiver.take::<EVERY_BYTE>(frame)))
            .unwrap();
    }
    let good = Seen::Good(Kind::Data, 0);
    assert_eq!(seen, [good, good, good, Seen::Corrupt]);
}

/// Counts frames of 64, of 570 and of 1518 bytes that arrive.
struct Lengths<'a> {
    inner: JoinedFrontEnd<Silent>,
    seen: &'a [AtomicU64; 3],
}

impl Port for Lengths<'_> {
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        self.inner.tx_burst(count, len, build)
    }

    fn rx_burst(&mut self, count: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        let seen = self.seen;
        self.inner.rx_burst(count, |frame| {
            let which = [64, 570, 1518].iter().position(|&len| len == frame.len());
            seen[which.unwrap()].fetch_add(1, Ordering::Relaxed);
            receive(frame);
        })
    }

    fn drained(&mut self) -> Result<bool, Error> {
        self.inner.drained()
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        self.inner.arm(rx, tx)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}

/// What happens to data frames on their way into the front-end.
#[derive(Clone, Copy)]
enum Fault {
    Drop,
    Duplicate,
    Swap,
    Corrupt(usize),
    Truncate,
}

/// Does one fault to the 100th frame that arrives.
struct Meddler {
    inner: JoinedFrontEnd<Silent>,
    fault: Fault,
    seen: AtomicU64,
    held: Vec<u8>,
}

impl Port for Meddler {
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        self.inner.tx_burst(count, len, build)
    }

    fn rx_burst(&mut self, count: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        let (fault, seen, held) = (self.fault, &self.seen, &mut self.held);
        self.inner.rx_burst(count, |frame| {
            if !held.is_empty() {
                receive(frame);
                receive(&Frame::of(held));
                held.clear();
                return;
            }
            if seen.fetch_add(1, Ordering::Relaxed) != 100 {
                return receive(frame);
            }
            let mut bytes = vec![0; frame.len()];
            assert!(frame.read(0, &mut bytes));
            match fault {
                Fault::Drop => {}
                Fault::Duplicate => {
                    receive(frame);
                    receive(frame);
                }
                Fault::Swap => *held = bytes,
                Fault::Corrupt(at) => {
                    bytes[at] ^= 1;
                    receive(&Frame::of(&bytes));
                }
                Fault::Truncate => receive(&Frame::of(&bytes[..bytes.len() - 1])),
            }
        })
    }

    fn drained(&mut self) -> Result<bool, Error> {
        self.inner.drained()
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        self.inner.arm(rx, tx)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}

#[test]
fn every_fault_is_counted_as_what_it_is() {
    let meddle_with = |fault, size, payload| {
        let with = |work| Run {
            size,
            payload,
            ..run(work)
        };
        let (front, _) = run_with(with(Work::Sink), with(Work::Source), |inner| Meddler {
            inner,
            fault,
            seen: AtomicU64::new(0),
            held: Vec::new(),
        });
        front
    };
    let meddle = |fault| {
        let front = meddle_with(fault, 64, Payload::EveryByte);
        let got = front.received.unwrap();
        assert!(!front.is_clean());
        (got.lost, got.duplicated, got.reordered, got.corrupted)
    };
    assert_eq!(meddle(Fault::Drop), (1, 0, 0, 0));
    assert_eq!(meddle(Fault::Duplicate), (0, 1, 0, 0));
    assert_eq!(meddle(Fault::Swap), (0, 0, 1, 0));
    assert_eq!(meddle(Fault::Truncate), (1, 0, 0, 1));
    for at in [0, 11, 20, 41, 45, 47, 48, 54, 55, 56, 63] {
        assert_eq!(meddle(Fault::Corrupt(at)), (1, 0, 0, 1), "byte {at}");
    }
    // Where only the first line is looked at, what is wrong behind it goes unseen, and nothing else does.
    let unseen = |at, payload| meddle_with(Fault::Corrupt(at), 200, payload).is_clean();
    for payload in [Payload::EveryByte, Payload::Headers] {
        assert!(!unseen(0, payload) && !unseen(63, payload));
        assert!(!meddle_with(Fault::Truncate, 200, payload).is_clean());
    }
    assert!(!unseen(64, Payload::EveryByte) && !unseen(199, Payload::EveryByte));
    assert!(unseen(64, Payload::Headers) && unseen(199, Payload::Headers));
}

#[test]
fn a_result_record_is_one_line_with_what_applies() {
    let (front, back) = run_with(run(Work::Sink), run(Work::Source), |port| port);
    let line = format!("{}", ResultRecord(&run(Work::Sink), &front));
    assert!(line.starts_with("{\"record\":\"result\",\"id\":3,\"work\":\"sink\",\"rx_frames\":"));
    assert!(
        line.contains("\"verified\":20000,\"lost\":0")
            && !line.contains("tx_frames")
            && !line.contains('\n')
    );
    let notices = |given, suppressed| Notices { given, suppressed };
    let pairs = [
        [notices(1, 2), notices(3, 4)],
        [notices(10, 20), notices(30, 40)],
    ];
    let with = |notices: &[[Notices; 2]]| Outcome {
        notices: notices.to_vec(),
        ..Outcome::default()
    };
    let line = format!("{}", ResultRecord(&run(Work::Source), &with(&pairs[..1])));
    let one =
        r#","tx_notified":1,"tx_suppressed":2,"rx_notified":3,"rx_suppressed":4,"timeout":0}"#;
    assert!(line.ends_with(one), "{line}");
    let line = format!("{}", ResultRecord(&run(Work::Source), &with(&pairs)));
    let two = r#","tx_notified":11,"tx_suppressed":22,"rx_notified":33,"rx_suppressed":44,"queues":[{"tx_notified":1,"tx_suppressed":2,"rx_notified":3,"rx_suppressed":4},{"tx_notified":10,"tx_suppressed":20,"rx_notified":30,"rx_suppressed":40}],"timeout":0}"#;
    assert!(line.ends_with(two), "{line}");
    let line = format!("{}", ResultRecord(&run(Work::Source), &back));
    assert!(
        line.contains("\"tx_frames\":20000,\"tx_bytes\":1280000") && !line.contains("rx_frames")
    );
}

#[test]
fn churn_is_refused_by_an_end_without_windows_and_reported_by_one_with_them() {
    let bed = bed();
    let (port, _back): (_, JoinedBackEnd<Silent>) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let mut link = Thread {
        end: End::FrontEnd,
        port,
        start: Instant::now(),
    };
    let with_churn = Run {
        churn: 1000,
        ..run(Work::Sink)
    };
    let stopped = execute(&mut link, &with_churn).unwrap_err();
    assert_eq!(stopped, Stopped::NoChurn);
    let mut churned = Churned::default();
    churned.times.add(7);
    let outcome = Outcome {
        churn: Some(churned),
        ..Outcome::default()
    };
    let line = format!("{}", ResultRecord(&with_churn, &outcome));
    assert!(line.ends_with(
        ",\"churn\":{\"count\":1,\"failed\":0,\"p50\":7,\"p99\":7,\"max\":7},\"timeout\":0}"
    ));
}

/// A front-end whose peer does its part, or none of it, and leaves while the front-end looks away.
struct Left {
    port: JoinedFrontEnd<Silent>,
    peer: Option<JoinedBackEnd<Silent>>,
    /// How many frames it takes first; `None`: it leaves at once.
    takes: Option<usize>,
}

impl Link for Left {
    type Port = JoinedFrontEnd<Silent>;

    fn end(&self) -> End {
        End::FrontEnd
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        Some(&mut self.port)
    }

    fn service(&mut self) {
        let Some((takes, peer)) = self.takes.as_mut().zip(self.peer.as_mut()) else {
            self.peer = None;
            return;
        };
        *takes -= peer.rx_burst(32, |_| {}).unwrap();
        if *takes > 0 {
            return;
        }
        let format = Format::new(End::BackEnd, 64, 3);
        for (kind, sequence) in [(Kind::Data, 0), (Kind::Data, 1), (Kind::End, 2)] {
            let sent = peer.tx_burst(1, 64, |_, slot| {
                format.build::<EVERY_BYTE>(slot, kind, sequence)
            });
            assert_eq!(sent, Ok(1));
        }
        self.peer = None;
    }

    fn gone(&mut self) -> bool {
        self.peer.is_none()
    }

    fn sleep(&mut self, _until: u64) {}

    fn now(&self) -> u64 {
        0
    }

    fn ticks_per_ms(&self) -> u64 {
        1000
    }
}

#[test]
fn what_a_peer_did_before_it_left_counts_and_what_it_did_not_is_missed() {
    for leaves_at_once in [false, true] {
        for mode in [Mode::Poll, Mode::Irq, Mode::Adaptive] {
            for (work, frames) in [(Work::Source, 3), (Work::Sink, 0), (Work::Both, 3)] {
                let bed = bed();
                let (port, peer) =
                    joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
                let mut link = Left {
                    port,
                    peer: Some(peer),
                    takes: (!leaves_at_once).then_some(frames),
                };
                let few = Run {
                    count: 2,
                    mode,
                    ..run(work)
                };
                let mut outcome = Outcome::default();
                let result = attempt(&mut link, &few, &mut outcome);
                let received = outcome.received.map(|received| received.verified);
                assert_eq!(outcome.stopped, result.is_err());
                if leaves_at_once {
                    assert_eq!(result, Err(Stopped::Down));
                    assert_eq!(received, (work != Work::Source).then_some(0));
                } else {
                    assert_eq!(result, Ok(()));
                    assert!(outcome.is_clean(), "{outcome:?}");
                    assert_eq!(received, (work != Work::Source).then_some(2));
                }
            }
        }
    }
}

/// A back-end's port: bursts of frames, and while the last one is looked at, the window goes.
struct Vanishing(Vec<Vec<Vec<u8>>>);

impl Port for Vanishing {
    fn tx_burst(
        &mut self,
        _: usize,
        _: usize,
        _: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        Ok(0)
    }

    fn rx_burst(&mut self, _: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        if self.0.is_empty() {
            return Err(Error::Ring(virtqueue::Error::BadFlags));
        }
        let burst = self.0.remove(0);
        burst.iter().for_each(|frame| receive(&Frame::of(frame)));
        Ok(burst.len())
    }

    fn whole(&self) -> bool {
        !self.0.is_empty()
    }

    fn drained(&mut self) -> Result<bool, Error> {
        Ok(true)
    }

    fn arm(&mut self, _: bool, _: bool) -> bool {
        true
    }

    fn disarm(&mut self) {}
}

#[test]
fn a_frame_torn_with_the_window_is_told_from_one_that_was_delivered_corrupt() {
    let sink = run(Work::Sink);
    // Two good frames, and one whose last byte is wrong.
    let bed = bed();
    let (mut front, mut back) =
        joined::join(bed.memory, 0, &join_config(), Silent, Silent, false).unwrap();
    let format = Format::new(End::FrontEnd, sink.size, sink.id);
    front
        .tx_burst(3, sink.size, |i, slot| {
            format.build::<EVERY_BYTE>(slot, Kind::Data, i as u64);
        })
        .unwrap();
    let mut frames = Vec::new();
    back.rx_burst(3, |frame| {
        let mut bytes = vec![0; frame.len()];
        assert!(frame.read(0, &mut bytes));
        frames.push(bytes);
    })
    .unwrap();
    *frames[2].last_mut().unwrap() ^= 0xff;
    let [first, second, wrong] = <[Vec<u8>; 3]>::try_from(frames).unwrap();
    let with = |bursts| {
        let mut link = Thread {
            end: End::BackEnd,
            port: Vanishing(bursts),
            start: Instant::now(),
        };
        let mut outcome = Outcome::default();
        attempt(&mut link, &sink, &mut outcome).unwrap_err();
        let received = outcome.received.unwrap();
        (received.verified, received.corrupted, received.torn)
    };
    let last = vec![vec![first.clone()], vec![second.clone(), wrong.clone()]];
    assert_eq!(with(last), (2, 0, 1));
    // The window was not gone where the burst was whole, and with the next one it went.
    let earlier = vec![vec![first, wrong], vec![second]];
    assert_eq!(with(earlier), (2, 1, 0));
}
