//! The header in front of a frame that a guest sends, before the host's kernel gets to see it.

use virtqueue::net::{
    F_CSUM, F_HOST_TSO4, F_HOST_TSO6, HDR_F_NEEDS_CSUM, HDR_GSO_NONE, HDR_GSO_TCPV4, HDR_GSO_TCPV6,
    Header,
};

/// Bytes of an Ethernet header: no frame is shorter.
const ETHERNET: usize = 14;
/// Bytes of a checksum.
const CHECKSUM: usize = 2;

/// The header that goes to the host for a frame of `len` bytes: what the driver asked for and nothing beside (VIRTIO 1.3, section 5.1.6.2).
/// `None` where it asked for what was not negotiated, or for what does not fit the frame.
pub(super) fn checked(header: Header, len: usize, features: u64) -> Option<Header> {
    if len < ETHERNET {
        return None;
    }
    let mut checked = Header::default();
    if header.flags & HDR_F_NEEDS_CSUM != 0 {
        let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + CHECKSUM;
        if features & F_CSUM == 0 || end > len {
            return None;
        }
        checked.flags = HDR_F_NEEDS_CSUM;
        checked.csum_start = header.csum_start;
        checked.csum_offset = header.csum_offset;
    }
    let needed = match header.gso_type {
        HDR_GSO_NONE => return Some(checked),
        HDR_GSO_TCPV4 => F_HOST_TSO4,
        HDR_GSO_TCPV6 => F_HOST_TSO6,
        _ => return None,
    };
    // A segment's checksum cannot be complete before the segment is made.
    let fits = checked.flags & HDR_F_NEEDS_CSUM != 0
        && header.gso_size > 0
        && usize::from(header.hdr_len) <= len;
    if features & needed == 0 || !fits {
        return None;
    }
    checked.gso_type = header.gso_type;
    checked.gso_size = header.gso_size;
    checked.hdr_len = header.hdr_len;
    Some(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtqueue::net::{HDR_F_DATA_VALID, HDR_F_RSC_INFO, HDR_GSO_ECN, HDR_GSO_UDP};

    const ALL: u64 = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6;

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
        assert_eq!(checked(tso(), 54, ALL), Some(tso()));
        assert_eq!(checked(tso(), 53, ALL), None);
        let csum = Header {
            gso_type: HDR_GSO_NONE,
            gso_size: 0,
            hdr_len: 0,
            ..tso()
        };
        assert_eq!(checked(csum, 52, ALL), Some(csum));
        assert_eq!(checked(csum, 51, ALL), None);
        assert_eq!(checked(Header::default(), 14, 0), Some(Header::default()));
        assert_eq!(checked(Header::default(), 13, ALL), None);
    }

    #[test]
    fn sums_of_the_largest_numbers_do_not_wrap() {
        let far = Header {
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
            ..tso()
        };
        assert_eq!(checked(far, 65550, ALL), None);
    }

    #[test]
    fn what_was_not_negotiated_or_makes_no_sense_is_refused() {
        for missing in [F_CSUM, F_HOST_TSO4] {
            assert_eq!(checked(tso(), 1514, ALL & !missing), None);
        }
        let v6 = Header {
            gso_type: HDR_GSO_TCPV6,
            ..tso()
        };
        assert_eq!(checked(v6, 1514, ALL), Some(v6));
        assert_eq!(checked(v6, 1514, ALL & !F_HOST_TSO6), None);
        for gso_type in [HDR_GSO_UDP, HDR_GSO_TCPV4 | HDR_GSO_ECN, 2, 0x7f, 0xff] {
            let header = Header { gso_type, ..tso() };
            assert_eq!(checked(header, 1514, ALL), None, "{gso_type:#x}");
        }
        let zero = Header {
            gso_size: 0,
            ..tso()
        };
        assert_eq!(checked(zero, 1514, ALL), None);
        let complete = Header { flags: 0, ..tso() };
        assert_eq!(checked(complete, 1514, ALL), None);
    }

    #[test]
    fn what_means_nothing_on_the_way_out_does_not_reach_the_host() {
        let noise = Header {
            flags: HDR_F_DATA_VALID | HDR_F_RSC_INFO | 0xf8,
            hdr_len: 7,
            gso_size: 8,
            csum_start: 9,
            csum_offset: 10,
            num_buffers: 11,
            gso_type: HDR_GSO_NONE,
        };
        assert_eq!(checked(noise, 60, ALL), Some(Header::default()));
    }
}
