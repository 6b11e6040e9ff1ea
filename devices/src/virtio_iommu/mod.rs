//! The virtio-iommu device (VIRTIO 1.3, section 5.13), and what it is to the devices behind it.
//!
//! [`VirtioIommu`] is what the guest sees. For each device behind it there is an [`Endpoint`], which keeps what that device may reach. A request
//! of the guest changes endpoints, and is completed when all who were handed an address space have followed the change: an
//! UNMAP that is complete is a fact, wherever the memory was shown.
//!
//! * What the guest does arrives on vCPU threads, is noted, and wakes the device thread.
//! * Requests, their completion and the reports of faults happen on the device thread, in `worker.rs`.
//!
//! # Choices that the specification leaves
//!
//! * The status is in the last four bytes that a request lets the device write, also for a type that is not known (UNSUPP).
//! * A MAP to anything but memory that devices may reach ([`Host::memory_regions`]) is invalid. One without flags occupies its range and shows nothing.
//! * A bypass is the identity over that memory, and nothing besides.
//! * UNMAP with something in `reserved` is invalid and removes nothing.
//! * A request that fails has changed nothing; an ATTACH that moves an endpoint first finds out whether it can.
//! * A driver that clears `bypass` knows that this has taken effect when the next request is complete.

mod domains;
mod endpoint;
mod queues;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use event_manager::MutEventSubscriber;
use thiserror::Error;

use crate::host::Host;
use crate::virtio::{Activation, F_VERSION_1, Orders, Transport, VirtioDevice, copy_config};
use domains::Domains;
use wire::{Kind, PROBE_SIZE};
use worker::Worker;

pub use endpoint::{Change, Endpoint, Fault, Mapping};

/// VIRTIO_IOMMU_F_INPUT_RANGE: the configuration says which addresses can be mapped.
const F_INPUT_RANGE: u64 = 1 << 0;
/// VIRTIO_IOMMU_F_DOMAIN_RANGE: the configuration says which domains there can be.
const F_DOMAIN_RANGE: u64 = 1 << 1;
/// VIRTIO_IOMMU_F_MAP_UNMAP: MAP and UNMAP.
const F_MAP_UNMAP: u64 = 1 << 2;
/// VIRTIO_IOMMU_F_PROBE: PROBE.
const F_PROBE: u64 = 1 << 4;
/// VIRTIO_IOMMU_F_BYPASS_CONFIG: the field `bypass`, and domains that are a bypass.
const F_BYPASS_CONFIG: u64 = 1 << 6;
/// VIRTIO_F_INDIRECT_DESC.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;

/// The virtio device type.
const DEVICE_TYPE: u16 = 23;
/// Size of both queues.
const QUEUE_SIZE: u16 = 256;
/// Length of the device configuration.
const CONFIG_SIZE: usize = 40;
/// Where `bypass` is in it.
const BYPASS: usize = 36;

/// What the user decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IommuConfig {
    /// The last device address that can be mapped. One more is a multiple of the page size.
    pub input_range_end: u64,
    /// The unit of mappings, in bytes: a power of two, 4096 or more, and what backs the guest's memory has no larger pages.
    pub page_size: u64,
    /// How many domains there can be at a time; their numbers begin at 0.
    pub max_domains: u32,
    /// How many mappings there can be at a time, in all domains together.
    pub max_mappings: usize,
    /// Whether a device that is attached to no domain reaches all memory, as the guest finds it.
    pub bypass: bool,
    /// Whether what is mapped for writing can be read as well, as the specification lets a device do that has no write-only mappings
    /// (VIRTIO 1.3, section 5.13.6, MAP request): whoever plays the device then has pages in place of an exit a store.
    pub write_only_readable: bool,
}

impl Default for IommuConfig {
    /// 64 GiB of addresses in pages of 4 KiB, 256 domains, 16384 mappings, no bypass, permissions exactly as asked for.
    fn default() -> Self {
        Self {
            input_range_end: (64 << 30) - 1,
            page_size: 4096,
            max_domains: 256,
            max_mappings: 16384,
            bypass: false,
            write_only_readable: false,
        }
    }
}

/// Why there is no device. All of it is the host's or its user's doing.
#[derive(Debug, Error)]
pub enum Error {
    /// Pages that cannot be mapped.
    #[error("IOMMU pages of {0:#x} bytes: the size must be a power of two and at least 4096")]
    PageSize(u64),
    /// A range that does not end with a page.
    #[error(
        "an IOMMU whose last address is {end:#x}: it must be the last byte of a page of {page_size:#x} bytes, and not that of the address space"
    )]
    InputRange {
        /// The last address.
        end: u64,
        /// The page size in bytes.
        page_size: u64,
    },
    /// Nothing could be attached.
    #[error("an IOMMU without domains: there must be one at least")]
    NoDomains,
    /// The host gives no eventfd.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] io::Error),
}

/// How long requests of one type took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Requests that are complete.
    pub count: u64,
    /// Nanoseconds from taking each off the queue to its completion, in all. Those of one batch count from when the batch began.
    pub total_ns: u64,
    /// Of these, the nanoseconds in which a request only waited for followers, its own and those of the requests before it.
    pub waiting_ns: u64,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// ATTACH requests.
    pub attach: u64,
    /// DETACH requests.
    pub detach: u64,
    /// MAP requests.
    pub map: u64,
    /// UNMAP requests.
    pub unmap: u64,
    /// PROBE requests.
    pub probe: u64,
    /// Requests of a type that is not known.
    pub unknown: u64,
    /// Requests that were answered with another status than OK.
    pub errors: u64,
    /// Buffers of either queue that could not be answered, or could not take a fault.
    pub malformed: u64,
    /// Mappings that there are now, in all domains.
    pub mappings: u64,
    /// Faults that the driver was told of.
    pub faults_reported: u64,
    /// Faults that it will never be told of: there were too many, or it reset the device.
    pub faults_lost: u64,
    /// How long MAP requests took.
    pub map_time: Timing,
    /// How long UNMAP requests took.
    pub unmap_time: Timing,
}

#[derive(Default)]
struct Timer {
    count: AtomicU64,
    total: AtomicU64,
    waiting: AtomicU64,
}

impl Timer {
    fn add(&self, total: Duration, waiting: Duration) {
        // Centuries fit into 64 bits.
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        count(&self.count);
        self.total.fetch_add(ns(total), Ordering::Relaxed);
        self.waiting.fetch_add(ns(waiting), Ordering::Relaxed);
    }

    fn read(&self) -> Timing {
        Timing {
            count: self.count.load(Ordering::Relaxed),
            total_ns: self.total.load(Ordering::Relaxed),
            waiting_ns: self.waiting.load(Ordering::Relaxed),
        }
    }
}

#[derive(Default)]
struct Counters {
    attach: AtomicU64,
    detach: AtomicU64,
    map: AtomicU64,
    unmap: AtomicU64,
    probe: AtomicU64,
    unknown: AtomicU64,
    errors: AtomicU64,
    malformed: AtomicU64,
    mappings: AtomicU64,
    faults_reported: AtomicU64,
    faults_lost: AtomicU64,
    map_time: Timer,
    unmap_time: Timer,
}

impl Counters {
    fn requests(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Attach => &self.attach,
            Kind::Detach => &self.detach,
            Kind::Map => &self.map,
            Kind::Unmap => &self.unmap,
            Kind::Probe => &self.probe,
            Kind::Unknown => &self.unknown,
        }
    }

    fn timer(&self, kind: Kind) -> Option<&Timer> {
        match kind {
            Kind::Map => Some(&self.map_time),
            Kind::Unmap => Some(&self.unmap_time),
            _ => None,
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What both sides of the device, vCPU threads and the device thread, have in common.
struct Shared {
    orders: Orders,
    /// The field `bypass`.
    bypass: AtomicBool,
    /// What the driver accepted; 0 as long as it has not.
    features: AtomicU64,
    counters: Counters,
}

/// The device.
pub struct VirtioIommu {
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    config: IommuConfig,
}

impl VirtioIommu {
    /// Makes the device, with nothing behind it. Nothing happens on it before the device thread has the [`VirtioIommu::subscriber`].
    pub fn new(config: IommuConfig, host: Arc<dyn Host>) -> Result<Arc<Self>, Error> {
        let (end, page_size) = (config.input_range_end, config.page_size);
        if !page_size.is_power_of_two() || page_size < 4096 {
            return Err(Error::PageSize(page_size));
        }
        if !end
            .checked_add(1)
            .is_some_and(|len| len.is_multiple_of(page_size))
        {
            return Err(Error::InputRange { end, page_size });
        }
        if config.max_domains == 0 {
            return Err(Error::NoDomains);
        }
        let shared = Arc::new(Shared {
            orders: Orders::new().map_err(Error::EventFd)?,
            bypass: AtomicBool::new(config.bypass),
            features: AtomicU64::new(0),
            counters: Counters::default(),
        });
        let domains = Domains::new(&config, host.memory_regions());
        let worker = Worker::new(shared.clone(), host, domains);
        Ok(Arc::new(Self {
            shared,
            worker: Arc::new(Mutex::new(worker)),
            config,
        }))
    }

    /// The device's part of the device thread, to be added to its event manager once. That of each device behind it has to be on the same
    /// thread, unless it is a follower of its endpoint.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }

    /// Puts a device behind the IOMMU, before the guest runs. `id` is how the guest names it, and no other device's: for a PCI function its
    /// requester ID (8 bits of bus, 5 of slot, 3 of function).
    pub fn add_endpoint(&self, id: u32, endpoint: Arc<Endpoint>) {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.add(id, endpoint);
        drop(worker);
        self.shared.orders.signal();
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            attach: read(&counters.attach),
            detach: read(&counters.detach),
            map: read(&counters.map),
            unmap: read(&counters.unmap),
            probe: read(&counters.probe),
            unknown: read(&counters.unknown),
            errors: read(&counters.errors),
            malformed: read(&counters.malformed),
            mappings: read(&counters.mappings),
            faults_reported: read(&counters.faults_reported),
            faults_lost: read(&counters.faults_lost),
            map_time: counters.map_time.read(),
            unmap_time: counters.unmap_time.read(),
        }
    }

    /// The device configuration as it is now (VIRTIO 1.3, section 5.13.4).
    fn config(&self) -> [u8; CONFIG_SIZE] {
        let config = &self.config;
        // Larger pages are as good as this one.
        let page_size_mask = !(config.page_size - 1);
        let probe_size = u32::try_from(PROBE_SIZE).unwrap_or(u32::MAX);
        let mut bytes = [0; CONFIG_SIZE];
        bytes[0..8].copy_from_slice(&page_size_mask.to_le_bytes());
        bytes[16..24].copy_from_slice(&config.input_range_end.to_le_bytes());
        bytes[28..32].copy_from_slice(&(config.max_domains - 1).to_le_bytes());
        bytes[32..36].copy_from_slice(&probe_size.to_le_bytes());
        bytes[BYPASS] = self.shared.bypass.load(Ordering::Acquire).into();
        bytes
    }
}

impl VirtioDevice for VirtioIommu {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    /// A base system peripheral, an IOMMU.
    fn pci_class(&self) -> u32 {
        0x08_0600
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        F_INPUT_RANGE
            | F_DOMAIN_RANGE
            | F_MAP_UNMAP
            | F_PROBE
            | F_BYPASS_CONFIG
            | F_INDIRECT_DESC
            | F_EVENT_IDX
            | F_VERSION_1
    }

    /// Any; and it is here that the device learns them early enough for a `bypass` that is written before DRIVER_OK.
    fn accepts(&self, features: u64) -> bool {
        self.shared.features.store(features, Ordering::Release);
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let byte = usize::try_from(offset)
            .ok()
            .and_then(|offset| BYPASS.checked_sub(offset))
            .and_then(|at| data.get(at));
        let accepted = self.shared.features.load(Ordering::Acquire) & F_BYPASS_CONFIG != 0;
        // Only 0 and 1 may be written.
        if let (Some(&value @ 0..=1), true) = (byte, accepted) {
            self.shared.bypass.store(value == 1, Ordering::Release);
            self.shared.orders.signal();
        }
    }

    fn bind(&self, transport: Weak<dyn Transport>) {
        self.shared.orders.bind(transport);
    }

    fn activate(&self, activation: Activation) {
        let features = activation.features;
        self.shared.features.store(features, Ordering::Release);
        self.shared.orders.activate(activation);
    }

    fn reset(&self) {
        self.shared.features.store(0, Ordering::Release);
        self.shared.orders.reset();
    }
}
