//! Framing.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{Leash, bytes, connections, descriptors, pair, shrink_send_buffer};
use crate::vhost_user::{Error, MAX_FDS, MAX_PAYLOAD, Message, U64, Violation, flags, requests};

/// Sends bytes with descriptors, in one piece.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    assert_eq!(stream.send_with_fds(&[bytes], fds).unwrap(), bytes.len());
}

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

#[test]
fn a_message_split_at_every_byte_boundary_arrives_whole() {
    let message = Message::request(requests::SET_FEATURES, &U64(0x0102_0304_0506_0708));
    let bytes = bytes(&message);
    for split in 1..bytes.len() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&bytes[..split]).unwrap();
        assert!(ours.receive().unwrap().is_none(), "split at {split}");
        theirs.write_all(&bytes[split..]).unwrap();
        let received = ours.receive().unwrap().unwrap();
        assert_eq!(received.request, requests::SET_FEATURES);
        assert_eq!(received.flags, flags::VERSION);
        assert_eq!(received.payload, message.payload);
        assert!(ours.receive().unwrap().is_none());
    }
}

#[test]
fn a_message_that_comes_byte_by_byte_arrives_whole() {
    let message = Message::request(requests::SET_FEATURES, &U64(7));
    let (mut ours, mut theirs) = pair();
    for byte in bytes(&message) {
        assert!(ours.receive().unwrap().is_none());
        theirs.write_all(&[byte]).unwrap();
    }
    assert_eq!(ours.receive().unwrap().unwrap().payload, message.payload);
}

#[test]
fn descriptors_belong_to_the_message_whichever_piece_they_come_with() {
    let message = bytes(&Message::request(requests::SET_VRING_KICK, &U64(0)));
    let following = bytes(&Message::bare(requests::GET_FEATURES));
    for split in 0..message.len() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&message[..split]).unwrap();
        assert!(ours.receive().unwrap().is_none());
        let fd = descriptors(1);
        send(&theirs, &message[split..], &[fd[0].as_raw_fd()]);
        theirs.write_all(&following).unwrap();
        let received = ours.receive().unwrap().unwrap();
        assert_eq!(received.fds.len(), 1, "split at {split}");
        let inode = |fd: RawFd| {
            std::fs::metadata(format!("/proc/self/fd/{fd}"))
                .unwrap()
                .ino()
        };
        assert_eq!(inode(received.fds[0].as_raw_fd()), inode(fd[0].as_raw_fd()));
        let following = ours.receive().unwrap().unwrap();
        assert!(following.fds.is_empty(), "split at {split}");
    }
}

#[test]
fn received_descriptors_are_not_inherited_by_other_programs() {
    let (mut ours, mut theirs) = connections();
    let message = Message::bare(requests::SET_LOG_FD).with_fds(descriptors(2));
    theirs.send(&message).unwrap();
    for fd in ours.receive().unwrap().unwrap().fds {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
        let info = info.unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        assert_ne!(flags & libc::O_CLOEXEC, 0);
    }
}

#[test]
fn as_many_descriptors_as_allowed_arrive_and_one_more_is_a_violation() {
    let bare = bytes(&Message::bare(requests::SET_LOG_FD));
    let (mut ours, theirs) = pair();
    let fds = descriptors(MAX_FDS + 1);
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    send(&theirs, &bare, &raw[..MAX_FDS]);
    assert_eq!(ours.receive().unwrap().unwrap().fds.len(), MAX_FDS);
    send(&theirs, &bare, &raw);
    assert!(matches!(
        ours.receive(),
        Err(Error::Violation(Violation::FdCount))
    ));
}

#[test]
fn too_many_descriptors_spread_over_the_pieces_of_one_message_are_a_violation() {
    let bare = bytes(&Message::bare(requests::SET_LOG_FD));
    let (mut ours, theirs) = pair();
    let fds = descriptors(17);
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    send(&theirs, &bare[..3], &raw);
    assert!(ours.receive().unwrap().is_none());
    send(&theirs, &bare[3..], &raw);
    assert!(matches!(
        ours.receive(),
        Err(Error::Violation(Violation::FdCount))
    ));
}

#[test]
fn no_descriptor_stays_open_after_any_error() {
    let good = bytes(&Message::request(requests::SET_VRING_KICK, &U64(0)));
    let cases: [(&str, Vec<u8>, usize); 5] = [
        ("wrong version", header(1, 2, 0), 1),
        ("oversized payload", header(1, 1, 1 << 20), 1),
        ("end in the header", good[..5].to_vec(), 1),
        ("end in the payload", good[..15].to_vec(), 1),
        ("too many", good, MAX_FDS + 1),
    ];
    for (name, bytes, count) in cases {
        let (leash, fd) = Leash::new();
        let (mut ours, theirs) = pair();
        send(&theirs, &bytes, &vec![fd.as_raw_fd(); count]);
        drop((theirs, fd));
        assert!(!leash.is_free(), "{name}");
        while let Ok(Some(_)) | Ok(None) = ours.receive() {}
        drop(ours);
        assert!(leash.is_free(), "{name}");
    }
}

#[test]
fn descriptors_close_with_a_message_that_is_thrown_away() {
    let (leash, fd) = Leash::new();
    let (mut ours, mut theirs) = connections();
    let message = Message::bare(requests::SET_LOG_FD).with_fds(vec![fd]);
    theirs.send(&message).unwrap();
    drop(message);
    let received = ours.receive().unwrap();
    assert!(!leash.is_free());
    drop(received);
    assert!(leash.is_free());
}

#[test]
fn a_version_other_than_1_is_a_violation_before_any_payload_comes() {
    for version in [0, 2, 3, 0xc] {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&header(1, version, 8)).unwrap();
        let result = ours.receive();
        assert!(
            matches!(result, Err(Error::Violation(Violation::Version(v))) if v == version),
            "{result:?}"
        );
        // It stays one: a caller that goes on cannot mistake the payload for a message.
        assert!(matches!(ours.receive(), Err(Error::Violation(_))));
    }
}

#[test]
fn the_longest_payload_arrives_and_one_byte_more_is_a_violation() {
    let (mut ours, mut theirs) = connections();
    let mut message = Message::bare(requests::SET_CONFIG);
    message.payload = vec![0x5a; MAX_PAYLOAD];
    theirs.send(&message).unwrap();
    assert_eq!(ours.receive().unwrap().unwrap().payload, message.payload);
    message.payload.push(0);
    assert!(matches!(
        theirs.send(&message),
        Err(Error::Unsendable { .. })
    ));
    for size in [4085, 4096, u32::MAX] {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&header(1, 1, size)).unwrap();
        let result = ours.receive();
        assert!(
            matches!(result, Err(Error::Violation(Violation::PayloadSize(s))) if s == size),
            "{result:?}"
        );
    }
}

#[test]
fn the_end_of_the_stream_is_a_close_between_messages_and_a_truncation_inside_one() {
    let message = bytes(&Message::request(requests::SET_FEATURES, &U64(7)));
    for len in 0..message.len() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&message[..len]).unwrap();
        drop(theirs);
        let error = ours.receive().unwrap_err();
        assert!(error.is_disconnect());
        assert_eq!(matches!(error, Error::Closed), len == 0, "{len}: {error}");
        assert_eq!(
            matches!(error, Error::Truncated),
            len != 0,
            "{len}: {error}"
        );
    }
}

#[test]
fn sending_to_a_peer_that_is_gone_is_a_disconnect_and_no_signal() {
    let (mut ours, theirs) = pair();
    drop(theirs);
    let error = ours.send(&Message::bare(requests::SET_OWNER)).unwrap_err();
    assert!(error.is_disconnect());
}

#[test]
fn a_peer_that_does_not_read_delays_messages_and_then_overflows_but_nothing_is_lost() {
    let (mut ours, mut theirs) = connections();
    let number = |n: u64| Message::request(requests::SET_FEATURES, &U64(n));
    let mut sent = 0u64;
    let error = loop {
        let (_leash, fd) = Leash::new();
        match ours.send(&number(sent).with_fds(vec![fd])) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1_000_000, "nothing bounds what waits");
    };
    assert!(matches!(error, Error::Overflow));
    assert!(!error.is_disconnect());
    assert!(ours.wants_write());
    let mut received = 0;
    while received < sent {
        match theirs.receive().unwrap() {
            Some(message) => {
                assert_eq!(message.payload, received.to_le_bytes());
                assert_eq!(message.fds.len(), 1, "message {received}");
                received += 1;
            }
            None => ours.flush().unwrap(),
        }
    }
    assert!(!ours.wants_write());
}

#[test]
fn posted_messages_wait_for_a_flush_and_keep_their_place_among_the_others() {
    let (mut ours, mut theirs) = connections();
    let number = |n| Message::request(requests::SET_FEATURES, &U64(n));
    for n in 0..3 {
        ours.post(&number(n)).unwrap();
    }
    assert!(ours.wants_write() && !ours.is_blocked());
    assert!(theirs.receive().unwrap().is_none());
    ours.send(&number(3)).unwrap();
    ours.post(&number(4).with_fds(descriptors(2))).unwrap();
    ours.post(&number(5)).unwrap();
    ours.flush().unwrap();
    for n in 0..6 {
        let message = theirs.receive().unwrap().unwrap();
        assert_eq!(message.payload, number(n).payload);
        assert_eq!(message.fds.len(), if n == 4 { 2 } else { 0 });
    }
    assert!(!ours.wants_write());
}

#[test]
fn posting_to_a_peer_that_does_not_read_overflows_and_one_that_reads_slowly_gets_everything() {
    let (mut ours, mut theirs) = connections();
    shrink_send_buffer(&ours);
    let message = |n| Message::request(requests::SET_FEATURES, &U64(n));
    let mut posted = 0;
    let mut read = 0;
    for _ in 0..20_000 {
        match ours.post(&message(posted)) {
            Ok(()) => posted += 1,
            Err(error) => {
                assert!(matches!(error, Error::Overflow));
                assert!(posted > 3000, "64 KiB of 20 bytes");
                ours.flush().unwrap();
                assert!(ours.is_blocked());
                let received = theirs.receive().unwrap().unwrap();
                assert_eq!(received.payload, message(read).payload);
                read += 1;
            }
        }
    }
    while read < posted {
        if let Some(received) = theirs.receive().unwrap() {
            assert_eq!(received.payload, message(read).payload);
            read += 1;
        } else {
            ours.flush().unwrap();
        }
    }
    ours.flush().unwrap();
    assert!(!ours.is_blocked() && !ours.wants_write());
}

#[test]
fn a_socket_that_takes_messages_in_pieces_gets_each_descriptor_once_and_never_overflows() {
    let (mut ours, mut theirs) = connections();
    shrink_send_buffer(&ours);
    let mut waited = false;
    for round in 0..50 {
        let sizes = [
            round,
            MAX_PAYLOAD,
            1500 + round,
            MAX_PAYLOAD - round,
            0,
            3000,
        ];
        for size in sizes {
            let mut message = Message::bare(requests::SET_LOG_FD).with_fds(descriptors(1));
            message.payload = vec![0x5a; size];
            ours.send(&message).unwrap();
        }
        waited |= ours.wants_write();
        for size in sizes {
            let message = loop {
                if let Some(message) = theirs.receive().unwrap() {
                    break message;
                }
                ours.flush().unwrap();
            };
            assert_eq!(message.fds.len(), 1);
            assert_eq!(message.payload, vec![0x5a; size]);
        }
        assert!(!ours.wants_write());
    }
    assert!(waited, "nothing was sent in pieces");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_of_messages_survives_any_fragmentation(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 1..10),
        cuts in prop::collection::vec(1usize..40, 1..40),
    ) {
        let (mut ours, mut theirs) = pair();
        let mut stream = Vec::new();
        for payload in &payloads {
            let mut message = Message::bare(requests::SET_CONFIG);
            message.payload.clone_from(payload);
            stream.extend_from_slice(&bytes(&message));
        }
        let mut received = Vec::new();
        let mut rest = &stream[..];
        for cut in cuts.iter().cycle() {
            let (piece, tail) = rest.split_at(rest.len().min(*cut));
            theirs.write_all(piece).unwrap();
            rest = tail;
            while let Some(message) = ours.receive().unwrap() {
                received.push(message.payload);
            }
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(received, payloads);
    }

    #[test]
    fn no_bytes_make_the_receiver_panic_or_commit_memory(
        stream in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&stream).unwrap();
        drop(theirs);
        let mut messages = 0;
        while let Ok(message) = ours.receive() {
            prop_assert!(message.is_some(), "a stream that has ended is never waited for");
            messages += 1;
        }
        prop_assert!(messages <= stream.len() / 12);
    }
}
