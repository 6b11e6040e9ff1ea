//! What a VM is made of: the flags of `run`, and those that `pair` and `bench` pass on to both VMs.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use devices::host::Files;
use devices::vhost_pci::{MAX_QUEUES, VhostPciConfig};
use devices::vhost_user::SocketRole;
use devices::virtio::MAX_QUEUE_SIZE;
use devices::virtio_blk::BlkConfig;
use devices::virtio_iommu::IommuConfig;
use devices::virtio_net::tap::{Server, TapConfig, is_interface_name};
use devices::virtio_net::{MAX_QUEUE_PAIRS, NetConfig, RingFeatures};
use vmm::{Console, HugePages, Kernel, MemoryConfig, VmConfig};

use super::keys::{
    FRONT_END_LISTEN, FRONT_END_SOCKET, Key, KeyList, Missing, number, size, switch,
};
use super::vms::SeccompArg;
use super::{capture, metrics};
use crate::exit::{Failure, usage};

static MEMORY: KeyList = KeyList {
    flag: "--memory",
    keys: &[
        Key {
            name: "size",
            form: "SIZE",
            missing: Missing::Default("256M"),
            help: "bytes; K, M, G may follow; a multiple of the page size",
        },
        Key {
            name: "hugepages",
            form: "off|2M|1G",
            missing: Missing::Default("off"),
            help: "take it from the host's pool of huge pages of that size",
        },
        Key {
            name: "prefault",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "have all of it present before the guest starts",
        },
        Key {
            name: "dma",
            form: "SIZE",
            missing: Missing::Default("0"),
            help: "memory for devices beside it, the only memory that other processes get; 0: they get all of it",
        },
    ],
};

static CPUS: KeyList = KeyList {
    flag: "--cpus",
    keys: &[
        Key {
            name: "count",
            form: "N",
            missing: Missing::Default("1"),
            help: "virtual CPUs, 1 to 8 (the built-in guest uses one)",
        },
        Key {
            name: "affinity",
            form: "CORE:CORE…",
            missing: Missing::Unset("not pinned"),
            help: "host core of each virtual CPU",
        },
    ],
};

static NET: KeyList = KeyList {
    flag: "--net",
    keys: &[
        Key {
            name: "socket",
            form: "PATH",
            missing: Missing::Unset("there has to be tap="),
            help: "Unix socket to the vhost-user back-end",
        },
        Key {
            name: "listen",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "on: wait for the back-end here; off: connect to it, as soon as it is there",
        },
        Key {
            name: "mac",
            form: "ADDRESS",
            missing: Missing::Unset("02:76:70:00:00:01, the next device :02, …"),
            help: "its Ethernet address",
        },
        Key {
            name: "size",
            form: "N",
            missing: Missing::Default("256"),
            help: "descriptors of each ring, up to 32768; a power of two unless packed=on",
        },
        Key {
            name: "queues",
            form: "N",
            missing: Missing::Default("1"),
            help: "queue pairs, 1 to 16; one where the back-end serves fewer than these",
        },
        Key {
            name: "packed",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "offer packed rings; this and what follows is offered if the back-end has it, too",
        },
        Key {
            name: "in-order",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer the use of buffers in order",
        },
        Key {
            name: "event-idx",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer notifications by index",
        },
        Key {
            name: "mrg-rxbuf",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer frames over several receive buffers",
        },
        Key {
            name: "indirect",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer tables of descriptors",
        },
        Key {
            name: "csum",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer to leave checksums to the other side, both ways; needed for the next two",
        },
        Key {
            name: "tso",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "offer to leave the segmentation of TCP to the other side: frames of up to 64 KiB",
        },
        Key {
            name: "uso",
            form: "on|off",
            missing: Missing::Default("on"),
            help: "the same for UDP; a tap has no such thing",
        },
        Key {
            name: "iotlb-timeout",
            form: "MS",
            missing: Missing::Default("1000"),
            help: "with --iommu: how long the back-end may take to acknowledge a change before it is cut off",
        },
        Key {
            name: "tap",
            form: "NAME",
            missing: Missing::Unset("there has to be socket="),
            help: "in place of a back-end: a tap of this host, which is made if it is not there; not with --iommu",
        },
        Key {
            name: "vhost",
            form: "off|kernel",
            missing: Missing::Default("off"),
            help: "with tap=: its rings are served by the host's kernel (/dev/vhost-net), or by a thread of the VMM",
        },
    ],
};

static VHOST_PCI: KeyList = KeyList {
    flag: "--vhost-pci",
    keys: &[
        FRONT_END_SOCKET,
        FRONT_END_LISTEN,
        Key {
            name: "window",
            form: "SIZE",
            missing: Missing::Default("64G"),
            help: "how much of the front-end's address space BAR 2 can show, a power of two",
        },
        Key {
            name: "queues",
            form: "N",
            missing: Missing::Default("32"),
            help: "vhost-user queues that it can serve, 1 to 256",
        },
        Key {
            name: "uuid",
            form: "UUID",
            missing: Missing::Unset("zero"),
            help: "identifies the device to its guest",
        },
        Key {
            name: "miss-timeout",
            form: "MS",
            missing: Missing::Default("50"),
            help: "how long an access outside the window waits for the front-end to say what is there; 0: it is not asked",
        },
        Key {
            name: "inflight",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "the guest records what is in flight, so that packed rings go on where a back-end was lost; a nanosecond or two a frame",
        },
        Key {
            name: "log",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "the guest logs what it writes to the front-end's memory, which live migration needs; it cannot be behind an IOMMU then",
        },
        Key {
            name: "unsealed",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "take memory that the front-end could cut off (DPDK's), too: what is cut off then reads as ones",
        },
    ],
};

static DISK: KeyList = KeyList {
    flag: "--disk",
    keys: &[
        Key {
            name: "path",
            form: "FILE",
            missing: Missing::Required,
            help: "raw file or block device, a multiple of 512 bytes",
        },
        Key {
            name: "readonly",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "on: it is not written, and other VMs may read it at the same time",
        },
    ],
};

static IOMMU: KeyList = KeyList {
    flag: "--iommu",
    keys: &[
        Key {
            name: "range",
            form: "SIZE",
            missing: Missing::Default("64G"),
            help: "device addresses that can be mapped, from 0; a power of two",
        },
        Key {
            name: "mappings",
            form: "N",
            missing: Missing::Default("16384"),
            help: "mappings that there can be at a time, 1 to 1048576",
        },
        Key {
            name: "domains",
            form: "N",
            missing: Missing::Unset("as the device likes"),
            help: "domains that there can be at a time, 1 to 65536",
        },
        Key {
            name: "bypass",
            form: "on|off",
            missing: Missing::Default("off"),
            help: "what a device reaches that the guest has put into no domain: all memory, or nothing",
        },
        Key {
            name: "write-only",
            form: "exact|readable",
            missing: Missing::Default("exact"),
            help: "readable: what the guest maps for writing only (Linux: receive buffers) can be read, too, and a back-end writes it without help of its VMM",
        },
    ],
};

/// What the console is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleArg {
    /// stdin and stdout; a terminal is put into raw mode
    Stdio,
    /// stdout only
    Output,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[arg(long, value_name = "KEY=VALUE,…", default_value = "", hide_default_value = true,
        help = MEMORY.help("The VM's memory"))]
    pub memory: String,
    #[arg(long, value_name = "KEY=VALUE,…", default_value = "", hide_default_value = true,
        help = CPUS.help("Its virtual CPUs"))]
    pub cpus: String,
    /// What to boot: `builtin`, or the path of an ELF or bzImage file
    #[arg(long, value_name = "builtin|PATH", default_value = "builtin")]
    pub kernel: PathBuf,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. For the built-in guest: docs/bare-metal.md; with a device and no `work=` it exchanges
    /// frames both ways (work=both ms=3000)
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub cmdline: String,
    #[arg(long, value_name = "KEY=VALUE,…",
        help = NET.help("A virtio-net device whose rings another process serves (the front-end), or this host; can be given again"))]
    pub net: Vec<String>,
    #[arg(long, value_name = "KEY=VALUE,…",
        help = VHOST_PCI.help("A vhost-pci device, which lets the guest serve another VM's rings (the back-end); can be given again"))]
    pub vhost_pci: Vec<String>,
    #[arg(long, value_name = "KEY=VALUE,…",
        help = DISK.help("A virtio-blk disk; can be given again"))]
    pub disk: Vec<String>,
    /// A virtio-rng device: random numbers of the host's kernel
    #[arg(long)]
    pub rng: bool,
    #[arg(long, value_name = "KEY=VALUE,…", num_args = 0..=1, default_missing_value = "",
        help = IOMMU.help("A virtio-iommu with all of the VM's devices behind it: they reach what the guest maps for them; the list may be empty"))]
    pub iommu: Option<String>,
    /// What the serial console is connected to
    #[arg(long, value_enum, default_value = "stdio")]
    pub console: ConsoleArg,
    #[arg(long, value_name = "FILE|unix:PATH[,KEY=VALUE,…]",
        help = metrics::METRICS.help("Where all counters go as lines of JSON: a file, or whoever connects to a socket (docs/metrics.md)"))]
    pub metrics: Option<String>,
    #[arg(long, value_name = "FILE[,KEY=VALUE,…]",
        help = capture::CAPTURE.help("Where the frames go that the built-in guest sends and receives first, when the workload has ended: a file, made anew (pcapng)"))]
    pub capture: Option<String>,
    /// What becomes of a system call that the VM's threads have no use for
    #[arg(long, value_enum, value_name = "HOW", default_value = "on")]
    pub seccomp: SeccompArg,
    /// One end of a stream socket, inherited: the control channel
    #[arg(long, value_name = "N", hide = true)]
    pub control_fd: Option<i32>,
    /// End when this process, the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    pub parent: Option<u32>,
}

/// What `pair` and `bench` let the user choose for both VMs.
#[derive(Clone, Debug, Args)]
pub struct BothArgs {
    #[arg(long, value_name = "KEY=VALUE,…", default_value = "", hide_default_value = true,
        help = MEMORY.help("The memory of each VM"))]
    pub memory: String,
    /// Host cores: the back-end's virtual CPU runs on A, the front-end's on B
    #[arg(long, value_name = "A:B")]
    pub cores: Option<String>,
}

/// Reads `--memory`.
pub fn memory(text: &str) -> Result<MemoryConfig, Failure> {
    let values = MEMORY.parse(text)?;
    let hugepages = values.need("hugepages", |text| match text {
        "off" => Ok(HugePages::Off),
        "2M" | "2m" => Ok(HugePages::Size2M),
        "1G" | "1g" => Ok(HugePages::Size1G),
        _ => Err("it is off, 2M or 1G".to_owned()),
    })?;
    let page = hugepages.page_size();
    let bytes = values.need("size", |text| {
        let bytes = size(text)?;
        if bytes == 0 || bytes % page != 0 {
            return Err(format!("it is a multiple of {page} bytes, and not zero"));
        }
        Ok(bytes)
    })?;
    let dma = values.need("dma", |text| {
        let bytes = size(text)?;
        if bytes % page != 0 {
            return Err(format!("it is a multiple of {page} bytes"));
        }
        Ok(bytes)
    })?;
    Ok(MemoryConfig {
        size: bytes,
        hugepages,
        prefault: values.need("prefault", switch)?,
        dma,
    })
}

fn cores(text: &str, allowed: &[usize]) -> Result<Vec<usize>, String> {
    text.split(':')
        .map(|core| match core.parse() {
            Ok(core) if allowed.contains(&core) => Ok(core),
            Ok(core) => Err(format!(
                "this process may not run on core {core}; it may on {allowed:?}"
            )),
            Err(_) => Err("it is core numbers with ':' between them".to_owned()),
        })
        .collect()
}

/// Reads `--cpus`: how many, and where.
fn cpus(text: &str, allowed: &[usize]) -> Result<(u8, Vec<usize>), Failure> {
    let values = CPUS.parse(text)?;
    let count = values.need("count", number(1..=8))?;
    let affinity = values.get("affinity", |text| {
        let cores = cores(text, allowed)?;
        if cores.len() != usize::from(count) {
            return Err(format!("it has to name {count} core(s), one a virtual CPU"));
        }
        Ok(cores)
    })?;
    Ok((count, affinity.unwrap_or_default()))
}

/// Descriptors of a ring.
fn ring_size(packed: bool) -> impl FnOnce(&str) -> Result<u16, String> {
    move |text| {
        let size = number(1..=MAX_QUEUE_SIZE)(text)?;
        if !packed && !size.is_power_of_two() {
            return Err("it is a power of two, or any number with packed=on".to_owned());
        }
        Ok(size)
    }
}

fn role(listen: bool) -> SocketRole {
    if listen {
        SocketRole::Listen
    } else {
        SocketRole::Connect
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    // sockaddr_un has 108 bytes, one of them for the end.
    if text.len() > 107 {
        return Err("a socket's path has at most 107 bytes".to_owned());
    }
    Ok(text.into())
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let why = || "it is six bytes in hexadecimal, like 02:00:00:00:00:01".to_owned();
    let mut address = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut address {
        let part = parts
            .next()
            .filter(|part| part.len() == 2)
            .ok_or_else(why)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| why())?;
    }
    if parts.next().is_some() {
        return Err(why());
    }
    if address[0] & 1 != 0 {
        return Err("it is a multicast address, which no device can have".to_owned());
    }
    Ok(address)
}

fn uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let value = (digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| u128::from_str_radix(&digits, 16).ok())
        .flatten()
        .ok_or_else(|| "it is 32 hexadecimal digits; '-' may stand between them".to_owned())?;
    Ok(value.to_be_bytes())
}

/// What serves the rings of a network device.
enum Net {
    User(NetConfig),
    Tap(TapConfig),
}

fn interface(text: &str) -> Result<String, String> {
    if !is_interface_name(text) {
        return Err("it is 1 to 15 bytes without spaces, '/', ':' and '%'".to_owned());
    }
    Ok(text.to_owned())
}

/// Reads one `--net`; `index` counts them.
fn net(text: &str, index: usize) -> Result<Net, Failure> {
    let values = NET.parse(text)?;
    let queue_pairs = values.need("queues", number(1..=MAX_QUEUE_PAIRS))?;
    let number = u8::try_from(index + 1).map_err(|_| usage("--net: more than 255 devices"))?;
    let rings = RingFeatures {
        packed: values.need("packed", switch)?,
        in_order: values.need("in-order", switch)?,
        event_idx: values.need("event-idx", switch)?,
        mrg_rxbuf: values.need("mrg-rxbuf", switch)?,
        indirect: values.need("indirect", switch)?,
        csum: values.need("csum", switch)?,
        tso: values.need("tso", switch)?,
        uso: values.need("uso", switch)?,
    };
    let queue_size = values.need("size", ring_size(rings.packed))?;
    let mac = values
        .get("mac", mac)?
        .unwrap_or([0x02, 0x76, 0x70, 0, 0, number]);
    let server = values.need("vhost", |text| match text {
        "off" => Ok(Server::Thread),
        "kernel" => Ok(Server::Kernel),
        _ => Err("it is off or kernel".to_owned()),
    })?;
    let tap = values.get("tap", interface)?;
    let socket = values.get("socket", path)?;
    match (socket, tap) {
        (None, Some(_)) if queue_pairs > 1 => Err(usage("--net: a tap has one queue pair")),
        (None, Some(name)) => Ok(Net::Tap(TapConfig {
            name,
            server,
            queue_size,
            rings,
            mac,
        })),
        (Some(_), None) if server == Server::Kernel => Err(usage("--net: vhost=kernel needs tap=")),
        (Some(socket), None) => Ok(Net::User(NetConfig {
            socket,
            role: role(values.need("listen", switch)?),
            queue_pairs,
            queue_size,
            rings,
            mac,
            iotlb_timeout: values.need("iotlb-timeout", milliseconds(1))?,
        })),
        _ => Err(usage(
            "--net: one of the keys 'socket' and 'tap' has to be there",
        )),
    }
}

/// Reads one `--vhost-pci`.
fn vhost_pci(text: &str) -> Result<VhostPciConfig, Failure> {
    let values = VHOST_PCI.parse(text)?;
    Ok(VhostPciConfig {
        socket: values.need("socket", path)?,
        role: role(values.need("listen", switch)?),
        window: values.need("window", |text| {
            let bytes = size(text)?;
            if !bytes.is_power_of_two() || bytes < 4096 {
                return Err("it is a power of two, 4K or more".to_owned());
            }
            Ok(bytes)
        })?,
        queues: values.need("queues", number(1..=MAX_QUEUES))?,
        uuid: values.get("uuid", uuid)?.unwrap_or_default(),
        miss_timeout: values.need("miss-timeout", milliseconds(0))?,
        files: match values.need("unsealed", switch)? {
            true => Files::Unsealed,
            false => Files::Sealed,
        },
        inflight: values.need("inflight", switch)?,
        log: values.need("log", switch)?,
    })
}

/// Reads one `--disk`.
fn disk(text: &str) -> Result<BlkConfig, Failure> {
    let values = DISK.parse(text)?;
    Ok(BlkConfig {
        path: values.need("path", |text| Ok(text.into()))?,
        readonly: values.need("readonly", switch)?,
    })
}

/// Milliseconds, from `least` to a minute.
fn milliseconds(least: u64) -> impl FnOnce(&str) -> Result<Duration, String> {
    move |text| number(least..=60_000)(text).map(Duration::from_millis)
}

/// Reads `--iommu`.
fn iommu(text: &str) -> Result<IommuConfig, Failure> {
    let values = IOMMU.parse(text)?;
    let usual = IommuConfig::default();
    let range = values.need("range", |text| {
        let bytes = size(text)?;
        if !bytes.is_power_of_two() || bytes < 4096 {
            return Err("it is a power of two, 4K or more".to_owned());
        }
        Ok(bytes)
    })?;
    Ok(IommuConfig {
        input_range_end: range - 1,
        max_mappings: values.need("mappings", number(1..=1 << 20))?,
        max_domains: values
            .get("domains", number(1..=1 << 16))?
            .unwrap_or(usual.max_domains),
        bypass: values.need("bypass", switch)?,
        write_only_readable: values.need("write-only", |text| match text {
            "exact" => Ok(false),
            "readable" => Ok(true),
            _ => Err("it is exact or readable".to_owned()),
        })?,
        ..usual
    })
}

/// The command line of a built-in guest that nobody told what to do.
fn builtin_cmdline(given: &str, has_device: bool, has_control: bool) -> String {
    let told = given
        .split_whitespace()
        .any(|word| word.starts_with("work="));
    if told || has_control || !has_device {
        return given.to_owned();
    }
    format!("work=both ms=3000 {given}").trim_end().to_owned()
}

impl RunArgs {
    /// The VM that the flags describe, without its control channel. `allowed`: the cores that it may use.
    pub fn config(&self, allowed: &[usize]) -> Result<VmConfig, Failure> {
        let (vcpus, affinity) = cpus(&self.cpus, allowed)?;
        let (mut nets, mut taps) = (Vec::new(), Vec::new());
        for (index, text) in self.net.iter().enumerate() {
            match net(text, index)? {
                Net::User(config) => nets.push(config),
                Net::Tap(config) => taps.push(config),
            }
        }
        let net = nets;
        if let (Some(_), Some(tap)) = (&self.iommu, taps.first()) {
            return Err(usage(format!(
                "--net tap={}: a tap cannot be used with --iommu",
                tap.name
            )));
        }
        let vhost_pci = self
            .vhost_pci
            .iter()
            .map(|text| vhost_pci(text))
            .collect::<Result<Vec<_>, _>>()?;
        let mut sockets: Vec<_> = net
            .iter()
            .map(|device| &device.socket)
            .chain(vhost_pci.iter().map(|device| &device.socket))
            .collect();
        sockets.sort();
        if let Some(pair) = sockets.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(usage(format!(
                "two devices of one VM cannot share the socket {}",
                pair[0].display()
            )));
        }
        let has_device = !(net.is_empty() && taps.is_empty() && vhost_pci.is_empty());
        let interface = match vhost_pci.is_empty() {
            true => "front-end",
            false => "back-end",
        };
        let capture = self.capture.as_deref();
        let capture = capture.map(|text| capture::parse(text, interface));
        let capture = capture.transpose()?;
        let (kernel, cmdline) = if self.kernel.as_os_str() == "builtin" {
            let words = capture.as_ref().map(capture::guest_words);
            let given = format!("{}{}", self.cmdline, words.unwrap_or_default());
            (
                Kernel::Image(crate::image::builtin()),
                builtin_cmdline(&given, has_device, self.control_fd.is_some()),
            )
        } else if capture.is_some() {
            return Err(usage(
                "--capture: it is the built-in guest that does that; Linux has tcpdump, and vhost-pci-netd --capture",
            ));
        } else {
            (Kernel::Path(self.kernel.clone()), self.cmdline.clone())
        };
        Ok(VmConfig {
            memory: memory(&self.memory)?,
            kernel,
            initrd: self.initrd.clone(),
            cmdline,
            affinity,
            vcpus,
            net,
            taps,
            vhost_pci,
            disks: self
                .disk
                .iter()
                .map(|text| disk(text))
                .collect::<Result<_, _>>()?,
            rng: self.rng,
            console: match self.console {
                ConsoleArg::Stdio => Console::Stdio,
                ConsoleArg::Output => Console::Output,
            },
            control: None,
            metrics: self.metrics.as_deref().map(metrics::parse).transpose()?,
            capture,
            seccomp: self.seccomp.mode(),
            iommu: self.iommu.as_deref().map(iommu).transpose()?,
        })
    }
}

impl BothArgs {
    /// Two different cores: as given, or the first two that the process may use.
    pub fn cores(&self, allowed: &[usize]) -> Result<[usize; 2], Failure> {
        let Some(text) = &self.cores else {
            return match *allowed {
                [a, b, ..] => Ok([a, b]),
                _ => Err(usage(format!(
                    "two cores are needed, and this process may run on {allowed:?} only (see taskset(1))"
                ))),
            };
        };
        let cores = cores(text, allowed).map_err(|why| usage(format!("--cores {text}: {why}")))?;
        match cores[..] {
            [a, b] if a != b => Ok([a, b]),
            _ => Err(usage(format!(
                "--cores {text}: it is two different cores, A:B"
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
