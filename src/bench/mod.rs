//! `bench`: throughput and latency from VM to VM, beside the upper bound.

mod bound;
#[cfg(test)]
mod fuzz_body;
#[cfg(test)]
#[path = "../../fuzz/iterations.rs"]
mod iterations;
mod pairs;
mod peers;
mod plan;
mod probe;
pub mod record;
mod relayed;
mod report;
mod requests;
mod session;
mod stats;
pub mod table;
mod testpmd;
mod veth;
mod vs;
mod windows;

use std::io::Write;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmm::MemoryConfig;

use crate::cli::bench::{BenchArgs, Sweep};
use crate::cli::frames::How;
use crate::cli::iommu::Iommu;
use crate::cli::rings::{Layout, RingSetup, USUAL_SIZE};
use crate::cli::vms::VmsArgs;
use crate::cli::{Path, machine};
use crate::exit;
use crate::json::{JsonFile, text_out};
use crate::pair;
use crate::sys::{self, Signals};

use pairs::{Lab, Measured, measure};
use peers::{PeerMeasured, Peers, WithPeers};
use plan::Case;
use record::Faults;
use report::Report;
use requests::Requests;
use session::Sessions;
use vs::{Vs, WithVs};

/// How long the guests send before they count.
const WARM_UP_MS: u64 = 5;
/// `--quick` stops taking samples again when the first try of the rest would end later than this.
const QUICK: Duration = Duration::from_secs(17);
/// A sweep of the default length stops taking samples of the VMs again at this time; the request times come behind.
const SWEEP: Duration = Duration::from_secs(180);

/// So many figures with too few samples are named.
const MOST_WARNINGS: usize = 8;

/// What is the same for all samples, of the guests and of the upper bound.
#[derive(Debug)]
pub struct Setup {
    /// Length of the timed part.
    pub ms: u64,
    /// How long is sent before it.
    pub warmup_ms: u64,
    /// What the guests do with frames: the first of all that was asked for.
    pub how: How,
    /// Whether the back-end VMs have a virtio-iommu for their own devices.
    pub back_iommu: bool,
    /// The back-end's core, the front-end's.
    pub cores: [usize; 2],
    /// What is the same for all rings.
    pub rings: RingSetup,
    /// Memory of each VM.
    pub memory: MemoryConfig,
    /// How the VMs' processes run.
    pub vms: VmsArgs,
}

/// Measures, prints, and returns the exit code.
pub fn run(args: &BenchArgs) -> Result<u8> {
    let started = Instant::now();
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    let other = args.other(std::env::args_os())?;
    let setup = |args: &BenchArgs| -> Result<Setup> {
        Ok(Setup {
            ms: args.sample_ms(),
            warmup_ms: WARM_UP_MS,
            how: args.hows().first().copied().unwrap_or(How::USUAL),
            back_iommu: args.back.iommu_back.is_on(),
            cores: args.both.cores(&allowed)?,
            rings: args.ring_setup()?,
            memory: machine::memory(&args.both.memory)?,
            vms: args.vms.clone(),
        })
    };
    // Before anything is booted.
    args.vms.run_flags(pair::ENDS[0], 0)?;
    let second = match &other {
        Some(other) => {
            args.one_kind()?;
            Some((other, other.one_kind()?, setup(other)?, setup(other)?))
        }
        None => None,
    };
    let (for_session, for_peers, setup) = (setup(args)?, setup(args)?, setup(args)?);
    let json = args.json.as_deref().map(JsonFile::create).transpose()?;
    let signals = Rc::new(Signals::install().context("cannot handle signals")?);

    let samples = plan::samples(args);
    if args.sweep == Some(Sweep::Windows) {
        return windows::run(args, for_session, samples, &signals, json);
    }
    let kinds = args.kinds()?;
    let mut peers = Peers::start(args, Rc::new(for_peers), &signals)?;
    let mut sessions = Sessions::start(for_session, &kinds, &args.both.memory, &signals)?;
    let (mut vs, mut second_setup) = (None, None);
    if let Some((other, kind, setup, again)) = second {
        vs = Some(Vs::start(other, setup, kind, &signals)?);
        second_setup = Some(again);
    }
    let before = sessions.probe()?;
    let mut beside = WithPeers {
        lab: &mut sessions,
        peers: &mut peers,
    };
    let measured = sample(
        &mut WithVs {
            lab: &mut beside,
            vs: vs.as_mut(),
        },
        &plan::plan(args, &kinds),
        samples,
        limit(args, started),
    )?;
    let distance = [before, sessions.probe()?];
    let tsc_khz = sessions.tsc_khz();
    sessions.finish()?;
    let peers = peers.finish();
    let second = vs.map(Vs::finish).transpose()?.unwrap_or_default();
    let requests = requests(args, &setup, &signals)?;

    let mut report = Report::new(&setup, tsc_khz, &measured, &requests)
        .with_core_distance(distance)
        .with_peers(&measured, &peers);
    if let (Some(flags), Some(setup)) = (&args.vs, &second_setup) {
        report = report.with_vs(flags, setup, &measured, &second);
    }
    let mut out = text_out(args.json.as_deref());
    writeln!(out, "{}\n{}", table::render(&report), table::LEGEND)?;
    writeln!(out, "\n{}", totals(&[&measured[..], &second].concat()))?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    let codes = [
        judge("", &measured, &requests, samples)?,
        judge("--vs: ", &second, &[], samples)?,
        judge_peers(&peers, samples),
    ];
    Ok(codes.into_iter().fold(exit::OK, exit::worse))
}

/// When samples are no longer taken again.
fn limit(args: &BenchArgs, started: Instant) -> Option<Instant> {
    let usual = args.ms.is_none() && args.samples.is_none();
    let length = if args.quick {
        QUICK
    } else if args.sweep.is_some() && usual {
        SWEEP
    } else {
        return None;
    };
    Some(started + length)
}

/// The request times of a sweep; of no other run any.
fn requests(args: &BenchArgs, setup: &Setup, signals: &Signals) -> Result<Vec<Requests>> {
    let rings = args.ring_list()?;
    let least = rings.iter().map(|ring| ring.size).min();
    let batches: Vec<u16> = plan::request_batches(args)
        .into_iter()
        .filter(|&batch| Some(batch) <= least)
        .collect();
    if batches.is_empty() {
        return Ok(Vec::new());
    }
    let samples = plan::samples(args);
    let bar = progress_bar((2 * rings.len() * batches.len() * samples) as u64);
    let measured = requests::measure(setup, &rings, &batches, samples, signals, &mut |case| {
        let (ring, place) = (case.ring.name(), case.place.name());
        bar.set_message(format!("requests, {ring}, {place}, batch {}", case.batch));
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    Ok(measured)
}

fn sample(
    lab: &mut dyn Lab,
    groups: &[Vec<Case>],
    samples: usize,
    limit: Option<Instant>,
) -> Result<Vec<Measured>> {
    let mut left: usize = groups.iter().map(Vec::len).sum();
    let bar = progress_bar((left * samples) as u64);
    let began = Instant::now();
    let mut tried = 0;
    let mut good = 0;
    let mut all = Vec::new();
    for group in groups {
        if let Some(case) = group.first() {
            bar.set_message(describe(case));
        }
        left -= group.len();
        let tries = std::cell::Cell::new(tried);
        let measured = measure(
            lab,
            group,
            samples,
            &mut || {
                let Some(limit) = limit else { return true };
                // What a pair has taken so far, for all that are still to come.
                let pair = began.elapsed() / u32::try_from(tries.get()).unwrap_or(u32::MAX).max(1);
                let rest = pair * u32::try_from(left * samples + 1).unwrap_or(u32::MAX);
                Instant::now() + rest < limit
            },
            &mut |so_far| {
                tries.set(tries.get() + 1);
                let now: usize = so_far.iter().map(|case| case.pairs.len()).sum();
                bar.set_position((good + now) as u64);
            },
        )?;
        tried = tries.get();
        good += group.len() * samples;
        all.extend(measured);
    }
    bar.finish_and_clear();
    Ok(all)
}

/// A live line on stderr if that is a terminal. It is drawn between samples only.
pub fn progress_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar
}

fn describe(case: &Case) -> String {
    let Case {
        ring,
        iommu,
        path,
        direction,
        size,
        batch,
        how,
        load,
    } = case;
    let ring = match (ring.layout, ring.in_order, ring.size) {
        (Layout::Split, false, USUAL_SIZE) => String::new(),
        _ => format!(", {} rings", ring.name()),
    };
    let iommu = match iommu {
        Iommu::Off => String::new(),
        iommu => format!(", iommu {}", iommu.name()),
    };
    let path = match path {
        Path::Window => "",
        Path::Relay => ", relay",
    };
    let how = match *how {
        How::USUAL => String::new(),
        How {
            payload,
            source,
            mode,
        } => {
            let (payload, source, mode) = (payload.name(), source.name(), mode.name());
            format!(", {payload}, {source}, {mode}")
        }
    };
    let load = load.map_or_else(String::new, |load| format!(" at {load} % load"));
    let direction = direction.name();
    format!("{direction}{load} {size} B, batch {batch}{ring}{iommu}{path}{how}")
}

/// One line about all frames.
fn totals(measured: &[Measured]) -> String {
    let mut faults = Faults::default();
    let mut verified = 0;
    for case in measured {
        faults += case.faults;
        verified += case.verified;
    }
    let Faults {
        lost,
        duplicated,
        reordered,
        corrupted,
        timeouts,
    } = faults;
    let mut line = format!(
        "{verified} frames verified: {lost} lost, {duplicated} duplicated, {reordered} reordered, {corrupted} corrupted"
    );
    if timeouts > 0 {
        line.push_str(&format!("; {timeouts} receivers gave up waiting"));
    }
    line
}

/// Says what is not as it should be of whose figures, and chooses the exit code.
fn judge(who: &str, measured: &[Measured], requests: &[Requests], samples: usize) -> Result<u8> {
    let mut code = exit::OK;
    let mut few = Vec::new();
    for case in measured {
        let name = format!("{who}{}", describe(&case.case));
        let (found, dropped) = (case.pairs.len(), case.moved + case.disturbed);
        if found < samples {
            few.push(format!(
                "{name}: {found} of {samples} samples; {dropped} were dropped ({} because the cores moved, {} because a thread \
                 did not get its core)",
                case.moved,
                case.disturbed
            ));
        }
        if found == 0 {
            code = exit::worse(code, exit::HOST);
        }
        if case.faults.any() {
            code = exit::worse(code, exit::FRAMES);
        }
        anyhow::ensure!(
            !case.bound_faults.any(),
            "{name}: the upper bound lost or damaged frames, so it is none ({:?})",
            case.bound_faults
        );
    }
    for Requests {
        case,
        samples: good,
        dropped,
    } in requests
    {
        let found = good.len();
        if found < samples {
            let (ring, place) = (case.ring.name(), case.place.name());
            few.push(format!(
                "requests, {ring}, {place}, batch {}: {found} of {samples} samples; {dropped} were dropped",
                case.batch
            ));
        }
        if found == 0 {
            code = exit::worse(code, exit::HOST);
        }
    }
    for line in few.iter().take(MOST_WARNINGS) {
        log::warn!("{line}");
    }
    if let Some(more) = few
        .len()
        .checked_sub(MOST_WARNINGS)
        .filter(|&more| more > 0)
    {
        log::warn!("and {more} more figures with too few samples");
    }
    Ok(code)
}

/// The same for the peers.
fn judge_peers(peers: &[PeerMeasured], samples: usize) -> u8 {
    let few = |it: &&PeerMeasured| it.rounds.len() < samples;
    for it in peers.iter().filter(few).take(MOST_WARNINGS) {
        log::warn!(
            "{} {:?} {} B, batch {}: {} of {samples} samples; {} were dropped because the cores moved, {} because an end did not get \
             its core",
            it.name.name(),
            it.case.way,
            it.case.size,
            it.case.batch,
            it.rounds.len(),
            it.moved,
            it.disturbed
        );
    }
    if peers.iter().any(|it| it.rounds.is_empty()) {
        exit::HOST
    } else {
        exit::OK
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::pairs::{BoundSample, Pair, VmSample};
    use crate::cli::Direction;
    use crate::cli::frames::{Payload, Size};
    use crate::cli::rings::Ring;

    fn measured(pairs: usize, faults: Faults) -> Measured {
        let pair = Pair {
            vm: VmSample::default(),
            bound: BoundSample::default(),
            probe_ns: 100.0,
            round: 0,
        };
        Measured {
            case: Case {
                ring: Ring {
                    layout: Layout::Packed,
                    in_order: true,
                    size: 256,
                },
                iommu: Iommu::Off,
                path: Path::Window,
                direction: Direction::Both,
                size: Size::Bytes(64),
                batch: 32,
                how: How::USUAL,
                load: None,
            },
            pairs: vec![pair; pairs],
            moved: 0,
            disturbed: 3,
            faults,
            bound_faults: Faults::default(),
            verified: 10,
        }
    }

    #[test]
    fn any_fault_of_a_frame_decides_the_exit_code() {
        let fault = |set: fn(&mut Faults)| {
            let mut faults = Faults::default();
            set(&mut faults);
            judge(
                "",
                &[measured(5, Faults::default()), measured(5, faults)],
                &[],
                5,
            )
            .unwrap()
        };
        assert_eq!(fault(|_| ()), exit::OK);
        assert_eq!(fault(|faults| faults.lost = 1), exit::FRAMES);
        assert_eq!(fault(|faults| faults.duplicated = 1), exit::FRAMES);
        assert_eq!(fault(|faults| faults.reordered = 1), exit::FRAMES);
        assert_eq!(fault(|faults| faults.corrupted = 1), exit::FRAMES);
        assert_eq!(fault(|faults| faults.timeouts = 1), exit::FRAMES);
    }

    #[test]
    fn few_samples_are_reported_and_none_is_a_failure() {
        assert_eq!(
            judge("", &[measured(2, Faults::default())], &[], 5).unwrap(),
            exit::OK
        );
        assert_eq!(
            judge("", &[measured(0, Faults::default())], &[], 5).unwrap(),
            exit::HOST
        );
    }

    #[test]
    fn a_figure_that_is_not_of_plain_rings_says_so() {
        let mut case = measured(1, Faults::default()).case;
        assert_eq!(
            describe(&case),
            "both 64 B, batch 32, packed+in-order rings"
        );
        case.ring = Ring {
            layout: Layout::Split,
            in_order: false,
            size: 256,
        };
        assert_eq!(describe(&case), "both 64 B, batch 32");
        case.how.payload = Payload::Headers;
        case.direction = Direction::RoundTrip;
        case.load = Some(50);
        let name = "round-trip at 50 % load 64 B, batch 32, headers, build, poll";
        assert_eq!(describe(&case), name);
    }

    #[test]
    fn a_request_time_without_a_sample_is_a_failure_too() {
        let none = Requests {
            case: requests::RequestCase {
                ring: measured(1, Faults::default()).case.ring,
                batch: 1,
                place: requests::Where::SameCore,
            },
            samples: Vec::new(),
            dropped: 15,
        };
        assert_eq!(judge("", &[], &[none], 5).unwrap(), exit::HOST);
    }

    #[test]
    fn a_bound_that_loses_frames_is_no_bound() {
        let mut bad = measured(5, Faults::default());
        bad.bound_faults.lost = 1;
        assert!(judge("", &[bad], &[], 5).is_err());
    }

    #[test]
    fn the_totals_count_every_case() {
        let line = totals(&[
            measured(1, Faults::default()),
            measured(1, Faults::default()),
        ]);
        assert_eq!(
            line,
            "20 frames verified: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
        );
    }
}
