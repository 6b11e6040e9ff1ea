//! A disk (VIRTIO 1.3, section 5.2): a raw file of the host, or a block device.
//!
//! * What the guest does arrives on vCPU threads, is noted, and wakes the device thread.
//! * The device thread takes requests off the queue, and copies data between guest memory and buffers of its own (`worker.rs`). So each access is
//!   translated where there is an IOMMU, and none is left when an UNMAP completes.
//! * A thread of its own moves buffers to and from the file (`disk.rs`).
//!
//! Not more than [`MAX_REQUESTS`] requests are at work at a time, with not more than [`MAX_BYTES`] in all; the others wait in their ring.
//!
//! A write is complete when the host's kernel has it; a FLUSH when all completed writes are on the medium. With a driver that does not take
//! VIRTIO_BLK_F_FLUSH each write is complete when it is on the medium (section 5.2.6.2). The file is locked: one VM writes it, or several read it.

mod disk;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use event_manager::MutEventSubscriber;
use thiserror::Error;

use crate::host::Host;
use crate::virtio::{
    Activation, F_ACCESS_PLATFORM, F_VERSION_1, Orders, Transport, VirtioDevice, copy_config,
};
use crate::virtio_iommu::Endpoint;
use disk::Worked;
use request::Limits;
use worker::Worker;

/// VIRTIO_BLK_F_SIZE_MAX: the configuration says how long a piece of data may be.
const F_SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX: it says how many pieces a request may have.
const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO: the disk cannot be written.
const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_FLUSH: the disk has a cache that can be flushed.
const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_F_INDIRECT_DESC.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;

/// The unit of addresses and lengths, in bytes.
const SECTOR: u64 = 512;
/// Size of the queue.
const QUEUE_SIZE: u16 = 128;
/// Pieces of data that a request may have, and their longest: with header and status they fit into a ring that has as many descriptors again.
const SEG_MAX: u32 = 32;
const SIZE_MAX: u32 = 32 << 10;
/// The most data that a request can have, in bytes.
const MAX_DATA: usize = 1 << 20;
/// Requests at work at a time.
pub const MAX_REQUESTS: usize = 64;
/// Data of theirs in all, in bytes.
pub const MAX_BYTES: usize = 4 << 20;
/// Length of the device configuration up to `size_max` and `seg_max`, the last fields that mean something with these features.
const CONFIG_SIZE: usize = 16;
/// Length of what GET_ID gives.
const ID_LENGTH: usize = 20;

/// What the user decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// The file or block device. Its name, cut off, is the disk's ID.
    pub path: PathBuf,
    /// Whether it is only read.
    pub readonly: bool,
}

/// Why there is no disk. All of it is the host's or its user's doing.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be used.
    #[error("cannot open it: {0}")]
    Open(#[source] io::Error),
    /// Something that has no sectors.
    #[error("it is neither a file nor a block device")]
    Kind,
    /// A length that no disk has.
    #[error("it has {0} bytes: a disk has a multiple of {SECTOR}, and not 0")]
    Size(u64),
    /// Another process has it.
    #[error(
        "another process has locked it: one VM can write it, or several can have it with readonly=on"
    )]
    InUse,
    /// The host gives no eventfd.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] io::Error),
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that read, completed well.
    pub reads: u64,
    /// Requests that wrote, completed well.
    pub writes: u64,
    /// Flushes, completed well.
    pub flushes: u64,
    /// Requests that were answered with another status than OK.
    pub errors: u64,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
}

/// What both sides of the device, vCPU threads and the device thread, have in common.
struct Shared {
    name: String,
    orders: Orders,
    counters: Counters,
}

/// The device.
pub struct VirtioBlk {
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    worked: Arc<Mutex<Worked>>,
    size: u64,
    readonly: bool,
    translated: bool,
}

impl VirtioBlk {
    /// Opens the file and makes the device. Nothing happens on it before threads have the [`VirtioBlk::subscriber`] and the
    /// [`VirtioBlk::file_subscriber`]. `endpoint` is
    /// what the device is to the IOMMU that it is behind, if any.
    pub fn new(
        config: &BlkConfig,
        endpoint: Option<Arc<Endpoint>>,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Error> {
        let readonly = config.readonly;
        let (file, size) = disk::open(&config.path, readonly)?;
        let (disk, worked) = disk::halves(file).map_err(Error::EventFd)?;
        let name = config.path.file_name().unwrap_or_default();
        let shared = Arc::new(Shared {
            name: name.to_string_lossy().into_owned(),
            orders: Orders::new().map_err(Error::EventFd)?,
            counters: Counters::default(),
        });
        let translated = endpoint.is_some();
        let limits = Limits {
            size,
            readonly,
            durably: false,
        };
        let worker = Worker::new(shared.clone(), host, endpoint, disk, limits);
        Ok(Arc::new(Self {
            shared,
            worker: Arc::new(Mutex::new(worker)),
            worked: Arc::new(Mutex::new(worked)),
            size,
            readonly,
            translated,
        }))
    }

    /// The device's part of the device thread, to be added to its event manager once: that of the IOMMU where it is behind one.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }

    /// What reads and writes the file, to be added to the event manager of a thread once: a thread of its own, for it waits for the disk.
    #[must_use]
    pub fn file_subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worked.clone())
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            reads: read(&counters.reads),
            writes: read(&counters.writes),
            flushes: read(&counters.flushes),
            errors: read(&counters.errors),
        }
    }

    fn required(&self) -> u64 {
        if self.translated {
            F_ACCESS_PLATFORM
        } else {
            0
        }
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_type(&self) -> u16 {
        2
    }

    /// A mass storage controller of no other kind.
    fn pci_class(&self) -> u32 {
        0x01_8000
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let readonly = if self.readonly { F_RO } else { 0 };
        let rings = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;
        F_SIZE_MAX | F_SEG_MAX | F_FLUSH | readonly | rings | self.required()
    }

    fn accepts(&self, features: u64) -> bool {
        self.required() & !features == 0
    }

    /// VIRTIO 1.3, section 5.2.4.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_SIZE];
        config[0..8].copy_from_slice(&(self.size / SECTOR).to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        copy_config(&config, offset, data);
    }

    /// Nothing in it can be written with these features.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn bind(&self, transport: Weak<dyn Transport>) {
        self.shared.orders.bind(transport);
    }

    fn activate(&self, activation: Activation) {
        self.shared.orders.activate(activation);
    }

    fn reset(&self) {
        self.shared.orders.reset();
    }
}
