//! A source of random numbers (VIRTIO 1.3, section 5.4): the host kernel's, by getrandom(2).
#![allow(unsafe_code)] // getrandom has no safe form

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{error, warn};
use thiserror::Error;

use crate::host::Host;
use crate::vhost_user::RateLimit;
use crate::virtio::{
    Activation, ControlRing, DeviceMemory, F_ACCESS_PLATFORM, F_VERSION_1, Orders, RingFault,
    Transport, VirtioDevice, event,
};
use crate::virtio_iommu::Endpoint;

/// VIRTIO_F_INDIRECT_DESC.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;

/// Size of the queue.
const QUEUE_SIZE: u16 = 64;
/// The most that one buffer gets, however long it is.
const MAX_BYTES: usize = 4096;
/// How many buffers one call fills before other devices on the thread have their turn.
const BUDGET: usize = 16;

// What an event is about.
const WAKE: u32 = 0;
const QUEUE: u32 = 1;

/// What only a reset mends.
#[derive(Debug, Error)]
enum Fault {
    #[error(transparent)]
    Ring(#[from] RingFault),
    #[error("a buffer is not in memory, or not mapped for this")]
    Buffer,
    #[error("getrandom: {0}")]
    Host(#[source] io::Error),
}

/// The device.
pub struct VirtioRng {
    orders: Arc<Orders>,
    worker: Arc<Mutex<Worker>>,
    /// VIRTIO_F_ACCESS_PLATFORM where it is behind an IOMMU.
    required: u64,
}

impl VirtioRng {
    /// Makes the device. Nothing happens on it before the device thread has the [`VirtioRng::subscriber`]. `endpoint` is what the device is to
    /// the IOMMU that it is behind, if any. Fails where the host gives no eventfd.
    pub fn new(endpoint: Option<Arc<Endpoint>>, host: Arc<dyn Host>) -> io::Result<Arc<Self>> {
        let orders = Arc::new(Orders::new()?);
        let required = endpoint.as_ref().map_or(0, |_| F_ACCESS_PLATFORM);
        let worker = Worker {
            orders: orders.clone(),
            host,
            endpoint,
            ring: None,
            limit: RateLimit::new(Duration::from_secs(1)),
        };
        Ok(Arc::new(Self {
            orders,
            worker: Arc::new(Mutex::new(worker)),
            required,
        }))
    }

    /// The device's part of the device thread, to be added to its event manager once: that of the IOMMU where it is behind one.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(self.worker.clone())
    }
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> u16 {
        4
    }

    /// A device of no class.
    fn pci_class(&self) -> u32 {
        0xff_0000
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | self.required
    }

    fn accepts(&self, features: u64) -> bool {
        self.required & !features == 0
    }

    /// There is none.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn bind(&self, transport: Weak<dyn Transport>) {
        self.orders.bind(transport);
    }

    fn activate(&self, activation: Activation) {
        self.orders.activate(activation);
    }

    fn reset(&self) {
        self.orders.reset();
    }
}

/// The device thread's part.
struct Worker {
    orders: Arc<Orders>,
    host: Arc<dyn Host>,
    endpoint: Option<Arc<Endpoint>>,
    ring: Option<ControlRing>,
    limit: RateLimit,
}

impl Worker {
    fn watch(fd: &impl AsRawFd, what: u32, ops: &mut EventOps) {
        let events = Events::with_data_raw(fd.as_raw_fd(), what, EventSet::IN);
        if let Err(error) = ops.add(events) {
            error!("virtio-rng: cannot watch a descriptor: {error}");
        }
    }

    fn orders(&mut self, ops: &mut EventOps) -> Result<(), Fault> {
        let order = self.orders.take();
        if order.reset {
            self.stop(ops);
            if let Some(transport) = self.orders.transport() {
                transport.reset_done();
            }
        }
        if let Some(activation) = order.activation {
            let memory = DeviceMemory::new(self.host.memory(), self.endpoint.as_deref());
            let event_idx = activation.features & F_EVENT_IDX != 0;
            let setup = activation.queues.first();
            let ring = ControlRing::new("requestq", setup, QUEUE_SIZE, event_idx, &memory)?;
            Self::watch(ring.kick(), QUEUE, ops);
            self.ring = Some(ring);
        }
        Ok(())
    }

    fn stop(&mut self, ops: &mut EventOps) {
        if let Some(ring) = self.ring.take()
            && let Err(error) = ops.remove(Events::empty(ring.kick()))
        {
            error!("virtio-rng: cannot forget a descriptor: {error}");
        }
    }

    /// Fills a bounded number of buffers.
    fn serve(&mut self) -> Result<(), Fault> {
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        let memory = DeviceMemory::new(self.host.memory(), self.endpoint.as_deref());
        let (mut left, mut used) = (BUDGET, false);
        while left > 0 {
            left -= 1;
            let chain = match ring.take(&memory)? {
                Some(chain) => chain,
                None if ring.listen(&memory)? => continue,
                None => break,
            };
            let mut bytes = [0; MAX_BYTES];
            let wanted = chain.writable().min(MAX_BYTES);
            let got = random(&mut bytes[..wanted]).map_err(Fault::Host)?;
            if !chain.write(&memory, 0, &bytes[..got]) {
                return Err(Fault::Buffer);
            }
            // At most `MAX_BYTES`.
            let written = u32::try_from(got).unwrap_or(0);
            ring.put(&memory, chain.head(), written)?;
            used = true;
        }
        if left == 0 {
            event::signal(ring.kick());
        }
        if used {
            ring.tell(&memory)?;
        }
        Ok(memory.check("requestq")?)
    }

    fn broken(&mut self, fault: &Fault, ops: &mut EventOps) {
        if self.limit.allow(Instant::now()).is_some() {
            warn!("virtio-rng: the driver has to reset the device: {fault}");
        }
        self.stop(ops);
        if let Some(transport) = self.orders.transport() {
            transport.set_needs_reset();
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        Self::watch(self.orders.wake(), WAKE, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match (events.data(), &self.ring) {
            (WAKE, _) => event::clear(self.orders.wake()),
            (_, Some(ring)) => event::clear(ring.kick()),
            (_, None) => {}
        }
        let result = self.orders(ops).and_then(|()| self.serve());
        if let Err(fault) = result {
            self.broken(&fault, ops);
        }
    }
}

/// Random bytes of the kernel's; returns how many, which are all but where a signal came.
fn random(to: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer can be written for as long as it says, and outlives the call.
    let got = unsafe { libc::getrandom(to.as_mut_ptr().cast(), to.len(), 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
