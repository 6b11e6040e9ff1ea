//! Charts of bars: percentiles and ratios, which have no number on an x axis.

use super::panels::{Bar, Colour, Line, Panel, base_iommu, cores, most_frequent, on_like_rings};
use super::read::{Entry, Latency, Report, Spread};

/// More would be too thin to read.
const MOST_BARS: usize = 12;

/// Latencies, the cost of the vIOMMU, the window beside the relay, and beside each peer.
pub fn panels(report: &Report) -> Vec<Panel> {
    let mut panels = latencies(report);
    panels.extend(loads(report));
    for way in ["be-to-fe", "fe-to-be", "both", "round-trip"] {
        let here = report.ratios.iter().filter(|it| it.of.direction == way);
        panels.extend(ratios(
            &format!("iommu-{way}"),
            &format!("vIOMMU to none, {way}"),
            here.map(|it| Ratio {
                distance: &it.of.distance,
                label: format!("{}, {}", it.of.label(), it.iommu),
                line: it.of.line(),
                value: it.ratio,
            }),
        ));
        let here = || report.paths.iter().filter(|it| it.of.direction == way);
        panels.extend(ratios(
            &format!("relay-{way}"),
            &format!("Window to relay, speed, {way}"),
            here().map(|it| Ratio {
                distance: &it.of.distance,
                label: it.of.label(),
                line: it.of.line(),
                value: it.speed,
            }),
        ));
        panels.extend(ratios(
            &format!("relay-cpu-{way}"),
            &format!("Window to relay, CPU a frame, {way}"),
            here().filter_map(|it| {
                Some(Ratio {
                    distance: &it.of.distance,
                    label: it.of.label(),
                    line: it.of.line(),
                    value: it.cpu?,
                })
            }),
        ));
        let here = report.to_peers.iter().filter(|it| it.of.direction == way);
        panels.extend(ratios(
            &format!("to-peers-{way}"),
            &format!("Window to peer, speed, {way}"),
            here.filter(|it| it.iommu == "off").map(|it| Ratio {
                distance: &it.of.distance,
                label: format!("{}, {}", it.of.label(), it.name),
                line: Line::peer(&it.name),
                value: it.speed,
            }),
        ));
    }
    panels
}

/// One of the percentiles.
type Percentile = fn(&Latency) -> Option<f64>;

struct Ratio<'a> {
    distance: &'a str,
    label: String,
    line: Option<Line>,
    value: Spread,
}

/// Panels of ratios of the distance that most have.
fn ratios<'a>(slug: &str, title: &str, all: impl Iterator<Item = Ratio<'a>>) -> Vec<Panel> {
    let all: Vec<Ratio> = all.filter(|it| it.value.is_positive()).collect();
    let Some(distance) = most_frequent(all.iter().map(|it| it.distance)) else {
        return Vec::new();
    };
    let bars: Vec<Bar> = all
        .iter()
        .filter(|it| it.distance == distance)
        .map(|it| Bar {
            label: it.label.clone(),
            value: it.value.median,
            min: it.value.min,
            max: it.value.max,
            colour: Colour::Line(it.line.unwrap_or(Line::Split)),
        })
        .collect();
    let left_out = all.len() - bars.len();
    let title = format!("{title}, cores {distance}");
    chunks(slug, &title, "ratio; 1 is as good", &bars, left_out)
}

/// Round trips, with a load or without one.
fn trips(report: &Report, loaded: bool) -> Vec<&Entry> {
    let base = base_iommu(&report.results);
    let results = report.results.iter();
    let here = results
        .filter(|it| it.latency_ns.is_some() && it.path == "window" && it.iommu == base)
        .filter(|it| it.load_percent.is_some() == loaded);
    on_like_rings(here.collect())
}

/// A percentile of round trips against the load: one panel a percentile, frame size, batch and ring, a bar a load of the VMs and of the bound.
fn loads(report: &Report) -> Vec<Panel> {
    let here = trips(report, true);
    let Some(distance) = most_frequent(here.iter().map(|it| it.distance.clone())) else {
        return Vec::new();
    };
    let mut left_out = here.iter().filter(|it| it.distance != distance).count();
    let here: Vec<&Entry> = here
        .into_iter()
        .filter(|it| it.distance == distance)
        .collect();
    let of = |it: &Entry| (it.frame_size, it.batch, Line::of(&it.ring, it.in_order));
    let mut kinds = Vec::new();
    for entry in &here {
        if !kinds.contains(&of(entry)) {
            kinds.push(of(entry));
        }
    }
    let mut panels = Vec::new();
    for kind in kinds {
        let (size, batch, Some(line)) = kind else {
            continue;
        };
        let percentiles: [(&str, Percentile); 4] = [
            ("p50", |it| Some(it.p50)),
            ("p90", |it| it.p90),
            ("p99", |it| Some(it.p99)),
            ("p99.9", |it| Some(it.p999)),
        ];
        for (name, value) in percentiles {
            let mut bars = Vec::new();
            for entry in here.iter().filter(|it| of(it) == kind) {
                let load = entry.load_percent.unwrap_or(0);
                let who = [
                    (entry.latency_ns, "VMs", Colour::Line(line)),
                    (entry.bound_latency_ns, "bound", Colour::Quiet),
                ];
                for (latency, who, colour) in who {
                    let value = latency.as_ref().and_then(value);
                    bars.extend(
                        value
                            .filter(|it| it.is_finite() && *it > 0.0)
                            .map(|value| Bar {
                                label: format!("{load} %, {who}"),
                                value,
                                min: value,
                                max: value,
                                colour,
                            }),
                    );
                }
            }
            let title = format!(
                "Round trip by load, {name}, {size} B x{batch}, {}{}",
                line.name(),
                cores(&distance)
            );
            let ring = line.name().replace(" + ", "-");
            let slug = format!("load-{}-{size}-x{batch}-{ring}", name.replace('.', ""));
            panels.extend(chunks(&slug, &title, "ns", &bars, left_out));
            left_out = 0;
        }
    }
    panels
}

/// One panel a frame size and ring: percentiles of the VMs and of the bound.
fn latencies(report: &Report) -> Vec<Panel> {
    let here = trips(report, false);
    let Some(distance) = most_frequent(here.iter().map(|it| it.distance.clone())) else {
        return Vec::new();
    };
    let mut left_out = here.iter().filter(|it| it.distance != distance).count();
    let mut panels = Vec::new();
    for entry in here.iter().filter(|it| it.distance == distance) {
        let Some(line) = Line::of(&entry.ring, entry.in_order) else {
            continue;
        };
        let vm = percentiles(entry.latency_ns, "VMs", Colour::Line(line));
        let bound = percentiles(entry.bound_latency_ns, "bound", Colour::Quiet);
        let mut bars = Vec::new();
        let (mut vm, mut bound) = (vm.into_iter(), bound.into_iter());
        loop {
            let pair = [vm.next(), bound.next()];
            if pair.iter().all(Option::is_none) {
                break;
            }
            bars.extend(pair.into_iter().flatten());
        }
        let title = format!(
            "Round trip, {} B, {}{}",
            entry.frame_size,
            line.name(),
            cores(&distance)
        );
        let order = if entry.in_order { "-in-order" } else { "" };
        let slug = format!("latency-{}-{}{order}", entry.frame_size, entry.ring);
        panels.extend(chunks(&slug, &title, "ns", &bars, left_out));
        left_out = 0;
    }
    panels
}

fn percentiles(latency: Option<Latency>, who: &str, colour: Colour) -> Vec<Bar> {
    let Some(it) = latency else {
        return Vec::new();
    };
    [
        ("p50", Some(it.p50)),
        ("p90", it.p90),
        ("p99", Some(it.p99)),
        ("p99.9", Some(it.p999)),
        ("max", Some(it.max)),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .filter(|(_, value)| value.is_finite() && *value > 0.0)
    .map(|(name, value)| Bar {
        label: format!("{name}, {who}"),
        value,
        min: value,
        max: value,
        colour,
    })
    .collect()
}

/// As many panels as the bars need.
fn chunks(slug: &str, title: &str, x: &'static str, bars: &[Bar], left_out: usize) -> Vec<Panel> {
    let chunks = bars.chunks(MOST_BARS).enumerate();
    let panel = |(index, bars): (usize, &[Bar])| Panel {
        slug: match index {
            0 => slug.to_owned(),
            _ => format!("{slug}-{}", index + 1),
        },
        title: title.to_owned(),
        x,
        y: "",
        ticks: Vec::new(),
        series: Vec::new(),
        bars: bars.to_vec(),
        left_out: if index == 0 { left_out } else { 0 },
    };
    chunks.map(panel).collect()
}
