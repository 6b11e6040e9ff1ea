//! The flags of `isolation`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::vms::VmsArgs;

/// What the back-end's window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// No front-end is connected: there is nothing to see
    None,
    /// The front-end has no virtio-iommu: all of its memory. The study's control: secrets are read, and the exit status is 2
    Whole,
    /// The front-end has one: what its guest has mapped
    Windows,
    /// The same with --iommu write-only=readable: what is mapped for writing only can be read, and reading that is an attack which succeeds
    Readable,
}

impl Mode {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Whole => "whole",
            Self::Windows => "windows",
            Self::Readable => "readable",
        }
    }

    /// Whether the front-end has a virtio-iommu.
    pub fn has_iommu(self) -> bool {
        matches!(self, Self::Windows | Self::Readable)
    }
}

/// `isolation`.
#[derive(Debug, Args)]
pub struct IsolationArgs {
    /// What the back-end's window shows
    #[arg(long, value_enum, value_name = "MODE", default_value = "windows")]
    pub mode: Mode,
    /// Rounds of the race for a page that is unmapped and used again
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rounds: u64,
    /// Only these attacks (the names that the report has); a part of a name stands for all that begin with it
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub only: Vec<String>,
    /// Host cores: the back-end's virtual CPU runs on A, the front-end's on B
    #[arg(long, value_name = "A:B")]
    pub cores: Option<String>,
    #[command(flatten)]
    pub vms: VmsArgs,
    /// Write the report to this file (schema_version 1), or to stdout: then what is for people goes to stderr
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = crate::json::STDOUT)]
    pub json: Option<PathBuf>,
}
