//! Device models: PCI, the virtio-pci transport, the vhost-user protocol, virtio-net, virtio-iommu, virtio-blk, virtio-rng and
//! vhost-pci.
//!
//! Nothing here names KVM. A device reaches the machine that it is plugged into through the
//! traits of [`host`], so the same models run under the VMM and under a test's fake host.

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code))] // the fuzz bodies use a part of it
pub(crate) mod fake;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz_bodies;
pub mod host;
pub mod latency;
pub mod pci;
pub mod vhost_pci;
pub mod vhost_user;
pub mod virtio;
pub mod virtio_blk;
pub mod virtio_iommu;
pub mod virtio_net;
pub mod virtio_rng;
