//! The parts of a report that are drawn.

use serde::Deserialize;

/// A report.
#[derive(Debug, Deserialize)]
pub struct Report {
    schema_version: u32,
    environment: Environment,
    /// The figures of the VMs.
    pub results: Vec<Entry>,
    /// The request times.
    #[serde(default)]
    pub requests: Vec<Request>,
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
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Frames a burst.
    pub batch: u32,
    /// `near` or `far`; absent where there was no sample.
    pub distance: Option<String>,
    /// From VM to VM; absent for round trips.
    pub mpps: Option<Spread>,
    /// The upper bound.
    pub bound_mpps: Option<Spread>,
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

impl Report {
    /// Reads it; an error says what is amiss.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let report: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if report.schema_version != 1 {
            return Err(format!(
                "schema_version is {}, and this program knows 1",
                report.schema_version
            ));
        }
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
