//! Records of a guest that is honest, of one that is not, and what is then in the file.

use std::path::Path;

use pcap_parser::parse_block_le;
use pcap_parser::pcapng::Block;
use pcap_parser::traits::PcapNGPacketBlock;

use super::*;

const LIMITS: Limits = Limits {
    snaplen: 8,
    frames: 3,
};

fn frames() -> Frames<Vec<u8>> {
    Frames::new(Vec::new(), "back-end", LIMITS)
}

/// What is in the file: when, which way (epb_flags), how long, what was kept.
fn written(frames: &Frames<Vec<u8>>) -> Vec<(u64, u8, u32, Vec<u8>)> {
    let mut rest = &frames.file.as_ref().unwrap().get_ref()[..];
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (behind, block) = parse_block_le(rest).unwrap();
        rest = behind;
        if let Block::EnhancedPacket(packet) = block {
            let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
            let flags = packet.options.iter().find(|option| option.code.0 == 2);
            let way = flags.unwrap().as_bytes().unwrap()[0];
            let data = packet.packet_data().to_vec();
            all.push((time, way, packet.origlen, data));
        }
    }
    all
}

const HEADER: &str =
    "{\"record\":\"capture\",\"id\":1,\"frames\":2,\"tsc_khz\":2000,\"now\":9000}\n";

fn record(ticks: u64, sent: u8, len: usize, bytes: &str) -> String {
    format!(
        "{{\"record\":\"frame\",\"ticks\":{ticks},\"sent\":{sent},\"len\":{len},\"bytes\":\"{bytes}\"}}\n"
    )
}

#[test]
fn frames_are_in_the_file_with_their_time_direction_and_length_whatever_pieces_they_come_in() {
    let text = [
        "{\"record\":\"ready\",\"role\":\"back-end\"}\n",
        HEADER,
        &record(1000, 1, 3, "00Ff7a"),
        &record(9000, 0, 1518, "0102030405060708"),
        "{\"record\":\"result\",\"id\":1}\n",
    ]
    .concat();
    for piece in [1, 7, 100_000] {
        let mut frames = frames();
        let before = now();
        for piece in text.as_bytes().chunks(piece) {
            frames.take(piece);
        }
        let all = written(&frames);
        let [first, second] = &all[..] else {
            panic!("{all:?}");
        };
        assert_eq!(
            (first.1, first.2, &first.3[..]),
            (2, 3, &[0, 0xff, 0x7a][..])
        );
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!((second.1, second.2, &second.3[..]), (1, 1518, &bytes[..]));
        // The last was sent as the record was written, the first 8000 ticks of half a microsecond before.
        assert_eq!(second.0 - first.0, 4_000_000);
        assert!((before..=now()).contains(&second.0));
        assert!(!frames.complained);
    }
}

#[test]
fn what_is_no_record_of_a_frame_is_left_out_and_the_next_one_is_not() {
    // Without a clock, with one that stands, and with one of before 1970.
    for clock in [
        "",
        "{\"record\":\"capture\",\"tsc_khz\":0,\"now\":5}\n",
        "{\"record\":\"capture\",\"tsc_khz\":1000}\n",
        "{\"record\":\"capture\",\"tsc_khz\":1,\"now\":18446744073709551615}\n",
    ] {
        let mut frames = frames();
        frames.take([clock, &record(1, 0, 1, "00")].concat().as_bytes());
        assert_eq!(written(&frames), [], "{clock}");
        assert!(frames.complained);
    }
    let bad = [
        // Not yet.
        record(9001, 0, 1, "00"),
        record(1, 2, 1, "00"),
        record(1, 0, 1, ""),
        record(1, 0, 1, "0"),
        record(1, 0, 1, "000"),
        record(1, 0, 1, "0g"),
        record(1, 0, 1, "+1"),
        record(1, 0, 2, "00"),
        record(1, 0, 9, "000102030405060708"),
        record(1, 0, (1 << 18) + 1, "0001020304050607"),
        record(1, 0, 1, "00").replace("\"len\":1,", ""),
        record(1, 0, 1, "00").replace("\"ticks\":1,", "\"ticks\":99999999999999999999,"),
        record(1, 0, 1, "00").replace("\"}", ""),
        record(1, 0, 8, &"é".repeat(8)),
        record(1, 0, 8, &"00".repeat(LINE_LIMIT)),
    ];
    for line in &bad {
        let mut frames = frames();
        frames.take(HEADER.as_bytes());
        frames.take(line.as_bytes());
        frames.take(b"\xff\xfe\n\n{\n");
        assert_eq!(written(&frames), [], "{line}");
        assert_eq!(frames.complained, line.len() < LINE_LIMIT, "{line}");
        frames.take(record(1, 0, 1, "2a").as_bytes());
        assert_eq!(written(&frames)[0].3, [0x2a]);
    }
    // Random bytes, and random changes of what is right.
    let good = [HEADER, &record(1000, 1, 3, "00ff7a")].concat();
    let mut seed = 1_u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..20_000 {
        let mut text = good.clone().into_bytes();
        for _ in 0..next(4) {
            let at = next(text.len());
            text[at] = next(256).to_le_bytes()[0];
        }
        let mut frames = frames();
        frames.take(&text);
        for (time, way, len, bytes) in written(&frames) {
            assert!(time <= now() && [1, 2].contains(&way));
            assert_eq!(bytes.len(), len.min(LIMITS.snaplen) as usize);
        }
    }
}

#[test]
fn a_guest_that_reports_without_end_fills_neither_the_disk_nor_the_memory() {
    let mut frames = frames();
    frames.take(HEADER.as_bytes());
    for _ in 0..1000 {
        frames.take(record(1, 0, 1, "00").as_bytes());
    }
    assert_eq!(written(&frames).len(), 3);
    let len = frames.file.as_ref().unwrap().get_ref().len();
    frames.take(&vec![b'x'; 10 * LINE_LIMIT]);
    assert!(frames.line.len() <= LINE_LIMIT);
    assert_eq!(frames.file.as_ref().unwrap().get_ref().len(), len);

    let inbox = Inbox::default();
    assert!(inbox.has_room());
    for _ in 0..1000 {
        inbox.take(&[b'x'; 4096]);
    }
    assert!(!inbox.has_room());
    inbox.end();
    assert!(inbox.next().unwrap().len() <= WAITING_LIMIT);
    assert!(inbox.next().is_none() && inbox.has_room());
}

#[test]
fn a_full_disk_costs_the_capture_and_the_guest_is_listened_to_all_the_same() {
    let full = pcapng::create(Path::new("/dev/full")).unwrap();
    let mut frames = Frames::new(full, "x", LIMITS);
    frames.take(HEADER.as_bytes());
    assert!(frames.file.is_none());
    frames.take(record(1, 0, 1, "00").as_bytes());
    frames.finish();
}
