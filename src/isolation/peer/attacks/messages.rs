//! Queues, eventfds, the channel for the other direction, and messages of every wrong kind.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use devices::vhost_user::{Iotlb, Message, U64, VringAddr, VringFd, VringState, flags, requests};

use super::{BASE, FILE, Tally, expect_nothing, file, region, translating};
use crate::isolation::lab::{BACK, Lab, PAGE, Tried, WINDOW};
use crate::isolation::peer::{Answer, Peer};
use crate::isolation::report::Finding;
use crate::sys;

/// What one access outside may wait for a front-end that does not answer.
const MISS: Duration = Duration::from_millis(50);

pub fn no_eventfds(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [
        requests::SET_VRING_KICK,
        requests::SET_VRING_CALL,
        requests::SET_VRING_ERR,
    ] {
        let (socket, other) = UnixStream::pair().context("socketpair")?;
        drop(other);
        let null = File::open("/dev/null").context("/dev/null")?;
        let memory = sys::memory_file(PAGE, true).context("memfd")?;
        for fd in [OwnedFd::from(socket), null.into(), memory.into()] {
            let mut peer = Peer::negotiate(lab, false)?;
            let vring = VringFd {
                index: 0,
                no_fd: false,
            };
            peer.send(&Message::request(request, &vring).with_fds(vec![fd]))?;
            lab.expect_alive(BACK)?;
            // The guest may ring what it was given.
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

pub fn missing_eventfds(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [requests::SET_VRING_KICK, requests::SET_VRING_CALL] {
        for (no_fd, count) in [(false, 0), (true, 1), (false, 2)] {
            let mut peer = Peer::negotiate(lab, false)?;
            let vring = VringFd { index: 1, no_fd };
            let events: Result<Vec<OwnedFd>, _> = (0..count).map(|_| sys::eventfd()).collect();
            let events = events.context("eventfd")?;
            peer.send(&Message::request(request, &vring).with_fds(events))?;
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

pub fn no_queue(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for index in [2, 63, 255, 65_535, u32::MAX] {
        let mut peer = Peer::negotiate(lab, false)?;
        let state = VringState { index, num: 256 };
        for request in [
            requests::SET_VRING_NUM,
            requests::SET_VRING_BASE,
            requests::SET_VRING_ENABLE,
        ] {
            peer.send(&Message::request(request, &state))?;
        }
        let kick = VringFd {
            index: u8::try_from(index & 0xff).unwrap_or(u8::MAX),
            no_fd: false,
        };
        let event = sys::eventfd().context("eventfd")?;
        peer.send(&Message::request(requests::SET_VRING_KICK, &kick).with_fds(vec![event]))?;
        let answer = peer.ask(&Message::request(requests::GET_VRING_BASE, &state))?;
        // A base of a queue that is not there is of no harm to anybody.
        tally.may(answer);
    }
    tally.finish(lab)
}

/// Rings that lie where nothing is, wrap, or lie in each other; the guest starts them and looks.
pub fn rings_anywhere(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let top = u64::MAX - (PAGE - 1);
    for translations in [false, true] {
        for (address, size) in [
            (0, 256),
            (BASE, 256),
            (BASE + FILE - 16, 256),
            (BASE + 1, 256),
            (WINDOW - 16, 32768),
            (top, 256),
            (BASE, 0),
            (BASE, 3),
            (BASE, u32::MAX),
        ] {
            let mut peer = Peer::negotiate(lab, translations)?;
            let shown = file(0xff, true)?;
            peer.table(&[region(BASE, FILE)], &[&shown])?;
            if translations {
                peer.update(BASE, FILE, BASE)?;
            }
            for index in [0, 1] {
                let state = |num| VringState { index, num };
                let addresses = VringAddr {
                    index,
                    desc: address,
                    used: address,
                    avail: address,
                    ..VringAddr::default()
                };
                let kick = VringFd {
                    index: u8::try_from(index).unwrap_or_default(),
                    no_fd: false,
                };
                let event = sys::eventfd().context("eventfd")?;
                peer.send(&Message::request(requests::SET_VRING_NUM, &state(size)))?;
                peer.send(&Message::request(requests::SET_VRING_BASE, &state(0)))?;
                peer.send(&Message::request(requests::SET_VRING_ADDR, &addresses))?;
                let kick = Message::request(requests::SET_VRING_KICK, &kick);
                peer.send(&kick.with_fds(vec![event]))?;
                peer.send(&Message::request(requests::SET_VRING_ENABLE, &state(1)))?;
            }
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

/// Hands over one end of the channel for the back-end's requests.
fn channel(peer: &mut Peer) -> Tried<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("socketpair")?;
    let message = Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![theirs.into()]);
    peer.ask(&message.with_need_reply(true))?;
    Ok(ours)
}

/// The guest's accesses wait for it, but not for ever.
pub fn silent_channel(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut peer = translating(lab)?;
    let _channel = channel(&mut peer)?;
    let start = Instant::now();
    let peek = lab.peek(BASE, 16 * PAGE, PAGE, 8, 0)?;
    let (took, most) = (start.elapsed(), 16 * 4 * MISS + Duration::from_secs(1));
    tally.tries += peek.reads;
    tally.got += (peek.reads - peek.ones) + u64::from(took > most);
    let mut finding = tally.finish(lab)?;
    finding.noticed = format!("{} reads waited {} ms in all", peek.reads, took.as_millis());
    Ok(finding)
}

pub fn garbage_channel(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for garbage in [vec![0xff; 4096], vec![0; 12], vec![1, 0, 0]] {
        let mut peer = translating(lab)?;
        let mut channel = channel(&mut peer)?;
        // It may have been closed on us.
        let _ = channel.write_all(&garbage);
        expect_nothing(lab, &mut tally, BASE, 8 * PAGE)?;
        drop(channel);
        expect_nothing(lab, &mut tally, BASE, 8 * PAGE)?;
        tally.may(if peer.is_served()? {
            Answer::Number(0)
        } else {
            Answer::Closed
        });
    }
    tally.finish(lab)
}

pub fn replies(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in 1..=44 {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.send(&Message::reply(request, &U64(0)))?;
        tally.may(if peer.is_served()? {
            Answer::Number(0)
        } else {
            Answer::Closed
        });
    }
    tally.finish(lab)
}

pub fn unknown_requests(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [0, 45, 46, 99, 0x1000, 0xdead_beef, u32::MAX] {
        for (payload, fds) in [(0, 0), (4084, 0), (8, 32)] {
            let mut peer = Peer::negotiate(lab, false)?;
            let events: Result<Vec<OwnedFd>, _> = (0..fds).map(|_| sys::eventfd()).collect();
            let message = Message {
                payload: vec![0xa5; payload],
                ..Message::bare(request)
            };
            peer.send(&message.with_fds(events.context("eventfd")?))?;
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

/// A header as it goes over the wire.
fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

/// Bytes that are no message, which have to end in a closed connection.
fn nonsense(lab: &mut Lab, all: &[Vec<u8>]) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for bytes in all {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.raw(bytes);
        let answer = peer.answer(Duration::from_secs(2))?;
        tally.must_refuse(answer);
    }
    tally.finish(lab)
}

pub fn too_long(lab: &mut Lab) -> Tried<Finding> {
    let sizes = [4085, 4096, 65_536, 1 << 30, u32::MAX];
    let all: Vec<Vec<u8>> = sizes
        .iter()
        .map(|&size| header(requests::GET_FEATURES, flags::VERSION, size))
        .collect();
    nonsense(lab, &all)
}

pub fn other_version(lab: &mut Lab) -> Tried<Finding> {
    let all: Vec<Vec<u8>> = [0, 2, 3, 0xffff_fffc]
        .iter()
        .map(|&flags| header(requests::GET_FEATURES, flags, 0))
        .collect();
    nonsense(lab, &all)
}

/// Everything before its time, backwards.
pub fn out_of_order(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let state = VringState { index: 0, num: 1 };
    for first in 0..6 {
        let (mut peer, _) = Peer::connect(lab)?;
        let event = sys::eventfd().context("eventfd")?;
        let kick = VringFd {
            index: 0,
            no_fd: false,
        };
        let mut all = vec![
            Message::request(requests::SET_VRING_ENABLE, &state),
            Message::request(requests::SET_VRING_KICK, &kick).with_fds(vec![event]),
            Message::request(requests::SET_VRING_ADDR, &VringAddr::default()),
            Message::request(requests::IOTLB_MSG, &Iotlb::default()),
            Message::request(requests::SET_PROTOCOL_FEATURES, &U64(u64::MAX)),
            Message::request(requests::SET_FEATURES, &U64(u64::MAX)),
        ];
        all.rotate_left(first);
        for message in &all {
            peer.send(message)?;
        }
        tally.may(peer.ask(&Message::request(requests::GET_VRING_BASE, &state))?);
        tally.tries += all.len() as u64;
    }
    tally.finish(lab)
}

pub fn cut_short(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let whole = [
        header(requests::SET_FEATURES, flags::VERSION, 8),
        vec![0; 8],
    ]
    .concat();
    for len in 1..whole.len() {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.raw(&whole[..len]);
        tally.tries += 1;
    }
    tally.finish(lab)
}

/// Messages by the thousand, and nobody takes the answers.
pub fn message_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let (mut peer, _) = Peer::connect(lab)?;
    let one = header(requests::GET_FEATURES, flags::VERSION, 0);
    let sent = peer.raw(&one.repeat(20_000));
    tally.tries += (sent / one.len()) as u64;
    drop(peer);
    drop(Peer::connect(lab)?);
    tally.finish(lab)
}

pub fn connection_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut open = Vec::new();
    for n in 0..500 {
        // Some are refused at once: that is an answer, too.
        match UnixStream::connect(lab.socket()) {
            Ok(stream) if n % 2 == 0 => open.push(stream),
            Ok(_) => {}
            Err(_) => tally.closed += 1,
        }
        tally.tries += 1;
        if n % 50 == 49 {
            open.clear();
        }
    }
    drop(open);
    drop(Peer::connect(lab)?);
    tally.finish(lab)
}
