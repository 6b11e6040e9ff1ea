//! The virtio-iommu device (VIRTIO 1.3, section 5.13), and what it is to the devices behind it.

mod endpoint;

pub use endpoint::{Change, Endpoint, Fault, Mapping};
