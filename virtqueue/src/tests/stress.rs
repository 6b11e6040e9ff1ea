//! Two threads over real memory.

use core::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;
use crate::linear;

/// A frame's length; what the device writes is less.
fn length(n: u32) -> u32 {
    n % 1500 + 1
}

/// Says so when a side has ended, also by a failed assertion: then the other does not wait for it.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn run<L: Layout<Driver<linear::Linear>: Send, Device<linear::Linear>: Send>>(
    config: &RingConfig,
    base: u32,
    count: u32,
) {
    let memory = linear::tests::leak(RING, 512);
    let mut driver = L::driver_at(memory, config, base).unwrap();
    let mut device = L::device_at(memory, config, base).unwrap();
    let (over, worker_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (over, worker_over) = (&over, &worker_over);
    let worker = move || {
        let _ends = Ends(worker_over);
        let mut chains = [Chain::default(); 64];
        let mut buffers = [Buffer::default(); 64];
        let mut expected = 0;
        while expected < count {
            let got = device.get(&mut chains, &mut buffers).unwrap();
            if got == 0 {
                assert!(!over.load(Ordering::Relaxed), "the other thread failed");
                thread::yield_now();
            }
            for chain in &chains[..got] {
                let buffer = buffers[usize::from(chain.first)];
                assert_eq!(buffer.addr, RING + u64::from(expected % 1024));
                assert_eq!(buffer.len, length(expected));
                device.put(chain.id, expected % buffer.len);
                expected += 1;
            }
            device.publish();
        }
    };
    thread::scope(|scope| {
        let _ends = Ends(over);
        let worker = scope.spawn(worker);
        let mut sent = vec![0; usize::from(config.size)];
        let mut used = [Used::default(); 64];
        let (mut added, mut done) = (0, 0);
        while done < count {
            for _ in 0..64.min(count - added) {
                let buffer = Buffer {
                    addr: RING + u64::from(added % 1024),
                    len: length(added),
                    device_writes: true,
                };
                let Some(id) = driver.add(&[buffer]) else {
                    break;
                };
                sent[usize::from(id)] = added;
                added += 1;
            }
            driver.publish();
            let ended = worker_over.load(Ordering::Relaxed);
            let taken = driver.take(&mut used).unwrap();
            if taken == 0 {
                assert!(!ended, "the other thread failed");
                thread::yield_now();
            }
            for used in &used[..taken] {
                assert_eq!(sent[usize::from(used.id)], done);
                assert_eq!(used.len, done % length(done));
                done += 1;
            }
        }
        worker.join().unwrap();
    });
    assert_eq!(driver.free(), config.size);
}

#[test]
fn two_threads_exchange_a_million_buffers_through_split_rings() {
    for in_order in [false, true] {
        let config = RingConfig {
            in_order,
            ..config::<Split>(256)
        };
        run::<Split>(&config, 65000, 1_000_000);
    }
}

#[test]
fn two_threads_exchange_a_million_buffers_through_packed_rings() {
    for (size, in_order, count) in [
        (256, false, 1_000_000),
        (200, true, 1_000_000),
        (3, false, 50_000),
    ] {
        let config = RingConfig {
            in_order,
            ..config::<Packed>(size)
        };
        run::<Packed>(&config, Packed::start(size, 2), count);
    }
}
