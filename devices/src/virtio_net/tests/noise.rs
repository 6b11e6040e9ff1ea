//! Back-ends and drivers that say and do anything: nothing panics, nothing hangs, and when the connection is gone the next one is served.

use std::net::Shutdown;

use super::iommu::{Behind, EXTRA, RINGS, shifted};
use super::*;
use crate::vhost_user::tests::noise::{self, Given, PROTOCOL_FEATURES, Random, spoil};
use crate::vhost_user::{Inflight, Iotlb, IotlbKind, backend_requests};

/// Connections, and turns of each at most. Sequences are the same in each run.
const CONNECTIONS: u64 = 400;
const TURNS: u64 = 60;

/// What the back-end has been sent, and the channel on which it may ask.
#[derive(Default)]
struct Heard {
    channel: Option<Connection>,
    messages: u64,
    replies: u64,
}

/// The right answer to a request, where it gets one.
fn answer(
    message: &Message,
    features: u64,
    random: &mut Random,
    given: &mut Given,
) -> Option<Message> {
    let request = message.request;
    let number = |value| Some(Message::reply(request, &U64(value)));
    match request {
        requests::GET_FEATURES => number(features | VHOST_USER_F_PROTOCOL_FEATURES),
        requests::GET_PROTOCOL_FEATURES => {
            number(PROTOCOL_FEATURES | protocol_features::INFLIGHT_SHMFD & random.next())
        }
        requests::GET_INFLIGHT_FD => {
            let area = Inflight {
                mmap_size: 0x1000 * random.below(3),
                ..Inflight::default()
            };
            let file = (area.mmap_size > 0).then(|| given.any(random));
            Some(Message::reply(request, &area).with_fds(file.into_iter().collect()))
        }
        requests::GET_QUEUE_NUM => number(2),
        requests::GET_MAX_MEM_SLOTS => number(8),
        requests::GET_VRING_BASE => {
            let state = VringState::decode(&message.payload).unwrap();
            Some(Message::reply(request, &state))
        }
        _ => message
            .needs_reply()
            .then(|| Message::reply(request, &U64(0))),
    }
}

/// Something that nobody asked for, or a question on the channel.
fn chatter(peer: &mut Connection, heard: &mut Heard, random: &mut Random, given: &mut Given) {
    if random.once_in(8) {
        let mut message = Message::reply(random.small(), &U64(random.next()));
        spoil(&mut message, random, given);
        // The device may have hung up.
        let _ = peer.send(&message);
    } else if let Some(channel) = &mut heard.channel {
        let iotlb = Iotlb {
            iova: random.pages(),
            size: 0x1000,
            read: true,
            write: random.once_in(2),
            kind: IotlbKind::Miss,
            ..Iotlb::default()
        };
        let mut message = Message::request(backend_requests::IOTLB_MSG, &iotlb);
        if random.once_in(2) {
            message = message.with_need_reply(true);
        }
        if random.once_in(16) {
            spoil(&mut message, random, given);
        }
        let _ = channel.send(&message);
        while let Ok(Some(_)) = channel.receive() {}
    }
}

/// The driver, or whoever maps memory for it, does something.
fn guest(world: &mut Behind, random: &mut Random) {
    let index = u16::try_from(random.below(3)).unwrap();
    match random.below(20) {
        0 => world.net.reset(),
        1..=4 => world.net.activate(shifted()),
        5 => world.net.reset_queue(index),
        6 => {
            let queues = shifted().queues;
            world
                .net
                .enable_queue(index, queues[random.index(2)].clone());
        }
        7..=9 => {
            world.endpoint.map(EXTRA);
        }
        10..=12 => {
            world.endpoint.unmap(EXTRA.iova, EXTRA.len);
        }
        13 => {
            world.endpoint.unmap(RINGS.iova, RINGS.len);
        }
        14..=16 => {
            world.endpoint.unmap(RINGS.iova, RINGS.len);
            world.endpoint.map(RINGS);
        }
        _ => {}
    }
    while world.endpoint.take_fault().is_some() {}
}

/// The device thread comes to rest.
#[track_caller]
fn settle(world: &mut Behind, what: &str) {
    for _ in 0..1000 {
        if world.manager.run_with_timeout(0).unwrap() == 0 {
            return;
        }
    }
    panic!("{what}: the device thread never comes to rest");
}

/// One connection from its beginning to its end, whoever ends it.
fn connection(world: &mut Behind, random: &mut Random, given: &mut Given, what: &str) -> Heard {
    let stream = UnixStream::connect(&world.path).unwrap();
    let mut raw = stream.try_clone().unwrap();
    let mut peer = Connection::new(stream).unwrap();
    let mut heard = Heard::default();
    let features = match random.below(8) {
        0 => random.next(),
        1 => BACKEND,
        _ => BACKEND | F_ACCESS_PLATFORM,
    };
    for _ in 0..random.below(TURNS) {
        settle(world, what);
        loop {
            let message = match peer.receive() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => return heard,
            };
            heard.messages += 1;
            let mut reply = answer(&message, features, random, given);
            if message.request == requests::SET_BACKEND_REQ_FD {
                let fd = message.fds.into_iter().next().unwrap();
                heard.channel = Some(Connection::new(fd.into()).unwrap());
            }
            if let Some(reply) = &mut reply {
                if random.once_in(150) {
                    spoil(reply, random, given);
                }
                if random.once_in(150) {
                    let bytes = noise::bytes(reply);
                    let _ = raw.write_all(&bytes[..random.index(bytes.len())]);
                    let _ = raw.shutdown(Shutdown::Both);
                } else if !random.once_in(300) {
                    heard.replies += 1;
                    let _ = peer.send(reply);
                }
            }
        }
        guest(world, random);
        if random.once_in(3) {
            chatter(&mut peer, &mut heard, random, given);
        }
    }
    heard
}

#[test]
fn whatever_a_back_end_says_the_next_one_is_served() {
    let mut world = Behind::new();
    let (mut messages, mut replies, mut channels) = (0, 0, 0);
    for seed in 0..CONNECTIONS {
        let what = format!("seed {seed}");
        let random = &mut Random(seed);
        let mut given = Given::default();
        let heard = connection(&mut world, random, &mut given, &what);
        messages += heard.messages;
        replies += heard.replies;
        channels += u64::from(heard.channel.is_some());
        settle(&mut world, &what);
        if let Some(mut channel) = heard.channel {
            let answers = (0..TURNS).map_while(|_| channel.receive().ok());
            assert!(
                (answers.count() as u64) < TURNS,
                "{what}: the channel stays open"
            );
        }
        assert_eq!(world.link(), 0, "{what}");
        // Nobody waits for a peer that is gone: not the driver, and not whoever changes mappings.
        let last = world.endpoint.map(EXTRA);
        assert!(world.endpoint.is_done(last), "{what}");
        // What is in flight is kept for the next, until the driver starts over.
        world.net.reset();
        settle(&mut world, &what);
        given.assert_closed(&what);
    }
    let depth = [messages / 10, replies / 10, channels * 2];
    assert!(depth.iter().all(|&count| count > CONNECTIONS), "{depth:?}");

    world.net.reset();
    world.endpoint.map(RINGS);
    let mut backend = world.connect(BACKEND | F_ACCESS_PLATFORM);
    world.net.activate(shifted());
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(world.link(), LINK_UP);
}
