//! The flags of `bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::iommu::{BackArgs, Iommu};
use super::machine::BothArgs;
use super::rings::{Layout, Ring, RingArgs, RingSetup, Switch, Tx, queue_size};
use super::{Direction, Mode, Path};
use crate::exit::{Failure, usage};

/// A whole experiment behind one flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sweep {
    /// Every ring layout, with and without VIRTIO_F_IN_ORDER, at 64 bytes and batches of 1 to 64, either way; and the time of a request
    /// on one core and between two
    Rings,
    /// What it takes to show a window and to take it away, against the number of windows that are there, and what traffic loses
    /// meanwhile
    Windows,
}

/// Another way to exchange frames, measured beside the VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerName {
    /// DPDK: a vhost port (back-end) and a virtio-user port, packed rings, VIRTIO_F_IN_ORDER, vectorised
    DpdkVhost,
    /// DPDK: two memif ports; every frame is copied
    Memif,
    /// The same, without a copy at the end of the front-end
    MemifZc,
}

impl PeerName {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::DpdkVhost => "dpdk-vhost",
            Self::Memif => "memif",
            Self::MemifZc => "memif-zc",
        }
    }
}

/// What a pair of VMs is booted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Which rings carry the frames.
    pub ring: Ring,
    /// What stands between the front-end's memory and the window.
    pub iommu: Iommu,
    /// How frames get from VM to VM.
    pub path: Path,
}

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// 64 and 1518 bytes, batch 32, 5 samples: the whole picture within 20 s
    #[arg(long)]
    pub quick: bool,
    /// An experiment; other flags change it
    #[arg(long, value_enum, value_name = "NAME", conflicts_with = "quick")]
    pub sweep: Option<Sweep>,
    /// Bytes of a frame, without FCS [default: 64,128,256,512,1024,1280,1518; quick: 64,1518; sweep: 64]
    #[arg(long, value_name = "BYTES,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(60..=1518))]
    pub sizes: Option<Vec<u16>>,
    /// Frames a burst, each with every size [default: 32 with every size, and 1,4,8,16,64 with size 64; quick: 32; sweep:
    /// 1,2,4,8,16,32,64]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batches: Option<Vec<u16>>,
    /// Which way frames go [default: be-to-fe,fe-to-be,both,round-trip; sweep: be-to-fe,fe-to-be]
    #[arg(long, value_enum, value_name = "DIRECTION,…", value_delimiter = ',')]
    pub directions: Option<Vec<Direction>>,
    /// Samples of each figure [default: 10; quick and sweep: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: Option<u16>,
    /// Length of a sample, in milliseconds [default: 100; sweep: 50, windows: 200]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub ms: Option<u64>,
    /// How the guests wait for frames
    #[arg(long, value_enum, default_value = "poll")]
    pub mode: Mode,
    /// Layouts of the rings; a pair of VMs is booted for each, and they are sampled in turn [default: split; sweep: split,packed]
    #[arg(long, value_enum, value_name = "LAYOUT,…", value_delimiter = ',')]
    pub ring: Option<Vec<Layout>>,
    /// VIRTIO_F_IN_ORDER, each with every layout [default: off; sweep: off,on]
    #[arg(
        long,
        value_enum,
        value_name = "on|off,…",
        value_delimiter = ',',
        hide_possible_values = true
    )]
    pub in_order: Option<Vec<Switch>>,
    #[command(flatten)]
    pub rings: RingArgs,
    /// What stands between the front-end's memory and the window; a pair of VMs is booted for each, and they are sampled in turn
    /// [default: off]
    #[arg(long, value_enum, value_name = "HOW,…", value_delimiter = ',')]
    pub iommu: Option<Vec<Iommu>>,
    /// How frames get from VM to VM, sampled in turn; the relay has no IOMMU. CPU time a frame is of all processes together [default: window]
    #[arg(
        long,
        value_enum,
        value_name = "PATH,…",
        value_delimiter = ',',
        conflicts_with = "sweep"
    )]
    pub path: Option<Vec<Path>>,
    /// Other ways to exchange frames on the same two cores, one way, sampled in turn with the VMs; they have to be installed [default:
    /// none]
    #[arg(
        long,
        value_enum,
        value_name = "PEER,…",
        value_delimiter = ',',
        conflicts_with = "sweep"
    )]
    pub peers: Option<Vec<PeerName>>,
    /// Entries of the peers' rings: a power of two up to 16384
    #[arg(long, value_name = "N", default_value = "256", value_parser = peer_ring)]
    pub peer_ring: u16,
    #[command(flatten)]
    pub back: BackArgs,
    #[command(flatten)]
    pub both: BothArgs,
    /// Write everything that was measured to this file (schema_version 1)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

fn peer_ring(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(ring @ 32..=16384_u16) if ring.is_power_of_two() => Ok(ring),
        _ => Err("it is a power of two from 32 to 16384".to_owned()),
    }
}

impl BenchArgs {
    /// The peers. None of them does what is not one way.
    pub fn peer_list(&self) -> Result<&[PeerName], Failure> {
        let peers = self.peers.as_deref().unwrap_or_default();
        let one_way =
            |direction: &Direction| matches!(direction, Direction::BeToFe | Direction::FeToBe);
        match &self.directions {
            Some(directions) if !peers.is_empty() && !directions.iter().any(one_way) => Err(usage(
                "--peers: they are measured with --directions be-to-fe and fe-to-be only",
            )),
            _ => Ok(peers),
        }
    }

    /// The ring configurations, none twice.
    pub fn ring_list(&self) -> Vec<Ring> {
        let (layouts, orders): (&[Layout], &[Switch]) = match self.sweep {
            Some(Sweep::Rings) => (&[Layout::Split, Layout::Packed], &[Switch::Off, Switch::On]),
            _ => (&[Layout::Split], &[Switch::Off]),
        };
        let layouts = self.ring.as_deref().unwrap_or(layouts);
        let orders = self.in_order.as_deref().unwrap_or(orders);
        let mut rings = Vec::new();
        for &layout in layouts {
            for in_order in orders.iter().map(|order| order.is_on()) {
                let ring = Ring { layout, in_order };
                if !rings.contains(&ring) {
                    rings.push(ring);
                }
            }
        }
        rings
    }

    /// The configurations that a pair of VMs is booted for, none twice.
    pub fn kinds(&self) -> Result<Vec<Kind>, Failure> {
        let iommus = self.iommu.as_deref().unwrap_or(&[Iommu::Off]);
        let paths = self.path.as_deref().unwrap_or(&[Path::Window]);
        let relay = paths.contains(&Path::Relay);
        if relay && self.back.iommu_back.is_on() {
            return Err(usage(
                "--path relay: there is no back-end VM for --iommu-back",
            ));
        }
        let mut kinds = Vec::new();
        for ring in self.ring_list() {
            let windows = paths.contains(&Path::Window).then_some(iommus);
            let window = windows.unwrap_or_default().iter();
            let window = window.map(|&iommu| (iommu, Path::Window));
            for (iommu, path) in window.chain(relay.then_some((Iommu::Off, Path::Relay))) {
                let kind = Kind { ring, iommu, path };
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
        }
        Ok(kinds)
    }

    /// What is the same for all of them. Nothing is left to the devices: a figure belongs to features that are known.
    pub fn ring_setup(&self) -> Result<RingSetup, Failure> {
        let layouts: Vec<Layout> = self.ring_list().iter().map(|ring| ring.layout).collect();
        let size = queue_size(&self.both.queue_size, &layouts)?;
        let mut setup = RingSetup::new(&self.rings, size)?;
        let indirect = *setup.indirect.get_or_insert(setup.tx == Some(Tx::Indirect));
        setup.event_idx.get_or_insert(self.mode == Mode::Irq);
        // Buffers that are too short for a frame are of no use without it.
        setup.mrg_rxbuf.get_or_insert(setup.rx_buffer.is_some());
        setup
            .tx
            .get_or_insert(if indirect { Tx::Indirect } else { Tx::Direct });
        Ok(setup)
    }

    /// Length of a sample, in milliseconds.
    pub fn sample_ms(&self) -> u64 {
        let usual = match self.sweep {
            Some(Sweep::Rings) => 50,
            // Windows that come and go a thousand times a second have to be many in a sample.
            Some(Sweep::Windows) => 200,
            None => 100,
        };
        self.ms.unwrap_or(usual)
    }
}
