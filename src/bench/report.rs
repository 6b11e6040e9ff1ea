//! The JSON: a contract. Keys are added, never renamed; what does not apply is absent.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmm::HugePages;

mod peers;
mod variants;
mod vs;

use super::Setup;
pub use peers::{PeerEntry, ToPeerEntry};
pub use variants::VariantEntry;
pub use vs::Vs;

use super::pairs::{LEAST_SHARE, Measured, Pair, gated, moved};
use super::plan::Case;
use super::probe::Distance;
use super::record::{Faults, Latency};
use super::requests::{self, Requests, Where};
use super::stats::{Spread, median, round};
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::rings::{Ring, RingSetup, Tx};
use crate::cli::{Direction, Mode, Path};
use crate::host::{self, HugePool};

/// The whole file.
#[derive(Debug, Serialize)]
pub struct Report {
    schema_version: u32,
    environment: Environment,
    command: Vec<String>,
    /// One entry a case and distance.
    pub results: Vec<Entry>,
    /// What the IOMMU costs: with it to without, taken in turn; one entry a case and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ratios: Vec<RatioEntry>,
    /// What the window spares: the same through it and through the relay, taken in turn; one entry a case and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathEntry>,
    /// What the guests do with frames beside what they do first, taken in turn; one entry a case and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<VariantEntry>,
    /// Other ways to exchange frames, one entry a peer, case and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerEntry>,
    /// The window beside each of them, taken in turn; one entry a case, peer and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_peers: Vec<ToPeerEntry>,
    /// A second pair of VMs with other flags, sampled in turn with the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vs: Option<Vs>,
    /// The time of a request through a ring alone, of a sweep; one entry a figure and distance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<RequestEntry>,
    /// For those: which counter counted, or why none did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<String>,
}

/// How near a case with an IOMMU came to the same without: 1 is as good.
#[derive(Clone, Debug, Serialize)]
pub struct RatioEntry {
    pub direction: Direction,
    #[serde(flatten)]
    pub ring: Ring,
    pub frame_size: Size,
    pub batch: u16,
    pub iommu: Iommu,
    over: Iommu,
    #[serde(flatten)]
    pub how: How,
    pub distance: Distance,
    pub ratio: Spread,
}

/// The window beside the relay.
#[derive(Clone, Debug, Serialize)]
pub struct PathEntry {
    pub direction: Direction,
    #[serde(flatten)]
    pub ring: Ring,
    pub frame_size: Size,
    pub batch: u16,
    #[serde(flatten)]
    pub how: How,
    pub distance: Distance,
    /// Rate through the window to rate through the relay (round trip: time through the relay to time through the window, p50).
    pub speed: Spread,
    /// CPU time a frame of all processes together, through the window to through the relay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Spread>,
}

/// The time of a request.
#[derive(Clone, Debug, Serialize)]
pub struct RequestEntry {
    #[serde(flatten)]
    pub ring: Ring,
    pub batch: u16,
    #[serde(rename = "where")]
    pub place: Where,
    /// Absent where no sample was fit to be reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ns: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_misses: Option<f64>,
    /// Between two cores only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_ns: Option<f64>,
    dropped_samples: usize,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
pub struct Environment {
    version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_model: Option<String>,
    cores: [usize; 2],
    /// A cache line from core to core and back, in ns, before the first sample and behind the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    core_distance_ns: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    governor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    isolated_cores: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugepages_2m: Option<HugePool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thp_shmem: Option<String>,
    kvm_modules: Vec<String>,
    tsc_khz: u64,
    unix_time: u64,
    memory: Memory,
    queue_size: u16,
    /// The first of all that was asked for; each figure has its own.
    mode: Mode,
    sample_ms: u64,
}

#[derive(Debug, Serialize)]
struct Memory {
    size: u64,
    hugepages: &'static str,
    prefault: bool,
}

/// One figure, with everything that belongs to it.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    pub direction: Direction,
    pub path: Path,
    #[serde(flatten)]
    pub ring: RingColumns,
    pub iommu: Iommu,
    pub frame_size: Size,
    pub batch: u16,
    #[serde(flatten)]
    pub how: How,
    /// Round trips of frames that are sent when they are due: at so many percent of what an echo reaches, and that is so many million a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_percent: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offered_mpps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound_offered_mpps: Option<Spread>,
    queue_pairs: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_ns: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mpps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound_mpps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ratio_samples: Vec<f64>,
    frames: u64,
    verified: u64,
    #[serde(flatten)]
    pub faults: Faults,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ns: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_p50_ns: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound_latency_ns: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound_latency_p50_ns: Option<Spread>,
    dropped_samples: Dropped,
    /// What a virtual CPU had to have of its core for a sample to count; absent where that was not asked, because the devices' threads
    /// have work to do on the same cores, or the guests sleep.
    #[serde(skip_serializing_if = "Option::is_none")]
    least_vcpu_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exits: Option<Exits>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    /// Of all processes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_ns_per_frame: Option<Spread>,
    /// Where nobody sends: what all processes together use, in percent of a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_cpu_percent: Option<Spread>,
}

/// Which rings it is of.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RingColumns {
    #[serde(flatten)]
    pub ring: Ring,
    event_idx: bool,
    mrg_rxbuf: bool,
    indirect: bool,
    offload: bool,
    tx: Tx,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_buffer: Option<u16>,
}

impl RingColumns {
    fn new(ring: Ring, setup: &RingSetup) -> Self {
        let on = |feature: Option<bool>| feature == Some(true);
        Self {
            ring,
            event_idx: on(setup.event_idx),
            mrg_rxbuf: on(setup.mrg_rxbuf),
            indirect: on(setup.indirect),
            offload: on(setup.offload),
            tx: setup.tx.unwrap_or(Tx::Direct),
            rx_buffer: setup.rx_buffer,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Dropped {
    cores_moved: usize,
    core_not_had: usize,
}

/// Of both VMs, from before each run's command to behind its result.
#[derive(Clone, Debug, Serialize)]
struct Exits {
    #[serde(flatten)]
    by_reason: BTreeMap<String, u64>,
    per_frame: f64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    kvm: BTreeMap<String, u64>,
}

/// Back-end first; medians.
#[derive(Clone, Debug, Serialize)]
struct Cpu {
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_share: Option<[f64; 2]>,
    other_threads_percent: [f64; 2],
}

impl Report {
    /// Puts together what was measured.
    pub fn new(setup: &Setup, tsc_khz: u64, measured: &[Measured], requests: &[Requests]) -> Self {
        Self {
            schema_version: 1,
            environment: Environment::of(setup, tsc_khz),
            command: command(),
            results: measured
                .iter()
                .flat_map(|measured| entries(setup, measured))
                .collect(),
            ratios: ratios(measured),
            paths: paths(measured),
            variants: variants::entries(measured),
            peers: Vec::new(),
            to_peers: Vec::new(),
            vs: None,
            requests: requests.iter().flat_map(request_entries).collect(),
            counters: (!requests.is_empty()).then(|| {
                requests::counters().unwrap_or_else(|| "cache-misses, user mode".to_owned())
            }),
        }
    }

    /// With how far apart the cores were before the first sample and behind the last.
    pub fn with_core_distance(mut self, ns: [f64; 2]) -> Self {
        self.environment.core_distance_ns = Some(ns.map(round));
        self
    }
}

/// How this program was called.
pub fn command() -> Vec<String> {
    std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect()
}

impl Environment {
    /// What there is to say of this host and of the VMs.
    pub fn of(setup: &Setup, tsc_khz: u64) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("VHOST_PCI_COMMIT").filter(|commit| !commit.is_empty()),
            kernel: host::kernel(),
            cpu_model: host::cpu_model(),
            cores: setup.cores,
            core_distance_ns: None,
            governor: host::governor(&setup.cores),
            isolated_cores: host::isolated_cores().filter(|cores| !cores.is_empty()),
            hugepages_2m: host::hugepages_2m(),
            thp_shmem: host::thp_shmem(),
            kvm_modules: host::kvm_modules(),
            tsc_khz,
            unix_time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
            memory: Memory {
                size: setup.memory.size,
                hugepages: match setup.memory.hugepages {
                    HugePages::Off => "off",
                    HugePages::Size2M => "2M",
                    HugePages::Size1G => "1G",
                },
                prefault: setup.memory.prefault,
            },
            queue_size: setup.rings.size,
            mode: setup.how.mode,
            sample_ms: setup.ms,
        }
    }
}

/// An entry a distance: figures of near and of far cores have nothing to do with each other. What was counted over all samples
/// (faults, checked frames, dropped pairs) stands in the first.
fn entries(setup: &Setup, measured: &Measured) -> Vec<Entry> {
    let mut entries: Vec<Entry> = [Distance::Near, Distance::Far]
        .into_iter()
        .filter_map(|distance| {
            let pairs: Vec<&Pair> = measured
                .pairs
                .iter()
                .filter(|pair| pair.distance() == distance)
                .collect();
            (!pairs.is_empty()).then(|| entry(setup, measured, Some(distance), &pairs))
        })
        .collect();
    if entries.is_empty() {
        // No sample was fit to be reported, but what happened to the frames was.
        entries.push(entry(setup, measured, None, &[]));
    }
    if let Some(first) = entries.first_mut() {
        first.faults = measured.faults;
        first.verified = measured.verified;
        first.dropped_samples = Dropped {
            cores_moved: measured.moved,
            core_not_had: measured.disturbed,
        };
    }
    entries
}

fn entry(setup: &Setup, measured: &Measured, distance: Option<Distance>, pairs: &[&Pair]) -> Entry {
    let case = measured.case;
    let each = |value: &dyn Fn(&Pair) -> f64| -> Vec<f64> {
        pairs.iter().map(|pair| value(pair)).collect()
    };
    let idle = case.direction == Direction::Idle;
    let rates = !idle && case.direction != Direction::RoundTrip;
    let spread = |value: &dyn Fn(&Pair) -> f64| Spread::of(each(value)).filter(|_| rates);
    let vm_times: Vec<Latency> = pairs
        .iter()
        .filter_map(|pair| pair.vm.result.latency)
        .collect();
    let bound_times: Vec<Latency> = pairs
        .iter()
        .filter_map(|pair| pair.bound.result.latency)
        .collect();
    let ratios: Vec<f64> = pairs.iter().filter_map(|pair| pair.ratio()).collect();
    let bits = case.size.mean() * 8.0;
    Entry {
        direction: case.direction,
        path: case.path,
        ring: RingColumns::new(case.ring, &setup.rings),
        iommu: case.iommu,
        frame_size: case.size,
        batch: case.batch,
        how: case.how,
        load_percent: case.load,
        offered_mpps: Spread::of(pairs.iter().filter_map(|pair| pair.vm.offered_mpps)),
        bound_offered_mpps: Spread::of(pairs.iter().filter_map(|pair| pair.bound.offered_mpps)),
        queue_pairs: setup.rings.pairs(case.direction),
        distance,
        probe_ns: median(&each(&|pair| pair.probe_ns)).map(round),
        mpps: spread(&|pair| pair.vm.result.mpps),
        gbps: spread(&|pair| pair.vm.result.mpps * bits / 1000.0),
        bound_mpps: spread(&|pair| pair.bound.result.mpps),
        ratio: median(&ratios).map(round),
        ratio_samples: ratios.into_iter().map(round).collect(),
        frames: pairs.iter().map(|pair| pair.vm.result.frames).sum(),
        verified: 0,
        faults: Faults::default(),
        latency_ns: latency(&vm_times),
        latency_p50_ns: Spread::of(vm_times.iter().map(|time| time.p50)),
        bound_latency_ns: latency(&bound_times),
        bound_latency_p50_ns: Spread::of(bound_times.iter().map(|time| time.p50)),
        dropped_samples: Dropped {
            cores_moved: 0,
            core_not_had: 0,
        },
        least_vcpu_share: gated(&case).then_some(LEAST_SHARE),
        exits: (!pairs.is_empty()).then(|| exits(pairs)),
        cpu: cpu(pairs),
        cpu_ns_per_frame: Spread::of(pairs.iter().filter_map(|pair| pair.cpu_ns_per_frame())),
        idle_cpu_percent: Spread::of(each(&|pair| pair.vm.busy_cores * 100.0)).filter(|_| idle),
    }
}

/// Each case with an IOMMU beside the same without, round by round. A round counts where the cores were as far apart for both.
fn ratios(measured: &[Measured]) -> Vec<RatioEntry> {
    let mut entries = Vec::new();
    for with in measured.iter().filter(|it| it.case.iommu != Iommu::Off) {
        let case = with.case;
        let same = Case {
            iommu: Iommu::Off,
            ..case
        };
        let Some(without) = measured.iter().find(|it| it.case == same) else {
            continue;
        };
        let turns = turns(with, without);
        for distance in [Distance::Near, Distance::Far] {
            let here = turns.iter().filter(|(pair, _)| pair.distance() == distance);
            let ratio = Spread::of(here.filter_map(|(pair, other)| speed(pair, other)));
            entries.extend(ratio.map(|ratio| RatioEntry {
                direction: case.direction,
                ring: case.ring,
                frame_size: case.size,
                batch: case.batch,
                iommu: case.iommu,
                over: Iommu::Off,
                how: case.how,
                distance,
                ratio,
            }));
        }
    }
    entries
}

/// Each case of the window beside the same through the relay, as [`ratios`].
fn paths(measured: &[Measured]) -> Vec<PathEntry> {
    let mut entries = Vec::new();
    for relay in measured.iter().filter(|it| it.case.path == Path::Relay) {
        let case = relay.case;
        let same = Case {
            path: Path::Window,
            ..case
        };
        let Some(window) = measured.iter().find(|it| it.case == same) else {
            continue;
        };
        let turns = turns(window, relay);
        for distance in [Distance::Near, Distance::Far] {
            let here = || turns.iter().filter(|(pair, _)| pair.distance() == distance);
            let speed = Spread::of(here().filter_map(|(window, relay)| speed(window, relay)));
            let cpu = here().filter_map(|(window, relay)| {
                Some(window.cpu_ns_per_frame()? / relay.cpu_ns_per_frame()?)
            });
            entries.extend(speed.map(|speed| PathEntry {
                direction: case.direction,
                ring: case.ring,
                frame_size: case.size,
                batch: case.batch,
                how: case.how,
                distance,
                speed,
                cpu: Spread::of(cpu),
            }));
        }
    }
    entries
}

/// Pairs of the same round, where the cores were as far apart for both.
fn turns<'a>(one: &'a Measured, other: &'a Measured) -> Vec<(&'a Pair, &'a Pair)> {
    let same = |pair: &'a Pair| {
        let mut others = other.pairs.iter();
        let other = others.find(|other| other.round == pair.round)?;
        (!moved(&[pair.probe_ns, other.probe_ns])).then_some((pair, other))
    };
    one.pairs.iter().filter_map(same).collect()
}

/// How many times as fast the guests of the one were: rate by rate, or median round trip by median round trip.
fn speed(one: &Pair, other: &Pair) -> Option<f64> {
    let (one, other) = (&one.vm.result, &other.vm.result);
    let (over, under) = match (one.latency, other.latency) {
        (Some(one), Some(other)) => (other.p50, one.p50),
        _ => (one.mpps, other.mpps),
    };
    (under > 0.0).then(|| over / under)
}

/// An entry a distance between two cores; one in all on the same core.
fn request_entries(requests: &Requests) -> Vec<RequestEntry> {
    let case = requests.case;
    let entry = |distance: Option<Distance>| {
        let samples: Vec<_> = requests
            .samples
            .iter()
            .filter(|sample| distance.is_none_or(|it| Distance::of(sample.probe_ns) == it))
            .collect();
        let misses: Vec<f64> = samples.iter().filter_map(|sample| sample.misses).collect();
        let probes: Vec<f64> = samples.iter().map(|sample| sample.probe_ns).collect();
        RequestEntry {
            ring: case.ring,
            batch: case.batch,
            place: case.place,
            ns: Spread::of(samples.iter().map(|sample| sample.ns)),
            cache_misses: median(&misses).map(round),
            distance,
            probe_ns: median(&probes).map(round).filter(|_| distance.is_some()),
            dropped_samples: 0,
        }
    };
    let mut entries: Vec<RequestEntry> = match case.place {
        Where::SameCore => vec![entry(None)],
        Where::CrossCore => [Distance::Near, Distance::Far]
            .map(|distance| entry(Some(distance)))
            .into_iter()
            .filter(|entry| entry.ns.is_some())
            .collect(),
    };
    if entries.is_empty() {
        entries.push(entry(None));
    }
    if let Some(first) = entries.first_mut() {
        first.dropped_samples = requests.dropped;
    }
    entries
}

/// Medians of the samples' percentiles; the longest of all.
fn latency(times: &[Latency]) -> Option<Latency> {
    let middle = |value: fn(&Latency) -> f64| {
        let values: Vec<f64> = times.iter().map(value).collect();
        median(&values).map(round)
    };
    Some(Latency {
        p50: middle(|time| time.p50)?,
        p90: middle(|time| time.p90)?,
        p99: middle(|time| time.p99)?,
        p999: middle(|time| time.p999)?,
        max: round(times.iter().map(|time| time.max).fold(0.0, f64::max)),
    })
}

fn exits(pairs: &[&Pair]) -> Exits {
    let sum = |counters: &dyn Fn(&Pair) -> &BTreeMap<String, u64>| {
        let mut sum = BTreeMap::<String, u64>::new();
        for (name, count) in pairs.iter().flat_map(|pair| counters(pair)) {
            *sum.entry(name.clone()).or_default() += count;
        }
        sum
    };
    let by_reason = sum(&|pair| &pair.vm.exits);
    let all: u64 = by_reason.values().sum();
    let frames: u64 = pairs.iter().map(|pair| pair.vm.result.frames).sum();
    Exits {
        // Not rounded: it is small, or something is wrong.
        per_frame: all as f64 / frames.max(1) as f64,
        by_reason,
        kvm: sum(&|pair| &pair.vm.kvm_exits),
    }
}

fn cpu(pairs: &[&Pair]) -> Option<Cpu> {
    let middle = |value: &dyn Fn(&Pair, usize) -> Option<f64>| -> Option<[f64; 2]> {
        let side = |side| {
            let values: Vec<f64> = pairs.iter().filter_map(|pair| value(pair, side)).collect();
            median(&values).map(round)
        };
        Some([side(0)?, side(1)?])
    };
    Some(Cpu {
        vcpu_share: middle(&|pair, side| pair.vm.shares.map(|shares| shares[side])),
        other_threads_percent: middle(&|pair, side| Some(pair.vm.others_percent[side]))?,
    })
}

#[cfg(test)]
pub mod tests;
