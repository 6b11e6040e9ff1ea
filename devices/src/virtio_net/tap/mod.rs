//! The network device over a tap interface of the host: the two host paths that the window is compared with.
//!
//! Either a thread of the VMM serves the rings (`served.rs`: a read and a write of the tap a frame), or the host's kernel does (`kernel.rs`: vhost-net). To
//! `worker.rs`, which starts and stops queues as the driver wants it, both are an `Engine`.
//!
//! Checksums and segmentation are the tap's: a frame of up to 64 KiB goes through in one piece, its checksum still to be computed, and the header
//! in front of it says so (VIRTIO 1.3, section 5.1.6). What a guest says there is checked before the host's kernel gets to see it.
//!
//! The device uses guest physical addresses: it cannot be behind an IOMMU.

mod kernel;
mod memory;
mod port;
mod served;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use event_manager::{EventOps, MutEventSubscriber};
use thiserror::Error;
use virtqueue::net::{
    F_CSUM, F_GUEST_CSUM, GUEST_OFFLOADS, HOST_OFFLOADS, consistent, is_consistent,
};
use vmm_sys_util::eventfd::EventFd;

use super::rings::RingError;
use super::{CONFIG_SIZE, LINK_UP, Mailbox, OWN_FEATURES, QueueOrder, RingFeatures, TSO};
use crate::host::Host;
use crate::virtio::{
    Activation, F_VERSION_1, MAX_QUEUE_SIZE, QueueSetup, Transport, VirtioDevice, copy_config,
    event,
};
use kernel::Kernel;
use port::Port;
pub use port::{Error as TapError, is_interface_name};
use served::Served;
use worker::Worker;

/// What a tap does with frames.
const OFFLOADS: u64 = F_CSUM | F_GUEST_CSUM | TSO;

/// Who serves the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Server {
    /// A thread of the VMM.
    #[default]
    Thread,
    /// The host's kernel (/dev/vhost-net): split rings only.
    Kernel,
}

/// What the user decides.
#[derive(Clone, Debug)]
pub struct TapConfig {
    /// The interface: an existing tap, or one that is made and goes with the device. See [`is_interface_name`].
    pub name: String,
    /// Who serves the rings.
    pub server: Server,
    /// Maximum size of each queue, as [`NetConfig::queue_size`](super::NetConfig::queue_size).
    pub queue_size: u16,
    /// What the rings may be like.
    pub rings: RingFeatures,
    /// The device's Ethernet address.
    pub mac: [u8; 6],
}

/// Why there is no device.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel cannot serve the rings.
    #[error(
        "/dev/vhost-net: {0} (load the vhost_net module: modprobe vhost_net; without vhost=kernel the VMM serves the rings itself)"
    )]
    Vhost(#[source] vhost::Error),
    /// A size that no ring can have.
    #[error(
        "queue size {0}: from 1 to {MAX_QUEUE_SIZE}, and a power of two unless rings are packed"
    )]
    QueueSize(u16),
    /// The host gives no eventfd.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] io::Error),
}

/// Why rings are served no longer.
#[derive(Debug, Error)]
enum Fault {
    /// The driver set up what cannot be.
    #[error("the driver set up {0}")]
    Setup(#[from] RingError),
    /// The driver broke a rule of the rings.
    #[error("{0}")]
    Ring(#[from] virtqueue::Error),
    /// A buffer that the ring code found in memory is not there.
    #[error("a buffer is not in memory")]
    Buffer,
    /// The kernel does not take the rings.
    #[error("vhost-net: {0}")]
    Vhost(#[from] vhost::Error),
    /// The interface is gone, or fails.
    #[error("the tap fails: {0}")]
    Tap(#[source] io::Error),
}

/// Who moves the frames, once rings are there. The driver's features and rings have been checked.
trait Engine: Send {
    /// The features of rings that it knows, of [`RingFeatures`].
    fn ring_features(&self) -> u64;
    /// What was negotiated; no queue is started.
    fn configure(&mut self, features: u64) -> Result<(), Fault>;
    /// Starts a queue (0: to the guest, 1: from it) that is not started.
    fn start(&mut self, index: u16, queue: &QueueSetup, ops: &mut EventOps) -> Result<(), Fault>;
    /// Stops a queue; when it returns, nothing touches the ring or its buffers. Nothing happens where it is not started.
    fn stop(&mut self, index: u16, ops: &mut EventOps);
    /// Something that it watches, by the number it gave (not [`worker::WAKE`]), has happened.
    fn event(&mut self, what: u32, ops: &mut EventOps) -> Result<(), Fault>;
}

/// How much has gone through a device whose rings a thread of the VMM serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames from the guest that the host took.
    pub sent: u64,
    /// Frames to the guest.
    pub received: u64,
    /// Frames from the guest that were not sent: too short or too long, with a header that fits neither them nor the features, or
    /// refused by the host.
    pub sent_dropped: u64,
    /// Frames to the guest for which its buffers are too small.
    pub received_dropped: u64,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    sent_dropped: AtomicU64,
    received_dropped: AtomicU64,
}

/// What vCPU threads and the tap's thread have in common.
struct Shared {
    name: String,
    features: u64,
    link_up: AtomicBool,
    counters: Arc<Counters>,
    mailbox: Mutex<Mailbox>,
    wake: EventFd,
    transport: OnceLock<Weak<dyn Transport>>,
}

impl Shared {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn transport(&self) -> Option<Arc<dyn Transport>> {
        self.transport.get().and_then(Weak::upgrade)
    }

    fn order(&self, change: impl FnOnce(&mut Mailbox)) {
        change(&mut self.mailbox());
        event::signal(&self.wake);
    }
}

/// A virtio network device over a tap.
pub struct TapNet {
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    queue_size: u16,
    mac: [u8; 6],
}

impl TapNet {
    /// Opens or makes the tap. Nothing happens on it before a thread has the [`TapNet::subscriber`].
    pub fn new(config: TapConfig, host: Arc<dyn Host>) -> Result<Arc<Self>, Error> {
        let size = config.queue_size;
        let fits = (1..=MAX_QUEUE_SIZE).contains(&size);
        if !fits || !(config.rings.packed || size.is_power_of_two()) {
            return Err(Error::QueueSize(size));
        }
        let port = Port::open(&config.name)?;
        Self::with_port(config, port, host)
    }

    /// Over a descriptor that carries one frame a read and a write, in the place of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn over(
        config: TapConfig,
        fd: std::os::fd::OwnedFd,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Error> {
        Self::with_port(config, Port::stand_in(fd), host)
    }

    fn with_port(config: TapConfig, port: Port, host: Arc<dyn Host>) -> Result<Arc<Self>, Error> {
        let counters = Arc::<Counters>::default();
        let engine: Box<dyn Engine> = match config.server {
            Server::Thread => Box::new(Served::new(port, host.memory().clone(), counters.clone())),
            Server::Kernel => Box::new(Kernel::open(port, host.memory()).map_err(Error::Vhost)?),
        };
        let all = HOST_OFFLOADS | GUEST_OFFLOADS;
        let can = engine.ring_features() & !all | OFFLOADS;
        let offered = consistent(config.rings.bits() & can);
        let shared = Arc::new(Shared {
            name: config.name,
            features: offered | OWN_FEATURES | F_VERSION_1,
            link_up: AtomicBool::new(true),
            counters,
            mailbox: Mutex::default(),
            wake: event::new().map_err(Error::EventFd)?,
            transport: OnceLock::new(),
        });
        let worker = Worker::new(shared.clone(), host, engine, config.queue_size);
        Ok(Arc::new(Self {
            shared,
            worker: Arc::new(Mutex::new(worker)),
            queue_size: config.queue_size,
            mac: config.mac,
        }))
    }

    /// What serves the device, to be added to the event manager of a thread once: a thread of its own, for it moves frames.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }

    /// What has gone through; nothing with [`Server::Kernel`], which does not say.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        Stats {
            sent: counters.sent.load(Ordering::Relaxed),
            received: counters.received.load(Ordering::Relaxed),
            sent_dropped: counters.sent_dropped.load(Ordering::Relaxed),
            received_dropped: counters.received_dropped.load(Ordering::Relaxed),
        }
    }
}

impl VirtioDevice for TapNet {
    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        0x02_0000
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; 2]
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn accepts(&self, features: u64) -> bool {
        is_consistent(features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let up = self.shared.link_up.load(Ordering::Acquire);
        let status = if up { LINK_UP } else { 0 };
        let mut config = [0; CONFIG_SIZE];
        config[0..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        copy_config(&config, offset, data);
    }

    /// Nothing in the configuration can be written by a driver that accepted VERSION_1.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn bind(&self, transport: Weak<dyn Transport>) {
        // A device has one transport for life; the trait says that a second call does not come.
        let _ = self.shared.transport.set(transport);
    }

    fn activate(&self, activation: Activation) {
        self.shared.order(|mail| mail.activation = Some(activation));
    }

    fn reset(&self) {
        self.shared.order(|mail| {
            *mail = Mailbox {
                reset: true,
                ..Mailbox::default()
            };
        });
    }

    fn reset_queue(&self, index: u16) {
        self.shared
            .order(|mail| mail.queues.push(QueueOrder::Reset(index)));
    }

    fn enable_queue(&self, index: u16, queue: QueueSetup) {
        self.shared
            .order(|mail| mail.queues.push(QueueOrder::Enable(index, queue)));
    }
}
