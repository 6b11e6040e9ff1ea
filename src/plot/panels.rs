//! Which charts a report holds, and what is in them.

use super::bars;
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
    /// Or this: then there is no y axis, and x begins at nothing.
    pub bars: Vec<Bar>,
    /// Figures that belong here but for the distance of their cores: near and far are never on one line.
    pub left_out: usize,
}

/// A bar with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// What it is of.
    pub label: String,
    /// How long it is.
    pub value: f64,
    /// The smallest sample.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Its colour.
    pub colour: Colour,
}

/// What colour a bar has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// That of a line.
    Line(Line),
    /// That of what stands beside.
    Quiet,
}

/// One line of a chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What it is of.
    pub line: Line,
    /// The upper bound, and not what was measured between VMs.
    pub bound: bool,
    /// Ascending in x.
    pub points: Vec<Point>,
}

/// A ring configuration or a peer, in the order in which they are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// Split.
    Split,
    /// Split, VIRTIO_F_IN_ORDER.
    SplitInOrder,
    /// Packed.
    Packed,
    /// Packed, VIRTIO_F_IN_ORDER.
    PackedInOrder,
    /// DPDK's vhost.
    DpdkVhost,
    /// DPDK, two hops.
    DpdkSwitch,
    /// memif.
    Memif,
    /// memif, zero-copy.
    MemifZc,
    /// Two VMs and a relay.
    Relay,
    /// veth.
    Veth,
}

impl Line {
    /// Of a ring.
    pub fn of(layout: &str, in_order: bool) -> Option<Self> {
        match (layout, in_order) {
            ("split", false) => Some(Self::Split),
            ("split", true) => Some(Self::SplitInOrder),
            ("packed", false) => Some(Self::Packed),
            ("packed", true) => Some(Self::PackedInOrder),
            _ => None,
        }
    }

    /// Of a peer.
    pub fn peer(name: &str) -> Option<Self> {
        match name {
            "dpdk-vhost" => Some(Self::DpdkVhost),
            "dpdk-switch" => Some(Self::DpdkSwitch),
            "memif" => Some(Self::Memif),
            "memif-zc" => Some(Self::MemifZc),
            "relay" => Some(Self::Relay),
            "veth" => Some(Self::Veth),
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
            Self::DpdkVhost => "DPDK vhost",
            Self::DpdkSwitch => "DPDK, two hops",
            Self::Memif => "memif",
            Self::MemifZc => "memif zero-copy",
            Self::Relay => "relay",
            Self::Veth => "veth, UDP",
        }
    }
}

/// A point, with the extent of the samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// A batch, a frame size, or the size of a ring.
    pub x: u32,
    /// Median.
    pub y: f64,
    /// The smallest sample.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// The charts: request times by batch, rates by batch, by frame size and by ring size, each where there are at least two points on a line; and
/// those of bars.
pub fn panels(report: &Report) -> Vec<Panel> {
    let mut panels = Vec::new();
    for place in ["same-core", "cross-core"] {
        panels.extend(request_panel(&report.requests, place));
    }
    for direction in ["be-to-fe", "fe-to-be", "both", "echo"] {
        panels.extend(rate_panel(report, direction, By::Batch));
        panels.extend(rate_panel(report, direction, By::Size));
        panels.extend(rate_panel(report, direction, By::Ring));
    }
    panels.extend(bars::panels(report));
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
        let line = Line::of(&it.ring, it.in_order)?;
        Some((line, false, point(it.batch, it.ns?)))
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
        bars: Vec::new(),
        left_out,
    })
}

/// What the x axis of rates is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Batch,
    Size,
    Ring,
}

/// The IOMMU of what is drawn in charts that do not compare IOMMUs: none, where that was measured.
pub fn base_iommu(entries: &[Entry]) -> &str {
    let mut all = entries.iter().map(|entry| entry.iommu.as_str());
    let first = all.clone().next().unwrap_or("off");
    all.find(|iommu| *iommu == "off").unwrap_or(first)
}

/// Those figures in which the guests did what they did in the first: charts do not compare that.
fn done_alike(mut entries: Vec<&Entry>) -> Vec<&Entry> {
    if let Some(first) = entries.first().copied() {
        entries.retain(|entry| entry.how == first.how);
    }
    entries
}

/// Those of them whose rings are as long as in the first.
pub fn on_like_rings(entries: Vec<&Entry>) -> Vec<&Entry> {
    let mut entries = done_alike(entries);
    if let Some(first) = entries.first().copied() {
        entries.retain(|entry| entry.queue_size == first.queue_size);
    }
    entries
}

fn rate_panel(report: &Report, direction: &str, by: By) -> Option<Panel> {
    let base = base_iommu(&report.results);
    // What has to be the same for all: frame size, batch.
    let fixed = |size: u32, batch: u32| match by {
        By::Batch => [Some(size), None],
        By::Size => [None, Some(batch)],
        By::Ring => [Some(size), Some(batch)],
    };
    let here: Vec<&Entry> = report
        .results
        .iter()
        .filter(|entry| entry.direction == direction && entry.mpps.is_some())
        .filter(|entry| entry.path == "window" && entry.iommu == base)
        .filter(|entry| entry.frame_size > 0)
        .collect();
    let here = match by {
        By::Batch | By::Size => on_like_rings(here),
        By::Ring => done_alike(here),
    };
    // It is what most figures have.
    let kept = |entry: &Entry| fixed(entry.frame_size, entry.batch);
    let most = most_frequent(here.iter().map(|entry| kept(entry)))?;
    let here: Vec<&Entry> = here
        .into_iter()
        .filter(|entry| kept(entry) == most)
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
                By::Ring => it.queue_size.unwrap_or(0),
            };
            let line = Line::of(&it.ring, it.in_order);
            let of = |spread: Option<Spread>, bound| Some((line?, bound, point(x, spread?)));
            [of(it.mpps, false), of(it.bound_mpps, true)]
        })
        .flatten();
    let peers = report.peers.iter().filter_map(|it| {
        let x = match by {
            By::Batch => it.batch,
            By::Size => it.frame_size,
            // Their rings have a size of their own.
            By::Ring => return None,
        };
        let kept = fixed(it.frame_size, it.batch) == most;
        let drawn = it.direction == direction && kept && it.distance == distance;
        let line = Line::peer(&it.name).filter(|_| drawn)?;
        Some((line, false, point(x, it.mpps?)))
    });
    let points = points.chain(peers);
    let way = match direction {
        "be-to-fe" => "Back-end to front-end",
        "fe-to-be" => "Front-end to back-end",
        "echo" => "To the front-end and back",
        _ => "Both directions",
    };
    let cores = cores(&distance);
    let [size, batch] = most.map(Option::unwrap_or_default);
    let (slug, title, x) = match by {
        By::Batch => ("batch", format!("{way}, {size} B{cores}"), "frames a burst"),
        By::Size => (
            "size",
            format!("{way}, bursts of {batch}{cores}"),
            "bytes of a frame",
        ),
        By::Ring => (
            "ring",
            format!("{way}, {size} B, bursts of {batch}{cores}"),
            "descriptors of a ring",
        ),
    };
    panel(Panel {
        slug: format!("rate-{direction}-by-{slug}"),
        title,
        x,
        y: "million frames a second",
        ticks: Vec::new(),
        series: series(points),
        bars: Vec::new(),
        left_out,
    })
}

/// The end of a title.
pub fn cores(distance: &Option<String>) -> String {
    distance
        .as_ref()
        .map_or_else(String::new, |distance| format!(", cores {distance}"))
}

/// What comes most often; of several, the first.
pub fn most_frequent<T: PartialEq>(values: impl Iterator<Item = T>) -> Option<T> {
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

/// Points by line and kind.
fn series(points: impl Iterator<Item = (Line, bool, Point)>) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for (line, bound, point) in points.filter(|(.., point)| point.x > 0 && point.y.is_finite()) {
        match all
            .iter_mut()
            .find(|series| series.line == line && series.bound == bound)
        {
            Some(series) => series.points.push(point),
            None => all.push(Series {
                line,
                bound,
                points: vec![point],
            }),
        }
    }
    for series in &mut all {
        series.points.sort_by_key(|point| point.x);
    }
    // The bound below what it bounds.
    all.sort_by_key(|series| (!series.bound, series.line));
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
