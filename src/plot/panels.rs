//! Which charts a report holds, and what is in them.

use super::read::{Entry, Report, Request, Spread};

/// One chart. Both axes begin where they must; x is logarithmic.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Its file's name, without the ending.
    pub slug: String,
    /// What stands above it.
    pub title: String,
    /// Label of the x axis.
    pub x: &'static str,
    /// Label of the y axis, with its unit.
    pub y: &'static str,
    /// Where the x axis is marked, ascending.
    pub ticks: Vec<u32>,
    /// What is drawn.
    pub series: Vec<Series>,
    /// Figures that belong here but for the distance of their cores: near and far are never on one line.
    pub left_out: usize,
}

/// One line of a chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Which ring it is of.
    pub ring: Ring,
    /// The upper bound, and not what was measured between VMs.
    pub bound: bool,
    /// Ascending in x.
    pub points: Vec<Point>,
}

/// A ring configuration, in the order in which they are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ring {
    /// Split.
    Split,
    /// Split, VIRTIO_F_IN_ORDER.
    SplitInOrder,
    /// Packed.
    Packed,
    /// Packed, VIRTIO_F_IN_ORDER.
    PackedInOrder,
}

impl Ring {
    fn of(layout: &str, in_order: bool) -> Option<Self> {
        match (layout, in_order) {
            ("split", false) => Some(Self::Split),
            ("split", true) => Some(Self::SplitInOrder),
            ("packed", false) => Some(Self::Packed),
            ("packed", true) => Some(Self::PackedInOrder),
            _ => None,
        }
    }

    /// As the legend has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::SplitInOrder => "split + in-order",
            Self::Packed => "packed",
            Self::PackedInOrder => "packed + in-order",
        }
    }
}

/// A point, with the extent of the samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// A batch, or a frame size.
    pub x: u32,
    /// Median.
    pub y: f64,
    /// The smallest sample.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// The charts: request times by batch, rates by batch, rates by frame size; each where there are at least two points on a line.
pub fn panels(report: &Report) -> Vec<Panel> {
    let mut panels = Vec::new();
    for place in ["same-core", "cross-core"] {
        panels.extend(request_panel(&report.requests, place));
    }
    for direction in ["be-to-fe", "fe-to-be", "both"] {
        panels.extend(rate_panel(&report.results, direction, By::Batch));
        panels.extend(rate_panel(&report.results, direction, By::Size));
    }
    panels
}

fn request_panel(requests: &[Request], place: &str) -> Option<Panel> {
    let here: Vec<&Request> = requests
        .iter()
        .filter(|request| request.place == place && request.ns.is_some())
        .collect();
    let distance = most_frequent(here.iter().map(|request| request.distance.clone()))?;
    let drawn = |request: &&&Request| request.distance == distance;
    let left_out = here.len() - here.iter().filter(drawn).count();
    let points = here.iter().filter(drawn).filter_map(|it| {
        let ring = Ring::of(&it.ring, it.in_order)?;
        Some((ring, false, point(it.batch, it.ns?)))
    });
    let title = match place {
        "same-core" => "Request time, both halves on one core".to_owned(),
        _ => format!("Request time, a half on each core{}", cores(&distance)),
    };
    panel(Panel {
        slug: format!("request-time-{place}"),
        title,
        x: "requests published at once",
        y: "ns a request",
        ticks: Vec::new(),
        series: series(points),
        left_out,
    })
}

/// What the x axis of rates is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Batch,
    Size,
}

fn rate_panel(entries: &[Entry], direction: &str, by: By) -> Option<Panel> {
    let fixed = |entry: &Entry| match by {
        By::Batch => entry.frame_size,
        By::Size => entry.batch,
    };
    let here: Vec<&Entry> = entries
        .iter()
        .filter(|entry| entry.direction == direction && entry.mpps.is_some())
        .collect();
    // The other number has to be the same for all; the one that most figures have.
    let kept = most_frequent(here.iter().map(|entry| fixed(entry)))?;
    let here: Vec<&Entry> = here
        .into_iter()
        .filter(|entry| fixed(entry) == kept)
        .collect();
    let distance = most_frequent(here.iter().map(|entry| entry.distance.clone()))?;
    let drawn = |entry: &&&Entry| entry.distance == distance;
    let left_out = here.len() - here.iter().filter(drawn).count();
    let points = here
        .iter()
        .filter(drawn)
        .flat_map(|it| {
            let x = match by {
                By::Batch => it.batch,
                By::Size => it.frame_size,
            };
            let ring = Ring::of(&it.ring, it.in_order);
            let of = |spread: Option<Spread>, bound| Some((ring?, bound, point(x, spread?)));
            [of(it.mpps, false), of(it.bound_mpps, true)]
        })
        .flatten();
    let way = match direction {
        "be-to-fe" => "Back-end to front-end",
        "fe-to-be" => "Front-end to back-end",
        _ => "Both directions",
    };
    let cores = cores(&distance);
    let (slug, title, x) = match by {
        By::Batch => ("batch", format!("{way}, {kept} B{cores}"), "frames a burst"),
        By::Size => (
            "size",
            format!("{way}, bursts of {kept}{cores}"),
            "bytes of a frame",
        ),
    };
    panel(Panel {
        slug: format!("rate-{direction}-by-{slug}"),
        title,
        x,
        y: "million frames a second",
        ticks: Vec::new(),
        series: series(points),
        left_out,
    })
}

fn cores(distance: &Option<String>) -> String {
    distance
        .as_ref()
        .map_or_else(String::new, |distance| format!(", cores {distance}"))
}

/// What comes most often; of several, the first.
fn most_frequent<T: PartialEq>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    counts
        .into_iter()
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
        .map(|(value, _)| value)
}

fn point(x: u32, spread: Spread) -> Point {
    Point {
        x,
        y: spread.median,
        min: spread.min,
        max: spread.max,
    }
}

/// Points by ring and kind.
fn series(points: impl Iterator<Item = (Ring, bool, Point)>) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for (ring, bound, point) in points.filter(|(.., point)| point.x > 0 && point.y.is_finite()) {
        match all
            .iter_mut()
            .find(|series| series.ring == ring && series.bound == bound)
        {
            Some(series) => series.points.push(point),
            None => all.push(Series {
                ring,
                bound,
                points: vec![point],
            }),
        }
    }
    for series in &mut all {
        series.points.sort_by_key(|point| point.x);
    }
    // The bound below what it bounds.
    all.sort_by_key(|series| (!series.bound, series.ring));
    all
}

/// With its ticks, if a line has two points.
fn panel(mut panel: Panel) -> Option<Panel> {
    let mut ticks: Vec<u32> = panel
        .series
        .iter()
        .flat_map(|series| series.points.iter().map(|point| point.x))
        .collect();
    ticks.sort_unstable();
    ticks.dedup();
    panel.ticks = ticks;
    (panel.ticks.len() >= 2).then_some(panel)
}
