//! The modern virtio-pci transport, driver side (VIRTIO 1.3, section 4.1).

use core::fmt;

use virtqueue::{Layout, RingConfig};

use crate::mmio::Registers;
use crate::pci::{self, Bar, Function, Msix};
use crate::{Event, Platform, Vectors, virtio_iommu};

/// Vendor ID of virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// Device ID of a modern virtio device of a type: this plus the type.
pub const DEVICE_BASE: u16 = 0x1040;

const CAP_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_DEVICE: u8 = 4;
const CFG_SHARED_MEMORY: u8 = 8;

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
const STATUS_FAILED: u8 = 128;

/// MSI-X vector of configuration changes.
const VECTOR_CONFIG: u16 = 0;
/// MSI-X vector of all queues.
const VECTOR_QUEUES: u16 = 1;

/// VIRTIO_MSI_NO_VECTOR.
const NO_VECTOR: u16 = 0xffff;

/// A reset closes a connection and may take milliseconds; each look at the register leaves the guest, which takes
/// tens of microseconds, so this waits for seconds.
const RESET_READS: u32 = 100_000;

/// Offsets in the common configuration (section 4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub const DEVICE_FEATURE: usize = 0x04;
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const CONFIG_VECTOR: usize = 0x10;
    pub const STATUS: usize = 0x14;
    pub const QUEUE_SELECT: usize = 0x16;
    pub const QUEUE_SIZE: usize = 0x18;
    pub const QUEUE_VECTOR: usize = 0x1a;
    pub const QUEUE_ENABLE: usize = 0x1c;
    pub const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub const QUEUE_DESC: usize = 0x20;
    pub const QUEUE_DRIVER: usize = 0x28;
    pub const QUEUE_DEVICE: usize = 0x30;
    pub const QUEUE_RESET: usize = 0x3a;
    pub const LEN: usize = 0x38;
}

/// Why a device cannot be driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A structure of the transport is missing or does not lie in its BAR.
    Structure(&'static str),
    /// The device did not finish a reset.
    Reset,
    /// The device does not offer, or did not accept, what the driver needs.
    Features,
    /// A queue is absent, or did not take its settings.
    Queue(u16),
    /// There is no more memory for rings and buffers.
    Memory,
    /// The ring code refused a ring.
    Ring(virtqueue::Error),
    /// Buffers could not be mapped for the device.
    Iommu(virtio_iommu::Error),
    /// The device answers a command of its control queue with this status.
    Command(u8),
    /// The device does not answer a command of its control queue.
    Silent,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Structure(what) => write!(f, "the device's {what} is missing or out of its BAR"),
            Self::Reset => f.write_str("the device does not finish its reset"),
            Self::Features => f.write_str("the device refuses the features that the driver needs"),
            Self::Queue(index) => write!(f, "queue {index} is absent or refuses its settings"),
            Self::Memory => f.write_str("no memory left for rings and buffers"),
            Self::Ring(error) => write!(f, "ring: {error}"),
            Self::Iommu(error) => error.fmt(f),
            Self::Command(status) => write!(f, "the device refuses a command: status {status}"),
            Self::Silent => f.write_str("the device does not answer a command"),
        }
    }
}

impl core::error::Error for Error {}

impl From<virtio_iommu::Error> for Error {
    fn from(error: virtio_iommu::Error) -> Self {
        Self::Iommu(error)
    }
}

impl From<virtqueue::Error> for Error {
    fn from(error: virtqueue::Error) -> Self {
        Self::Ring(error)
    }
}

/// Tells the other side that a ring has something new.
pub trait Notify {
    /// Notifies.
    fn notify(&self);
}

/// The register that notifies one queue.
#[derive(Debug)]
pub struct Doorbell {
    register: Registers,
    index: u16,
}

impl Notify for Doorbell {
    fn notify(&self) {
        self.register.write_u16(0, self.index);
    }
}

/// A virtio device whose registers are mapped.
#[derive(Debug)]
pub struct Transport {
    common: Registers,
    notify: Registers,
    notify_multiplier: u32,
    device: Registers,
    /// By id.
    shared_memory: [Option<Bar>; 2],
    /// Nothing interrupts.
    polled: bool,
}

impl Transport {
    /// Maps the registers, resets the device, and connects its interrupts (configuration: vector 0; every queue: vector 1).
    pub fn new<P: Platform>(platform: &P, function: Function) -> Result<Self, Error> {
        function.enable(platform);
        let mut found = [None; 3];
        let mut notify_multiplier = 0;
        let mut shared_memory = [None; 2];
        for (cap, _) in function
            .capabilities(platform)
            .filter(|&(_, id)| id == CAP_VENDOR)
        {
            let read = |offset| platform.config_read(function.number, cap + offset);
            let [_, _, cap_len, kind] = read(0).to_le_bytes();
            let [bar, id, ..] = read(4).to_le_bytes();
            let (offset, len) = (u64::from(read(8)), u64::from(read(12)));
            let place = match kind {
                CFG_COMMON => &mut found[0],
                CFG_NOTIFY => {
                    notify_multiplier = read(16);
                    &mut found[1]
                }
                CFG_DEVICE => &mut found[2],
                CFG_SHARED_MEMORY if cap_len >= 24 => {
                    let offset = offset | u64::from(read(16)) << 32;
                    let len = len | u64::from(read(20)) << 32;
                    if let (Some(place), Some(bar)) = (
                        shared_memory.get_mut(usize::from(id)),
                        function.bar(platform, bar),
                    ) {
                        let inside = offset.checked_add(len).is_some_and(|end| end <= bar.size);
                        *place = inside.then_some(Bar {
                            addr: bar.addr + offset,
                            size: len,
                        });
                    }
                    continue;
                }
                _ => continue,
            };
            // The first of its kind counts (section 4.1.4.1).
            if place.is_none()
                && let (Some(bar), Ok(len)) = (function.bar(platform, bar), usize::try_from(len))
            {
                *place = pci::map(platform, bar, offset, len);
            }
        }
        let [common, notify, device] = found;
        let transport = Self {
            common: common
                .filter(|r| r.len() >= common::LEN)
                .ok_or(Error::Structure("common configuration"))?,
            notify: notify.ok_or(Error::Structure("notification area"))?,
            notify_multiplier,
            device: device.ok_or(Error::Structure("device configuration"))?,
            shared_memory,
            polled: platform.vectors() == Vectors::Nobody,
        };
        transport.reset()?;
        if platform.vectors() == Vectors::Driver {
            Self::connect(platform, function)?;
        }
        transport.connect_config_vector()?;
        Ok(transport)
    }

    /// Gives the MSI-X vectors their messages.
    fn connect<P: Platform>(platform: &P, function: Function) -> Result<(), Error> {
        let msix: Msix = function
            .msix(platform)
            .ok_or(Error::Structure("MSI-X table"))?;
        if msix.vectors() <= VECTOR_QUEUES {
            return Err(Error::Structure("second MSI-X vector"));
        }
        msix.set(VECTOR_CONFIG, platform.message(Event::Config));
        msix.set(VECTOR_QUEUES, platform.message(Event::Queue));
        Ok(())
    }

    /// Lets configuration changes interrupt; a reset takes that away.
    pub fn connect_config_vector(&self) -> Result<(), Error> {
        if self.polled {
            return Ok(());
        }
        self.common.write_u16(common::CONFIG_VECTOR, VECTOR_CONFIG);
        if self.common.read_u16(common::CONFIG_VECTOR) == VECTOR_CONFIG {
            Ok(())
        } else {
            Err(Error::Structure("configuration vector"))
        }
    }

    /// Resets the device and waits for it.
    pub fn reset(&self) -> Result<(), Error> {
        self.common.write_u8(common::STATUS, 0);
        let done = (0..RESET_READS).any(|_| self.common.read_u8(common::STATUS) == 0);
        if done { Ok(()) } else { Err(Error::Reset) }
    }

    /// Negotiates: `choose` gets what the device offers and returns what the driver takes of it, or `None` where it
    /// cannot do with it. Returns what was taken.
    pub fn negotiate(&self, choose: impl FnOnce(u64) -> Option<u64>) -> Result<u64, Error> {
        self.add_status(STATUS_ACKNOWLEDGE);
        self.add_status(STATUS_DRIVER);
        let mut offered = 0;
        for half in 0..2u32 {
            self.common.write_u32(common::DEVICE_FEATURE_SELECT, half);
            offered |= u64::from(self.common.read_u32(common::DEVICE_FEATURE)) << (32 * half);
        }
        let Some(taken) = choose(offered) else {
            self.add_status(STATUS_FAILED);
            return Err(Error::Features);
        };
        for half in 0..2u32 {
            self.common.write_u32(common::DRIVER_FEATURE_SELECT, half);
            self.common.write_u32(
                common::DRIVER_FEATURE,
                pci::low32((taken & offered) >> (32 * half)),
            );
        }
        self.add_status(STATUS_FEATURES_OK);
        if self.common.read_u8(common::STATUS) & STATUS_FEATURES_OK == 0 {
            self.add_status(STATUS_FAILED);
            return Err(Error::Features);
        }
        Ok(taken & offered)
    }

    /// Allocates a ring of at most `size` descriptors, tells the device, and enables the queue. What was negotiated for rings is for the
    /// caller to add to the result.
    pub fn add_queue<P: Platform, L: Layout>(
        &self,
        platform: &P,
        index: u16,
        size: u16,
    ) -> Result<RingConfig, Error> {
        let most = self.largest_queue(index).min(size);
        // A split ring has a power of two: the largest below will do.
        let below = 1u16.checked_shl(most.checked_ilog2().unwrap_or(0));
        let (size, areas) = [Some(most), below]
            .into_iter()
            .flatten()
            .find_map(|size| Some((size, L::area_sizes(size)?)))
            .filter(|_| most > 0)
            .ok_or(Error::Queue(index))?;
        let area = |len| {
            let dma = platform.dma(len, 4096).ok_or(Error::Memory)?;
            Ok::<_, Error>(dma.addr)
        };
        let config = RingConfig {
            size,
            desc: area(areas[0])?,
            driver: area(areas[1])?,
            device: area(areas[2])?,
            event_idx: false,
            in_order: false,
            indirect: false,
        };
        self.enable_queue(index, &config)?;
        Ok(config)
    }

    /// How many descriptors a queue can have at most; 0 where it is not there.
    #[must_use]
    pub fn largest_queue(&self, index: u16) -> u16 {
        self.common.write_u16(common::QUEUE_SELECT, index);
        self.common.read_u16(common::QUEUE_SIZE)
    }

    /// Tells the device where a queue is, and enables it.
    pub fn enable_queue(&self, index: u16, config: &RingConfig) -> Result<(), Error> {
        self.common.write_u16(common::QUEUE_SELECT, index);
        self.common.write_u16(common::QUEUE_SIZE, config.size);
        for (register, addr) in [
            (common::QUEUE_DESC, config.desc),
            (common::QUEUE_DRIVER, config.driver),
            (common::QUEUE_DEVICE, config.device),
        ] {
            self.common.write_u32(register, pci::low32(addr));
            self.common.write_u32(register + 4, pci::low32(addr >> 32));
        }
        self.connect_vector(index)?;
        self.common.write_u16(common::QUEUE_ENABLE, 1);
        Ok(())
    }

    /// Resets one queue and waits for it (VIRTIO_F_RING_RESET, section 2.6.1). The device has forgotten the queue then; its memory is
    /// the driver's again.
    pub fn reset_queue(&self, index: u16) -> Result<(), Error> {
        self.common.write_u16(common::QUEUE_SELECT, index);
        self.common.write_u16(common::QUEUE_RESET, 1);
        // An absent register reads as all-ones.
        let done = (0..RESET_READS).any(|_| self.common.read_u16(common::QUEUE_RESET) == 0);
        if done && self.common.read_u16(common::QUEUE_ENABLE) == 0 {
            Ok(())
        } else {
            Err(Error::Queue(index))
        }
    }

    /// Lets queue `index` (or a special index of the device) interrupt.
    pub fn connect_vector(&self, index: u16) -> Result<(), Error> {
        if self.polled {
            return Ok(()); // no vector is what a reset leaves
        }
        self.common.write_u16(common::QUEUE_SELECT, index);
        self.common.write_u16(common::QUEUE_VECTOR, VECTOR_QUEUES);
        if self.common.read_u16(common::QUEUE_VECTOR) == VECTOR_QUEUES {
            Ok(())
        } else {
            Err(Error::Queue(index))
        }
    }

    /// Lets queue `index` not interrupt: it is polled.
    pub fn disconnect_vector(&self, index: u16) {
        self.common.write_u16(common::QUEUE_SELECT, index);
        self.common.write_u16(common::QUEUE_VECTOR, NO_VECTOR);
    }

    /// The register that notifies queue `index` (or a special index of the device).
    pub fn doorbell(&self, index: u16) -> Result<Doorbell, Error> {
        self.common.write_u16(common::QUEUE_SELECT, index);
        let offset = u64::from(self.common.read_u16(common::QUEUE_NOTIFY_OFF))
            * u64::from(self.notify_multiplier);
        usize::try_from(offset)
            .ok()
            .and_then(|offset| self.notify.part(offset, 2))
            .map(|register| Doorbell { register, index })
            .ok_or(Error::Queue(index))
    }

    /// Sets DRIVER_OK: the device runs.
    pub fn start(&self) {
        self.add_status(STATUS_DRIVER_OK);
    }

    /// Whether the device asks to be reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.common.read_u8(common::STATUS) & STATUS_NEEDS_RESET != 0
    }

    /// The device's own configuration.
    #[must_use]
    pub fn device(&self) -> &Registers {
        &self.device
    }

    /// The shared memory region with this id, where the device has it.
    #[must_use]
    pub fn shared_memory(&self, id: usize) -> Option<Bar> {
        self.shared_memory.get(id).copied().flatten()
    }

    fn add_status(&self, bits: u8) {
        let status = self.common.read_u8(common::STATUS);
        self.common.write_u8(common::STATUS, status | bits);
    }
}
