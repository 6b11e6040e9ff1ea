//! What a back-end asks on its channel, and what a hostile one does there.

use super::*;
use crate::vhost_user::backend_requests;

fn miss(iova: u64, read: bool, write: bool) -> Message {
    let miss = Iotlb {
        iova,
        size: PAGE,
        read,
        write,
        kind: IotlbKind::Miss,
        ..Iotlb::default()
    };
    Message::request(backend_requests::IOTLB_MSG, &miss).with_need_reply(true)
}

#[test]
fn a_miss_of_what_is_mapped_is_answered_with_the_whole_mapping() {
    let (mut behind, mut backend) = Behind::started();
    let mut channel = backend.channel();
    backend.seen.clear();
    for (read, write) in [(true, false), (false, true), (true, true), (false, false)] {
        let asked = miss(RINGS.iova + 5 * PAGE, read, write);
        assert_eq!(behind.ask(&mut backend, &mut channel, &asked), 0);
    }
    behind.turn();
    backend.serve();
    assert_eq!(backend.translations(), [update(RINGS); 4]);
    assert_eq!(behind.faults(), []);
    let stats = behind.net.stats();
    assert_eq!((stats.misses, stats.misses_refused), (4, 0));
}

#[test]
fn a_miss_of_what_is_not_mapped_for_this_is_refused_and_a_fault() {
    let (mut behind, mut backend) = Behind::started();
    let number = behind.endpoint.map(page(0));
    behind.settle(&mut backend, number);
    let mut channel = backend.channel();
    backend.seen.clear();
    let iova = page(0).iova;
    for (iova, read, write, fault) in [
        (iova, false, true, (iova, Access::Write, true)),
        (iova, true, true, (iova, Access::Write, true)),
        (iova + PAGE, true, false, (iova + PAGE, Access::Read, false)),
        (u64::MAX, false, false, (u64::MAX, Access::Read, false)),
        (
            BASE + RINGS.len,
            false,
            true,
            (BASE + RINGS.len, Access::Write, false),
        ),
    ] {
        let asked = miss(iova, read, write);
        assert_eq!(behind.ask(&mut backend, &mut channel, &asked), 1);
        assert_eq!(behind.faults(), [fault]);
    }
    assert!(backend.translations().is_empty());
    let stats = behind.net.stats();
    assert_eq!((stats.misses, stats.misses_refused), (5, 5));
}

#[test]
fn an_access_that_failed_is_a_fault_and_what_else_is_asked_is_refused() {
    let (mut behind, mut backend) = Behind::started();
    let mut channel = backend.channel();
    let ask = |kind| {
        let iotlb = Iotlb {
            iova: 0x5000,
            write: true,
            kind,
            ..Iotlb::default()
        };
        Message::request(backend_requests::IOTLB_MSG, &iotlb).with_need_reply(true)
    };
    let fail = ask(IotlbKind::AccessFail);
    assert_eq!(behind.ask(&mut backend, &mut channel, &fail), 0);
    assert_eq!(behind.faults(), [(0x5000, Access::Write, false)]);
    let short = Message::request(backend_requests::IOTLB_MSG, &U64(0)).with_need_reply(true);
    let strange = Message::bare(u32::MAX).with_need_reply(true);
    let config = Message::bare(backend_requests::CONFIG_CHANGE_MSG).with_need_reply(true);
    for message in [
        ask(IotlbKind::Update),
        ask(IotlbKind::Invalidate),
        short,
        strange,
        config,
    ] {
        assert_eq!(behind.ask(&mut backend, &mut channel, &message), 1);
    }
    // One that wants no answer gets none.
    channel
        .send(&Message::bare(backend_requests::VRING_ERR))
        .unwrap();
    let asked = miss(RINGS.iova, true, false);
    assert_eq!(behind.ask(&mut backend, &mut channel, &asked), 0);
    assert_eq!(channel.receive().unwrap().map(|m| m.request), None);
    assert_eq!(behind.net.stats().access_fails, 1);
}

#[test]
fn a_miss_without_a_wish_for_an_answer_is_served_all_the_same() {
    let (mut behind, mut backend) = Behind::started();
    let mut channel = backend.channel();
    backend.seen.clear();
    let mut asked = miss(RINGS.iova, true, false);
    asked.flags &= !crate::vhost_user::flags::NEED_REPLY;
    channel.send(&asked).unwrap();
    behind.until(&mut backend, |_, backend| {
        !backend.translations().is_empty()
    });
    assert!(channel.receive().unwrap().is_none());
}

#[test]
fn a_back_end_without_the_channel_is_told_all_the_same() {
    let protocol = ALL & !protocol_features::BACKEND_REQ;
    let (mut behind, mut backend) = Behind::started_with(protocol);
    assert!(!backend.order().contains(&"SET_BACKEND_REQ_FD"));
    let number = behind.endpoint.map(EXTRA);
    behind.settle(&mut backend, number);
    assert_eq!(backend.translations(), [update(RINGS), update(EXTRA)]);
}

#[test]
fn there_is_no_channel_without_an_iommu() {
    let mut world = World::new(SocketRole::Listen);
    world.net.activate(activation());
    let mut backend = world.connect(BACKEND);
    backend.protocol = ALL;
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert!(!backend.order().contains(&"SET_BACKEND_REQ_FD"));
}

#[test]
fn nonsense_on_the_channel_closes_the_channel_and_nothing_else() {
    let reply = Message::reply(backend_requests::IOTLB_MSG, &U64(0));
    let reply = [&reply.header()[..], &reply.payload].concat();
    for nonsense in [vec![0xff; 100], vec![0; 12], reply, vec![]] {
        let (mut behind, mut backend) = Behind::started();
        let fd = {
            let mut seen = backend.seen.iter_mut();
            let message = seen.find(|m| m.request == requests::SET_BACKEND_REQ_FD);
            message.unwrap().fds.pop().unwrap()
        };
        let mut stream = UnixStream::from(fd);
        if nonsense.is_empty() {
            drop(stream);
        } else {
            stream.write_all(&nonsense).unwrap();
            behind.turn();
            assert!(event::hung_up(&stream));
        }
        behind.turn();
        let number = behind.endpoint.map(EXTRA);
        behind.settle(&mut backend, number);
        assert!(!backend.is_gone());
        assert_eq!(behind.link(), LINK_UP);
        // The thread sleeps.
        assert_eq!(behind.manager.run_with_timeout(5).unwrap(), 0);
    }
}

#[test]
fn a_flood_of_misses_whose_answers_nobody_reads_is_bounded_and_everything_else_goes_on() {
    for iova in [RINGS.iova, 0] {
        let (mut behind, mut backend) = Behind::started();
        let mut channel = backend.channel();
        let start = Instant::now();
        let mut sent = 0;
        // It goes on until its own socket is full, and for a while longer.
        while start.elapsed() < Duration::from_millis(200) {
            if !channel.wants_write() {
                channel.send(&miss(iova, true, false)).unwrap();
                sent += 1;
            } else {
                channel.flush().unwrap();
            }
            if sent % 64 == 0 {
                behind.manager.run_with_timeout(0).unwrap();
                backend.serve();
            }
        }
        let mapped = behind.endpoint.map(EXTRA);
        behind.settle(&mut backend, mapped);
        let unmapped = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
        behind.settle(&mut backend, unmapped);
        assert!(!backend.is_gone());
        let misses = behind.net.stats().misses;
        assert!(misses > 0 && misses <= sent);
    }
}

#[test]
fn misses_wait_while_the_back_end_owes_too_many_acknowledgements() {
    let (mut behind, mut backend) = Behind::started();
    let mut channel = backend.channel();
    for _ in 0..MAX_IOTLB_OWED + 50 {
        channel.send(&miss(RINGS.iova, true, false)).unwrap();
    }
    behind.turn();
    assert_eq!(behind.net.stats().misses, MAX_IOTLB_OWED as u64);
    // Nothing turns in circles meanwhile, not even when the channel ends.
    assert_eq!(behind.manager.run_with_timeout(5).unwrap(), 0);
    drop(channel);
    behind.turn();
    assert_eq!(behind.manager.run_with_timeout(5).unwrap(), 0);
    backend.serve();
    let number = behind.endpoint.map(EXTRA);
    behind.settle(&mut backend, number);
    assert!(!backend.is_gone());
}

#[test]
fn a_translation_that_answers_a_miss_never_outlives_its_mapping() {
    let (mut behind, mut backend) = Behind::started();
    let mut channel = backend.channel();
    let mapped = behind.endpoint.map(EXTRA);
    behind.settle(&mut backend, mapped);
    for round in 0..100u64 {
        backend.seen.clear();
        channel.send(&miss(EXTRA.iova, true, false)).unwrap();
        if round % 2 == 0 {
            behind.manager.run_with_timeout(0).unwrap();
        }
        let unmapped = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
        behind.settle(&mut backend, unmapped);
        let last = backend.translations().pop();
        assert_eq!(last, Some(invalidate(EXTRA.iova, EXTRA.len)));
        behind.turn();
        backend.serve();
        let last = backend.translations().pop();
        assert_eq!(last, Some(invalidate(EXTRA.iova, EXTRA.len)));
        while channel.receive().unwrap().is_some() {}
        let mapped = behind.endpoint.map(EXTRA);
        behind.settle(&mut backend, mapped);
    }
}
