use std::vec;
use std::vec::Vec;

use super::*;

/// The key of the verification suite that Microsoft publishes for RSS.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// What is hashed: source and destination address, source and destination port.
fn input(source: &str, destination: &str, ports: Option<(u16, u16)>) -> Vec<u8> {
    let bytes = |address: &str| match address.parse().unwrap() {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut input = [bytes(source), bytes(destination)].concat();
    if let Some((source, destination)) = ports {
        input.extend_from_slice(&source.to_be_bytes());
        input.extend_from_slice(&destination.to_be_bytes());
    }
    input
}

#[test]
fn the_hash_is_that_of_the_published_verification_suite() {
    for (destination, to, source, from, addresses, with_ports) in [
        (
            "161.142.100.80",
            1766,
            "66.9.149.187",
            2794,
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            "65.69.140.83",
            4739,
            "199.92.111.2",
            14230,
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            "12.22.207.184",
            38024,
            "24.19.198.95",
            12898,
            0xd2d0_a5de,
            0x5c2b_394a,
        ),
        (
            "209.142.163.6",
            2217,
            "38.27.205.30",
            48228,
            0x8298_9176,
            0xafc7_327f,
        ),
        (
            "202.188.127.2",
            1303,
            "153.39.163.191",
            44251,
            0x5d18_09c5,
            0x10e8_28a2,
        ),
        (
            "3ffe:2501:200:3::1",
            1766,
            "3ffe:2501:200:1fff::7",
            2794,
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            "ff02::1",
            4739,
            "3ffe:501:8::260:97ff:fe40:efab",
            14230,
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
        (
            "fe80::200:f8ff:fe21:67cf",
            38024,
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            44251,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ] {
        assert_eq!(
            toeplitz(&KEY, &input(source, destination, None)),
            addresses,
            "{source}"
        );
        assert_eq!(
            toeplitz(&KEY, &input(source, destination, Some((from, to)))),
            with_ports,
            "{source}"
        );
    }
}

#[test]
fn a_short_key_is_zero_behind_its_end_and_an_empty_one_hashes_to_zero() {
    let whole = [&KEY[..7], &[0; 33]].concat();
    for input in [&[0xff; 36][..], &[1, 2, 3, 4, 5, 6, 7, 8]] {
        assert_eq!(toeplitz(&KEY[..7], input), toeplitz(&whole, input));
        assert_eq!(toeplitz(&[], input), 0);
    }
    assert_eq!(toeplitz(&KEY, &[]), 0);
}

/// A command's bytes.
fn bytes(
    types: u32,
    mask: u16,
    unclassified: u16,
    table: &[u16],
    max_tx: u16,
    key_len: u8,
    key: &[u8],
) -> Vec<u8> {
    let mut bytes = types.to_le_bytes().to_vec();
    for word in [&[mask, unclassified], table, &[max_tx]].concat() {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.push(key_len);
    bytes.extend_from_slice(key);
    bytes
}

#[test]
fn what_was_parsed_is_encoded_as_it_was() {
    for (table, key_len, key) in [
        (vec![0, 3, 2, 1], 40, &KEY[..]),
        (vec![2], 0, &[]),
        (vec![1; 128], 5, &KEY[..5]),
    ] {
        let mask = u16::try_from(table.len() - 1).unwrap();
        let command = bytes(types::ALL, mask, 3, &table, 4, key_len, key);
        let config = Config::parse(&command, 4).unwrap();
        let mut out = [0xee; MAX_LEN];
        assert_eq!(config.encode(&mut out), command);
        assert_eq!(
            (config.table(), config.hash_types(), config.pairs()),
            (&table[..], types::ALL, 4)
        );
    }
    let longest = bytes(0, 127, 0, &[0; 128], 1, 40, &KEY);
    assert_eq!(longest.len(), MAX_LEN);
    assert!(Config::parse(&longest, 1).is_some());
}

#[test]
fn what_a_hostile_driver_configures_is_refused() {
    let good = bytes(types::ALL, 3, 0, &[0, 1, 2, 3], 4, 40, &KEY);
    assert!(Config::parse(&good, 4).is_some());
    // Of every length but the right one.
    for len in 0..good.len() {
        assert_eq!(Config::parse(&good[..len], 4), None, "{len}");
    }
    assert_eq!(Config::parse(&[&good[..], &[0]].concat(), 4), None);
    let long = [&KEY[..], &[0]].concat();
    for (why, command) in [
        (
            "an unknown hash type",
            bytes(types::ALL | 1 << 6, 3, 0, &[0; 4], 4, 40, &KEY),
        ),
        ("another", bytes(1 << 31, 3, 0, &[0; 4], 4, 40, &KEY)),
        (
            "no power of two",
            bytes(types::ALL, 2, 0, &[0; 3], 4, 40, &KEY),
        ),
        (
            "a table too long",
            bytes(types::ALL, 255, 0, &[0; 256], 4, 40, &KEY),
        ),
        (
            "the largest mask",
            bytes(types::ALL, u16::MAX, 0, &[0; 4], 4, 40, &KEY),
        ),
        (
            "a queue out of range",
            bytes(types::ALL, 3, 0, &[0, 1, 4, 0], 4, 40, &KEY),
        ),
        (
            "the reserved bit",
            bytes(types::ALL, 3, 0, &[0, 0x8001, 0, 0], 4, 40, &KEY),
        ),
        (
            "an unclassified queue out of range",
            bytes(types::ALL, 3, 4, &[0; 4], 4, 40, &KEY),
        ),
        (
            "no transmit queue",
            bytes(types::ALL, 3, 0, &[0; 4], 0, 40, &KEY),
        ),
        (
            "too many transmit queues",
            bytes(types::ALL, 3, 0, &[0; 4], 5, 40, &KEY),
        ),
        (
            "a key too long",
            bytes(types::ALL, 3, 0, &[0; 4], 4, 41, &long),
        ),
        (
            "a key shorter than it says",
            bytes(types::ALL, 3, 0, &[0; 4], 4, 40, &KEY[..39]),
        ),
        (
            "a key longer than it says",
            bytes(types::ALL, 3, 0, &[0; 4], 4, 39, &KEY),
        ),
    ] {
        assert_eq!(Config::parse(&command, 4), None, "{why}");
    }
}

#[test]
fn a_packet_goes_where_the_table_says_and_one_without_a_hash_to_the_queue_for_those() {
    let table: Vec<u16> = (0..128).map(|i| i % 7).collect();
    let config = Config::new(types::ALL, 7, &table, 1, &KEY, 8).unwrap();
    let packet = input("66.9.149.187", "161.142.100.80", Some((2794, 1766)));
    assert_eq!(config.queue(Some(&packet)), (0x78 & 127) % 7);
    assert_eq!(config.turned().queue(Some(&packet)), (0x79 & 127) % 7);
    assert_eq!(config.queue(None), 7);
    assert_eq!(config.pairs(), 8);
}
