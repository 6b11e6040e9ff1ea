//! The virtio-net header and feature bits (VIRTIO 1.3 section 5.1), and the feature bits of rings and transports (section 6).

mod offload;

pub use offload::{
    GUEST_LARGE, GUEST_OFFLOADS, HOST_OFFLOADS, MAX_FRAME, MAX_LARGE_FRAME, Offloads, consistent,
    is_consistent,
};

/// Features that rings and transports negotiate (VIRTIO 1.3 section 6), as masks.
pub mod features {
    /// VIRTIO_F_INDIRECT_DESC (section 6): a descriptor may hold a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX (section 6): notification by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1 (section 6): not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_ACCESS_PLATFORM (section 6): addresses go through the platform's IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// VIRTIO_F_RING_PACKED (section 6): the packed layout.
    pub const RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_IN_ORDER (section 6): buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// VIRTIO_F_NOTIFICATION_DATA (section 6): a kick carries the ring's position.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// VIRTIO_F_RING_RESET (section 6): one queue can be reset by itself.
    pub const RING_RESET: u64 = 1 << 40;
}

/// VIRTIO_NET_F_CSUM (section 5.1.3): the device takes packets with a partial checksum.
pub const F_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM (section 5.1.3): the driver takes packets with a partial checksum.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS (section 5.1.3): offloads change at run time.
pub const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// VIRTIO_NET_F_MTU (section 5.1.3): the device reports its largest MTU.
pub const F_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC (section 5.1.3): the device has a MAC address.
pub const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_GUEST_TSO4 (section 5.1.3): the driver takes large TCP packets over IPv4.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// VIRTIO_NET_F_GUEST_TSO6 (section 5.1.3): the driver takes large TCP packets over IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// VIRTIO_NET_F_GUEST_ECN (section 5.1.3): the driver takes large TCP packets with ECN.
pub const F_GUEST_ECN: u64 = 1 << 9;
/// VIRTIO_NET_F_GUEST_UFO (section 5.1.3): the driver takes large UDP packets.
pub const F_GUEST_UFO: u64 = 1 << 10;
/// VIRTIO_NET_F_HOST_TSO4 (section 5.1.3): the device takes large TCP packets over IPv4.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_HOST_TSO6 (section 5.1.3): the device takes large TCP packets over IPv6.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// VIRTIO_NET_F_HOST_ECN (section 5.1.3): the device takes large TCP packets with ECN.
pub const F_HOST_ECN: u64 = 1 << 13;
/// VIRTIO_NET_F_HOST_UFO (section 5.1.3): the device takes large UDP packets.
pub const F_HOST_UFO: u64 = 1 << 14;
/// VIRTIO_NET_F_MRG_RXBUF (section 5.1.3): a packet may fill several receive buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_STATUS (section 5.1.3): the configuration has a status field.
pub const F_STATUS: u64 = 1 << 16;
/// VIRTIO_NET_F_CTRL_VQ (section 5.1.3): there is a control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_CTRL_RX (section 5.1.3): the receive mode can be controlled.
pub const F_CTRL_RX: u64 = 1 << 18;
/// VIRTIO_NET_F_CTRL_VLAN (section 5.1.3): VLANs can be filtered.
pub const F_CTRL_VLAN: u64 = 1 << 19;
/// VIRTIO_NET_F_GUEST_ANNOUNCE (section 5.1.3): the driver sends gratuitous packets when asked.
pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;
/// VIRTIO_NET_F_MQ (section 5.1.3): several queue pairs.
pub const F_MQ: u64 = 1 << 22;
/// VIRTIO_NET_F_CTRL_MAC_ADDR (section 5.1.3): the MAC address can be set over the control queue.
pub const F_CTRL_MAC_ADDR: u64 = 1 << 23;
/// VIRTIO_NET_F_GUEST_USO4 (section 5.1.3): the driver takes large packets of UDP datagrams over IPv4.
pub const F_GUEST_USO4: u64 = 1 << 54;
/// VIRTIO_NET_F_GUEST_USO6 (section 5.1.3): the driver takes large packets of UDP datagrams over IPv6.
pub const F_GUEST_USO6: u64 = 1 << 55;
/// VIRTIO_NET_F_HOST_USO (section 5.1.3): the device takes large packets of UDP datagrams.
pub const F_HOST_USO: u64 = 1 << 56;
/// VIRTIO_NET_F_HASH_REPORT (section 5.1.3): a longer header with a hash, which [`Header`] does not cover.
pub const F_HASH_REPORT: u64 = 1 << 57;
/// VIRTIO_NET_F_GUEST_HDRLEN (section 5.1.3): the driver gives the exact `hdr_len`.
pub const F_GUEST_HDRLEN: u64 = 1 << 59;
/// VIRTIO_NET_F_RSS (section 5.1.3): receive-side scaling.
pub const F_RSS: u64 = 1 << 60;
/// VIRTIO_NET_F_SPEED_DUPLEX (section 5.1.3): the device reports speed and duplex.
pub const F_SPEED_DUPLEX: u64 = 1 << 63;

/// Flag of [`Header::flags`] (section 5.1.6): the checksum is still to be completed from `csum_start` on.
pub const HDR_F_NEEDS_CSUM: u8 = 1;
/// Flag of [`Header::flags`] (section 5.1.6): the checksum has been validated.
pub const HDR_F_DATA_VALID: u8 = 2;
/// Flag of [`Header::flags`] (section 5.1.6): the checksum fields hold information on coalesced segments.
pub const HDR_F_RSC_INFO: u8 = 4;

/// Kind of [`Header::gso_type`] (section 5.1.6): no segmentation.
pub const HDR_GSO_NONE: u8 = 0;
/// Kind of [`Header::gso_type`] (section 5.1.6): TCP over IPv4.
pub const HDR_GSO_TCPV4: u8 = 1;
/// Kind of [`Header::gso_type`] (section 5.1.6): UDP fragments.
pub const HDR_GSO_UDP: u8 = 3;
/// Kind of [`Header::gso_type`] (section 5.1.6): TCP over IPv6.
pub const HDR_GSO_TCPV6: u8 = 4;
/// Kind of [`Header::gso_type`] (section 5.1.6): UDP datagrams.
pub const HDR_GSO_UDP_L4: u8 = 5;
/// Bit of [`Header::gso_type`] (section 5.1.6) beside its kind: ECN.
pub const HDR_GSO_ECN: u8 = 0x80;

/// Length of a [`Header`] in bytes (section 5.1.6), without the part that [`F_HASH_REPORT`] adds.
pub const HEADER_LEN: usize = 12;

/// The header in front of every packet (VIRTIO 1.3 section 5.1.6), as VERSION_1 has it: with `num_buffers`, whether or not
/// [`F_MRG_RXBUF`] was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `HDR_F_*` (sections 5.1.6.2 and 5.1.6.4, as for all fields).
    pub flags: u8,
    /// `HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of the packet's headers, which every segment repeats; a hint.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where the checksum starts to sum, in bytes from the start of the packet.
    pub csum_start: u16,
    /// Where it is stored, in bytes from `csum_start`.
    pub csum_offset: u16,
    /// Towards the driver: how many buffers the packet fills; 1 without [`F_MRG_RXBUF`]. Towards the device: 0.
    pub num_buffers: u16,
}

impl Header {
    /// Nothing is left to the other side (section 5.1.6.2).
    pub const NONE: Self = Self {
        flags: 0,
        gso_type: HDR_GSO_NONE,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
        num_buffers: 0,
    };

    /// The header as it lies in memory (section 5.1.6).
    #[inline]
    pub const fn encode(&self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [
            self.flags,
            self.gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            n0,
            n1,
        ]
    }

    /// The header that lies in memory (section 5.1.6); every value is possible, and none is checked against the features or the packet.
    #[inline]
    pub const fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            flags: HDR_F_NEEDS_CSUM,
            gso_type: HDR_GSO_TCPV6 | HDR_GSO_ECN,
            hdr_len: 0x0203,
            gso_size: 0x0405,
            csum_start: 0x0607,
            csum_offset: 0x0809,
            num_buffers: 0x0a0b,
        };
        let bytes = [1, 0x84, 3, 2, 5, 4, 7, 6, 9, 8, 0xb, 0xa];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::decode(bytes), header);
        assert_eq!(Header::default().encode(), [0; HEADER_LEN]);
    }

    #[test]
    fn every_byte_survives_a_round_trip() {
        for at in 0..HEADER_LEN {
            let mut bytes = [0; HEADER_LEN];
            bytes[at] = 0xa5;
            assert_eq!(Header::decode(bytes).encode(), bytes);
        }
    }
}
