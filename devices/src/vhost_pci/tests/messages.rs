//! What messages do.

use std::sync::atomic::Ordering as Order;

use super::*;
use crate::fake::Event;
use crate::vhost_user::SingleMemoryRegion;

#[test]
fn messages_pass_to_the_guest_and_its_replies_back() {
    let (mut rig, mut peer) = Rig::connected();
    rig.request(&mut peer, &Message::bare(requests::GET_QUEUE_NUM));
    assert_eq!(
        rig.received(),
        Some((requests::GET_QUEUE_NUM, flags::VERSION, vec![]))
    );
    assert!(rig.driver.interrupts().contains(&1), "the vector of rxq");
    rig.reply(requests::GET_QUEUE_NUM, &U64(7));
    let reply = peer.receive().unwrap().unwrap();
    assert_eq!((reply.request, reply.flags), (requests::GET_QUEUE_NUM, 0x5));
    assert_eq!(reply.payload, U64(7).encode());
    // A number that no specification knows passes as it is.
    let unknown = Message {
        payload: vec![1, 2, 3],
        ..Message::bare(1234)
    };
    rig.request(&mut peer, &unknown);
    assert_eq!(rig.received(), Some((1234, flags::VERSION, vec![1, 2, 3])));
}

#[test]
fn a_receive_buffer_may_be_a_chain() {
    let mut rig = Rig::new(SocketRole::Listen);
    rig.rx.offer_chain(10, 4086);
    let mut peer = rig.connect();
    rig.request(
        &mut peer,
        &Message::request(requests::SET_FEATURES, &U64(0x1234)),
    );
    assert_eq!(rig.received().unwrap().2, U64(0x1234).encode());
}

#[test]
fn a_configuration_for_rss_passes_as_it_is_where_that_was_agreed_on() {
    let (mut rig, mut peer) = Rig::connected();
    let agreed = protocol_features::REPLY_ACK | protocol_features::RSS;
    rig.agree(&mut peer, agreed);
    for payload in [vec![], vec![0xa5; 307]] {
        let mut message = Message::bare(requests::SET_RSS).with_need_reply(true);
        message.payload = payload.clone();
        rig.request(&mut peer, &message);
        let passed = (requests::SET_RSS, 0x9, payload);
        assert_eq!(
            rig.received(),
            Some(passed),
            "the driver is the one who knows"
        );
        rig.reply(requests::SET_RSS, &U64(0));
        assert_eq!(peer.receive().unwrap().unwrap().request, requests::SET_RSS);
    }
}

#[test]
fn what_the_device_cannot_carry_is_taken_out_of_the_replies_and_refused_when_used() {
    let (mut rig, mut peer) = Rig::connected();
    for (request, offered, passes) in [
        (requests::GET_FEATURES, u64::MAX, !(1 << 26)),
        (
            requests::GET_PROTOCOL_FEATURES,
            u64::MAX,
            // The channel of requests is the device's own, and goes with ACCESS_PLATFORM.
            1 << 0 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 15 | 1 << 62,
        ),
    ] {
        rig.request(&mut peer, &Message::bare(request));
        rig.reply(request, &U64(offered));
        assert_eq!(
            peer.receive().unwrap().unwrap().payload,
            U64(passes).encode()
        );
    }
    for message in [
        Message::request(requests::SET_FEATURES, &U64(1 << 26)),
        Message::request(requests::SET_PROTOCOL_FEATURES, &U64(1 << 5)),
        Message::bare(requests::IOTLB_MSG),
        Message::bare(requests::SET_LOG_BASE),
        Message::request(requests::SEND_RARP, &U64(1)),
        Message::bare(requests::GET_INFLIGHT_FD),
        Message::bare(requests::SET_STATUS),
        Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![eventfd().1]),
        Message::bare(requests::SET_RSS),
        Message::bare(requests::SET_OWNER).with_fds(vec![eventfd().1]),
        Message::bare(1234).with_fds(vec![eventfd().1]),
        Message {
            flags: flags::VERSION | flags::REPLY,
            ..Message::bare(requests::SET_OWNER)
        },
    ] {
        let (mut rig, mut peer) = Rig::connected();
        rig.request(&mut peer, &message);
        rig.assert_gone(&mut peer);
        assert_eq!(rig.device.stats().peer_faults, 1, "{message:?}");
        assert_eq!(rig.received(), None, "{message:?}");
    }
}

#[test]
fn rings_of_any_layout_pass_because_the_device_does_not_look_at_them() {
    let (mut rig, mut peer) = Rig::connected();
    // In order, packed, ring reset, event index, indirect, mergeable buffers.
    let rings = 1u64 << 35 | 1 << 34 | 1 << 40 | 1 << 29 | 1 << 28 | 1 << 15;
    rig.request(&mut peer, &Message::bare(requests::GET_FEATURES));
    rig.received().unwrap();
    rig.reply(requests::GET_FEATURES, &U64(rings));
    let reply = peer.receive().unwrap().unwrap();
    assert_eq!(reply.payload, U64(rings).encode());
    let state = |num| VringState { index: 1, num };
    let address = VringAddr {
        index: 1,
        flags: 0,
        desc: 0x1000,
        used: 0x7ffc,
        avail: 0x7ff8,
        log: 0,
    };
    for message in [
        Message::request(requests::SET_FEATURES, &U64(rings)),
        Message::request(requests::SET_VRING_NUM, &state(768)),
        Message::request(requests::SET_VRING_BASE, &state(0x8000_8000)),
        Message::request(requests::SET_VRING_ADDR, &address),
        Message::request(requests::SET_VRING_ENABLE, &state(0)),
        Message::request(requests::GET_VRING_BASE, &state(0)),
    ] {
        rig.request(&mut peer, &message);
        let passed = (message.request, flags::VERSION, message.payload);
        assert_eq!(rig.received(), Some(passed));
    }
    rig.reply(requests::GET_VRING_BASE, &state(0xffff_7fff));
    let reply = peer.receive().unwrap().unwrap();
    assert_eq!(reply.payload, state(0xffff_7fff).encode());
}

#[test]
fn memory_is_shown_at_its_guest_physical_address_before_the_driver_hears_of_it() {
    let (mut rig, mut peer) = Rig::connected();
    let regions = [region(0, 0xa_0000), region(0x10_0000, 0x20_0000)];
    let message = table(&regions, &memory(0x20_0000));
    rig.request(&mut peer, &message);
    assert_eq!(
        rig.window().shown(),
        [(0, 0xa_0000), (0x10_0000, 0x20_0000)]
    );
    assert_eq!(
        rig.received(),
        Some((requests::SET_MEM_TABLE, flags::VERSION, message.payload))
    );
}

#[test]
fn a_new_table_changes_only_what_differs() {
    let (mut rig, mut peer) = Rig::connected();
    let (file, other) = (memory(0x10_0000), memory(0x10_0000));
    let [a, b, c] = [0, 0x10_0000, 0x20_0000].map(|at| region(at, 0x1000));
    rig.request(&mut peer, &table(&[a, b], &file));
    rig.host.log.take();
    // In another order, and at another user address.
    let moved = MemoryRegion {
        user_address: 0,
        ..b
    };
    rig.request(&mut peer, &table(&[c, moved], &file));
    assert_eq!(
        rig.host.log.take(),
        [Event::Unmapped(0), Event::Mapped(0x20_0000, 0x1000)]
    );
    // REM_MEM_REG knows the region by the user address that it has now.
    let remove = Message::request(requests::REM_MEM_REG, &SingleMemoryRegion(moved));
    rig.request(&mut peer, &remove);
    assert_eq!(rig.host.log.take(), [Event::Unmapped(0x10_0000)]);
    // The same place of another file.
    rig.request(&mut peer, &table(&[c], &other));
    let events = [Event::Unmapped(0x20_0000), Event::Mapped(0x20_0000, 0x1000)];
    assert_eq!(rig.host.log.take(), events);
}

#[test]
fn regions_come_and_go_one_at_a_time() {
    let (mut rig, mut peer) = Rig::acknowledging();
    let file = memory(0x10_0000);
    let [a, b] = [0, 0x10_0000].map(|at| SingleMemoryRegion(region(at, 0x10_0000)));
    for single in [a, b] {
        let add = Message::request(requests::ADD_MEM_REG, &single).with_fds(vec![fd(&file)]);
        rig.request(&mut peer, &add.with_need_reply(true));
        assert_eq!(rig.received().unwrap().0, requests::ADD_MEM_REG);
        rig.reply(requests::ADD_MEM_REG, &U64(0));
        assert_eq!(peer.receive().unwrap().unwrap().payload, U64(0).encode());
    }
    // One of these brings a descriptor along.
    let remove = Message::request(requests::REM_MEM_REG, &a).with_fds(vec![fd(&file)]);
    rig.request(&mut peer, &remove);
    assert_eq!(rig.window().shown(), [(0x10_0000, 0x10_0000)]);
    rig.request(&mut peer, &Message::request(requests::REM_MEM_REG, &b));
    assert_eq!(rig.window().shown(), []);
}

#[test]
fn a_region_may_come_and_go_once_for_each_queue_pair() {
    let (mut rig, mut peer) = Rig::acknowledging();
    let (file, other) = (memory(0x10_0000), memory(0x10_0000));
    let here = region(0x10_0000, 0x10_0000);
    let mut say = |rig: &mut Rig, request, region: MemoryRegion, fds: Vec<OwnedFd>, passes| {
        let message = Message::request(request, &SingleMemoryRegion(region)).with_fds(fds);
        rig.request(&mut peer, &message.with_need_reply(true));
        if passes {
            assert_eq!(rig.received().unwrap().0, request, "the driver sees each");
            rig.reply(request, &U64(0));
        }
        let answer = peer.receive().unwrap().unwrap().payload;
        assert_eq!(answer, U64(u64::from(!passes)).encode());
    };
    let add = requests::ADD_MEM_REG;
    say(&mut rig, add, here, vec![fd(&file)], true);
    assert_eq!(rig.host.log.take(), [Event::Mapped(0x10_0000, 0x10_0000)]);
    say(&mut rig, add, here, vec![fd(&file)], true);
    assert_eq!(rig.host.log.take(), [], "what is in use does not blink");
    // What is like it is not it.
    say(&mut rig, add, here, vec![fd(&other)], false);
    let moved = MemoryRegion {
        user_address: here.user_address + 0x1000,
        ..here
    };
    say(&mut rig, add, moved, vec![fd(&file)], false);
    let remove = requests::REM_MEM_REG;
    say(&mut rig, remove, moved, vec![], false);
    say(&mut rig, remove, region(0x10_0000, 0x1000), vec![], false);
    assert_eq!(rig.window().shown(), [(0x10_0000, 0x10_0000)]);
    for _ in 0..2 {
        say(&mut rig, remove, here, vec![], true);
        assert_eq!(rig.window().shown(), []);
    }
}

/// Tables that no window can show.
fn bad_tables() -> Vec<Vec<MemoryRegion>> {
    let good = region(0x10_0000, 0x1000);
    vec![
        vec![good, region(0x10_0000, 0x1000)],
        vec![region(0x10_0000, 0x2000), region(0x10_1000, 0x1000)],
        vec![good, region(0, 0x10_1000)],
        vec![good, region(WINDOW, 0x1000)],
        vec![good, region(WINDOW - 0x1000, 0x2000)],
        vec![good, region(0u64.wrapping_sub(0x1000), 0x2000)],
        vec![good, region(0x20_0800, 0x1000)],
        vec![good, region(0x20_0000, 0x1800)],
        vec![good, region(0x20_0000, 0)],
        vec![
            good,
            MemoryRegion {
                mmap_offset: 0x800,
                ..region(0x20_0000, 0x1000)
            },
        ],
        vec![
            good,
            MemoryRegion {
                mmap_offset: !0xfff,
                ..region(0x20_0000, 0x2000)
            },
        ],
        vec![
            good,
            MemoryRegion {
                mmap_offset: 1 << 40,
                ..region(0x20_0000, 0x1000)
            },
        ],
    ]
}

#[test]
fn a_bad_table_closes_the_connection_with_nothing_left() {
    for regions in bad_tables() {
        let (mut rig, mut peer) = Rig::connected();
        let file = memory(0x20_0000);
        rig.request(&mut peer, &table(&[region(0x40_0000, 0x1000)], &file));
        for request in [
            requests::SET_VRING_KICK,
            requests::SET_VRING_CALL,
            requests::SET_VRING_ERR,
        ] {
            rig.request(&mut peer, &vring(request, 0, Some(eventfd().1)));
        }
        rig.request(&mut peer, &table(&regions, &file));
        rig.assert_gone(&mut peer);
    }
}

#[test]
fn a_bad_table_is_refused_where_an_answer_is_wanted_and_what_was_shown_stays() {
    for regions in bad_tables() {
        let (mut rig, mut peer) = Rig::acknowledging();
        let file = memory(0x20_0000);
        rig.request(
            &mut peer,
            &table(
                &[region(0x10_0000, 0x2000), region(0x40_0000, 0x1000)],
                &file,
            ),
        );
        rig.received().unwrap();
        rig.request(&mut peer, &table(&regions, &file).with_need_reply(true));
        let reply = peer.receive().unwrap().unwrap();
        assert_eq!(reply.payload, U64(1).encode(), "{regions:x?}");
        assert_eq!(
            rig.window().shown(),
            [(0x10_0000, 0x2000), (0x40_0000, 0x1000)],
            "{regions:x?}"
        );
        assert_eq!(rig.received(), None, "the driver does not see it");
        assert_eq!(rig.device.stats().peer_faults, 0);
    }
}

#[test]
fn a_file_that_the_window_refuses_is_the_peers_fault() {
    let (mut rig, mut peer) = Rig::acknowledging();
    rig.window().refuse_next_map.store(true, Order::Relaxed);
    let message = table(&[region(0, 0x1000)], &memory(0x1000));
    rig.request(&mut peer, &message.with_need_reply(true));
    assert_eq!(peer.receive().unwrap().unwrap().payload, U64(1).encode());
    rig.window().refuse_next_map.store(true, Order::Relaxed);
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    rig.assert_gone(&mut peer);
}

#[test]
fn the_number_of_descriptors_and_the_length_of_payloads_are_exact() {
    let file = memory(0x1000);
    let regions = [region(0, 0x1000), region(0x1000, 0x1000)];
    let with =
        |message: Message, fds: usize| message.with_fds((0..fds).map(|_| fd(&file)).collect());
    let add = || Message::request(requests::ADD_MEM_REG, &SingleMemoryRegion(regions[0]));
    let kick = |no_fd| Message::request(requests::SET_VRING_KICK, &VringFd { index: 0, no_fd });
    let mut long = table(&regions, &file);
    long.payload.push(0);
    let mut count = table(&regions, &file);
    count.payload[0] = 33;
    for message in [
        with(table(&regions, &file), 1),
        with(table(&regions, &file), 3),
        with(table(&regions, &file), 0),
        with(add(), 0),
        with(add(), 2),
        with(
            Message::request(requests::REM_MEM_REG, &SingleMemoryRegion(regions[0])),
            2,
        ),
        with(kick(false), 0),
        with(kick(true), 1),
        with(Message::bare(requests::GET_MAX_MEM_SLOTS), 1),
        Message::bare(requests::SET_FEATURES),
        Message::bare(requests::SET_VRING_CALL),
        long,
        count,
    ] {
        let (mut rig, mut peer) = Rig::acknowledging();
        // Malformed is malformed, also where an answer is wanted.
        rig.request(&mut peer, &message.with_need_reply(true));
        rig.assert_gone(&mut peer);
        assert_eq!(rig.device.stats().peer_faults, 1);
    }
}

#[test]
fn the_device_answers_how_many_regions_there_can_be_in_its_turn() {
    let (mut rig, mut peer) = Rig::connected();
    rig.request(&mut peer, &Message::bare(requests::GET_QUEUE_NUM));
    rig.request(&mut peer, &Message::bare(requests::GET_MAX_MEM_SLOTS));
    assert!(
        peer.receive().unwrap().is_none(),
        "the driver's answer comes first"
    );
    rig.reply(requests::GET_QUEUE_NUM, &U64(4));
    assert_eq!(
        peer.receive().unwrap().unwrap().request,
        requests::GET_QUEUE_NUM
    );
    let slots = peer.receive().unwrap().unwrap();
    assert_eq!(
        (slots.request, slots.flags),
        (requests::GET_MAX_MEM_SLOTS, 0x5)
    );
    assert_eq!(slots.payload, U64(32).encode());
    assert_eq!(rig.received().unwrap().0, requests::GET_QUEUE_NUM);
    assert_eq!(rig.received(), None, "the driver does not see it");
}

#[test]
fn thirty_three_regions_are_too_many() {
    let (mut rig, mut peer) = Rig::acknowledging();
    let file = memory(0x1000);
    let all: Vec<_> = (0..32).map(|i| region(i * 0x2000, 0x1000)).collect();
    rig.request(&mut peer, &table(&all, &file));
    assert_eq!(rig.window().shown().len(), 32);
    let add = Message::request(
        requests::ADD_MEM_REG,
        &SingleMemoryRegion(region(0x10_0000, 0x1000)),
    );
    rig.request(
        &mut peer,
        &add.with_fds(vec![fd(&file)]).with_need_reply(true),
    );
    assert_eq!(peer.receive().unwrap().unwrap().payload, U64(1).encode());
    assert_eq!(rig.window().shown().len(), 32);
}

#[test]
fn a_kick_of_the_peer_raises_the_queues_vector_and_is_replaced_by_the_next() {
    let (mut rig, mut peer) = Rig::connected();
    let (kick, copy) = eventfd();
    let message = vring(requests::SET_VRING_KICK, 2, Some(copy));
    rig.request(&mut peer, &message);
    assert_eq!(
        rig.received(),
        Some((requests::SET_VRING_KICK, 1, message.payload))
    );
    rig.driver.interrupts();
    kick.write(1).unwrap();
    assert_eq!(rig.driver.interrupts(), [u32::from(KICK_VECTOR) + 2]);

    let (other, copy) = eventfd();
    rig.request(&mut peer, &vring(requests::SET_VRING_KICK, 2, Some(copy)));
    rig.driver.interrupts();
    kick.write(1).unwrap();
    assert!(rig.driver.interrupts().is_empty());
    other.write(1).unwrap();
    assert_eq!(rig.driver.interrupts(), [u32::from(KICK_VECTOR) + 2]);

    // Stopping the ring is the driver's matter; without an eventfd the queue is polled.
    rig.request(
        &mut peer,
        &Message::request(requests::GET_VRING_BASE, &U64(2)),
    );
    rig.driver.interrupts();
    other.write(1).unwrap();
    assert_eq!(rig.driver.interrupts().len(), 1);
    rig.request(&mut peer, &vring(requests::SET_VRING_KICK, 2, None));
    rig.driver.interrupts();
    other.write(1).unwrap();
    assert!(rig.driver.interrupts().is_empty());
}

#[test]
fn doorbells_signal_the_peers_eventfds_without_leaving_the_guest() {
    let (mut rig, mut peer) = Rig::connected();
    assert!(rig.driver.notify(2 + 2), "no eventfd yet: ignored");
    let [(call, call_fd), (error, error_fd)] = [eventfd(), eventfd()];
    rig.request(
        &mut peer,
        &vring(requests::SET_VRING_CALL, 1, Some(call_fd)),
    );
    rig.request(
        &mut peer,
        &vring(requests::SET_VRING_ERR, 1, Some(error_fd)),
    );
    assert!(!rig.driver.notify(2 + 2));
    assert_eq!(call.read().unwrap(), 1);
    assert!(!rig.driver.notify(3 + 2));
    assert_eq!(error.read().unwrap(), 1);
    assert!(call.read().is_err());

    let (other, copy) = eventfd();
    rig.request(&mut peer, &vring(requests::SET_VRING_CALL, 1, Some(copy)));
    rig.driver.notify(2 + 2);
    assert_eq!(other.read().unwrap(), 1);
    assert!(call.read().is_err(), "replaced");
    rig.request(&mut peer, &vring(requests::SET_VRING_CALL, 1, None));
    assert!(rig.driver.notify(2 + 2));
    assert!(other.read().is_err(), "taken away");
}

#[test]
fn what_is_no_eventfd_or_names_no_queue_is_refused() {
    for request in [
        requests::SET_VRING_KICK,
        requests::SET_VRING_CALL,
        requests::SET_VRING_ERR,
    ] {
        for bad in [
            vring(request, 0, Some(fd(&memory(0)))),
            vring(request, 4, Some(eventfd().1)),
        ] {
            let again = Message {
                payload: bad.payload.clone(),
                ..Message::bare(request)
            }
            .with_fds(bad.fds.iter().map(|fd| fd.try_clone().unwrap()).collect());
            let (mut rig, mut peer) = Rig::acknowledging();
            rig.request(&mut peer, &bad.with_need_reply(true));
            assert_eq!(peer.receive().unwrap().unwrap().payload, U64(1).encode());
            assert_eq!(rig.received(), None);
            rig.request(&mut peer, &again);
            rig.assert_gone(&mut peer);
        }
    }
}
