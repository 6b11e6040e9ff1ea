//! The command line.

pub mod bench;
pub mod capture;
mod direction;
pub mod frames;
pub mod iommu;
pub mod isolation;
pub mod keys;
pub mod machine;
pub mod metrics;
pub mod plot;
pub mod relay;
pub mod rings;
pub mod vms;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use bare_metal::frame::{MAX_FRAME, MIN_FRAME};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::exit;

pub use direction::Direction;

/// Bytes of a frame.
const FRAMES: RangeInclusive<i64> = MIN_FRAME as i64..=MAX_FRAME as i64;

/// Two virtual machines, one ring.
///
/// Boots VMs under KVM. A vhost-pci device shows one VM's memory in another's BAR, so that the two exchange
/// packets with no host switch between them.
#[derive(Debug, Parser)]
#[command(name = "vhost-pci", version, after_help = exit::HELP, max_term_width = 110)]
pub struct Cli {
    /// Log more to stderr: -v for what happens, -vv for details
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot one VM
    #[command(after_help = exit::HELP)]
    Run(Box<machine::RunArgs>),
    /// Boot two connected VMs that exchange frames, and show their consoles
    #[command(after_help = exit::HELP)]
    Pair(Box<PairArgs>),
    /// Measure throughput and latency from VM to VM, beside the upper bound of the same ring between two host threads
    #[command(after_help = exit::HELP)]
    Bench(Box<bench::BenchArgs>),
    /// Attack one VM from the other in every known way, and report what got through (nothing should)
    #[command(after_help = exit::HELP)]
    Isolation(isolation::IsolationArgs),
    /// Join two vhost-user front-ends by a process of the host: the switch that the window replaces
    #[command(after_help = exit::HELP)]
    Relay(relay::RelayArgs),
    /// Draw charts (SVG) from a report of `bench --json`
    #[command(after_help = exit::HELP)]
    Plot(plot::PlotArgs),
    /// Show what running VMs do, from the sockets of their --metrics; once, where stdout is no terminal
    #[command(after_help = exit::HELP)]
    Top(TopArgs),
    /// Say what this host is missing or what slows it down, and how to mend it
    #[command(after_help = exit::HELP)]
    Doctor(DoctorArgs),
}

/// How frames get from one VM to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// The back-end's guest works on the front-end's rings itself, through its window
    #[default]
    Window,
    /// Both VMs have a network device, and a relay in a process of its own copies from ring to ring
    Relay,
}

impl Path {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Relay => "relay",
        }
    }
}

/// How a guest waits for frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It polls the rings
    Poll,
    /// It sleeps until an interrupt comes
    Irq,
    /// It polls while there is traffic, and sleeps when there has been none for a while
    Adaptive,
}

impl Mode {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Irq => "irq",
            Self::Adaptive => "adaptive",
        }
    }
}

/// `pair`.
#[derive(Debug, Args)]
pub struct PairArgs {
    /// Which way the frames go
    #[arg(long, value_enum, default_value = "both")]
    pub direction: Direction,
    /// Send this many frames in each direction, however long it takes
    #[arg(long, value_name = "N", conflicts_with = "seconds", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Send for so long
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub seconds: u64,
    /// Bytes of a frame, without FCS; above 1518, segmentation is left to the receiver
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = clap::value_parser!(u32).range(FRAMES))]
    pub size: u32,
    /// Frames a burst
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch: u16,
    /// How the guests wait for frames
    #[arg(long, value_enum, default_value = "poll")]
    pub mode: Mode,
    /// Layout of the rings [default: split]
    #[arg(long, value_enum, value_name = "LAYOUT")]
    pub ring: Option<rings::Layout>,
    /// VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available [default: on]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub in_order: Option<rings::Switch>,
    /// Descriptors of each ring, up to 32768; split rings need a power of two
    #[arg(long, value_name = "N", default_value = "256")]
    pub queue_size: String,
    #[command(flatten)]
    pub rings: rings::RingArgs,
    /// Put the front-end's device behind a virtio-iommu: the window shows what its guest has mapped
    #[arg(long, value_enum, value_name = "HOW", default_value = "off")]
    pub iommu: iommu::Iommu,
    #[command(flatten)]
    pub back: iommu::BackArgs,
    #[command(flatten)]
    pub both: machine::BothArgs,
    #[command(flatten)]
    pub vms: vms::VmsArgs,
    #[arg(long, value_name = "KEY=VALUE,…", conflicts_with = "linux",
        help = capture::BOTH.help("Files for the frames that each guest sends and receives first, when the workload has ended (pcapng); at least one of them"))]
    pub capture: Option<String>,
    /// Boot Linux in both VMs (images/linux/build makes the images), with the front-end's console on standard input and output
    #[arg(long, conflicts_with_all = ["direction", "count", "seconds", "size", "batch", "mode"])]
    pub linux: bool,
    /// The kernel of --linux [default: linux/vmlinuz beside the directory of this program]
    #[arg(long, value_name = "FILE", requires = "linux")]
    pub kernel: Option<PathBuf>,
    /// The initial file system of --linux [default: linux/initrd beside the directory of this program]
    #[arg(long, value_name = "FILE", requires = "linux")]
    pub initrd: Option<PathBuf>,
}

/// `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The PATH of each VM's --metrics unix:PATH
    #[arg(required = true, value_name = "SOCKET")]
    pub sockets: Vec<PathBuf>,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON on stdout instead of lines
    #[arg(long)]
    pub json: bool,
}

/// One line for what clap has to say about a wrong command line.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let parts: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let text = parts.join(" ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn clap_says_what_is_wrong_in_one_line() {
        for args in [
            &["vhost-pci", "run", "--no-such-flag"][..],
            &["vhost-pci", "bench", "--directions", "sideways"],
            &["vhost-pci", "bench", "--batches", "0"],
            &["vhost-pci", "pair", "--size", "59"],
            &["vhost-pci", "fly"],
        ] {
            let line = one_line(&Cli::try_parse_from(args).unwrap_err());
            let last = args.last().unwrap();
            assert!(line.contains(last) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn names_are_what_the_command_line_takes() {
        for direction in Direction::value_variants() {
            let name = direction.to_possible_value().unwrap();
            assert_eq!(name.get_name(), direction.name());
            let json = serde_json::to_value(direction).unwrap();
            assert_eq!(json, direction.name());
        }
    }
}
