//! Frames whose checksum or segmentation is left to the other side.

use virtqueue::net::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_USO4, F_HOST_TSO4, F_HOST_USO, F_MRG_RXBUF,
    GUEST_OFFLOADS, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, HDR_GSO_NONE, HDR_GSO_TCPV4, HDR_GSO_TCPV6,
    HDR_GSO_UDP_L4, HEADER_LEN, HOST_OFFLOADS, Header, MAX_LARGE_FRAME, Offloads,
};

use super::*;
use crate::port::Error;

const ALL: u64 = HOST_OFFLOADS | GUEST_OFFLOADS;

fn uso() -> Header {
    Header {
        flags: HDR_F_NEEDS_CSUM,
        gso_type: HDR_GSO_UDP_L4,
        hdr_len: 42,
        gso_size: 1472,
        csum_start: 34,
        csum_offset: 6,
        num_buffers: 0,
    }
}

fn csum() -> Header {
    Header {
        gso_type: HDR_GSO_NONE,
        gso_size: 0,
        hdr_len: 0,
        ..uso()
    }
}

/// Every way to send, over rings that a long frame fits in and buffers that it does not.
fn joined_with(offloads: u64) -> impl Iterator<Item = JoinConfig> {
    let configs = configs(256).filter(|config| config.shape.mergeable);
    configs.map(move |config| JoinConfig {
        shape: Shape {
            offloads,
            ..config.shape
        },
        ..config
    })
}

fn send_with(port: &mut impl Port, header: &Header, frames: &[Vec<u8>]) -> usize {
    let len = frames[0].len();
    port.tx_offloaded(header, frames.len(), len, |i, slot| {
        assert_eq!(slot.len(), len);
        assert!(slot.write(0, &frames[i]));
        assert!(!slot.write(1, &frames[i]), "one byte too far");
    })
    .unwrap()
}

/// What arrives, with its header.
fn receive_with(port: &mut impl Port, count: usize) -> Vec<(Option<Header>, Vec<u8>)> {
    let mut got = Vec::new();
    let n = port
        .rx_burst(count, |frame: &Frame| {
            let mut bytes = vec![0; frame.len()];
            assert!(frame.read(0, &mut bytes));
            assert!(frame.matches(0, &bytes) && !frame.is_empty());
            assert!(!frame.read(1, &mut bytes.clone()), "one byte too far");
            for at in [0, 1500, 1518, 3036, bytes.len() - 8] {
                let long = bytes.get(at..at + 8).map(|b| b.try_into().unwrap());
                assert_eq!(frame.u64(at), long.map(u64::from_le_bytes), "at {at}");
                let short = bytes.get(at..at + 4).map(|b| b.try_into().unwrap());
                assert_eq!(frame.u32(at), short.map(u32::from_le_bytes), "at {at}");
            }
            got.push((frame.header(), bytes));
        })
        .unwrap();
    // Frames that are dropped came, too.
    assert!(n >= got.len());
    got
}

#[test]
fn long_frames_arrive_unchanged_with_their_headers_both_ways_among_short_ones() {
    for config in joined_with(ALL) {
        let (_bed, mut front, mut back) = join(&config);
        for round in 0..12 {
            let cases = [
                (&uso(), MAX_LARGE_FRAME, 1),
                (&uso(), 1519, 2),
                (&csum(), 1518, 3),
                (&csum(), 60, 5),
                (&uso(), 9000 + round, 2),
            ];
            for (header, len, count) in cases {
                let out = frames(count, len, round);
                let want: Vec<_> = out.iter().map(|f| (Some(*header), f.clone())).collect();
                assert_eq!(send_with(&mut back, header, &out), count, "{config:?}");
                assert_eq!(receive_with(&mut front, 32), want, "{config:?}");
                assert_eq!(send_with(&mut front, header, &out), count, "{config:?}");
                assert!(!front.drained().unwrap());
                assert_eq!(receive_with(&mut back, 32), want, "{config:?}");
                assert!(front.drained().unwrap());
            }
            let plain = frames(7, 64, round);
            let want: Vec<_> = plain.iter().map(|f| (None, f.clone())).collect();
            assert_eq!(send(&mut back, &plain), 7);
            assert_eq!(receive_with(&mut front, 32), want, "{config:?}");
            assert_eq!(send(&mut front, &plain), 7);
            assert_eq!(receive_with(&mut back, 32), want, "{config:?}");
        }
    }
}

#[test]
fn a_burst_of_long_frames_goes_as_far_as_there_is_room_and_on_when_there_is_more() {
    for config in joined_with(ALL) {
        let (_bed, mut front, mut back) = join(&config);
        let out = frames(20, 65000, 3);
        let (mut sent, mut got) = (0, Vec::new());
        while got.len() < out.len() {
            let n = if sent < out.len() {
                send_with(&mut back, &uso(), &out[sent..])
            } else {
                0
            };
            assert!(n < 20, "not all fit at once");
            sent += n;
            // One at a time: what is left of a look at the ring is there for the next.
            let one = receive_with(&mut front, 1);
            assert_eq!(one.len(), 1, "{config:?}");
            got.extend(one.into_iter().map(|(_, frame)| frame));
        }
        assert_eq!(got, out);
        let (mut sent, mut got) = (0, Vec::new());
        while got.len() < out.len() {
            if sent < out.len() {
                sent += send_with(&mut front, &uso(), &out[sent..]);
            }
            let some = receive_with(&mut back, 3);
            got.extend(some.into_iter().map(|(_, frame)| frame));
        }
        assert_eq!(got, out);
        assert!(front.drained().unwrap());
    }
}

#[test]
fn nothing_is_sent_that_was_not_negotiated() {
    let none = Header::NONE;
    for (offloads, header, len, to_front, to_back) in [
        (0, &csum(), 64, false, false),
        (F_CSUM, &csum(), 64, false, true),
        (F_GUEST_CSUM, &csum(), 64, true, false),
        (F_CSUM | F_GUEST_CSUM, &uso(), 64, false, false),
        (F_CSUM | F_HOST_USO, &uso(), 3000, false, true),
        (F_GUEST_CSUM | F_GUEST_USO4, &uso(), 3000, true, false),
        (ALL & !F_CSUM, &uso(), 3000, true, false),
        (ALL & !F_GUEST_CSUM, &uso(), 3000, false, true),
        (F_GUEST_USO4 | F_HOST_USO, &uso(), 3000, false, false),
        (ALL, &none, 1519, false, false),
        (ALL, &uso(), MAX_LARGE_FRAME + 1, false, false),
        (ALL, &uso(), 39, false, false),
    ] {
        for config in joined_with(offloads) {
            let (_bed, mut front, mut back) = join(&config);
            let try_send = |port: &mut dyn FnMut(&Header) -> Result<usize, Error>, goes| {
                let want = if goes { Ok(1) } else { Err(Error::Offload) };
                assert_eq!(port(header), want, "{header:?} {len} {offloads:#x}");
            };
            let build = |_, slot: &mut crate::Slot| assert!(slot.write(0, &[7; 14]));
            try_send(&mut |h| back.tx_offloaded(h, 1, len, build), to_front);
            assert_eq!(receive_with(&mut front, 4).len(), usize::from(to_front));
            try_send(&mut |h| front.tx_offloaded(h, 1, len, build), to_back);
            assert_eq!(receive_with(&mut back, 4).len(), usize::from(to_back));
            // And what asks for nothing goes on.
            let plain = frames(3, 60, 1);
            assert_eq!(send(&mut back, &plain), 3);
            assert_eq!(receive(&mut front, 4), plain);
            assert_eq!(send(&mut front, &plain), 3);
            assert_eq!(receive(&mut back, 4), plain);
        }
    }
}

/// Headers that a frame of 200 bytes cannot have, with these features. `csum_bit` is of the direction that it goes.
fn lies(csum_bit: u64) -> Vec<(u64, Header)> {
    let tso = Header {
        gso_type: HDR_GSO_TCPV4,
        ..uso()
    };
    let mut lies = vec![
        // Not negotiated.
        (ALL & !csum_bit, csum()),
        (ALL & !csum_bit, tso),
        (ALL & !F_HOST_TSO4 & !F_GUEST_TSO4, tso),
        // A checksum that is not in the frame, and one whose end is one byte beyond.
        (
            ALL,
            Header {
                csum_start: u16::MAX,
                csum_offset: u16::MAX,
                ..csum()
            },
        ),
        (
            ALL,
            Header {
                csum_start: 200,
                ..csum()
            },
        ),
        (
            ALL,
            Header {
                csum_start: 199,
                csum_offset: 0,
                ..csum()
            },
        ),
        (
            ALL,
            Header {
                csum_offset: u16::MAX,
                ..csum()
            },
        ),
        // Segments without a checksum, of no length, with headers longer than the frame.
        (ALL, Header { flags: 0, ..tso }),
        (
            ALL,
            Header {
                flags: HDR_F_DATA_VALID,
                ..tso
            },
        ),
        (ALL, Header { gso_size: 0, ..tso }),
        (
            ALL,
            Header {
                hdr_len: 201,
                ..tso
            },
        ),
    ];
    // Kinds of segments that there are not, or that were not negotiated.
    for gso_type in [
        2,
        3,
        6,
        0x7f,
        0x80,
        HDR_GSO_TCPV4 | 0x80,
        HDR_GSO_TCPV6 | 0x80,
        0xff,
    ] {
        lies.push((ALL, Header { gso_type, ..tso }));
    }
    lies
}

fn headers_that_lie_cost_their_frame_and_nothing_else<L: Layout>() {
    for (features, header) in lies(F_CSUM) {
        let mut hand = ByHand::<L>::new_with(features);
        let frame = &frames(1, 200, 3)[0];
        hand.put(BUFFERS, &header.encode());
        hand.put(BUFFERS + 12, frame);
        hand.put(BUFFERS + 0x1000, &[0; 12]);
        hand.put(BUFFERS + 0x100c, frame);
        for offset in [0, 0x1000] {
            hand.tx.add(&[piece(offset, 212, false)]).unwrap();
        }
        hand.tx.publish();
        let want = [(None, frame.clone())];
        assert_eq!(receive_with(&mut hand.back, 4), want, "{header:?}");
        assert_eq!(used(&mut hand.tx).len(), 2);
        assert_eq!(hand.back.dropped(), 1);
    }
}

/// Where the first receive pool begins: behind the first ring.
fn pool(config: &JoinConfig) -> u64 {
    let areas = match config.packed {
        true => Packed::area_sizes(config.size),
        false => Split::area_sizes(config.size),
    };
    let pages = areas.unwrap().map(|len| len.next_multiple_of(4096) as u64);
    START + pages.iter().sum::<u64>()
}

/// Overwrites the header of a frame in a receive buffer, which the front-end has not looked at.
fn overwrite(bed: &Bed, config: &JoinConfig, buffer: u64, header: Header) {
    let at = pool(config) + buffer * BUFFER_STRIDE as u64 + FRONT as u64;
    let to = bed.memory.ptr(at, HEADER_LEN).unwrap();
    // SAFETY: the pointer was checked, and both ends are idle.
    unsafe { to.copy_from(header.encode().as_ptr(), HEADER_LEN) };
}

#[test]
fn headers_of_a_back_end_that_lie_cost_their_frame_and_nothing_else() {
    for (offloads, header) in lies(F_GUEST_CSUM) {
        for config in joined_with(offloads) {
            // The first buffers that a front-end gives away are the first of the pool.
            let (bed, mut front, mut back) = join(&config);
            let out = frames(3, 200, 1);
            assert_eq!(send(&mut back, &out), 3);
            overwrite(
                &bed,
                &config,
                1,
                Header {
                    num_buffers: 1,
                    ..header
                },
            );
            let got = receive_with(&mut front, 8);
            let want = [0, 2].map(|i| (None, out[i].clone()));
            assert_eq!(got, want, "{header:?}");
            // All buffers are back: the ring goes round as before.
            for round in 0..3 {
                let out = frames(256, 60, round);
                assert_eq!(send(&mut back, &out), 256);
                assert_eq!(receive(&mut front, 256), out);
            }
        }
    }
}

#[test]
fn a_lying_buffer_count_shows_nothing_that_is_too_long_and_holds_no_buffers_for_ever() {
    let split = |config: &JoinConfig| !config.packed && config.shape.rx_buffer == 1530;
    for config in joined_with(ALL).filter(split) {
        let size = usize::from(config.size);
        // None; more than the ring has; as many as it has.
        for lie in [0, u16::MAX, config.size + 1, config.size] {
            let (bed, mut front, mut back) = join(&config);
            let out = frames(size, 1518, 1);
            assert_eq!(send(&mut back, &out), size);
            overwrite(
                &bed,
                &config,
                0,
                Header {
                    num_buffers: lie,
                    ..Header::NONE
                },
            );
            let got = receive(&mut front, 256);
            let want = match lie {
                // It is one.
                0 => &out[..],
                // What follows it is a part of it, and all of it is too long.
                lie if usize::from(lie) == size => &[],
                _ => &out[1..],
            };
            assert_eq!(got, want, "{lie}");
            let out = frames(size, 60, 2);
            assert_eq!(send(&mut back, &out), size);
            assert_eq!(receive(&mut front, 256), out, "{lie}");
        }
        // A frame of two that are each whole: no frame, or one whose bytes are theirs.
        let (bed, mut front, mut back) = join(&config);
        let out = frames(3, 200, 1);
        assert_eq!(send(&mut back, &out), 3);
        overwrite(
            &bed,
            &config,
            0,
            Header {
                num_buffers: 2,
                ..Header::NONE
            },
        );
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let glued = [&out[0][..], &header, &out[1]].concat();
        assert_eq!(receive(&mut front, 8), [glued, out[2].clone()]);
    }
}

/// Without mergeable buffers, a long frame needs a chain that holds all of it (VIRTIO 1.3, section 5.1.6.3.1).
fn a_long_frame_fills_one_chain_exactly_where_frames_are_not_merged<L: Layout>() {
    let mut hand = ByHand::<L>::new_with(GUEST_OFFLOADS);
    let frame = &frames(1, 9000, 3)[0];
    // One byte less than it needs; then all, with the header in pieces.
    let short = [
        piece(0, 5, true),
        piece(0x1000, 4007, true),
        piece(0x2000, 4999, true),
    ];
    let whole = [
        piece(0x4000, 5, true),
        piece(0x4800, 6, true),
        piece(0x5000, 4001, true),
        piece(0x6800, 4096, true),
        piece(0x7c00, 1000, true),
    ];
    hand.rx.add(&short).unwrap();
    let id = hand.rx.add(&whole).unwrap();
    hand.rx.publish();
    let out = [frame.clone(), frame.clone()];
    assert_eq!(send_with(&mut hand.back, &uso(), &out), 2);
    let [lost, sent] = used(&mut hand.rx)[..] else {
        panic!("two chains");
    };
    assert_eq!((lost.len, hand.back.dropped()), (0, 1));
    assert_eq!(sent, Used { id, len: 9012 });
    let parts = [
        (0x4000, 5),
        (0x4800, 6),
        (0x5000, 4001),
        (0x6800, 4096),
        (0x7c00, 904),
    ];
    let packet = parts
        .map(|(offset, len)| hand.bytes(BUFFERS + offset, len))
        .concat();
    let header = Header {
        num_buffers: 1,
        ..uso()
    };
    assert_eq!(packet, [&header.encode()[..], frame].concat());
    assert_eq!(hand.bytes(BUFFERS + 0x7c00 + 904, 96), vec![0; 96]);
}

/// A driver may lay a packet out as it likes (VIRTIO 1.3, section 2.7.4).
fn a_long_frame_is_seen_as_one_however_its_chain_is_cut<L: Layout>() {
    let frame = &frames(1, 9000, 5)[0];
    let packet = [&uso().encode()[..], frame].concat();
    for lens in [
        &[9012][..],
        &[12, 9000],
        &[66, 4096, 4096, 754],
        &[1, 11, 0, 3, 8997],
        &[5, 4000, 5007],
    ] {
        let mut hand = ByHand::<L>::new_with(HOST_OFFLOADS);
        let (mut at, mut pieces) = (0, Vec::new());
        for (i, &len) in (0..).zip(lens) {
            // A gap behind each.
            let offset = at as u64 + 64 * i;
            hand.put(BUFFERS + offset, &packet[at..at + len]);
            pieces.push(piece(offset, u32::try_from(len).unwrap(), false));
            at += len;
        }
        hand.tx.add(&pieces).unwrap();
        hand.tx.publish();
        assert_eq!(
            receive_with(&mut hand.back, 4),
            [(Some(uso()), frame.clone())],
            "{lens:?}"
        );
    }
}

fn a_frame_over_several_chains_says_how_many<L: Layout>() {
    let mut hand = ByHand::<L>::new_with(GUEST_OFFLOADS | F_MRG_RXBUF);
    let frame = &frames(1, 5000, 3)[0];
    for i in 0..6 {
        hand.rx.add(&[piece(0x800 * i, 1536, true)]).unwrap();
    }
    hand.rx.publish();
    assert_eq!(
        send_with(&mut hand.back, &uso(), std::slice::from_ref(frame)),
        1
    );
    let lens: Vec<u32> = used(&mut hand.rx).iter().map(|used| used.len).collect();
    assert_eq!(lens, [1536, 1536, 1536, 404]);
    let header = Header {
        num_buffers: 4,
        ..uso()
    };
    let mut packet = vec![];
    for (i, len) in (0..).zip(lens) {
        packet.extend(hand.bytes(BUFFERS + 0x800 * i, usize::try_from(len).unwrap()));
    }
    assert_eq!(packet, [&header.encode()[..], frame].concat());
    // Two are left, and four are needed: it waits, and they stay.
    assert_eq!(
        send_with(&mut hand.back, &uso(), std::slice::from_ref(frame)),
        0
    );
    assert_eq!(send(&mut hand.back, &frames(2, 100, 1)), 2);
    assert_eq!(hand.back.dropped(), 0);
}

/// Whatever a front-end writes as a header and however it cuts its chains: what is shown is what the check lets through, byte for byte.
fn no_header_and_no_cut_shows_what_the_check_refuses<L: Layout>() {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 16) % below
    };
    let mut hand = ByHand::<L>::new_with(HOST_OFFLOADS);
    let allowed = Offloads::of_driver(HOST_OFFLOADS);
    let (mut shown, mut refused) = (0, 0);
    for round in 0..4000 {
        let len = usize::try_from(next(3000)).unwrap();
        let mut packet = frames(1, 12 + len, round).remove(0);
        let mut header = [0; HEADER_LEN];
        for byte in &mut header {
            // Few bits, so that some make sense.
            *byte = match next(4) {
                0 => next(256).to_le_bytes()[0],
                1 => next(8).to_le_bytes()[0],
                _ => 0,
            };
        }
        packet[..12].copy_from_slice(&header);
        let (mut at, mut pieces) = (0, Vec::new());
        while at < packet.len() && pieces.len() < 15 {
            let most = (packet.len() - at) as u64;
            let part = match pieces.len() {
                14 => most,
                _ => 1 + next(most),
            };
            let end = at + usize::try_from(part).unwrap();
            let offset = at as u64 + 32 * pieces.len() as u64;
            hand.put(BUFFERS + offset, &packet[at..end]);
            pieces.push(piece(offset, u32::try_from(part).unwrap(), false));
            at = end;
        }
        hand.tx.add(&pieces).unwrap();
        hand.tx.publish();
        let got = receive_with(&mut hand.back, 4);
        let want = allowed.check_segment(&Header::decode(header), len);
        let want = want.map(|header| {
            let header = Some(header).filter(|header| *header != Header::NONE);
            (header, packet[12..].to_vec())
        });
        shown += u32::from(want.is_some());
        refused += u32::from(want.is_none());
        assert_eq!(got, want.as_slice(), "{header:?} {pieces:?}");
        assert_eq!(used(&mut hand.tx).len(), 1);
    }
    assert!(shown > 200 && refused > 200, "{shown} {refused}");
}

both_layouts!(
    no_header_and_no_cut_shows_what_the_check_refuses,
    headers_that_lie_cost_their_frame_and_nothing_else,
    a_long_frame_fills_one_chain_exactly_where_frames_are_not_merged,
    a_long_frame_is_seen_as_one_however_its_chain_is_cut,
    a_frame_over_several_chains_says_how_many,
);

#[test]
fn what_was_received_and_not_looked_at_needs_no_interrupt() {
    for config in joined_with(ALL) {
        let (_bed, mut front, mut back) = join(&config);
        assert_eq!(send(&mut back, &frames(3, 64, 0)), 3);
        for _ in 0..3 {
            assert!(front.arm(true, false));
            front.disarm();
            assert_eq!(receive(&mut front, 1).len(), 1);
        }
        assert!(!front.arm(true, false));
    }
}
