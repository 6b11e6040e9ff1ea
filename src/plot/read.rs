//! The parts of a report that are drawn.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::panels::Line;

/// A report.
#[derive(Debug, Deserialize)]
pub struct Report {
    schema_version: u32,
    environment: Environment,
    /// The environment, with everything that is in it.
    #[serde(skip)]
    pub environment_json: Value,
    /// How `bench` was called.
    #[serde(default)]
    pub command: Vec<String>,
    /// The figures of the VMs.
    pub results: Vec<Entry>,
    /// The request times.
    #[serde(default)]
    pub requests: Vec<Request>,
    /// With an IOMMU to without.
    #[serde(default)]
    pub ratios: Vec<Ratio>,
    /// The window to the relay.
    #[serde(default)]
    pub paths: Vec<PathRatio>,
    /// The figures of peers.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// The window to each peer.
    #[serde(default)]
    pub to_peers: Vec<PeerRatio>,
}

#[derive(Debug, Deserialize)]
struct Environment {
    version: String,
    commit: Option<String>,
    kernel: Option<String>,
    cpu_model: Option<String>,
    cores: [usize; 2],
    memory: Memory,
    queue_size: u32,
    mode: String,
    sample_ms: u64,
}

#[derive(Debug, Deserialize)]
struct Memory {
    hugepages: String,
}

/// A figure of the VMs.
#[derive(Debug, Deserialize)]
pub struct Entry {
    /// Which way the frames went.
    pub direction: String,
    /// The layout.
    pub ring: String,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Descriptors of a ring; absent in reports of earlier versions.
    pub queue_size: Option<u32>,
    /// Bytes of a frame; 0 for a mix, which has no place on an axis.
    #[serde(deserialize_with = "bytes")]
    pub frame_size: u32,
    /// Frames a burst.
    pub batch: u32,
    /// What the guests do with frames.
    #[serde(flatten)]
    pub how: How,
    /// Of round trips: the load under which they were timed.
    pub load_percent: Option<u32>,
    /// `near` or `far`; absent where there was no sample.
    pub distance: Option<String>,
    /// From VM to VM; absent for round trips.
    pub mpps: Option<Spread>,
    /// The upper bound.
    pub bound_mpps: Option<Spread>,
    /// Round trips.
    pub latency_ns: Option<Latency>,
    /// Those of the upper bound.
    pub bound_latency_ns: Option<Latency>,
    /// `window` or `relay`.
    #[serde(default = "window")]
    pub path: String,
    /// What stands between the front-end's memory and the window.
    #[serde(default = "off")]
    pub iommu: String,
}

/// What the guests do with frames, and how they wait; absent in reports of earlier versions.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct How {
    payload: Option<String>,
    source: Option<String>,
    mode: Option<String>,
}

/// Bytes of a frame: a number, or 0 where it is none.
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(value
        .as_u64()
        .and_then(|bytes| u32::try_from(bytes).ok())
        .unwrap_or(0))
}

fn window() -> String {
    "window".to_owned()
}

fn off() -> String {
    "off".to_owned()
}

/// Percentiles in nanoseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 in 100 are no longer; absent in reports of earlier versions.
    pub p90: Option<f64>,
    /// 99 in 100 are no longer.
    pub p99: f64,
    /// 999 in 1000 are no longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// What a ratio is of.
#[derive(Debug, Deserialize)]
pub struct Of {
    /// Which way the frames went.
    pub direction: String,
    ring: String,
    in_order: bool,
    queue_size: Option<u32>,
    frame_size: Value,
    batch: u32,
    /// `near` or `far`.
    pub distance: String,
}

impl Of {
    /// As it is named beside a bar.
    pub fn label(&self) -> String {
        let order = if self.in_order { "+in-order" } else { "" };
        let size = match self.frame_size.as_str() {
            Some(mix) => mix.to_owned(),
            None => format!("{} B", self.frame_size),
        };
        let ring = match self.queue_size {
            None | Some(256) => String::new(),
            Some(ring) => format!("/{ring}"),
        };
        format!("{size} x{} {}{order}{ring}", self.batch, self.ring)
    }

    /// The ring's line.
    pub fn line(&self) -> Option<Line> {
        Line::of(&self.ring, self.in_order)
    }
}

/// With an IOMMU to without.
#[derive(Debug, Deserialize)]
pub struct Ratio {
    /// Of which case.
    #[serde(flatten)]
    pub of: Of,
    /// Which IOMMU.
    pub iommu: String,
    /// The ratio.
    pub ratio: Spread,
}

/// The window to the relay.
#[derive(Debug, Deserialize)]
pub struct PathRatio {
    /// Of which case.
    #[serde(flatten)]
    pub of: Of,
    /// Rate to rate.
    pub speed: Spread,
    /// CPU time a frame.
    pub cpu: Option<Spread>,
}

/// The window to a peer.
#[derive(Debug, Deserialize)]
pub struct PeerRatio {
    /// Of which case.
    #[serde(flatten)]
    pub of: Of,
    /// Which IOMMU.
    pub iommu: String,
    /// Which peer.
    pub name: String,
    /// Rate to rate.
    pub speed: Spread,
}

/// A figure of a peer.
#[derive(Debug, Deserialize)]
pub struct Peer {
    /// Which.
    pub name: String,
    /// Which way the frames went.
    pub direction: String,
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Frames a burst.
    pub batch: u32,
    /// `near` or `far`; absent where there was no sample.
    pub distance: Option<String>,
    /// Frames received.
    pub mpps: Option<Spread>,
    /// How its processes were called.
    pub command: Vec<String>,
}

/// The time of a request.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The layout.
    pub ring: String,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Requests at once.
    pub batch: u32,
    /// `same-core` or `cross-core`.
    #[serde(rename = "where")]
    pub place: String,
    /// Nanoseconds a request; absent where there was no sample.
    pub ns: Option<Spread>,
    /// `near` or `far`, between two cores.
    pub distance: Option<String>,
}

/// A figure with its spread.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Whether it can be drawn as a length.
    pub fn is_positive(&self) -> bool {
        [self.median, self.min, self.max]
            .iter()
            .all(|it| it.is_finite() && *it > 0.0)
    }
}

impl Report {
    /// Reads it; an error says what is amiss.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let mut report: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if report.schema_version != 1 {
            return Err(format!(
                "schema_version is {}, and this program knows 1",
                report.schema_version
            ));
        }
        let whole: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        report.environment_json = whole.get("environment").cloned().unwrap_or_default();
        Ok(report)
    }

    /// What belongs under every chart: where, and of what.
    pub fn caption(&self) -> Vec<String> {
        let it = &self.environment;
        let unknown = || "unknown".to_owned();
        let commit = it.commit.as_deref().unwrap_or("unknown");
        vec![
            format!(
                "{}, cores {} and {}, Linux {}, huge pages {}",
                it.cpu_model.clone().unwrap_or_else(unknown),
                it.cores[0],
                it.cores[1],
                it.kernel.clone().unwrap_or_else(unknown),
                it.memory.hugepages,
            ),
            format!(
                "vhost-pci {} ({commit}), rings of {}, {} mode; median, least and most of samples of {} ms",
                it.version, it.queue_size, it.mode, it.sample_ms
            ),
        ]
    }
}
