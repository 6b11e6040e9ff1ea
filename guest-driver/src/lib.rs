//! Drivers for the two ends of a window: virtio-net (front-end) and vhost-pci (back-end), and for the virtio-iommu that either can be behind, over
//! virtio-pci.
//!
//! `no_std`: the same code runs in the bare-metal guest and in a process; what differs between them is behind
//! [`Platform`].
//!
//! # Layers
//!
//! * [`pci`] finds functions and capabilities, [`virtio_pci`] negotiates and sets up queues.
//! * [`net::NetDevice`] and [`vhost_pci::VhostPci`] are the drivers: the control path.
//! * [`virtio_iommu::VirtioIommu`] maps memory for them: [`translated::Translated`] is a [`Platform`] that does so once, [`mapper::Mapper`] a
//!   data path's way to do so for each buffer.
//! * [`net_port::NetPort`] and [`peer::PeerPort`] are the data paths: rings and buffers only, no device. Both are a [`Port`], so a workload
//!   does not know which end it runs at, nor whether its frames are [`watch`]ed; the upper bound of the benchmarks puts the two on both sides of one piece of memory.
#![no_std]

extern crate alloc;

pub mod bulk;
pub mod dirty;
#[cfg(feature = "fuzzing")]
pub mod fuzz_bodies;
pub mod inflight;
pub mod joined;
pub mod line;
pub mod mapper;
pub mod mmio;
pub mod net;
mod net_control;
pub mod net_port;
pub mod pci;
pub mod peer;
mod pieces;
pub mod platform;
pub mod port;
pub mod steering;
pub mod translated;
pub mod vhost_pci;
pub mod vhost_user;
pub mod virtio_iommu;
pub mod virtio_pci;
pub mod watch;
pub mod wide;

pub use platform::{Dma, Event, MsiMessage, Platform, Vectors};
pub use port::{Frame, Port, Slot};

#[cfg(test)]
mod tests;
