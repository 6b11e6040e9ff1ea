//! The upper bound: the same ring code and the same workloads between two pinned threads of this process.
//!
//! What the guests have and this has not: two address spaces, a window, and whatever the virtualisation costs.

use std::sync::{Arc, Barrier, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bare_metal::frame::{End, IMIX};
use bare_metal::{Link, Outcome, Run, Work, execute};
use guest_driver::Port;
use guest_driver::joined::{self, JoinConfig};
use guest_driver::net_port::{Shape, TxShape};
use guest_driver::virtio_pci::Notify;
use virtqueue::linear::Linear;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};

use super::Setup;
use super::pairs::BoundSample;
use super::plan::Case;
use super::record::{Rtt, SampleResult, WorkResult};
use super::session::RECEIVER_MS;
use crate::cli::frames::{Payload, Size, Source};
use crate::cli::rings::{RingSetup, Tx};
use crate::cli::{Direction, Mode};
use crate::sys;

/// Memory for two rings and their buffers, used again for each sample.
pub struct Bound {
    memory: Linear,
    config: JoinConfig,
    /// How many pairs of ends there are, and bytes from one to the next.
    pairs: u16,
    stride: u64,
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
    /// Those of the other queue pairs.
    more: Vec<P>,
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

    #[inline(always)]
    fn pair(&mut self, index: usize) -> Option<&mut P> {
        match index.checked_sub(1) {
            None => Some(&mut self.port),
            Some(other) => self.more.get_mut(other),
        }
    }

    fn use_pairs(&mut self, count: usize) -> bool {
        count <= 1 + self.more.len()
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
    pub fn new(setup: &Setup, rings: &RingSetup, tsc_khz: u64) -> Result<Self> {
        let config = join_config(rings);
        let stride =
            joined::memory_needed(&config).context("the layout has no rings of that size")?;
        let pairs = rings.queues.unwrap_or(1);
        // Executed here as by the guest's start code: without it, copies are narrower.
        guest_driver::bulk::detect();
        Ok(Self {
            memory: sys::shared_memory(stride * u64::from(pairs), setup.memory.hugepages)
                .context("no memory for the upper bound")?,
            config,
            pairs,
            stride,
            tsc_khz,
        })
    }

    /// One sample. There is no bound of two ends that wait.
    pub fn sample(&mut self, setup: &Setup, case: &Case) -> Result<BoundSample> {
        if case.direction == Direction::Idle {
            return Ok(BoundSample::none());
        }
        if case.load.is_none() {
            return self.run(setup, case, None);
        }
        let whole = self.run(setup, &case.whole_load(), None)?;
        let rate = case.rate(whole.result.mpps);
        let mut sample = self.run(setup, case, rate)?;
        sample.of_load(rate, &whole.result);
        Ok(sample)
    }

    fn run(&mut self, setup: &Setup, case: &Case, rate: Option<u64>) -> Result<BoundSample> {
        let (to_back, to_front) = (Bell::default(), Bell::default());
        let [back_run, front_run] = runs(setup, case, self.pairs, rate);
        let Self {
            memory,
            config,
            pairs,
            stride,
            tsc_khz,
        } = self;
        let (memory, config, tsc_khz) = (*memory, &*config, *tsc_khz);
        let (pairs, stride) = (u64::from(*pairs), *stride);
        let (made, start) = (&Barrier::new(2), &Barrier::new(2));
        let rings = |error| anyhow!("the upper bound's rings: {error}");
        // Each thread makes its own end: what the ends allocate must not share cache lines.
        let (back, front) = thread::scope(|scope| {
            let (bell, calls) = (to_back.clone(), to_front.clone());
            let back = scope.spawn(move || {
                let pinned = sys::pin_to(setup.cores[0]);
                made.wait();
                let make = |pair| {
                    joined::back_end(memory, pair * stride, config, calls.clone(), true)
                        .map_err(rings)
                };
                let port = make(0);
                let more: Result<Vec<_>> = (1..pairs).map(make).collect();
                start.wait();
                pinned
                    .with_context(|| format!("cannot pin a thread to core {}", setup.cores[0]))?;
                let mut link = HostLink {
                    end: End::BackEnd,
                    port: port?,
                    more: more?,
                    bell,
                    tsc_khz,
                };
                work(&mut link, &back_run)
            });
            let front = scope.spawn(move || {
                let pinned = sys::pin_to(setup.cores[1]);
                let make = |pair| {
                    joined::front_end(memory, pair * stride, config, to_back.clone()).map_err(rings)
                };
                let port = make(0);
                let more: Result<Vec<_>> = (1..pairs).map(make).collect();
                // Before an error can return: the other end waits here.
                made.wait();
                start.wait();
                pinned
                    .with_context(|| format!("cannot pin a thread to core {}", setup.cores[1]))?;
                let mut link = HostLink {
                    end: End::FrontEnd,
                    port: port?,
                    more: more?,
                    bell: to_front,
                    tsc_khz,
                };
                work(&mut link, &front_run)
            });
            (back.join(), front.join())
        });
        let lost = |_| anyhow!("a thread of the upper bound was lost");
        let (back, back_share) = back.map_err(lost)??;
        let (front, front_share) = front.map_err(lost)??;
        let ends = [result(&back), result(&front)];
        Ok(BoundSample {
            result: SampleResult::new(case.direction, &ends, self.tsc_khz)
                .context("the upper bound")?,
            shares: (case.how.mode == Mode::Poll).then_some([back_share, front_share]),
            offered_mpps: None,
        })
    }
}

/// What two guests with these rings would have agreed on.
fn join_config(rings: &RingSetup) -> JoinConfig {
    let on = |feature: Option<bool>| feature == Some(true);
    let shape = Shape::default();
    JoinConfig {
        packed: on(rings.packed),
        size: rings.size,
        event_idx: on(rings.event_idx),
        in_order: on(rings.in_order),
        indirect: on(rings.indirect),
        shape: Shape {
            tx: match rings.tx {
                Some(Tx::Chain) => TxShape::Chain,
                Some(Tx::Indirect) => TxShape::Indirect,
                Some(Tx::Direct) | None => TxShape::Direct,
            },
            rx_buffer: rings.rx_buffer.unwrap_or(shape.rx_buffer),
            mergeable: on(rings.mrg_rxbuf),
            offloads: match rings.offload {
                Some(true) => HOST_OFFLOADS | GUEST_OFFLOADS,
                Some(false) | None => 0,
            },
        },
    }
}

/// The two ends' workloads, as a guest's would be, back-end first.
fn runs(setup: &Setup, case: &Case, pairs: u16, rate: Option<u64>) -> [Run; 2] {
    let works = match case.direction {
        Direction::BeToFe | Direction::Idle => [Work::Source, Work::Sink],
        Direction::FeToBe => [Work::Sink, Work::Source],
        Direction::Both => [Work::Both, Work::Both],
        Direction::RoundTrip => [Work::RoundTrip, Work::Echo],
        Direction::Echo => [Work::Both, Work::Echo],
    };
    let (size, imix) = match case.size {
        Size::Bytes(bytes) => (bytes as usize, false),
        Size::Imix => (IMIX[0], true),
    };
    works.map(|work| Run {
        work,
        size,
        imix,
        payload: match case.how.payload {
            Payload::EveryByte => bare_metal::Payload::EveryByte,
            Payload::Headers => bare_metal::Payload::Headers,
        },
        source: match case.how.source {
            Source::Build => bare_metal::Source::Build,
            Source::Copy => bare_metal::Source::Copy,
        },
        mode: match case.how.mode {
            Mode::Poll => bare_metal::Mode::Poll,
            Mode::Irq => bare_metal::Mode::Irq,
            Mode::Adaptive => bare_metal::Mode::Adaptive,
        },
        // The echo sends when something came.
        rate: rate.filter(|_| work == Work::RoundTrip).unwrap_or(0),
        batch: usize::from(case.batch),
        ms: setup.ms,
        warmup_ms: setup.warmup_ms,
        timeout_ms: RECEIVER_MS,
        queues: match case.direction.is_stream() {
            true => pairs,
            false => 1,
        },
        ..Run::default()
    })
}

/// Runs one end; also returns how much of its core it had.
fn work<L: Link>(link: &mut L, run: &Run) -> Result<(Outcome, f64)> {
    let (wall, cpu) = (Instant::now(), sys::thread_cpu_ns()?);
    let outcome = execute(link, run).map_err(|error| anyhow!("the upper bound: {error}"))?;
    let used = sys::thread_cpu_ns()?.saturating_sub(cpu);
    let share = used as f64 / wall.elapsed().as_nanos().max(1) as f64;
    Ok((outcome, share))
}

fn result(outcome: &Outcome) -> WorkResult {
    let received = outcome.received.unwrap_or_default();
    WorkResult {
        churn: None,
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
            p90: times.quantile(900),
            p99: times.quantile(990),
            p999: times.quantile(999),
            max: times.max(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Path;
    use crate::cli::frames::How;
    use crate::cli::iommu::Iommu;
    use crate::cli::rings::{Layout, Ring};
    use clap::ValueEnum;
    use vmm::{HugePages, MemoryConfig};

    fn setup() -> Option<Setup> {
        let [a, b, ..] = sys::allowed_cores().unwrap()[..] else {
            return None;
        };
        Some(Setup {
            back_iommu: false,
            ms: 20,
            warmup_ms: 1,
            how: How::USUAL,
            cores: [a, b],
            rings: RingSetup {
                size: 64,
                ..RingSetup::default()
            },
            memory: MemoryConfig {
                size: 1 << 20,
                hugepages: HugePages::Off,
                prefault: false,
                dma: 0,
            },
            vms: crate::cli::vms::VmsArgs::default(),
        })
    }

    fn tsc_khz() -> u64 {
        let (wall, ticks) = (Instant::now(), sys::tsc());
        thread::sleep(Duration::from_millis(20));
        (sys::tsc() - ticks) * 1_000_000 / u64::try_from(wall.elapsed().as_nanos()).unwrap()
    }

    #[track_caller]
    fn every_way(mode: Mode, change: impl Fn(&mut RingSetup)) {
        let Some(setup) = setup() else { return };
        let how = How { mode, ..How::USUAL };
        for layout in [Layout::Split, Layout::Packed] {
            for in_order in [false, true] {
                let ring = Ring {
                    layout,
                    in_order,
                    size: 256,
                };
                let mut rings = setup.rings.with(ring);
                change(&mut rings);
                let mut bound = Bound::new(&setup, &rings, tsc_khz()).unwrap();
                let sends = |direction: &&Direction| **direction != Direction::Idle;
                for &direction in Direction::value_variants().iter().filter(sends) {
                    let case = Case {
                        ring,
                        iommu: Iommu::Off,
                        path: Path::Window,
                        direction,
                        size: Size::Bytes(200),
                        batch: 8,
                        how,
                        load: None,
                    };
                    // On a busy host a thread may hardly run in so short a time; nothing may be lost for that.
                    let timed = (0..20).find_map(|_| {
                        let result = bound.sample(&setup, &case).unwrap().result;
                        let what = format!("{mode:?} {rings:?} {direction:?} {result:?}");
                        assert!(!result.faults.any(), "{what}");
                        result.timed.then_some(result)
                    });
                    let result = timed.expect("one sample of twenty has a time");
                    assert!(result.frames > 0 && result.verified > result.frames / 2);
                    assert_eq!(result.latency.is_some(), direction == Direction::RoundTrip);
                }
            }
        }
    }

    #[test]
    fn the_upper_bound_moves_frames_every_way_over_every_ring_and_loses_none() {
        every_way(Mode::Poll, |_| ());
    }

    #[test]
    fn the_upper_bound_does_with_frames_what_the_guests_do() {
        let Some(setup) = setup() else { return };
        let ring = Ring {
            layout: Layout::Packed,
            in_order: true,
            size: 256,
        };
        let mut bound = Bound::new(&setup, &setup.rings.with(ring), tsc_khz()).unwrap();
        let case = Case {
            ring,
            iommu: Iommu::Off,
            path: Path::Window,
            direction: Direction::BeToFe,
            size: Size::Bytes(1518),
            batch: 8,
            how: How::USUAL,
            load: None,
        };
        let with = |payload, source| How {
            payload,
            source,
            mode: Mode::Adaptive,
        };
        for (size, how) in [
            (Size::Bytes(1518), with(Payload::Headers, Source::Build)),
            (Size::Bytes(1518), with(Payload::EveryByte, Source::Copy)),
            (Size::Imix, with(Payload::Headers, Source::Copy)),
        ] {
            let result = bound
                .sample(&setup, &Case { size, how, ..case })
                .unwrap()
                .result;
            assert!(
                !result.faults.any() && result.verified > 0,
                "{size} {how:?} {result:?}"
            );
        }
        let trips = Case {
            direction: Direction::RoundTrip,
            size: Size::Bytes(64),
            ..case
        };
        for load in [0, 50] {
            let case = Case {
                load: Some(load),
                ..trips
            };
            // On a busy host a thread may hardly run in so short a time.
            let timed = (0..20).find_map(|_| {
                let sample = bound.sample(&setup, &case).unwrap();
                assert!(!sample.result.faults.any(), "{sample:?}");
                sample.result.timed.then_some(sample)
            });
            let sample = timed.expect("one sample of twenty has a time");
            let offered = sample.offered_mpps.unwrap();
            assert!(offered > 0.0 && (load > 0 || offered == 0.1), "{offered}");
            // Whatever was due in those 20 ms was sent.
            let due = offered * 1e6 * 0.020;
            let times = sample.result.frames as f64;
            assert!((times - due).abs() <= 0.01 * due + 2.0, "{times} of {due}");
        }
        let idle = Case {
            direction: Direction::Idle,
            ..case
        };
        assert!(bound.sample(&setup, &idle).unwrap().result.timed);
    }

    #[test]
    fn the_upper_bound_spreads_flows_over_as_many_pairs_as_the_guests_do() {
        every_way(Mode::Poll, |rings| rings.queues = Some(3));
        every_way(Mode::Irq, |rings| rings.queues = Some(2));
    }

    #[test]
    fn the_upper_bound_sleeps_and_is_woken_with_event_indices_and_without() {
        every_way(Mode::Irq, |rings| rings.event_idx = Some(true));
        every_way(Mode::Irq, |rings| rings.event_idx = Some(false));
    }

    #[test]
    fn the_upper_bound_chains_merges_and_goes_through_tables_as_the_guests_do() {
        every_way(Mode::Poll, |rings| rings.tx = Some(Tx::Chain));
        every_way(Mode::Poll, |rings| {
            rings.indirect = Some(true);
            rings.tx = Some(Tx::Indirect);
        });
        every_way(Mode::Poll, |rings| {
            rings.mrg_rxbuf = Some(true);
            rings.rx_buffer = Some(128);
        });
    }
}
