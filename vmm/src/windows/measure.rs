//! What changing a window costs, in figures: `cargo test -p vmm --release -- --ignored --nocapture cost_of`.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use devices::host::Permission;

use super::tests::native::{Running, meanwhile};
use super::*;
use crate::testing::{Op, User, memfd, region};

const BAR: u64 = 0xC000_0000;
const SIZE: u64 = 128 << 20;
const ROUNDS: u64 = 2000;

/// Microseconds: median and 99th percentile.
fn quantiles(times: &mut [Duration]) -> (f64, f64) {
    times.sort();
    let at = |n: usize| times[(times.len() - 1) * n / 100].as_secs_f64() * 1e6;
    (at(50), at(99))
}

/// Sweeps a second that the guest makes while `work` runs.
fn rate<T>(running: &Running, work: impl FnOnce() -> T) -> (f64, T) {
    let (start, before) = (Instant::now(), running.progress());
    let result = work();
    let sweeps = running.progress() - before;
    #[allow(clippy::cast_precision_loss)] // a count for people
    (sweeps as f64 / start.elapsed().as_secs_f64(), result)
}

/// Times `up` and `down` alternately; `pause` between the pairs.
fn pairs(
    pause: Duration,
    rounds: u64,
    mut up: impl FnMut(u64),
    mut down: impl FnMut(u64),
) -> (Vec<Duration>, Vec<Duration>) {
    let mut times = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let start = Instant::now();
        up(round);
        times.0.push(start.elapsed());
        let start = Instant::now();
        down(round);
        times.1.push(start.elapsed());
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    times
}

#[test]
#[ignore = "prints a table and proves nothing"]
fn cost_of_a_change_by_the_number_of_live_windows() {
    println!(
        "live | mechanism | up p50 | up p99 | down p50 | down p99 us | guest alone | back to back | 1000 a second (sweeps/s)"
    );
    for live in [16, 256, 1024, 8192] {
        let user = User::new(BAR, SIZE);
        let file = memfd(&[0; 512], true);
        let window = Arc::clone(&user.bar.window);
        for number in 0..live {
            let page = region(&file, number % 512 * PAGE_SIZE, PAGE_SIZE);
            let at = number * 2 * PAGE_SIZE;
            window.map(at, &page, Permission::READ_WRITE).unwrap();
        }
        let slots = Arc::clone(&user.machine.windows().slots);
        let area = Area::new(1 << 21).unwrap();
        let rw = Permission::READ_WRITE;
        area.map(0, PAGE_SIZE, &file, 0, rw).unwrap();
        // Changes go on behind the live windows, in the same chunks as far as those reach.
        let change = |round: u64| (live + round % 64) * 2 * PAGE_SIZE;
        let up = |round: u64| {
            let page = region(&file, round % 512 * PAGE_SIZE, PAGE_SIZE);
            window.map(change(round), &page, rw).unwrap();
        };
        let down = |round: u64| window.unmap(change(round), PAGE_SIZE).unwrap();
        let slot = slots.allocate().unwrap();
        let add = |_| {
            let at = BAR + SIZE + PAGE_SIZE;
            // SAFETY: the area outlives the VM's run below.
            unsafe { slots.show(slot, at, area.hva(0), PAGE_SIZE) }.unwrap();
        };
        let delete = |_| slots.hide(slot).unwrap();
        let (user, ()) = meanwhile(user, Op::Sweep, BAR, |running| {
            thread::sleep(Duration::from_millis(100));
            let second = || thread::sleep(Duration::from_millis(500));
            let millisecond = Duration::from_millis(1);
            let (alone, ()) = rate(running, second);
            let (busy, times) = rate(running, || pairs(Duration::ZERO, ROUNDS, up, down));
            let (paced, _) = rate(running, || pairs(millisecond, 500, up, down));
            print(live, "mmap", times, [alone, busy, paced]);
            let (alone, ()) = rate(running, second);
            let (busy, times) = rate(running, || pairs(Duration::ZERO, ROUNDS, add, delete));
            let (paced, _) = rate(running, || pairs(millisecond, 500, add, delete));
            print(live, "memory slot", times, [alone, busy, paced]);
        });
        let (at, quiet) = (change(0), Duration::from_millis(20));
        let word = || {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let (user, times) = meanwhile(user, Op::Hammer, BAR + at, |_| {
            let up = |_| {
                let before = word();
                window.map(at, &region(&file, 0, PAGE_SIZE), rw).unwrap();
                while word() == before {
                    std::hint::spin_loop();
                }
            };
            pairs(quiet, 100, up, |_| window.unmap(at, PAGE_SIZE).unwrap())
        });
        print(
            live,
            "mmap, page in use (up: until the guest's first write)",
            times,
            [0.0; 3],
        );
        drop(user);
    }
}

#[test]
#[ignore = "prints a table and proves nothing"]
fn cost_of_an_access_that_nothing_lets_through() {
    println!("access | p50 us | p99 us");
    let mut user = User::new(BAR, SIZE);
    let file = memfd(&[0], true);
    let page = region(&file, 0, PAGE_SIZE);
    let window = Arc::clone(&user.bar.window);
    window.map(0, &page, Permission::READ_WRITE).unwrap();
    let write = Permission::WRITE;
    window.map(2 * PAGE_SIZE, &page, write).unwrap();
    for (what, op, offset) in [
        ("none: a load from a mapping", Op::Load32, 0),
        ("load, no slot", Op::Load32, CHUNK),
        ("load, hole under a slot", Op::Load32, PAGE_SIZE),
        ("store to a write-only page", Op::Store32, 2 * PAGE_SIZE),
        ("32-byte load, hole under a slot", Op::LoadYmm, PAGE_SIZE),
        ("exchange, hole under a slot", Op::Exchange, PAGE_SIZE),
        ("vector arithmetic, hole under a slot", Op::Xor, PAGE_SIZE),
    ] {
        let mut times: Vec<Duration> = (0..500)
            .map(|_| {
                let start = Instant::now();
                user.call(op, BAR + offset, 0).unwrap();
                start.elapsed()
            })
            .collect();
        let (p50, p99) = quantiles(&mut times);
        println!("{what} | {p50:.0} | {p99:.0}");
    }
}

fn print(live: u64, what: &str, mut times: (Vec<Duration>, Vec<Duration>), rates: [f64; 3]) {
    let (up, down) = (quantiles(&mut times.0), quantiles(&mut times.1));
    println!(
        "{live} | {what} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} | {:.0} | {:.0}",
        up.0, up.1, down.0, down.1, rates[0], rates[1], rates[2]
    );
}
