//! Time of a request (add, publish, get, put, publish, take) against the length of a batch, without payload: on one core, and between two that both
//! poll. The times are per request, whatever the batch.
//!
//! Between cores the ring is kept as full as it gets, so the time is that of the slower side and not of a round trip.

// Threads are pinned through libc.
#![allow(unsafe_code)]

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, DriverRing, Layout, RingConfig, Used};

#[path = "../tests/common/mod.rs"]
mod common;
use common::{Shared, place};

const BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const SIZE: u16 = 256;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Both sides of a fresh ring, which ask for no notifications, and where buffers are.
fn pair<L: Layout>(in_order: bool) -> (L::Driver<Linear>, L::Device<Linear>, u64) {
    let shared = Shared::new(1 << 20);
    let (config, data) = place::<L>(&shared, SIZE);
    let config = RingConfig { in_order, ..config };
    let mut driver = L::driver(shared.of_driver(), &config).unwrap();
    let mut device = L::device(shared.of_device(), &config).unwrap();
    driver.disable_calls();
    device.disable_kicks();
    (driver, device, data)
}

/// Adds and publishes a batch of small buffers.
fn offer(driver: &mut impl DriverRing, batch: usize, data: u64, next: &mut u64) {
    for _ in 0..batch {
        let buffer = Buffer {
            addr: data + *next % 1024 * 64,
            len: 64,
            device_writes: false,
        };
        driver.add(&[buffer]).unwrap();
        *next += 1;
    }
    driver.publish();
}

/// Gets and uses up to a batch.
fn answer(device: &mut impl DeviceRing, chains: &mut [Chain], buffers: &mut [Buffer]) -> usize {
    let count = device.get(chains, buffers).unwrap();
    if count > 0 {
        device.put_read(&chains[..count]);
        device.publish();
    }
    count
}

/// The time of `iterations` requests, of which only whole batches were timed.
fn scale(elapsed: Duration, iterations: u64, done: u64) -> Duration {
    let nanos = u128::from(iterations) * elapsed.as_nanos() / u128::from(done);
    Duration::from_nanos(nanos.try_into().unwrap())
}

fn same_core<L: Layout>(group: &mut Group<'_>, name: &str, in_order: bool) {
    for batch in BATCHES {
        let (mut driver, mut device, data) = pair::<L>(in_order);
        let mut chains = [Chain::default(); 64];
        let mut buffers = [Buffer::default(); 64];
        let mut used = [Used::default(); 64];
        let mut next = 0;
        group.bench_function(BenchmarkId::new(name, batch), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut done = 0;
                let start = Instant::now();
                while done < iterations {
                    offer(&mut driver, batch, data, &mut next);
                    let got = answer(&mut device, &mut chains[..batch], &mut buffers);
                    let taken = driver.take(&mut used[..batch]).unwrap();
                    assert_eq!((got, taken), (batch, batch));
                    done += u64::try_from(batch).unwrap();
                }
                scale(start.elapsed(), iterations, done)
            });
        });
    }
}

fn cross_core<L: Layout>(group: &mut Group<'_>, name: &str, in_order: bool, peer_core: usize)
where
    L::Device<Linear>: Send,
{
    for batch in BATCHES {
        let (mut driver, mut device, data) = pair::<L>(in_order);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                pin(peer_core);
                let mut chains = [Chain::default(); 64];
                let mut buffers = [Buffer::default(); 64];
                while !stop.load(Ordering::Relaxed) {
                    if answer(&mut device, &mut chains[..batch], &mut buffers) == 0 {
                        spin_loop();
                    }
                }
            });
            let mut used = [Used::default(); 64];
            let mut next = 0;
            group.bench_function(BenchmarkId::new(name, batch), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut done = 0;
                    let start = Instant::now();
                    while done < iterations {
                        if usize::from(driver.free()) >= batch {
                            offer(&mut driver, batch, data, &mut next);
                        }
                        let count = driver.take(&mut used[..batch]).unwrap();
                        if count == 0 {
                            spin_loop();
                        }
                        done += u64::try_from(count).unwrap();
                    }
                    let elapsed = start.elapsed();
                    // The next sample starts with an empty ring.
                    while driver.free() < SIZE {
                        driver.take(&mut used).unwrap();
                    }
                    scale(elapsed, iterations, done)
                });
            });
            stop.store(true, Ordering::Relaxed);
        });
    }
}

/// The processors that this process may use.
fn cores() -> Vec<usize> {
    // SAFETY: all zeroes is a set of no processor.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours, and as long as we say.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let all = 0..usize::try_from(libc::CPU_SETSIZE).unwrap();
    // SAFETY: no number in the range is beyond the set.
    all.filter(|core| unsafe { libc::CPU_ISSET(*core, &set) })
        .collect()
}

/// Keeps the calling thread on a processor.
fn pin(core: usize) {
    // SAFETY: all zeroes is a set of no processor.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: one of `cores`, which are all within the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set is ours, and as long as we say.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn rings(criterion: &mut Criterion) {
    let cores = cores();
    let [own, others @ ..] = cores.as_slice() else {
        return;
    };
    pin(*own);
    let mut group = criterion.benchmark_group("same-core");
    same_core::<Split>(&mut group, "split", false);
    same_core::<Packed>(&mut group, "packed", false);
    same_core::<Packed>(&mut group, "packed-in-order", true);
    group.finish();

    let Some(peer) = others.first() else {
        eprintln!("there is one core only: nothing is measured between two");
        return;
    };
    let mut group = criterion.benchmark_group("cross-core");
    cross_core::<Split>(&mut group, "split", false, *peer);
    cross_core::<Packed>(&mut group, "packed", false, *peer);
    cross_core::<Packed>(&mut group, "packed-in-order", true, *peer);
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .without_plots();
    targets = rings
}
criterion_main!(benches);
