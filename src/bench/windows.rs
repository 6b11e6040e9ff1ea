//! `--sweep windows`: what it takes to show a window and to take it away, against the number of windows that are there; where that time
//! goes; and what traffic on other windows loses while windows come and go.

use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::pairs::{LEAST_SHARE, Lab, TRIES, had_not_its_core, moved};
use super::plan::Case;
use super::probe::Distance;
use super::record::{Counters, Done, Faults, VmmStats};
use super::report::Environment;
use super::session::Session;
use super::stats::{Spread, median, round};
use super::table::{align, number};
use super::{Setup, progress_bar};
use crate::cli::bench::{BenchArgs, Kind};
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::rings::Ring;
use crate::cli::{Direction, Path};
use crate::exit;
use crate::json::{JsonFile, text_out};
use crate::sys::Signals;

/// How many windows are there while others come and go.
const LIVE: [u64; 6] = [16, 64, 256, 1024, 4096, 8192];
/// MAP and UNMAP requests of a sample.
const COUNT: u64 = 256;
/// The same where the time is split up: the windows that are there besides are mapped meanwhile, too, and have to be few beside these.
const SPLIT_COUNT: u64 = 2048;
/// Windows a second that come and go under traffic.
const CHURN: u64 = 1000;
/// How long the guest may take for one command.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the traffic is where the flags do not say.
const SIZE: Size = Size::Bytes(64);
const BATCH: u16 = 32;

/// The whole file.
#[derive(Debug, Serialize)]
struct WindowsReport {
    schema_version: u32,
    environment: Environment,
    command: Vec<String>,
    /// One entry a number of live windows.
    windows: Vec<LatencyEntry>,
    /// The largest number of live windows to the smallest: time of a MAP and an UNMAP, sample by sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    growth: Option<Spread>,
    /// Where the time of one MAP and one UNMAP goes, in ns.
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<Split>,
    /// What traffic keeps while windows come and go.
    churn: Vec<ChurnEntry>,
}

/// With so many windows: times in ns, as the front-end's guest sees them, from submitting a request to its completion.
#[derive(Debug, Serialize)]
struct LatencyEntry {
    live: u64,
    map: Times,
    unmap: Times,
    count: u64,
}

#[derive(Debug, Serialize)]
struct Times {
    p50: Spread,
    p99: Spread,
}

/// One MAP and one UNMAP, in ns: means of the counters of both VMs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Split {
    live: u64,
    pairs: u64,
    /// As the guest sees it: the sum of the parts.
    total: f64,
    /// From the guest's notification to the request's being taken off the queue, and from its completion to the guest's seeing it.
    guest_exit: f64,
    /// The two VMMs: reading and checking the request, book-keeping, handing over between threads.
    vmm: f64,
    /// From the front-end VMM's sending the message to the acknowledgement, without the change of the window.
    wire: f64,
    /// The back-end's window: mapping and unmapping host memory under the BAR.
    window: f64,
}

/// The rate with windows coming and going, to the rate without, taken in turn.
#[derive(Debug, Serialize)]
struct ChurnEntry {
    direction: Direction,
    frame_size: Size,
    batch: u16,
    windows_per_second: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    distance: Option<Distance>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mpps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mpps_without: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<Spread>,
    /// Windows that really came and went, a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    reached_per_second: Option<Spread>,
    /// Until a window is there or gone, in ns: medians of the samples' p50 and p99.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_ns: Option<[f64; 2]>,
    #[serde(flatten)]
    faults: Faults,
    verified: u64,
    dropped_samples: usize,
    /// Asked of the half without churn only: with it, the devices' threads have work to do on the same cores.
    least_vcpu_share: f64,
}

/// Measures, prints, and returns the exit code.
pub fn run(
    args: &BenchArgs,
    setup: Setup,
    samples: usize,
    signals: &Rc<Signals>,
    json: Option<JsonFile>,
) -> Result<u8> {
    let [ring] = args.ring_list()?[..] else {
        return Err(exit::usage("--sweep windows: it takes one kind of rings").into());
    };
    if args
        .iommu
        .as_deref()
        .is_some_and(|list| list != [Iommu::Static])
    {
        return Err(exit::usage("--sweep windows: it is of --iommu static").into());
    }
    let setup = Rc::new(setup);
    let mut session = Session::start(
        Rc::clone(&setup),
        Kind {
            ring,
            iommu: Iommu::Static,
            path: Path::Window,
        },
        &args.both.memory,
        Rc::clone(signals),
    )?;
    let cases = cases(args, ring);
    let bar = progress_bar((samples * (LIVE.len() + cases.len()) + 1) as u64);
    let mut latencies: Vec<(u64, Vec<[Percentiles; 2]>)> =
        LIVE.iter().map(|&live| (live, Vec::new())).collect();
    for _ in 0..samples {
        for (live, found) in &mut latencies {
            bar.set_message(format!("{live} windows"));
            found.push(windows(&mut session, *live, COUNT)?);
            bar.inc(1);
        }
    }
    bar.set_message("where the time goes");
    let split = split_up(&mut session, LIVE[0])?;
    bar.inc(1);
    let mut churn = Vec::new();
    for case in &cases {
        bar.set_message(format!("traffic, {}", case.direction.name()));
        churn.push(under_churn(&mut session, case, samples, &mut || {
            bar.inc(1)
        })?);
    }
    bar.finish_and_clear();
    let tsc_khz = session.tsc_khz();
    session.finish()?;

    let report = WindowsReport {
        schema_version: 1,
        environment: Environment::of(&setup, tsc_khz),
        command: super::report::command(),
        growth: growth(&latencies),
        windows: latencies
            .iter()
            .filter_map(|(live, found)| latency_entry(*live, found))
            .collect(),
        split,
        churn,
    };
    writeln!(text_out(args.json.as_deref()), "{}", render(&report))?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    Ok(judge(&report.churn, samples))
}

fn judge(churn: &[ChurnEntry], samples: usize) -> u8 {
    let mut code = exit::OK;
    for entry in churn {
        let found = entry.ratio.as_ref().map_or(0, |ratio| ratio.samples.len());
        if found < samples {
            log::warn!(
                "traffic under churn, {}: {found} of {samples} samples; {} were dropped",
                entry.direction.name(),
                entry.dropped_samples
            );
        }
        if found == 0 {
            code = exit::worse(code, exit::HOST);
        }
        if entry.faults.any() {
            code = exit::worse(code, exit::FRAMES);
        }
    }
    code
}

/// The traffic under which windows come and go.
fn cases(args: &BenchArgs, ring: Ring) -> Vec<Case> {
    let directions = args
        .directions
        .as_deref()
        .unwrap_or(&[Direction::BeToFe, Direction::FeToBe]);
    let sizes = args.sizes.as_deref().unwrap_or_default();
    let batches = args.batches.as_deref().unwrap_or_default();
    let mut cases: Vec<Case> = Vec::new();
    for &direction in directions.iter().filter(|it| it.is_stream()) {
        let case = Case {
            ring,
            iommu: Iommu::Static,
            path: Path::Window,
            direction,
            size: sizes.first().copied().unwrap_or(SIZE),
            batch: batches.first().copied().unwrap_or(BATCH),
            how: args.hows().first().copied().unwrap_or(How::USUAL),
            load: None,
        };
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    cases
}

/// Of one sample, in ns.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Percentiles {
    p50: f64,
    p99: f64,
}

fn percentiles(done: &Done, what: &str, tsc_khz: u64) -> Result<Percentiles> {
    let times = done.fields.get(what);
    let of = |name: &str| {
        let ticks = times
            .and_then(|times| times.get(name))
            .and_then(Value::as_u64);
        let ticks = ticks.with_context(|| format!("the guest reports no {name} of {what}"))?;
        Ok::<_, anyhow::Error>(ticks as f64 * 1e6 / tsc_khz.max(1) as f64)
    };
    Ok(Percentiles {
        p50: of("p50")?,
        p99: of("p99")?,
    })
}

/// One sample: `count` windows come and go while `live` others are there. MAP, UNMAP.
fn windows(session: &mut Session, live: u64, count: u64) -> Result<[Percentiles; 2]> {
    let done = session.ask_front_end(&format!("windows live={live} count={count}"), PATIENCE)?;
    let tsc_khz = session.tsc_khz();
    Ok([
        percentiles(&done, "map", tsc_khz)?,
        percentiles(&done, "unmap", tsc_khz)?,
    ])
}

fn latency_entry(live: u64, samples: &[[Percentiles; 2]]) -> Option<LatencyEntry> {
    let times = |which: usize| {
        Some(Times {
            p50: Spread::of(samples.iter().map(|sample| sample[which].p50))?,
            p99: Spread::of(samples.iter().map(|sample| sample[which].p99))?,
        })
    };
    Some(LatencyEntry {
        live,
        map: times(0)?,
        unmap: times(1)?,
        count: COUNT * samples.len() as u64,
    })
}

/// The last number of windows to the first, sample by sample.
fn growth(latencies: &[(u64, Vec<[Percentiles; 2]>)]) -> Option<Spread> {
    let (_, few) = latencies.first()?;
    let (_, many) = latencies.last()?;
    let both = |sample: &[Percentiles; 2]| sample[0].p50 + sample[1].p50;
    Spread::of(
        few.iter()
            .zip(many)
            .map(|(few, many)| both(many) / both(few).max(1.0)),
    )
}

/// Counters that tell where the time went, of both VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Clock {
    /// MAP and UNMAP requests that were completed.
    requests: u64,
    /// From taking a request off the queue to completing it.
    request_ns: u64,
    /// IOTLB messages that were acknowledged.
    messages: u64,
    /// From sending one to its acknowledgement.
    message_ns: u64,
    /// Changes of the window.
    changes: u64,
    /// What they took.
    change_ns: u64,
}

fn counter(counters: &Counters, names: &[&str]) -> u64 {
    let of = |name: &&str| counters.get(*name).and_then(Value::as_u64).unwrap_or(0);
    names.iter().map(of).sum()
}

impl Clock {
    fn read([back, front]: &[VmmStats; 2]) -> Self {
        Self {
            requests: counter(&front.iommu, &["maps", "unmaps"]),
            request_ns: counter(&front.iommu, &["map_ns", "unmap_ns"]),
            messages: counter(&front.net, &["answered"]),
            message_ns: counter(&front.net, &["answered_ns"]),
            changes: counter(&back.window, &["maps", "unmaps"]),
            change_ns: counter(&back.window, &["map_ns", "unmap_ns"]),
        }
    }

    /// What one MAP and one UNMAP took between two looks; `None` where the VMs do not count.
    fn split(&self, later: &Self, total: f64, live: u64, pairs: u64) -> Option<Split> {
        let mean = |count: fn(&Self) -> u64, ns: fn(&Self) -> u64| {
            let count = count(later).checked_sub(count(self)).filter(|&n| n > 0)?;
            // A pair is two of each.
            Some(2.0 * ns(later).saturating_sub(ns(self)) as f64 / count as f64)
        };
        let request = mean(|it| it.requests, |it| it.request_ns)?;
        let message = mean(|it| it.messages, |it| it.message_ns)?;
        let window = mean(|it| it.changes, |it| it.change_ns)?;
        let part = |whole: f64, inner: f64| round((whole - inner).max(0.0));
        Some(Split {
            live,
            pairs,
            total: round(total),
            guest_exit: part(total, request),
            vmm: part(request, message),
            wire: part(message, window),
            window: round(window),
        })
    }
}

fn split_up(session: &mut Session, live: u64) -> Result<Option<Split>> {
    let before = Clock::read(&session.stats()?);
    let [map, unmap] = windows(session, live, SPLIT_COUNT)?;
    let after = Clock::read(&session.stats()?);
    Ok(before.split(&after, map.p50 + unmap.p50, live, SPLIT_COUNT))
}

/// One round of traffic, without and with windows that come and go.
struct Turn {
    without: f64,
    with: f64,
    reached: f64,
    completion: Option<[f64; 2]>,
    probe_ns: f64,
}

fn under_churn(
    session: &mut Session,
    case: &Case,
    samples: usize,
    progress: &mut dyn FnMut(),
) -> Result<ChurnEntry> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut faults = Faults::default();
    let (mut verified, mut dropped) = (0, 0);
    let tsc_khz = session.tsc_khz();
    for _ in 0..TRIES * samples {
        if turns.len() == samples {
            break;
        }
        let first = session.probe()?;
        let without = session.guests(case)?;
        let second = session.probe()?;
        session.set_churn(CHURN);
        let with = session.guests(case);
        session.set_churn(0);
        let with = with?;
        let third = session.probe()?;
        for sample in [&without, &with] {
            faults += sample.result.faults;
            verified = sample.result.verified.saturating_add(verified);
        }
        let probes = [first, second, third];
        let disturbed = without.shares.into_iter().flatten().any(had_not_its_core);
        if moved(&probes) || disturbed || !(without.result.timed && with.result.timed) {
            dropped += 1;
            continue;
        }
        let churn = with
            .result
            .churn
            .context("the guest says nothing of its churn")?;
        ensure!(churn.count > 0, "the guest made no window come and go");
        let ns = |ticks: u64| ticks as f64 * 1e6 / tsc_khz.max(1) as f64;
        turns.push(Turn {
            without: without.result.mpps,
            with: with.result.mpps,
            // A window is two requests.
            reached: churn.count as f64 * 500.0 / session.run_ms() as f64,
            completion: Some([ns(churn.p50), ns(churn.p99)]),
            probe_ns: median(&probes).unwrap_or_default(),
        });
        progress();
    }
    let spread = |value: fn(&Turn) -> f64| Spread::of(turns.iter().map(value));
    let middle = |which: usize| {
        let all = turns.iter().filter_map(|turn| turn.completion);
        median(&all.map(|both| both[which]).collect::<Vec<_>>()).map(round)
    };
    let probes: Vec<f64> = turns.iter().map(|turn| turn.probe_ns).collect();
    Ok(ChurnEntry {
        direction: case.direction,
        frame_size: case.size,
        batch: case.batch,
        windows_per_second: CHURN,
        distance: median(&probes).map(Distance::of),
        mpps: spread(|turn| turn.with),
        mpps_without: spread(|turn| turn.without),
        ratio: spread(|turn| turn.with / turn.without),
        reached_per_second: spread(|turn| turn.reached),
        completion_ns: middle(0).zip(middle(1)).map(|(p50, p99)| [p50, p99]),
        faults,
        verified,
        dropped_samples: dropped,
        least_vcpu_share: LEAST_SHARE,
    })
}

fn render(report: &WindowsReport) -> String {
    let us = |spread: &Spread| number(spread.median / 1000.0);
    let rows: Vec<Vec<String>> = report
        .windows
        .iter()
        .map(|entry| {
            vec![
                entry.live.to_string(),
                us(&entry.map.p50),
                us(&entry.map.p99),
                us(&entry.unmap.p50),
                us(&entry.unmap.p99),
                entry.count.to_string(),
            ]
        })
        .collect();
    let head = [
        "windows",
        "map p50 us",
        "p99",
        "unmap p50 us",
        "p99",
        "count",
    ];
    let mut parts = vec![align(&head, &rows)];
    if let Some(growth) = &report.growth {
        parts.push(format!(
            "{} windows to {}: {:.2} [{:.2} .. {:.2}] times the time\n",
            LIVE[LIVE.len() - 1],
            LIVE[0],
            growth.median,
            growth.min,
            growth.max
        ));
    }
    match &report.split {
        Some(split) => {
            let us = |ns: f64| number(ns / 1000.0);
            let row = vec![
                us(split.total),
                us(split.guest_exit),
                us(split.vmm),
                us(split.wire),
                us(split.window),
            ];
            let head = ["map + unmap us", "guest exit", "VMM", "wire", "window"];
            parts.push(align(&head, &[row]));
        }
        None => parts.push("the VMs do not count where the time goes\n".to_owned()),
    }
    let rows: Vec<Vec<String>> = report
        .churn
        .iter()
        .map(|entry| {
            let show = |spread: &Option<Spread>, text: fn(&Spread) -> String| {
                spread.as_ref().map_or_else(|| "-".to_owned(), text)
            };
            vec![
                entry.direction.name().to_owned(),
                entry.frame_size.to_string(),
                entry.batch.to_string(),
                show(&entry.mpps_without, |it| number(it.median)),
                show(&entry.mpps, |it| number(it.median)),
                show(&entry.ratio, |it| {
                    format!("{:.2} [{:.2} .. {:.2}]", it.median, it.min, it.max)
                }),
                show(&entry.reached_per_second, |it| number(it.median)),
                entry
                    .distance
                    .map_or_else(|| "-".to_owned(), |it| it.name().to_owned()),
            ]
        })
        .collect();
    let head = [
        "traffic",
        "size",
        "batch",
        "Mpps",
        "with churn",
        "ratio",
        "windows/s",
        "distance",
    ];
    parts.push(align(&head, &rows));
    parts.join("\n")
}

#[cfg(test)]
mod tests;
