//! The upper bound: the same ring code and the same workloads between two pinned threads of this process.
//!
//! What the guests have and this has not: two address spaces, a window, and whatever the virtualisation costs.

use std::sync::{Arc, Barrier, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bare_metal::frame::End;
use bare_metal::{Link, Outcome, Run, Work, execute};
use guest_driver::Port;
use guest_driver::net::{BUFFER_STRIDE, NetPort};
use guest_driver::peer::{PeerPort, Vring};
use guest_driver::virtio_pci::Notify;
use virtqueue::linear::Linear;
use virtqueue::{RingConfig, split};

use super::Setup;
use super::pairs::BoundSample;
use super::plan::Case;
use super::record::{Rtt, SampleResult, WorkResult};
use super::session::RECEIVER_MS;
use crate::cli::{Direction, Mode};
use crate::sys;

/// What the driver in a guest aligns the parts of a ring to.
const ALIGN: u64 = 4096;

/// Memory for two rings and their buffers, used again for each sample.
pub struct Bound {
    memory: Linear,
    rings: [RingConfig; 2],
    pools: [u64; 2],
    tsc_khz: u64,
}

/// What takes an interrupt's place: a thread sleeps until it is rung.
#[derive(Clone, Debug, Default)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Notify for Bell {
    fn notify(&self) {
        let (rung, changed) = &*self.0;
        *rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_one();
    }
}

impl Bell {
    fn wait(&self, time: Duration) {
        let (rung, changed) = &*self.0;
        let rung = rung.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rung, _) = changed
            .wait_timeout_while(rung, time, |rung| !*rung)
            .unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

/// One end, as a workload sees it.
struct HostLink<P> {
    end: End,
    port: P,
    bell: Bell,
    tsc_khz: u64,
}

impl<P: Port> Link for HostLink<P> {
    type Port = P;

    fn end(&self) -> End {
        self.end
    }

    #[inline(always)]
    fn port(&mut self) -> Option<&mut P> {
        Some(&mut self.port)
    }

    fn service(&mut self) {}

    fn sleep(&mut self, until: u64) {
        let ticks = until.saturating_sub(self.now());
        self.bell
            .wait(Duration::from_micros(ticks * 1000 / self.tsc_khz.max(1)));
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        sys::tsc()
    }

    fn ticks_per_ms(&self) -> u64 {
        self.tsc_khz
    }
}

impl Bound {
    /// Memory of the kind that the guests have, and rings of the same length and with the same features.
    pub fn new(setup: &Setup, tsc_khz: u64, event_idx: bool) -> Result<Self> {
        let descriptors = u64::from(setup.queue_size);
        let mut end = 0_u64;
        let mut area = |len: u64| {
            let start = end;
            end = (end + len).next_multiple_of(ALIGN);
            start
        };
        let mut ring = || RingConfig {
            size: setup.queue_size,
            desc: area(16 * descriptors),
            driver: area(6 + 2 * descriptors),
            device: area(6 + 8 * descriptors),
            event_idx,
            in_order: false,
        };
        let rings = [ring(), ring()];
        let pool = descriptors * BUFFER_STRIDE as u64;
        let pools = [area(pool), area(pool)];
        // Executed here as by the guest's start code: without it, copies are narrower.
        guest_driver::bulk::detect();
        Ok(Self {
            memory: sys::shared_memory(end, setup.memory.hugepages)
                .context("no memory for the upper bound")?,
            rings,
            pools,
            tsc_khz,
        })
    }

    /// One sample.
    pub fn sample(&mut self, setup: &Setup, case: &Case) -> Result<BoundSample> {
        let (to_back, to_front) = (Bell::default(), Bell::default());
        let (memory, [rx, tx]) = (self.memory, &self.rings);
        let ring_error = |error| anyhow!("the upper bound's rings: {error}");
        let driver = |config| split::Driver::new(memory, config).map_err(ring_error);
        let half = |config, pool| Ok::<_, anyhow::Error>((driver(config)?, pool, to_back.clone()));
        let mut front = NetPort::new(memory, half(rx, self.pools[0])?, half(tx, self.pools[1])?)
            .map_err(|error| anyhow!("the upper bound's buffers: {error}"))?;
        let vring = |config| {
            Ok::<_, anyhow::Error>(Vring {
                ring: split::Device::new(memory, config).map_err(ring_error)?,
                call: to_front.clone(),
                kicks: true,
            })
        };
        let back = PeerPort::new(memory, vring(rx)?, vring(tx)?);
        front.fill();

        let mut back = HostLink {
            end: End::BackEnd,
            port: back,
            bell: to_back,
            tsc_khz: self.tsc_khz,
        };
        let mut front = HostLink {
            end: End::FrontEnd,
            port: front,
            bell: to_front,
            tsc_khz: self.tsc_khz,
        };
        let [back_run, front_run] = runs(setup, case);
        let start = Barrier::new(2);
        let (back, front) = thread::scope(|scope| {
            let back = scope.spawn(|| work(&mut back, &back_run, setup.cores[0], &start));
            let front = scope.spawn(|| work(&mut front, &front_run, setup.cores[1], &start));
            (back.join(), front.join())
        });
        let lost = |_| anyhow!("a thread of the upper bound was lost");
        let (back, back_share) = back.map_err(lost)??;
        let (front, front_share) = front.map_err(lost)??;
        let ends = [result(&back), result(&front)];
        Ok(BoundSample {
            result: SampleResult::new(case.direction, &ends, self.tsc_khz)
                .context("the upper bound")?,
            shares: (setup.mode == Mode::Poll).then_some([back_share, front_share]),
        })
    }
}

/// The two ends' workloads, as a guest's would be, back-end first.
fn runs(setup: &Setup, case: &Case) -> [Run; 2] {
    let works = match case.direction {
        Direction::BeToFe => [Work::Source, Work::Sink],
        Direction::FeToBe => [Work::Sink, Work::Source],
        Direction::Both => [Work::Both, Work::Both],
        Direction::RoundTrip => [Work::RoundTrip, Work::Echo],
    };
    works.map(|work| Run {
        work,
        size: usize::from(case.size),
        batch: usize::from(case.batch),
        ms: setup.ms,
        warmup_ms: setup.warmup_ms,
        interrupts: setup.mode == Mode::Irq,
        timeout_ms: RECEIVER_MS,
        ..Run::default()
    })
}

/// Runs one end; also returns how much of its core it had.
fn work<L: Link>(link: &mut L, run: &Run, core: usize, start: &Barrier) -> Result<(Outcome, f64)> {
    let pinned = sys::pin_to(core);
    // Before an error can return: the other end waits here.
    start.wait();
    pinned.with_context(|| format!("cannot pin a thread to core {core}"))?;
    let (wall, cpu) = (Instant::now(), sys::thread_cpu_ns()?);
    let outcome = execute(link, run).map_err(|error| anyhow!("the upper bound: {error}"))?;
    let used = sys::thread_cpu_ns()?.saturating_sub(cpu);
    let share = used as f64 / wall.elapsed().as_nanos().max(1) as f64;
    Ok((outcome, share))
}

fn result(outcome: &Outcome) -> WorkResult {
    let received = outcome.received.unwrap_or_default();
    WorkResult {
        id: 0,
        rx_frames: received.frames,
        rx_ticks: received.ticks,
        verified: received.verified,
        lost: received.lost,
        duplicated: received.duplicated,
        reordered: received.reordered,
        corrupted: received.corrupted,
        timeout: u64::from(outcome.timeout),
        rtt: outcome.round_trips.as_ref().map(|times| Rtt {
            count: times.count(),
            p50: times.quantile(500),
            p99: times.quantile(990),
            p999: times.quantile(999),
            max: times.max(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;
    use vmm::{HugePages, MemoryConfig};

    fn setup(mode: Mode) -> Option<Setup> {
        let [a, b, ..] = sys::allowed_cores().unwrap()[..] else {
            return None;
        };
        Some(Setup {
            ms: 20,
            warmup_ms: 1,
            mode,
            cores: [a, b],
            queue_size: 64,
            memory: MemoryConfig {
                size: 1 << 20,
                hugepages: HugePages::Off,
                prefault: false,
            },
        })
    }

    fn tsc_khz() -> u64 {
        let (wall, ticks) = (Instant::now(), sys::tsc());
        thread::sleep(Duration::from_millis(20));
        (sys::tsc() - ticks) * 1_000_000 / u64::try_from(wall.elapsed().as_nanos()).unwrap()
    }

    #[test]
    fn the_upper_bound_moves_frames_every_way_and_loses_none() {
        for mode in [Mode::Poll, Mode::Irq] {
            let Some(setup) = setup(mode) else { return };
            let mut bound = Bound::new(&setup, tsc_khz(), true).unwrap();
            for &direction in Direction::value_variants() {
                let case = Case {
                    direction,
                    size: 200,
                    batch: 8,
                };
                let sample = bound.sample(&setup, &case).unwrap();
                let result = &sample.result;
                assert!(!result.faults.any(), "{mode:?} {direction:?} {result:?}");
                assert!(result.frames > 0 && result.verified > result.frames / 2);
                assert_eq!(result.latency.is_some(), direction == Direction::RoundTrip);
            }
        }
    }
}
