//! Feature bits by name, for people who read the log.

use std::fmt;

use virtqueue::net;

use super::{F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_MRG_RXBUF, F_RSS};
use crate::virtio::{F_ACCESS_PLATFORM, F_RING_PACKED, F_VERSION_1};

/// What a driver can have of a back-end here, as VIRTIO 1.3 calls it.
const NAMES: [(u64, &str); 17] = [
    (net::F_CSUM, "VIRTIO_NET_F_CSUM"),
    (net::F_GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
    (net::F_GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
    (net::F_GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
    (net::F_HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
    (net::F_HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
    (net::F_GUEST_USO4, "VIRTIO_NET_F_GUEST_USO4"),
    (net::F_GUEST_USO6, "VIRTIO_NET_F_GUEST_USO6"),
    (net::F_HOST_USO, "VIRTIO_NET_F_HOST_USO"),
    (F_MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
    (F_INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
    (F_EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
    (F_VERSION_1, "VIRTIO_F_VERSION_1"),
    (F_ACCESS_PLATFORM, "VIRTIO_F_ACCESS_PLATFORM"),
    (F_RING_PACKED, "VIRTIO_F_RING_PACKED"),
    (F_IN_ORDER, "VIRTIO_F_IN_ORDER"),
    (F_RSS, "VIRTIO_NET_F_RSS"),
];

/// Feature bits, by name as far as they have one here.
pub(super) struct Names(pub(super) u64);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut others = self.0;
        let mut before = "";
        for (bit, name) in NAMES {
            if self.0 & bit != 0 {
                write!(f, "{before}{name}")?;
                before = ", ";
                others &= !bit;
            }
        }
        if others != 0 || self.0 == 0 {
            write!(f, "{before}{others:#x}")?;
        }
        Ok(())
    }
}
