//! Back-ends that keep what is in flight where the next one finds it (INFLIGHT_SHMFD), played by the `vhost` crate.

use super::queues::{PACKED, packed_activation};
use super::*;
use crate::vhost_user::tests::interop::Served;

const ABLE: u64 = BACKEND | F_RING_PACKED;

/// Turns the device thread until something is so.
#[track_caller]
fn until(world: &mut World, what: impl Fn(&World) -> bool) {
    world.until(&mut Backend::none(), |world, _| what(world));
}

fn serve(world: &World, keeps: bool) -> Served {
    Served::with(UnixStream::connect(&world.path).unwrap(), ABLE, keeps)
}

/// A device with packed rings, and its first back-end, both rings in use.
fn started(keeps: bool) -> (World, Served) {
    let mut world = World::with_rings(SocketRole::Listen, PACKED);
    let first = serve(&world, keeps);
    until(&mut world, |world| world.link() == LINK_UP);
    let activation = packed_activation();
    for queue in &activation.queues {
        world.make_available(queue);
    }
    world.net.activate(activation);
    until(&mut world, |_| first.enabled() == 2);
    world.turn();
    (world, first)
}

#[test]
fn packed_rings_outlive_back_ends_that_say_what_is_in_flight() {
    let (mut world, first) = started(true);
    assert_eq!(first.inflight_asked(), [(2, 100)]);
    let area = first.inflight();
    assert_eq!(area.len(), 1);
    first.hang_up();
    until(&mut world, |world| world.link() == 0);
    assert_eq!(world.needs_reset(), 0);

    for life in 0..3 {
        let next = serve(&world, true);
        until(&mut world, |_| next.enabled() == 2);
        assert_eq!(next.inflight(), area, "life {life}: the same file");
        assert!(next.inflight_asked().is_empty(), "life {life}");
        assert_eq!(world.link(), LINK_UP);
        next.hang_up();
        until(&mut world, |world| world.link() == 0);
        assert_eq!(world.needs_reset(), 0, "life {life}");
    }

    // One that does not even get to its rings takes nothing with it.
    drop(UnixStream::connect(&world.path).unwrap());
    world.turn();

    // This one could not know where the others stood.
    let last = serve(&world, false);
    until(&mut world, |world| world.needs_reset() == 1);
    assert_eq!((world.link(), last.enabled()), (0, 0));

    // A driver that starts over, starts a new area, too.
    world.net.reset();
    until(&mut world, |world| world.resets_done() == 1);
    last.hang_up();
    let fresh = serve(&world, true);
    world.net.activate(packed_activation());
    until(&mut world, |_| fresh.enabled() == 2);
    assert_eq!(fresh.inflight_asked(), [(2, 100)]);
    fresh.hang_up();
}

#[test]
fn a_back_end_that_leaves_no_word_leaves_packed_rings_that_need_a_reset() {
    let (mut world, first) = started(false);
    first.hang_up();
    until(&mut world, |world| world.needs_reset() == 1);
}

#[test]
fn a_queue_that_is_reset_spoils_what_was_left_about_all_of_them() {
    // While the back-end is there, and while it is not.
    for alive in [true, false] {
        let (mut world, first) = started(true);
        if !alive {
            first.hang_up();
            until(&mut world, |world| world.link() == 0);
            world.net.reset_queue(0);
            until(&mut world, |world| world.queue_resets() == [0]);
        } else {
            world.net.reset_queue(0);
            until(&mut world, |world| world.queue_resets() == [0]);
            assert_eq!(world.needs_reset(), 0);
            first.hang_up();
        }
        until(&mut world, |world| world.needs_reset() == 1);
    }
}

#[test]
fn split_rings_go_on_at_the_used_index_and_with_the_same_area() {
    let mut world = World::new(SocketRole::Listen);
    let first = serve(&world, true);
    until(&mut world, |world| world.link() == LINK_UP);
    let activation = activation();
    let queues = activation.queues.clone();
    world.net.activate(activation);
    until(&mut world, |_| first.enabled() == 2);
    for queue in &queues {
        let memory = world.host.memory();
        memory
            .write_obj(9u16, GuestAddress(queue.device + 2))
            .unwrap();
    }
    let area = first.inflight();
    first.hang_up();
    until(&mut world, |world| world.link() == 0);
    for keeps in [true, false] {
        let next = serve(&world, keeps);
        until(&mut world, |_| next.enabled() == 2);
        assert_eq!(next.bases(), [(0, 9), (1, 9)]);
        assert_eq!(next.inflight(), if keeps { area.clone() } else { vec![] });
        next.hang_up();
        until(&mut world, |world| world.link() == 0);
    }
    assert_eq!(world.needs_reset(), 0);
}
