//! What a virtio device is to its transport, and the transport to a device.
//!
//! A device implements [`VirtioDevice`]; [`VirtioPci`] makes a PCI function of it. Calls into the device come
//! from vCPU threads and must not block; calls into the [`Transport`] may come from any thread, also from inside
//! a call into the device.

mod common;
mod control_queue;
pub mod event;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code))] // the fuzz bodies use a part of it
pub(crate) mod harness;
mod memory;
mod orders;
mod pci;
#[cfg(test)]
mod tests;
mod wiring;

use std::io;
use std::sync::{Arc, Weak};

use vmm_sys_util::eventfd::EventFd;

use crate::host::Window;

pub(crate) use control_queue::{Chain, ControlRing, RingFault, control_queue};
pub(crate) use memory::DeviceMemory;
pub(crate) use orders::Orders;
pub use pci::{Error, VirtioPci};

/// VIRTIO_F_VERSION_1: every device offers it and every driver has to accept it.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_ACCESS_PLATFORM: the device is behind an IOMMU, its addresses are IO virtual (VIRTIO 1.3, section 6).
pub const F_ACCESS_PLATFORM: u64 = 1 << 33;
/// VIRTIO_F_RING_PACKED: rings have the packed layout (VIRTIO 1.3, section 2.8).
pub const F_RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_RING_RESET: the driver may reset queues one by one (VIRTIO 1.3, section 2.6.1).
pub const F_RING_RESET: u64 = 1 << 40;

/// The longest ring that there is, in descriptors (VIRTIO 1.3, sections 2.7 and 2.8.10.1).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Bits of `device_status` (VIRTIO 1.3, section 2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready: the device is live.
    pub const DRIVER_OK: u8 = 4;
    /// The features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that only a reset mends.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// One virtqueue as its driver set it up (VIRTIO 1.3, section 4.1.4.3).
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// Number of descriptors, from 1 to what [`VirtioDevice::queue_sizes`] says; a power of two unless
    /// [`F_RING_PACKED`] was accepted.
    pub size: u16,
    /// Guest physical address of the descriptor area.
    pub desc: u64,
    /// Guest physical address of the driver area.
    pub driver: u64,
    /// Guest physical address of the device area.
    pub device: u64,
    /// Whether the driver enabled the queue; the other fields mean nothing where it did not.
    pub enabled: bool,
    /// Signalled by the driver's notification; the transport registers it.
    pub kick: Arc<EventFd>,
    /// Raises the queue's MSI-X vector when signalled; it follows the vector when the driver moves it.
    pub call: Arc<EventFd>,
}

/// What the driver and the device agreed on when DRIVER_OK was written.
#[derive(Clone, Debug)]
pub struct Activation {
    /// The accepted feature bits; a subset of [`VirtioDevice::features`] and VERSION_1.
    pub features: u64,
    /// One entry for each of [`VirtioDevice::queue_sizes`].
    pub queues: Vec<QueueSetup>,
}

/// Queue indices behind the virtqueues that exist as notification addresses and as `queue_select` values,
/// but have no ring (vhost-pci: doorbells and kicks).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialQueues {
    /// How many indices there are; the first is `queue_sizes().len()`.
    pub indices: u16,
    /// How many MSI-X vectors to offer for them, beyond one for each virtqueue and one for the configuration.
    pub vectors: u16,
}

/// What the transport lets a device do to it, from any thread.
pub trait Transport: Send + Sync {
    /// The device configuration has changed: bumps `config_generation`, sets the ISR bit, raises the
    /// configuration vector.
    fn config_changed(&self);
    /// Sets DEVICE_NEEDS_RESET, and raises the configuration vector if DRIVER_OK is set.
    fn set_needs_reset(&self);
    /// The reset that [`VirtioDevice::reset`] asked for is complete: `device_status` reads 0.
    fn reset_done(&self);
    /// The reset that [`VirtioDevice::reset_queue`] asked for is complete: `queue_reset` and `queue_enable` of the queue
    /// read 0. Nothing happens where none was asked for.
    fn queue_reset_done(&self, index: u16);
    /// A guest write to the notify address of special index `index` signals `event`; `None` takes that back.
    /// A signal that was on its way when the eventfd was replaced goes to the new one.
    ///
    /// Fails for an index that is not special, and where the host refuses the eventfd (then nothing is registered).
    fn set_doorbell(&self, index: u16, event: Option<Arc<EventFd>>) -> io::Result<()> {
        let _ = (index, event);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// `event` raises the MSI-X vector that the driver chose for special index `index`, now or later; `None` takes
    /// that back. What is signalled while no vector is chosen stays in the eventfd.
    ///
    /// Fails for an index that is not special, and where the host refuses the eventfd (then nothing is attached).
    fn set_kick(&self, index: u16, event: Option<Arc<EventFd>>) -> io::Result<()> {
        let _ = (index, event);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Answers a read of a device's configuration: bytes behind its end stay as they are.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let there = config.get(start..).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(there) {
        *to = *from;
    }
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send + Sync {
    /// The virtio device type (VIRTIO 1.3, section 5).
    fn device_type(&self) -> u16;
    /// The PCI class code: 24 bits, for example 0x020000.
    fn pci_class(&self) -> u32;
    /// The maximum size of each queue, at most [`MAX_QUEUE_SIZE`]. One that is no power of two is shown to a driver of split
    /// rings as the next one below.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The feature bits that are offered; the transport adds VERSION_1.
    fn features(&self) -> u64;
    /// Whether the device can work with these features (those that were not offered are refused anyway): where not, FEATURES_OK stays clear
    /// (VIRTIO 1.3, section 2.2.2). Must not block.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }
    /// Reads the device configuration. Bytes beyond it are left as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device configuration. Bytes that cannot be written are ignored.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// Gives the device its transport: once, when the transport is constructed.
    fn bind(&self, transport: Weak<dyn Transport>);
    /// DRIVER_OK was written (vCPU thread): record it and wake the device thread; must not block.
    fn activate(&self, activation: Activation);
    /// 0 was written to `device_status` (vCPU thread): the device thread stops everything, then calls
    /// [`Transport::reset_done`]. Must not block.
    fn reset(&self);
    /// 1 was written to `queue_reset` of a queue that the device has (vCPU thread): the device thread stops the queue and
    /// forgets it, its eventfds included, then calls [`Transport::queue_reset_done`]. Must not block.
    ///
    /// A device reset makes it void. It does not come to a device that does not offer [`F_RING_RESET`], which is why there
    /// is nothing to do by default.
    fn reset_queue(&self, index: u16) {
        let _ = index;
    }
    /// A queue was enabled after DRIVER_OK: one that was reset, or not enabled before (vCPU thread). It starts from nothing,
    /// with eventfds of its own. Must not block. As [`VirtioDevice::reset_queue`], it needs [`F_RING_RESET`].
    fn enable_queue(&self, index: u16, queue: QueueSetup) {
        let _ = (index, queue);
    }
    /// The queue indices beyond the virtqueues.
    fn special_queues(&self) -> SpecialQueues {
        SpecialQueues::default()
    }
    /// The windows of the device: of each its size (a power of two) and what to place there. Number n, of two at most, is BAR 2 + 2n and the
    /// shared memory region with the id n.
    fn windows(&self) -> Vec<(u64, Arc<dyn Window>)> {
        Vec::new()
    }
    /// The guest read from a window what its memory did not let through (see [`Window`]); the device asks [`Window::read`]. `data` is all-ones
    /// already. The vCPU waits; this may take as long as the device's configuration says.
    fn window_read(&self, window: usize, offset: u64, data: &mut [u8]) {
        let _ = (window, offset, data);
    }
    /// The guest wrote to a window what its memory did not let through, as [`VirtioDevice::window_read`].
    fn window_write(&self, window: usize, offset: u64, data: &[u8]) {
        let _ = (window, offset, data);
    }
}
