//! Translations: what the window shows is what the front-end has said last, and nothing else.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering as Order;

use proptest::prelude::*;

use super::*;
use crate::host::{Permission, SharedRegion};
use crate::vhost_pci::backend::{Backend, Fault, Line, Machine, Refusal, Step};
use crate::vhost_user::{Iotlb, IotlbKind, SingleMemoryRegion};
use crate::virtio::F_ACCESS_PLATFORM;

/// The user address of the first region's first byte.
pub(super) const USER: u64 = 0x7f00_0000_0000;
pub(super) const READ: Permission = Permission::READ;
pub(super) const BOTH: Permission = Permission::READ_WRITE;
const NONE: Permission = Permission {
    read: false,
    write: false,
};

/// Two regions, one behind the other in the front-end's user addresses, but neither in the guest nor in the file.
fn regions() -> [MemoryRegion; 2] {
    [
        MemoryRegion {
            guest_address: 0,
            size: 0x10_0000,
            user_address: USER,
            mmap_offset: 0,
        },
        MemoryRegion {
            guest_address: 0x40_0000,
            size: 0x10_0000,
            user_address: USER + 0x10_0000,
            mmap_offset: 0x20_0000,
        },
    ]
}

/// The file of those regions, and the message.
pub(super) fn layout() -> (File, Message) {
    let file = memory(0x30_0000);
    let message = table(&regions(), &file);
    (file, message)
}

pub(super) fn update(iova: u64, size: u64, user_address: u64, allows: Permission) -> Message {
    let payload = Iotlb {
        iova,
        size,
        user_address,
        read: allows.read,
        write: allows.write,
        kind: IotlbKind::Update,
    };
    Message::request(requests::IOTLB_MSG, &payload)
}

pub(super) fn invalidate(iova: u64, size: u64) -> Message {
    let payload = Iotlb {
        iova,
        size,
        kind: IotlbKind::Invalidate,
        ..Iotlb::default()
    };
    Message::request(requests::IOTLB_MSG, &payload)
}

/// Sends a request that wants an answer; returns the answer.
pub(super) fn answer_of(rig: &mut Rig, peer: &mut Connection, message: Message) -> u64 {
    let request = message.request;
    rig.request(peer, &message.with_need_reply(true));
    let reply = peer.receive().unwrap().expect("an answer");
    assert_eq!((reply.request, reply.flags), (request, 0x5));
    assert_eq!(rig.received(), None, "the driver does not see it");
    U64::decode(&reply.payload).unwrap().0
}

impl Rig {
    /// The front-end and the driver agree on translations and on these protocol features.
    pub(super) fn agree(&mut self, peer: &mut Connection, protocol: u64) {
        let own = protocol_features::REPLY_ACK | protocol_features::MQ;
        for (request, reply) in [
            (requests::GET_FEATURES, F_ACCESS_PLATFORM | 1 << 30),
            (requests::GET_PROTOCOL_FEATURES, own),
        ] {
            self.request(peer, &Message::bare(request));
            assert_eq!(self.received().unwrap().0, request);
            self.reply(request, &U64(reply));
            peer.receive().unwrap().expect("the reply passes");
        }
        self.request(
            peer,
            &Message::request(requests::SET_PROTOCOL_FEATURES, &U64(protocol)),
        );
        let expected = U64(protocol & !protocol_features::BACKEND_REQ).encode();
        assert_eq!(
            self.received().unwrap(),
            (requests::SET_PROTOCOL_FEATURES, 1, expected),
            "the driver sees what it has offered"
        );
        self.request(
            peer,
            &Message::request(requests::SET_FEATURES, &U64(F_ACCESS_PLATFORM | 1 << 30)),
        );
        assert_eq!(self.received().unwrap().0, requests::SET_FEATURES);
    }

    /// As [`Rig::acknowledging`], with translations and [`layout`].
    pub(super) fn translating() -> (Self, Connection) {
        let (mut rig, mut peer) = Self::connected();
        let features = protocol_features::REPLY_ACK | protocol_features::BACKEND_REQ;
        rig.agree(&mut peer, features);
        rig.request(&mut peer, &layout().1);
        assert_eq!(rig.received().unwrap().0, requests::SET_MEM_TABLE);
        (rig, peer)
    }
}

#[test]
fn the_table_shows_nothing_and_a_translation_shows_its_range_with_its_permission() {
    let (mut rig, mut peer) = Rig::translating();
    assert_eq!(rig.window().shown(), []);
    for (iova, user, allows) in [
        (0x8000, USER + 0x3000, READ),
        (0x1_0000, USER + 0x10_0000, BOTH),
        (WINDOW - 0x2000, USER, Permission::WRITE),
    ] {
        let message = update(iova, 0x2000, user, allows);
        assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    }
    let expected = [
        (0x8000, 0x2000, 0x3000, READ),
        (0x1_0000, 0x2000, 0x20_0000, BOTH),
        (WINDOW - 0x2000, 0x2000, 0, Permission::WRITE),
    ];
    assert_eq!(rig.window().details(), expected);
    let stats = rig.device.stats();
    assert_eq!((stats.updates, stats.windows, stats.map.count()), (3, 3, 3));
}

#[test]
fn a_translation_across_two_regions_leads_into_both() {
    let (mut rig, mut peer) = Rig::translating();
    let message = update(0x5000, 0x3000, USER + 0xf_f000, BOTH);
    assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    let pieces = [
        (0x5000, 0x1000, 0xf_f000, BOTH),
        (0x6000, 0x2000, 0x20_0000, BOTH),
    ];
    assert_eq!(rig.window().details(), pieces);
    assert_eq!(rig.device.stats().windows, 2);
    assert_eq!(
        answer_of(&mut rig, &mut peer, invalidate(0x5000, 0x3000)),
        0
    );
    assert_eq!(rig.window().shown(), []);
}

/// Messages that ask for what cannot be.
fn bad_translations() -> Vec<Message> {
    let of = |kind| {
        let payload = Iotlb {
            kind,
            iova: 0x1000,
            size: 0x1000,
            user_address: USER,
            read: true,
            ..Iotlb::default()
        };
        Message::request(requests::IOTLB_MSG, &payload)
    };
    let high = u64::MAX - 0xfff;
    vec![
        // Sizes and alignment.
        update(0x1000, 0, USER, BOTH),
        update(0x1000, 0x800, USER, BOTH),
        update(0x1800, 0x1000, USER, BOTH),
        update(0x1000, 0x1000, USER + 0x800, BOTH),
        // Beyond the window, and around the end of the address space.
        update(WINDOW, 0x1000, USER, BOTH),
        update(WINDOW - 0x1000, 0x2000, USER, BOTH),
        update(high, 0x1000, USER, BOTH),
        update(high, 0x2000, USER, BOTH),
        update(0x1000, u64::MAX, USER, BOTH),
        update(0, high, USER, BOTH),
        update(0x1000, 0x2000, high, BOTH),
        update(0x1000, 0x1000, high, BOTH),
        // Out of the table: before, behind, out at the end, and nowhere near.
        update(0x1000, 0x1000, USER - 0x1000, BOTH),
        update(0x1000, 0x2000, USER - 0x1000, BOTH),
        update(0x1000, 0x1000, USER + 0x20_0000, BOTH),
        update(0x1000, 0x2000, USER + 0x1f_f000, BOTH),
        update(0x1000, 0x1000, 0, BOTH),
        // The same, for a permission that shows nothing.
        update(WINDOW, 0x1000, USER, NONE),
        update(0x1800, 0x1000, USER, NONE),
        invalidate(0x1800, 0x1000),
        invalidate(0x1000, 0x800),
        invalidate(0x1000, 0),
        of(IotlbKind::Miss),
        of(IotlbKind::AccessFail),
    ]
}

#[test]
fn a_bad_translation_is_refused_and_what_is_shown_stays() {
    let (mut rig, mut peer) = Rig::translating();
    let good = update(0x1000, 0x4000, USER + 0x4000, READ);
    assert_eq!(answer_of(&mut rig, &mut peer, good), 0);
    let before = rig.window().details();
    for message in bad_translations() {
        let text = format!("{message:x?}");
        assert_ne!(answer_of(&mut rig, &mut peer, message), 0, "{text}");
        assert_eq!(rig.window().details(), before, "{text}");
    }
    assert_eq!(rig.device.stats().peer_faults, 0);
    assert_eq!(rig.device.stats().updates, 1);
}

#[test]
fn a_bad_translation_closes_the_connection_where_no_answer_is_wanted() {
    for message in bad_translations() {
        let (mut rig, mut peer) = Rig::translating();
        rig.request(&mut peer, &update(0x1000, 0x4000, USER, READ));
        assert_eq!(rig.window().shown(), [(0x1000, 0x4000)]);
        rig.request(&mut peer, &message);
        rig.assert_gone(&mut peer);
        assert_eq!(rig.device.stats().windows, 0);
    }
}

#[test]
fn malformed_messages_close_the_connection_even_where_an_answer_is_wanted() {
    let mut unknown = update(0x1000, 0x1000, USER, READ);
    unknown.payload[25] = 9;
    let mut short = update(0x1000, 0x1000, USER, READ);
    short.payload.pop();
    for message in [
        unknown,
        short,
        update(0x1000, 0x1000, USER, READ).with_fds(vec![eventfd().1]),
        Message::bare(requests::SET_BACKEND_REQ_FD),
    ] {
        let (mut rig, mut peer) = Rig::translating();
        rig.request(&mut peer, &message.with_need_reply(true));
        rig.assert_gone(&mut peer);
    }
}

#[test]
fn a_translation_replaces_what_was_there_and_the_same_again_changes_nothing() {
    let (mut rig, mut peer) = Rig::translating();
    let mut update = |rig: &mut Rig, iova, size, user, allows| {
        assert_eq!(
            answer_of(rig, &mut peer, update(iova, size, user, allows)),
            0
        );
        rig.host.log.take()
    };
    update(&mut rig, 0x1_0000, 0x4000, USER + 0x4000, READ);
    // Whole, a part of it, and across a seam that is none.
    for (iova, size) in [(0x1_0000, 0x4000), (0x1_1000, 0x1000)] {
        let user = USER + 0x4000 + (iova - 0x1_0000);
        assert_eq!(update(&mut rig, iova, size, user, READ), []);
    }
    // Another place, another permission, in the middle.
    assert_ne!(update(&mut rig, 0x1_1000, 0x1000, USER + 0x5000, BOTH), []);
    assert_ne!(update(&mut rig, 0x1_2000, 0x1000, USER, READ), []);
    let expected = [
        (0x1_0000, 0x1000, 0x4000, READ),
        (0x1_1000, 0x1000, 0x5000, BOTH),
        (0x1_2000, 0x1000, 0, READ),
        (0x1_3000, 0x1000, 0x7000, READ),
    ];
    assert_eq!(rig.window().details(), expected);
    assert_eq!(rig.device.stats().windows, 4);
    // No permission shows nothing.
    update(&mut rig, 0x1_1000, 0x2000, 0, NONE);
    assert_eq!(
        rig.window().shown(),
        [(0x1_0000, 0x1000), (0x1_3000, 0x1000)]
    );
    update(&mut rig, 0, WINDOW, 0, NONE);
    assert_eq!(rig.window().shown(), []);
}

#[test]
fn an_invalidation_takes_away_what_it_names_and_nothing_else() {
    let (mut rig, mut peer) = Rig::translating();
    let mut check = |invalid: (u64, u64), left: &[(u64, u64, u64, Permission)]| {
        for (iova, user) in [(0x1_0000, USER), (0x2_0000, USER + 0x8000)] {
            let message = update(iova, 0x4000, user, BOTH);
            assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
        }
        let message = invalidate(invalid.0, invalid.1);
        assert_eq!(answer_of(&mut rig, &mut peer, message), 0, "{invalid:x?}");
        assert_eq!(rig.window().details(), left, "{invalid:x?}");
        assert_eq!(rig.device.stats().windows, left.len() as u64);
    };
    let [a, b] = [
        (0x1_0000, 0x4000, 0, BOTH),
        (0x2_0000, 0x4000, 0x8000, BOTH),
    ];
    check((0x1_4000, 0xc000), &[a, b]);
    check((WINDOW, 0x1000), &[a, b]);
    check((u64::MAX - 0xfff, u64::MAX), &[a, b]);
    check((0x1_0000, 0x4000), &[b]);
    check(
        (0x1_1000, 0x1000),
        &[
            (0x1_0000, 0x1000, 0, BOTH),
            (0x1_2000, 0x2000, 0x2000, BOTH),
            b,
        ],
    );
    check(
        (0x1_3000, 0xe000),
        &[
            (0x1_0000, 0x3000, 0, BOTH),
            (0x2_1000, 0x3000, 0x9000, BOTH),
        ],
    );
    check((0, u64::MAX), &[]);
    check((0, 1 << 63), &[]);
    check((0x1_0000, WINDOW), &[]);
}

#[test]
fn translations_go_with_the_region_that_they_lead_into() {
    let file = memory(0x30_0000);
    let [a, b] = regions();
    let both = [(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)];
    let moved = MemoryRegion {
        user_address: 0x1_0000,
        ..a
    };
    let elsewhere = MemoryRegion {
        mmap_offset: 0x10_0000,
        ..a
    };
    let remove = Message::request(requests::REM_MEM_REG, &SingleMemoryRegion(a));
    for (change, left) in [
        (table(&[b, a], &file), &both[..]),
        (table(&[b], &file), &both[1..2]),
        (table(&[a], &file), &[both[0], both[2]]),
        (table(&[moved, b], &file), &both[1..2]),
        (table(&[elsewhere, b], &file), &both[1..2]),
        (table(&[], &file), &[]),
        (remove, &both[1..2]),
    ] {
        let (mut rig, mut peer) = Rig::translating();
        rig.request(&mut peer, &table(&[a, b], &file));
        for message in [
            update(0x1000, 0x2000, USER + 0xf_f000, BOTH),
            update(0x8000, 0x1000, USER, READ),
        ] {
            assert_eq!(
                {
                    while rig.received().is_some() {}
                    answer_of(&mut rig, &mut peer, message)
                },
                0
            );
        }
        assert_eq!(rig.window().shown(), both);
        rig.request(&mut peer, &change);
        assert_eq!(rig.window().shown(), left, "{change:x?}");
        assert_eq!(rig.device.stats().windows, left.len() as u64);
    }
}

#[test]
fn a_region_may_lie_beyond_the_window_where_only_translations_are_shown() {
    let (mut rig, mut peer) = Rig::translating();
    let far = region(1 << 40, 0x1000);
    let single = SingleMemoryRegion(far);
    let add = Message::request(requests::ADD_MEM_REG, &single).with_fds(vec![fd(&memory(0x1000))]);
    rig.request(&mut peer, &add);
    rig.received().expect("it is added");
    let message = update(0x1000, 0x1000, far.user_address, READ);
    assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    // It cannot be shown at its address: the mode stays.
    let off = Message::request(requests::SET_FEATURES, &U64(0));
    assert_ne!(answer_of(&mut rig, &mut peer, off), 0);
    assert_eq!(rig.window().shown(), [(0x1000, 0x1000)]);
}

#[test]
fn the_mode_follows_the_features_and_nothing_of_the_other_mode_is_left() {
    let (mut rig, mut peer) = Rig::translating();
    let features = |bits| Message::request(requests::SET_FEATURES, &U64(bits));
    let message = update(0x70_0000, 0x1000, USER, BOTH);
    assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    // The same again keeps what there is: front-ends say so at each start.
    rig.request(&mut peer, &features(F_ACCESS_PLATFORM));
    assert_eq!(rig.window().shown(), [(0x70_0000, 0x1000)]);
    rig.request(&mut peer, &features(0));
    let table = [(0, 0x10_0000), (0x40_0000, 0x10_0000)];
    assert_eq!(rig.window().shown(), table);
    assert_eq!(rig.device.stats().windows, 0);
    while rig.received().is_some() {}
    let message = update(0x70_0000, 0x1000, USER, BOTH);
    assert_ne!(
        answer_of(&mut rig, &mut peer, message),
        0,
        "not in this mode"
    );
    assert_eq!(rig.window().shown(), table);
    rig.request(&mut peer, &features(F_ACCESS_PLATFORM));
    assert_eq!(rig.window().shown(), []);
    rig.request(&mut peer, &features(0));
    assert_eq!(rig.window().shown(), table);
}

#[test]
fn what_the_window_refuses_leaves_nothing_in_its_range() {
    let (mut rig, mut peer) = Rig::translating();
    for (iova, user) in [(0x1000, USER), (0x8000, USER)] {
        let message = update(iova, 0x2000, user, BOTH);
        assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    }
    rig.window().refuse_next_map.store(true, Order::Relaxed);
    let message = update(0x1000, 0x2000, USER + 0x8000, BOTH);
    assert_ne!(answer_of(&mut rig, &mut peer, message), 0);
    assert_eq!(rig.window().shown(), [(0x8000, 0x2000)]);
    assert_eq!(rig.device.stats().windows, 1);
    // A region that is longer than its file.
    let long = SingleMemoryRegion(region(0x100_0000, 0x10_0000));
    let add = Message::request(requests::ADD_MEM_REG, &long).with_fds(vec![fd(&memory(0x1000))]);
    rig.request(&mut peer, &add);
    rig.received().expect("it is added, and shows nothing");
    for (size, answer) in [(0x1000, 0), (0x2000, 1)] {
        let message = update(0x1_0000, size, long.0.user_address, BOTH);
        assert_eq!(answer_of(&mut rig, &mut peer, message), answer);
    }
}

#[test]
fn a_change_takes_effect_at_once_and_is_answered_in_its_turn() {
    let (mut rig, mut peer) = Rig::translating();
    rig.request(&mut peer, &Message::bare(requests::GET_QUEUE_NUM));
    let message = update(0x1000, 0x1000, USER, BOTH).with_need_reply(true);
    rig.request(&mut peer, &message);
    assert_eq!(rig.window().shown(), [(0x1000, 0x1000)]);
    let message = invalidate(0x1000, 0x1000).with_need_reply(true);
    rig.request(&mut peer, &message);
    assert_eq!(rig.window().shown(), []);
    assert!(
        peer.receive().unwrap().is_none(),
        "the driver's comes first"
    );
    rig.reply(requests::GET_QUEUE_NUM, &U64(4));
    for request in [
        requests::GET_QUEUE_NUM,
        requests::IOTLB_MSG,
        requests::IOTLB_MSG,
    ] {
        assert_eq!(peer.receive().unwrap().unwrap().request, request);
    }
}

#[test]
fn translations_do_not_wait_for_the_drivers_buffers() {
    let mut rig = Rig::new(SocketRole::Listen);
    for _ in 0..5 {
        rig.rx.offer(4096);
    }
    let mut peer = rig.connect();
    rig.agree(&mut peer, protocol_features::REPLY_ACK);
    rig.request(&mut peer, &layout().1);
    rig.request(&mut peer, &Message::bare(requests::SET_OWNER));
    rig.request(&mut peer, &Message::bare(requests::RESET_OWNER));
    assert_eq!(rig.received().unwrap().0, requests::SET_MEM_TABLE);
    let message = update(0x1000, 0x1000, USER, BOTH);
    assert_eq!(answer_of(&mut rig, &mut peer, message), 0);
    // What waited comes in order.
    for request in [requests::SET_OWNER, requests::RESET_OWNER] {
        rig.rx.offer(4096);
        rig.driver.notify(0);
        rig.pump();
        assert_eq!(rig.received().unwrap().0, request);
    }
    // There is an end to it.
    let mut sent = 0;
    while sent < 10_000 && peer.send(&Message::bare(requests::SET_OWNER)).is_ok() {
        sent += 1;
        rig.pump();
    }
    assert!(sent < 10_000, "the socket fills up");
}

#[test]
fn the_channel_goes_with_the_drivers_offer_and_has_to_be_a_socket() {
    // A driver that knows nothing of translations.
    let (mut rig, mut peer) = Rig::connected();
    for (request, reply) in [
        (requests::GET_FEATURES, 1u64 << 30),
        (requests::GET_PROTOCOL_FEATURES, u64::MAX),
    ] {
        rig.request(&mut peer, &Message::bare(request));
        rig.received().unwrap();
        rig.reply(request, &U64(reply));
    }
    peer.receive().unwrap().unwrap();
    let offered = peer.receive().unwrap().unwrap().payload;
    assert_eq!(offered, U64(0xd | 1 << 12 | 1 << 15 | 1 << 62).encode());
    let message = Message::request(requests::SET_PROTOCOL_FEATURES, &U64(1 << 5));
    rig.request(&mut peer, &message);
    rig.assert_gone(&mut peer);

    let (mut rig, mut peer) = Rig::connected();
    rig.agree(&mut peer, protocol_features::REPLY_ACK);
    let socket = || vec![UnixStream::pair().unwrap().0.into()];
    let give = |fds| Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(fds);
    rig.request(&mut peer, &give(socket()).with_need_reply(true));
    rig.assert_gone(&mut peer);

    let (mut rig, mut peer) = Rig::translating();
    for (fd, answer) in [
        (fd(&memory(0)), 1),
        (eventfd().1, 1),
        (std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(), 1),
    ] {
        assert_eq!(answer_of(&mut rig, &mut peer, give(vec![fd])), answer);
    }
    // One whose other end is closed is found out when it is used.
    assert_eq!(answer_of(&mut rig, &mut peer, give(socket())), 0);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(answer_of(&mut rig, &mut peer, give(vec![theirs.into()])), 0);
    assert_eq!(rig.status(), BACKEND_UP | FRONTEND_UP);
}

/// What is shown, page by page: offset in the file, and accesses.
#[derive(Default)]
struct Pages(BTreeMap<u64, (u64, Permission)>);

impl Machine for Pages {
    fn map(
        &mut self,
        offset: u64,
        region: &SharedRegion,
        permission: Permission,
    ) -> io::Result<()> {
        for at in (0..region.len).step_by(0x1000) {
            let page = (region.file_offset + at, permission);
            assert_eq!(self.0.insert(offset + at, page), None, "shown twice");
        }
        Ok(())
    }
    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.0.retain(|at, _| *at < offset || offset + len <= *at);
        Ok(())
    }
    takes_the_rest!();
}

/// A connection that has negotiated translations and has [`layout`].
fn backend(pages: &mut Pages) -> Backend {
    let mut backend = Backend::new(WINDOW, QUEUES, false);
    let features = Message::request(requests::SET_FEATURES, &U64(F_ACCESS_PLATFORM));
    backend.front_end(features, pages).unwrap();
    backend.front_end(layout().1, pages).unwrap();
    backend
}

/// How many translations a connection has at most (SPECIFICATION.md).
const PROMISED: u64 = 32768;

#[test]
fn there_can_be_so_many_translations_and_no_more_but_one_for_another_is_possible() {
    /// Takes everything, remembers nothing: the test is about numbers.
    struct Blind;
    impl Machine for Blind {
        fn map(&mut self, _: u64, _: &SharedRegion, _: Permission) -> io::Result<()> {
            Ok(())
        }
        fn unmap(&mut self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        takes_the_rest!();
    }
    let mut backend = backend(&mut Pages::default());
    let mut apply = |message: Message| match backend.front_end(message, &mut Blind) {
        Ok(step) => {
            assert!(matches!(step, Step::Updated(_) | Step::Invalidated));
            true
        }
        Err(Fault::Refused(_, Refusal::TooManyTranslations)) => false,
        Err(fault) => panic!("{fault}"),
    };
    // The last one has three pages.
    for page in 1..PROMISED {
        assert!(apply(update(page * 0x2000, 0x1000, USER, READ)));
    }
    let last = PROMISED * 0x2000;
    assert!(apply(update(last, 0x3000, USER, READ)));
    assert!(!apply(update(0, 0x1000, USER, READ)));
    assert!(!apply(invalidate(last + 0x1000, 0x1000)), "it would be two");
    assert!(
        !apply(update(last + 0x1000, 0x1000, USER, READ)),
        "or three"
    );
    // Two regions count as two.
    let across = || update(0x2000, 0x2000, USER + 0xf_f000, READ);
    assert!(!apply(across()));
    assert!(apply(update(0x2000, 0x1000, USER + 0x1000, READ)));
    assert!(apply(invalidate(0x4000, 0x1000)));
    assert!(apply(across()));
    assert!(!apply(update(0, 0x1000, USER, READ)));
    assert!(apply(invalidate(0, u64::MAX)));
    assert!(apply(update(0, 0x1000, USER, READ)));
    assert_eq!(backend.translations(), 1);
}

proptest! {
    /// Page by page, the window shows what was said last about each page.
    #[test]
    fn whatever_comes_and_goes_each_page_shows_what_was_said_last(
        changes in prop::collection::vec((0u64..24, 1u64..8, 0u64..20, 0u8..5), 1..40),
    ) {
        let mut pages = Pages::default();
        let mut backend = backend(&mut pages);
        let mut said = BTreeMap::new();
        // Around the seam between the two regions.
        let user = USER + 0xf_8000;
        let file = |page: u64| if page < 8 { 0xf_8000 + page * 0x1000 } else { 0x20_0000 + (page - 8) * 0x1000 };
        for (first, count, from, what) in changes {
            let (iova, size) = (first * 0x1000, count * 0x1000);
            let allows = match what {
                0 => None,
                1 => Some(NONE),
                2 => Some(READ),
                3 => Some(Permission::WRITE),
                _ => Some(BOTH),
            };
            let message = match allows {
                None => invalidate(iova, size),
                Some(allows) => update(iova, size, user + from * 0x1000, allows),
            };
            backend.front_end(message, &mut pages).unwrap();
            for n in 0..count {
                said.remove(&(iova + n * 0x1000));
                if let Some(allows) = allows.filter(|a| a.read || a.write) {
                    said.insert(iova + n * 0x1000, (file(from + n), allows));
                }
            }
            prop_assert_eq!(&pages.0, &said);
            for page in 0..32u64 {
                let range = page * 0x1000 + 0x10..page * 0x1000 + 0x18;
                let missing = backend.first_missing(&range, crate::host::Access::Write);
                let allowed = said.get(&(page * 0x1000)).is_some_and(|(_, a)| a.write);
                prop_assert_eq!(missing.is_none(), allowed);
            }
        }
    }
    /// Whatever numbers come, what is shown lies in the window and in the regions, and the numbers of translations agree.
    #[test]
    fn no_number_shows_more_than_the_table_or_the_window_has(
        messages in prop::collection::vec((edge(), edge(), edge(), 0u8..6, any::<bool>()), 1..40),
    ) {
        let mut shown = Ranges::default();
        let mut backend = backend(&mut Pages::default());
        for (iova, size, user, what, seam) in messages {
            let user = if seam { USER + 0xf_f000 } else { user };
            let message = match what {
                0 => invalidate(iova, size),
                1 => update(iova, size, user, NONE),
                2 => Message::request(requests::SET_FEATURES, &U64(F_ACCESS_PLATFORM)),
                _ => update(iova, size, user, BOTH),
            };
            match backend.front_end(message, &mut shown) {
                Ok(_) | Err(Fault::Refused(..)) => {}
                Err(fault) => panic!("{fault}"),
            }
            prop_assert_eq!(backend.translations(), shown.0.len());
            prop_assert!(shown.0.iter().all(|(_, end)| *end <= WINDOW));
            prop_assert!(shown.0.array_windows().all(|[a, b]| a.1 <= b.0));
        }
    }
}

/// Numbers at which something begins, ends or overflows, and their neighbours.
fn edge() -> impl Strategy<Value = u64> {
    let edges = [
        0,
        0x1000,
        0x1_0000,
        0x10_0000,
        0x20_0000,
        WINDOW,
        USER,
        USER + 0x20_0000,
        1 << 63,
        0u64.wrapping_sub(0x1000),
    ];
    (
        prop::sample::select(edges.to_vec()),
        -2i64..3,
        prop::sample::select(vec![1i64, 0x1000]),
    )
        .prop_map(|(edge, steps, step)| edge.wrapping_add_signed(steps * step))
}

/// Start and end of each translation that is shown, in order.
#[derive(Default)]
struct Ranges(Vec<(u64, u64)>);

impl Machine for Ranges {
    fn map(&mut self, offset: u64, region: &SharedRegion, _: Permission) -> io::Result<()> {
        let end = region.file_offset.checked_add(region.len).unwrap();
        let regions = [0..0x10_0000, 0x20_0000..0x30_0000u64];
        assert!(
            regions
                .iter()
                .any(|r| r.start <= region.file_offset && end <= r.end)
        );
        self.0.push((offset, offset + region.len));
        self.0.sort_unstable();
        Ok(())
    }
    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).unwrap();
        let mut left = Vec::new();
        for &(start, behind) in &self.0 {
            let parts = [(start, behind.min(offset)), (start.max(end), behind)];
            left.extend(parts.into_iter().filter(|(from, to)| from < to));
        }
        self.0 = left;
        Ok(())
    }
    takes_the_rest!();
}
