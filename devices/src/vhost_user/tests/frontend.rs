//! The front-end's state machine, with a peer that follows a script.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempfile::TempFile;

use super::{bytes, connections, descriptors, pair};
use crate::host;
use crate::vhost_user::frontend::{Error, Event, Frontend, Offer, PACKED_BASE, Violation, Vring};
use crate::vhost_user::{
    Connection, DecodeError, MemoryRegion, MemoryTable, Message, Payload, SingleMemoryRegion, U64,
    VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, VringFd, VringState, protocol_features, requests,
};
use crate::virtio::{F_ACCESS_PLATFORM, F_RING_PACKED, F_VERSION_1, event};

pub(super) const FEATURES: u64 = F_VERSION_1 | 1 << 29;
/// What the peer offers; the tests start split rings unless they say otherwise.
pub(super) const OFFERED: u64 = FEATURES | F_RING_PACKED | F_ACCESS_PLATFORM;
pub(super) const ALL: u64 = protocol_features::MQ
    | protocol_features::REPLY_ACK
    | protocol_features::BACKEND_REQ
    | protocol_features::CONFIGURE_MEM_SLOTS;

pub(super) fn memory(count: u64) -> Vec<host::MemoryRegion> {
    let file: File = TempFile::new().unwrap().into_file();
    file.set_len(count * 0x10_0000).unwrap();
    let file = Arc::new(file);
    (0..count)
        .map(|n| host::MemoryRegion {
            gpa: n << 32,
            shared: host::SharedRegion {
                file: file.clone(),
                file_offset: n * 0x10_0000,
                len: 0x10_0000,
            },
        })
        .collect()
}

pub(super) fn vring(index: u8) -> Vring {
    let base = u64::from(index) * 0x1_0000;
    Vring {
        index,
        size: 256,
        desc: base + 0x1000,
        driver: base + 0x2000,
        device: base + 0x3000,
        base: 17 + u32::from(index),
        kick: Arc::new(event::new().unwrap()),
        call: Arc::new(event::new().unwrap()),
        enabled: true,
    }
}

/// A front-end and the connection of the back-end that the test plays.
pub(super) struct Play {
    pub(super) frontend: Frontend,
    pub(super) peer: Connection,
}

impl Play {
    fn new() -> Self {
        let (ours, peer) = connections();
        let frontend = Frontend::new(ours).unwrap();
        Self { frontend, peer }
    }

    /// The next message of the front-end, which must be this request.
    pub(super) fn expect(&mut self, request: u32) -> Message {
        let message = self.peer.receive().unwrap();
        let message = message.unwrap_or_else(|| panic!("{} is missing", requests::name(request)));
        assert_eq!(
            requests::name(message.request),
            requests::name(request),
            "{message:?}"
        );
        assert!(!message.is_reply());
        message
    }

    pub(super) fn expect_payload<T: Payload>(&mut self, request: u32) -> (T, Message) {
        let message = self.expect(request);
        (T::decode(&message.payload).unwrap(), message)
    }

    pub(super) fn expect_nothing(&mut self) {
        let message = self.peer.receive().unwrap();
        assert!(message.is_none(), "{message:?}");
    }

    pub(super) fn reply(&mut self, request: u32, value: u64) {
        self.peer
            .send(&Message::reply(request, &U64(value)))
            .unwrap();
    }

    pub(super) fn process(&mut self) -> Result<Option<Event>, Error> {
        self.frontend.process()
    }

    pub(super) fn quiet(&mut self) {
        assert_eq!(self.process().unwrap(), None);
    }

    /// A handshake with a back-end that has these protocol features; `None` for one that has not even got the bit.
    pub(super) fn handshake(protocol: Option<u64>, slots: u64) -> Self {
        let mut play = Self::new();
        play.expect(requests::GET_FEATURES);
        play.quiet();
        let bit = protocol.map_or(0, |_| VHOST_USER_F_PROTOCOL_FEATURES);
        play.reply(requests::GET_FEATURES, OFFERED | bit);
        let mut queues = 1;
        if let Some(protocol) = protocol {
            play.quiet();
            play.expect(requests::GET_PROTOCOL_FEATURES);
            play.reply(requests::GET_PROTOCOL_FEATURES, protocol);
            let mut event = play.process().unwrap();
            let (accepted, _) = play.expect_payload::<U64>(requests::SET_PROTOCOL_FEATURES);
            assert_eq!(
                accepted.0,
                protocol & (ALL | protocol_features::INFLIGHT_SHMFD | protocol_features::RSS)
            );
            if protocol & protocol_features::MQ != 0 {
                assert_eq!(event, None);
                play.expect(requests::GET_QUEUE_NUM);
                play.reply(requests::GET_QUEUE_NUM, 4);
                queues = 4;
                event = None;
            }
            if protocol & protocol_features::CONFIGURE_MEM_SLOTS != 0 {
                assert_eq!(event, None);
                play.expect(requests::GET_MAX_MEM_SLOTS);
                play.reply(requests::GET_MAX_MEM_SLOTS, slots);
            }
            if let Some(Event::Ready(offer)) = event {
                let silent = protocol_features::REPLY_ACK | protocol_features::BACKEND_REQ;
                assert_eq!(protocol & (ALL & !silent), 0);
                assert_eq!(play.frontend.offer(), Some(offer));
                play.expect(requests::SET_OWNER);
                return play;
            }
        }
        let offer = Offer {
            features: OFFERED,
            queues,
            rss: protocol.is_some_and(|protocol| protocol & protocol_features::RSS != 0),
        };
        assert_eq!(play.process().unwrap(), Some(Event::Ready(offer)));
        assert_eq!(play.frontend.offer(), Some(offer));
        play.expect(requests::SET_OWNER);
        play.expect_nothing();
        play
    }

    pub(super) fn ready() -> Self {
        Self::handshake(Some(ALL), 32)
    }

    /// Started, with two vrings and all protocol features.
    fn started() -> Self {
        Self::started_with(FEATURES)
    }

    fn started_with(features: u64) -> Self {
        let mut play = Self::ready();
        play.frontend
            .start(features, &memory(2), &[vring(0), vring(1)])
            .unwrap();
        while let Some(message) = play.peer.receive().unwrap() {
            assert!(message.needs_reply(), "{message:?}");
            play.reply(message.request, 0);
        }
        assert_eq!(play.process().unwrap(), Some(Event::Started));
        play
    }

    pub(super) fn reply_base(&mut self, index: u32, num: u32) {
        let state = VringState { index, num };
        let message = Message::reply(requests::GET_VRING_BASE, &state);
        self.peer.send(&message).unwrap();
    }

    /// The violation that comes out of the next turn.
    pub(super) fn violation(&mut self) -> Violation {
        match self.process() {
            Err(Error::Violation(violation)) => violation,
            result => panic!("no violation: {result:?}"),
        }
    }
}

fn inode(fd: RawFd) -> (u64, u64) {
    let metadata = std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap();
    (metadata.dev(), metadata.ino())
}

#[test]
fn the_handshake_asks_only_for_what_the_back_end_has() {
    Play::handshake(None, 0);
    Play::handshake(Some(0), 0);
    Play::handshake(Some(protocol_features::REPLY_ACK), 0);
    Play::handshake(Some(protocol_features::MQ), 0);
    Play::handshake(Some(protocol_features::CONFIGURE_MEM_SLOTS), 8);
    Play::handshake(Some(ALL), 8);
}

#[test]
fn protocol_features_that_we_do_not_know_are_not_accepted() {
    Play::handshake(Some(u64::MAX), 8);
}

#[test]
fn starting_sends_features_memory_and_vrings_in_the_order_of_the_protocol() {
    let mut play = Play::ready();
    let memory = memory(2);
    let vrings = [vring(0), vring(1)];
    play.frontend
        .start(FEATURES | 1 << 5, &memory, &vrings)
        .unwrap();
    let mut asked = Vec::new();
    let (features, message) = play.expect_payload::<U64>(requests::SET_FEATURES);
    // Not what the back-end never offered (here the device's own MAC bit), but the bit of the protocol.
    assert_eq!(features.0, FEATURES | VHOST_USER_F_PROTOCOL_FEATURES);
    asked.push(message);
    for region in &memory {
        let (payload, message) = play.expect_payload::<SingleMemoryRegion>(requests::ADD_MEM_REG);
        let expected = MemoryRegion {
            guest_address: region.gpa,
            size: region.shared.len,
            user_address: region.gpa,
            mmap_offset: region.shared.file_offset,
        };
        assert_eq!(payload.0, expected);
        assert_eq!(message.fds.len(), 1);
        assert_eq!(
            inode(message.fds[0].as_raw_fd()),
            inode(region.shared.file.as_raw_fd())
        );
        asked.push(message);
    }
    for vring in &vrings {
        let index = u32::from(vring.index);
        let state = |num| VringState { index, num };
        let (num, message) = play.expect_payload::<VringState>(requests::SET_VRING_NUM);
        assert_eq!(num, state(256));
        asked.push(message);
        let (base, message) = play.expect_payload::<VringState>(requests::SET_VRING_BASE);
        assert_eq!(base, state(vring.base));
        asked.push(message);
        let (addr, message) = play.expect_payload::<VringAddr>(requests::SET_VRING_ADDR);
        let expected = VringAddr {
            index,
            flags: 0,
            desc: vring.desc,
            used: vring.device,
            avail: vring.driver,
            log: 0,
        };
        assert_eq!(addr, expected);
        asked.push(message);
        for (request, ours) in [
            (requests::SET_VRING_CALL, &vring.call),
            (requests::SET_VRING_KICK, &vring.kick),
        ] {
            let (fd, mut message) = play.expect_payload::<VringFd>(request);
            let expected = VringFd {
                index: vring.index,
                no_fd: false,
            };
            assert_eq!(fd, expected);
            let theirs = event::from_owned(message.fds.pop().unwrap());
            assert!(message.fds.is_empty());
            event::signal(&theirs);
            assert!(event::is_signalled(ours), "{}", requests::name(request));
            event::clear(ours);
            asked.push(message);
        }
        let (enable, message) = play.expect_payload::<VringState>(requests::SET_VRING_ENABLE);
        assert_eq!(enable, state(1));
        asked.push(message);
    }
    play.expect_nothing();
    for message in asked {
        assert!(play.frontend.waits());
        play.quiet();
        assert!(message.needs_reply());
        play.reply(message.request, 0);
    }
    assert_eq!(play.process().unwrap(), Some(Event::Started));
    play.quiet();
}

#[test]
fn without_acknowledgements_the_end_of_the_start_is_seen_by_a_barrier() {
    let mut play = Play::handshake(None, 0);
    let memory = memory(8);
    play.frontend.start(FEATURES, &memory, &[vring(0)]).unwrap();
    let (features, message) = play.expect_payload::<U64>(requests::SET_FEATURES);
    assert_eq!(features.0, FEATURES);
    assert!(!message.needs_reply());
    let (table, message) = play.expect_payload::<MemoryTable>(requests::SET_MEM_TABLE);
    assert_eq!(table.0.len(), 8);
    assert_eq!(message.fds.len(), 8);
    assert_eq!(table.0[3].guest_address, 3 << 32);
    assert_eq!(table.0[3].user_address, 3 << 32);
    for request in [
        requests::SET_VRING_NUM,
        requests::SET_VRING_BASE,
        requests::SET_VRING_ADDR,
        requests::SET_VRING_CALL,
        requests::SET_VRING_KICK,
        requests::GET_FEATURES,
    ] {
        assert!(!play.expect(request).needs_reply());
    }
    play.expect_nothing();
    play.quiet();
    play.reply(requests::GET_FEATURES, FEATURES);
    assert_eq!(play.process().unwrap(), Some(Event::Started));
}

#[test]
fn more_memory_regions_than_the_back_end_takes_are_an_error_before_they_are_sent() {
    for (protocol, slots, limit) in [(None, 0, 8), (Some(ALL), 3, 3)] {
        let mut play = Play::handshake(protocol, slots);
        let memory = memory(limit + 1);
        let result = play.frontend.start(FEATURES, &memory, &[vring(0)]);
        assert!(
            matches!(result, Err(Error::TooManyRegions { limit: l, .. }) if l == limit),
            "{result:?}"
        );
    }
}

#[test]
fn stopping_disables_the_vrings_and_reports_their_bases_and_starting_again_does_not_resend_memory()
{
    let mut play = Play::started();
    play.frontend.stop().unwrap();
    for index in [0, 1] {
        let (state, _) = play.expect_payload::<VringState>(requests::SET_VRING_ENABLE);
        assert_eq!(state, VringState { index, num: 0 });
    }
    for index in [0, 1] {
        let (state, _) = play.expect_payload::<VringState>(requests::GET_VRING_BASE);
        assert_eq!(state.index, index);
    }
    for (index, num) in [(0, 40), (1, 65535)] {
        play.quiet();
        let state = VringState { index, num };
        let message = Message::reply(requests::GET_VRING_BASE, &state);
        play.peer.send(&message).unwrap();
    }
    let bases = vec![(0, 40), (1, 65535)];
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(bases)));
    play.frontend
        .start(FEATURES, &memory(2), &[vring(0)])
        .unwrap();
    play.expect(requests::SET_FEATURES);
    play.expect(requests::SET_VRING_NUM);
}

#[test]
fn stopping_in_the_middle_of_a_start_takes_the_replies_of_both() {
    let mut play = Play::ready();
    play.frontend
        .start(FEATURES, &memory(1), &[vring(0)])
        .unwrap();
    play.quiet();
    play.frontend.stop().unwrap();
    while let Some(message) = play.peer.receive().unwrap() {
        if message.request == requests::GET_VRING_BASE {
            let state = VringState { index: 0, num: 3 };
            let message = Message::reply(message.request, &state);
            play.peer.send(&message).unwrap();
        } else if message.needs_reply() {
            play.reply(message.request, 0);
        }
    }
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(vec![(0, 3)])));
    play.quiet();
}

#[test]
fn one_vring_stops_and_starts_again_while_the_other_goes_on() {
    let mut play = Play::started();
    play.frontend.stop_vring(0).unwrap();
    assert!(!play.frontend.has_vring(0) && play.frontend.has_vring(1));
    let (state, _) = play.expect_payload::<VringState>(requests::SET_VRING_ENABLE);
    assert_eq!(state, VringState { index: 0, num: 0 });
    let (state, _) = play.expect_payload::<VringState>(requests::GET_VRING_BASE);
    assert_eq!(state.index, 0);
    play.expect_nothing();
    play.quiet();
    play.reply_base(0, 40);
    assert_eq!(play.process().unwrap(), Some(Event::VringStopped(0, 40)));
    assert!(play.frontend.is_started());
    play.quiet();

    let again = Vring {
        size: 64,
        base: 0,
        ..vring(0)
    };
    play.frontend.start_vring(&again).unwrap();
    let (state, _) = play.expect_payload::<VringState>(requests::SET_VRING_NUM);
    assert_eq!(state, VringState { index: 0, num: 64 });
    for request in [
        requests::SET_VRING_BASE,
        requests::SET_VRING_ADDR,
        requests::SET_VRING_CALL,
        requests::SET_VRING_KICK,
        requests::SET_VRING_ENABLE,
    ] {
        assert!(play.expect(request).needs_reply());
    }
    play.expect_nothing();
    // All of them stop in the end.
    for request in [
        requests::SET_VRING_NUM,
        requests::SET_VRING_BASE,
        requests::SET_VRING_ADDR,
        requests::SET_VRING_CALL,
        requests::SET_VRING_KICK,
        requests::SET_VRING_ENABLE,
    ] {
        play.reply(request, 0);
    }
    play.quiet();
    play.frontend.stop().unwrap();
    play.reply_base(1, 7);
    play.reply_base(0, 8);
    let bases = vec![(1, 7), (0, 8)];
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(bases)));
}

#[test]
fn one_vring_stops_in_the_middle_of_a_start_and_of_a_stop_of_all() {
    let mut play = Play::ready();
    play.frontend
        .start(FEATURES, &memory(1), &[vring(0), vring(1)])
        .unwrap();
    play.frontend.stop_vring(1).unwrap();
    play.frontend.stop().unwrap();
    while let Some(message) = play.peer.receive().unwrap() {
        if message.request == requests::GET_VRING_BASE {
            let state = VringState::decode(&message.payload).unwrap();
            play.reply_base(state.index, 3 + state.index);
        } else if message.needs_reply() {
            play.reply(message.request, 0);
        }
    }
    assert_eq!(play.process().unwrap(), Some(Event::VringStopped(1, 4)));
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(vec![(0, 3)])));
    play.quiet();
}

#[test]
fn vrings_are_enabled_and_disabled_while_they_run_and_the_last_answer_says_that_it_is_done() {
    let mut play = Play::started();
    play.frontend
        .enable_vrings(&[(1, false), (0, true)])
        .unwrap();
    for (index, num) in [(1, 0), (0, 1)] {
        let (state, message) = play.expect_payload::<VringState>(requests::SET_VRING_ENABLE);
        assert_eq!(state, VringState { index, num });
        assert!(message.needs_reply());
    }
    play.quiet();
    play.reply(requests::SET_VRING_ENABLE, 0);
    play.quiet();
    play.reply(requests::SET_VRING_ENABLE, 0);
    assert_eq!(play.process().unwrap(), Some(Event::Enabled));
    play.quiet();

    play.frontend.enable_vrings(&[(1, true)]).unwrap();
    play.reply(requests::SET_VRING_ENABLE, 1);
    let error = play.process().unwrap_err();
    assert!(error.to_string().contains("refuses"), "{error}");
}

#[test]
fn the_base_of_a_packed_ring_has_32_bits_both_ways() {
    // Index 0 and wrap counter 1 for the driver, and the same for the device.
    assert_eq!(PACKED_BASE, 1 << 15 | 1 << 31);
    let mut play = Play::started_with(OFFERED);
    play.frontend.stop_vring(1).unwrap();
    play.expect(requests::SET_VRING_ENABLE);
    play.expect(requests::GET_VRING_BASE);
    play.reply_base(1, 0xffff_7fff);
    let stopped = Event::VringStopped(1, 0xffff_7fff);
    assert_eq!(play.process().unwrap(), Some(stopped));
    let again = Vring {
        base: PACKED_BASE,
        ..vring(1)
    };
    play.frontend.start_vring(&again).unwrap();
    play.expect(requests::SET_VRING_NUM);
    let (state, _) = play.expect_payload::<VringState>(requests::SET_VRING_BASE);
    let expected = VringState {
        index: 1,
        num: 0x8000_8000,
    };
    assert_eq!(state, expected);
    let (addr, _) = play.expect_payload::<VringAddr>(requests::SET_VRING_ADDR);
    assert_eq!(
        (addr.desc, addr.avail, addr.used),
        (again.desc, again.driver, again.device)
    );
}

#[test]
fn a_vring_that_runs_is_not_started_and_one_that_does_not_is_not_stopped() {
    let mut play = Play::ready();
    let state = |result| assert!(matches!(result, Err(Error::State(_))), "{result:?}");
    state(play.frontend.start_vring(&vring(0)));
    state(play.frontend.stop_vring(0));
    let mut play = Play::started();
    state(play.frontend.start_vring(&vring(1)));
    state(play.frontend.stop_vring(2));
    play.frontend.stop_vring(1).unwrap();
    state(play.frontend.stop_vring(1));
    play.frontend.stop().unwrap();
    state(play.frontend.stop_vring(0));
    state(play.frontend.start_vring(&vring(1)));
}

#[test]
fn calls_that_do_not_fit_the_state_are_refused_and_harmless() {
    let mut play = Play::new();
    let memory = memory(1);
    let start = play.frontend.start(FEATURES, &memory, &[]);
    assert!(matches!(start, Err(Error::State(_))));
    assert!(matches!(play.frontend.stop(), Err(Error::State(_))));
    play.expect(requests::GET_FEATURES);
    play.expect_nothing();
    let mut play = Play::started();
    let start = play.frontend.start(FEATURES, &memory, &[]);
    assert!(matches!(start, Err(Error::State(_))));
    play.expect_nothing();
}

#[test]
fn a_message_that_nobody_asked_for_is_a_violation() {
    let mut play = Play::started();
    play.reply(requests::GET_FEATURES, 0);
    assert_eq!(play.violation(), Violation::Unasked(requests::GET_FEATURES));
}

#[test]
fn a_second_reply_to_the_same_request_is_a_violation() {
    let mut play = Play::new();
    play.reply(requests::GET_FEATURES, FEATURES);
    play.reply(requests::GET_FEATURES, FEATURES);
    assert!(matches!(play.process(), Ok(Some(Event::Ready(_)))));
    assert_eq!(play.violation(), Violation::Unasked(requests::GET_FEATURES));
}

#[test]
fn a_reply_to_another_request_and_a_request_in_place_of_a_reply_are_violations() {
    let mut play = Play::new();
    play.reply(requests::GET_QUEUE_NUM, 1);
    assert!(matches!(play.violation(), Violation::WrongReply { .. }));
    let mut play = Play::new();
    let message = Message::request(requests::GET_FEATURES, &U64(FEATURES));
    play.peer.send(&message).unwrap();
    assert!(matches!(play.violation(), Violation::WrongReply { .. }));
}

#[test]
fn a_reply_of_any_wrong_size_is_a_violation() {
    for len in [0, 1, 4, 7, 9, 16, 4084] {
        let mut play = Play::new();
        let mut message = Message::reply(requests::GET_FEATURES, &U64(0));
        message.payload = vec![0; len];
        play.peer.send(&message).unwrap();
        let expected = Violation::Payload {
            request: requests::GET_FEATURES,
            error: DecodeError::Length {
                expected: 8,
                got: len,
            },
        };
        assert_eq!(play.violation(), expected);
    }
}

#[test]
fn descriptors_with_a_reply_are_a_violation() {
    let mut play = Play::new();
    let message = Message::reply(requests::GET_FEATURES, &U64(0)).with_fds(descriptors(1));
    play.peer.send(&message).unwrap();
    assert_eq!(play.violation(), Violation::Fds(requests::GET_FEATURES));
}

#[test]
fn a_refused_step_is_a_violation_that_names_it() {
    let mut play = Play::ready();
    play.frontend
        .start(FEATURES, &memory(1), &[vring(0)])
        .unwrap();
    play.reply(requests::SET_FEATURES, 0);
    play.reply(requests::ADD_MEM_REG, 22);
    let expected = Violation::Refused {
        request: requests::ADD_MEM_REG,
        value: 22,
    };
    assert_eq!(play.violation(), expected);
    assert!(Error::from(expected).to_string().contains("ADD_MEM_REG"));
}

#[test]
fn no_queues_and_bases_of_another_vring_or_beyond_a_split_ring_are_violations() {
    let mut play = Play::new();
    play.reply(
        requests::GET_FEATURES,
        FEATURES | VHOST_USER_F_PROTOCOL_FEATURES,
    );
    play.reply(requests::GET_PROTOCOL_FEATURES, protocol_features::MQ);
    play.reply(requests::GET_QUEUE_NUM, 0);
    assert!(matches!(play.violation(), Violation::Value { .. }));
    for state in [
        VringState { index: 1, num: 0 },
        VringState {
            index: 0,
            num: 0x1_0000,
        },
    ] {
        for stop in [Frontend::stop, |frontend: &mut Frontend| {
            frontend.stop_vring(0)
        }] {
            let mut play = Play::started();
            stop(&mut play.frontend).unwrap();
            play.reply_base(state.index, state.num);
            assert!(matches!(play.violation(), Violation::Value { .. }));
        }
    }
    let mut play = Play::started_with(OFFERED);
    play.frontend.stop().unwrap();
    play.reply_base(1, PACKED_BASE);
    assert!(matches!(play.violation(), Violation::Value { .. }));
}

// ---- hostile bytes ----

/// A front-end in the middle of each stage, and the other end of its socket.
fn stages() -> Vec<(&'static str, Frontend, UnixStream)> {
    let reply = |request, value| bytes(&Message::reply(request, &U64(value)));
    let features = reply(
        requests::GET_FEATURES,
        FEATURES | VHOST_USER_F_PROTOCOL_FEATURES,
    );
    let protocol = reply(requests::GET_PROTOCOL_FEATURES, ALL);
    let limits = [
        reply(requests::GET_QUEUE_NUM, 1),
        reply(requests::GET_MAX_MEM_SLOTS, 8),
    ]
    .concat();
    let acks: Vec<u8> = [
        requests::SET_FEATURES,
        requests::ADD_MEM_REG,
        requests::SET_VRING_NUM,
        requests::SET_VRING_BASE,
        requests::SET_VRING_ADDR,
        requests::SET_VRING_CALL,
        requests::SET_VRING_KICK,
        requests::SET_VRING_ENABLE,
    ]
    .into_iter()
    .flat_map(|request| reply(request, 0))
    .collect();
    [
        "features",
        "protocol features",
        "limits",
        "ready",
        "starting",
        "running",
        "stopping",
        "stopping one",
    ]
    .into_iter()
    .enumerate()
    .map(|(stage, name)| {
        let (ours, mut theirs) = pair();
        let mut frontend = Frontend::new(ours).unwrap();
        let mut step = |frontend: &mut Frontend, bytes: &[u8]| {
            theirs.write_all(bytes).unwrap();
            while frontend.process().unwrap().is_some() {}
        };
        for (at, bytes) in [&features, &protocol, &limits].into_iter().enumerate() {
            if stage > at {
                step(&mut frontend, bytes);
            }
        }
        if stage > 3 {
            frontend.start(FEATURES, &memory(1), &[vring(0)]).unwrap();
        }
        if stage > 4 {
            step(&mut frontend, &acks);
        }
        match name {
            "stopping" => frontend.stop().unwrap(),
            "stopping one" => frontend.stop_vring(0).unwrap(),
            _ => {}
        }
        (name, frontend, theirs)
    })
    .collect()
}

/// What a hostile peer sends is an error at every stage, and whether it counts as a disconnect.
fn hostile(send: impl Fn(&mut UnixStream), disconnect: bool) {
    for (stage, mut frontend, mut theirs) in stages() {
        send(&mut theirs);
        drop(theirs);
        let error = frontend.process().expect_err(stage);
        assert_eq!(error.is_disconnect(), disconnect, "{stage}: {error}");
    }
}

#[test]
fn garbage_at_any_stage_ends_the_conversation() {
    hostile(|peer| peer.write_all(&[0xff; 64]).unwrap(), false);
    hostile(|peer| peer.write_all(&[0; 64]).unwrap(), false);
}

#[test]
fn a_wrong_version_at_any_stage_ends_the_conversation() {
    let mut message = Message::reply(requests::GET_FEATURES, &U64(0));
    message.flags ^= 0x3;
    hostile(|peer| peer.write_all(&bytes(&message)).unwrap(), false);
}

#[test]
fn an_oversized_payload_at_any_stage_ends_the_conversation() {
    let mut header = Message::reply(requests::GET_FEATURES, &U64(0)).header();
    header[8..].copy_from_slice(&u32::MAX.to_le_bytes());
    hostile(|peer| peer.write_all(&header).unwrap(), false);
}

#[test]
fn the_end_at_any_stage_is_a_disconnect() {
    hostile(|_| {}, true);
}

#[test]
fn the_end_in_the_middle_of_a_message_at_any_stage_is_a_disconnect() {
    let message = bytes(&Message::reply(requests::GET_FEATURES, &U64(0)));
    for len in 1..message.len() {
        hostile(|peer| peer.write_all(&message[..len]).unwrap(), true);
    }
}

#[test]
fn more_descriptors_than_allowed_at_any_stage_end_the_conversation() {
    let message = bytes(&Message::reply(requests::GET_FEATURES, &U64(0)));
    let event = event::new().unwrap();
    let fds = vec![event.as_raw_fd(); 33];
    hostile(
        |peer| {
            peer.send_with_fds(&[&message[..]], &fds).unwrap();
        },
        false,
    );
}

#[test]
fn a_silent_peer_at_any_stage_never_blocks_and_is_seen_to_owe_a_reply() {
    for (stage, mut frontend, _theirs) in stages() {
        assert_eq!(frontend.process().unwrap(), None, "{stage}");
        let idle = matches!(stage, "ready" | "running");
        assert_eq!(frontend.waits(), !idle, "{stage}");
    }
}
