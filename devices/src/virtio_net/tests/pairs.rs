//! Several queue pairs, and the control queue that puts them into use.

use super::*;
use crate::host::Permission;
use crate::virtio::harness::Ring;
use crate::virtio_iommu::Mapping;

pub(super) const PAIRS: u16 = 4;
/// Where the control queue of such a device is, and where its ring lies.
const CONTROL: usize = 8;
const RING: u64 = 0x20_0000;
pub(super) const WITH_MQ: u64 = BACKEND | F_MQ;
pub(super) const DRIVER: u64 = WITH_MQ | F_CTRL_VQ | F_MAC | F_STATUS | F_RING_RESET;

pub(super) const OK: u8 = 0;
pub(super) const ERR: u8 = 1;
/// What the tests find where nothing was written.
const UNTOUCHED: u8 = 0x5a;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A driver's control queue: a split ring of 16 descriptors.
pub(super) fn control_ring(world: &World) -> (Ring, QueueSetup) {
    let ring = Ring::new(&world.host, RING, 16);
    let setup = QueueSetup {
        size: 16,
        desc: ring.desc(),
        driver: ring.avail(),
        device: ring.used(),
        ..queue(0)
    };
    (ring, setup)
}

/// Makes a chain of these commands' bytes, each a buffer, and `room` bytes for the answer available, at descriptors from 0 on.
fn send(ring: &mut Ring, command: &[&[u8]], room: u32) {
    let mut slot = 0;
    for bytes in command {
        ring.put(ring.buffer(slot), bytes);
        let last = usize::from(slot) + 1 == command.len() && room == 0;
        let flags = if last { 0 } else { NEXT };
        let len = u32::try_from(bytes.len()).unwrap();
        ring.set_desc(slot, ring.buffer(slot) + ring.shift, len, flags, slot + 1);
        slot += 1;
    }
    ring.put(ring.buffer(9), &[UNTOUCHED; 8]);
    if room > 0 {
        ring.set_desc(slot, ring.buffer(9) + ring.shift, room, WRITE, 0);
    }
    ring.publish(0);
}

pub(super) fn pairs_set(pairs: u16) -> Vec<u8> {
    let [low, high] = pairs.to_le_bytes();
    vec![4, 0, low, high]
}

/// A device with several pairs.
pub(super) struct Several {
    pub(super) world: World,
    pub(super) backend: Backend,
    ring: Ring,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

impl Several {
    /// A world and a back-end that serves as many pairs, after the handshake.
    fn connected(pairs: u16) -> (World, Backend) {
        Self::connected_with(pairs, 0)
    }

    /// The same with a back-end that has these protocol features too.
    pub(super) fn connected_with(pairs: u16, protocol: u64) -> (World, Backend) {
        let mut world = World::with_pairs(pairs);
        let mut backend = world.connect(WITH_MQ);
        backend.serve_pairs(pairs.into());
        backend.protocol |= protocol;
        world.until(&mut backend, |world, _| world.link() == LINK_UP);
        (world, backend)
    }

    /// With a driver that has negotiated all there is and enabled all queues.
    fn started() -> Self {
        Self::with(DRIVER, CONTROL, 0)
    }

    /// With a driver and a back-end that have RSS.
    pub(super) fn steered() -> Self {
        Self::with(DRIVER | F_RSS, CONTROL, protocol_features::RSS)
    }

    fn with(features: u64, control: usize, protocol: u64) -> Self {
        let (mut world, mut backend) = Self::connected_with(PAIRS, protocol);
        let (ring, setup) = control_ring(&world);
        let (kick, call) = (setup.kick.clone(), setup.call.clone());
        let mut queues: Vec<_> = (0..9).map(queue).collect();
        queues[control] = setup;
        world.net.activate(Activation { features, queues });
        world.until(&mut backend, |_, backend| backend.enabled().len() >= 2);
        world.turn();
        backend.serve();
        world.turn();
        Self {
            world,
            backend,
            ring,
            kick,
            call,
        }
    }

    /// Which vrings the back-end has been told to use, as it stands.
    pub(super) fn in_use(&self) -> Vec<u32> {
        let mut vrings = Vec::new();
        for (index, on) in self.backend.states(requests::SET_VRING_ENABLE) {
            vrings.retain(|&i| i != index);
            if on == 1 {
                vrings.push(index);
            }
        }
        vrings.sort_unstable();
        vrings
    }

    /// The answer to the last command: its status byte, and how much was written.
    fn answer(&mut self) -> Option<(u8, usize)> {
        let written = self.ring.take()?.len();
        Some((self.ring.get(self.ring.buffer(9), 1)[0], written))
    }

    /// Lets the driver send a command and waits for the answer.
    pub(super) fn command(&mut self, command: &[&[u8]], room: u32) -> (u8, usize) {
        send(&mut self.ring, command, room);
        event::signal(&self.kick);
        let start = Instant::now();
        loop {
            self.world.manager.run_with_timeout(5).unwrap();
            self.backend.serve();
            if let Some(answer) = self.answer() {
                return answer;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        }
    }

    pub(super) fn use_pairs(&mut self, pairs: u16) -> u8 {
        self.command(&[&pairs_set(pairs)], 1).0
    }
}

// ---- what the driver sees ----

#[test]
fn several_pairs_are_offered_where_the_back_end_serves_them_all_and_one_elsewhere() {
    let mq = protocol_features::MQ;
    for (asked, features, protocol, serves, offered) in [
        (4, WITH_MQ, mq, 4, true),
        (4, WITH_MQ, mq, 128, true),
        (4, WITH_MQ, mq, 3, false),
        (4, WITH_MQ, 0, 4, false),
        (4, BACKEND, mq, 4, false),
        (1, WITH_MQ, mq, 4, false),
    ] {
        let mut world = World::with_pairs(asked);
        let mut backend = world.connect(features);
        backend.protocol |= protocol;
        backend.pairs = serves;
        world.until(&mut backend, |world, _| world.is_ready());
        let both = F_MQ | F_CTRL_VQ;
        let expected = if offered { both } else { 0 };
        assert_eq!(world.net.features() & both, expected, "{asked} {serves}");
        assert_eq!(world.link(), LINK_UP);
        assert_eq!(world.config(8, 2), asked.to_le_bytes());
        let queues = if asked == 1 { 2 } else { 9 };
        assert_eq!(world.net.queue_sizes(), vec![256; queues]);
    }
}

#[test]
fn a_next_back_end_with_fewer_pairs_leaves_the_link_down() {
    let mut several = Several::started();
    drop(several.backend);
    let world = &mut several.world;
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    let _ = world.net.ready().read();
    let mut next = world.connect(WITH_MQ);
    next.serve_pairs(3);
    world.until(&mut next, |world, _| world.is_ready());
    world.turn();
    next.serve();
    assert_eq!(world.link(), 0);
    assert!(next.payloads::<U64>(requests::SET_FEATURES).is_empty());
}

// ---- putting pairs into use ----

#[test]
fn all_rings_are_started_and_one_pair_is_in_use_until_the_driver_wants_more() {
    let mut several = Several::started();
    let started = several.backend.states(requests::SET_VRING_BASE);
    let all: Vec<_> = (0..8).map(|vring| (vring, 0)).collect();
    assert_eq!(started, all, "the control queue is no back-end's");
    assert_eq!(several.in_use(), [0, 1]);
    let features = several.backend.payloads::<U64>(requests::SET_FEATURES);
    assert_eq!(features, [U64(WITH_MQ | VHOST_USER_F_PROTOCOL_FEATURES)]);
    for (pairs, vrings) in [(4, 8), (2, 4), (3, 6), (1, 2), (1, 2), (4, 8)] {
        assert_eq!(several.use_pairs(pairs), OK);
        assert_eq!(several.in_use(), (0..vrings).collect::<Vec<_>>());
        // Interrupts go by index, and the driver asked for the first.
        assert!(event::is_signalled(&several.call));
    }
    assert_eq!(several.world.needs_reset(), 0);
}

#[test]
fn a_change_of_pairs_is_complete_when_the_back_end_says_so_and_not_before() {
    for acks in [true, false] {
        let mut world = World::with_pairs(PAIRS);
        let (mut ring, setup) = control_ring(&world);
        let kick = setup.kick.clone();
        let mut backend = world.connect(WITH_MQ);
        backend.serve_pairs(PAIRS.into());
        if !acks {
            backend.protocol &= !protocol_features::REPLY_ACK;
        }
        let mut queues: Vec<_> = (0..8).map(queue).collect();
        queues.push(setup);
        let features = DRIVER;
        world.net.activate(Activation { features, queues });
        world.until(&mut backend, |_, backend| backend.enabled().len() == 8);
        world.turn();
        backend.serve();
        world.turn();
        send(&mut ring, &[&pairs_set(2)], 1);
        event::signal(&kick);
        world.turn();
        world.turn();
        let status = |ring: &Ring| ring.get(ring.buffer(9), 1)[0];
        assert_eq!(ring.take(), None, "the back-end has not answered yet");
        assert_eq!(status(&ring), UNTOUCHED);
        backend.serve();
        world.turn();
        assert!(ring.take().is_some(), "acks: {acks}");
        assert_eq!(status(&ring), OK);
    }
}

#[test]
fn a_back_end_that_does_not_answer_is_cut_off_and_the_command_is_complete() {
    let mut several = Several::started();
    several.backend.silent_at = Some(requests::SET_VRING_ENABLE);
    let start = Instant::now();
    assert_eq!(several.use_pairs(4), OK);
    assert!(start.elapsed() >= STOP_DEADLINE);
    let world = &mut several.world;
    world.until(&mut several.backend, |_, backend| backend.is_gone());
    // The next one starts with what the driver has in use.
    several.backend = world.connect(WITH_MQ);
    several.backend.serve_pairs(PAIRS.into());
    world.until(&mut several.backend, |_, backend| {
        backend.enabled().len() == 8
    });
    assert_eq!(several.in_use(), (0..8).collect::<Vec<_>>());
    assert_eq!(several.use_pairs(1), OK);
    assert_eq!(several.in_use(), [0, 1]);
}

#[test]
fn a_back_end_that_is_slow_to_start_has_longer_for_a_command_that_comes_meanwhile() {
    let (mut world, mut backend) = Several::connected(PAIRS);
    let (mut ring, setup) = control_ring(&world);
    let kick = setup.kick.clone();
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues.push(setup);
    let features = DRIVER;
    world.net.activate(Activation { features, queues });
    world.turn();
    send(&mut ring, &[&pairs_set(4)], 1);
    event::signal(&kick);
    let start = Instant::now();
    while start.elapsed() < STOP_DEADLINE + STOP_DEADLINE / 4 {
        world.turn();
    }
    assert_eq!(ring.take(), None, "nobody has answered");
    let status = |ring: &Ring| ring.get(ring.buffer(9), 1)[0];
    world.until(&mut backend, |_, _| status(&ring) != UNTOUCHED);
    assert!(ring.take().is_some());
    assert_eq!(status(&ring), OK);
    assert!(!backend.is_gone());
    // Once it has started there is no such patience.
    backend.silent_at = Some(requests::SET_VRING_ENABLE);
    let start = Instant::now();
    send(&mut ring, &[&pairs_set(1)], 1);
    event::signal(&kick);
    world.until(&mut backend, |_, _| status(&ring) != UNTOUCHED);
    assert!(start.elapsed() < 2 * STOP_DEADLINE);
}

#[test]
fn a_back_end_that_refuses_or_dies_leaves_no_command_open() {
    let mut several = Several::started();
    several.backend.refuses = Some(requests::SET_VRING_ENABLE);
    assert_eq!(several.use_pairs(4), OK);
    assert!(several.backend.is_gone() || several.world.link() == 0);
    assert_eq!(several.use_pairs(2), OK, "there is nobody to ask");
    assert_eq!(several.use_pairs(5), ERR);
}

#[test]
fn a_reset_drops_a_command_that_waits_and_leaves_one_pair_in_use() {
    let mut several = Several::started();
    send(&mut several.ring, &[&pairs_set(4)], 1);
    event::signal(&several.kick);
    several.world.turn();
    several.world.net.reset();
    let world = &mut several.world;
    world.until(&mut several.backend, |world, _| world.resets_done() == 1);
    assert_eq!(several.ring.take(), None);
    several.backend.seen.clear();
    let (ring, setup) = control_ring(&several.world);
    for (at, bytes) in [(ring.avail(), 64), (ring.used(), 256)] {
        ring.put(at, &vec![0; bytes]);
    }
    let kick = setup.kick.clone();
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues.push(setup);
    let features = DRIVER;
    several.world.net.activate(Activation { features, queues });
    let world = &mut several.world;
    world.until(&mut several.backend, |_, backend| {
        backend.enabled().len() == 8
    });
    assert_eq!(several.in_use(), [0, 1]);
    (several.ring, several.kick) = (ring, kick);
    assert_eq!(several.use_pairs(3), OK);
    assert_eq!(several.in_use(), (0..6).collect::<Vec<_>>());
}

#[test]
fn a_queue_that_is_reset_by_itself_comes_back_in_use_or_out_of_it() {
    let mut several = Several::started();
    assert_eq!(several.use_pairs(2), OK);
    for vring in [3u16, 5] {
        several.world.net.reset_queue(vring);
        let world = &mut several.world;
        world.until(&mut several.backend, |world, _| {
            let resets = world.transport.queue_resets.lock().unwrap();
            resets.last() == Some(&vring)
        });
        // Its pair cannot be put into use meanwhile.
        assert_eq!(several.use_pairs(4), ERR);
        several.world.net.enable_queue(vring, queue(vring.into()));
        let before = several.backend.enabled().len();
        let world = &mut several.world;
        world.until(&mut several.backend, |_, backend| {
            backend.enabled().len() > before
        });
        assert_eq!(several.in_use(), [0, 1, 2, 3]);
    }
    assert_eq!(several.use_pairs(4), OK);
}

#[test]
fn the_control_queue_is_reset_by_itself_while_the_others_go_on() {
    let mut several = Several::started();
    let index = u16::try_from(CONTROL).unwrap();
    several.world.net.reset_queue(index);
    several.world.turn();
    let resets = several.world.transport.queue_resets.lock().unwrap().clone();
    assert_eq!(resets, [index]);
    send(&mut several.ring, &[&pairs_set(4)], 1);
    event::signal(&several.kick);
    several.world.turn();
    assert_eq!(several.ring.take(), None);
    let (ring, setup) = control_ring(&several.world);
    for (at, bytes) in [(ring.avail(), 64), (ring.used(), 256)] {
        ring.put(at, &vec![0; bytes]);
    }
    (several.ring, several.kick) = (ring, setup.kick.clone());
    several.world.net.enable_queue(index, setup);
    assert_eq!(several.use_pairs(4), OK);
    assert_eq!(several.in_use().len(), 8);
    assert!(several.backend.states(requests::GET_VRING_BASE).is_empty());
}

// ---- hostile drivers ----

#[test]
fn a_command_that_is_malformed_gets_an_error_and_changes_nothing() {
    let mut several = Several::started();
    assert_eq!(several.use_pairs(3), OK);
    let cases: [&[&[u8]]; 15] = [
        &[&[]],
        &[&[4]],
        &[&[4, 0]],
        &[&[4, 0, 2]],
        &[&[4, 0, 2, 0, 0]],
        &[&[4, 0, 2, 0], &[0; 4000]],
        &[&[4, 0, 0, 0]],
        &[&[4, 0, 5, 0]],
        &[&[4, 0, 0, 1]],
        &[&[4, 0, 0xff, 0xff]],
        // RSS and hash configuration were not negotiated; nor were receive modes.
        &[&[4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]],
        &[&[4, 2, 2, 0]],
        &[&[0, 0, 1, 0]],
        &[&[5, 0, 2, 0]],
        &[&[0xff, 0xff, 0xff, 0xff]],
    ];
    for command in cases {
        assert_eq!(several.command(command, 1), (ERR, 1), "{command:x?}");
        assert_eq!(several.in_use().len(), 6, "{command:x?}");
    }
    // However it is cut into pieces, and whatever room there is.
    let whole: &[&[u8]] = &[&[4], &[0, 1], &[], &[0]];
    assert_eq!(several.command(whole, 8), (OK, 1));
    assert_eq!(several.in_use(), [0, 1]);
    assert_eq!(several.world.needs_reset(), 0);
}

#[test]
fn a_command_without_room_for_its_status_does_nothing_and_comes_back_empty() {
    let mut several = Several::started();
    let answer = several.command(&[&pairs_set(4)], 0);
    assert_eq!(answer, (UNTOUCHED, 0));
    assert_eq!(several.in_use(), [0, 1]);
    assert_eq!(several.use_pairs(4), OK);
}

#[test]
fn pairs_whose_queues_the_driver_has_not_enabled_cannot_be_used() {
    let (mut world, mut backend) = Several::connected(PAIRS);
    let (ring, setup) = control_ring(&world);
    let (kick, call) = (setup.kick.clone(), setup.call.clone());
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues[5].enabled = false;
    queues.push(setup);
    let features = DRIVER;
    world.net.activate(Activation { features, queues });
    world.until(&mut backend, |_, backend| backend.enabled().len() == 7);
    let mut several = Several {
        world,
        backend,
        ring,
        kick,
        call,
    };
    for pairs in [3, 4] {
        assert_eq!(several.use_pairs(pairs), ERR);
    }
    assert_eq!(several.use_pairs(2), OK);
    assert_eq!(several.in_use(), [0, 1, 2, 3]);
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_at_index_2_and_no_command_for_it() {
    let mut several = Several::with(DRIVER & !F_MQ, 2, 0);
    let started = several.backend.states(requests::SET_VRING_BASE);
    assert_eq!(started, [(0, 0), (1, 0)]);
    for pairs in [1, 2] {
        assert_eq!(several.use_pairs(pairs), ERR);
    }
    assert_eq!(several.in_use(), [0, 1]);
}

#[test]
fn a_control_queue_that_breaks_a_rule_needs_a_device_reset_and_reaches_nothing() {
    type Spoil = fn(&mut Ring);
    let cases: [Spoil; 6] = [
        // A chain that loops.
        |ring| {
            ring.set_desc(0, ring.buffer(0), 4, NEXT, 1);
            ring.set_desc(1, ring.buffer(1), 4, NEXT, 0);
            ring.publish(0);
        },
        // A descriptor beyond the ring.
        |ring| ring.publish(16),
        // More than the ring has.
        |ring| ring.set_avail_index(17),
        // A command, and a status, that are not in memory.
        |ring| {
            ring.set_desc(0, MEMORY_SIZE - 2, 4, 0, 0);
            ring.publish(0);
        },
        |ring| {
            ring.set_desc(0, u64::MAX, 4, WRITE, 0);
            ring.publish(0);
        },
        // A table that was not negotiated.
        |ring| {
            ring.set_desc(0, ring.buffer(0), 16, 4, 0);
            ring.publish(0);
        },
    ];
    for (case, spoil) in cases.into_iter().enumerate() {
        let mut several = Several::started();
        spoil(&mut several.ring);
        event::signal(&several.kick);
        let world = &mut several.world;
        world.until(&mut several.backend, |world, _| world.needs_reset() == 1);
        assert_eq!(world.link(), 0, "case {case}");
        assert_eq!(several.in_use(), [0, 1]);
        several.world.net.reset();
        let world = &mut several.world;
        world.until(&mut several.backend, |world, _| world.resets_done() == 1);
        assert_eq!(world.link(), LINK_UP);
    }
    // One that cannot be is refused when it is set up.
    let (mut world, mut backend) = Several::connected(PAIRS);
    let (_, setup) = control_ring(&world);
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues.push(QueueSetup {
        driver: MEMORY_SIZE,
        ..setup
    });
    let features = DRIVER;
    world.net.activate(Activation { features, queues });
    world.until(&mut backend, |world, _| world.needs_reset() == 1);
    assert!(backend.payloads::<U64>(requests::SET_FEATURES).is_empty());
}

#[test]
fn a_driver_that_hammers_on_the_control_queue_is_answered_each_time() {
    let mut several = Several::started();
    for round in 0..300u16 {
        let pairs = round % 6;
        let expected = if (1..=4).contains(&pairs) { OK } else { ERR };
        assert_eq!(several.use_pairs(pairs), expected);
    }
    assert_eq!(several.world.needs_reset(), 0);
}

// ---- the other layout, and an IOMMU ----

/// A packed descriptor's flags in the first lap: available, and not used.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

#[test]
fn the_control_queue_has_the_layout_of_the_others() {
    let mut world = World::build_pairs(
        SocketRole::Listen,
        RingFeatures {
            packed: true,
            ..RingFeatures::default()
        },
        None,
        DEFAULT_IOTLB_TIMEOUT,
        PAIRS,
    );
    let mut backend = world.connect(WITH_MQ | F_RING_PACKED);
    backend.serve_pairs(PAIRS.into());
    world.until(&mut backend, |world, _| world.link() == LINK_UP);
    let (ring, setup) = control_ring(&world);
    let kick = setup.kick.clone();
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues.push(setup);
    let features = DRIVER | F_RING_PACKED;
    world.net.activate(Activation { features, queues });
    world.until(&mut backend, |_, backend| backend.enabled().len() == 8);
    ring.put(ring.buffer(0), &pairs_set(4));
    ring.put(ring.buffer(9), &[UNTOUCHED]);
    // Behind the length come the buffer id and the flags.
    ring.set_desc(1, ring.buffer(9), 1, 7, AVAIL | WRITE);
    ring.set_desc(0, ring.buffer(0), 4, 7, AVAIL | NEXT);
    event::signal(&kick);
    let flags = |ring: &Ring| u16::from_le_bytes(ring.get(ring.desc() + 14, 2).try_into().unwrap());
    world.until(&mut backend, |_, _| flags(&ring) & USED != 0);
    assert_eq!(ring.get(ring.desc() + 8, 4), 1u32.to_le_bytes());
    assert_eq!(ring.get(ring.desc() + 12, 2), 7u16.to_le_bytes());
    assert_eq!(ring.get(ring.buffer(9), 1), [OK]);
    let enabled = backend.states(requests::SET_VRING_ENABLE);
    assert_eq!(enabled[8..], (2..8).map(|i| (i, 1)).collect::<Vec<_>>());
}

#[test]
fn the_control_queue_is_reached_through_the_iommu_and_no_further() {
    const BASE: u64 = 1 << 32;
    let mapping = |gpa, len| Mapping {
        iova: BASE + gpa,
        gpa,
        len,
        permission: Permission::READ_WRITE,
    };
    let endpoint = Endpoint::new().unwrap();
    endpoint.map(mapping(0, 0x10_0000));
    endpoint.map(mapping(RING, 0x10_0000));
    let (role, rings) = (SocketRole::Listen, RingFeatures::default());
    let behind = Some(endpoint.clone());
    let mut world = World::build_pairs(role, rings, behind, Duration::from_secs(60), PAIRS);
    let mut backend = world.connect(WITH_MQ | F_ACCESS_PLATFORM);
    backend.serve_pairs(PAIRS.into());
    world.until(&mut backend, |world, _| world.link() == LINK_UP);
    let (mut ring, setup) = control_ring(&world);
    ring.shift = BASE;
    let (kick, call) = (setup.kick.clone(), setup.call.clone());
    let mut queues: Vec<_> = (0..8).map(queue).collect();
    queues.push(setup);
    for queue in &mut queues {
        for address in [&mut queue.desc, &mut queue.driver, &mut queue.device] {
            *address += BASE;
        }
    }
    let features = DRIVER | F_ACCESS_PLATFORM;
    world.net.activate(Activation { features, queues });
    world.until(&mut backend, |_, backend| backend.enabled().len() == 8);
    let mut several = Several {
        world,
        backend,
        ring,
        kick,
        call,
    };
    assert_eq!(several.use_pairs(4), OK);
    assert_eq!(several.in_use().len(), 8);
    assert!(endpoint.take_fault().is_none());

    // A guest physical address means nothing here.
    several.ring.shift = 0;
    send(&mut several.ring, &[&pairs_set(2)], 1);
    event::signal(&several.kick);
    let world = &mut several.world;
    world.until(&mut several.backend, |world, _| world.needs_reset() == 1);
    assert!(endpoint.take_fault().is_some());
    assert_eq!(several.in_use().len(), 8);
}
