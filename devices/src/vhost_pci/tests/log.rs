//! The front-end's dirty log in the second window.

use super::backend::Books;
use super::records::{AT, PAGE, field, records};
use super::*;
use crate::vhost_pci::backend::Backend;
use crate::virtio::F_ACCESS_PLATFORM;

const F_LOG_ALL: u64 = 1 << 26;

fn log(file: &File, mmap_size: u64, mmap_offset: u64) -> Message {
    let log = Log {
        mmap_size,
        mmap_offset,
    };
    Message::request(requests::SET_LOG_BASE, &log).with_fds(vec![fd(file)])
}

/// A front-end that has negotiated these, out of the way.
fn negotiated(features: u64) -> (Rig, Connection) {
    let dir = TempDir::new().unwrap();
    let config = VhostPciConfig {
        log: true,
        ..config(&dir, SocketRole::Listen)
    };
    let rig = Rig::stopped(config, dir, None);
    rig.start();
    let (mut rig, mut peer) = Rig::connect_to(rig);
    let protocol = protocol_features::REPLY_ACK | protocol_features::LOG_SHMFD;
    for message in [
        Message::request(requests::SET_PROTOCOL_FEATURES, &U64(protocol)),
        Message::request(requests::SET_FEATURES, &U64(features)),
    ] {
        rig.request(&mut peer, &message);
        rig.received().expect("the message passes");
    }
    (rig, peer)
}

#[test]
fn a_log_is_shown_in_the_second_window_and_the_driver_answers() {
    let (mut rig, mut peer) = negotiated(F_LOG_ALL);
    assert_eq!(records(&rig).shown(), [(0, PAGE)]);
    assert_eq!((field(&rig, 24), field(&rig, 32)), (AT, WINDOW / PAGE / 8));
    // A file that ends within a page, and then another in its place.
    for (size, shown) in [(0x1234, 0x2000), (8, PAGE), (1 << 30, WINDOW / PAGE / 8)] {
        let message = log(&memory(size + 0x3000), size, 0x2000);
        rig.request(&mut peer, &message);
        assert_eq!(records(&rig).shown(), [(0, PAGE), (AT, shown)]);
        let passed = (requests::SET_LOG_BASE, flags::VERSION, message.payload);
        assert_eq!(rig.received(), Some(passed));
        rig.reply(requests::SET_LOG_BASE, &U64(0));
        let reply = peer.receive().unwrap().unwrap();
        assert_eq!(reply.request, requests::SET_LOG_BASE);
    }
    let (_, eventfd) = eventfd();
    let message = Message::bare(requests::SET_LOG_FD).with_fds(vec![eventfd]);
    rig.request(&mut peer, &message);
    assert_eq!(rig.received().unwrap().0, requests::SET_LOG_FD);
}

#[test]
fn what_is_no_log_is_refused() {
    let file = memory(0x4000);
    for (size, offset) in [
        (0, 0),
        (8, 1),
        (8, 0x4000),
        (0x4001, 0),
        (u64::MAX, 0),
        (0x2000, !0xfff),
    ] {
        let (mut rig, mut peer) = negotiated(F_LOG_ALL);
        let mut message = log(&file, size, offset);
        message.flags |= flags::NEED_REPLY;
        rig.request(&mut peer, &message);
        let reply = peer.receive().unwrap().unwrap();
        assert_eq!(reply.payload, U64(1).encode(), "{size:x} {offset:x}");
        assert_eq!(records(&rig).shown(), [(0, PAGE)]);
        // One that does not wait for an answer is cut off.
        rig.request(&mut peer, &log(&file, size, offset));
        rig.assert_gone(&mut peer);
    }
}

#[test]
fn with_the_front_end_its_log_goes() {
    let (mut rig, mut peer) = negotiated(F_LOG_ALL);
    rig.request(&mut peer, &log(&memory(PAGE), PAGE, 0));
    assert_eq!(records(&rig).shown().len(), 2);
    drop(peer);
    rig.pump();
    assert_eq!(records(&rig).shown(), [(0, PAGE)]);
}

#[test]
fn a_front_end_that_can_log_cannot_be_behind_an_iommu_and_the_other_way_round() {
    for (logs, passes, protocol) in [(true, F_LOG_ALL, 2u64), (false, F_ACCESS_PLATFORM, 0)] {
        let mut backend = Backend::new(WINDOW, QUEUES, logs);
        let mut books = Books::default();
        for (request, offered, expected) in [
            (
                requests::GET_FEATURES,
                F_LOG_ALL | F_ACCESS_PLATFORM,
                passes,
            ),
            (
                requests::GET_PROTOCOL_FEATURES,
                2,
                protocol | if logs { 0 } else { 1 << 5 },
            ),
        ] {
            backend
                .front_end(Message::bare(request), &mut books)
                .unwrap();
            let reply = Message::reply(request, &U64(offered));
            let reply = backend.driver(&bytes(&reply)).unwrap();
            assert_eq!(reply.payload, U64(expected).encode(), "{logs} {request}");
        }
        let both = Message::request(requests::SET_FEATURES, &U64(F_LOG_ALL | F_ACCESS_PLATFORM));
        assert!(backend.front_end(both, &mut books).is_err());
        let one = Message::request(requests::SET_FEATURES, &U64(passes));
        assert!(backend.front_end(one, &mut books).is_ok());
    }
}
