//! Back-ends that lack what the driver uses, played by the `vhost` crate.

use std::cell::RefCell;

use super::*;
use crate::vhost_user::tests::interop::Served;

thread_local! {
    /// What this thread has logged.
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        if record.level() <= log::Level::Warn {
            LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
        }
    }
    fn flush(&self) {}
}

/// Turns the device thread until something is so.
fn until(world: &mut World, what: impl Fn(&World) -> bool) {
    world.until(&mut Backend::none(), |world, _| what(world));
}

#[test]
fn a_back_end_without_the_drivers_features_is_refused_by_their_names_and_an_able_one_brings_the_link_up()
 {
    // Another test's logger would do as well, but there is none.
    let _ = log::set_logger(&Lines);
    log::set_max_level(log::LevelFilter::Warn);
    let rings = RingFeatures {
        packed: true,
        ..RingFeatures::default()
    };
    let mut world = World::with_rings(SocketRole::Listen, rings);
    let able = F_VERSION_1 | F_RING_PACKED | F_EVENT_IDX | F_MRG_RXBUF;
    let connect =
        |world: &World, features| Served::new(UnixStream::connect(&world.path).unwrap(), features);

    let first = connect(&world, able);
    until(&mut world, |world| world.link() == LINK_UP);
    world.net.activate(Activation {
        features: able | F_MAC | F_STATUS,
        ..activation()
    });
    until(&mut world, |_| first.enabled() == 2);
    first.hang_up();
    until(&mut world, |world| world.link() == 0);

    // The line about the end of the first came a moment ago, and must not keep this one back.
    LINES.take();
    let second = connect(&world, F_VERSION_1 | F_EVENT_IDX);
    until(&mut world, |_| LINES.with_borrow(|lines| !lines.is_empty()));
    let lines = LINES.take();
    let expected = format!(
        "{}: the back-end lacks VIRTIO_NET_F_MRG_RXBUF, VIRTIO_F_RING_PACKED, which the driver uses: the link stays down",
        world.path.display()
    );
    assert_eq!(lines, [expected]);
    world.turn();
    assert_eq!((world.link(), second.enabled()), (0, 0));
    assert_eq!(world.needs_reset(), 0);
    second.hang_up();

    let third = connect(&world, able | F_IN_ORDER);
    until(&mut world, |_| third.enabled() == 2);
    assert_eq!(world.link(), LINK_UP);
    assert_eq!(third.features(), able | VHOST_USER_F_PROTOCOL_FEATURES);
    assert_eq!(world.needs_reset(), 0);
    third.hang_up();
}
