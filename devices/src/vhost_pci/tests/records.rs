//! The second window: the page of the VMM, and the record of what is in flight.

use super::*;
use crate::host::Permission;
use crate::pci::PciFunction;

pub(super) const PAGE: u64 = 4096;
/// Where the record of what is in flight ends, and the log begins.
pub(super) const AT: u64 = 16 << 20;

pub(super) fn records(rig: &Rig) -> Arc<FakeWindow> {
    rig.host.windows()[1].clone()
}

pub(super) fn field(rig: &Rig, at: u64) -> u64 {
    let mut bytes = [0; 8];
    assert!(records(rig).read(at, &mut bytes));
    u64::from_le_bytes(bytes)
}

#[test]
fn the_page_of_the_vmm_is_not_the_guests_to_write_and_a_write_beside_it_vanishes() {
    let (rig, _peer) = Rig::connected();
    assert_eq!(records(&rig).shown(), [(0, PAGE)]);
    assert_eq!(records(&rig).details()[0].3, Permission::READ);
    assert_eq!((field(&rig, 8), field(&rig, 16)), (PAGE, AT - PAGE));
    let function = &rig.driver.function;
    let mut data = [0; 8];
    function.bar_write(4, PAGE, &[1; 8]);
    function.bar_read(4, PAGE, &mut data);
    assert_eq!(data, [0xff; 8]);
    function.bar_write(4, 8, &[1; 8]);
    assert_eq!(field(&rig, 8), PAGE);
    function.bar_read(4, 8, &mut data);
    assert_eq!(u64::from_le_bytes(data), PAGE);
}

#[test]
fn with_the_front_end_the_generation_changes() {
    let (mut rig, peer) = Rig::connected();
    let before = field(&rig, 0);
    drop(peer);
    rig.pump();
    assert_ne!(field(&rig, 0), before);
}

/// A front-end that has negotiated INFLIGHT_SHMFD and REPLY_ACK, out of the way.
fn keeping() -> (Rig, Connection) {
    let (mut rig, mut peer) = Rig::connected();
    let protocol = protocol_features::REPLY_ACK | protocol_features::INFLIGHT_SHMFD;
    let message = Message::request(requests::SET_PROTOCOL_FEATURES, &U64(protocol));
    rig.request(&mut peer, &message);
    rig.received().expect("the message passes");
    (rig, peer)
}

fn wanted(num_queues: u16, queue_size: u16) -> Message {
    let wanted = Inflight {
        num_queues,
        queue_size,
        ..Inflight::default()
    };
    Message::request(requests::GET_INFLIGHT_FD, &wanted)
}

#[test]
fn an_area_for_what_is_in_flight_is_made_by_the_device_and_shown_when_it_comes_back() {
    let (mut rig, mut peer) = keeping();
    rig.request(&mut peer, &wanted(4, 100));
    assert_eq!(rig.received(), None, "the device answers");
    let reply = peer.receive().unwrap().unwrap();
    let area = Inflight::decode(&reply.payload).unwrap();
    // Each ring has a header and 100 entries of 32 bytes, in whole lines.
    let expected = Inflight {
        mmap_size: 4 * 3264,
        mmap_offset: 0,
        num_queues: 4,
        queue_size: 100,
    };
    assert_eq!(area, expected);
    let file = File::from(reply.fds.into_iter().next().unwrap());
    assert_eq!(file.metadata().unwrap().len(), 0x4000);
    assert_eq!(records(&rig).shown(), [(0, PAGE)]);
    for _ in 0..2 {
        let message = Message::request(requests::SET_INFLIGHT_FD, &area).with_fds(vec![fd(&file)]);
        rig.request(&mut peer, &message);
        let passed = (requests::SET_INFLIGHT_FD, flags::VERSION, message.payload);
        assert_eq!(rig.received(), Some(passed));
        assert_eq!(records(&rig).shown(), [(0, PAGE), (PAGE, 0x4000)]);
    }
    drop(peer);
    rig.pump();
    assert_eq!(records(&rig).shown(), [(0, PAGE)]);
}

#[test]
fn an_area_that_would_be_too_long_is_none() {
    let (mut rig, mut peer) = keeping();
    for (queues, size) in [(0, 256), (256, u16::MAX), (u16::MAX, u16::MAX), (16, 32768)] {
        rig.request(&mut peer, &wanted(queues, size));
        let reply = peer.receive().unwrap().unwrap();
        assert_eq!(Inflight::decode(&reply.payload), Ok(Inflight::default()));
        assert!(reply.fds.is_empty());
    }
    // The longest rings of seven pairs.
    rig.request(&mut peer, &wanted(14, 32768));
    assert_eq!(peer.receive().unwrap().unwrap().fds.len(), 1);
}

#[test]
fn what_is_no_area_for_what_is_in_flight_is_refused() {
    let file = memory(0x4000);
    for (mmap_size, mmap_offset) in [
        (0, 0),
        (64, 1),
        (0x4001, 0),
        (AT, 0),
        (u64::MAX, 0),
        (64, !0xfff),
    ] {
        let (mut rig, mut peer) = keeping();
        let area = Inflight {
            mmap_size,
            mmap_offset,
            num_queues: 2,
            queue_size: 16,
        };
        let message = Message::request(requests::SET_INFLIGHT_FD, &area);
        rig.request(
            &mut peer,
            &message.with_fds(vec![fd(&file)]).with_need_reply(true),
        );
        let reply = peer.receive().unwrap().unwrap();
        assert_eq!(reply.payload, U64(1).encode(), "{area:x?}");
        assert_eq!(rig.received(), None);
        assert_eq!(records(&rig).shown(), [(0, PAGE)]);
    }
}

#[test]
fn a_device_without_a_place_for_what_is_in_flight_says_so_to_its_driver() {
    let dir = TempDir::new().unwrap();
    let config = VhostPciConfig {
        inflight: false,
        ..config(&dir, SocketRole::Listen)
    };
    let rig = Rig::stopped(config, dir, None);
    assert_eq!((field(&rig, 8), field(&rig, 16)), (PAGE, 0));
}
