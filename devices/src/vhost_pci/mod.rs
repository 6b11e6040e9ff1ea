//! The vhost-pci device (docs/device.md): a virtio function whose BAR 2 shows the memory of another VM, so that this VM's
//! guest is the back-end of that VM's virtio device.
//!
//! * `backend`: what each vhost-user message does;
//! * `iotlb`: the front-end's translations;
//! * `misses`: accesses that wait for one;
//! * `doorbells`: how the peer's eventfds and memory reach the transport and the window;
//! * `records`: the second window, with the front-end's dirty log;
//! * `queues`: messages to and from the guest;
//! * `worker`: the device thread's part, which owns all of these.
//!
//! A vCPU only writes down what it wants (`Shared`) and wakes the device thread. It waits for nothing but a translation that it misses, and
//! that for a bounded time.

mod backend;
mod doorbells;
mod iotlb;
mod misses;
mod queues;
mod records;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use event_manager::MutEventSubscriber;
use log::info;
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Access, Files, Host, Window};
use crate::latency::{Latencies, Latency};
use crate::vhost_user::{Socket, SocketError, SocketRole};
use crate::virtio::{
    Activation, F_ACCESS_PLATFORM, SpecialQueues, Transport, VirtioDevice, copy_config, event,
};
use crate::virtio_iommu::Endpoint;

use doorbells::Plumbing;
use misses::Misses;
use records::Records;
use worker::Worker;

/// The virtio device type.
pub const DEVICE_TYPE: u16 = 61;
/// Entries of each control queue.
const QUEUE_SIZE: u16 = 256;
/// The first queue index behind `rxq` and `txq`.
const FIRST_SPECIAL: u16 = 2;
/// How many vhost-user queues a device can serve: as many as a message can name.
pub const MAX_QUEUES: u16 = 256;
const MIN_WINDOW: u64 = 4096;
/// [`VhostPciConfig::miss_timeout`] where nothing else is wanted.
pub const DEFAULT_MISS_TIMEOUT: Duration = Duration::from_millis(50);

/// Bit of the `status` field: the driver is ready for a front-end.
pub const BACKEND_UP: u32 = 1;
/// Bit of the `status` field: a front-end is connected.
pub const FRONTEND_UP: u32 = 2;

/// What a vhost-pci device is made of.
#[derive(Clone, Debug)]
pub struct VhostPciConfig {
    /// Where the front-end is met.
    pub socket: PathBuf,
    /// Who of the two makes the socket.
    pub role: SocketRole,
    /// Size of the window in bytes, a power of two.
    pub window: u64,
    /// How many vhost-user queue indices can be served, 1 to [`MAX_QUEUES`]: two for each pair of a network device.
    pub queues: u16,
    /// Identifies the device to its guest; zero where that is not wanted.
    pub uuid: [u8; 16],
    /// How long an access of the guest waits for the front-end to say where its address leads, before it is refused; zero: the front-end
    /// is never asked.
    pub miss_timeout: Duration,
    /// Which files of a front-end the window shows.
    pub files: Files,
    /// Whether the driver gets a place to record what is in flight where the next back-end finds it.
    pub inflight: bool,
    /// Whether the front-end may have what is written to its memory logged (VHOST_F_LOG_ALL), for live migration. Then it may not be behind an IOMMU.
    pub log: bool,
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The window's size.
    #[error("a window of {0:#x} bytes: the size must be a power of two and at least 4096")]
    WindowSize(u64),
    /// The number of queues.
    #[error("{0} queues: there must be at least 1 and at most {MAX_QUEUES}")]
    Queues(u16),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The host refused a resource.
    #[error("cannot make {0}: {1}")]
    Host(&'static str, #[source] io::Error),
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Guest reads from the window that were refused: it shows nothing there, or nothing to read.
    pub window_reads: u64,
    /// Guest writes to the window that were refused.
    pub window_writes: u64,
    /// Pages that front-ends were asked for (MISS).
    pub misses: u64,
    /// Accesses that waited for those and were let through.
    pub misses_answered: u64,
    /// Translations that came (UPDATE) and were taken.
    pub updates: u64,
    /// Revocations of translations (INVALIDATE) that were carried out.
    pub invalidates: u64,
    /// Translations that there are now.
    pub windows: u64,
    /// Calls of `Window::map`, for translations and memory tables.
    pub map: Latencies,
    /// Calls of `Window::unmap`.
    pub unmap: Latencies,
    /// Messages put on `rxq`.
    pub messages_to_guest: u64,
    /// Messages sent to front-ends, the device's own answers included.
    pub messages_to_peer: u64,
    /// Messages of the driver that went nowhere.
    pub dropped: u64,
    /// Front-ends that connected.
    pub connections: u64,
    /// Connections that ended with a fault of the front-end.
    pub peer_faults: u64,
}

#[derive(Default)]
struct Counters {
    window_reads: AtomicU64,
    window_writes: AtomicU64,
    misses: AtomicU64,
    misses_answered: AtomicU64,
    updates: AtomicU64,
    invalidates: AtomicU64,
    windows: AtomicU64,
    map: Latency,
    unmap: Latency,
    messages_to_guest: AtomicU64,
    messages_to_peer: AtomicU64,
    dropped: AtomicU64,
    connections: AtomicU64,
    peer_faults: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the guest did that the device thread has not seen yet.
#[derive(Default)]
struct Orders {
    /// Reset; what is activated after it is in `activation`.
    reset: bool,
    activation: Option<Activation>,
    /// BACKEND_UP was cleared, and perhaps set again.
    close: bool,
}

#[derive(Default)]
struct Guest {
    /// The `status` field.
    status: u32,
    orders: Orders,
}

/// What vCPUs and the device thread have in common.
struct Shared {
    guest: Mutex<Guest>,
    /// Wakes the device thread.
    wake: EventFd,
    transport: OnceLock<Weak<dyn Transport>>,
    misses: Misses,
    counters: Counters,
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn transport(&self) -> Option<Arc<dyn Transport>> {
        self.transport.get().and_then(Weak::upgrade)
    }
}

/// The device.
pub struct VhostPci {
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    window: Arc<dyn Window>,
    window_size: u64,
    /// The second window and its size.
    records: (u64, Arc<dyn Window>),
    queues: u16,
    uuid: [u8; 16],
    miss_timeout: Duration,
    /// The device's own addresses, those of the control queues, go through an IOMMU.
    translated: bool,
}

impl VhostPci {
    /// Makes the device and, where it listens, its socket. The window is cut to a quarter of the physical address space. Front-ends are
    /// served once [`VhostPci::subscriber`] is on an event loop.
    ///
    /// With an `endpoint`, the device is behind an IOMMU: its driver has to accept [`F_ACCESS_PLATFORM`], and its control queues lie at
    /// addresses that the endpoint translates. The event loop must be that of the IOMMU. The window is not affected: it is no access of
    /// the device.
    pub fn new(
        config: VhostPciConfig,
        endpoint: Option<Arc<Endpoint>>,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Error> {
        let VhostPciConfig {
            socket,
            role,
            window,
            queues,
            uuid,
            miss_timeout,
            files,
            inflight,
            log,
        } = config;
        if !window.is_power_of_two() || window < MIN_WINDOW {
            return Err(Error::WindowSize(window));
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(Error::Queues(queues));
        }
        let bits = u32::from(host.physical_address_bits())
            .saturating_sub(2)
            .clamp(12, 63);
        let window_size = window.min(1 << bits);
        if window_size < window {
            info!(
                "vhost-pci: a window of {window:#x} bytes is cut to {window_size:#x}, a quarter of the physical address space"
            );
        }
        let window = host
            .window(window_size, files)
            .map_err(|e| Error::Host("the window", e))?;
        let second = Records::new(host.clone(), window_size, inflight)
            .map_err(|e| Error::Host("the second window", e))?;
        let records = second.window();
        let shared = Arc::new(Shared {
            guest: Mutex::default(),
            wake: event::new().map_err(|e| Error::Host("an eventfd", e))?,
            transport: OnceLock::new(),
            misses: Misses::default(),
            counters: Counters::default(),
        });
        let socket = Socket::new(socket, role)?;
        let translated = endpoint.is_some();
        let plumbing = Plumbing::new(window.clone(), second, log, shared.clone(), queues);
        let worker = Worker::new(
            shared.clone(),
            host,
            endpoint,
            socket,
            plumbing,
            window_size,
            queues,
        )
        .map_err(|e| Error::Host("a timer", e))?;
        Ok(Arc::new(Self {
            shared,
            worker: Arc::new(Mutex::new(worker)),
            window,
            window_size,
            records,
            queues,
            uuid,
            miss_timeout,
            translated,
        }))
    }

    /// The device thread's part, to be put on exactly one event loop.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            window_reads: read(&counters.window_reads),
            window_writes: read(&counters.window_writes),
            misses: read(&counters.misses),
            misses_answered: read(&counters.misses_answered),
            updates: read(&counters.updates),
            invalidates: read(&counters.invalidates),
            windows: read(&counters.windows),
            map: counters.map.read(),
            unmap: counters.unmap.read(),
            messages_to_guest: read(&counters.messages_to_guest),
            messages_to_peer: read(&counters.messages_to_peer),
            dropped: read(&counters.dropped),
            connections: read(&counters.connections),
            peer_faults: read(&counters.peer_faults),
        }
    }

    fn wake(&self) {
        event::signal(&self.shared.wake);
    }

    /// Waits for the translation of an address that the window does not show for this access. Returns whether another try is worth
    /// it.
    fn miss(&self, offset: u64, len: usize, access: Access) -> bool {
        let range = offset..offset.saturating_add(len as u64);
        self.shared
            .misses
            .wait(range, access, self.miss_timeout, || self.wake())
    }
}

impl VirtioDevice for VhostPci {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        0xff_0000
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; FIRST_SPECIAL.into()]
    }

    fn features(&self) -> u64 {
        if self.translated {
            F_ACCESS_PLATFORM
        } else {
            0
        }
    }

    fn accepts(&self, features: u64) -> bool {
        features & F_ACCESS_PLATFORM != 0 || !self.translated
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut fields = [0; 24];
        fields[0..4].copy_from_slice(&self.shared.guest().status.to_le_bytes());
        fields[4..8].copy_from_slice(&u32::from(self.queues).to_le_bytes());
        fields[8..24].copy_from_slice(&self.uuid);
        copy_config(&fields, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let (0, Some(byte)) = (offset, data.first()) else {
            return;
        };
        let wanted = u32::from(*byte) & BACKEND_UP;
        let mut guest = self.shared.guest();
        if guest.status & BACKEND_UP == wanted {
            return;
        }
        guest.status ^= BACKEND_UP;
        guest.orders.close |= wanted == 0;
        drop(guest);
        self.wake();
    }

    fn bind(&self, transport: Weak<dyn Transport>) {
        // The transport binds once; a second one would find the first in place.
        let _ = self.shared.transport.set(transport);
    }

    fn activate(&self, activation: Activation) {
        self.shared.guest().orders.activation = Some(activation);
        self.wake();
    }

    fn reset(&self) {
        self.shared.guest().orders = Orders {
            reset: true,
            activation: None,
            close: false,
        };
        self.wake();
    }

    fn special_queues(&self) -> SpecialQueues {
        SpecialQueues {
            indices: 2 * self.queues,
            vectors: self.queues,
        }
    }

    fn windows(&self) -> Vec<(u64, Arc<dyn Window>)> {
        vec![
            (self.window_size, self.window.clone()),
            self.records.clone(),
        ]
    }

    fn window_read(&self, window: usize, offset: u64, data: &mut [u8]) {
        if window != 0 {
            if !self.records.1.read(offset, data) {
                data.fill(0xff);
            }
            return;
        }
        let allowed = self.window.read(offset, data)
            || self.miss(offset, data.len(), Access::Read) && self.window.read(offset, data);
        if !allowed {
            data.fill(0xff);
            count(&self.shared.counters.window_reads);
        }
    }

    fn window_write(&self, window: usize, offset: u64, data: &[u8]) {
        if window != 0 {
            self.records.1.write(offset, data);
            return;
        }
        let allowed = self.window.write(offset, data)
            || self.miss(offset, data.len(), Access::Write) && self.window.write(offset, data);
        if !allowed {
            count(&self.shared.counters.window_writes);
        }
    }
}
