//! The flags of `bench`.

use std::ffi::OsString;
use std::path::PathBuf;

use bare_metal::frame::MAX_SEGMENT;
use clap::{Args, Parser, ValueEnum};
use serde::Serialize;

use super::frames::{How, Payload, Size, Source};
use super::iommu::{BackArgs, Iommu};
use super::machine::BothArgs;
use super::rings::{Layout, Ring, RingArgs, RingSetup, Switch, Tx, USUAL_SIZE, queue_size};
use super::vms::VmsArgs;
use super::{Cli, Command, Direction, Mode, Path, one_line};
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
    /// DPDK: two virtio-user ports, the same, and a process between them that forwards from vhost port to vhost port; three that poll
    DpdkSwitch,
    /// DPDK: two memif ports; every frame is copied
    Memif,
    /// The same, without a copy at the end of the front-end
    MemifZc,
    /// Two VMs and `vhost-pci relay`, as with --path relay
    Relay,
    /// Two network namespaces, a pair of veth devices, and UDP sockets (needs root and iproute2)
    Veth,
}

impl PeerName {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::DpdkVhost => "dpdk-vhost",
            Self::DpdkSwitch => "dpdk-switch",
            Self::Memif => "memif",
            Self::MemifZc => "memif-zc",
            Self::Relay => "relay",
            Self::Veth => "veth",
        }
    }

    /// What it does with frames; the relay's guests do what those beside it do. testpmd and the sockets neither write nor look at what lies behind the
    /// headers. All but one of them copy the whole frame.
    pub fn how(self) -> How {
        How {
            payload: Payload::Headers,
            source: match self {
                Self::MemifZc => Source::Build,
                _ => Source::Copy,
            },
            mode: match self {
                Self::Veth => Mode::Irq,
                _ => Mode::Poll,
            },
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
    /// Bytes of a frame, without FCS, 60 to 65549 (above 1518, segmentation is left to the receiver), or imix (64, 570 and 1518 bytes, 7:4:1)
    /// [default: 64,128,256,512,1024,1280,1518; quick: 64,1518; sweep: 64]
    #[arg(long, value_name = "BYTES,…", value_delimiter = ',', value_parser = Size::parse)]
    pub sizes: Option<Vec<Size>>,
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
    /// Round trips besides, of frames that are sent when they are due, at so many percent of the rate at which --directions echo goes; 0:
    /// one every 10 µs (in modes that sleep, 2 ms). Timed from when the frame was due [default: none]
    #[arg(long, value_name = "PERCENT,…", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(0..=100), conflicts_with = "sweep")]
    pub latency_load: Option<Vec<u8>>,
    /// How the guests wait for frames, sampled in turn
    #[arg(
        long,
        value_enum,
        value_name = "MODE,…",
        value_delimiter = ',',
        default_value = "poll"
    )]
    pub mode: Vec<Mode>,
    /// Which bytes of a frame are written and compared, sampled in turn
    #[arg(
        long,
        value_enum,
        value_name = "BYTES,…",
        value_delimiter = ',',
        default_value = "every-byte"
    )]
    pub payload: Vec<Payload>,
    /// Where the frames that are sent come from, sampled in turn
    #[arg(
        long,
        value_enum,
        value_name = "FROM,…",
        value_delimiter = ',',
        default_value = "build"
    )]
    pub source: Vec<Source>,
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
    /// Descriptors of each ring, up to 32768, each with every layout; split rings need a power of two
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "256")]
    pub queue_size: Vec<String>,
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
    /// Other ways to exchange frames on the same two cores, one way or there and back, sampled in turn with the VMs; they have to be installed [default:
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
    /// Other flags for a second pair of VMs, which is sampled in turn with the first; of --ring, --in-order, --event-idx, --mrg-rxbuf,
    /// --indirect, --offload, --tx, --rx-buffer, --queue-size, --memory and --iommu
    #[arg(long, value_name = "FLAGS", conflicts_with_all = ["sweep", "path"], allow_hyphen_values = true)]
    pub vs: Option<String>,
    #[command(flatten)]
    pub back: BackArgs,
    #[command(flatten)]
    pub both: BothArgs,
    #[command(flatten)]
    pub vms: VmsArgs,
    /// Write everything that was measured to this file (schema_version 1), or to stdout: then what is for people goes to stderr
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = crate::json::STDOUT)]
    pub json: Option<PathBuf>,
}

/// What `--vs` may change.
const VS: [&str; 11] = [
    "--ring",
    "--in-order",
    "--event-idx",
    "--mrg-rxbuf",
    "--indirect",
    "--offload",
    "--tx",
    "--rx-buffer",
    "--queue-size",
    "--memory",
    "--iommu",
];

fn peer_ring(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(ring @ 32..=16384_u16) if ring.is_power_of_two() => Ok(ring),
        _ => Err("it is a power of two from 32 to 16384".to_owned()),
    }
}

impl BenchArgs {
    /// What `--vs` makes of the command line `words`: the same with other flags.
    pub fn other(
        &self,
        words: impl IntoIterator<Item = OsString>,
    ) -> Result<Option<Self>, Failure> {
        let Some(flags) = &self.vs else {
            return Ok(None);
        };
        let wrong = |why: String| usage(format!("--vs '{flags}': {why}"));
        let changed: Vec<&str> = flags.split_whitespace().collect();
        // What is left out of `words`: each has one value, behind it or behind a '='.
        let mut replaced = vec!["--vs"];
        for flag in changed.iter().filter(|word| word.starts_with('-')) {
            let name = flag.split('=').next().unwrap_or(flag);
            if !VS.contains(&name) {
                return Err(wrong(format!(
                    "{name} cannot differ; {} can",
                    VS.join(", ")
                )));
            }
            replaced.push(name);
        }
        let mut all = Vec::new();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let text = word.to_string_lossy();
            let (name, value) = text
                .split_once('=')
                .map_or((&*text, None), |(name, value)| (name, Some(value)));
            if !replaced.contains(&name) {
                all.push(word);
            } else if value.is_none() {
                words.next();
            }
        }
        all.extend(changed.into_iter().map(OsString::from));
        let cli = Cli::try_parse_from(all);
        match cli.map(|cli| cli.command) {
            Ok(Command::Bench(args)) => Ok(Some(*args)),
            Ok(_) => Err(wrong("it is for bench".to_owned())),
            Err(error) => Err(wrong(one_line(&error))),
        }
    }

    /// The one configuration of each of two pairs that are compared.
    pub fn one_kind(&self) -> Result<Kind, Failure> {
        match (&self.kinds()?[..], &self.hows()[..]) {
            (&[kind], [_]) => Ok(kind),
            _ => Err(usage(
                "--vs compares one pair of VMs with one other: one of --ring, --in-order, --queue-size, --iommu, --mode, --payload and --source each",
            )),
        }
    }

    /// What the guests do with frames, none twice.
    pub fn hows(&self) -> Vec<How> {
        let mut hows = Vec::new();
        for &mode in &self.mode {
            for &payload in &self.payload {
                for &source in &self.source {
                    let how = How {
                        payload,
                        source,
                        mode,
                    };
                    if !hows.contains(&how) {
                        hows.push(how);
                    }
                }
            }
        }
        hows
    }

    /// Whether there are frames that have to be left to be segmented.
    fn has_long_frames(&self) -> bool {
        self.sizes.iter().flatten().any(|size| size.is_long())
    }

    /// The peers. None of them does what goes both ways at once or one at a time, or is longer than a segment.
    pub fn peer_list(&self) -> Result<&[PeerName], Failure> {
        let peers = self.peers.as_deref().unwrap_or_default();
        if !peers.is_empty() && self.has_long_frames() {
            return Err(usage(format!(
                "--peers: they are measured with --sizes up to {MAX_SEGMENT}"
            )));
        }
        if peers.contains(&PeerName::Relay) && self.back.iommu_back.is_on() {
            return Err(usage(
                "--peers relay: there is no back-end VM for --iommu-back",
            ));
        }
        let can = |direction: &Direction| {
            use Direction::{BeToFe, Echo, FeToBe};
            matches!(direction, BeToFe | FeToBe | Echo)
        };
        match &self.directions {
            Some(directions) if !peers.is_empty() && !directions.iter().any(can) => Err(usage(
                "--peers: they are measured with --directions be-to-fe, fe-to-be and echo only",
            )),
            _ => Ok(peers),
        }
    }

    /// The ring configurations, none twice.
    pub fn ring_list(&self) -> Result<Vec<Ring>, Failure> {
        let (layouts, orders): (&[Layout], &[Switch]) = match self.sweep {
            Some(Sweep::Rings) => (&[Layout::Split, Layout::Packed], &[Switch::Off, Switch::On]),
            _ => (&[Layout::Split], &[Switch::Off]),
        };
        let layouts = self.ring.as_deref().unwrap_or(layouts);
        let orders = self.in_order.as_deref().unwrap_or(orders);
        let mut rings = Vec::new();
        for size in &self.queue_size {
            let size = queue_size(size, layouts)?;
            for &layout in layouts {
                for in_order in orders.iter().map(|order| order.is_on()) {
                    let ring = Ring {
                        layout,
                        in_order,
                        size,
                    };
                    if !rings.contains(&ring) {
                        rings.push(ring);
                    }
                }
            }
        }
        Ok(rings)
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
        if relay && (self.has_long_frames() || self.rings.offload == Some(Switch::On)) {
            return Err(usage(format!(
                "--path relay: it carries frames up to {MAX_SEGMENT} bytes that leave nothing to anybody"
            )));
        }
        let mut kinds = Vec::new();
        for ring in self.ring_list()? {
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
        let first = self.ring_list()?.first().map(|ring| ring.size);
        let mut setup = RingSetup::new(&self.rings, first.unwrap_or(USUAL_SIZE))?;
        let indirect = *setup.indirect.get_or_insert(setup.tx == Some(Tx::Indirect));
        let sleeps = self.mode.iter().any(|&mode| mode != Mode::Poll);
        setup.event_idx.get_or_insert(sleeps);
        let long = self.has_long_frames();
        if long {
            self.rings.need_long_frames()?;
            if self.source.contains(&Source::Copy) {
                return Err(usage(format!(
                    "--source copy: it is measured with --sizes up to {MAX_SEGMENT}"
                )));
            }
        }
        setup.offload.get_or_insert(long);
        // Buffers that are too short for a frame are of no use without it.
        setup
            .mrg_rxbuf
            .get_or_insert(long || setup.rx_buffer.is_some());
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
