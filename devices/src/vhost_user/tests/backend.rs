//! The back-end's state machine, with memory and rings that only take notes.

use std::io;
use std::os::fd::OwnedFd;

use super::descriptors;
use crate::vhost_user::backend::{Backend, Fault, MAX_REGIONS, Served, VRINGS};
use crate::vhost_user::{
    MemoryRegion, MemoryTable, Message, Payload, U64, VHOST_USER_F_PROTOCOL_FEATURES, VringAddr,
    VringFd, VringState, protocol_features, requests,
};

const OFFERED: u64 = 1 << 32 | 1 << 34;

#[derive(Default)]
struct Notes {
    /// Where the rings are, while they are in use.
    running: Option<[u32; VRINGS]>,
    regions: usize,
    refuse: Option<usize>,
    refuse_eventfds: bool,
}

impl Served for Notes {
    fn stop(&mut self) -> Option<[u32; VRINGS]> {
        self.running.take()
    }

    fn set_memory(
        &mut self,
        table: Vec<(MemoryRegion, OwnedFd)>,
    ) -> Result<(), (usize, io::Error)> {
        assert_eq!(self.running, None, "memory changed under running rings");
        self.regions = table.len();
        match self.refuse {
            Some(at) => Err((at, io::Error::other("no"))),
            None => Ok(()),
        }
    }

    fn check_eventfd(&mut self, _fd: &OwnedFd) -> io::Result<()> {
        match self.refuse_eventfds {
            true => Err(io::Error::other("no eventfd")),
            false => Ok(()),
        }
    }
}

fn regions(count: u64) -> Vec<MemoryRegion> {
    let region = |at: u64| MemoryRegion {
        guest_address: at << 20,
        size: 0x1000,
        user_address: 0x7000_0000_0000 + (at << 20),
        mmap_offset: at << 12,
    };
    (0..count).map(region).collect()
}

fn table(count: u64, fds: usize) -> Message {
    Message::request(requests::SET_MEM_TABLE, &MemoryTable(regions(count)))
        .with_fds(descriptors(fds))
}

fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}

/// Sends what needs no answer.
#[track_caller]
fn tell(backend: &mut Backend, notes: &mut Notes, request: u32, payload: &impl Payload) {
    let answer = backend.handle(Message::request(request, payload), notes);
    assert!(matches!(answer, Ok(None)), "{answer:?}");
}

fn line(request: u32, index: u8, no_fd: bool) -> Message {
    let fds = descriptors(usize::from(!no_fd));
    Message::request(request, &VringFd { index, no_fd }).with_fds(fds)
}

/// Features, memory and both vrings, not yet enabled.
fn started(notes: &mut Notes, features: u64) -> Backend {
    let mut backend = Backend::new(OFFERED);
    let features = features | VHOST_USER_F_PROTOCOL_FEATURES;
    tell(&mut backend, notes, requests::SET_FEATURES, &U64(features));
    backend.handle(table(1, 1), notes).unwrap();
    for index in [0, 1] {
        tell(
            &mut backend,
            notes,
            requests::SET_VRING_NUM,
            &state(index, 8),
        );
        let addr = VringAddr {
            index,
            desc: 1,
            used: 2,
            avail: 3,
            ..VringAddr::default()
        };
        tell(&mut backend, notes, requests::SET_VRING_ADDR, &addr);
        let index = u8::try_from(index).unwrap();
        let kick = line(requests::SET_VRING_KICK, index, index == 0);
        backend.handle(kick, notes).unwrap();
    }
    backend
}

#[test]
fn rings_are_ready_once_both_are_started_and_enabled() {
    let mut notes = Notes::default();
    let mut backend = started(&mut notes, 1 << 32);
    for index in [0, 1] {
        assert!(backend.ready().is_none());
        tell(
            &mut backend,
            &mut notes,
            requests::SET_VRING_ENABLE,
            &state(index, 1),
        );
    }
    let [rx, tx] = backend.ready().unwrap();
    assert_eq!(rx.areas, Some([1, 3, 2]));
    assert!(rx.kick.is_none() && tx.kick.is_some());
    // Without the protocol feature, kicks are all there is.
    tell(
        &mut backend,
        &mut notes,
        requests::SET_VRING_ENABLE,
        &state(1, 0),
    );
    assert!(backend.ready().is_none());
    tell(
        &mut backend,
        &mut notes,
        requests::SET_FEATURES,
        &U64(1 << 32),
    );
    assert!(backend.ready().is_some());
}

#[test]
fn running_rings_stop_before_anything_changes_and_remember_where_they_were() {
    for (message, base) in [
        (table(2, 2), 7),
        (
            Message::request(requests::SET_VRING_ENABLE, &state(0, 0)),
            7,
        ),
        (Message::request(requests::SET_VRING_BASE, &state(0, 3)), 3),
        (Message::request(requests::SET_FEATURES, &U64(0)), 7),
        (line(requests::SET_VRING_CALL, 0, false), 7),
        (line(requests::SET_VRING_KICK, 0, false), 7),
    ] {
        let request = requests::name(message.request);
        let mut notes = Notes::default();
        let mut backend = started(&mut notes, 1 << 32);
        notes.running = Some([7, 9]);
        backend.handle(message, &mut notes).unwrap();
        assert_eq!(notes.running, None, "{request}");
        for (index, base) in [(0, base), (1, 9)] {
            let ask = Message::request(requests::GET_VRING_BASE, &state(index, 0));
            let answer = backend.handle(ask, &mut notes).unwrap().unwrap();
            assert_eq!(answer.payload, state(index, base).encode(), "{request}");
        }
        assert!(backend.ready().is_none(), "GET_VRING_BASE stops a vring");
    }
}

#[test]
fn a_ring_that_was_never_used_is_at_the_start_of_its_layout() {
    for (features, base) in [(1 << 32, 0), (1 << 32 | 1 << 34, 0x8000_8000)] {
        let mut notes = Notes::default();
        let mut backend = started(&mut notes, features);
        let ask = Message::request(requests::GET_VRING_BASE, &state(1, 0));
        let answer = backend.handle(ask, &mut notes).unwrap().unwrap();
        assert_eq!(answer.payload, state(1, base).encode());
    }
}

#[test]
fn user_addresses_are_translated_within_one_region() {
    let mut notes = Notes::default();
    let mut backend = Backend::new(OFFERED);
    backend.handle(table(2, 2), &mut notes).unwrap();
    let user = 0x7000_0010_0000;
    for (addr, len, gpa) in [
        (user, 0x1000, Some(0x10_0000)),
        (user + 0xff8, 8, Some(0x10_0ff8)),
        (user + 0xff8, 9, None),
        (user - 1, 2, None),
        (u64::MAX, 2, None),
        (0, 1, None),
    ] {
        assert_eq!(backend.translate(addr, len), gpa, "{addr:#x}");
    }
}

#[test]
fn an_acknowledgement_comes_where_it_was_negotiated_and_asked_for() {
    let mut notes = Notes::default();
    let mut backend = Backend::new(OFFERED);
    let owner = |wanted| Message::bare(requests::SET_OWNER).with_need_reply(wanted);
    assert!(backend.handle(owner(true), &mut notes).unwrap().is_none());
    let ack = U64(protocol_features::REPLY_ACK);
    tell(
        &mut backend,
        &mut notes,
        requests::SET_PROTOCOL_FEATURES,
        &ack,
    );
    assert!(backend.handle(owner(false), &mut notes).unwrap().is_none());
    let answer = backend.handle(owner(true), &mut notes).unwrap().unwrap();
    assert!(answer.is_reply() && answer.payload == U64(0).encode());
}

#[test]
fn what_a_front_end_gets_wrong_is_a_fault() {
    let mut notes = Notes::default();
    let mut backend = Backend::new(OFFERED);
    let mut fault = |message, notes: &mut Notes| backend.handle(message, notes).unwrap_err();
    let many = MAX_REGIONS as u64 + 1;
    assert!(matches!(
        fault(table(2, 1), &mut notes),
        Fault::Descriptors {
            expected: 2,
            got: 1,
            ..
        }
    ));
    // A message cannot carry more descriptors than there may be regions.
    assert!(!matches!(
        fault(table(many, 1), &mut notes),
        Fault::Reply(_)
    ));
    let features = Message::request(requests::SET_FEATURES, &U64(1 << 33));
    assert!(matches!(fault(features, &mut notes), Fault::Features(_, bits) if bits == 1 << 33));
    let far = Message::request(requests::SET_VRING_NUM, &state(2, 8));
    assert!(matches!(fault(far, &mut notes), Fault::Vring(_, 2)));
    let extra = Message::bare(requests::GET_FEATURES).with_fds(descriptors(1));
    assert!(matches!(
        fault(extra, &mut notes),
        Fault::Descriptors { expected: 0, .. }
    ));
    assert!(matches!(
        fault(Message::bare(22), &mut notes),
        Fault::NotServed(22)
    ));
    notes.refuse_eventfds = true;
    let call = line(requests::SET_VRING_CALL, 0, false);
    assert!(matches!(fault(call, &mut notes), Fault::EventFd(..)));
    notes.refuse = Some(1);
    let refused = fault(table(2, 2), &mut notes);
    assert!(matches!(refused, Fault::Memory { region, .. } if region == regions(2)[1]));
}
