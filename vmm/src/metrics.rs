//! `--metrics`: what is known of a running VM, as JSON lines or for Prometheus, from a thread of its own that does nothing else (docs/metrics.md).

mod guest;
mod server;
mod snapshot;

use std::path::PathBuf;
use std::time::Duration;

pub(crate) use guest::{Reports, number};
pub(crate) use server::Server;
pub(crate) use snapshot::{Group, Sources};

/// Where metrics go, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Where.
    pub target: MetricsTarget,
    /// How long from one snapshot to the next.
    pub interval: Duration,
}

/// Who gets metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsTarget {
    /// A file, which is made anew: a JSON line each interval.
    File(PathBuf),
    /// Whoever connects to a Unix socket at this path: JSON lines, the first at once.
    Lines(PathBuf),
    /// Whoever asks at a Unix socket at this path by HTTP: Prometheus' text, once a connection.
    Prometheus(PathBuf),
}

impl MetricsTarget {
    /// The socket, where it is one.
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        match self {
            Self::File(_) => None,
            Self::Lines(path) | Self::Prometheus(path) => Some(path),
        }
    }
}
