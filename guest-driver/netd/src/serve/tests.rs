//! The loop over joined rings; a peer that comes and goes as a test says.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use guest_driver::joined::{JoinConfig, JoinedBackEnd, JoinedFrontEnd};
use guest_driver::virtio_pci::Notify;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::capture::CaptureFile;
use crate::stats::Ring;
use crate::testing::*;
use crate::wait::Interrupts;
use crate::work::{Bridge, Drop};

/// Raises an interrupt, or (a call) nothing.
#[derive(Clone)]
struct Bell(Option<Arc<EventFd>>);

impl Notify for Bell {
    fn notify(&self) {
        if let Some(event) = &self.0 {
            event.write(1).unwrap();
        }
    }
}

type Back = JoinedBackEnd<Bell>;
type Front = JoinedFrontEnd<Bell>;

/// What happens to the peer next.
enum Event {
    Comes(Box<Back>),
    Leaves,
    /// Its second pair is put into use.
    Second(Box<Back>),
    /// And taken out of it.
    NoSecond,
}

/// A device whose peer does what a test says.
struct Puppet {
    ports: [Option<Back>; 2],
    events: Arc<Mutex<Vec<Event>>>,
    gave_up: Arc<AtomicUsize>,
}

impl Device for Puppet {
    type Port = Back;

    fn service(&mut self, look: bool) -> Result<Link, virtio_pci::Error> {
        let mut events = self.events.lock().unwrap();
        // As the device has it: only its configuration tells that the peer is gone.
        if !look && matches!(events.first(), Some(Event::Leaves)) || events.is_empty() {
            return Ok(Link::Same);
        }
        let before = self.ports[0].is_some();
        match events.remove(0) {
            Event::Comes(port) => self.ports[0] = Some(*port),
            Event::Leaves => self.ports = [None, None],
            Event::Second(port) => {
                self.ports[1] = Some(*port);
                return Ok(Link::Same);
            }
            Event::NoSecond => {
                self.ports[1] = None;
                return Ok(Link::Same);
            }
        }
        Ok(match (before, self.ports[0].is_some()) {
            (_, true) => Link::Up,
            (true, false) => Link::Down,
            (false, false) => Link::Same,
        })
    }

    fn pair(&mut self, index: usize) -> Option<&mut Back> {
        self.ports.get_mut(index)?.as_mut()
    }

    fn give_up(&mut self) {
        self.ports = [None, None];
        self.gave_up.fetch_add(1, Ordering::Relaxed);
    }

    fn announcement(&mut self) -> Option<[u8; 6]> {
        None
    }

    fn malformed(&mut self) -> u64 {
        0
    }
}

/// All that a test has in hand while the loop runs.
struct Hands {
    stop: Arc<EventFd>,
    config: Option<Arc<EventFd>>,
    kicks: Bell,
    events: Arc<Mutex<Vec<Event>>>,
    gave_up: Arc<AtomicUsize>,
}

impl Hands {
    fn connect(&self, config: &JoinConfig) -> Front {
        self.connect_as(config, Event::Comes)
    }

    fn connect_as(&self, config: &JoinConfig, event: impl FnOnce(Box<Back>) -> Event) -> Front {
        let (front, back) = join(config, self.kicks.clone(), Bell(None));
        self.happens(event(Box::new(back)));
        front
    }

    fn happens(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        if let Some(config) = &self.config {
            config.write(1).unwrap();
        }
    }
}

fn clone(event: &EventFd) -> EventFd {
    event.try_clone().unwrap()
}

fn rig(interrupts: bool) -> (Puppet, Waiter, Hands) {
    let stop = EventFd::new(0).unwrap();
    let wires = interrupts.then(|| Interrupts::new().unwrap());
    let hands = Hands {
        stop: Arc::new(clone(&stop)),
        config: wires.as_ref().map(|wires| Arc::new(clone(&wires.config))),
        kicks: Bell(wires.as_ref().map(|wires| Arc::new(clone(&wires.queue)))),
        events: Arc::default(),
        gave_up: Arc::default(),
    };
    let puppet = Puppet {
        ports: [None, None],
        events: hands.events.clone(),
        gave_up: hands.gave_up.clone(),
    };
    (puppet, Waiter::new(owned(&stop), wires), hands)
}

/// A descriptor of its own.
#[allow(unsafe_code)] // one block: the type does not lend its descriptor otherwise
fn owned(event: &EventFd) -> OwnedFd {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as `event` lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
        .try_clone_to_owned()
        .unwrap()
}

fn options(mode: Mode) -> Options {
    Options {
        mode,
        time: Some(Duration::from_secs(120)),
        report: None,
    }
}

/// Waits for something, half a minute at most.
fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_micros(50));
    }
}

/// Runs the loop on a thread of its own beside `test`, and stops it then.
fn beside<W: Work + Send>(
    rig: (Puppet, Waiter, Hands),
    work: W,
    mode: Mode,
    test: impl FnOnce(&Hands),
) -> (Stats, Vec<String>) {
    several_beside(rig, [work], mode, test)
}

/// The same with work for each pair.
fn several_beside<W: Work + Send, const N: usize>(
    rig: (Puppet, Waiter, Hands),
    works: [W; N],
    mode: Mode,
    test: impl FnOnce(&Hands),
) -> (Stats, Vec<String>) {
    captured_beside(rig, works, mode, None, test)
}

/// The same with a capture.
fn captured_beside<W: Work + Send, const N: usize>(
    (mut puppet, waiter, hands): (Puppet, Waiter, Hands),
    mut works: [W; N],
    mode: Mode,
    capture: Option<Capture>,
    test: impl FnOnce(&Hands),
) -> (Stats, Vec<String>) {
    thread::scope(|scope| {
        let served = scope.spawn(move || {
            let (mut notes, mut last) = (Vec::new(), Vec::new());
            let note = |text: &str| notes.push(text.to_string());
            let stats = serve(
                &mut puppet,
                &mut works,
                &waiter,
                &options(mode),
                capture,
                |report| last = report.queues.clone(),
                note,
            );
            let stats = stats.unwrap();
            let sum = |ring: fn(&Queue) -> Ring| {
                let frames = last.iter().map(|queue| ring(queue).flow.frames);
                frames.sum::<u64>()
            };
            // The queues are all there is.
            assert_eq!(sum(|queue| queue.from_peer), stats.from_peer.frames);
            assert_eq!(sum(|queue| queue.to_peer), stats.to_peer.frames);
            assert_eq!(last.len(), N);
            (stats, notes)
        });
        let stop = hands.stop.clone();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&hands)));
        stop.write(1).unwrap();
        let served = served.join().unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
        served
    })
}

const MODES: [(Mode, bool); 5] = [
    (Mode::Poll, false),
    (Mode::Poll, true),
    (Mode::Irq, true),
    (Mode::Adaptive, true),
    (Mode::Adaptive, false),
];

#[test]
fn every_mode_moves_every_frame_both_ways() {
    for (mode, interrupts) in MODES {
        for config in configs() {
            let (nic, kernel) = socket();
            let (stats, _) = beside(rig(interrupts), Bridge::new(nic, None), mode, |hands| {
                let mut front = hands.connect(&config);
                for number in 0..50 {
                    let frames = [60, 1514].map(|len| frame(number, len));
                    assert_eq!(send(&mut front, &frames), 2);
                    let mut got = Vec::new();
                    until(|| {
                        got.extend(packets(&kernel));
                        got.len() >= 2
                    });
                    assert_eq!(got, [packet(&frames[0]), packet(&frames[1])]);
                    for packet in &got {
                        kernel.send(packet).unwrap();
                    }
                    let mut back = Vec::new();
                    until(|| {
                        back.extend(receive(&mut front));
                        back.len() >= 2
                    });
                    assert_eq!(back, frames, "{mode:?} {config:?}");
                }
            });
            assert_eq!((stats.from_peer.frames, stats.to_peer.frames), (100, 100));
            assert_eq!(
                (stats.links, stats.broken, stats.dropped),
                (1, 0, Default::default())
            );
            if mode == Mode::Poll {
                assert_eq!(stats.sleeps, 0);
            }
        }
    }
}

#[test]
fn an_idle_link_is_slept_on_and_a_full_ring_ends_the_sleep_when_there_is_room() {
    for mode in [Mode::Irq, Mode::Adaptive] {
        let (nic, kernel) = socket();
        let config = JoinConfig {
            size: 4,
            ..JoinConfig::default()
        };
        let (stats, _) = beside(rig(true), Bridge::new(nic, None), mode, |hands| {
            let mut front = hands.connect(&config);
            let mut sent = 0;
            let mut got = 0;
            until(|| {
                while sent < 100 && kernel.send(&packet(&frame(sent, 60))).is_ok() {
                    sent += 1;
                }
                // Long enough for the loop to find the ring full and go to sleep.
                thread::sleep(Duration::from_millis(1));
                got += receive(&mut front).len();
                got == 100
            });
        });
        assert!(stats.sleeps > 0, "{mode:?}");
        assert_eq!(stats.to_peer.frames, 100);
    }
}

#[test]
fn a_peer_that_leaves_and_comes_back_is_served_again() {
    for (mode, interrupts) in MODES {
        let (nic, kernel) = socket();
        let carrier = nic.carrier.clone();
        let (stats, notes) = beside(rig(interrupts), Bridge::new(nic, None), mode, |hands| {
            for round in 0..5 {
                let config = JoinConfig {
                    packed: round % 2 == 1,
                    ..JoinConfig::default()
                };
                let mut front = hands.connect(&config);
                let sent = frame(round, 200);
                assert_eq!(send(&mut front, std::slice::from_ref(&sent)), 1);
                let mut got = Vec::new();
                until(|| {
                    got.extend(packets(&kernel));
                    !got.is_empty()
                });
                assert_eq!(got, [packet(&sent)], "{mode:?}");
                hands.happens(Event::Leaves);
                until(|| carrier.lock().unwrap().len() == 2 * (round + 1));
            }
        });
        assert_eq!(stats.links, 5);
        assert_eq!(*carrier.lock().unwrap(), [true, false].repeat(5));
        assert_eq!(notes, ["link up", "link down"].repeat(5));
    }
}

/// Work whose port is of no use from its third turn on.
struct Breaks(Drop, u32, Arc<AtomicUsize>);

impl Work for Breaks {
    fn turn<P: Port>(&mut self, port: &mut P, stats: &mut Stats) -> Result<bool, Stop> {
        self.1 += 1;
        if self.1 == 3 {
            self.2.fetch_add(1, Ordering::Relaxed);
            return Err(Stop::Port(virtqueue::Error::Config.into()));
        }
        self.0.turn(port, stats)
    }
    fn wants(&self) -> crate::work::Wants<'_> {
        self.0.wants()
    }
    fn link(&mut self, _up: bool, _stats: &mut Stats) {}
    fn done(&self, stats: &Stats) -> bool {
        self.0.done(stats)
    }
}

#[test]
fn rings_that_the_peer_broke_are_given_up_once_and_the_next_ones_are_served() {
    let broke = Arc::new(AtomicUsize::new(0));
    let work = Breaks(Drop::new(None), 0, broke.clone());
    let (stats, notes) = beside(rig(false), work, Mode::Poll, |hands| {
        let _broken = hands.connect(&JoinConfig::default());
        until(|| hands.gave_up.load(Ordering::Relaxed) == 1);
        let mut front = hands.connect(&JoinConfig::default());
        assert_eq!(send(&mut front, &[frame(1, 60)]), 1);
        until(|| front.drained().unwrap());
    });
    assert_eq!(
        (stats.broken, stats.links, stats.from_peer.frames),
        (1, 2, 1)
    );
    assert!(notes[1].starts_with("the peer broke a rule"), "{notes:?}");
}

#[test]
fn the_broken_rings_of_a_peer_that_turns_out_to_be_gone_are_not_held_against_it() {
    let broke = Arc::new(AtomicUsize::new(0));
    let work = Breaks(Drop::new(None), 0, broke.clone());
    // The device says that the peer is gone when its rings are broken already: both come at once here, and the loop looks at the rings first.
    let (puppet, waiter, hands) = rig(true);
    let (_front, back) = join(&JoinConfig::default(), Bell(None), Bell(None));
    hands
        .events
        .lock()
        .unwrap()
        .push(Event::Comes(Box::new(back)));
    hands.events.lock().unwrap().push(Event::Leaves);
    let gave_up = hands.gave_up.clone();
    let (stats, notes) = beside((puppet, waiter, hands), work, Mode::Poll, |hands| {
        until(|| hands.events.lock().unwrap().is_empty());
    });
    assert_eq!(broke.load(Ordering::Relaxed), 1);
    assert_eq!((stats.broken, gave_up.load(Ordering::Relaxed)), (0, 0));
    assert_eq!(notes, ["link up", "link down"]);
}

#[test]
fn each_pair_has_its_queue_of_the_interface_and_what_comes_for_one_out_of_use_goes_over_the_first()
{
    for (mode, interrupts) in MODES {
        let (nics, kernels): (Vec<_>, Vec<_>) = [socket(), socket()].into_iter().unzip();
        let works = <[_; 2]>::try_from(nics).ok().unwrap();
        let works = works.map(|nic| Bridge::new(nic, None));
        let config = JoinConfig::default();
        let (stats, _) = several_beside(rig(interrupts), works, mode, |hands| {
            let first = hands.connect(&config);
            let mut fronts = [first, hands.connect_as(&config, Event::Second)];
            let came = |front: &mut Front| {
                let mut got = Vec::new();
                until(|| {
                    got.extend(receive(front));
                    !got.is_empty()
                });
                got
            };
            for number in 0..20 {
                for (pair, front) in fronts.iter_mut().enumerate() {
                    let frames = [frame(2 * number + pair, 60)];
                    assert_eq!(send(front, &frames), 1);
                    let mut got = Vec::new();
                    until(|| {
                        got.extend(packets(&kernels[pair]));
                        !got.is_empty()
                    });
                    assert_eq!(got, [packet(&frames[0])], "{mode:?}, pair {pair}");
                    kernels[pair].send(&got[0]).unwrap();
                    assert_eq!(came(front), frames, "{mode:?}, pair {pair}");
                }
            }
            hands.happens(Event::NoSecond);
            until(|| hands.events.lock().unwrap().is_empty());
            let last = frame(99, 60);
            kernels[1].send(&packet(&last)).unwrap();
            assert_eq!(came(&mut fronts[0]), [last], "{mode:?}");
        });
        assert_eq!((stats.from_peer.frames, stats.to_peer.frames), (40, 41));
    }
}

#[test]
fn to_wait_for_interrupts_is_refused_where_there_are_none() {
    let (mut puppet, waiter, _hands) = rig(false);
    let work = Drop::new(None);
    let options = options(Mode::Irq);
    let result = serve(
        &mut puppet,
        &mut [work],
        &waiter,
        &options,
        None,
        |_| (),
        |_| (),
    );
    assert!(matches!(result, Err(Error::NoInterrupts)));
}

#[test]
fn an_idle_link_without_interrupts_costs_a_look_a_millisecond() {
    let (nic, _kernel) = socket();
    let start = Instant::now();
    let (stats, _) = beside(
        rig(false),
        Bridge::new(nic, None),
        Mode::Adaptive,
        |hands| {
            let mut front = hands.connect(&JoinConfig::default());
            thread::sleep(Duration::from_millis(300));
            // A frame that comes in the middle of it is seen.
            assert_eq!(send(&mut front, &[frame(1, 60)]), 1);
            until(|| front.drained().unwrap());
        },
    );
    assert_eq!((stats.from_peer.frames, stats.links), (1, 1));
    assert!(stats.sleeps > 0, "it slept");
    let most = u64::try_from(start.elapsed().as_millis()).unwrap();
    assert!(stats.sleeps <= most, "{} sleeps in {most} ms", stats.sleeps);
}

#[test]
fn it_ends_when_the_time_is_over_and_the_last_report_says_so() {
    let (mut puppet, waiter, hands) = rig(false);
    let mut front = hands.connect(&JoinConfig::default());
    assert_eq!(send(&mut front, &[frame(1, 60), frame(2, 100)]), 2);
    let limited = Options {
        mode: Mode::Poll,
        time: Some(Duration::from_millis(200)),
        report: Some(Duration::from_millis(50)),
    };
    let mut lines = Vec::new();
    let report = |report: &Report| lines.push(serde_json::to_value(report).unwrap());
    serve(
        &mut puppet,
        &mut [Drop::new(None)],
        &waiter,
        &limited,
        None,
        report,
        |_| (),
    )
    .unwrap();
    let (last, earlier) = lines.split_last().unwrap();
    assert!(!earlier.is_empty() && earlier.iter().all(|line| line["last"] == false));
    assert_eq!(last["last"], true);
    assert_eq!(last["schema_version"], 1);
    assert_eq!(last["link_up"], true);
    assert_eq!(last["from_peer"]["frames"], 2);
    assert_eq!(last["from_peer"]["bytes"], 160);
    let ring = &last["queues"][0]["from_peer"];
    assert_eq!((&ring["frames"], &ring["bytes"]), (&2.into(), &160.into()));
    let bursts = ring["notified"].as_u64().unwrap() + ring["suppressed"].as_u64().unwrap();
    assert!([1, 2].contains(&bursts), "{ring}");
    let other = &last["queues"][0]["to_peer"];
    assert_eq!(
        other.to_string(),
        r#"{"bytes":0,"frames":0,"notified":0,"suppressed":0}"#
    );
    assert!(last["seconds"].as_f64().unwrap() >= 0.2);
    assert!(last.get("checked").is_none(), "no sink, nothing checked");
}

#[test]
fn it_ends_when_the_count_is_reached() {
    let (mut puppet, waiter, hands) = rig(false);
    let mut front = hands.connect(&JoinConfig::default());
    assert_eq!(send(&mut front, &[frame(1, 60), frame(2, 60)]), 2);
    let work = Drop::new(Some(2));
    let stats = serve(
        &mut puppet,
        &mut [work],
        &waiter,
        &options(Mode::Poll),
        None,
        |_| (),
        |_| (),
    );
    assert_eq!(stats.unwrap().from_peer.frames, 2);
}

/// A file for a test.
fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("netd-{name}-{}", std::process::id()))
}

fn capture_to(path: &Path, limits: &str) -> Option<Capture> {
    let file: CaptureFile = format!("{}{limits}", path.display()).parse().unwrap();
    Some(Capture::create(&file, "test").unwrap())
}

#[test]
fn a_reader_of_the_capture_sees_frames_while_it_serves_in_every_mode() {
    for (mode, interrupts) in MODES {
        let path = scratch("live");
        let capture = capture_to(&path, ",count=3");
        let work = [Drop::new(None)];
        let (stats, notes) = captured_beside(rig(interrupts), work, mode, capture, |hands| {
            let mut front = hands.connect(&JoinConfig::default());
            for number in 1..4 {
                let lens: Vec<_> = (1..=number).map(|number| 100 * number).collect();
                assert_eq!(send(&mut front, &[frame(number, 100 * number)]), 1);
                until(|| lens_in(&std::fs::read(&path).unwrap()) == lens);
            }
            // One more than it may have.
            assert_eq!(send(&mut front, &[frame(4, 400)]), 1);
            until(|| front.drained().unwrap());
        });
        assert_eq!(stats.from_peer.frames, 4);
        assert_eq!(notes, ["link up"], "{mode:?}");
        assert_eq!(lens_in(&std::fs::read(&path).unwrap()), [100, 200, 300]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_full_disk_costs_the_capture_with_one_line_and_no_frame() {
    let capture = capture_to(Path::new("/dev/full"), "");
    let (nic, kernel) = socket();
    let work = [Bridge::new(nic, None)];
    let (stats, notes) = captured_beside(rig(true), work, Mode::Poll, capture, |hands| {
        let mut front = hands.connect(&JoinConfig::default());
        for number in 0..200 {
            let sent = frame(number, 1514);
            assert_eq!(send(&mut front, slice::from_ref(&sent)), 1);
            let mut got = Vec::new();
            until(|| {
                got.extend(packets(&kernel));
                !got.is_empty()
            });
            assert_eq!(got, [packet(&sent)]);
        }
    });
    assert_eq!(stats.from_peer.frames, 200);
    let [up, why] = &notes[..] else {
        panic!("{notes:?}");
    };
    assert_eq!(up, "link up");
    assert!(why.starts_with("--capture: ") && why.contains("No space left"));
}
