//! The device with a fake machine, a fake transport, and back-ends that the tests play.

mod inflight;
mod iommu;
mod lacking;
mod noise;
mod pairs;
mod queues;
mod rss;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::worker::STOP_DEADLINE;
use super::*;
use crate::fake::{FakeHost, MEMORY_SIZE};
use crate::vhost_user::{
    Connection, Message, Payload, SingleMemoryRegion, U64, VHOST_USER_F_PROTOCOL_FEATURES,
    VringAddr, VringState, protocol_features, requests,
};
use crate::virtio::QueueSetup;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
/// What a usual back-end offers.
const BACKEND: u64 = F_VERSION_1 | F_EVENT_IDX | F_MRG_RXBUF;

/// Counts what the device does to its transport.
#[derive(Default)]
struct FakeTransport {
    config_changes: AtomicU32,
    needs_reset: AtomicU32,
    resets_done: AtomicU32,
    /// The queues whose resets are complete, in order.
    queue_resets: Mutex<Vec<u16>>,
}

impl Transport for FakeTransport {
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::Relaxed);
    }
    fn set_needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::Relaxed);
    }
    fn reset_done(&self) {
        self.resets_done.fetch_add(1, Ordering::Relaxed);
    }
    fn queue_reset_done(&self, index: u16) {
        self.queue_resets.lock().unwrap().push(index);
    }
}

/// A directory for one socket, removed at the end.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("virtio-net-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A device in a machine, with its device thread turned by the test.
struct World {
    net: Arc<VirtioNet>,
    transport: Arc<FakeTransport>,
    host: Arc<FakeHost>,
    manager: EventManager<Box<dyn MutEventSubscriber + Send>>,
    path: PathBuf,
    _place: Place,
}

impl World {
    fn new(role: SocketRole) -> Self {
        Self::with_rings(role, RingFeatures::default())
    }

    fn with_rings(role: SocketRole, rings: RingFeatures) -> Self {
        Self::build(role, rings, None, DEFAULT_IOTLB_TIMEOUT)
    }

    fn build(
        role: SocketRole,
        rings: RingFeatures,
        endpoint: Option<Arc<Endpoint>>,
        iotlb_timeout: Duration,
    ) -> Self {
        Self::build_pairs(role, rings, endpoint, iotlb_timeout, 1)
    }

    fn with_pairs(pairs: u16) -> Self {
        let rings = RingFeatures::default();
        Self::build_pairs(
            SocketRole::Listen,
            rings,
            None,
            DEFAULT_IOTLB_TIMEOUT,
            pairs,
        )
    }

    fn build_pairs(
        role: SocketRole,
        rings: RingFeatures,
        endpoint: Option<Arc<Endpoint>>,
        iotlb_timeout: Duration,
        queue_pairs: u16,
    ) -> Self {
        let place = Place::new();
        let path = place.0.join("s");
        let config = NetConfig {
            socket: path.clone(),
            role,
            queue_pairs,
            queue_size: 256,
            rings,
            mac: MAC,
            iotlb_timeout,
        };
        let host = FakeHost::new();
        let net = VirtioNet::new(config, endpoint, host.clone()).unwrap();
        let transport = Arc::new(FakeTransport::default());
        let weak: Weak<FakeTransport> = Arc::downgrade(&transport);
        net.bind(weak);
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(net.subscriber());
        Self {
            net,
            transport,
            host,
            manager,
            path,
            _place: place,
        }
    }

    /// Lets the device thread do what it can.
    fn turn(&mut self) {
        while self.manager.run_with_timeout(5).unwrap() > 0 {}
    }

    /// Turns the device thread and the back-end until something is so.
    fn until(&mut self, backend: &mut Backend, what: impl Fn(&Self, &Backend) -> bool) {
        let start = Instant::now();
        while !what(self, backend) {
            assert!(start.elapsed() < Duration::from_secs(20), "it never is");
            self.manager.run_with_timeout(5).unwrap();
            backend.serve();
        }
    }

    /// A back-end that connects to a listening device.
    fn connect(&mut self, features: u64) -> Backend {
        Backend::new(UnixStream::connect(&self.path).unwrap(), features)
    }

    /// A listening device with a back-end, after the handshake.
    fn connected() -> (Self, Backend) {
        let mut world = Self::new(SocketRole::Listen);
        let mut backend = world.connect(BACKEND);
        world.until(&mut backend, |world, _| world.link() == LINK_UP);
        (world, backend)
    }

    /// The same with its rings started.
    fn started() -> (Self, Backend) {
        let (mut world, mut backend) = Self::connected();
        world.net.activate(activation());
        world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        world.turn();
        (world, backend)
    }

    fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.net.read_config(offset, &mut data);
        data
    }

    fn link(&self) -> u16 {
        u16::from_le_bytes(self.config(6, 2).try_into().unwrap())
    }

    fn config_changes(&self) -> u32 {
        self.transport.config_changes.load(Ordering::Relaxed)
    }

    fn needs_reset(&self) -> u32 {
        self.transport.needs_reset.load(Ordering::Relaxed)
    }

    fn resets_done(&self) -> u32 {
        self.transport.resets_done.load(Ordering::Relaxed)
    }

    /// Whether the device has signalled that a handshake is done.
    fn is_ready(&self) -> bool {
        event::is_signalled(self.net.ready())
    }
}

fn queue(index: u64) -> QueueSetup {
    QueueSetup {
        size: 128,
        desc: 0x1_0000 * (index + 1),
        driver: 0x1_0000 * (index + 1) + 0x4000,
        device: 0x1_0000 * (index + 1) + 0x8000,
        enabled: true,
        kick: Arc::new(event::new().unwrap()),
        call: Arc::new(event::new().unwrap()),
    }
}

fn activation() -> Activation {
    Activation {
        features: BACKEND | F_MAC | F_STATUS,
        queues: vec![queue(0), queue(1)],
    }
}

/// A back-end that answers everything and remembers what it was told.
struct Backend {
    connection: Option<Connection>,
    features: u64,
    protocol: u64,
    seen: Vec<Message>,
    /// From this request on it says nothing any more.
    silent_at: Option<u32>,
    /// What it acknowledges with a failure.
    refuses: Option<u32>,
    /// How many pairs it says that it serves.
    pairs: u64,
}

impl Backend {
    fn new(stream: UnixStream, features: u64) -> Self {
        Self {
            connection: Some(Connection::new(stream).unwrap()),
            features,
            protocol: protocol_features::REPLY_ACK | protocol_features::CONFIGURE_MEM_SLOTS,
            seen: Vec::new(),
            silent_at: None,
            refuses: None,
            pairs: 1,
        }
    }

    /// Nobody.
    fn none() -> Self {
        Self {
            connection: None,
            features: 0,
            protocol: 0,
            seen: Vec::new(),
            silent_at: None,
            refuses: None,
            pairs: 1,
        }
    }

    /// Says that it serves so many pairs.
    fn serve_pairs(&mut self, pairs: u64) {
        self.protocol |= protocol_features::MQ;
        self.pairs = pairs;
    }

    /// Answers what is there.
    fn serve(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        loop {
            let message = match connection.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(_) => {
                    self.connection = None;
                    return;
                }
            };
            let request = message.request;
            if self.silent_at == Some(request) {
                self.silent_at = Some(0);
            }
            let number = |value| Some(Message::reply(request, &U64(value)));
            let reply = match request {
                _ if self.silent_at == Some(0) => None,
                requests::GET_FEATURES => number(self.features | VHOST_USER_F_PROTOCOL_FEATURES),
                requests::GET_PROTOCOL_FEATURES => number(self.protocol),
                requests::GET_MAX_MEM_SLOTS => number(8),
                requests::GET_QUEUE_NUM => number(self.pairs),
                requests::GET_VRING_BASE => {
                    let mut state = VringState::decode(&message.payload).unwrap();
                    state.num = 9;
                    Some(Message::reply(request, &state))
                }
                _ if !message.needs_reply() => None,
                _ => number((self.refuses == Some(request)).into()),
            };
            self.seen.push(message);
            // The device may have hung up already.
            if let Some(reply) = reply
                && connection.send(&reply).is_err()
            {
                self.connection = None;
                return;
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.connection.is_none()
    }

    fn payloads<T: Payload>(&self, request: u32) -> Vec<T> {
        let seen = self.seen.iter();
        seen.filter(|message| message.request == request)
            .map(|message| T::decode(&message.payload).unwrap())
            .collect()
    }

    /// (vring, value) of each request of this kind.
    fn states(&self, request: u32) -> Vec<(u32, u32)> {
        let states = self.payloads::<VringState>(request);
        states
            .iter()
            .map(|state| (state.index, state.num))
            .collect()
    }

    fn enabled(&self) -> Vec<u32> {
        let states = self.states(requests::SET_VRING_ENABLE);
        states.iter().map(|state| state.1).collect()
    }
}

// ---- what the driver sees ----

#[test]
fn a_driver_is_offered_what_the_keys_and_the_back_end_both_have() {
    type Choose = fn(&mut RingFeatures) -> &mut bool;
    let csum = F_CSUM | F_GUEST_CSUM;
    let uso = F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6;
    let keys: [(Choose, u64); 6] = [
        (|rings| &mut rings.packed, F_RING_PACKED),
        (|rings| &mut rings.in_order, F_IN_ORDER),
        (|rings| &mut rings.event_idx, F_EVENT_IDX),
        (|rings| &mut rings.mrg_rxbuf, F_MRG_RXBUF),
        (|rings| &mut rings.indirect, F_INDIRECT_DESC),
        (|rings| &mut rings.csum, csum),
    ];
    let own = F_VERSION_1 | F_MAC | F_STATUS | F_RING_RESET;
    let mut none = RingFeatures::default();
    for (key, _) in keys {
        *key(&mut none) = false;
    }
    (none.tso, none.uso) = (false, false);
    let offered = |rings, backend| {
        let mut world = World::with_rings(SocketRole::Listen, rings);
        assert_eq!(world.net.features(), own, "before there is a back-end");
        let mut peer = world.connect(backend);
        world.until(&mut peer, |world, _| world.is_ready());
        world.net.features()
    };
    assert_eq!(offered(none, u64::MAX), own);
    for (key, bit) in keys {
        let mut rings = none;
        *key(&mut rings) = true;
        assert_eq!(offered(rings, u64::MAX), own | bit);
        assert_eq!(offered(rings, !bit), own);
        assert_eq!(offered(rings, F_VERSION_1 | bit), own | bit);
    }
    // Segmentation needs checksums, in its direction.
    for (tso, uso, bits) in [(true, false, TSO), (false, true, uso)] {
        let alone = RingFeatures { tso, uso, ..none };
        assert_eq!(offered(alone, u64::MAX), own);
        let both = RingFeatures {
            csum: true,
            ..alone
        };
        assert_eq!(offered(both, u64::MAX), own | csum | bits);
        let host = F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_USO;
        assert_eq!(offered(both, !F_GUEST_CSUM), own | F_CSUM | bits & host);
        assert_eq!(offered(both, !F_CSUM), own | F_GUEST_CSUM | bits & !host);
    }
    let rings = F_IN_ORDER | F_EVENT_IDX | F_MRG_RXBUF | F_INDIRECT_DESC;
    let default = rings | csum | TSO | uso;
    assert_eq!(offered(RingFeatures::default(), u64::MAX), own | default);
}

#[test]
fn the_device_is_ready_when_the_handshake_is_done_and_not_before() {
    let mut world = World::new(SocketRole::Listen);
    world.turn();
    assert!(!world.is_ready());
    let mut backend = world.connect(BACKEND);
    world.turn();
    assert!(!world.is_ready(), "connected is not ready");
    world.until(&mut backend, |world, _| world.is_ready());
    assert_eq!(world.link(), LINK_UP);
}

#[test]
fn the_configuration_has_the_address_the_link_and_one_pair_and_cannot_be_written() {
    let (world, _backend) = World::connected();
    let mut expected = MAC.to_vec();
    expected.extend_from_slice(&[1, 0, 1, 0]);
    assert_eq!(world.config(0, 10), expected);
    world.net.write_config(0, &[0xff; 10]);
    assert_eq!(world.config(0, 10), expected);
    for offset in 0..10 {
        assert_eq!(
            world.config(offset, 1)[0],
            expected[usize::try_from(offset).unwrap()]
        );
    }
    assert_eq!(world.config(8, 4), [1, 0, 0, 0]);
    for offset in [10, 4096, u64::MAX] {
        assert_eq!(world.config(offset, 8), [0; 8]);
    }
    let net = &world.net;
    assert_eq!((net.device_type(), net.pci_class()), (1, 0x02_0000));
    assert_eq!(net.queue_sizes(), [256, 256]);
}

#[test]
fn configurations_that_cannot_be_are_refused_by_name() {
    let place = Place::new();
    let config = NetConfig {
        socket: place.0.join("s"),
        role: SocketRole::Listen,
        queue_pairs: 1,
        queue_size: 256,
        rings: RingFeatures::default(),
        mac: MAC,
        iotlb_timeout: DEFAULT_IOTLB_TIMEOUT,
    };
    for queue_pairs in [0, 17] {
        let config = NetConfig {
            queue_pairs,
            ..config.clone()
        };
        let error = VirtioNet::new(config, None, FakeHost::new()).err().unwrap();
        assert!(matches!(error, Error::QueuePairs(n) if n == queue_pairs));
    }
    for (packed, sizes) in [
        (false, &[0, 3, 768, 32769, u16::MAX][..]),
        (true, &[0, 32769, u16::MAX]),
    ] {
        for &queue_size in sizes {
            let mut config = NetConfig {
                queue_size,
                ..config.clone()
            };
            config.rings.packed = packed;
            let error = VirtioNet::new(config, None, FakeHost::new()).err().unwrap();
            assert!(matches!(error, Error::QueueSize(n) if n == queue_size));
        }
    }
    for (packed, queue_size) in [(false, 1), (false, 32768), (true, 1), (true, 768)] {
        let mut config = NetConfig {
            queue_size,
            ..config.clone()
        };
        config.rings.packed = packed;
        let net = VirtioNet::new(config, None, FakeHost::new()).unwrap();
        assert_eq!(net.queue_sizes(), [queue_size; 2]);
    }
    let first = VirtioNet::new(config.clone(), None, FakeHost::new()).unwrap();
    let error = VirtioNet::new(config, None, FakeHost::new()).err().unwrap();
    assert!(matches!(error, Error::Socket(SocketError::InUse(_))));
    drop(first);
}

// ---- starting ----

#[test]
fn activation_sends_features_memory_and_both_rings() {
    let (world, backend) = World::started();
    let features = backend.payloads::<U64>(requests::SET_FEATURES);
    assert_eq!(features, [U64(BACKEND | VHOST_USER_F_PROTOCOL_FEATURES)]);
    let regions = backend.payloads::<SingleMemoryRegion>(requests::ADD_MEM_REG);
    assert_eq!(regions.len(), 1);
    let region = regions[0].0;
    assert_eq!((region.guest_address, region.size), (0, MEMORY_SIZE));
    assert_eq!(
        backend.states(requests::SET_VRING_NUM),
        [(0, 128), (1, 128)]
    );
    assert_eq!(backend.states(requests::SET_VRING_BASE), [(0, 0), (1, 0)]);
    let addresses = backend.payloads::<VringAddr>(requests::SET_VRING_ADDR);
    for (index, address) in addresses.iter().enumerate() {
        let queue = queue(index as u64);
        assert_eq!(address.index as usize, index);
        assert_eq!(address.desc, queue.desc);
        assert_eq!(address.avail, queue.driver);
        assert_eq!(address.used, queue.device);
    }
    assert_eq!(addresses.len(), 2);
    assert_eq!(world.link(), LINK_UP);
}

#[test]
fn a_driver_that_is_faster_than_the_back_end_is_served_when_it_comes() {
    let mut world = World::new(SocketRole::Listen);
    world.net.activate(activation());
    world.turn();
    let mut backend = world.connect(BACKEND);
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(backend.states(requests::SET_VRING_BASE), [(0, 0), (1, 0)]);
}

#[test]
fn a_queue_that_the_driver_left_disabled_is_not_started() {
    let (mut world, mut backend) = World::connected();
    let mut activation = activation();
    activation.queues[0].enabled = false;
    activation.queues[0].desc = u64::MAX;
    world.net.activate(activation);
    world.until(&mut backend, |_, backend| !backend.enabled().is_empty());
    assert_eq!(backend.states(requests::SET_VRING_ENABLE), [(1, 1)]);
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn rings_outside_memory_never_reach_the_back_end_and_need_a_reset() {
    type Spoil = fn(&mut QueueSetup);
    let cases: [Spoil; 5] = [
        |queue| queue.desc = MEMORY_SIZE,
        |queue| queue.driver = MEMORY_SIZE - 8,
        |queue| queue.device = u64::MAX - 3,
        |queue| queue.size = 512,
        |queue| queue.desc += 1,
    ];
    for (case, spoil) in cases.into_iter().enumerate() {
        let (mut world, mut backend) = World::connected();
        let mut activation = activation();
        spoil(&mut activation.queues[1]);
        world.net.activate(activation);
        world.until(&mut backend, |world, _| world.needs_reset() == 1);
        world.turn();
        backend.serve();
        let started = backend.payloads::<U64>(requests::SET_FEATURES);
        assert!(started.is_empty(), "case {case}");
        world.net.reset();
        world.until(&mut backend, |world, _| world.resets_done() == 1);
    }
}

// ---- losing a back-end ----

#[test]
fn after_a_lost_back_end_the_next_one_goes_on_at_the_used_index() {
    let mut world = World::new(SocketRole::Listen);
    let mut backend = world.connect(BACKEND);
    let activation = activation();
    let queues = activation.queues.clone();
    world.net.activate(activation);
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    world.turn();
    let changes = world.config_changes();
    for (queue, index) in queues.iter().zip([0xfffeu16, 5]) {
        let memory = world.host.memory();
        memory
            .write_obj(index, GuestAddress(queue.device + 2))
            .unwrap();
    }

    drop(backend);
    let mut nobody = Backend::none();
    world.until(&mut nobody, |world, _| world.link() == 0);
    assert_eq!(world.config_changes(), changes + 1);

    let mut next = world.connect(BACKEND | F_IN_ORDER);
    world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(next.states(requests::SET_VRING_BASE), [(0, 0xfffe), (1, 5)]);
    let features = next.payloads::<U64>(requests::SET_FEATURES);
    assert_eq!(features, [U64(BACKEND | VHOST_USER_F_PROTOCOL_FEATURES)]);
    assert_eq!(world.link(), LINK_UP);
    assert_eq!(world.config_changes(), changes + 2);
    for queue in &queues {
        // What the dead back-end swallowed is made good.
        assert!(event::is_signalled(&queue.kick));
        assert!(event::is_signalled(&queue.call));
    }
    assert_eq!(world.needs_reset(), 0);
}

#[test]
fn a_next_back_end_without_the_drivers_features_leaves_the_link_down_until_the_driver_starts_over()
{
    let (mut world, backend) = World::started();
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.link() == 0);
    let lesser = F_VERSION_1;
    let mut next = world.connect(lesser);
    world.until(&mut next, |world, _| {
        world.net.features() == lesser | F_MAC | F_STATUS | F_RING_RESET
    });
    world.turn();
    next.serve();
    assert_eq!(world.link(), 0);
    assert!(next.payloads::<U64>(requests::SET_FEATURES).is_empty());

    world.net.reset();
    world.until(&mut next, |world, _| world.resets_done() == 1);
    assert_eq!(world.link(), LINK_UP);
    let mut activation = activation();
    activation.features = world.net.features();
    world.net.activate(activation);
    world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
}

#[test]
fn a_back_end_without_version_1_never_gets_the_rings() {
    let mut world = World::new(SocketRole::Listen);
    let mut activation = activation();
    activation.features = F_EVENT_IDX;
    world.net.activate(activation);
    let mut backend = world.connect(F_EVENT_IDX);
    world.until(&mut backend, |world, _| world.is_ready());
    world.turn();
    backend.serve();
    assert_eq!(world.link(), 0);
    assert!(backend.payloads::<U64>(requests::SET_FEATURES).is_empty());
}

#[test]
fn a_connecting_device_finds_a_back_end_that_comes_late_and_one_that_comes_back() {
    let mut world = World::new(SocketRole::Connect);
    world.turn();
    world.net.activate(activation());
    for life in 0..2 {
        let listener = UnixListener::bind(&world.path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut backend = Backend::none();
        let start = Instant::now();
        while backend.is_gone() {
            assert!(start.elapsed() < Duration::from_secs(20));
            world.manager.run_with_timeout(5).unwrap();
            if let Ok((stream, _)) = listener.accept() {
                backend = Backend::new(stream, BACKEND);
            }
        }
        world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        world.until(&mut backend, |world, _| world.link() == LINK_UP);
        drop((backend, listener));
        std::fs::remove_file(&world.path).unwrap();
        world.until(&mut Backend::none(), |world, _| world.link() == 0);
        assert_eq!(world.needs_reset(), 0, "life {life}");
    }
}

// ---- hostile back-ends ----

#[test]
fn a_back_end_that_breaks_the_protocol_is_cut_off_and_the_next_one_is_served() {
    let mut world = World::new(SocketRole::Listen);
    world.net.activate(activation());
    let unasked = Message::reply(requests::GET_VRING_BASE, &U64(0));
    let unasked = [&unasked.header()[..], &unasked.payload].concat();
    for garbage in [vec![0xff; 100], vec![0; 12], unasked] {
        let mut stream = UnixStream::connect(&world.path).unwrap();
        world.turn();
        stream.write_all(&garbage).unwrap();
        let mut backend = Backend::new(stream, BACKEND);
        // It reads, and does not answer, so that only its garbage counts.
        backend.silent_at = Some(requests::GET_FEATURES);
        world.until(&mut backend, |_, backend| backend.is_gone());
        assert!(!world.is_ready());
    }
    let mut backend = world.connect(BACKEND);
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
}

#[test]
fn a_back_end_that_refuses_the_memory_is_cut_off() {
    let (mut world, mut backend) = World::connected();
    backend.refuses = Some(requests::ADD_MEM_REG);
    world.net.activate(activation());
    world.until(&mut backend, |_, backend| backend.is_gone());
    assert_eq!(world.link(), 0);
    let mut next = world.connect(BACKEND);
    world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
}

#[test]
fn a_second_back_end_is_turned_away_and_the_first_does_not_notice() {
    let (mut world, mut first) = World::started();
    let changes = world.config_changes();
    let mut second = world.connect(BACKEND);
    world.until(&mut second, |_, backend| backend.is_gone());
    assert!(second.seen.is_empty());
    first.serve();
    assert!(!first.is_gone());
    assert_eq!(world.link(), LINK_UP);
    assert_eq!(world.config_changes(), changes);
}

#[test]
fn a_successor_is_served_whichever_of_its_coming_and_the_end_of_the_first_is_seen_first() {
    let (mut world, first) = World::started();
    let mut second = world.connect(BACKEND);
    drop(first);
    world.until(&mut second, |_, backend| backend.enabled() == [1, 1]);
}

// ---- reset ----

#[test]
fn reset_is_done_when_the_back_end_has_stopped_and_the_next_start_is_from_zero() {
    let (mut world, mut backend) = World::started();
    let memory = world.host.memory();
    memory
        .write_obj(77u16, GuestAddress(queue(0).device + 2))
        .unwrap();
    world.net.reset();
    world.turn();
    assert_eq!(world.resets_done(), 0, "the back-end has not answered yet");
    world.until(&mut backend, |world, _| world.resets_done() == 1);
    assert_eq!(backend.states(requests::GET_VRING_BASE).len(), 2);
    assert_eq!(backend.enabled(), [1, 1, 0, 0]);
    backend.seen.clear();
    world.net.activate(activation());
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
    assert_eq!(backend.states(requests::SET_VRING_BASE), [(0, 0), (1, 0)]);
    assert_eq!(world.link(), LINK_UP);
}

#[test]
fn reset_without_a_back_end_or_before_the_rings_run_is_done_at_once() {
    let mut world = World::new(SocketRole::Listen);
    world.net.reset();
    world.turn();
    assert_eq!(world.resets_done(), 1);
    let mut backend = world.connect(BACKEND);
    world.turn();
    world.net.reset();
    world.turn();
    assert_eq!(world.resets_done(), 2, "in the handshake");
    world.until(&mut backend, |world, _| world.link() == LINK_UP);
    world.net.reset();
    world.turn();
    assert_eq!(world.resets_done(), 3, "ready");
    assert!(backend.states(requests::GET_VRING_BASE).is_empty());
}

#[test]
fn reset_while_the_back_end_is_silent_is_done_at_the_deadline_and_the_back_end_is_cut_off() {
    for silent_at in [requests::GET_VRING_BASE, requests::ADD_MEM_REG] {
        let (mut world, mut backend) = World::connected();
        backend.silent_at = Some(silent_at);
        world.net.activate(activation());
        world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
        let start = Instant::now();
        world.net.reset();
        world.until(&mut backend, |world, _| world.resets_done() == 1);
        assert!(start.elapsed() >= STOP_DEADLINE);
        world.until(&mut backend, |_, backend| backend.is_gone());
        assert_eq!(world.link(), 0);
        // The machine goes on with the next one.
        let mut next = world.connect(BACKEND);
        world.net.activate(activation());
        world.until(&mut next, |_, backend| backend.enabled() == [1, 1]);
        assert_eq!(world.resets_done(), 1);
    }
}

#[test]
fn reset_while_the_back_end_dies_is_done() {
    let (mut world, mut backend) = World::started();
    backend.silent_at = Some(requests::GET_VRING_BASE);
    world.net.reset();
    world.turn();
    assert_eq!(world.resets_done(), 0);
    drop(backend);
    world.until(&mut Backend::none(), |world, _| world.resets_done() == 1);
    assert_eq!(world.link(), 0);
}

#[test]
fn what_was_activated_before_a_reset_is_void_and_what_comes_behind_it_counts() {
    let (mut world, mut backend) = World::connected();
    world.net.activate(activation());
    world.net.reset();
    world.until(&mut backend, |world, _| world.resets_done() == 1);
    world.turn();
    backend.serve();
    assert!(backend.payloads::<U64>(requests::SET_FEATURES).is_empty());
    world.net.reset();
    world.net.activate(activation());
    world.until(&mut backend, |_, backend| backend.enabled() == [1, 1]);
}

#[test]
fn a_guest_that_hammers_on_reset_and_activation_does_not_harm_the_device() {
    let (mut world, mut backend) = World::started();
    for round in 0..200 {
        world.net.reset();
        if round % 3 == 0 {
            world.net.activate(activation());
        }
        if round % 5 == 0 {
            world.manager.run_with_timeout(0).unwrap();
        }
        if round % 7 == 0 {
            backend.serve();
        }
    }
    world.net.reset();
    let done = world.resets_done();
    world.until(&mut backend, |world, _| world.resets_done() > done);
    backend.seen.clear();
    world.turn();
    world.net.activate(activation());
    world.until(&mut backend, |_, backend| {
        backend.enabled().ends_with(&[1, 1])
    });
    assert!(!backend.is_gone());
    assert_eq!(world.link(), LINK_UP);
}
