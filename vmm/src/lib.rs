//! One virtual machine on KVM: memory, processors, interrupts, boot, and the devices of [`devices`] plugged into it.
//!
//! [`run()`] boots a VM and returns when it has ended; there is one VM a process. The threads are the caller's (it waits), one for
//! the devices (blocked in epoll while nothing happens), one a tap (the same), and one a vCPU.

mod acpi;
mod boot;
mod bus;
mod capture;
mod console;
mod control;
mod doorbells;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz_bodies;
mod host;
mod interrupts;
#[cfg(test)]
#[path = "../../fuzz/iterations.rs"]
mod iterations;
mod layout;
mod lines;
mod memory;
mod metrics;
mod run;
mod sandbox;
mod serial;
mod signals;
mod slots;
mod stats;
mod stop;
mod sys;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vcpu;
mod windows;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use devices::vhost_pci::VhostPciConfig;
use devices::virtio_blk::{self, BlkConfig};
use devices::virtio_iommu::IommuConfig;
use devices::virtio_net::NetConfig;
use devices::virtio_net::tap::{self, TapConfig};

pub use acpi::Error as AcpiError;
pub use boot::{Error as BootError, Kernel};
pub use bus::POWER_OFF_PORT;
pub use capture::CaptureConfig;
pub use host::Error as MachineError;
pub use memory::{Error as MemoryError, HugePages, MemoryConfig};
pub use metrics::{MetricsConfig, MetricsTarget};
pub use run::run;
pub use sandbox::Seccomp;
pub use vcpu::{Fault, MAX_VCPUS};

/// A VM, as the user wants it.
#[derive(Debug)]
pub struct VmConfig {
    /// Its RAM.
    pub memory: MemoryConfig,
    /// What it boots. [`Kernel::Image`] gets ` tsc_khz=… ecam=…` appended to its command line.
    pub kernel: Kernel,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The host core of each vCPU; empty: not pinned.
    pub affinity: Vec<usize>,
    /// How many vCPUs it has: 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Its network devices.
    pub net: Vec<NetConfig>,
    /// Its network devices over taps of the host, which cannot be behind a virtio-iommu.
    pub taps: Vec<TapConfig>,
    /// Its vhost-pci devices.
    pub vhost_pci: Vec<VhostPciConfig>,
    /// Its disks.
    pub disks: Vec<BlkConfig>,
    /// Whether it has a source of random numbers.
    pub rng: bool,
    /// Its virtio-iommu, with all other virtio devices behind it; each is known to it by its PCI requester ID. The page size is that of the
    /// memory, whatever is set here.
    pub iommu: Option<IommuConfig>,
    /// What COM1 is.
    pub console: Console,
    /// One end of a stream socket that is COM2: the control channel. The VMM answers the lines that begin with `vmm`.
    pub control: Option<OwnedFd>,
    /// Who gets to know what it does, and how often.
    pub metrics: Option<MetricsConfig>,
    /// Where the frames go that the built-in guest reports.
    pub capture: Option<CaptureConfig>,
    /// What becomes of system calls that its threads have no use for.
    pub seccomp: Seccomp,
}

/// What the console (COM1) is connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output. A terminal is in raw mode while the VM runs; Ctrl-A x ends the VM.
    #[default]
    Stdio,
    /// Standard output only.
    Output,
}

/// How a VM ended, where nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off: by port 0xf4, with an exit code, or by ACPI.
    PowerOff {
        /// What it wrote; 0 by ACPI.
        code: u8,
    },
    /// The guest reset the machine.
    Reset,
    /// This signal arrived (or the user typed Ctrl-A x: SIGINT).
    Signal(i32),
}

/// Why a VM could not be run, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// KVM cannot run a VM here.
    #[error(transparent)]
    Machine(#[from] host::Error),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Its kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The VM cannot be described to its guest.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// A vCPU cannot be pinned.
    #[error(
        "vCPU {vcpu} cannot be pinned to core {core}: {source} (see Cpus_allowed_list in /proc/self/status for the cores there are)"
    )]
    Affinity {
        /// Which vCPU.
        vcpu: usize,
        /// The core.
        core: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A network device cannot be made.
    #[error("network device {}: {source}", .socket.display())]
    Net {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: devices::virtio_net::Error,
    },
    /// A network device over a tap cannot be made.
    #[error("tap {name}: {source}")]
    Tap {
        /// The interface.
        name: String,
        /// Why.
        source: tap::Error,
    },
    /// A disk cannot be made.
    #[error("disk {}: {source}", .path.display())]
    Disk {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: virtio_blk::Error,
    },
    /// A vhost-pci device cannot be made.
    #[error("vhost-pci device {}: {source}", .socket.display())]
    VhostPci {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: devices::vhost_pci::Error,
    },
    /// The virtio-iommu cannot be made.
    #[error("virtio-iommu: {0}")]
    Iommu(#[from] devices::virtio_iommu::Error),
    /// The virtio-iommu cannot be plugged in.
    #[error("virtio-iommu: {0}")]
    IommuFunction(#[source] devices::virtio::Error),
    /// A device cannot be plugged in.
    #[error("device {}: {source}", .socket.display())]
    Virtio {
        /// The socket of the device.
        socket: PathBuf,
        /// Why.
        source: devices::virtio::Error,
    },
    /// The PCI bus cannot take what is plugged in.
    #[error(transparent)]
    Pci(#[from] devices::pci::Error),
    /// A vCPU stopped.
    #[error("vCPU {id}: {fault}")]
    Vcpu {
        /// Which.
        id: usize,
        /// Why.
        fault: Fault,
    },
    /// The thread of the devices stopped.
    #[error("the device thread stopped: {0}")]
    DeviceThread(String),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] io::Error),
}
