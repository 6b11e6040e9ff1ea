//! `bench`: throughput and latency from VM to VM, beside the upper bound.

mod bound;
mod pairs;
mod plan;
mod probe;
mod record;
mod report;
mod session;
mod stats;
mod table;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmm::MemoryConfig;

use crate::cli::bench::{BenchArgs, RingArg};
use crate::cli::{Mode, machine};
use crate::exit;
use crate::sys::{self, Signals};

use pairs::{Measured, measure};
use plan::Case;
use record::Faults;
use report::{JsonFile, Report};
use session::Session;

/// How long the guests send before they count.
const WARM_UP_MS: u64 = 5;
/// `--quick` stops taking samples again when the first try of the rest would end later than this.
const QUICK: Duration = Duration::from_secs(17);

/// What is the same for all samples, of the guests and of the upper bound.
#[derive(Debug)]
pub struct Setup {
    /// Length of the timed part.
    pub ms: u64,
    /// How long is sent before it.
    pub warmup_ms: u64,
    /// How the receivers wait.
    pub mode: Mode,
    /// The back-end's core, the front-end's.
    pub cores: [usize; 2],
    /// Descriptors of each ring.
    pub queue_size: u16,
    /// Memory of each VM.
    pub memory: MemoryConfig,
}

/// Measures, prints, and returns the exit code.
pub fn run(args: &BenchArgs) -> Result<u8> {
    let started = Instant::now();
    if args.ring == RingArg::Packed {
        return Err(exit::usage("--ring packed: not available yet; the rings are split").into());
    }
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    let setup = || -> Result<Setup> {
        Ok(Setup {
            ms: args.ms,
            warmup_ms: WARM_UP_MS,
            mode: args.mode,
            cores: args.both.cores(&allowed)?,
            queue_size: args.both.queue_size()?,
            memory: machine::memory(&args.both.memory)?,
        })
    };
    let (for_session, setup) = (setup()?, setup()?);
    let json = args.json.as_deref().map(JsonFile::create).transpose()?;
    let signals = Signals::install().context("cannot handle signals")?;

    let mut session = Session::start(for_session, &args.both.memory, signals)?;
    let cases = plan::plan(args);
    let limit = args.quick.then(|| started + QUICK);
    let measured = sample(&mut session, &cases, plan::samples(args), limit)?;
    let tsc_khz = session.tsc_khz();
    session.finish()?;

    let report = Report::new(&setup, tsc_khz, &measured);
    let mut out = io::stdout().lock();
    writeln!(out, "{}\n{}", table::render(&report.results), table::LEGEND)?;
    writeln!(out, "\n{}", totals(&measured))?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    judge(&measured, plan::samples(args))
}

fn sample(
    session: &mut Session,
    cases: &[Case],
    samples: usize,
    limit: Option<Instant>,
) -> Result<Vec<Measured>> {
    let bar = progress_bar((cases.len() * samples) as u64);
    let began = Instant::now();
    let mut tried = 0;
    let mut all = Vec::new();
    for (index, &case) in cases.iter().enumerate() {
        bar.set_message(describe(&case));
        let left = cases.len() - index - 1;
        let tries = std::cell::Cell::new(tried);
        let measured = measure(
            session,
            case,
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
                bar.set_position((index * samples + so_far.pairs.len()) as u64);
            },
        )?;
        tried = tries.get();
        all.push(measured);
    }
    bar.finish_and_clear();
    Ok(all)
}

/// A live line on stderr if that is a terminal. It is drawn between samples only.
fn progress_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar
}

fn describe(case: &Case) -> String {
    let Case {
        direction,
        size,
        batch,
    } = case;
    format!("{} {size} B, batch {batch}", direction.name())
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

/// Says what is not as it should be, and chooses the exit code.
fn judge(measured: &[Measured], samples: usize) -> Result<u8> {
    let mut code = exit::OK;
    for case in measured {
        let name = describe(&case.case);
        let (found, dropped) = (case.pairs.len(), case.moved + case.disturbed);
        if found < samples {
            log::warn!(
                "{name}: {found} of {samples} samples; {dropped} were dropped ({} because the cores moved, {} because a thread \
                 did not get its core)",
                case.moved,
                case.disturbed
            );
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
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::pairs::{BoundSample, Pair, VmSample};
    use crate::cli::Direction;

    fn measured(pairs: usize, faults: Faults) -> Measured {
        let pair = Pair {
            vm: VmSample::default(),
            bound: BoundSample::default(),
            probe_ns: 100.0,
        };
        Measured {
            case: Case {
                direction: Direction::Both,
                size: 64,
                batch: 32,
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
            judge(&[measured(5, Faults::default()), measured(5, faults)], 5).unwrap()
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
            judge(&[measured(2, Faults::default())], 5).unwrap(),
            exit::OK
        );
        assert_eq!(
            judge(&[measured(0, Faults::default())], 5).unwrap(),
            exit::HOST
        );
    }

    #[test]
    fn a_bound_that_loses_frames_is_no_bound() {
        let mut bad = measured(5, Faults::default());
        bad.bound_faults.lost = 1;
        assert!(judge(&[bad], 5).is_err());
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
