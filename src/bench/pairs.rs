//! Sampling: the guests and the upper bound in turn, with the distance of the cores before, between and after.

use std::collections::BTreeMap;

use anyhow::Result;

use super::plan::Case;
use super::probe::Distance;
use super::record::{Faults, SampleResult};
use super::stats::median;
use crate::cli::frames::How;
use crate::cli::iommu::Iommu;
use crate::cli::{Mode, Path};

/// A thread that had less than this of its core was disturbed.
pub const LEAST_SHARE: f64 = 0.92;
/// Probes that differ by more than this factor mean that the cores moved.
const MOST_CHANGE: f64 = 1.4;
/// How often a sample is tried at most, on average.
pub const TRIES: usize = 3;

/// What the sampling needs; the session has it, and so have the tests.
pub trait Lab {
    /// A round trip of one cache line between the two cores, in ns.
    fn probe(&mut self) -> Result<f64>;
    /// One sample of the guests.
    fn guests(&mut self, case: &Case) -> Result<VmSample>;
    /// One sample of the same ring between two threads of this process.
    fn bound(&mut self, case: &Case) -> Result<BoundSample>;
    /// Whether anything else is sampled in each round of the case.
    fn has_others(&self, _case: &Case) -> bool {
        false
    }
    /// Samples that.
    fn others(&mut self, _case: &Case, _round: usize) -> Result<()> {
        Ok(())
    }
    /// Whether all of that was good in a round.
    fn others_good(&self, _case: &Case, _round: usize) -> bool {
        true
    }
}

/// One sample of the guests.
#[derive(Clone, Debug, Default)]
pub struct VmSample {
    /// What was measured.
    pub result: SampleResult,
    /// How much of its core each virtual CPU had, back-end first; absent where the guests sleep.
    pub shares: Option<[f64; 2]>,
    /// What all other threads of each VM process used, in percent of a core, back-end first.
    pub others_percent: [f64; 2],
    /// Returns of KVM_RUN to the VMM by reason, both VMs together.
    pub exits: BTreeMap<String, u64>,
    /// The kernel's exit counters, both VMs together.
    pub kvm_exits: BTreeMap<String, u64>,
    /// How many cores all processes together kept busy.
    pub busy_cores: f64,
    /// Under a load: million frames that were due in a second.
    pub offered_mpps: Option<f64>,
}

/// What a sample under a load has besides: the rate, and what went wrong when the whole load was measured.
fn of_load(result: &mut SampleResult, rate: Option<u64>, whole: &SampleResult) -> Option<f64> {
    result.faults += whole.faults;
    result.verified = result.verified.saturating_add(whole.verified);
    result.timed &= whole.timed;
    rate.map(|rate| rate as f64 / 1e6)
}

impl VmSample {
    /// It was taken at so many frames a second, of what an echo reached.
    pub fn of_load(&mut self, rate: Option<u64>, whole: &SampleResult) {
        self.offered_mpps = of_load(&mut self.result, rate, whole);
    }
}

impl BoundSample {
    /// As [`VmSample::of_load`].
    pub fn of_load(&mut self, rate: Option<u64>, whole: &SampleResult) {
        self.offered_mpps = of_load(&mut self.result, rate, whole);
    }

    /// Of what has no bound.
    pub fn none() -> Self {
        Self {
            result: SampleResult {
                timed: true,
                ..SampleResult::default()
            },
            ..Self::default()
        }
    }
}

/// One sample of the upper bound.
#[derive(Clone, Debug, Default)]
pub struct BoundSample {
    /// What was measured.
    pub result: SampleResult,
    /// How much of its core each thread had, back-end first; absent where the threads sleep.
    pub shares: Option<[f64; 2]>,
    /// Under a load: million frames that were due in a second.
    pub offered_mpps: Option<f64>,
}

/// A sample of each that belong together.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The guests'.
    pub vm: VmSample,
    /// The upper bound's.
    pub bound: BoundSample,
    /// Median of the three probes, in ns.
    pub probe_ns: f64,
    /// In which turn of its group it was taken: pairs of different cases with the same number belong together.
    pub round: usize,
}

impl Pair {
    /// How far apart the cores were.
    pub fn distance(&self) -> Distance {
        Distance::of(self.probe_ns)
    }

    /// CPU time a frame, of all processes together, in ns. (Of a round trip nothing is known: both ends work all the time.)
    pub fn cpu_ns_per_frame(&self) -> Option<f64> {
        let rate = self.vm.result.mpps;
        (rate > 0.0 && self.vm.busy_cores > 0.0).then(|| self.vm.busy_cores * 1000.0 / rate)
    }

    /// How near the guests came to the bound: 1 is as good. Rate by rate, or median round trip by median round trip.
    pub fn ratio(&self) -> Option<f64> {
        let (vm, bound) = (&self.vm.result, &self.bound.result);
        let (over, under) = match (vm.latency, bound.latency) {
            (Some(vm), Some(bound)) => (bound.p50, vm.p50),
            _ => (vm.mpps, bound.mpps),
        };
        (under > 0.0).then(|| over / under)
    }
}

/// Everything about one case.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Which.
    pub case: Case,
    /// The pairs that count.
    pub pairs: Vec<Pair>,
    /// Pairs in which the cores moved.
    pub moved: usize,
    /// Pairs in which a thread did not get its core, or so little that nothing was timed.
    pub disturbed: usize,
    /// What went wrong with frames between the guests, in dropped pairs too.
    pub faults: Faults,
    /// What went wrong in the upper bound: it runs the same code, so there must be nothing.
    pub bound_faults: Faults,
    /// Frames that the guests checked, in dropped pairs too.
    pub verified: u64,
}

impl Measured {
    /// Nothing yet.
    pub fn new(case: Case) -> Self {
        Self {
            case,
            pairs: Vec::new(),
            moved: 0,
            disturbed: 0,
            faults: Faults::default(),
            bound_faults: Faults::default(),
            verified: 0,
        }
    }

    /// Takes one pair of samples.
    pub fn attempt(&mut self, lab: &mut dyn Lab, round: usize) -> Result<()> {
        let case = self.case;
        let first = lab.probe()?;
        let vm = lab.guests(&case)?;
        let second = lab.probe()?;
        let bound = lab.bound(&case)?;
        let third = lab.probe()?;
        self.faults += vm.result.faults;
        self.bound_faults += bound.result.faults;
        self.verified = self.verified.saturating_add(vm.result.verified);
        let probes = [first, second, third];
        // Where windows come and go with every frame, or a relay takes part, other threads have work to do on the same cores: that is part of the figure.
        let judged = vm.shares.filter(|_| gated(&case));
        let shares = [judged, bound.shares];
        let mut each = shares.into_iter().flatten().flatten();
        let disturbed = each.any(had_not_its_core);
        log::info!("{case:?}: probes {probes:.0?} ns, shares of guests and bound {shares:.2?}");
        if moved(&probes) {
            self.moved += 1;
        } else if disturbed || !(vm.result.timed && bound.result.timed) {
            self.disturbed += 1;
        } else {
            self.pairs.push(Pair {
                vm,
                bound,
                probe_ns: median(&probes).unwrap_or_default(),
                round,
            });
        }
        Ok(())
    }
}

/// Whether a sample of the case counts only where each virtual CPU had its core.
pub fn gated(case: &Case) -> bool {
    !case.iommu.per_frame() && case.path == Path::Window && case.how.mode == Mode::Poll
}

/// How many rounds have a good pair of each case, and good samples of what is sampled beside them.
fn whole_rounds(lab: &dyn Lab, all: &[Measured]) -> usize {
    let Some((first, others)) = all.split_first() else {
        return 0;
    };
    let has = |measured: &Measured, round| measured.pairs.iter().any(|pair| pair.round == round);
    let rounds = first.pairs.iter().map(|pair| pair.round);
    rounds
        .filter(|&round| others.iter().all(|other| has(other, round)))
        .filter(|&round| lab.others_good(&first.case, round))
        .count()
}

/// What cases of a group are compared by.
fn compared_by(case: &Case) -> (Iommu, Path, How) {
    (case.iommu, case.path, case.how)
}

/// Samples cases in turn, one pair each, until each has `samples` good pairs, or three times as many were tried, or `may_retry` says no.
/// Where the cases differ in the IOMMU, in the path, or in what the guests do, or others are sampled beside them, they are compared with each other round by round: then each is sampled until there are `samples`
/// rounds in which all were good. `progress` is called after each pair.
pub fn measure(
    lab: &mut dyn Lab,
    cases: &[Case],
    samples: usize,
    may_retry: &mut dyn FnMut() -> bool,
    progress: &mut dyn FnMut(&[Measured]),
) -> Result<Vec<Measured>> {
    let mut all: Vec<Measured> = cases.iter().copied().map(Measured::new).collect();
    let beside = cases.first().filter(|case| lab.has_others(case));
    let compared = beside.is_some()
        || cases
            .windows(2)
            .any(|pair| compared_by(&pair[0]) != compared_by(&pair[1]));
    for round in 0..TRIES * samples {
        if compared && (whole_rounds(lab, &all) == samples || (round >= samples && !may_retry())) {
            break;
        }
        for index in 0..all.len() {
            let measured = &mut all[index];
            let complete = measured.pairs.len() == samples;
            if !compared && (complete || (round >= samples && !may_retry())) {
                continue;
            }
            measured.attempt(lab, round)?;
            progress(&all);
        }
        if let Some(case) = beside {
            lab.others(case, round)?;
        }
    }
    Ok(all)
}

/// Whether a thread had too little of its core for its sample to count.
pub fn had_not_its_core(share: f64) -> bool {
    share < LEAST_SHARE
}

/// Whether probes differ by so much that the cores moved.
pub fn moved(probes: &[f64]) -> bool {
    let least = probes.iter().copied().fold(f64::INFINITY, f64::min);
    let most = probes.iter().copied().fold(0.0, f64::max);
    most > MOST_CHANGE * least
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Latency;
    use crate::cli::Direction;
    use crate::cli::frames::{Payload, Size};
    use crate::cli::rings::{Layout, Ring};

    const CASE: Case = Case {
        ring: Ring {
            layout: Layout::Split,
            in_order: false,
            size: 256,
        },
        iommu: Iommu::Off,
        path: Path::Window,
        direction: Direction::BeToFe,
        size: Size::Bytes(64),
        batch: 32,
        how: How::USUAL,
        load: None,
    };

    /// Plays back probes and shares; counts what it was asked for.
    #[derive(Default)]
    struct Fake {
        probes: Vec<f64>,
        vm_shares: Vec<f64>,
        bound_shares: Vec<f64>,
        faults: Faults,
        idle: bool,
        calls: String,
        seen: Vec<Case>,
    }

    fn cycle(values: &[f64], turn: usize, default: f64) -> f64 {
        if values.is_empty() {
            return default;
        }
        values[turn % values.len()]
    }

    impl Fake {
        fn count(&self, what: char) -> usize {
            self.calls.chars().filter(|&c| c == what).count()
        }
    }

    impl Lab for Fake {
        fn probe(&mut self) -> Result<f64> {
            let ns = cycle(&self.probes, self.count('p'), 100.0);
            self.calls.push('p');
            Ok(ns)
        }

        fn guests(&mut self, case: &Case) -> Result<VmSample> {
            self.seen.push(*case);
            let share = cycle(&self.vm_shares, self.count('g'), 1.0);
            self.calls.push('g');
            Ok(VmSample {
                result: SampleResult {
                    mpps: 8.0,
                    verified: 1000,
                    faults: self.faults,
                    timed: !self.idle,
                    ..SampleResult::default()
                },
                shares: Some([1.0, share]),
                ..VmSample::default()
            })
        }

        fn bound(&mut self, case: &Case) -> Result<BoundSample> {
            assert_eq!(self.seen.last(), Some(case));
            let share = cycle(&self.bound_shares, self.count('b'), 1.0);
            self.calls.push('b');
            Ok(BoundSample {
                result: SampleResult {
                    mpps: 10.0,
                    timed: true,
                    ..SampleResult::default()
                },
                shares: Some([share, 1.0]),
                offered_mpps: None,
            })
        }
    }

    fn run(fake: &mut Fake, samples: usize) -> Measured {
        let mut all = measure(fake, &[CASE], samples, &mut || true, &mut |_| ()).unwrap();
        all.pop().unwrap()
    }

    #[test]
    fn guests_and_bound_take_turns_with_a_probe_on_either_side() {
        let mut fake = Fake::default();
        let measured = run(&mut fake, 2);
        assert_eq!(fake.calls, "pgpbppgpbp");
        assert_eq!(measured.pairs.len(), 2);
        assert_eq!(measured.pairs[0].ratio(), Some(0.8));
        assert_eq!(measured.pairs[0].distance(), Distance::Near);
    }

    #[test]
    fn cases_of_a_group_take_turns_and_one_that_is_complete_is_left_alone() {
        let other = Case { batch: 1, ..CASE };
        let mut fake = Fake {
            // The first pair of the second case is of no use.
            vm_shares: vec![1.0, 0.5, 1.0, 1.0, 1.0, 1.0],
            ..Fake::default()
        };
        let mut progress = 0;
        let all = measure(&mut fake, &[CASE, other], 2, &mut || true, &mut |_| {
            progress += 1
        })
        .unwrap();
        assert_eq!(fake.seen, [CASE, other, CASE, other, other]);
        assert_eq!((all[0].pairs.len(), all[1].pairs.len()), (2, 2));
        assert_eq!((all[0].disturbed, all[1].disturbed), (0, 1));
        assert_eq!((all[1].case, progress), (other, 5));
    }

    #[test]
    fn cases_that_are_compared_are_sampled_until_enough_rounds_have_all_of_them() {
        let other = Case {
            iommu: Iommu::Static,
            ..CASE
        };
        let mut fake = Fake {
            // Of the first round the second is of no use, and of the second round the first.
            vm_shares: vec![1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
            ..Fake::default()
        };
        let all = measure(&mut fake, &[CASE, other], 2, &mut || true, &mut |_| ()).unwrap();
        assert_eq!(fake.seen.len(), 8);
        let rounds = |measured: &Measured| -> Vec<usize> {
            measured.pairs.iter().map(|pair| pair.round).collect()
        };
        assert_eq!(rounds(&all[0]), [0, 2, 3]);
        assert_eq!(rounds(&all[1]), [1, 2, 3]);
    }

    #[test]
    fn what_guests_do_is_compared_round_by_round_too_and_loads_are_not() {
        let headers = Case {
            how: How {
                payload: Payload::Headers,
                ..How::USUAL
            },
            ..CASE
        };
        let loaded = Case {
            load: Some(10),
            ..CASE
        };
        for (other, tries) in [(headers, 3), (loaded, 2)] {
            let mut fake = Fake {
                // The first pair of the second case is of no use.
                vm_shares: vec![1.0, 0.5, 1.0, 1.0, 1.0, 1.0],
                ..Fake::default()
            };
            let all = measure(&mut fake, &[CASE, other], 2, &mut || true, &mut |_| ()).unwrap();
            let first = all[0].pairs.len() + all[0].disturbed;
            assert_eq!((first, all[1].pairs.len()), (tries, 2));
        }
    }

    #[test]
    fn faults_of_the_whole_load_count_where_a_part_of_it_is_measured() {
        let whole = SampleResult {
            verified: 7,
            faults: Faults {
                lost: 1,
                ..Faults::default()
            },
            ..SampleResult::default()
        };
        let mut sample = VmSample::default();
        sample.result.timed = true;
        sample.of_load(Some(2_500_000), &whole);
        assert_eq!((sample.result.faults.lost, sample.result.verified), (1, 7));
        assert_eq!(sample.offered_mpps, Some(2.5));
        assert!(!sample.result.timed);
    }

    #[test]
    fn what_other_threads_take_disqualifies_no_sample_that_maps_every_frame_or_goes_through_a_relay()
     {
        for (iommu, kept) in [(Iommu::Static, 0), (Iommu::Dynamic, 1), (Iommu::Batch, 1)] {
            let mut fake = Fake {
                vm_shares: vec![0.4],
                ..Fake::default()
            };
            let case = Case { iommu, ..CASE };
            let all = measure(&mut fake, &[case], 1, &mut || false, &mut |_| ()).unwrap();
            assert_eq!(all[0].pairs.len(), kept, "{iommu:?}");
            let case = Case {
                path: Path::Relay,
                ..case
            };
            let all = measure(&mut fake, &[case], 1, &mut || false, &mut |_| ()).unwrap();
            assert_eq!(all[0].pairs.len(), 1, "through a relay, {iommu:?}");
        }
    }

    #[test]
    fn a_pair_in_which_the_cores_moved_is_taken_again() {
        let mut fake = Fake {
            probes: vec![100.0, 100.0, 450.0, 450.0, 430.0, 460.0],
            ..Fake::default()
        };
        let measured = run(&mut fake, 1);
        assert_eq!((measured.pairs.len(), measured.moved), (1, 1));
        assert_eq!(measured.pairs[0].distance(), Distance::Far);
    }

    #[test]
    fn a_pair_in_which_a_thread_had_not_its_core_is_taken_again() {
        let mut fake = Fake {
            vm_shares: vec![0.91, 0.93, 1.0],
            bound_shares: vec![1.0, 0.5, 1.0],
            ..Fake::default()
        };
        let measured = run(&mut fake, 1);
        assert_eq!((measured.pairs.len(), measured.disturbed), (1, 2));
    }

    #[test]
    fn a_sample_in_which_nothing_was_timed_is_taken_again_and_never_a_zero() {
        let mut fake = Fake {
            idle: true,
            ..Fake::default()
        };
        let measured = run(&mut fake, 1);
        assert_eq!((measured.pairs.len(), measured.disturbed), (0, 3));
    }

    #[test]
    fn a_busy_host_costs_three_times_the_samples_and_no_more() {
        let mut fake = Fake {
            vm_shares: vec![0.3],
            ..Fake::default()
        };
        let measured = run(&mut fake, 4);
        assert_eq!((measured.pairs.len(), measured.disturbed), (0, 12));
        // And without time to retry, not even that.
        let mut fake = Fake {
            vm_shares: vec![0.3],
            ..Fake::default()
        };
        let measured = measure(&mut fake, &[CASE], 4, &mut || false, &mut |_| ()).unwrap();
        assert_eq!(measured[0].disturbed, 4);
    }

    #[test]
    fn frames_lost_in_a_dropped_pair_are_not_forgotten() {
        let mut fake = Fake {
            vm_shares: vec![0.1],
            faults: Faults {
                lost: 1,
                ..Faults::default()
            },
            ..Fake::default()
        };
        let measured = run(&mut fake, 1);
        assert!(measured.pairs.is_empty());
        assert_eq!((measured.faults.lost, measured.verified), (3, 3000));
    }

    #[test]
    fn the_ratio_of_a_round_trip_is_bound_over_guest() {
        let with = |p50| SampleResult {
            latency: Some(Latency {
                p50,
                ..Latency::default()
            }),
            ..SampleResult::default()
        };
        let pair = Pair {
            vm: VmSample {
                result: with(200.0),
                ..VmSample::default()
            },
            bound: BoundSample {
                result: with(150.0),
                ..BoundSample::default()
            },
            probe_ns: 100.0,
            round: 0,
        };
        assert_eq!(pair.ratio(), Some(0.75));
    }
}
