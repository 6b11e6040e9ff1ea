//! The time of a request: what the rings alone cost. A request is added and published by the driver, got, put back and published by
//! the device, and taken by the driver; nobody touches a payload.
//!
//! On one core a thread does both halves in turn: what the instructions cost. Between two cores each half has a thread: what the
//! cache lines cost that have to go from core to core.

use std::hint;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;
use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, DriverRing, Layout as RingLayout, RingConfig, Used};

use super::Setup;
use super::pairs::{TRIES, had_not_its_core, moved};
use super::probe;
use super::stats::median;
use crate::cli::rings::{Layout, Ring, RingSetup};
use crate::exit::Failure;
use crate::sys::{self, CacheMisses, Signals};

/// What the driver in a guest aligns the parts of a ring to.
const ALIGN: u64 = 4096;
/// Bytes of a request's buffer. They are checked by the device, and read by nobody.
const BUFFER: u32 = 64;
/// The largest batch.
const MOST: usize = 256;
/// Requests, or looks at the ring in vain, between two looks at the clock.
const BETWEEN_LOOKS: u64 = 4096;
/// How long the device may take to give back the last requests.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the two halves run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Where {
    /// On one core, in turn.
    SameCore,
    /// On a core each.
    CrossCore,
}

impl Where {
    /// As it is in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::SameCore => "same-core",
            Self::CrossCore => "cross-core",
        }
    }
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestCase {
    /// The ring.
    pub ring: Ring,
    /// Requests that are published at once.
    pub batch: u16,
    /// Where the two halves run.
    pub place: Where,
}

/// A sample.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// Nanoseconds a request.
    pub ns: f64,
    /// Cache misses a request, both halves together; absent where they cannot be counted.
    pub misses: Option<f64>,
    /// Median of the probes before and after it.
    pub probe_ns: f64,
}

/// Everything about one figure.
#[derive(Clone, Debug)]
pub struct Requests {
    /// Which.
    pub case: RequestCase,
    /// The samples that count.
    pub samples: Vec<Request>,
    /// Samples in which the cores moved, or a thread did not get its core.
    pub dropped: usize,
}

/// What the two halves of a sample did.
#[derive(Clone, Copy, Debug)]
struct Timed {
    ns: f64,
    /// The smaller of the threads' shares of their cores.
    share: f64,
    misses: Option<f64>,
}

/// Says why cache misses cannot be counted; `None` where they can.
pub fn counters() -> Option<String> {
    let error = CacheMisses::start().err()?;
    Some(format!("not available: {error}"))
}

/// Measures all rings at all batches, on one core and between two. The rings are sampled in turn.
pub fn measure(
    setup: &Setup,
    rings: &[Ring],
    batches: &[u16],
    samples: usize,
    signals: &Signals,
    progress: &mut dyn FnMut(&RequestCase),
) -> Result<Vec<Requests>> {
    let beds = rings
        .iter()
        .map(|&ring| Bed::new(setup, &setup.rings.with(ring), ring.layout))
        .collect::<Result<Vec<Bed>>>()?;
    let mut all = Vec::new();
    for place in [Where::SameCore, Where::CrossCore] {
        for &batch in batches {
            let mut group: Vec<Requests> = rings
                .iter()
                .map(|&ring| Requests {
                    case: RequestCase { ring, batch, place },
                    samples: Vec::new(),
                    dropped: 0,
                })
                .collect();
            let mut before = probe::probe(setup.cores)?;
            for _ in 0..TRIES * samples {
                for (requests, bed) in group.iter_mut().zip(&beds) {
                    if requests.samples.len() == samples {
                        continue;
                    }
                    if let Some(number) = signals.caught() {
                        return Err(Failure::Signal(number).into());
                    }
                    let timed = bed.sample(setup, &requests.case)?;
                    let after = probe::probe(setup.cores)?;
                    let probes = [before, after];
                    before = after;
                    let cross = place == Where::CrossCore;
                    if (cross && moved(&probes)) || had_not_its_core(timed.share) {
                        requests.dropped += 1;
                    } else {
                        requests.samples.push(Request {
                            ns: timed.ns,
                            misses: timed.misses,
                            probe_ns: median(&probes).unwrap_or_default(),
                        });
                    }
                    progress(&requests.case);
                }
            }
            all.extend(group);
        }
    }
    Ok(all)
}

/// Memory for one ring, used again for each sample.
struct Bed {
    memory: Linear,
    config: RingConfig,
    /// Device address of the first buffer.
    pool: u64,
    layout: Layout,
}

impl Bed {
    fn new(setup: &Setup, rings: &RingSetup, layout: Layout) -> Result<Self> {
        let sizes = layout
            .area_sizes(rings.size)
            .context("the layout has no rings of that size")?;
        let mut end = 0_u64;
        let mut area = |len: u64| {
            let start = end;
            end = (end + len).next_multiple_of(ALIGN);
            start
        };
        let [desc, driver, device] = sizes.map(|len| area(len as u64));
        let pool = area(u64::from(rings.size) * u64::from(BUFFER));
        let config = RingConfig {
            size: rings.size,
            desc,
            driver,
            device,
            event_idx: rings.event_idx == Some(true),
            in_order: rings.in_order == Some(true),
            indirect: false,
        };
        Ok(Self {
            memory: sys::shared_memory(end, setup.memory.hugepages)
                .context("no memory for the rings")?,
            config,
            pool,
            layout,
        })
    }

    fn sample(&self, setup: &Setup, case: &RequestCase) -> Result<Timed> {
        ensure!(
            case.batch <= self.config.size && usize::from(case.batch) <= MOST,
            "a batch of {} requests does not fit a ring of {}",
            case.batch,
            self.config.size
        );
        match self.layout {
            Layout::Split => self.run::<Split>(setup, case),
            Layout::Packed => self.run::<Packed>(setup, case),
        }
    }

    fn run<L: RingLayout>(&self, setup: &Setup, case: &RequestCase) -> Result<Timed>
    where
        L::Driver<Linear>: Send,
        L::Device<Linear>: Send,
    {
        let made = |error| anyhow!("the ring of the request times: {error}");
        let driver = L::driver(self.memory, &self.config).map_err(made)?;
        let device = L::device(self.memory, &self.config).map_err(made)?;
        let mut driver = DriverHalf::new(driver, self.pool, case.batch);
        let mut device = DeviceHalf::new(device, case.batch);
        driver.ring.disable_calls();
        device.ring.disable_kicks();
        match case.place {
            Where::SameCore => same_core(&mut driver, &mut device, setup),
            Where::CrossCore => cross_core(&mut driver, &mut device, setup),
        }
    }
}

/// The driver's half of the requests.
struct DriverHalf<D> {
    ring: D,
    pool: u64,
    size: u16,
    next: u16,
    batch: u16,
    used: [Used; MOST],
    in_flight: u64,
}

impl<D: DriverRing> DriverHalf<D> {
    fn new(ring: D, pool: u64, batch: u16) -> Self {
        Self {
            size: ring.free(),
            ring,
            pool,
            next: 0,
            batch,
            used: [Used::default(); MOST],
            in_flight: 0,
        }
    }

    /// Adds and publishes a batch, where there is room for all of it.
    #[inline(always)]
    fn submit(&mut self) {
        if self.ring.free() < self.batch {
            return;
        }
        for _ in 0..self.batch {
            let buffer = Buffer {
                addr: self.pool + u64::from(self.next) * u64::from(BUFFER),
                len: BUFFER,
                device_writes: false,
            };
            self.next += 1;
            if self.next == self.size {
                self.next = 0;
            }
            self.in_flight += u64::from(self.ring.add(&[buffer]).is_some());
        }
        self.ring.publish();
    }

    /// Takes up to a batch; returns how many.
    #[inline(always)]
    fn reap(&mut self) -> Result<u64> {
        let batch = usize::from(self.batch);
        let n = self.ring.take(&mut self.used[..batch])? as u64;
        self.in_flight = self
            .in_flight
            .checked_sub(n)
            .context("a ring gave back more requests than it was given")?;
        Ok(n)
    }
}

/// The device's half.
struct DeviceHalf<V> {
    ring: V,
    batch: u16,
    chains: [Chain; MOST],
    buffers: [Buffer; MOST],
}

impl<V: DeviceRing> DeviceHalf<V> {
    fn new(ring: V, batch: u16) -> Self {
        Self {
            ring,
            batch,
            chains: [Chain::default(); MOST],
            buffers: [Buffer::default(); MOST],
        }
    }

    /// Gets up to a batch and gives it back; returns how many.
    #[inline(always)]
    fn serve(&mut self) -> Result<usize> {
        let batch = usize::from(self.batch);
        let n = self
            .ring
            .get(&mut self.chains[..batch], &mut self.buffers[..batch])?;
        if n > 0 {
            self.ring.put_read(&self.chains[..n]);
            self.ring.publish();
        }
        Ok(n)
    }
}

/// Clocks of a thread, read at the start and at the end of what is timed.
struct Watch {
    wall: Instant,
    cpu: u64,
    misses: u64,
}

impl Watch {
    fn look(counter: Option<&CacheMisses>) -> Result<Self> {
        Ok(Self {
            cpu: sys::thread_cpu_ns()?,
            misses: counter.map_or(Ok(0), CacheMisses::count)?,
            wall: Instant::now(),
        })
    }

    /// How much of its core the thread has had since.
    fn share(&self, now: &Self) -> f64 {
        let wall = (now.wall - self.wall).as_nanos().max(1);
        now.cpu.saturating_sub(self.cpu) as f64 / wall as f64
    }
}

/// Calls `work` for so long; it returns how many requests came back.
fn for_ms(ms: u64, work: &mut impl FnMut() -> Result<u64>) -> Result<u64> {
    let end = Instant::now() + Duration::from_millis(ms);
    let mut done = 0;
    while Instant::now() < end {
        let mut steps = 0;
        while steps < BETWEEN_LOOKS {
            let n = work()?;
            done += n;
            steps += n.max(1);
        }
    }
    Ok(done)
}

fn same_core<D: DriverRing + Send, V: DeviceRing + Send>(
    driver: &mut DriverHalf<D>,
    device: &mut DeviceHalf<V>,
    setup: &Setup,
) -> Result<Timed> {
    let run = || -> Result<Timed> {
        let core = setup.cores[0];
        sys::pin_to(core).with_context(|| format!("cannot pin a thread to core {core}"))?;
        let counter = CacheMisses::start().ok();
        let mut turn = || -> Result<u64> {
            driver.submit();
            device.serve()?;
            driver.reap()
        };
        for_ms(setup.warmup_ms, &mut turn)?;
        let start = Watch::look(counter.as_ref())?;
        let done = for_ms(setup.ms, &mut turn)?;
        let end = Watch::look(counter.as_ref())?;
        ensure!(driver.in_flight == 0, "requests were lost in a ring");
        Ok(timed(&start, &end, done, counter.is_some()))
    };
    // A thread of its own, because it is pinned.
    thread::scope(|scope| scope.spawn(run).join())
        .map_err(|_| anyhow!("a thread of the request times was lost"))?
}

fn cross_core<D: DriverRing + Send, V: DeviceRing + Send>(
    driver: &mut DriverHalf<D>,
    device: &mut DeviceHalf<V>,
    setup: &Setup,
) -> Result<Timed> {
    let (stop, start) = (AtomicBool::new(false), Barrier::new(2));
    let pin = |core| {
        let pinned = sys::pin_to(core);
        // Before an error can return: the other half waits here.
        start.wait();
        pinned.with_context(|| format!("cannot pin a thread to core {core}"))
    };
    let serve = || -> Result<(f64, u64, u64)> {
        pin(setup.cores[0])?;
        let counter = CacheMisses::start().ok();
        let before = Watch::look(counter.as_ref())?;
        let mut served = 0_u64;
        loop {
            match device.serve()? {
                // Not before the ring is empty.
                0 if stop.load(Ordering::Acquire) => break,
                0 => hint::spin_loop(),
                n => served += n as u64,
            }
        }
        let after = Watch::look(counter.as_ref())?;
        let misses = after.misses.saturating_sub(before.misses);
        Ok((before.share(&after), misses, served))
    };
    let mut drive = || -> Result<Timed> {
        pin(setup.cores[1])?;
        let counter = CacheMisses::start().ok();
        let mut turn = || -> Result<u64> {
            driver.submit();
            driver.reap()
        };
        for_ms(setup.warmup_ms, &mut turn)?;
        let start = Watch::look(counter.as_ref())?;
        let done = for_ms(setup.ms, &mut turn)?;
        let end = Watch::look(counter.as_ref())?;
        let patience = Instant::now() + PATIENCE;
        while driver.in_flight > 0 {
            if driver.reap()? == 0 && Instant::now() > patience {
                bail!("{} requests were lost in a ring", driver.in_flight);
            }
        }
        Ok(timed(&start, &end, done, counter.is_some()))
    };
    let (served, driven) = thread::scope(|scope| {
        let served = scope.spawn(serve);
        let driven = scope.spawn(|| {
            let driven = drive();
            // Whatever came of it: the other half waits for this.
            stop.store(true, Ordering::Release);
            driven
        });
        (served.join(), driven.join())
    });
    let lost = |_| anyhow!("a thread of the request times was lost");
    let (share, misses, served) = served.map_err(lost)??;
    let mut timed = driven.map_err(lost)??;
    timed.share = timed.share.min(share);
    // The other half's are those of all its requests, the warm-up's among them.
    timed.misses = timed
        .misses
        .map(|own| own + misses as f64 / served.max(1) as f64);
    Ok(timed)
}

fn timed(start: &Watch, end: &Watch, done: u64, counted: bool) -> Timed {
    // A thread that hardly ran may have nothing to show: that is no sample, and no time.
    let share = if done > 0 { start.share(end) } else { 0.0 };
    let done = done.max(1) as f64;
    let misses = end.misses.saturating_sub(start.misses) as f64;
    Timed {
        ns: (end.wall - start.wall).as_nanos() as f64 / done,
        share,
        misses: counted.then_some(misses / done),
    }
}

#[cfg(test)]
mod tests;
