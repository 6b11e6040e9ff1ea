//! `--capture`: what the guests at both ends say that passed, as a parser that is not ours reads it.

use std::fs;

use pcap_parser::parse_block_le;
use pcap_parser::pcapng::{Block, OptionCode, PcapNGOption};
use pcap_parser::traits::PcapNGPacketBlock;

use super::machine;
use crate::common::{Dir, run};

/// A frame of a file: when, which way, how long, and what was kept.
#[derive(Debug, PartialEq)]
struct Packet {
    time: u64,
    sent: bool,
    len: u32,
    bytes: Vec<u8>,
}

fn value<'a>(options: &'a [PcapNGOption<'_>], code: u16) -> &'a [u8] {
    let option = options.iter().find(|it| it.code == OptionCode(code));
    option.unwrap().as_bytes().unwrap()
}

/// The frames of a file, which is one of the interface of this name and nothing else.
fn packets(path: &str, interface: &str) -> Vec<Packet> {
    let file = fs::read(path).unwrap();
    let mut rest = &file[..];
    let mut blocks = Vec::new();
    while !rest.is_empty() {
        let (behind, block) = parse_block_le(rest).unwrap();
        blocks.push(block);
        rest = behind;
    }
    let mut blocks = blocks.into_iter();
    assert!(matches!(blocks.next(), Some(Block::SectionHeader(_))));
    let Some(Block::InterfaceDescription(described)) = blocks.next() else {
        panic!("no interface");
    };
    assert_eq!(value(&described.options, 2), interface.as_bytes());
    assert_eq!((described.if_tsresol, described.linktype.0), (9, 1));
    let packet = |block| {
        let Block::EnhancedPacket(packet) = block else {
            panic!("{block:?}");
        };
        let sent = match value(&packet.options, 2) {
            [1, 0, 0, 0] => false,
            [2, 0, 0, 0] => true,
            other => panic!("{other:?}"),
        };
        Packet {
            time: u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low),
            sent,
            len: packet.origlen,
            bytes: packet.packet_data().to_vec(),
        }
    };
    blocks.map(packet).collect()
}

/// Runs `pair` with these flags and a capture at both ends; returns what is in the files, the back-end's first.
#[track_caller]
fn captured(args: &[&str], keys: &str) -> [Vec<Packet>; 2] {
    let dir = Dir::new();
    let [back, front] = ["b", "f"].map(|name| dir.file(name));
    let capture = format!("back={back},front={front}{keys}");
    let ended = run(&[&["pair", "--capture", &capture], args].concat());
    ended.expect_code(0);
    let other = ended.stderr.lines().find(|line| !line.contains("is gone"));
    assert_eq!(other, None, "{ended:?}");
    let files = [packets(&back, "back-end"), packets(&front, "front-end")];
    let now = std::time::SystemTime::now();
    let now = now
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos();
    for packets in &files {
        assert!(packets.is_sorted_by_key(|packet| packet.time));
        let recent = |p: &Packet| (now - 60_000_000_000..now).contains(&p.time.into());
        assert!(packets.iter().all(recent), "{packets:?}");
    }
    files
}

/// The frames that went one way.
fn way(packets: &[Packet], sent: bool) -> Vec<(u32, &[u8])> {
    let of = packets.iter().filter(|packet| packet.sent == sent);
    of.map(|packet| (packet.len, &packet.bytes[..])).collect()
}

#[test]
fn what_one_end_sent_is_what_the_other_received_in_that_order_byte_by_byte() {
    let _machine = machine();
    for args in [
        &["--direction", "both", "--size", "1518"][..],
        &["--direction", "round-trip", "--mode", "irq"],
        &[
            "--direction",
            "fe-to-be",
            "--ring",
            "packed",
            "--iommu",
            "dynamic",
        ],
        &["--direction", "be-to-fe", "--size", "65536"],
    ] {
        let [back, front] = captured(&[args, &["--count", "300"]].concat(), "");
        let size = args.iter().position(|&arg| arg == "--size");
        let size = size.map_or(64, |at| args[at + 1].parse().unwrap());
        let ways = [
            (way(&back, true), way(&front, false)),
            (way(&front, true), way(&back, false)),
        ];
        for (sent, received) in &ways {
            assert!(sent == received, "{args:?}: not the same frames");
            for (number, (len, bytes)) in sent.iter().enumerate() {
                assert_eq!((*len, bytes.len()), (size, (size as usize).min(1518)));
                // docs/bare-metal.md: the kind, and the sequence number.
                let kind = if number == 300 { [1, 0] } else { [0, 0] };
                assert_eq!(bytes[44..46], kind, "{args:?}: frame {number}");
                let sequence = u64::from_le_bytes(bytes[48..56].try_into().unwrap());
                assert_eq!(sequence, number as u64, "{args:?}");
            }
        }
        // All data frames and their end, in the directions that there are.
        let expected = match args[1] {
            "be-to-fe" => [301, 0],
            "fe-to-be" => [0, 301],
            _ => [301, 301],
        };
        assert_eq!(ways.map(|(sent, _)| sent.len()), expected, "{args:?}");
    }
}

#[test]
fn several_queue_pairs_are_in_one_file() {
    let _machine = machine();
    let args = ["--queues", "2", "--count", "200", "--direction", "be-to-fe"];
    let [back, front] = captured(&args, "");
    for flow in [9_u8, 10] {
        let of = |packets: &[Packet], sent| -> Vec<Vec<u8>> {
            way(packets, sent)
                .into_iter()
                .filter(|(_, bytes)| bytes[36..38] == [0, flow])
                .map(|(_, bytes)| bytes.to_vec())
                .collect()
        };
        let sent = of(&back, true);
        assert_eq!(sent.len(), 201, "flow {flow}");
        assert!(sent == of(&front, false), "flow {flow}");
    }
}

#[test]
fn as_many_frames_and_bytes_are_in_it_as_were_asked_for_and_the_others_pass() {
    let _machine = machine();
    let args = ["--count", "50000", "--direction", "both", "--size", "128"];
    for packets in captured(&args, ",frames=20,snaplen=60") {
        assert_eq!(packets.len(), 20);
        assert!(packets.iter().all(|p| (p.len, p.bytes.len()) == (128, 60)));
    }
}

#[test]
fn a_full_disk_costs_the_capture_and_not_the_vms() {
    let _machine = machine();
    let capture = "back=/dev/full,front=/dev/full";
    let ended = run(&["pair", "--count", "1000", "--capture", capture]);
    ended.expect_code(0);
    let whole = "received 1000 frames, every byte checked: 0 lost";
    assert_eq!(ended.stdout.matches(whole).count(), 2, "{ended:?}");
    for end in ["back-end  | ", "front-end | "] {
        let warns = |line: &&str| line.starts_with(end) && line.contains("--capture");
        assert_eq!(ended.stderr.lines().filter(warns).count(), 1, "{ended:?}");
    }
}

#[test]
fn a_place_where_a_capture_cannot_go_is_one_line() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("no/such/place");
    let ended = run(&["run", "--console", "output", "--capture", &path]);
    ended.expect_code(1).expect_one_line(&["--capture", &path]);
}
