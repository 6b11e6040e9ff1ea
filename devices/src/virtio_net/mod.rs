//! The network device of the front-end VM (VIRTIO 1.3, section 5.1), with its data path in another process.
//!
//! [`VirtioNet`] is what the guest sees; its packets are moved by a vhost-user back-end, which gets the guest's memory, the
//! addresses of the rings and two eventfds a ring. From then on the VMM is not in the way.
//!
//! * What the guest does arrives on vCPU threads, is noted, and wakes the device thread.
//! * Everything else happens on the device thread, in `worker.rs`: connecting, the protocol, losing a back-end and starting
//!   over with the next.
//!
//! A back-end that was cut off keeps what it was given: plain vhost-user cannot take shared memory back from a process.
//!
//! # Losing a back-end
//!
//! Split rings say how far they have been used, so the next back-end goes on there. Packed rings do not: where the last back-end
//! stood was known to it alone. So the device then sets DEVICE_NEEDS_RESET, unless the driver had not put anything into the
//! rings yet; and the link is down until the driver has reset the device, whoever comes.
//!
//! # Resetting a queue
//!
//! VIRTIO_F_RING_RESET (VIRTIO 1.3, section 2.6.1) is offered with any back-end, because it takes no more than ordinary vhost-user:
//! SET_VRING_ENABLE 0 and GET_VRING_BASE stop the vring, and what starts a vring starts it again. A back-end that does not answer
//! within a second is cut off, and then the reset is complete too.
//!
//! # Several queue pairs
//!
//! With [`NetConfig::queue_pairs`] above 1, VIRTIO_NET_F_MQ and a control queue (`control.rs`) are offered where the back-end offers VIRTIO_NET_F_MQ and
//! serves that many pairs (VHOST_USER_PROTOCOL_F_MQ, GET_QUEUE_NUM); otherwise one pair is. All rings that the driver enabled are started;
//! the pairs in use are enabled (SET_VRING_ENABLE). The driver's command to use more or fewer is complete when the back-end has acknowledged
//! the change, so that nothing is put into a ring that is out of use (VIRTIO 1.3, section 5.1.6.5.6).
//!
//! Which pair a received frame comes in on is the back-end's choice, unless it takes the driver's key and indirection table. vhost-user has no message for those; with a back-end that knows ours
//! (SET_RSS, docs/device.md, section 7) VIRTIO_NET_F_RSS is offered.
//!
//! # Checksums and segmentation
//!
//! They are the driver's and the back-end's matter: what both have is offered and handed on in SET_FEATURES, and the device sees no frame.
//!
//! # Behind a vIOMMU
//!
//! Given an [`Endpoint`], the device offers VIRTIO_F_ACCESS_PLATFORM and insists on it, towards the driver and the back-end. It hands its
//! address space on to the back-end, so it follows the endpoint (`iotlb.rs`): from the first start of the rings to the end of the connection,
//! resets of the device included, since the back-end holds what it was told until it is told otherwise. A back-end that does not
//! acknowledge a change within [`NetConfig::iotlb_timeout`], or refuses one, is cut off; then the guest's requests are complete.

mod control;
mod iotlb;
mod names;
mod pairs;
mod rings;
pub mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use event_manager::MutEventSubscriber;
use thiserror::Error;
use virtqueue::net::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_USO4, F_GUEST_USO6, F_HOST_TSO4,
    F_HOST_TSO6, F_HOST_USO, consistent, is_consistent,
};
use virtqueue::rss;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::host::Host;
use crate::vhost_user::{Socket, SocketError, SocketRole};
use crate::virtio::{
    Activation, F_ACCESS_PLATFORM, F_RING_PACKED, F_RING_RESET, F_VERSION_1, MAX_QUEUE_SIZE,
    QueueSetup, Transport, VirtioDevice, copy_config, event,
};
use crate::virtio_iommu::Endpoint;
pub use iotlb::Stats;
use iotlb::{Counters, Follower};
use worker::Worker;

/// VIRTIO_NET_F_MAC: the configuration has the address.
const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_MRG_RXBUF.
const F_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_STATUS: the configuration has the link status.
const F_STATUS: u64 = 1 << 16;
/// VIRTIO_NET_F_CTRL_VQ: there is a control queue.
const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_MQ: there are several queue pairs.
const F_MQ: u64 = 1 << 22;
/// VIRTIO_NET_F_RSS: received frames are steered as the driver says.
const F_RSS: u64 = 1 << 60;
/// Both directions of TCP segmentation.
const TSO: u64 = F_HOST_TSO4 | F_HOST_TSO6 | F_GUEST_TSO4 | F_GUEST_TSO6;
/// VIRTIO_F_INDIRECT_DESC.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_IN_ORDER.
const F_IN_ORDER: u64 = 1 << 35;

/// What this device answers for itself, whatever the back-end offers.
const OWN_FEATURES: u64 = F_MAC | F_STATUS | F_RING_RESET;
/// The same, and what it answers for where it has several pairs.
const OWN_FEATURES_MQ: u64 = OWN_FEATURES | F_CTRL_VQ;

/// What a configuration for RSS may have, at most.
#[allow(clippy::cast_possible_truncation, reason = "40 and 128")]
const RSS_MAX_KEY: u8 = rss::MAX_KEY as u8;
#[allow(clippy::cast_possible_truncation, reason = "40 and 128")]
const RSS_MAX_TABLE: u16 = rss::MAX_TABLE as u16;

/// The most queue pairs that a device can have.
pub const MAX_QUEUE_PAIRS: u16 = 16;

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// Length of the device configuration: mac, status, max_virtqueue_pairs.
const CONFIG_SIZE: usize = 10;
/// The same with what follows where there may be several pairs: mtu, speed and duplex, which are not used, rss_max_key_size, rss_max_indirection_table_length, supported_hash_types.
const CONFIG_SIZE_RSS: usize = 24;

/// Which features of rings and frames the driver is offered where the back-end offers them. One that needs another (VIRTIO 1.3, section 5.1.3.1) is
/// not offered without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_RING_PACKED: packed rings in place of split ones.
    pub packed: bool,
    /// VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available.
    pub in_order: bool,
    /// VIRTIO_F_EVENT_IDX: each side says at which buffer it wants the next notification.
    pub event_idx: bool,
    /// VIRTIO_NET_F_MRG_RXBUF: a frame may fill several rx buffers.
    pub mrg_rxbuf: bool,
    /// VIRTIO_F_INDIRECT_DESC: a descriptor may refer to a table of descriptors.
    pub indirect: bool,
    /// VIRTIO_NET_F_CSUM and VIRTIO_NET_F_GUEST_CSUM: either side may leave checksums to the other.
    pub csum: bool,
    /// VIRTIO_NET_F_HOST_TSO4, TSO6, and those of the guest: and the segmentation of TCP.
    pub tso: bool,
    /// VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4 and USO6: and that of UDP.
    pub uso: bool,
}

impl Default for RingFeatures {
    /// Split rings, with everything else.
    fn default() -> Self {
        Self {
            packed: false,
            in_order: true,
            event_idx: true,
            mrg_rxbuf: true,
            indirect: true,
            csum: true,
            tso: true,
            uso: true,
        }
    }
}

impl RingFeatures {
    /// As feature bits.
    fn bits(self) -> u64 {
        let bits = [
            (self.packed, F_RING_PACKED),
            (self.in_order, F_IN_ORDER),
            (self.event_idx, F_EVENT_IDX),
            (self.mrg_rxbuf, F_MRG_RXBUF),
            (self.indirect, F_INDIRECT_DESC),
            (self.csum, F_CSUM | F_GUEST_CSUM),
            (self.tso, TSO),
            (self.uso, F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6),
        ];
        let on = bits.iter().filter(|(on, _)| *on);
        on.fold(0, |all, (_, bit)| all | bit)
    }
}

/// What the user decides.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Where the back-end is met.
    pub socket: PathBuf,
    /// Who makes the connection.
    pub role: SocketRole,
    /// Number of rx/tx queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Maximum size of each queue, in descriptors: 1 to [`MAX_QUEUE_SIZE`], and a power of two unless `rings.packed`. (With that, a
    /// driver that has split rings all the same is shown the power of two below.)
    pub queue_size: u16,
    /// What the rings may be like.
    pub rings: RingFeatures,
    /// The device's Ethernet address.
    pub mac: [u8; 6],
    /// How long a back-end may take to acknowledge a change of translations before it is cut off; see [`DEFAULT_IOTLB_TIMEOUT`]. Means
    /// something behind an IOMMU only.
    pub iotlb_timeout: Duration,
}

/// What [`NetConfig::iotlb_timeout`] is where the user has no wish.
pub const DEFAULT_IOTLB_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no device. All of it is the host's or its user's doing.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket cannot be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No pair, or too many.
    #[error("{0} queue pairs: a network device has 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs(u16),
    /// A size that no ring can have.
    #[error(
        "queue size {0}: from 1 to {MAX_QUEUE_SIZE}, and a power of two unless rings are packed"
    )]
    QueueSize(u16),
    /// The host gives no eventfd.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// The host gives no timer.
    #[error("cannot make a timer: {0}")]
    Timer(#[source] errno::Error),
}

/// What is to happen to one queue.
enum QueueOrder {
    Reset(u16),
    Enable(u16, QueueSetup),
}

/// What vCPU threads want of the device thread.
#[derive(Default)]
struct Mailbox {
    /// Stop everything; what was activated before is void.
    reset: bool,
    /// Start with this, after the reset where there is one.
    activation: Option<Activation>,
    /// Then do these. The transport waits for the end of one queue reset before it asks for the next of that queue, so that
    /// there are at most two orders a queue.
    queues: Vec<QueueOrder>,
}

/// What both sides of the device, vCPU threads and the device thread, have in common.
struct Shared {
    rings: RingFeatures,
    pairs: u16,
    features: AtomicU64,
    /// What driver and back-end must have, whatever else: ACCESS_PLATFORM behind an IOMMU.
    required: u64,
    link_up: AtomicBool,
    counters: Counters,
    mailbox: Mutex<Mailbox>,
    wake: EventFd,
    ready: EventFd,
    transport: OnceLock<Weak<dyn Transport>>,
}

impl Shared {
    /// The features that a driver is offered with a back-end that offers `backend`.
    fn offered(&self, backend: u64) -> u64 {
        let pairs = if backend & F_MQ != 0 && self.pairs > 1 {
            F_MQ | F_CTRL_VQ | backend & F_RSS
        } else {
            0
        };
        consistent(backend & self.rings.bits()) | pairs | OWN_FEATURES | F_VERSION_1 | self.required
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn transport(&self) -> Option<Arc<dyn Transport>> {
        self.transport.get().and_then(Weak::upgrade)
    }

    fn wake(&self) {
        // Fails only where the counter is full; then the thread is as awake as it can be.
        let _ = self.wake.write(1);
    }
}

/// A virtio network device whose data path is a vhost-user back-end.
pub struct VirtioNet {
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    queue_size: u16,
    mac: [u8; 6],
}

impl VirtioNet {
    /// Makes the device and, for [`SocketRole::Listen`], its socket. Nothing happens on it before the device thread has the
    /// [`VirtioNet::subscriber`]. `endpoint` is what the device is to the IOMMU that it is behind, if any; nobody else may follow it.
    pub fn new(
        config: NetConfig,
        endpoint: Option<Arc<Endpoint>>,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Error> {
        let pairs = config.queue_pairs;
        if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
            return Err(Error::QueuePairs(pairs));
        }
        let (size, rings) = (config.queue_size, config.rings);
        let fits = (1..=MAX_QUEUE_SIZE).contains(&size);
        if !fits || !(rings.packed || size.is_power_of_two()) {
            return Err(Error::QueueSize(size));
        }
        let required = endpoint.as_ref().map_or(0, |_| F_ACCESS_PLATFORM);
        let shared = Shared {
            rings,
            pairs,
            features: AtomicU64::default(),
            required,
            link_up: AtomicBool::new(false),
            counters: Counters::default(),
            mailbox: Mutex::default(),
            wake: event::new().map_err(Error::EventFd)?,
            ready: event::new().map_err(Error::EventFd)?,
            transport: OnceLock::new(),
        };
        let none = shared.offered(0);
        shared.features.store(none, Ordering::Release);
        let shared = Arc::new(shared);
        let follower = endpoint.map(|endpoint| Follower::new(endpoint, config.iotlb_timeout));
        let follower = follower.transpose().map_err(Error::Timer)?;
        let socket = Socket::new(config.socket, config.role)?;
        let worker =
            Worker::new(shared.clone(), host, socket, follower, size).map_err(Error::Timer)?;
        Ok(Arc::new(Self {
            shared,
            worker: Arc::new(Mutex::new(worker)),
            queue_size: size,
            mac: config.mac,
        }))
    }

    /// The device's part of the device thread, to be added to its event manager once.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }

    /// Signalled when a handshake with a back-end is done. The guest must not run before the first: its driver is to see what the
    /// back-end offers.
    #[must_use]
    pub fn ready(&self) -> &EventFd {
        &self.shared.ready
    }

    /// What has happened so far between the device and its back-ends on behalf of the IOMMU.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.counters.stats()
    }

    /// The device configuration as it is now (VIRTIO 1.3, section 5.1.4).
    fn config(&self) -> [u8; CONFIG_SIZE_RSS] {
        let status = if self.shared.link_up.load(Ordering::Acquire) {
            LINK_UP
        } else {
            0
        };
        let mut config = [0; CONFIG_SIZE_RSS];
        config[0..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.shared.pairs.to_le_bytes());
        config[17] = RSS_MAX_KEY;
        config[18..20].copy_from_slice(&RSS_MAX_TABLE.to_le_bytes());
        config[20..24].copy_from_slice(&rss::types::ALL.to_le_bytes());
        config
    }
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        0x02_0000
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let queues = match self.shared.pairs {
            1 => 2,
            pairs => 2 * usize::from(pairs) + 1,
        };
        vec![self.queue_size; queues]
    }

    fn features(&self) -> u64 {
        self.shared.features.load(Ordering::Acquire)
    }

    fn accepts(&self, features: u64) -> bool {
        self.shared.required & !features == 0 && is_consistent(features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let len = match self.shared.pairs {
            1 => CONFIG_SIZE,
            _ => CONFIG_SIZE_RSS,
        };
        copy_config(&config[..len], offset, data);
    }

    /// Nothing in the configuration can be written by a driver that accepted VERSION_1.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn bind(&self, transport: Weak<dyn Transport>) {
        // A device has one transport for life; the trait says that a second call does not come.
        let _ = self.shared.transport.set(transport);
    }

    fn activate(&self, activation: Activation) {
        self.shared.mailbox().activation = Some(activation);
        self.shared.wake();
    }

    fn reset(&self) {
        *self.shared.mailbox() = Mailbox {
            reset: true,
            ..Mailbox::default()
        };
        self.shared.wake();
    }

    fn reset_queue(&self, index: u16) {
        self.shared.mailbox().queues.push(QueueOrder::Reset(index));
        self.shared.wake();
    }

    fn enable_queue(&self, index: u16, queue: QueueSetup) {
        let order = QueueOrder::Enable(index, queue);
        self.shared.mailbox().queues.push(order);
        self.shared.wake();
    }
}
