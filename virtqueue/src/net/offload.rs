//! What one side may leave to the other: checksums and segmentation (VIRTIO 1.3, sections 5.1.3, 5.1.6.2 and 5.1.6.4).
//!
//! The header of a packet is written by a peer. [`Offloads::check`] is given the copy that is used afterwards, and hands out a header in which
//! everything has been checked against what was negotiated and against the length of the frame.

use super::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_USO4, F_GUEST_USO6, F_HOST_TSO4,
    F_HOST_TSO6, F_HOST_USO, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, HDR_GSO_NONE, HDR_GSO_TCPV4,
    HDR_GSO_TCPV6, HDR_GSO_UDP_L4, Header,
};

/// What a driver may leave to a device (section 5.1.3).
pub const HOST_OFFLOADS: u64 = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_USO;
/// What a device may leave to a driver (section 5.1.3): segments of a frame that never was one count as left to it, too.
pub const GUEST_OFFLOADS: u64 =
    F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6;
/// Frames towards the driver that are longer than a segment: buffers have to be larger, or to be merged (section 5.1.6.3.1).
pub const GUEST_LARGE: u64 = GUEST_OFFLOADS & !F_GUEST_CSUM;

/// Features that need another (section 5.1.3.1).
const NEEDS: [(u64, u64); 2] = [
    (HOST_OFFLOADS & !F_CSUM, F_CSUM),
    (GUEST_LARGE, F_GUEST_CSUM),
];

/// The longest frame of a segment's size (section 5.1.6.3.1): an Ethernet header with a VLAN tag and 1500 bytes.
pub const MAX_FRAME: usize = 1518;
/// The longest frame that is left to be segmented (section 5.1.6.3.1 puts the largest IP packet behind an Ethernet header at that).
pub const MAX_LARGE_FRAME: usize = 65550;

/// Bytes of an Ethernet header: no frame is shorter.
const ETHERNET: usize = 14;
/// Bytes of a checksum.
const CHECKSUM: usize = 2;

/// Whether no feature lacks another that it needs (section 5.1.3.1).
#[must_use]
pub const fn is_consistent(features: u64) -> bool {
    features == consistent(features)
}

/// The features without those that lack another which they need (section 5.1.3.1).
#[must_use]
pub const fn consistent(features: u64) -> u64 {
    let [(host, csum), (guest, guest_csum)] = NEEDS;
    let host = if features & csum == 0 { host } else { 0 };
    let guest = if features & guest_csum == 0 { guest } else { 0 };
    features & !host & !guest
}

/// What one direction's sender may leave to its receiver (section 5.1.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    csum: bool,
    tso4: bool,
    tso6: bool,
    /// UDP over IPv4 or IPv6: the header does not say which of them, and a driver has one bit for both.
    uso: bool,
    /// The sender may say that a checksum is right (HDR_F_DATA_VALID).
    valid: bool,
}

impl Offloads {
    /// What a driver may leave to its device (section 5.1.6.2), with these features.
    #[must_use]
    pub const fn of_driver(features: u64) -> Self {
        let features = consistent(features);
        Self {
            csum: features & F_CSUM != 0,
            tso4: features & F_HOST_TSO4 != 0,
            tso6: features & F_HOST_TSO6 != 0,
            uso: features & F_HOST_USO != 0,
            valid: false,
        }
    }

    /// What a device may leave to its driver (section 5.1.6.4), with these features.
    #[must_use]
    pub const fn of_device(features: u64) -> Self {
        let features = consistent(features);
        Self {
            csum: features & F_GUEST_CSUM != 0,
            tso4: features & F_GUEST_TSO4 != 0,
            tso6: features & F_GUEST_TSO6 != 0,
            uso: features & (F_GUEST_USO4 | F_GUEST_USO6) != 0,
            valid: features & F_GUEST_CSUM != 0,
        }
    }

    /// Whether a checksum may be left to be computed (section 5.1.6.2).
    #[must_use]
    pub const fn csum(self) -> bool {
        self.csum
    }

    /// Whether TCP over IPv4 may be left to be segmented (section 5.1.6.2).
    #[must_use]
    pub const fn tso4(self) -> bool {
        self.tso4
    }

    /// Whether TCP over IPv6 may be left to be segmented (section 5.1.6.2).
    #[must_use]
    pub const fn tso6(self) -> bool {
        self.tso6
    }

    /// Whether UDP may be left to be segmented (section 5.1.6.2).
    #[must_use]
    pub const fn uso(self) -> bool {
        self.uso
    }

    /// What is asked for by the header of a frame of `len` bytes (section 5.1.6.2), and nothing beside: fields that mean nothing are zero, num_buffers among them. `None`
    /// where that was not negotiated, does not fit the frame, or makes no sense; a frame of any length fits a header that asks for nothing.
    #[inline]
    #[must_use]
    pub const fn check(self, header: &Header, len: usize) -> Option<Header> {
        if len < ETHERNET {
            return None;
        }
        let mut checked = Header::NONE;
        if header.flags & HDR_F_NEEDS_CSUM != 0 {
            let end = header.csum_start as usize + header.csum_offset as usize + CHECKSUM;
            if !self.csum || end > len {
                return None;
            }
            checked.flags = HDR_F_NEEDS_CSUM;
            checked.csum_start = header.csum_start;
            checked.csum_offset = header.csum_offset;
        } else if self.valid {
            checked.flags = header.flags & HDR_F_DATA_VALID;
        }
        let negotiated = match header.gso_type {
            HDR_GSO_NONE => return Some(checked),
            HDR_GSO_TCPV4 => self.tso4,
            HDR_GSO_TCPV6 => self.tso6,
            HDR_GSO_UDP_L4 => self.uso,
            _ => false,
        };
        // A segment's checksum cannot be complete before the segment is made.
        let fits = checked.flags & HDR_F_NEEDS_CSUM != 0
            && header.gso_size > 0
            && header.hdr_len as usize <= len;
        if !negotiated || !fits {
            return None;
        }
        checked.gso_type = header.gso_type;
        checked.gso_size = header.gso_size;
        checked.hdr_len = header.hdr_len;
        Some(checked)
    }

    /// As [`Offloads::check`] (section 5.1.6.2), and a frame that is longer than [`MAX_FRAME`] has to be left to be segmented, and none is longer than
    /// [`MAX_LARGE_FRAME`]: for ends that have no other use for long frames.
    #[inline]
    #[must_use]
    pub const fn check_segment(self, header: &Header, len: usize) -> Option<Header> {
        match self.check(header, len) {
            Some(checked) if len <= longest(&checked) => Some(checked),
            _ => None,
        }
    }
}

/// The longest frame that such a header can stand in front of where no frame that is sent as it is is longer than [`MAX_FRAME`].
#[inline]
const fn longest(header: &Header) -> usize {
    match header.gso_type {
        HDR_GSO_NONE => MAX_FRAME,
        _ => MAX_LARGE_FRAME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{HDR_F_RSC_INFO, HDR_GSO_ECN, HDR_GSO_UDP};

    const HOST: Offloads = Offloads::of_driver(HOST_OFFLOADS);
    const GUEST: Offloads = Offloads::of_device(GUEST_OFFLOADS);

    fn tso() -> Header {
        Header {
            flags: HDR_F_NEEDS_CSUM,
            gso_type: HDR_GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    #[test]
    fn what_fits_passes_and_one_byte_less_does_not() {
        for offloads in [HOST, GUEST] {
            assert_eq!(offloads.check(&tso(), 54), Some(tso()));
            assert_eq!(offloads.check(&tso(), 53), None);
            let csum = Header {
                gso_type: HDR_GSO_NONE,
                gso_size: 0,
                hdr_len: 0,
                ..tso()
            };
            assert_eq!(offloads.check(&csum, 52), Some(csum));
            assert_eq!(offloads.check(&csum, 51), None);
            let none = Offloads::default();
            assert_eq!(none.check(&Header::NONE, 14), Some(Header::NONE));
            assert_eq!(offloads.check(&Header::NONE, 13), None);
        }
    }

    #[test]
    fn only_what_is_left_to_be_segmented_is_longer_than_a_segment_and_no_longer_than_ip_has_it() {
        assert_eq!(HOST.check_segment(&Header::NONE, 1518), Some(Header::NONE));
        assert_eq!(HOST.check_segment(&Header::NONE, 1519), None);
        assert_eq!(HOST.check_segment(&tso(), 65550), Some(tso()));
        assert_eq!(HOST.check_segment(&tso(), 65551), None);
    }

    #[test]
    fn sums_of_the_largest_numbers_do_not_wrap() {
        let far = Header {
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
            ..tso()
        };
        assert_eq!(HOST.check(&far, 65550), None);
    }

    #[test]
    fn each_kind_of_segmentation_needs_its_own_bit_of_its_own_direction() {
        let uso = F_GUEST_USO4 | F_GUEST_USO6;
        for (gso_type, host, guest) in [
            (HDR_GSO_TCPV4, F_HOST_TSO4, F_GUEST_TSO4),
            (HDR_GSO_TCPV6, F_HOST_TSO6, F_GUEST_TSO6),
            (HDR_GSO_UDP_L4, F_HOST_USO, uso),
        ] {
            let header = Header { gso_type, ..tso() };
            let sent = |offloads: Offloads| offloads.check(&header, 1514) == Some(header);
            assert!(sent(Offloads::of_driver(F_CSUM | host)));
            assert!(sent(Offloads::of_device(F_GUEST_CSUM | guest)));
            assert!(!sent(Offloads::of_driver(!host)), "{gso_type}");
            assert!(!sent(Offloads::of_device(!guest)), "{gso_type}");
            assert!(!sent(Offloads::of_driver(!F_CSUM)), "{gso_type}");
            assert!(!sent(Offloads::of_device(!F_GUEST_CSUM)), "{gso_type}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let ecn = HDR_GSO_TCPV4 | HDR_GSO_ECN;
        for gso_type in [HDR_GSO_UDP, ecn, 2, 6, 0x7f, 0xff] {
            let header = Header { gso_type, ..tso() };
            assert_eq!(HOST.check(&header, 1514), None, "{gso_type:#x}");
            assert_eq!(GUEST.check(&header, 1514), None, "{gso_type:#x}");
        }
        let zero = Header {
            gso_size: 0,
            ..tso()
        };
        assert_eq!(HOST.check(&zero, 1514), None);
        let complete = Header { flags: 0, ..tso() };
        assert_eq!(HOST.check(&complete, 1514), None);
    }

    #[test]
    fn what_means_nothing_does_not_pass() {
        let noise = Header {
            flags: HDR_F_DATA_VALID | HDR_F_RSC_INFO | 0xf8,
            hdr_len: 7,
            gso_size: 8,
            csum_start: 9,
            csum_offset: 10,
            num_buffers: 11,
            gso_type: HDR_GSO_NONE,
        };
        assert_eq!(HOST.check(&noise, 60), Some(Header::NONE));
        let valid = Header {
            flags: HDR_F_DATA_VALID,
            ..Header::NONE
        };
        assert_eq!(GUEST.check(&noise, 60), Some(valid));
        assert_eq!(Offloads::of_device(0).check(&noise, 60), Some(Header::NONE));
    }

    #[test]
    fn features_whose_need_is_missing_go_and_others_stay() {
        let all = HOST_OFFLOADS | GUEST_OFFLOADS | 1 << 32;
        assert_eq!(consistent(all), all);
        assert_eq!(consistent(all & !F_CSUM), GUEST_OFFLOADS | 1 << 32);
        assert_eq!(consistent(all & !F_GUEST_CSUM), HOST_OFFLOADS | 1 << 32);
        assert!(is_consistent(F_CSUM | F_HOST_USO) && !is_consistent(F_HOST_USO));
    }
}
