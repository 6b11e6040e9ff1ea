//! Behind an IOMMU: what the back-end is told of translations, when changes of them are done, and what it may ask.

mod asks;

use super::*;
use crate::host::{Access, Permission};
use crate::vhost_user::frontend::MAX_IOTLB_OWED;
use crate::vhost_user::{Iotlb, IotlbKind};
use crate::virtio::VirtioPci;
use crate::virtio::harness::Driver;
use crate::virtio_iommu::{Change, Mapping};

/// What is added to guest physical addresses to make device addresses.
const BASE: u64 = 0x1_0000_0000;
const PAGE: u64 = 0x1000;
/// Where the rings of the tests lie.
pub(super) const RINGS: Mapping = Mapping {
    iova: BASE,
    gpa: 0,
    len: 0x10_0000,
    permission: Permission::READ_WRITE,
};
/// A page for experiments, somewhere else.
pub(super) const EXTRA: Mapping = Mapping {
    iova: 0x7000,
    gpa: 0x80_0000,
    len: PAGE,
    permission: Permission::READ_WRITE,
};
/// A back-end's time where a test is about that, and where it is not.
const TIMEOUT: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(60);
const PLATFORM: u64 = BACKEND | F_ACCESS_PLATFORM;
const ALL: u64 = protocol_features::REPLY_ACK
    | protocol_features::CONFIGURE_MEM_SLOTS
    | protocol_features::BACKEND_REQ;

/// A world behind an IOMMU.
pub(super) struct Behind {
    world: World,
    pub(super) endpoint: Arc<Endpoint>,
}

impl std::ops::Deref for Behind {
    type Target = World;
    fn deref(&self) -> &World {
        &self.world
    }
}

impl std::ops::DerefMut for Behind {
    fn deref_mut(&mut self) -> &mut World {
        &mut self.world
    }
}

impl Behind {
    fn with(rings: RingFeatures, timeout: Duration) -> Self {
        let endpoint = Endpoint::new().unwrap();
        let role = SocketRole::Listen;
        let world = World::build(role, rings, Some(endpoint.clone()), timeout);
        Self { world, endpoint }
    }

    pub(super) fn new() -> Self {
        Self::with(RingFeatures::default(), PATIENCE)
    }

    /// A back-end with these features and protocol features, after the handshake.
    fn handshake(&mut self, features: u64, protocol: u64) -> Backend {
        let _ = self.net.ready().read();
        let mut backend = self.connect(features);
        backend.protocol = protocol;
        self.until(&mut backend, |world, _| world.is_ready());
        backend
    }

    /// Rings that run, in mapped memory.
    fn started_with(protocol: u64) -> (Self, Backend) {
        Self::new().start(protocol)
    }

    fn start(mut self, protocol: u64) -> (Self, Backend) {
        self.endpoint.map(RINGS);
        let mut backend = self.handshake(PLATFORM, protocol);
        self.net.activate(shifted());
        self.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        self.turn();
        (self, backend)
    }

    fn started() -> (Self, Backend) {
        Self::started_with(ALL)
    }

    /// Turns both sides until a change is done.
    fn settle(&mut self, backend: &mut Backend, number: u64) {
        let endpoint = self.endpoint.clone();
        self.until(backend, |_, _| endpoint.is_done(number));
    }

    fn faults(&self) -> Vec<(u64, Access, bool)> {
        std::iter::from_fn(|| self.endpoint.take_fault())
            .map(|(fault, _)| (fault.iova, fault.access, fault.mapped))
            .collect()
    }

    /// Sends a request on the back-end's channel and returns the answer.
    fn ask(&mut self, backend: &mut Backend, channel: &mut Connection, message: &Message) -> u64 {
        channel.send(message).unwrap();
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(20), "no answer");
            self.turn();
            backend.serve();
            if let Some(answer) = channel.receive().unwrap() {
                assert!(answer.is_reply());
                assert_eq!(answer.request, message.request);
                return U64::decode(&answer.payload).unwrap().0;
            }
        }
    }
}

/// The usual queues, at their device addresses.
pub(super) fn shifted() -> Activation {
    let mut activation = activation();
    activation.features |= F_ACCESS_PLATFORM;
    for queue in &mut activation.queues {
        queue.desc += BASE;
        queue.driver += BASE;
        queue.device += BASE;
    }
    activation
}

fn update(mapping: Mapping) -> Iotlb {
    Iotlb {
        iova: mapping.iova,
        size: mapping.len,
        user_address: mapping.gpa,
        read: mapping.permission.read,
        write: mapping.permission.write,
        kind: IotlbKind::Update,
    }
}

fn invalidate(iova: u64, size: u64) -> Iotlb {
    Iotlb {
        iova,
        size,
        kind: IotlbKind::Invalidate,
        ..Iotlb::default()
    }
}

fn page(n: u64) -> Mapping {
    Mapping {
        iova: 0x10_0000_0000 + n * 2 * PAGE,
        gpa: 0x80_0000 + n % 8 * PAGE,
        len: PAGE,
        permission: Permission::READ,
    }
}

impl Backend {
    fn translations(&self) -> Vec<Iotlb> {
        self.payloads(requests::IOTLB_MSG)
    }

    /// The requests so far, repetitions of one as one.
    fn order(&self) -> Vec<&'static str> {
        let mut order: Vec<_> = self
            .seen
            .iter()
            .map(|m| requests::name(m.request))
            .collect();
        order.dedup();
        order
    }

    /// Its end of the channel for its requests.
    fn channel(&mut self) -> Connection {
        let mut sent = self.seen.iter_mut();
        let message = sent.find(|m| m.request == requests::SET_BACKEND_REQ_FD);
        let fd = message.unwrap().fds.pop().unwrap();
        Connection::new(UnixStream::from(fd)).unwrap()
    }
}

// ---- features ----

#[test]
fn a_driver_has_to_accept_the_platform_exactly_where_there_is_an_iommu() {
    let behind = Behind::new();
    assert_ne!(behind.net.features() & F_ACCESS_PLATFORM, 0);
    assert!(behind.net.accepts(F_VERSION_1 | F_ACCESS_PLATFORM));
    assert!(!behind.net.accepts(F_VERSION_1));
    let mut world = World::new(SocketRole::Listen);
    let mut backend = world.connect(u64::MAX);
    world.until(&mut backend, |world, _| world.is_ready());
    assert_eq!(world.net.features() & F_ACCESS_PLATFORM, 0);
    assert!(world.net.accepts(F_VERSION_1));
}

#[test]
fn a_back_end_that_knows_no_platform_is_told_nothing_and_the_link_stays_down() {
    let mut behind = Behind::new();
    behind.endpoint.map(RINGS);
    behind.net.activate(shifted());
    let mut backend = behind.handshake(BACKEND, ALL);
    behind.turn();
    backend.serve();
    assert_eq!(behind.link(), 0);
    assert_eq!(behind.net.features() & F_ACCESS_PLATFORM, F_ACCESS_PLATFORM);
    for request in [
        requests::SET_FEATURES,
        requests::ADD_MEM_REG,
        requests::IOTLB_MSG,
    ] {
        assert!(backend.seen.iter().all(|m| m.request != request));
    }
    let number = behind.endpoint.unmap(RINGS.iova, RINGS.len);
    assert!(behind.endpoint.is_done(number), "it holds nothing");
}

// ---- from the IOMMU to the back-end ----

#[test]
fn features_channel_memory_and_translations_come_before_the_rings_which_are_at_device_addresses() {
    let (behind, backend) = Behind::started();
    let expected = [
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_MAX_MEM_SLOTS",
        "SET_OWNER",
        "SET_FEATURES",
        "SET_BACKEND_REQ_FD",
        "ADD_MEM_REG",
        "IOTLB_MSG",
        "SET_VRING_NUM",
    ];
    assert_eq!(backend.order()[..expected.len()], expected);
    assert_eq!(backend.translations(), [update(RINGS)]);
    let features = backend.payloads::<U64>(requests::SET_FEATURES);
    assert_eq!(features, [U64(PLATFORM | VHOST_USER_F_PROTOCOL_FEATURES)]);
    for (address, queue) in backend
        .payloads::<VringAddr>(requests::SET_VRING_ADDR)
        .iter()
        .zip(shifted().queues)
    {
        let got = (address.desc, address.avail, address.used);
        assert_eq!(got, (queue.desc, queue.driver, queue.device));
    }
    assert_eq!(behind.link(), LINK_UP);
}

#[test]
fn thousands_of_mappings_reach_the_back_end_in_order_and_before_the_rings_and_never_too_many_at_once()
 {
    // Bounded by what the back-end owes, or, where it owes nothing, by what its socket takes.
    let without = ALL & !protocol_features::REPLY_ACK;
    for (protocol, bound) in [(ALL, MAX_IOTLB_OWED), (without, 6000)] {
        let mut behind = Behind::new();
        let mut expected = vec![update(RINGS)];
        behind.endpoint.map(RINGS);
        for n in 0..9000 {
            behind.endpoint.map(page(n));
            expected.push(update(page(n)));
        }
        let mut backend = behind.handshake(PLATFORM, protocol);
        behind.net.activate(shifted());
        behind.turn();
        backend.serve();
        let first = backend.translations().len();
        assert!(first <= bound, "{first} at once");
        assert!(backend.enabled().is_empty());
        // What is mapped and unmapped meanwhile has its turn.
        let last = behind.endpoint.map(EXTRA);
        expected.push(update(EXTRA));
        let gone = behind.endpoint.unmap(page(7).iova, PAGE);
        expected.push(invalidate(page(7).iova, PAGE));
        behind.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        behind.settle(&mut backend, gone);
        assert!(behind.endpoint.is_done(last));
        assert_eq!(backend.translations(), expected);
        let at = |request| backend.seen.iter().position(|m| m.request == request);
        let last_told = backend
            .seen
            .iter()
            .rposition(|m| m.request == requests::IOTLB_MSG);
        assert!(last_told < at(requests::SET_VRING_NUM));
        assert_eq!(behind.net.stats().updates, 9002);
        assert_eq!(behind.net.stats().invalidates, 1);
    }
}

#[test]
fn a_change_is_done_when_the_back_end_has_acknowledged_it_and_not_before() {
    let (mut behind, mut backend) = Behind::started();
    backend.seen.clear();
    let mapped = behind.endpoint.map(EXTRA);
    behind.turn();
    assert!(!behind.endpoint.is_done(mapped));
    behind.settle(&mut backend, mapped);
    let unmapped = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
    behind.turn();
    assert!(!behind.endpoint.is_done(unmapped), "revoked is a fact");
    event::clear(behind.endpoint.attention());
    behind.settle(&mut backend, unmapped);
    assert!(event::is_signalled(behind.endpoint.attention()));
    let expected = [update(EXTRA), invalidate(EXTRA.iova, EXTRA.len)];
    assert_eq!(backend.translations(), expected);
    let stats = behind.net.stats();
    assert_eq!(
        (stats.updates, stats.invalidates, stats.answered),
        (2, 1, 3)
    );
    assert!(stats.answered_ns > 0);
}

#[test]
fn many_changes_are_on_their_way_at_once_and_are_done_in_their_order() {
    let (mut behind, mut backend) = Behind::started();
    backend.seen.clear();
    let numbers: Vec<u64> = (0..1000).map(|n| behind.endpoint.map(page(n))).collect();
    behind.turn();
    backend.serve();
    assert_eq!(backend.translations().len(), MAX_IOTLB_OWED);
    behind.settle(&mut backend, numbers[MAX_IOTLB_OWED - 1]);
    behind.settle(&mut backend, numbers[999]);
    let expected: Vec<_> = (0..1000).map(|n| update(page(n))).collect();
    assert_eq!(backend.translations(), expected);
}

#[test]
fn without_acknowledgements_an_unmap_is_done_behind_a_barrier_and_a_map_when_it_is_its_turn() {
    let protocol = ALL & !protocol_features::REPLY_ACK;
    let (mut behind, mut backend) = Behind::started_with(protocol);
    let mapped = behind.endpoint.map(EXTRA);
    behind.turn();
    assert!(behind.endpoint.is_done(mapped));
    backend.serve();
    backend.seen.clear();
    let unmapped = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
    let again = behind.endpoint.map(EXTRA);
    behind.turn();
    assert!(!behind.endpoint.is_done(unmapped));
    behind.settle(&mut backend, again);
    let order: Vec<_> = backend.seen.iter().map(|m| m.request).collect();
    let expected = [
        requests::IOTLB_MSG,
        requests::GET_FEATURES,
        requests::IOTLB_MSG,
    ];
    assert_eq!(order, expected);
    assert!(backend.seen.iter().all(|message| !message.needs_reply()));
}

#[test]
fn what_leads_to_no_memory_is_not_shown_and_is_done_in_its_turn() {
    let (mut behind, mut backend) = Behind::started();
    backend.seen.clear();
    for gpa in [MEMORY_SIZE, MEMORY_SIZE - PAGE, u64::MAX - 2 * PAGE + 1] {
        let nowhere = Mapping {
            gpa,
            len: 2 * PAGE,
            ..EXTRA
        };
        let alone = behind.endpoint.map(nowhere);
        behind.turn();
        assert!(behind.endpoint.is_done(alone));
        let before = behind.endpoint.unmap(nowhere.iova, nowhere.len);
        let behind_it = behind.endpoint.map(nowhere);
        behind.turn();
        assert!(!behind.endpoint.is_done(behind_it), "not before {before}");
        behind.settle(&mut backend, behind_it);
        let last = behind.endpoint.unmap(nowhere.iova, nowhere.len);
        behind.settle(&mut backend, last);
    }
    let told = backend.translations();
    assert!(told.iter().all(|t| t.kind == IotlbKind::Invalidate));
    assert_eq!(told.len(), 6);
}

#[test]
fn after_a_device_reset_the_back_end_still_revokes_before_an_unmap_is_done() {
    let (mut behind, mut backend) = Behind::started();
    behind.net.reset();
    behind.until(&mut backend, |world, _| world.resets_done() == 1);
    backend.seen.clear();
    let unmapped = behind.endpoint.unmap(RINGS.iova, RINGS.len);
    behind.turn();
    assert!(!behind.endpoint.is_done(unmapped));
    behind.settle(&mut backend, unmapped);
    assert_eq!(backend.translations(), [invalidate(RINGS.iova, RINGS.len)]);
    // The next driver: memory and channel are there, and nothing is said twice.
    let mapped = behind.endpoint.map(RINGS);
    behind.settle(&mut backend, mapped);
    backend.seen.clear();
    behind.net.activate(shifted());
    behind.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(backend.order()[..2], ["SET_FEATURES", "SET_VRING_NUM"]);
    assert!(!backend.is_gone());
}

#[test]
fn a_reset_is_done_while_changes_are_on_their_way_all_the_time() {
    let (mut behind, mut backend) = Behind::started();
    let mut number = 0;
    behind.net.reset();
    let start = Instant::now();
    while behind.resets_done() == 0 {
        assert!(start.elapsed() < Duration::from_secs(20));
        number = behind.endpoint.map(EXTRA);
        behind.manager.run_with_timeout(5).unwrap();
        backend.serve();
        behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
        behind.manager.run_with_timeout(5).unwrap();
    }
    assert!(!backend.is_gone());
    behind.settle(&mut backend, number);
}

// ---- losing a back-end ----

#[test]
fn a_back_end_that_does_not_acknowledge_is_cut_off_after_the_timeout_and_then_the_change_is_done() {
    let behind = Behind::with(RingFeatures::default(), TIMEOUT);
    let (mut behind, mut backend) = behind.start(ALL);
    let mapped = behind.endpoint.map(EXTRA);
    behind.settle(&mut backend, mapped);
    let start = Instant::now();
    let unmapped = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
    let mut nobody = Backend::none();
    behind.settle(&mut nobody, unmapped);
    assert!(start.elapsed() >= TIMEOUT);
    backend.serve();
    assert!(backend.is_gone());
    assert_eq!(behind.link(), 0);
    assert_eq!(behind.net.stats().timeouts, 1);
    // The next one is told what holds, and nothing else.
    let mut next = behind.handshake(PLATFORM, ALL);
    behind.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(next.translations(), [update(RINGS)]);
    assert_eq!(behind.link(), LINK_UP);
}

#[test]
fn a_back_end_that_acknowledges_in_time_stays_however_long_changes_go_on() {
    let behind = Behind::with(RingFeatures::default(), TIMEOUT);
    let (mut behind, mut backend) = behind.start(ALL);
    let start = Instant::now();
    while start.elapsed() < 3 * TIMEOUT {
        let number = behind.endpoint.map(EXTRA);
        behind.settle(&mut backend, number);
        let number = behind.endpoint.unmap(EXTRA.iova, EXTRA.len);
        behind.settle(&mut backend, number);
    }
    assert!(!backend.is_gone());
    assert_eq!(behind.net.stats().timeouts, 0);
}

#[test]
fn a_back_end_that_does_not_read_is_cut_off_too() {
    let mut behind = Behind::with(RingFeatures::default(), TIMEOUT);
    behind.endpoint.map(RINGS);
    let protocol = ALL & !protocol_features::REPLY_ACK;
    let mut backend = behind.handshake(PLATFORM, protocol);
    for n in 0..20_000 {
        behind.endpoint.map(page(n));
    }
    behind.net.activate(shifted());
    let start = Instant::now();
    let mut nobody = Backend::none();
    behind.until(&mut nobody, |world, _| world.net.stats().timeouts == 1);
    assert!(start.elapsed() >= TIMEOUT);
    assert!(behind.net.stats().updates < 10_000);
    backend.serve();
    assert!(backend.is_gone());
}

#[test]
fn a_change_is_done_when_the_back_end_dies() {
    let (mut behind, backend) = Behind::started();
    let unmapped = behind.endpoint.unmap(RINGS.iova, RINGS.len);
    let waits: Vec<u64> = (0..1000).map(|n| behind.endpoint.map(page(n))).collect();
    behind.turn();
    assert!(!behind.endpoint.is_done(unmapped));
    drop(backend);
    behind.settle(&mut Backend::none(), waits[999]);
    assert_eq!(behind.endpoint.next_change(), None);
}

#[test]
fn a_back_end_that_refuses_a_change_is_cut_off_and_the_change_is_done() {
    for unmap in [false, true] {
        let (mut behind, mut backend) = Behind::started();
        backend.refuses = Some(requests::IOTLB_MSG);
        let number = if unmap {
            behind.endpoint.unmap(RINGS.iova, RINGS.len)
        } else {
            behind.endpoint.map(EXTRA)
        };
        behind.settle(&mut backend, number);
        behind.until(&mut backend, |_, backend| backend.is_gone());
        assert_eq!(behind.net.stats().refused, 1);
        assert_eq!(behind.link(), 0);
    }
}

// ---- rings ----

#[test]
fn rings_that_are_not_mapped_for_the_device_need_a_reset_and_are_reported() {
    let ring = queue(1);
    let without = |from: u64, len: u64, permission| {
        // All but one part, and that with another permission.
        let mapping = |gpa, len, permission| Mapping {
            iova: BASE + gpa,
            gpa,
            len,
            permission,
        };
        let end = from + len;
        vec![
            mapping(0, from, Permission::READ_WRITE),
            mapping(from, len, permission),
            mapping(end, RINGS.len - end, Permission::READ_WRITE),
        ]
    };
    let none = Permission {
        read: false,
        write: false,
    };
    let elsewhere = |gpa| vec![Mapping { gpa, ..RINGS }];
    let cases = [
        (vec![], Some((queue(0).desc, Access::Read, false))),
        (
            without(ring.desc, PAGE, Permission::WRITE),
            Some((ring.desc, Access::Read, true)),
        ),
        (
            without(ring.driver, PAGE, none),
            Some((ring.driver, Access::Read, true)),
        ),
        (
            without(ring.device, PAGE, Permission::READ),
            Some((ring.device, Access::Write, true)),
        ),
        // Mapped, but not to memory: no fault of the translation.
        (elsewhere(MEMORY_SIZE), None),
    ];
    for (case, (mappings, fault)) in cases.into_iter().enumerate() {
        let mut behind = Behind::new();
        for mapping in mappings {
            behind.endpoint.map(mapping);
        }
        let mut backend = behind.handshake(PLATFORM, ALL);
        behind.net.activate(shifted());
        behind.until(&mut backend, |world, _| world.needs_reset() == 1);
        behind.turn();
        backend.serve();
        let told = backend.payloads::<U64>(requests::SET_FEATURES);
        assert!(told.is_empty(), "case {case}");
        let fault = fault.map(|(gpa, access, mapped)| (BASE + gpa, access, mapped));
        assert_eq!(behind.faults(), Vec::from_iter(fault), "case {case}");
        behind.net.reset();
        behind.until(&mut backend, |world, _| world.resets_done() == 1);
    }
}

#[test]
fn packed_descriptors_have_to_be_mapped_for_both_directions() {
    let rings = RingFeatures {
        packed: true,
        ..RingFeatures::default()
    };
    for (permission, access) in [
        (Permission::READ, Access::Write),
        (Permission::WRITE, Access::Read),
    ] {
        let mut behind = Behind::with(rings, PATIENCE);
        behind.endpoint.map(Mapping {
            permission,
            ..RINGS
        });
        let mut backend = behind.handshake(PLATFORM | F_RING_PACKED, ALL);
        let mut activation = shifted();
        activation.features |= F_RING_PACKED;
        behind.net.activate(activation);
        behind.until(&mut backend, |world, _| world.needs_reset() == 1);
        let expected = (BASE + queue(0).desc, access, true);
        assert_eq!(behind.faults(), [expected]);
    }
}

#[test]
fn a_ring_in_mappings_that_do_not_join_is_refused_and_one_in_two_that_do_is_not() {
    let half = queue(0).desc + 1024;
    let first = Mapping { len: half, ..RINGS };
    let second = |gpa| Mapping {
        iova: BASE + half,
        gpa,
        len: RINGS.len - half,
        permission: Permission::READ_WRITE,
    };
    for (gpa, works) in [(half, true), (half + 0x40_0000, false)] {
        let mut behind = Behind::new();
        behind.endpoint.map(first);
        behind.endpoint.map(second(gpa));
        let mut backend = behind.handshake(PLATFORM, ALL);
        behind.net.activate(shifted());
        behind.until(&mut backend, |world, backend| {
            world.needs_reset() == 1 || backend.enabled() == [1, 1]
        });
        assert_eq!(behind.needs_reset() == 0, works);
    }
}

#[test]
fn the_next_back_end_goes_on_at_the_used_index_that_the_translation_leads_to() {
    let (mut behind, backend) = Behind::started();
    for (index, used) in [(0, 0xfffeu16), (1, 5)] {
        let memory = behind.host.memory();
        memory
            .write_obj(used, GuestAddress(queue(index).device + 2))
            .unwrap();
    }
    drop(backend);
    behind.until(&mut Backend::none(), |world, _| world.link() == 0);
    let mut next = behind.handshake(PLATFORM, ALL);
    behind.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(next.states(requests::SET_VRING_BASE), [(0, 0xfffe), (1, 5)]);
    // Gone with their mapping.
    drop(next);
    behind.until(&mut Backend::none(), |world, _| world.link() == 0);
    behind.endpoint.unmap(RINGS.iova, RINGS.len);
    let mut next = behind.handshake(PLATFORM, ALL);
    behind.until(&mut next, |world, _| world.needs_reset() == 1);
    let expected = (BASE + queue(0).device + 2, Access::Write, false);
    assert_eq!(behind.faults(), [expected]);
}

#[test]
fn packed_rings_are_blank_where_the_translation_leads_and_not_at_the_same_number() {
    for touched in [false, true] {
        let rings = RingFeatures {
            packed: true,
            ..RingFeatures::default()
        };
        let mut behind = Behind::with(rings, PATIENCE);
        // Device addresses that are guest physical addresses of something else, too.
        behind.endpoint.map(Mapping {
            iova: 0,
            gpa: 0x80_0000,
            ..RINGS
        });
        let memory = behind.host.memory();
        let at = queue(0).desc + if touched { 0x80_0000 } else { 0 };
        memory.write_obj(1u64, GuestAddress(at)).unwrap();
        let mut backend = behind.handshake(PLATFORM | F_RING_PACKED, ALL);
        let mut activation = activation();
        activation.features |= F_RING_PACKED | F_ACCESS_PLATFORM;
        behind.net.activate(activation);
        behind.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        drop(backend);
        behind.until(&mut Backend::none(), |world, _| world.link() == 0);
        behind.turn();
        assert_eq!(behind.needs_reset(), u32::from(touched));
    }
}

#[test]
fn changes_that_nobody_follows_are_the_endpoints_own_business() {
    let mut behind = Behind::new();
    let number = behind.endpoint.map(RINGS);
    assert!(behind.endpoint.is_done(number));
    let mut backend = behind.handshake(PLATFORM, ALL);
    behind.turn();
    // There is a back-end, but it has been given nothing yet.
    let number = behind.endpoint.unmap(RINGS.iova, RINGS.len);
    assert!(behind.endpoint.is_done(number));
    assert!(backend.translations().is_empty());
    assert!(!matches!(
        behind.endpoint.next_change(),
        Some((_, Change::Map(_)))
    ));
    backend.serve();
}

#[test]
fn a_driver_that_does_not_accept_the_platform_gets_no_features_ok() {
    let mut behind = Behind::new();
    let _backend = behind.handshake(PLATFORM, ALL);
    for (features, agreed) in [
        (F_VERSION_1, false),
        (F_VERSION_1 | F_ACCESS_PLATFORM, true),
    ] {
        let function = VirtioPci::new(behind.net.clone(), behind.host.clone()).unwrap();
        let driver = Driver::new(function, behind.host.clone());
        assert_ne!(driver.offered() & F_ACCESS_PLATFORM, 0);
        assert_eq!(driver.negotiate(features), agreed);
    }
}
