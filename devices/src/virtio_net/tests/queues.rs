//! Packed rings, and queues that are reset by themselves.

use super::*;
use crate::virtio::harness::{Driver, QUEUE_ENABLE, QUEUE_RESET, QUEUE_SIZE, Ring, STATUS};
use crate::virtio::{VirtioPci, status};

/// The base of a packed ring from its beginning.
const FRESH: u32 = 0x8000_8000;

pub(super) const PACKED: RingFeatures = RingFeatures {
    packed: true,
    in_order: true,
    event_idx: true,
    mrg_rxbuf: true,
    indirect: true,
    csum: true,
    tso: true,
    uso: true,
};

impl World {
    /// A listening device that offers packed rings, whose driver has accepted them, and a back-end that serves them.
    fn packed() -> (Self, Backend) {
        let mut world = Self::with_rings(SocketRole::Listen, PACKED);
        let mut backend = world.connect(BACKEND | F_RING_PACKED);
        world.until(&mut backend, |world, _| world.link() == LINK_UP);
        world.net.activate(packed_activation());
        world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        world.turn();
        (world, backend)
    }

    /// The queues whose resets are complete.
    pub(super) fn queue_resets(&self) -> Vec<u16> {
        self.transport.queue_resets.lock().unwrap().clone()
    }

    /// Writes a descriptor as a driver does that makes a buffer available in the first lap.
    pub(super) fn make_available(&self, queue: &QueueSetup) {
        let memory = self.host.memory();
        let flags_of_the_first_lap = 1u16 << 7;
        memory
            .write_obj(0x30_0000u64, GuestAddress(queue.desc))
            .unwrap();
        memory
            .write_obj(flags_of_the_first_lap, GuestAddress(queue.desc + 14))
            .unwrap();
    }
}

fn packed_queue(index: u64) -> QueueSetup {
    QueueSetup {
        size: 100,
        ..queue(index)
    }
}

pub(super) fn packed_activation() -> Activation {
    Activation {
        features: BACKEND | F_RING_PACKED | F_RING_RESET | F_MAC | F_STATUS,
        queues: vec![packed_queue(0), packed_queue(1)],
    }
}

// ---- packed rings ----

#[test]
fn packed_rings_start_with_both_wrap_counters_one_and_three_areas() {
    let (world, backend) = World::packed();
    let features = backend.payloads::<U64>(requests::SET_FEATURES);
    let expected = BACKEND | F_RING_PACKED | VHOST_USER_F_PROTOCOL_FEATURES;
    assert_eq!(
        features,
        [U64(expected)],
        "RING_RESET is between driver and device"
    );
    assert_eq!(
        backend.states(requests::SET_VRING_NUM),
        [(0, 100), (1, 100)]
    );
    assert_eq!(
        backend.states(requests::SET_VRING_BASE),
        [(0, FRESH), (1, FRESH)]
    );
    for (index, address) in backend
        .payloads::<VringAddr>(requests::SET_VRING_ADDR)
        .iter()
        .enumerate()
    {
        let queue = packed_queue(index as u64);
        assert_eq!(
            (address.desc, address.avail, address.used),
            (queue.desc, queue.driver, queue.device)
        );
    }
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn packed_rings_that_cannot_be_never_reach_the_back_end() {
    type Spoil = fn(&mut QueueSetup);
    let cases: [Spoil; 9] = [
        |queue| queue.size = 0,
        |queue| queue.size = 257,
        |queue| queue.size = 32769,
        |queue| queue.desc += 8,
        |queue| queue.driver += 2,
        |queue| queue.device += 2,
        |queue| queue.desc = MEMORY_SIZE - 1584,
        |queue| queue.driver = MEMORY_SIZE,
        |queue| queue.device = u64::MAX - 3,
    ];
    for (case, spoil) in cases.into_iter().enumerate() {
        let mut world = World::with_rings(SocketRole::Listen, PACKED);
        let mut backend = world.connect(BACKEND | F_RING_PACKED);
        world.until(&mut backend, |world, _| world.link() == LINK_UP);
        let mut activation = packed_activation();
        spoil(&mut activation.queues[1]);
        world.net.activate(activation);
        world.until(&mut backend, |world, _| world.needs_reset() == 1);
        world.turn();
        backend.serve();
        let started = backend.payloads::<U64>(requests::SET_FEATURES);
        assert!(started.is_empty(), "case {case}");
    }
}

#[test]
fn a_back_end_lost_with_packed_rings_in_use_needs_a_device_reset_and_then_all_is_well() {
    // In use by either queue.
    for used in [0, 1] {
        let (mut world, backend) = World::packed();
        world.make_available(&packed_queue(used));
        drop(backend);
        let mut nobody = Backend::none();
        world.until(&mut nobody, |world, _| world.needs_reset() == 1);
        assert_eq!(world.link(), 0);
        let _ = world.net.ready().read();
        let mut next = world.connect(BACKEND | F_RING_PACKED);
        world.until(&mut next, |world, _| world.is_ready());
        world.turn();
        next.serve();
        let started = next.payloads::<U64>(requests::SET_FEATURES);
        assert!(started.is_empty(), "nobody knows where to go on");
        assert_eq!(world.link(), 0);
        world.net.reset();
        world.until(&mut next, |world, _| world.resets_done() == 1);
        assert_eq!(world.link(), LINK_UP);
        world.net.activate(packed_activation());
        world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
        assert_eq!(
            next.states(requests::SET_VRING_BASE),
            [(0, FRESH), (1, FRESH)]
        );
        assert_eq!(world.needs_reset(), 1);
    }
}

#[test]
fn packed_rings_after_two_laps_are_not_taken_for_untouched_ones() {
    let (mut world, backend) = World::packed();
    let queue = packed_queue(0);
    // Used in the second lap: the flags are zero again, as are the length and the id.
    world.make_available(&queue);
    let memory = world.host.memory();
    memory
        .write_obj(0u64, GuestAddress(queue.desc + 8))
        .unwrap();
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.needs_reset() == 1);
}

#[test]
fn a_back_end_lost_before_the_packed_rings_were_used_is_replaced_by_the_next() {
    let (mut world, backend) = World::packed();
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    // What the driver does while there is none is for the next one.
    world.make_available(&packed_queue(0));
    // One that comes and goes before it was given the rings changes nothing.
    drop(UnixStream::connect(&world.path).unwrap());
    world.turn();
    let mut next = world.connect(BACKEND | F_RING_PACKED);
    world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(
        next.states(requests::SET_VRING_BASE),
        [(0, FRESH), (1, FRESH)]
    );
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn a_next_back_end_without_packed_rings_leaves_the_link_down() {
    let (mut world, backend) = World::packed();
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    let mut next = world.connect(BACKEND);
    world.until(&mut next, |world, _| {
        world.net.features() & F_RING_PACKED == 0
    });
    world.turn();
    next.serve();
    assert_eq!(world.link(), 0);
    assert!(next.payloads::<U64>(requests::SET_FEATURES).is_empty());
}

#[test]
fn packed_rings_that_are_reset_with_the_device_start_from_the_beginning() {
    let (mut world, mut backend) = World::packed();
    world.make_available(&packed_queue(0));
    world.net.reset();
    world.until(&mut backend, |world, _| world.resets_done() == 1);
    backend.seen.clear();
    world.net.activate(packed_activation());
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(
        backend.states(requests::SET_VRING_BASE),
        [(0, FRESH), (1, FRESH)]
    );
    assert_eq!(world.needs_reset(), 0);
}

// ---- resetting a queue ----

#[test]
fn a_queue_reset_is_done_when_the_back_end_has_stopped_that_ring_and_the_other_goes_on() {
    for (packed, fresh) in [(false, 0), (true, FRESH)] {
        let (mut world, mut backend) = if packed {
            World::packed()
        } else {
            World::started()
        };
        backend.seen.clear();
        world.net.reset_queue(0);
        world.turn();
        assert!(world.queue_resets().is_empty(), "not answered yet");
        world.until(&mut backend, |world, _| world.queue_resets() == [0]);
        assert_eq!(backend.states(requests::SET_VRING_ENABLE), [(0, 0)]);
        assert_eq!(backend.states(requests::GET_VRING_BASE), [(0, 0)]);
        assert_eq!(world.link(), LINK_UP);

        // Another size, other places, other eventfds.
        backend.seen.clear();
        let again = QueueSetup {
            size: 64,
            ..queue(7)
        };
        world.net.enable_queue(0, again.clone());
        world.until(&mut backend, |_, backend| backend.enabled() == [1]);
        let order: Vec<_> = backend.seen.iter().map(|m| m.request).collect();
        let expected = [
            requests::SET_VRING_NUM,
            requests::SET_VRING_BASE,
            requests::SET_VRING_ADDR,
            requests::SET_VRING_CALL,
            requests::SET_VRING_KICK,
            requests::SET_VRING_ENABLE,
        ];
        assert_eq!(order, expected);
        assert_eq!(backend.states(requests::SET_VRING_NUM), [(0, 64)]);
        assert_eq!(backend.states(requests::SET_VRING_BASE), [(0, fresh)]);
        let address = backend.payloads::<VringAddr>(requests::SET_VRING_ADDR)[0];
        assert_eq!(address.desc, again.desc);
        let kick = backend.seen[4].fds.pop().unwrap();
        again.kick.write(1).unwrap();
        assert!(event::is_signalled(&event::from_owned(kick)));
        assert_eq!((world.needs_reset(), world.resets_done()), (0, 0));
    }
}

#[test]
fn a_split_ring_that_was_reset_starts_from_zero_whatever_its_used_index_says() {
    let (mut world, mut backend) = World::started();
    world.net.reset_queue(1);
    world.until(&mut backend, |world, _| world.queue_resets() == [1]);
    let memory = world.host.memory();
    for index in [0, 1] {
        memory
            .write_obj(33u16, GuestAddress(queue(index).device + 2))
            .unwrap();
    }
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    // Enabled while there is no back-end: it comes with the other, which goes on where it was.
    world.net.enable_queue(1, queue(1));
    world.turn();
    let mut next = world.connect(BACKEND);
    world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(next.states(requests::SET_VRING_BASE), [(0, 33), (1, 0)]);
}

#[test]
fn a_queue_that_was_reset_and_not_enabled_again_is_not_given_to_the_next_back_end() {
    let (mut world, mut backend) = World::started();
    world.net.reset_queue(0);
    world.until(&mut backend, |world, _| world.queue_resets() == [0]);
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    let mut next = world.connect(BACKEND);
    world.until(&mut next, |_, backend| !backend.enabled().is_empty());
    assert_eq!(next.states(requests::SET_VRING_ENABLE), [(1, 1)]);
}

#[test]
fn a_queue_reset_without_a_back_end_is_done_at_once() {
    let mut world = World::new(SocketRole::Listen);
    world.net.activate(activation());
    world.net.reset_queue(1);
    world.turn();
    assert_eq!(world.queue_resets(), [1]);
    let mut backend = world.connect(BACKEND);
    world.until(&mut backend, |_, backend| !backend.enabled().is_empty());
    assert_eq!(backend.states(requests::SET_VRING_ENABLE), [(0, 1)]);
    // This one comes late.
    world.net.enable_queue(1, queue(1));
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(backend.states(requests::SET_VRING_BASE), [(0, 0), (1, 0)]);
}

#[test]
fn a_queue_reset_while_the_back_end_is_silent_is_done_at_the_deadline_and_the_back_end_is_cut_off()
{
    for packed in [false, true] {
        let (mut world, mut backend) = if packed {
            World::packed()
        } else {
            World::started()
        };
        world.make_available(&packed_queue(1));
        backend.silent_at = Some(requests::GET_VRING_BASE);
        let start = Instant::now();
        world.net.reset_queue(0);
        world.until(&mut backend, |world, _| world.queue_resets() == [0]);
        assert!(start.elapsed() >= STOP_DEADLINE);
        world.until(&mut backend, |_, backend| backend.is_gone());
        assert_eq!(world.link(), 0);
        // The other queue was still at work.
        assert_eq!(world.needs_reset(), u32::from(packed));
        if !packed {
            world.net.enable_queue(0, queue(0));
            let mut next = world.connect(BACKEND);
            world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
        }
        assert_eq!(world.queue_resets(), [0], "done once");
    }
}

#[test]
fn both_queues_reset_while_the_back_end_is_silent_are_done() {
    let (mut world, mut backend) = World::packed();
    for index in [0, 1] {
        world.make_available(&packed_queue(index));
        world.net.reset_queue(index.try_into().unwrap());
    }
    backend.silent_at = Some(requests::SET_VRING_ENABLE);
    world.until(&mut backend, |world, _| world.queue_resets() == [0, 1]);
    // Both were given up before the back-end was: there is nothing that it alone could know.
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn a_queue_reset_while_the_back_end_dies_is_done() {
    let (mut world, mut backend) = World::started();
    backend.silent_at = Some(requests::GET_VRING_BASE);
    world.net.reset_queue(1);
    world.turn();
    assert!(world.queue_resets().is_empty());
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.queue_resets() == [1]);
    assert_eq!(world.link(), 0);
}

#[test]
fn a_queue_enabled_at_a_bad_place_needs_a_reset_and_never_reaches_the_back_end() {
    type Spoil = fn(&mut QueueSetup);
    let cases: [Spoil; 6] = [
        |queue| queue.desc = MEMORY_SIZE,
        |queue| queue.desc += 8,
        |queue| queue.driver += 1,
        |queue| queue.device = u64::MAX - 3,
        |queue| queue.size = 0,
        |queue| queue.size = 512,
    ];
    for (case, spoil) in cases.into_iter().enumerate() {
        let (mut world, mut backend) = if case % 2 == 0 {
            World::packed()
        } else {
            World::started()
        };
        world.net.reset_queue(0);
        world.until(&mut backend, |world, _| world.queue_resets() == [0]);
        backend.seen.clear();
        let mut again = queue(0);
        spoil(&mut again);
        world.net.enable_queue(0, again);
        world.until(&mut backend, |world, _| world.needs_reset() == 1);
        world.turn();
        backend.serve();
        assert!(backend.seen.is_empty(), "case {case}");
        assert_eq!(world.link(), 0);
        // What still runs can be reset, by itself and with the device.
        world.net.reset_queue(1);
        world.until(&mut backend, |world, _| world.queue_resets() == [0, 1]);
        world.net.enable_queue(1, queue(1));
        world.turn();
        world.net.reset();
        world.until(&mut backend, |world, _| world.resets_done() == 1);
        backend.seen.clear();
        world.net.activate(activation());
        world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    }
}

#[test]
fn a_device_reset_makes_queue_resets_void() {
    let (mut world, mut backend) = World::started();
    world.net.reset_queue(0);
    world.turn();
    world.net.reset_queue(1);
    world.net.reset();
    world.until(&mut backend, |world, _| world.resets_done() == 1);
    world.turn();
    assert!(world.queue_resets().is_empty());
    backend.seen.clear();
    world.net.activate(activation());
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    world.net.reset_queue(0);
    world.until(&mut backend, |world, _| world.queue_resets() == [0]);
}

#[test]
fn queues_that_are_not_there_are_reset_and_enabled_without_harm() {
    let (mut world, mut backend) = World::started();
    backend.seen.clear();
    for index in [2, 255, 256, u16::MAX] {
        world.net.reset_queue(index);
        world.net.enable_queue(index, queue(0));
    }
    world.turn();
    backend.serve();
    assert!(backend.seen.is_empty());
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn a_guest_that_hammers_on_queue_resets_does_not_harm_the_device() {
    let (mut world, mut backend) = World::started();
    let mut asked = 0;
    for round in 0..200 {
        // The transport asks for the next reset when the last one is done.
        if world.queue_resets().len() == asked {
            if asked > 0 {
                world.net.enable_queue(0, queue(0));
            }
            world.net.reset_queue(0);
            asked += 1;
        }
        if round % 5 == 0 {
            world.manager.run_with_timeout(0).unwrap();
        }
        if round % 7 == 0 {
            backend.serve();
        }
    }
    world.until(&mut backend, |world, _| world.queue_resets().len() == asked);
    assert!(asked > 5, "{asked}");
    backend.seen.clear();
    world.net.enable_queue(0, queue(0));
    world.until(&mut backend, |_, backend| backend.enabled() == [1]);
    assert_eq!((world.needs_reset(), world.link()), (0, LINK_UP));
}

#[test]
fn a_driver_resets_a_queue_by_its_registers_and_the_back_end_gets_the_new_one() {
    let place = Place::new();
    let config = NetConfig {
        socket: place.0.join("s"),
        role: SocketRole::Listen,
        queue_pairs: 1,
        queue_size: 768,
        rings: PACKED,
        mac: MAC,
        iotlb_timeout: DEFAULT_IOTLB_TIMEOUT,
    };
    let host = FakeHost::new();
    let net = VirtioNet::new(config.clone(), None, host.clone()).unwrap();
    let mut manager = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
    manager.add_subscriber(net.subscriber());
    let mut backend = Backend::new(UnixStream::connect(&config.socket).unwrap(), u64::MAX);
    let mut until = |backend: &mut Backend, what: &dyn Fn(&Backend) -> bool| {
        let start = Instant::now();
        while !what(backend) {
            assert!(start.elapsed() < Duration::from_secs(20), "it never is");
            manager.run_with_timeout(5).unwrap();
            backend.serve();
        }
    };
    until(&mut backend, &|_| event::is_signalled(net.ready()));
    let function = VirtioPci::new(net.clone(), host.clone()).unwrap();
    let driver = Driver::new(function, host.clone());
    driver.enable_msix();
    assert!(driver.negotiate(F_VERSION_1 | F_RING_PACKED | F_RING_RESET));
    for queue in 0..2u16 {
        driver.select(queue);
        assert_eq!(driver.u16(QUEUE_SIZE), 768);
        let ring = Ring::new(&host, 0x10_0000 * u64::from(queue + 1), 768);
        driver.setup_queue(queue, &ring, queue + 1);
    }
    driver.set_status(status::DRIVER_OK);
    until(&mut backend, &|backend| backend.enabled() == [1, 1]);
    assert_eq!(
        backend.states(requests::SET_VRING_NUM),
        [(0, 768), (1, 768)]
    );

    backend.seen.clear();
    driver.select(1);
    driver.write(QUEUE_RESET, &[1, 0]);
    assert_eq!((driver.u16(QUEUE_RESET), driver.u16(QUEUE_ENABLE)), (1, 1));
    until(&mut backend, &|_| driver.u16(QUEUE_RESET) == 0);
    assert_eq!(driver.u16(QUEUE_ENABLE), 0);
    assert_eq!(backend.states(requests::GET_VRING_BASE), [(1, 0)]);
    let again = Ring::new(&host, 0x80_0000, 7);
    driver.setup_queue(1, &again, 2);
    until(&mut backend, &|backend| backend.enabled() == [0, 1]);
    assert_eq!(backend.states(requests::SET_VRING_NUM), [(1, 7)]);
    assert_eq!(backend.states(requests::SET_VRING_BASE), [(1, FRESH)]);

    let mut fds = |request| {
        let message = backend.seen.iter_mut().find(|m| m.request == request);
        event::from_owned(message.unwrap().fds.pop().unwrap())
    };
    let (kick, call) = (fds(requests::SET_VRING_KICK), fds(requests::SET_VRING_CALL));
    driver.interrupts();
    assert!(!driver.notify(1));
    assert_eq!(kick.read().unwrap(), 1);
    event::signal(&call);
    assert_eq!(driver.interrupts(), [2]);
    assert_eq!(driver.u8(STATUS) & status::NEEDS_RESET, 0);
}
