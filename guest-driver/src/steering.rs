//! Which receive queue a frame goes to by RSS: what is hashed of it (VIRTIO 1.3, sections 5.1.6.4.3 and 5.1.6.5.7).

use virtqueue::rss::{Config, types};

/// As much of a frame as [`pair`] looks at, at most.
pub const HEADERS: usize = 256;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Extension headers of IPv6 that are skipped: hop-by-hop options, routing, destination options; each says its length in the same way.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// The fragment header: behind it no ports are looked for, so that all fragments of a packet go the same way.
const FRAGMENT: u8 = 44;
/// How many extension headers are skipped.
const MAX_EXTENSIONS: usize = 8;
/// Addresses and ports of IPv6.
const MAX_INPUT: usize = 36;

/// The receive queue, by the number of its pair, for a frame that begins with these bytes: all that it has, or [`HEADERS`] of them. What lies beyond is taken
/// not to be there. One VLAN tag is skipped.
#[must_use]
pub fn pair(config: &Config, headers: &[u8]) -> u16 {
    let mut input = [0; MAX_INPUT];
    let len = classify(config.hash_types(), headers, &mut input);
    config.queue(len.and_then(|len| input.get(..len)))
}

/// Puts what is hashed into `input` and returns how long it is; `None` where nothing is.
fn classify(enabled: u32, frame: &[u8], input: &mut [u8; MAX_INPUT]) -> Option<usize> {
    let (ethertype, packet) = match be16(frame, 12)? {
        VLAN => (be16(frame, 16)?, frame.get(18..)?),
        ethertype => (ethertype, frame.get(14..)?),
    };
    let (addresses, only, both, transport) = match ethertype {
        IPV4 => {
            let both = [(TCP, types::TCPV4), (UDP, types::UDPV4)];
            (packet.get(12..20)?, types::IPV4, both, transport_v4(packet))
        }
        IPV6 => {
            let both = [(TCP, types::TCPV6), (UDP, types::UDPV6)];
            (packet.get(8..40)?, types::IPV6, both, transport_v6(packet))
        }
        _ => return None,
    };
    let mut len = addresses.len();
    input.get_mut(..len)?.copy_from_slice(addresses);
    let ports = transport.filter(|(protocol, _)| {
        let mut kinds = both.iter();
        kinds.any(|(kind, hash)| kind == protocol && enabled & hash != 0)
    });
    match ports {
        Some((_, ports)) => {
            input.get_mut(len..len + 4)?.copy_from_slice(&ports);
            len += 4;
        }
        None if enabled & only == 0 => return None,
        None => {}
    }
    Some(len)
}

/// The protocol of a packet that is no fragment, and its ports.
fn transport_v4(packet: &[u8]) -> Option<(u8, [u8; 4])> {
    const FRAGMENTED: u16 = 0x3fff; // more fragments, or an offset
    if be16(packet, 6)? & FRAGMENTED != 0 {
        return None;
    }
    let first = *packet.first()?;
    let header = 4 * usize::from(first & 0xf);
    if header < 20 {
        return None;
    }
    Some((*packet.get(9)?, ports(packet, header)?))
}

fn transport_v6(packet: &[u8]) -> Option<(u8, [u8; 4])> {
    let mut next = *packet.get(6)?;
    let mut at = 40;
    for _ in 0..=MAX_EXTENSIONS {
        if next == FRAGMENT {
            return None;
        }
        if !EXTENSIONS.contains(&next) {
            return Some((next, ports(packet, at)?));
        }
        let length = usize::from(*packet.get(at + 1)?);
        next = *packet.get(at)?;
        at += 8 * (length + 1);
    }
    None
}

fn ports(packet: &[u8], at: usize) -> Option<[u8; 4]> {
    packet.get(at..at + 4)?.try_into().ok()
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const V4: [u8; 8] = [66, 9, 149, 187, 161, 142, 100, 80];
    const PORTS: [u8; 4] = [0x0a, 0xea, 0x06, 0xe6];

    fn ethernet(ethertype: u16, packet: &[u8]) -> Vec<u8> {
        [&[0x52; 12][..], &ethertype.to_be_bytes(), packet].concat()
    }

    /// A packet with this protocol, options, and fragment field.
    fn v4(protocol: u8, options: usize, fragment: u16) -> Vec<u8> {
        let mut packet = vec![0; 20 + options];
        packet[0] = 0x45 + u8::try_from(options / 4).unwrap();
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet[12..20].copy_from_slice(&V4);
        packet.extend_from_slice(&PORTS);
        packet
    }

    /// A packet with these extension headers: number, and length in units of eight bytes behind the first.
    fn v6(extensions: &[(u8, u8)], protocol: u8) -> Vec<u8> {
        let mut packet = vec![
            0x60,
            0,
            0,
            0,
            0,
            0,
            extensions.first().map_or(protocol, |e| e.0),
            64,
        ];
        packet.extend((0..32).map(|i| 0xa0 + i));
        for (i, &(_, length)) in extensions.iter().enumerate() {
            let next = extensions.get(i + 1).map_or(protocol, |e| e.0);
            let mut header = vec![0xee; 8 * (usize::from(length) + 1)];
            (header[0], header[1]) = (next, length);
            packet.extend_from_slice(&header);
        }
        packet.extend_from_slice(&PORTS);
        packet
    }

    fn hashed(enabled: u32, frame: &[u8]) -> Option<Vec<u8>> {
        let mut input = [0; MAX_INPUT];
        let len = classify(enabled, frame, &mut input)?;
        Some(input[..len].to_vec())
    }

    #[test]
    fn the_most_that_is_enabled_and_there_is_hashed() {
        let addresses = Some(V4.to_vec());
        let all = Some([&V4[..], &PORTS].concat());
        for (protocol, options, fragment, enabled, expected) in [
            (TCP, 0, 0, types::ALL, &all),
            (UDP, 0, 0x4000, types::ALL, &all),
            (UDP, 8, 0, types::UDPV4, &all),
            (TCP, 40, 0, types::TCPV4 | types::IPV4, &all),
            (TCP, 0, 0, types::UDPV4 | types::IPV4, &addresses),
            (UDP, 0, 0, types::IPV4, &addresses),
            (1, 0, 0, types::ALL, &addresses),
            // Fragments go the same way, the first one too.
            (UDP, 0, 0x2000, types::ALL, &addresses),
            (UDP, 0, 0x0001, types::ALL, &addresses),
            (UDP, 0, 0, types::TCPV4, &None),
            (UDP, 0, 0x2000, types::UDPV4, &None),
            (UDP, 0, 0, types::IPV6 | types::UDPV6, &None),
            (UDP, 0, 0, 0, &None),
        ] {
            let packet = v4(protocol, options, fragment);
            assert_eq!(
                &hashed(enabled, &ethernet(IPV4, &packet)),
                expected,
                "{protocol} {options} {fragment:#x} {enabled:#x}"
            );
            // A tag changes nothing.
            let tagged = ethernet(VLAN, &[&[0x20, 5, 8, 0][..], &packet].concat());
            assert_eq!(&hashed(enabled, &tagged), expected);
        }
    }

    #[test]
    fn extension_headers_are_skipped_up_to_a_fragment() {
        let addresses: Vec<u8> = (0..32).map(|i| 0xa0 + i).collect();
        let all = Some([&addresses[..], &PORTS].concat());
        let addresses = Some(addresses);
        for (extensions, protocol, enabled, expected) in [
            (&[][..], TCP, types::ALL, &all),
            (&[], UDP, types::UDPV6, &all),
            (&[(0, 0), (43, 2), (60, 1)], UDP, types::ALL, &all),
            (&[(60, 0); MAX_EXTENSIONS], UDP, types::ALL, &all),
            (&[(60, 0); MAX_EXTENSIONS + 1], UDP, types::ALL, &addresses),
            (&[(FRAGMENT, 0)], UDP, types::ALL, &addresses),
            (&[(0, 0), (FRAGMENT, 0)], UDP, types::ALL, &addresses),
            // Longer than what is looked at.
            (&[(60, 255)], UDP, types::ALL, &addresses),
            (&[], 58, types::ALL, &addresses),
            (&[], TCP, types::UDPV6 | types::IPV6, &addresses),
            (&[], UDP, types::IPV4 | types::UDPV4, &None),
        ] {
            let mut frame = ethernet(IPV6, &v6(extensions, protocol));
            frame.truncate(HEADERS);
            assert_eq!(
                &hashed(enabled, &frame),
                expected,
                "{extensions:?} {protocol} {enabled:#x}"
            );
        }
    }

    #[test]
    fn what_is_cut_off_or_no_ip_is_not_hashed_beyond_what_is_there() {
        let frames = [
            ethernet(IPV4, &v4(UDP, 4, 0)),
            ethernet(IPV6, &v6(&[(0, 1)], TCP)),
        ];
        for (frame, ends) in frames.iter().zip([[34, 42], [54, 74]]) {
            for len in 0..frame.len() {
                let hashed = hashed(types::ALL, &frame[..len]);
                assert_eq!(hashed.is_some(), len >= ends[0], "{len}");
                assert!(hashed.is_none_or(|input| input.len() % 8 == 0));
            }
            assert_eq!(frame.len(), ends[1]);
            assert_eq!(
                hashed(types::ALL, frame).map(|input| input.len() % 8),
                Some(4)
            );
        }
        assert_eq!(hashed(types::ALL, &ethernet(0x0806, &[0; 46])), None);
        let mut short = v4(UDP, 0, 0);
        short[0] = 0x44;
        assert_eq!(
            hashed(types::ALL, &ethernet(IPV4, &short)),
            Some(V4.to_vec())
        );
    }

    #[test]
    fn a_frame_goes_where_the_table_says() {
        let key: [u8; 40] = core::array::from_fn(|i| u8::try_from(i * 37 % 251).unwrap());
        let table: Vec<u16> = (0..16).collect();
        let config = Config::new(types::UDPV4, 17, &table, 1, &key, 18).unwrap();
        let frame = ethernet(IPV4, &v4(UDP, 0, 0));
        let hash = virtqueue::rss::toeplitz(&key, &[&V4[..], &PORTS].concat());
        assert_eq!(u32::from(pair(&config, &frame)), hash & 15);
        assert_eq!(pair(&config, &ethernet(IPV4, &v4(TCP, 0, 0))), 17);
        assert_eq!(pair(&config, &[]), 17);
    }
}
