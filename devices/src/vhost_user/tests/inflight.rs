//! The area for what is in flight, with a peer that follows a script.

use super::descriptors;
use super::frontend::{FEATURES, Play, memory, vring};
use crate::vhost_user::frontend::{Event, Violation};
use crate::vhost_user::{Inflight, Message, Payload, VringState, protocol_features, requests};

const ONLY: u64 = protocol_features::INFLIGHT_SHMFD;

/// A front-end that waits for the area before it starts two vrings.
fn waiting() -> Play {
    let mut play = Play::handshake(Some(ONLY), 0);
    play.frontend
        .start(FEATURES, &memory(1), &[vring(0), vring(1)])
        .unwrap();
    play.expect(requests::SET_FEATURES);
    play.expect(requests::SET_MEM_TABLE);
    let (asked, _) = play.expect_payload::<Inflight>(requests::GET_INFLIGHT_FD);
    let expected = Inflight {
        num_queues: 2,
        queue_size: 256,
        ..Inflight::default()
    };
    assert_eq!(asked, expected);
    play.expect_nothing();
    assert!(play.frontend.is_started() && play.frontend.has_vring(1));
    play
}

/// The back-end's answer, with this length and so many files.
fn answer(play: &mut Play, mmap_size: u64, files: usize) {
    let area = Inflight {
        mmap_size,
        num_queues: 2,
        queue_size: 256,
        ..Inflight::default()
    };
    let message = Message::reply(requests::GET_INFLIGHT_FD, &area).with_fds(descriptors(files));
    play.peer.send(&message).unwrap();
}

/// The requests that have come, vring by vring where they are about one.
fn told(play: &mut Play) -> Vec<(u32, Option<u32>)> {
    std::iter::from_fn(|| play.peer.receive().unwrap())
        .map(|message| {
            let index = VringState::decode(&message.payload).ok();
            (message.request, index.map(|state| state.index))
        })
        .collect()
}

#[test]
fn the_description_is_the_24_bytes_that_c_makes_of_it() {
    let area = Inflight {
        mmap_size: 0x0807_0605_0403_0201,
        mmap_offset: 0x1817_1615_1413_1211,
        num_queues: 0x2221,
        queue_size: 0x3231,
    };
    let bytes = area.encode();
    let expected = [
        1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x21, 0x22, 0x31,
        0x32, 0, 0, 0, 0,
    ];
    assert_eq!(bytes, expected);
    assert_eq!(Inflight::decode(&bytes), Ok(area));
    assert!(Inflight::decode(&bytes[..20]).is_err());
}

#[test]
fn vrings_are_started_behind_the_area() {
    let mut play = waiting();
    answer(&mut play, 0x4000, 1);
    assert_eq!(play.process().unwrap(), None, "their start is not answered");
    let (area, message) = play.expect_payload::<Inflight>(requests::SET_INFLIGHT_FD);
    assert_eq!((area.mmap_size, message.fds.len()), (0x4000, 1));
    let enabled = told(&mut play);
    let enabled = enabled
        .iter()
        .filter(|(r, _)| *r == requests::SET_VRING_ENABLE);
    assert_eq!(enabled.count(), 2);
    play.reply(requests::GET_FEATURES, 0);
    assert_eq!(play.process().unwrap(), Some(Event::Started));
    assert!(play.frontend.take_inflight().is_some());
}

#[test]
fn a_back_end_without_an_area_is_started_without_one() {
    let mut play = waiting();
    answer(&mut play, 0, 0);
    assert_eq!(play.process().unwrap(), None);
    play.expect(requests::SET_VRING_NUM);
    assert!(play.frontend.take_inflight().is_none());
}

#[test]
fn an_area_without_its_file_or_with_others_is_a_violation() {
    for (size, files) in [(0x4000, 0), (0x4000, 2), (0, 1)] {
        let mut play = waiting();
        answer(&mut play, size, files);
        assert_eq!(play.violation(), Violation::Fds(requests::GET_INFLIGHT_FD));
    }
}

#[test]
fn an_area_that_is_refused_is_not_kept() {
    let all = ONLY | protocol_features::REPLY_ACK;
    let mut play = Play::handshake(Some(all), 0);
    play.frontend
        .start(FEATURES, &memory(1), &[vring(0)])
        .unwrap();
    play.reply(requests::SET_FEATURES, 0);
    play.reply(requests::SET_MEM_TABLE, 0);
    answer(&mut play, 0x4000, 1);
    assert_eq!(play.process().unwrap(), None);
    play.reply(requests::SET_INFLIGHT_FD, 1);
    let expected = Violation::Refused {
        request: requests::SET_INFLIGHT_FD,
        value: 1,
    };
    assert_eq!(play.violation(), expected);
    assert!(play.frontend.take_inflight().is_none());
}

#[test]
fn vrings_that_are_stopped_before_the_area_has_come_are_never_started() {
    let mut play = waiting();
    play.frontend.stop().unwrap();
    assert!(!play.frontend.has_vring(0));
    answer(&mut play, 0x4000, 1);
    assert_eq!(play.process().unwrap(), Some(Event::Stopped(vec![])));
    assert_eq!(told(&mut play), []);
    assert!(play.frontend.take_inflight().is_none());
}

#[test]
fn one_vring_can_be_stopped_and_started_again_before_the_area_has_come() {
    let mut play = waiting();
    play.frontend.stop_vring(0).unwrap();
    assert_eq!(play.process().unwrap(), Some(Event::VringStopped(0, 17)));
    assert!(!play.frontend.has_vring(0));
    play.frontend.start_vring(&vring(0)).unwrap();
    assert!(play.frontend.start_vring(&vring(0)).is_err());
    assert!(play.frontend.has_vring(0));
    play.expect_nothing();
    answer(&mut play, 0x4000, 1);
    assert_eq!(play.process().unwrap(), None);
    let enabled: Vec<_> = told(&mut play)
        .into_iter()
        .filter(|(r, _)| *r == requests::SET_VRING_ENABLE)
        .collect();
    let enable = |index| (requests::SET_VRING_ENABLE, Some(index));
    assert_eq!(enabled, [enable(1), enable(0)]);
}

#[test]
fn a_vring_that_is_disabled_before_the_area_has_come_is_started_like_that() {
    let mut play = waiting();
    play.frontend.enable_vrings(&[(1, false)]).unwrap();
    play.expect(requests::GET_FEATURES);
    answer(&mut play, 0x4000, 1);
    play.reply(requests::GET_FEATURES, 0);
    assert_eq!(play.process().unwrap(), Some(Event::Enabled));
    let states: Vec<_> = std::iter::from_fn(|| play.peer.receive().unwrap())
        .filter(|message| message.request == requests::SET_VRING_ENABLE)
        .map(|message| VringState::decode(&message.payload).unwrap())
        .map(|state| (state.index, state.num))
        .collect();
    assert_eq!(states, [(0, 1), (1, 0)]);
}
