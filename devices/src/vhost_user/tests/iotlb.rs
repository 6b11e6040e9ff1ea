//! Translations: what the front-end's state machine tells a back-end of them, and the channel on which that asks.

use std::os::unix::net::UnixStream;

use super::descriptors;
use super::frontend::{ALL, FEATURES, OFFERED, Play, memory, vring};
use crate::host::Permission;
use crate::vhost_user::channel::{self, Ask, Channel};
use crate::vhost_user::frontend::{Error, Event, IotlbDone, MAX_IOTLB_OWED, Violation};
use crate::vhost_user::{
    Connection, DecodeError, Iotlb, IotlbKind, Message, Payload, U64, backend_requests,
    protocol_features, requests,
};
use crate::virtio::F_ACCESS_PLATFORM;
use crate::virtio_iommu::{Change, Mapping};

const BEHIND: u64 = FEATURES | F_ACCESS_PLATFORM;

fn map(n: u64) -> Change {
    Change::Map(Mapping {
        iova: 0x1_0000 * n,
        gpa: 0x1000 * n,
        len: 0x2000,
        permission: Permission::READ,
    })
}

fn unmap(n: u64) -> Change {
    Change::Unmap {
        iova: 0x1_0000 * n,
        len: 0x2000,
    }
}

impl Play {
    /// A back-end that has everything but vrings.
    fn set_up(protocol: u64) -> Self {
        let mut play = Self::handshake(Some(protocol), 8);
        play.frontend.set_up(BEHIND, &memory(1)).unwrap();
        while let Some(message) = play.peer.receive().unwrap() {
            if message.needs_reply() {
                play.reply(message.request, 0);
            }
        }
        play.quiet();
        assert!(!play.frontend.waits());
        play
    }

    fn tell(&mut self, change: &Change, number: u64) {
        self.frontend.iotlb(change, number).unwrap();
        self.frontend.flush().unwrap();
    }

    /// What the next turn reports to be done: the number, and how many answers that took.
    fn done(&mut self) -> (u64, u64) {
        match self.process().unwrap() {
            Some(Event::Iotlb(IotlbDone {
                number, answers, ..
            })) => (number, answers),
            event => panic!("{event:?}"),
        }
    }

    fn expect_change(&mut self, needs_reply: bool) -> Iotlb {
        let (iotlb, message) = self.expect_payload::<Iotlb>(requests::IOTLB_MSG);
        assert_eq!(message.needs_reply(), needs_reply);
        iotlb
    }
}

// ---- setting up ----

#[test]
fn setting_up_says_everything_once_and_starting_says_the_rest() {
    let mut play = Play::ready();
    play.frontend.set_up(BEHIND, &memory(1)).unwrap();
    play.expect(requests::SET_FEATURES);
    let message = play.expect(requests::SET_BACKEND_REQ_FD);
    assert_eq!((message.payload.len(), message.fds.len()), (0, 1));
    assert!(message.needs_reply());
    play.expect(requests::ADD_MEM_REG);
    play.frontend.set_up(BEHIND, &memory(1)).unwrap();
    play.expect_nothing();
    play.frontend.set_up(OFFERED, &memory(1)).unwrap();
    play.expect(requests::SET_FEATURES);
    play.frontend
        .start(OFFERED, &memory(1), &[vring(0)])
        .unwrap();
    play.expect(requests::SET_VRING_NUM);
    let again = play.frontend.set_up(BEHIND, &memory(1));
    assert!(matches!(again, Err(Error::State(_))));
}

#[test]
fn the_channel_is_opened_where_there_is_an_iommu_and_the_back_end_can_and_once() {
    let without = ALL & !protocol_features::BACKEND_REQ;
    for (protocol, features, expected) in [
        (ALL, BEHIND, true),
        (ALL, FEATURES, false),
        (without, BEHIND, false),
    ] {
        let mut play = Play::handshake(Some(protocol), 8);
        play.frontend.set_up(features, &memory(1)).unwrap();
        play.expect(requests::SET_FEATURES);
        if expected {
            play.expect(requests::SET_BACKEND_REQ_FD);
        }
        play.expect(requests::ADD_MEM_REG);
        assert_eq!(play.frontend.take_channel().is_some(), expected);
        assert!(play.frontend.take_channel().is_none());
    }
}

// ---- changes ----

#[test]
fn changes_go_out_as_they_are_and_the_highest_number_that_is_acknowledged_comes_back() {
    let mut play = Play::set_up(ALL);
    for (change, number) in [(map(1), 0), (map(2), 7), (unmap(1), 8), (map(3), 0)] {
        play.tell(&change, number);
    }
    let expected = |n: u64, kind| Iotlb {
        iova: 0x1_0000 * n,
        size: 0x2000,
        user_address: if kind == IotlbKind::Update {
            0x1000 * n
        } else {
            0
        },
        read: kind == IotlbKind::Update,
        write: false,
        kind,
    };
    assert_eq!(play.expect_change(true), expected(1, IotlbKind::Update));
    assert_eq!(play.expect_change(true), expected(2, IotlbKind::Update));
    assert_eq!(play.expect_change(true), expected(1, IotlbKind::Invalidate));
    assert_eq!(play.expect_change(true), expected(3, IotlbKind::Update));
    play.expect_nothing();
    play.quiet();
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (0, 1));
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (7, 1));
    play.reply(requests::IOTLB_MSG, 0);
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (8, 2));
    play.quiet();
    assert_eq!(play.frontend.oldest_iotlb(), None);
}

#[test]
fn there_is_room_for_so_many_changes_and_an_answer_makes_room() {
    let mut play = Play::set_up(ALL);
    for number in 1..=MAX_IOTLB_OWED as u64 {
        assert!(play.frontend.has_iotlb_room());
        play.tell(&map(number), number);
        play.expect_change(true);
    }
    assert!(!play.frontend.has_iotlb_room());
    let oldest = play.frontend.oldest_iotlb().unwrap();
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (1, 1));
    assert!(play.frontend.has_iotlb_room());
    assert!(play.frontend.oldest_iotlb().unwrap() >= oldest);
}

#[test]
fn there_is_no_room_while_the_back_end_does_not_read() {
    let mut play = Play::set_up(protocol_features::BACKEND_REQ);
    let mut sent = 0;
    while play.frontend.has_iotlb_room() {
        play.tell(&map(1), 0);
        sent += 1;
        assert!(sent < 1_000_000);
    }
    assert!(play.frontend.wants_write());
    for _ in 0..sent {
        while play.peer.receive().unwrap().is_none() {
            play.process().unwrap();
        }
    }
    play.expect_nothing();
    assert!(play.frontend.has_iotlb_room());
}

#[test]
fn without_acknowledgements_an_invalidation_has_a_barrier_and_updates_are_done_in_their_turn() {
    let mut play = Play::set_up(protocol_features::BACKEND_REQ);
    play.tell(&map(1), 1);
    play.expect_change(false);
    assert_eq!(play.done(), (1, 0));
    for (change, number) in [(unmap(1), 2), (map(2), 3), (unmap(2), 4), (map(3), 5)] {
        play.tell(&change, number);
        play.expect_change(false);
        if matches!(change, Change::Unmap { .. }) {
            play.expect(requests::GET_FEATURES);
        }
    }
    play.expect_nothing();
    play.quiet();
    play.reply(requests::GET_FEATURES, 1);
    assert_eq!(play.done(), (3, 1));
    play.reply(requests::GET_FEATURES, 0);
    assert_eq!(play.done(), (5, 1));
}

#[test]
fn what_need_not_be_said_is_done_with_what_was_said_before() {
    let mut play = Play::set_up(ALL);
    play.frontend.pass(1);
    assert_eq!(play.done(), (1, 0));
    play.frontend.pass(2);
    let done = play.frontend.take_iotlb_done().map(|done| done.number);
    assert_eq!(done, Some(2));
    play.quiet();
    play.tell(&map(1), 3);
    play.frontend.pass(4);
    play.frontend.pass(0);
    play.quiet();
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (4, 1));
}

#[test]
fn starts_and_stops_are_seen_while_changes_go_on() {
    let mut play = Play::set_up(ALL);
    play.frontend
        .start(BEHIND, &memory(1), &[vring(0)])
        .unwrap();
    let mut steps = Vec::new();
    while let Some(message) = play.peer.receive().unwrap() {
        steps.push(message.request);
    }
    play.tell(&map(1), 1);
    for request in steps {
        play.quiet();
        play.reply(request, 0);
    }
    assert_eq!(play.process().unwrap(), Some(Event::Started));
    play.frontend.stop().unwrap();
    play.tell(&map(2), 2);
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (1, 1));
    play.reply_base(0, 5);
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(vec![(0, 5)])));
    // Stopped vrings do not stop changes.
    play.tell(&unmap(2), 3);
    play.reply(requests::IOTLB_MSG, 0);
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.done(), (3, 2));
}

#[test]
fn changes_before_the_back_end_has_the_memory_are_refused() {
    let mut play = Play::ready();
    let result = play.frontend.iotlb(&map(1), 1);
    assert!(matches!(result, Err(Error::State(_))));
    play.expect_nothing();
}

#[test]
fn answers_to_changes_that_are_refusals_or_nonsense_are_violations() {
    let refused = Violation::Refused {
        request: requests::IOTLB_MSG,
        value: 1,
    };
    for change in [map(1), unmap(1)] {
        let mut play = Play::set_up(ALL);
        play.tell(&change, 1);
        play.reply(requests::IOTLB_MSG, 1);
        assert_eq!(play.violation(), refused);
    }
    let mut play = Play::set_up(ALL);
    play.tell(&map(1), 1);
    play.reply(requests::GET_FEATURES, 0);
    assert!(matches!(play.violation(), Violation::WrongReply { .. }));
    let mut play = Play::set_up(ALL);
    play.tell(&map(1), 1);
    let mut long = Message::reply(requests::IOTLB_MSG, &U64(0));
    long.payload.push(0);
    play.peer.send(&long).unwrap();
    let length = DecodeError::Length {
        expected: 8,
        got: 9,
    };
    let request = requests::IOTLB_MSG;
    let error = length;
    assert_eq!(play.violation(), Violation::Payload { request, error });
    let mut play = Play::set_up(ALL);
    play.tell(&map(1), 1);
    play.reply(requests::IOTLB_MSG, 0);
    play.reply(requests::IOTLB_MSG, 0);
    assert_eq!(play.violation(), Violation::Unasked(requests::IOTLB_MSG));
}

// ---- the channel ----

fn channel() -> (Channel, Connection) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let channel = Channel::new(Connection::new(ours).unwrap());
    (channel, Connection::new(theirs).unwrap())
}

fn request(kind: IotlbKind) -> (Iotlb, Message) {
    let iotlb = Iotlb {
        iova: 0x3000,
        write: true,
        kind,
        ..Iotlb::default()
    };
    (iotlb, Message::request(backend_requests::IOTLB_MSG, &iotlb))
}

#[test]
fn a_back_end_is_understood_or_known_not_to_be() {
    let (mut channel, mut peer) = channel();
    let (miss, miss_message) = request(IotlbKind::Miss);
    let (fail, fail_message) = request(IotlbKind::AccessFail);
    let (_, with_fds) = request(IotlbKind::Miss);
    for (message, expected) in [
        (miss_message, Ask::Miss(miss)),
        (fail_message, Ask::AccessFail(fail)),
        (request(IotlbKind::Update).1, Ask::Unknown),
        (request(IotlbKind::Invalidate).1, Ask::Unknown),
        (with_fds.with_fds(descriptors(1)), Ask::Unknown),
        (Message::bare(backend_requests::IOTLB_MSG), Ask::Unknown),
        (Message::bare(backend_requests::VRING_CALL), Ask::Unknown),
    ] {
        peer.send(&message).unwrap();
        let asked = channel.receive().unwrap().unwrap();
        assert_eq!((asked.ask, asked.request), (expected, message.request));
    }
    assert!(channel.receive().unwrap().is_none());
}

#[test]
fn an_answer_goes_to_who_wants_one() {
    let (mut channel, mut peer) = channel();
    for (wanted, done) in [(true, true), (true, false), (false, true), (false, false)] {
        let message = request(IotlbKind::Miss).1.with_need_reply(wanted);
        peer.send(&message).unwrap();
        let asked = channel.receive().unwrap().unwrap();
        channel.answer(&asked, done).unwrap();
        let answer = peer.receive().unwrap();
        assert_eq!(answer.is_some(), wanted);
        if let Some(answer) = answer {
            assert!(answer.is_reply());
            assert_eq!(answer.request, backend_requests::IOTLB_MSG);
            assert_eq!(U64::decode(&answer.payload), Ok(U64(u64::from(!done))));
        }
    }
}

#[test]
fn a_reply_where_nothing_was_asked_and_garbage_end_the_channel() {
    let (mut ours, mut peer) = channel();
    let reply = Message::reply(backend_requests::IOTLB_MSG, &U64(0));
    peer.send(&reply).unwrap();
    let expected = backend_requests::IOTLB_MSG;
    assert!(matches!(ours.receive(), Err(channel::Error::Reply(request)) if request == expected));
    let (mut ours, peer) = channel();
    drop(peer);
    assert!(matches!(ours.receive(), Err(channel::Error::Connection(_))));
}

#[test]
fn nothing_is_taken_from_a_back_end_that_does_not_read_its_answers() {
    let (mut ours, mut peer) = channel();
    let message = request(IotlbKind::Miss).1.with_need_reply(true);
    let mut taken = 0;
    let mut idle = 0;
    while idle < 100 {
        if !peer.wants_write() {
            peer.send(&message).unwrap();
        } else {
            peer.flush().unwrap();
        }
        match ours.receive().unwrap() {
            Some(asked) => {
                ours.answer(&asked, true).unwrap();
                taken += 1;
                idle = 0;
            }
            None => idle += 1,
        }
        assert!(taken < 1_000_000);
    }
    assert!(ours.wants_write());
    // All of them are answered as soon as it reads.
    let mut answers = 0;
    while answers < taken {
        match peer.receive().unwrap() {
            Some(_) => answers += 1,
            None => assert!(ours.receive().unwrap().is_none() || !ours.wants_write()),
        }
    }
}
