//! The virtio-net driver (VIRTIO 1.3, section 5.1): one queue pair, a frame to a buffer.
//!
//! Unsafe code: buffers are reached by address. Each block stands on the one check that [`NetPort::new`] makes of the whole pool.
#![allow(unsafe_code)]

use alloc::vec;
use alloc::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::net::{F_MAC, F_STATUS, HEADER_LEN, features};
use virtqueue::{Buffer, DriverRing, Used, split};

use crate::Platform;
use crate::pci::Function;
use crate::port::{Frame, MAX_BURST, MAX_FRAME, Port, Slot};
use crate::virtio_pci::{Doorbell, Error, Notify, Transport};

/// Device type of virtio-net.
pub const DEVICE_TYPE: u16 = 1;
/// Offset of le16 `status` in the device configuration.
const CONFIG_STATUS: usize = 6;
const STATUS_LINK_UP: u16 = 1;

/// Bytes from one buffer to the next: room for header and frame, and an odd number of cache lines, so that the starts of
/// a ring's buffers spread over all sets of the caches.
pub const BUFFER_STRIDE: usize = 25 * 64;
const BUFFER_LEN: usize = HEADER_LEN + MAX_FRAME;
const _: () = assert!(BUFFER_LEN <= BUFFER_STRIDE);
const BUFFER_LEN_32: u32 = 1530;
const _: () = assert!(BUFFER_LEN_32 as usize == BUFFER_LEN);

/// The features that this driver can use, beside VERSION_1, which it needs.
const USABLE: u64 = features::VERSION_1 | features::EVENT_IDX | F_MAC | F_STATUS;

/// The driver of a virtio-net device.
#[derive(Debug)]
pub struct NetDevice {
    transport: Transport,
    features: u64,
    /// The data path.
    pub port: NetPort<split::Driver<Linear>, Doorbell>,
}

impl NetDevice {
    /// Sets the device up, with rings of at most `queue_size`, and starts it.
    ///
    /// `memory` is how the driver reaches the memory that [`Platform::dma`] gives, by device address.
    pub fn new<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let transport = Transport::new(platform, function)?;
        let features = transport.negotiate(|offered| {
            (offered & features::VERSION_1 != 0).then_some(offered & USABLE)
        })?;
        let ring = |index| {
            let mut config = transport.add_queue(platform, index, queue_size)?;
            config.event_idx = features & features::EVENT_IDX != 0;
            let pool = platform
                .dma(usize::from(config.size) * BUFFER_STRIDE, 64)
                .ok_or(Error::Memory)?;
            let ring = split::Driver::new(memory, &config)?;
            Ok::<_, Error>((ring, pool.addr, transport.doorbell(index)?))
        };
        let (rx, rx_pool, rx_doorbell) = ring(0)?;
        let (tx, tx_pool, tx_doorbell) = ring(1)?;
        let mut port = NetPort::new(
            memory,
            (rx, rx_pool, rx_doorbell),
            (tx, tx_pool, tx_doorbell),
        )?;
        transport.start();
        port.fill();
        Ok(Self {
            transport,
            features,
            port,
        })
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the back-end is there. Reading it leaves the guest: to be asked when the configuration changed.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.features & F_STATUS == 0
            || self.transport.device().read_u16(CONFIG_STATUS) & STATUS_LINK_UP != 0
    }
}

/// One direction of the data path.
#[derive(Debug)]
struct Half<D, N> {
    ring: D,
    doorbell: N,
    /// Device address and mapped address of the first buffer.
    addr: u64,
    ptr: *mut u8,
    /// Which buffer a descriptor id stands for while it is with the device.
    buffer_of: Vec<u16>,
}

impl<D: DriverRing, N: Notify> Half<D, N> {
    fn new(memory: Linear, (ring, addr, doorbell): (D, u64, N)) -> Result<Self, Error> {
        let buffers = usize::from(ring.free());
        let ptr = memory
            .ptr(addr, buffers * BUFFER_STRIDE)
            .ok_or(Error::Memory)?;
        Ok(Self {
            ring,
            doorbell,
            addr,
            ptr,
            buffer_of: vec![0; buffers],
        })
    }

    /// Where a buffer is.
    #[inline(always)]
    fn ptr(&self, buffer: u16) -> *mut u8 {
        // SAFETY: buffer numbers are below `buffer_of.len()`, and the pool of that many was checked in `new`.
        unsafe { self.ptr.add(usize::from(buffer) * BUFFER_STRIDE) }
    }

    /// Gives a buffer to the device; `false` where the ring is full.
    #[inline(always)]
    fn add(&mut self, buffer: u16, len: u32, device_writes: bool) -> bool {
        let addr = self.addr + u64::from(buffer) * BUFFER_STRIDE as u64;
        let id = self.ring.add(&[Buffer {
            addr,
            len,
            device_writes,
        }]);
        match id.and_then(|id| self.buffer_of.get_mut(usize::from(id))) {
            Some(slot) => {
                *slot = buffer;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.ring.publish() {
            self.doorbell.notify();
        }
    }
}

/// The data path of a virtio-net driver: buffers of [`BUFFER_STRIDE`] bytes, as many as the ring has descriptors.
#[derive(Debug)]
pub struct NetPort<D, N> {
    rx: Half<D, N>,
    tx: Half<D, N>,
    /// Transmit buffers that are not with the device.
    tx_free: Vec<u16>,
    used: [Used; MAX_BURST],
}

// SAFETY: the pointers are into memory that belongs to no thread; the port is used by one at a time.
unsafe impl<D: Send, N: Send> Send for NetPort<D, N> {}

impl<D: DriverRing, N: Notify> NetPort<D, N> {
    /// A data path over two empty rings, each with the device address of its pool (ring size times [`BUFFER_STRIDE`] zeroed
    /// bytes that nobody else uses) and its notification.
    pub fn new(memory: Linear, rx: (D, u64, N), tx: (D, u64, N)) -> Result<Self, Error> {
        let (rx, tx) = (Half::new(memory, rx)?, Half::new(memory, tx)?);
        let tx_free = (0..tx.ring.free()).collect();
        let mut port = Self {
            rx,
            tx,
            tx_free,
            used: [Used::default(); MAX_BURST],
        };
        port.disarm();
        Ok(port)
    }

    /// Gives all receive buffers to the device.
    pub fn fill(&mut self) {
        for buffer in 0..self.rx.ring.free() {
            self.rx.add(buffer, BUFFER_LEN_32, true);
        }
        self.rx.publish();
    }

    /// Takes back the transmit buffers that the device is done with.
    #[inline(always)]
    fn reclaim(&mut self) -> Result<(), virtqueue::Error> {
        let n = self.tx.ring.take(&mut self.used)?;
        for used in self.used.iter().take(n) {
            if let Some(&buffer) = self.tx.buffer_of.get(usize::from(used.id)) {
                self.tx_free.push(buffer);
            }
        }
        Ok(())
    }
}

impl<D: DriverRing, N: Notify> Port for NetPort<D, N> {
    #[inline(always)]
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, virtqueue::Error> {
        let len = len.min(MAX_FRAME);
        if self.tx_free.len() < count {
            self.reclaim()?;
        }
        let mut sent = 0;
        while sent < count {
            let Some(buffer) = self.tx_free.pop() else {
                break;
            };
            // The header in front stays as the pool came: all zero, no offload. (num_buffers is the receiver's business.)
            // SAFETY: header and frame fit in the buffer, which is not with the device.
            let mut slot = unsafe { Slot::new(self.tx.ptr(buffer).add(HEADER_LEN), len) };
            build(sent, &mut slot);
            if !self
                .tx
                .add(buffer, u32::try_from(HEADER_LEN + len).unwrap_or(0), false)
            {
                self.tx_free.push(buffer);
                break;
            }
            sent += 1;
        }
        if sent > 0 {
            self.tx.publish();
        }
        Ok(sent)
    }

    #[inline(always)]
    fn rx_burst(
        &mut self,
        count: usize,
        mut receive: impl FnMut(&Frame),
    ) -> Result<usize, virtqueue::Error> {
        let n = self.rx.ring.take(&mut self.used[..count.min(MAX_BURST)])?;
        if n == 0 {
            return Ok(0);
        }
        for i in 0..n {
            let used = self.used[i];
            let buffer = self
                .rx
                .buffer_of
                .get(usize::from(used.id))
                .copied()
                .unwrap_or(0);
            // What is shorter than a header is no frame: an empty one is shown.
            let len = (used.len as usize).clamp(HEADER_LEN, BUFFER_LEN) - HEADER_LEN;
            // SAFETY: header and frame fit in the buffer.
            receive(&unsafe { Frame::new(self.rx.ptr(buffer).add(HEADER_LEN), len) });
            self.rx.add(buffer, BUFFER_LEN_32, true);
        }
        self.rx.publish();
        Ok(n)
    }

    fn drained(&mut self) -> Result<bool, virtqueue::Error> {
        self.reclaim()?;
        Ok(self.tx_free.len() == self.tx.buffer_of.len())
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        let rx = rx && self.rx.ring.enable_calls();
        let tx = tx && self.tx.ring.enable_calls();
        rx || tx
    }

    fn disarm(&mut self) {
        self.rx.ring.disable_calls();
        self.tx.ring.disable_calls();
    }
}
