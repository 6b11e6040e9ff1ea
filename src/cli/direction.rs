//! Which way frames go.

use clap::ValueEnum;
use serde::Serialize;

/// Which way frames go between the two VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The back-end VM sends into the front-end's rx buffers
    BeToFe,
    /// The back-end VM receives from the front-end's tx buffers
    FeToBe,
    /// Both at once
    Both,
    /// The back-end VM sends one frame at a time, the front-end sends it back
    RoundTrip,
    /// The back-end VM sends bursts, the front-end sends each frame back
    Echo,
    /// Nobody sends, both VMs wait
    Idle,
}

impl Direction {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeToFe => "be-to-fe",
            Self::FeToBe => "fe-to-be",
            Self::Both => "both",
            Self::RoundTrip => "round-trip",
            Self::Echo => "echo",
            Self::Idle => "idle",
        }
    }

    /// Whether frames go one way, or both independently of each other.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::BeToFe | Self::FeToBe | Self::Both)
    }

    /// The guests' workloads: the back-end's, the front-end's.
    pub fn work(self) -> [&'static str; 2] {
        match self {
            Self::BeToFe => ["source", "sink"],
            Self::FeToBe => ["sink", "source"],
            Self::Both => ["both", "both"],
            Self::RoundTrip => ["round-trip", "echo"],
            Self::Echo => ["both", "echo"],
            Self::Idle => ["source", "sink"],
        }
    }
}
