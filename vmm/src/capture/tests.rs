//! Records of a guest that is honest, of one that is not, and what is then in the file.

use std::path::Path;

use pcap_parser::parse_block_le;
use pcap_parser::pcapng::Block;
use pcap_parser::traits::PcapNGPacketBlock;

use super::*;
use crate::lines::LINE_LIMIT;

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

const CLOCK: Clock = Clock {
    ticks: 9000,
    tsc_khz: 2000,
    time: 1_700_000_000_000_000_000,
};

/// A frame as the guest has it in its memory.
fn raw(ticks: u64, len: u32, sent: u16, bytes: &[u8]) -> Vec<u8> {
    let kept = u16::try_from(bytes.len()).unwrap();
    let head = [&ticks.to_le_bytes()[..], &len.to_le_bytes()];
    [
        head.concat(),
        [kept, sent].map(u16::to_le_bytes).concat(),
        bytes.to_vec(),
    ]
    .concat()
}

fn report(bytes: Vec<u8>) -> Report {
    Report {
        clock: CLOCK,
        bytes,
    }
}

#[test]
fn frames_are_in_the_file_with_their_time_direction_and_length() {
    let mut frames = frames();
    let both = [
        raw(1000, 3, 1, &[0, 0xff, 0x7a]),
        raw(9000, 1518, 0, &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    frames.take(&report(both.concat()));
    // The second passed as the record was written, the first 8000 ticks of half a microsecond before.
    let time = CLOCK.time;
    assert_eq!(
        written(&frames),
        [
            (time - 4_000_000, 2, 3, vec![0, 0xff, 0x7a]),
            (time, 1, 1518, vec![1, 2, 3, 4, 5, 6, 7, 8])
        ]
    );
    assert!(!frames.complained);
    // Of the next workload there is one more, and then the file has all that it may have.
    frames.take(&report([raw(1, 1, 0, &[7]), raw(1, 1, 0, &[8])].concat()));
    assert_eq!(written(&frames).len(), 3);
}

#[test]
fn what_is_no_frame_is_left_out_with_all_behind_it() {
    let good = raw(1, 1, 0, &[0x2a]);
    let bad = [
        // Not yet.
        raw(9001, 1, 0, &[0]),
        raw(1, 1, 2, &[0]),
        raw(1, 1, 0, &[]),
        raw(1, 0, 0, &[0]),
        raw(1, 2, 0, &[0]),
        raw(1, 9, 0, &[0; 9]),
        raw(1, (1 << 18) + 1, 0, &[0; 8]),
        raw(1, u32::MAX, 0, &[0; 8]),
        // Cut short.
        raw(1, 8, 0, &[0; 8])[..HEAD + 7].to_vec(),
        raw(1, 8, 0, &[])[..HEAD - 1].to_vec(),
        vec![0],
    ];
    for bytes in bad {
        let mut frames = frames();
        let cut = bytes.len() < HEAD + 8;
        let behind = if cut { &[][..] } else { &good };
        frames.take(&report([&good, &bytes[..], behind].concat()));
        assert!(frames.complained, "{bytes:?}");
        assert_eq!(written(&frames)[0].3, [0x2a], "{bytes:?}");
        assert_eq!(written(&frames).len(), 1, "{bytes:?}");
    }
    // Clocks that no guest can have had.
    for clock in [
        Clock { time: 1, ..CLOCK },
        Clock {
            ticks: u64::MAX,
            tsc_khz: 1,
            ..CLOCK
        },
        Clock { ticks: 0, ..CLOCK },
    ] {
        let mut frames = frames();
        let bytes = good.clone();
        frames.take(&Report { clock, bytes });
        assert_eq!(written(&frames), [], "{clock:?}");
    }
    let mut seed = 1_u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..20_000 {
        let mut bytes = [raw(1000, 3, 1, &[1, 2, 3]), raw(7, 8, 0, &[9; 8])].concat();
        for _ in 0..next(4) {
            let at = next(bytes.len());
            bytes[at] = next(256).to_le_bytes()[0];
        }
        bytes.truncate(next(bytes.len() + 1));
        let mut frames = frames();
        frames.take(&report(bytes));
        for (time, way, len, bytes) in written(&frames) {
            assert!(time <= CLOCK.time && [1, 2].contains(&way));
            assert_eq!(bytes.len(), len.min(LIMITS.snaplen) as usize);
        }
    }
}

#[test]
fn only_a_record_of_what_is_in_the_guests_memory_is_heard() {
    const SIZE: u64 = 1 << 20;
    let region = (GuestAddress(0), usize::try_from(SIZE).unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[region]).unwrap();
    let config = CaptureConfig {
        path: "/dev/null".into(),
        interface: "x",
        frames: 3,
        snaplen: 8,
    };
    let opened = Recorder::open(&config).unwrap();
    let mut listener = opened.listener(&memory);
    memory.write_slice(&[7; 100], GuestAddress(0x1000)).unwrap();
    let record = |at: u64, len: u64| {
        format!(
            "{RECORD}\"id\":1,\"frames\":2,\"tsc_khz\":1000,\"now\":5,\"at\":{at},\"len\":{len}}}\n"
        )
    };
    for bad in [
        record(0x1000, 73),
        record(SIZE - 71, 72),
        record(SIZE, 1),
        record(u64::MAX, 72),
        record(u64::MAX - 71, 72),
        record(0, u64::MAX),
        record(0x1000, 72).replace("\"at\"", "\"it\""),
        record(0x1000, 72).replace("1000", "0"),
        record(0x1000, 72).replace(":5,", ":99999999999999999999,"),
    ] {
        listener.complained = false;
        listener.take(bad.as_bytes());
        assert!(listener.complained, "{bad}");
    }
    // What is something else is nobody's mistake.
    listener.complained = false;
    listener.take(b"{\"record\":\"result\"}\n\xff\xfe\n\n{\n");
    listener.take(&[b'x'; 10 * LINE_LIMIT]);
    listener.take(record(0x1000, 72).as_bytes());
    assert!(!listener.complained && listener.lines.len() <= LINE_LIMIT);
    assert!(opened.from.try_recv().is_err());
    for piece in record(0x1000, 72).as_bytes().chunks(7) {
        listener.take(piece);
    }
    // One waits; the next is too many.
    assert!(!listener.complained);
    listener.take(record(0x1000, 72).as_bytes());
    assert!(listener.complained);
    let report = opened.from.try_recv().unwrap().unwrap();
    assert_eq!(report.bytes, [7; 72]);
    assert!((report.clock.ticks, report.clock.tsc_khz) == (5, 1000));
    assert!(opened.from.try_recv().is_err());
}

#[test]
fn a_full_disk_costs_the_capture_and_the_guest_is_listened_to_all_the_same() {
    let full = pcapng::create(Path::new("/dev/full")).unwrap();
    let mut frames = Frames::new(full, "x", LIMITS);
    for _ in 0..2 {
        frames.take(&report(raw(1, 1, 0, &[0])));
        assert!(frames.file.is_none());
    }
    frames.finish();
}
