//! vhost-pci-netd: serves a vhost-pci device (docs/netd.md).

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Parser, ValueEnum};
use guest_driver::vhost_pci::{DEVICE_TYPE, Offer, VhostPci};
use guest_driver::virtio_pci::{self, DEVICE_BASE, VENDOR};
use vhost_pci_netd::capture::{Capture, CaptureFile};
use vhost_pci_netd::dma::{self, Arena};
use vhost_pci_netd::machine::Machine;
use vhost_pci_netd::pci::{self, Address, Function};
use vhost_pci_netd::serve::{self, Mode, Options, serve};
use vhost_pci_netd::stats::Stats;
use vhost_pci_netd::tap::{self, Tap};
use vhost_pci_netd::wait::{self, Waiter};
use vhost_pci_netd::work::{Bridge, Drop, MacSwap, Sink, Source, Work};
use vhost_pci_netd::{sysfs, vfio};

/// Serves a vhost-pci device: the peer's network device ends in a tap interface here, or in a workload.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_STATUS, group = ArgGroup::new("what").required(true))]
struct Args {
    /// PCI address of the device, as lspci -d 1af4:107d shows it
    #[arg(long, value_name = "ADDRESS")]
    device: Address,
    /// How to reach it; if not given, vfio where vfio-pci has the device, sysfs where no driver has it
    #[arg(long, value_enum)]
    via: Option<Via>,
    /// Bridge it to this tap interface, which is made if it is not there
    #[arg(long, value_name = "NAME", group = "what")]
    tap: Option<String>,
    /// Serve so many queue pairs of the peer, each with a queue of the tap
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "io", value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: u16,
    /// Or measure
    #[arg(long, value_enum, group = "what")]
    io: Option<Io>,
    /// How to wait for frames
    #[arg(long, value_enum, default_value = "adaptive")]
    mode: Mode,
    /// Bytes of a frame of --io source and sink, 60 to 1518
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u16).range(60..=1518))]
    size: u16,
    /// Stop after so many frames
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// Print a line of counters (JSON) to stdout so often, and not only at the end
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    stats: Option<u32>,
    /// Write the frames that pass, either way, to this file (pcapng), which is made anew: their first snaplen bytes (all if not given), and no more than count
    #[arg(long, value_name = "FILE[,snaplen=N][,count=N]")]
    capture: Option<CaptureFile>,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  served until the end: a signal, --seconds, --count
  1  the device or the tap could not be had, or could not go on
  2  --io sink: frames were lost, doubled, overtaken or corrupted
  3  wrong arguments";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Via {
    /// Through VFIO: behind an IOMMU, with interrupts
    Vfio,
    /// Through the device's files in sysfs: without an IOMMU, and without interrupts; needs root and a page of 2 MiB
    Sysfs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Io {
    /// Send every frame back, its addresses exchanged
    MacSwap,
    /// Take every frame and look at none
    Drop,
    /// Send numbered frames
    Source,
    /// Take such frames and check every byte
    Sink,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Function(#[from] pci::Error),
    #[error(transparent)]
    Memory(#[from] dma::Error),
    #[error(transparent)]
    Sysfs(#[from] sysfs::Error),
    #[error(transparent)]
    Vfio(#[from] vfio::Error),
    #[error(transparent)]
    Tap(#[from] tap::Error),
    #[error(transparent)]
    Serve(#[from] serve::Error),
    #[error("{0} is [{1:04x}:{2:04x}], no vhost-pci device [1af4:107d]")]
    OtherDevice(Address, u16, u16),
    #[error("vhost-pci at {0}: {1}")]
    Start(Address, virtio_pci::Error),
    #[error("vhost-pci at {0}: BAR {1} cannot be mapped: {2}")]
    Map(Address, usize, io::Error),
    #[error("vhost-pci at {0} cannot be shut down: {1}")]
    ShutDown(Address, virtio_pci::Error),
    #[error("cannot wait for signals: {0}")]
    Signals(io::Error),
    #[error("--capture: {0}")]
    Capture(io::Error),
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let asked = !error.use_stderr();
            // Help that nobody reads is no failure.
            let _ = error.print();
            return ExitCode::from(if asked { 0 } else { 3 });
        }
    };
    match run(&args) {
        Ok(stats) => {
            let wrong = stats
                .checked
                .is_some_and(|seen| seen.out_of_sequence + seen.corrupted > 0);
            ExitCode::from(if wrong { 2 } else { 0 })
        }
        Err(error) => {
            note(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn note(text: &str) {
    // Where nobody reads it, it is lost, and serving goes on.
    let _ = writeln!(io::stderr(), "vhost-pci-netd: {text}");
}

/// Passes on ten lines a second: a peer decides how often there is something to say of it.
fn limited() -> impl FnMut(&str) {
    const MOST: u32 = 10;
    let (mut second, mut said) = (Instant::now(), 0u32);
    move |text| {
        if second.elapsed() >= Duration::from_secs(1) {
            (second, said) = (Instant::now(), 0);
        }
        said = said.saturating_add(1);
        match said {
            ..=MOST => note(text),
            _ if said == MOST + 1 => note("more of this is left out"),
            _ => {}
        }
    }
}

fn run(args: &Args) -> Result<Stats, Error> {
    let count = args.count;
    let size = usize::from(args.size);
    match (&args.tap, args.io) {
        (Some(name), _) => {
            // First, so that a wrong name is found before the device is touched.
            let bridges = (0..args.queues)
                .map(|_| Ok(Bridge::new(Tap::open(name, args.queues > 1)?, count)))
                .collect::<Result<Vec<_>, Error>>()?;
            start(args, bridges)
        }
        (None, Some(Io::MacSwap)) => start(args, vec![MacSwap::new(count)]),
        (None, Some(Io::Source)) => start(args, vec![Source::new(size, count)]),
        (None, Some(Io::Sink)) => start(args, vec![Sink::new(size, count)]),
        (None, Some(Io::Drop) | None) => start(args, vec![Drop::new(count)]),
    }
}

fn open(args: &Args) -> Result<Machine, Error> {
    let function = Function::find(sysfs::root(), args.device)?;
    // Before anything else: nobody is to be told to unbind the wrong device.
    let (vendor, device) = function.ids()?;
    if (vendor, device) != (VENDOR, DEVICE_BASE + DEVICE_TYPE) {
        return Err(Error::OtherDevice(args.device, vendor, device));
    }
    let via = args.via.unwrap_or(match function.driver().as_deref() {
        Some("vfio-pci") => Via::Vfio,
        _ => Via::Sysfs,
    });
    Ok(match via {
        Via::Vfio => vfio::open(&function)?,
        Via::Sysfs => {
            sysfs::check(&function)?;
            sysfs::open(&function, Arena::physical()?)?
        }
    })
}

/// Serves as many queue pairs as there is work for.
fn start(args: &Args, mut works: Vec<impl Work>) -> Result<Stats, Error> {
    let interface = format!("vhost-pci {}", args.device);
    let capture = args.capture.as_ref();
    let capture = capture.map(|file| Capture::create(file, &interface));
    let capture = capture.transpose().map_err(Error::Capture)?;
    let mut machine = open(args)?;
    let function = machine.function();
    guest_driver::bulk::detect();
    // From here on a signal must not end the process before the device is shut down.
    let stop = wait::stop_signals().map_err(Error::Signals)?;
    let offer = Offer {
        pairs: works.len(),
        offloads: works.first().map_or(0, Work::offloads),
        ..Offer::default()
    };
    let device = VhostPci::with_offer(&machine, function, machine.memory(), offer);
    let mut device = device.map_err(|error| match machine.take_failure() {
        Some((bar, why)) => Error::Map(args.device, bar, why),
        None => Error::Start(args.device, error),
    })?;
    let waiter = Waiter::new(stop, machine.take_interrupts());
    let options = Options {
        mode: args.mode,
        time: args.seconds.map(|n| Duration::from_secs(n.into())),
        report: args.stats.map(|n| Duration::from_secs(n.into())),
    };
    let print = |report: &_| {
        if let Ok(line) = serde_json::to_string(report) {
            let _ = writeln!(io::stdout(), "{line}");
        }
    };
    note(&format!("serving {}", args.device));
    let served = serve(
        &mut device,
        &mut works,
        &waiter,
        &options,
        capture,
        print,
        limited(),
    );
    // In any case: the device must not write to memory that is about to be somebody else's.
    let down = device.shut_down();
    let stats = served?;
    down.map_err(|error| Error::ShutDown(args.device, error))?;
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(arguments.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_device_and_exactly_one_thing_to_do_are_needed() {
        for good in [
            "netd --device 0000:00:01.0 --tap tap0",
            "netd --device 00:01.0 --io mac-swap --via vfio --mode irq --count 5 --seconds 1 --stats 1",
            "netd --device 00:01.0 --io source --size 1518",
            "netd --device 00:01.0 --tap tap0 --queues 16",
            "netd --device 00:01.0 --io drop --capture f",
            "netd --device 00:01.0 --tap tap0 --capture f,snaplen=96,count=1000",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "netd --tap tap0",
            "netd --device 00:01.0",
            "netd --device 00:01.0 --tap tap0 --io drop",
            "netd --device 1 --io drop",
            "netd --device 00:01.0 --io drop --count 0",
            "netd --device 00:01.0 --io drop --queues 2",
            "netd --device 00:01.0 --tap tap0 --queues 17",
            "netd --device 00:01.0 --io source --size 59",
            "netd --device 00:01.0 --io source --size 1519",
            "netd --device 00:01.0 --io drop --capture ,count=1",
            "netd --device 00:01.0 --io drop --capture f,count=0",
            "netd --device 00:01.0 --io drop --capture f,snaplen=262145",
            "netd --device 00:01.0 --io drop --capture f,snaplen",
            "netd --device 00:01.0 --io drop --capture f,count=1,count=2",
            "netd --device 00:01.0 --io drop --capture f,frames=1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_names_it() {
        let args = parse("netd --device ffff:fe:1f.7 --io drop").unwrap();
        let error = run(&args).unwrap_err().to_string();
        assert!(error.contains("no PCI device ffff:fe:1f.7"), "{error}");
    }
}
