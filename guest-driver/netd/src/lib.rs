//! A vhost-pci device served by a Linux process in the back-end VM (docs/netd.md).
//!
//! * [`machine::Machine`] is the [`Platform`](guest_driver::Platform) of a process: one PCI function, reached through the files of [`sysfs`] or
//!   through [`vfio`], with memory for the device from an [`Arena`](dma::Arena).
//! * [`serve`] runs the driver of `guest_driver` over it: the control path, the sleeping and the waking, the coming and going of the peer.
//! * [`work`] is what becomes of the frames: a [`tap`], or nothing but measurements. [`capture`] writes them to a file as they pass.

pub mod capture;
pub mod dma;
pub mod machine;
pub mod pci;
pub mod serve;
pub mod stats;
pub mod sysfs;
pub mod tap;
pub mod vfio;
pub mod wait;
pub mod work;

mod sys;
#[cfg(test)]
mod testing;
