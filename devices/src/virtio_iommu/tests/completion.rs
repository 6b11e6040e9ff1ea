//! When requests are complete: not before everybody has followed, in order, and all at once.

use super::*;

/// A domain with an endpoint that is followed, and pages 0 to `pages` mapped.
fn followed(pages: u64) -> Rig {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    for n in 0..pages {
        assert_eq!(rig.ask(&map(1, n << 12, (n << 12) + 0xfff, 0, READ)), OK);
    }
    rig.net.follow();
    assert_eq!(follow_up(&rig.net).len() as u64, pages);
    rig.driver.interrupts();
    rig
}

fn gone(iova: u64, len: u64) -> Change {
    Change::Unmap { iova, len }
}

fn interrupts(rig: &Rig) -> usize {
    let raised = rig.driver.interrupts();
    raised.iter().filter(|&&v| v == REQUEST_VECTOR).count()
}

#[test]
fn a_request_completes_when_the_follower_has_followed() {
    let mut rig = followed(1);
    for (bytes, change) in [
        (
            map(1, 0x5000, 0x5fff, 0x7000, READ),
            Change::Map(mapping(0x5000, 0x7000, 0x1000, Permission::READ)),
        ),
        (unmap(1, 0, 0xfff), gone(0, 0x1000)),
        // Everything that is left, with the endpoint and then with the domain.
        (detach(1, NET), gone(0x5000, 0x1000)),
    ] {
        let head = rig.post(&bytes, 4);
        rig.kick();
        let (number, seen) = rig.net.next_change().unwrap();
        assert_eq!(seen, change);
        assert_eq!(rig.net.next_change(), None);
        rig.pump();
        assert!(rig.completed().is_empty());
        assert_eq!(interrupts(&rig), 0);
        rig.net.done(number);
        rig.pump();
        assert_eq!(rig.completed(), [head]);
        assert_eq!(rig.status(head), OK);
        assert_eq!(interrupts(&rig), 1);
    }
}

#[test]
fn revocations_of_a_batch_overlap_and_complete_in_order_with_one_interrupt() {
    let mut rig = followed(20);
    let pages = (0..20).map(|n| unmap(1, n << 12, (n << 12) + 0xfff));
    let heads: Vec<_> = pages.map(|bytes| rig.post(&bytes, 4)).collect();
    rig.kick();
    let numbers: Vec<_> = std::iter::from_fn(|| rig.net.next_change()).collect();
    assert_eq!(numbers.len(), 20, "all are under way at once");
    assert!(rig.completed().is_empty());
    rig.net.done(numbers[6].0);
    rig.pump();
    assert_eq!(rig.completed(), heads[..7]);
    assert_eq!(interrupts(&rig), 1);
    rig.net.done(numbers[19].0);
    rig.pump();
    assert_eq!(rig.completed(), heads[7..]);
    assert_eq!(interrupts(&rig), 1);
}

#[test]
fn a_whole_ring_of_requests_is_served_and_what_comes_behind_it_too() {
    let mut rig = Rig::new();
    let head = rig.post(&probe(NET), 68);
    // As many as one turn of the device thread takes, and the same again while it has not come to rest.
    for _ in 1..RING_SIZE {
        rig.requests.publish(head);
    }
    rig.driver.notify(0);
    assert!(rig.events.run_with_timeout(0).unwrap() > 0);
    assert_eq!(rig.completed(), [head; RING_SIZE as usize]);
    for _ in 0..RING_SIZE {
        rig.requests.publish(head);
    }
    // Without another notification.
    rig.pump();
    assert_eq!(rig.completed(), [head; RING_SIZE as usize]);
    assert_eq!(rig.device.stats().probe, 2 * u64::from(RING_SIZE));
}

#[test]
fn a_request_that_waits_for_nobody_does_not_overtake_one_that_does() {
    let mut rig = followed(1);
    let first = rig.post(&unmap(1, 0, 0xfff), 4);
    let second = rig.post(&probe(OTHER), 68);
    let third = rig.post(&request(77, &[]), 4);
    rig.kick();
    assert!(rig.completed().is_empty());
    follow_up(&rig.net);
    rig.pump();
    assert_eq!(rig.completed(), [first, second, third]);
}

#[test]
fn a_domain_of_two_waits_for_both() {
    let mut rig = followed(2);
    assert_eq!(rig.ask(&attach(1, OTHER)), OK);
    rig.other.follow();
    assert_eq!(follow_up(&rig.other).len(), 2);
    let head = rig.post(&unmap(1, 0, 0x1fff), 4);
    rig.kick();
    assert_eq!(follow_up(&rig.net), [gone(0, 0x2000)]);
    rig.pump();
    assert!(rig.completed().is_empty());
    assert_eq!(follow_up(&rig.other), [gone(0, 0x2000)]);
    rig.pump();
    assert_eq!(rig.completed(), [head]);
}

#[test]
fn an_attach_that_moves_takes_away_first_and_waits_for_both_halves() {
    let mut rig = followed(2);
    assert_eq!(rig.ask(&attach(2, OTHER)), OK);
    assert_eq!(rig.ask(&map(2, 0x1000, 0x1fff, 0x9000, READ)), OK);
    let head = rig.post(&attach(2, NET), 4);
    rig.kick();
    let (first, change) = rig.net.next_change().unwrap();
    assert_eq!(change, gone(0, 0x2000));
    let (second, change) = rig.net.next_change().unwrap();
    let there = mapping(0x1000, 0x9000, 0x1000, Permission::READ);
    assert_eq!(change, Change::Map(there));
    rig.net.done(first);
    rig.pump();
    assert!(rig.completed().is_empty());
    rig.net.done(second);
    rig.pump();
    assert_eq!(rig.completed(), [head]);
}

#[test]
fn a_follower_that_gives_up_completes_everything() {
    let mut rig = followed(3);
    let heads = [
        rig.post(&unmap(1, 0, 0xfff), 4),
        rig.post(&detach(1, NET), 4),
    ];
    rig.kick();
    assert!(rig.completed().is_empty());
    rig.net.unfollow();
    rig.pump();
    assert_eq!(rig.completed(), heads);
}

#[test]
fn what_was_never_reachable_is_not_revoked() {
    let mut rig = followed(0);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, 0)), OK);
    assert_eq!(rig.ask(&unmap(1, 0x1000, 0x1fff)), OK);
    assert_eq!(rig.ask(&unmap(1, 0x8000, 0x8fff)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, 8)), INVAL);
    assert_eq!(rig.ask(&detach(1, NET)), OK);
    assert_eq!(rig.net.next_change(), None);
}

#[test]
fn a_reset_is_complete_when_the_revocations_are_and_not_before() {
    let mut rig = followed(3);
    rig.post(&unmap(1, 0, 0xfff), 4);
    rig.kick();
    rig.reset();
    assert_ne!(rig.device_status(), 0);
    assert_eq!(rig.net.lookup(0x1000), None);
    assert_eq!(rig.device.stats().mappings, 0);
    let (first, _) = rig.net.next_change().unwrap();
    rig.net.done(first);
    rig.pump();
    assert_ne!(rig.device_status(), 0);
    assert_eq!(follow_up(&rig.net), [gone(0x1000, 0x2000)]);
    rig.pump();
    assert_eq!(rig.device_status(), 0);
    // What had not been completed never is, and the next driver finds nothing.
    assert!(rig.completed().is_empty());
    rig.start(ALL);
    assert_eq!(rig.ask(&detach(1, NET)), INVAL);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.net.next_change(), None);
}

#[test]
fn a_reset_with_nobody_to_wait_for_is_complete_at_once_and_again() {
    let mut rig = Rig::new();
    for _ in 0..3 {
        rig.reset();
        assert_eq!(rig.device_status(), 0);
        rig.start(ALL);
        assert_eq!(rig.ask(&attach(1, NET)), OK);
    }
}

#[test]
fn what_a_slow_follower_is_given_to_do_is_bounded() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, OTHER)), OK);
    let pages = 1500u64;
    for n in 0..pages {
        assert_eq!(rig.ask(&map(1, n << 12, (n << 12) + 0xfff, 0, READ)), OK);
    }
    rig.net.follow();
    // Each ATTACH is 1500 changes.
    let mut heads = Vec::new();
    for _ in 0..60 {
        heads.push(rig.post(&attach(1, NET), 4));
        heads.push(rig.post(&detach(1, NET), 4));
    }
    rig.kick();
    assert_eq!(rig.net.outstanding(), pages);
    let mut done = Vec::new();
    for _ in 0..500 {
        assert!(rig.net.outstanding() <= 1024 + pages);
        follow_up(&rig.net);
        rig.pump();
        done.extend(rig.completed());
    }
    assert_eq!(done, heads);
    assert!(heads.iter().all(|&head| rig.status(head) == OK));
}

#[test]
fn the_time_that_a_request_only_waits_is_told_apart() {
    let mut rig = followed(0);
    rig.ask(&map(1, 0, 0xfff, 0, 0));
    rig.post(&map(1, 0x1000, 0x1fff, 0, READ), 4);
    rig.kick();
    let pause = Duration::from_millis(20);
    std::thread::sleep(pause);
    follow_up(&rig.net);
    rig.pump();
    let Timing {
        count,
        total_ns,
        waiting_ns,
    } = rig.device.stats().map_time;
    assert_eq!(count, 2);
    assert!(u128::from(waiting_ns) >= pause.as_nanos() && waiting_ns <= total_ns);
    assert_eq!(rig.device.stats().unmap_time, Timing::default());
}

#[test]
fn with_event_idx_the_driver_is_asked_to_notify_and_interrupted_where_it_wants() {
    let mut rig = Rig::with(IommuConfig::default(), ALL | F_EVENT_IDX);
    // `used_event` 0: the driver wants to hear of the first.
    let head = rig.post(&attach(1, NET), 4);
    rig.kick();
    assert_eq!(rig.completed(), [head]);
    assert_eq!(interrupts(&rig), 1);
    let avail_event = rig.requests.used() + 4 + 8 * u64::from(RING_SIZE);
    assert_eq!(rig.requests.get(avail_event, 2), [1, 0]);
    // It has not moved on: the second comes without.
    let head = rig.post(&detach(1, NET), 4);
    rig.kick();
    assert_eq!(rig.completed(), [head]);
    assert_eq!(interrupts(&rig), 0);
}
