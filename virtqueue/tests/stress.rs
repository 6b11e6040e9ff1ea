//! Two threads, one ring, contents checked: the hardware's memory model instead of loom's.
//!
//! Every operation is one buffer, which carries its number and a checksum of it: written by the driver and verified by the device, or written by the
//! device and verified by the driver. A hundred million operations a layout in a release build, a million in a debug build.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, DriverRing, Layout, RingConfig, Used};

mod common;
use common::{Random, Shared, place, read_words, write_words};

/// Operations a layout, over all its runs.
const OPERATIONS: u64 = if cfg!(debug_assertions) {
    1_000_000
} else {
    100_000_000
};

/// Bytes of a buffer: a line, so that a payload is not published by its neighbour.
const BUFFER: u64 = 64;

/// One pair of threads at a time: there may be no more than two cores.
static CORES: Mutex<()> = Mutex::new(());

/// What an operation carries.
fn payload(number: u64, by_device: bool) -> [u64; 3] {
    let salt = if by_device {
        0x9e37_79b9_7f4a_7c15
    } else {
        0x2545_f491_4f6c_dd1d
    };
    let mixed = (number ^ salt).wrapping_mul(0xff51_afd7_ed55_8ccd);
    [number, mixed, number ^ mixed.rotate_left(17)]
}

/// Which of the two writes the payload: about half each, in no simple pattern.
fn by_device(number: u64) -> bool {
    (number.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 40) & 1 == 1
}

#[derive(Clone, Copy)]
struct Run {
    config: RingConfig,
    data: u64,
    operations: u64,
    /// Most operations that a publish covers.
    batch: usize,
    /// Used in another order than taken.
    shuffle: bool,
}

/// How a side waits when there is nothing to do.
trait Wait {
    /// Called where nothing was found. `arm` asks for a notification, and returns whether something is there already.
    fn idle(&mut self, arm: impl FnOnce() -> bool);
    /// Called where something was found. Returns whether notifications are to be turned off.
    fn busy(&mut self) -> bool;
    /// The other side wants to be notified.
    fn notify(&self);
}

/// Fails where nothing happens for a long time, or where the other side has failed.
struct Watch<'a> {
    failed: &'a AtomicBool,
    since: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(failed: &'a AtomicBool) -> Self {
        Self {
            failed,
            since: None,
        }
    }

    fn idle(&mut self, what: &str) {
        assert!(
            !self.failed.load(Ordering::Relaxed),
            "the other side failed"
        );
        let since = *self.since.get_or_insert_with(Instant::now);
        assert!(since.elapsed() < Duration::from_secs(20), "{what}");
        thread::yield_now();
    }

    fn busy(&mut self) {
        self.since = None;
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// Looks again.
struct Poll<'a>(Watch<'a>);

impl Wait for Poll<'_> {
    fn idle(&mut self, _: impl FnOnce() -> bool) {
        self.0.idle("nothing comes any more");
    }
    fn busy(&mut self) -> bool {
        self.0.busy();
        false
    }
    fn notify(&self) {}
}

/// Looks a few times, then asks for a notification and does not look again before it has come.
struct Sleep<'a> {
    watch: Watch<'a>,
    own: &'a AtomicBool,
    peer: &'a AtomicBool,
    random: Random,
    /// How many more times to look.
    looks: u64,
    /// Notifications are asked for.
    armed: bool,
    slept: u64,
}

impl<'a> Sleep<'a> {
    fn new(failed: &'a AtomicBool, own: &'a AtomicBool, peer: &'a AtomicBool) -> Self {
        Self {
            watch: Watch::new(failed),
            own,
            peer,
            random: Random(0x0b5e_55ed),
            looks: 0,
            armed: true,
            slept: 0,
        }
    }
}

impl Wait for Sleep<'_> {
    fn idle(&mut self, arm: impl FnOnce() -> bool) {
        if let Some(left) = self.looks.checked_sub(1) {
            self.looks = left;
            return;
        }
        self.armed = true;
        // So that the moment at which it falls asleep is another each time.
        self.looks = self.random.below(40);
        if arm() {
            return;
        }
        self.slept += 1;
        while !self.own.swap(false, Ordering::Acquire) {
            self.watch.idle("a lost wake-up");
        }
    }

    fn busy(&mut self) -> bool {
        self.watch.busy();
        std::mem::take(&mut self.armed)
    }

    fn notify(&self) {
        self.peer.store(true, Ordering::Release);
    }
}

/// Adds all operations and verifies what comes back.
fn drive(ring: &mut impl DriverRing, memory: Linear, run: &Run, wait: &mut impl Wait) {
    let size = u64::from(run.config.size);
    // The number of the operation that a token stands for, and the buffers that are free.
    let mut of_token = vec![u64::MAX; usize::from(run.config.size)];
    let mut place_of = vec![0; usize::from(run.config.size)];
    let mut places: Vec<u64> = (0..size).map(|n| run.data + BUFFER * n).collect();
    let mut used = vec![Used::default(); run.batch];
    let (mut next, mut done) = (0, 0);
    while done < run.operations {
        let mut added = 0;
        while added < run.batch && next < run.operations {
            let Some(&addr) = places.last() else { break };
            let device_writes = by_device(next);
            let words = if device_writes {
                [u64::MAX; 3]
            } else {
                payload(next, false)
            };
            write_words(&memory, addr, &words);
            let buffer = Buffer {
                addr,
                len: 24,
                device_writes,
            };
            let Some(token) = ring.add(&[buffer]) else {
                break;
            };
            places.pop();
            let old = std::mem::replace(&mut of_token[usize::from(token)], next);
            assert_eq!(old, u64::MAX, "a token that is outstanding was given again");
            place_of[usize::from(token)] = addr;
            next += 1;
            added += 1;
        }
        if ring.publish() {
            wait.notify();
        }
        let count = ring.take(&mut used).unwrap();
        if count == 0 {
            let full = places.is_empty() || next == run.operations;
            if full {
                wait.idle(|| ring.enable_calls());
            }
            continue;
        }
        if wait.busy() {
            ring.disable_calls();
        }
        for used in &used[..count] {
            let token = usize::from(used.id);
            let number = std::mem::replace(&mut of_token[token], u64::MAX);
            assert_ne!(
                number,
                u64::MAX,
                "a chain that is not outstanding came back"
            );
            let words: [u64; 3] = read_words(&memory, place_of[token]);
            let device_wrote = by_device(number);
            assert_eq!(words, payload(number, device_wrote), "operation {number}");
            assert_eq!(
                used.len,
                if device_wrote { 24 } else { 0 },
                "operation {number}"
            );
            if !run.shuffle {
                assert_eq!(number, done, "out of order");
            }
            places.push(place_of[token]);
            done += 1;
        }
    }
    assert_eq!(ring.free(), run.config.size);
}

/// Verifies and answers all operations.
fn serve(ring: &mut impl DeviceRing, memory: Linear, run: &Run, wait: &mut impl Wait) {
    let mut chains = vec![Chain::default(); run.batch];
    let mut buffers = vec![Buffer::default(); run.batch];
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut next = 0;
    while next < run.operations {
        let count = ring.get(&mut chains, &mut buffers).unwrap();
        if count == 0 {
            wait.idle(|| ring.enable_kicks());
            continue;
        }
        if wait.busy() {
            ring.disable_kicks();
        }
        for (chain, buffer) in chains[..count].iter().zip(&buffers) {
            assert_eq!(chain.count, 1);
            let number = next;
            assert_eq!((buffer.len, buffer.device_writes), (24, by_device(number)));
            if buffer.device_writes {
                let words: [u64; 3] = read_words(&memory, buffer.addr);
                assert_eq!(words, [u64::MAX; 3], "operation {number}");
                write_words(&memory, buffer.addr, &payload(number, true));
            } else {
                let words: [u64; 3] = read_words(&memory, buffer.addr);
                assert_eq!(words, payload(number, false), "operation {number}");
            }
            next += 1;
        }
        let chains = &mut chains[..count];
        if run.shuffle {
            let by = random.below(count.try_into().unwrap());
            chains.rotate_left(by.try_into().unwrap());
        }
        let writes = |chain: &Chain| buffers[usize::from(chain.first)].device_writes;
        for run in chains.chunk_by(|a, b| !writes(a) && !writes(b)) {
            match run {
                [chain] if writes(chain) => ring.put(chain.id, 24),
                run => ring.put_read(run),
            }
        }
        if ring.publish() {
            wait.notify();
        }
    }
}

fn config<L: Layout>(size: u16, event_idx: bool, in_order: bool) -> (Shared, RingConfig, u64) {
    let shared = Shared::new(1 << 20);
    let (config, data) = place::<L>(&shared, size);
    let config = RingConfig {
        event_idx,
        in_order,
        ..config
    };
    (shared, config, data)
}

fn poll<L: Layout>(size: u16, operations: u64, batch: usize, in_order: bool)
where
    L::Device<Linear>: Send,
{
    let _cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
    let (shared, config, data) = config::<L>(size, false, in_order);
    let run = Run {
        config,
        data,
        operations,
        batch,
        shuffle: !in_order,
    };
    let mut driver = L::driver(shared.of_driver(), &config).unwrap();
    let mut device = L::device(shared.of_device(), &config).unwrap();
    driver.disable_calls();
    device.disable_kicks();
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut wait = Poll(Watch::new(&failed));
            serve(&mut device, shared.of_device(), &run, &mut wait);
        });
        let mut wait = Poll(Watch::new(&failed));
        drive(&mut driver, shared.of_driver(), &run, &mut wait);
    });
}

fn sleep<L: Layout>(size: u16, operations: u64, event_idx: bool)
where
    L::Device<Linear>: Send,
{
    let _cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
    let (shared, config, data) = config::<L>(size, event_idx, false);
    let run = Run {
        config,
        data,
        operations,
        batch: 2,
        shuffle: true,
    };
    let [failed, kicked, called] = [false; 3].map(AtomicBool::new);
    let mut driver = L::driver(shared.of_driver(), &config).unwrap();
    let mut device = L::device(shared.of_device(), &config).unwrap();
    let (by_driver, by_device) = thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let mut wait = Sleep::new(&failed, &kicked, &called);
            serve(&mut device, shared.of_device(), &run, &mut wait);
            wait.slept
        });
        let mut wait = Sleep::new(&failed, &called, &kicked);
        drive(&mut driver, shared.of_driver(), &run, &mut wait);
        (wait.slept, peer.join().unwrap())
    });
    // Otherwise nothing was tested.
    assert!(
        by_driver > 100 && by_device > 100,
        "{by_driver} {by_device}"
    );
}

/// Of the operations of a layout: how many are made with sides that sleep, for each kind of suppression.
const SLEEPY: u64 = OPERATIONS / 100;
/// The others, in three runs.
const POLLED: u64 = (OPERATIONS - 2 * SLEEPY) / 4;

#[test]
fn split_in_any_order_every_operation_arrives_once_and_whole() {
    poll::<Split>(256, 2 * POLLED, 32, false);
}

#[test]
fn split_in_order_every_operation_arrives_once_and_whole() {
    poll::<Split>(256, POLLED, 32, true);
}

#[test]
fn split_in_a_ring_of_four_every_operation_arrives_once_and_whole() {
    poll::<Split>(4, POLLED, 3, false);
}

#[test]
fn split_no_wake_up_is_lost_with_flags() {
    sleep::<Split>(1, SLEEPY, false);
}

#[test]
fn split_no_wake_up_is_lost_with_event_indices() {
    sleep::<Split>(1, SLEEPY, true);
}

#[test]
fn packed_in_any_order_every_operation_arrives_once_and_whole() {
    poll::<Packed>(768, 2 * POLLED, 32, false);
}

#[test]
fn packed_in_order_every_operation_arrives_once_and_whole() {
    poll::<Packed>(768, POLLED, 32, true);
}

#[test]
fn packed_in_a_ring_of_five_every_operation_arrives_once_and_whole() {
    poll::<Packed>(5, POLLED, 3, false);
}

#[test]
fn packed_no_wake_up_is_lost_with_flags() {
    sleep::<Packed>(1, SLEEPY, false);
}

#[test]
fn packed_no_wake_up_is_lost_with_event_indices() {
    sleep::<Packed>(1, SLEEPY, true);
}
