//! The flags of `bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::machine::BothArgs;
use super::{Direction, Mode};

/// The layout of the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RingArg {
    /// Split virtqueues
    Split,
    /// Packed virtqueues (not available yet)
    Packed,
}

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// 64 and 1518 bytes, batch 32, 5 samples: the whole picture within 20 s
    #[arg(long)]
    pub quick: bool,
    /// Bytes of a frame, without FCS [default: 64,128,256,512,1024,1280,1518; quick: 64,1518]
    #[arg(long, value_name = "BYTES,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(60..=1518))]
    pub sizes: Option<Vec<u16>>,
    /// Frames a burst, each with every size [default: 32 with every size, and 1,4,8,16,64 with size 64; quick: 32]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batches: Option<Vec<u16>>,
    /// Which way frames go
    #[arg(
        long,
        value_enum,
        value_name = "DIRECTION,…",
        value_delimiter = ',',
        default_value = "be-to-fe,fe-to-be,both,round-trip"
    )]
    pub directions: Vec<Direction>,
    /// Samples of each figure [default: 10; quick: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: Option<u16>,
    /// Length of a sample, in milliseconds
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub ms: u64,
    /// How the guests wait for frames
    #[arg(long, value_enum, default_value = "poll")]
    pub mode: Mode,
    /// Layout of the rings
    #[arg(long, value_enum, default_value = "split")]
    pub ring: RingArg,
    #[command(flatten)]
    pub both: BothArgs,
    /// Write everything that was measured to this file (schema_version 1)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}
