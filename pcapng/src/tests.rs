//! What is written, as somebody else's parser reads it.

use std::fs;

use pcap_parser::pcapng::{Block, EnhancedPacketBlock, OptionCode, PcapNGOption};
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{Linktype, parse_block_le};

use super::*;

/// All blocks, and nothing behind them.
fn blocks(bytes: &[u8]) -> Vec<Block<'_>> {
    let mut rest = bytes;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (behind, block) = parse_block_le(rest).unwrap();
        all.push(block);
        rest = behind;
    }
    all
}

fn value<'a>(options: &'a [PcapNGOption<'_>], code: OptionCode) -> &'a [u8] {
    let option = options.iter().find(|option| option.code == code);
    option.unwrap().as_bytes().unwrap()
}

fn packets(bytes: &[u8]) -> Vec<EnhancedPacketBlock<'_>> {
    let packet = |block| match block {
        Block::EnhancedPacket(packet) => packet,
        other => panic!("{other:?}"),
    };
    blocks(bytes).drain(2..).map(packet).collect()
}

fn capture(limits: Limits) -> Capture<Vec<u8>> {
    Capture::new(Vec::new(), "back-end", limits)
}

/// Adds a frame whose bytes are all its length.
fn add(capture: &mut Capture<impl Write>, time: u64, direction: Direction, len: usize) {
    let byte = len.to_le_bytes()[0];
    capture.frame(time, direction, len, |to| to.fill(byte));
}

#[test]
fn another_parser_finds_the_interface_and_each_frame_with_its_time_and_direction() {
    let mut capture = capture(Limits::default());
    let times = [1_700_000_000_123_456_789, 0, u64::MAX];
    // Lengths of every remainder, the shortest and the longest.
    let lens = [60, 61, 62, 63, 1518, 0, 65549];
    let expected: Vec<_> = lens
        .into_iter()
        .zip(times.into_iter().cycle())
        .zip(
            [Direction::Inbound, Direction::Outbound]
                .into_iter()
                .cycle(),
        )
        .collect();
    for &((len, time), direction) in &expected {
        add(&mut capture, time, direction, len);
        capture.settle(true).unwrap();
    }
    capture.flush().unwrap();
    let all = blocks(&capture.out);
    let Block::SectionHeader(header) = &all[0] else {
        panic!("{:?}", all[0]);
    };
    assert_eq!((header.major_version, header.minor_version), (1, 0));
    let Block::InterfaceDescription(interface) = &all[1] else {
        panic!("{:?}", all[1]);
    };
    assert_eq!(interface.linktype, Linktype::ETHERNET);
    assert_eq!(interface.snaplen, SNAPLEN);
    let name = value(&interface.options, OptionCode::IfName);
    assert_eq!(name, b"back-end");
    assert_eq!(interface.if_tsresol, 9);
    let packets = packets(&capture.out);
    assert_eq!(packets.len(), expected.len());
    for (packet, ((len, time), direction)) in packets.iter().zip(expected) {
        let found = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
        assert_eq!((packet.if_id, found), (0, time));
        assert_eq!(packet.origlen as usize, len);
        assert_eq!(packet.packet_data(), vec![len.to_le_bytes()[0]; len]);
        let flags = value(&packet.options, OptionCode(2));
        assert_eq!(flags, [direction as u8, 0, 0, 0]);
    }
}

#[test]
fn frames_are_cut_at_the_snaplen_and_left_out_behind_the_last() {
    let mut capture = capture(Limits {
        snaplen: 61,
        frames: 3,
    });
    for len in [60, 61, 62, 63] {
        add(&mut capture, 1, Direction::Inbound, len);
        capture.settle(true).unwrap();
    }
    assert!(capture.is_full());
    capture.flush().unwrap();
    let lens: Vec<_> = packets(&capture.out)
        .iter()
        .map(|packet| (packet.caplen, packet.origlen))
        .collect();
    assert_eq!(lens, [(60, 60), (61, 61), (61, 62)]);
}

#[test]
fn a_burst_that_was_not_whole_leaves_nothing_and_takes_no_place() {
    let mut capture = capture(Limits {
        frames: 2,
        ..Limits::default()
    });
    for (len, whole) in [(60, true), (61, false), (62, true), (63, true)] {
        add(&mut capture, 1, Direction::Outbound, len);
        capture.flush().unwrap();
        capture.settle(whole).unwrap();
    }
    capture.flush().unwrap();
    let lens: Vec<_> = packets(&capture.out)
        .iter()
        .map(|packet| packet.origlen)
        .collect();
    assert_eq!(lens, [60, 62]);
}

/// Takes so many bytes at a time, and nothing every other time.
struct Slow {
    taken: Vec<u8>,
    most: usize,
    asked: usize,
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.asked += 1;
        if self.most == 0 || self.asked.is_multiple_of(2) {
            return Err(ErrorKind::WouldBlock.into());
        }
        let len = bytes.len().min(self.most);
        self.taken.extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn slow(most: usize) -> Capture<Slow> {
    let out = Slow {
        taken: Vec::new(),
        most,
        asked: 0,
    };
    Capture::new(out, "x", Limits::default())
}

#[test]
fn a_pipe_that_takes_little_at_a_time_gets_everything_in_the_end() {
    let mut capture = slow(1000);
    for _ in 0..300 {
        add(&mut capture, 7, Direction::Inbound, 1518);
        capture.settle(true).unwrap();
    }
    for _ in 0..1000 {
        capture.flush().unwrap();
    }
    assert_eq!(packets(&capture.out.taken).len(), 300);
    capture.finish().unwrap();
}

#[test]
fn a_reader_that_takes_nothing_ends_the_capture_and_not_the_memory() {
    let mut capture = slow(0);
    let frames = (0..BACKLOG / 1518 + 1).take_while(|_| {
        add(&mut capture, 7, Direction::Inbound, 1518);
        capture.settle(true).is_ok()
    });
    let frames = frames.count();
    assert!((BACKLOG / 1600..BACKLOG / 1518).contains(&frames));
    let error = capture.finish().unwrap_err().to_string();
    assert!(error.contains("does not keep up"), "{error}");
}

#[test]
fn a_file_is_made_anew_a_full_disk_is_an_error_and_so_is_a_pipe_that_nobody_reads() {
    let path = std::env::temp_dir().join(format!("pcapng-{}", std::process::id()));
    fs::write(&path, [0; 4096]).unwrap();
    let mut capture = Capture::new(create(&path).unwrap(), "x", Limits::default());
    add(&mut capture, 7, Direction::Inbound, 60);
    capture.settle(true).unwrap();
    capture.finish().unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(packets(&bytes).len(), 1);

    let full = create(Path::new("/dev/full")).unwrap();
    let error = Capture::new(full, "x", Limits::default()).finish();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::StorageFull);
}
