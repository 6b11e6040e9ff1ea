//! One machine for all tests of the device; what is tested is in the modules.

mod bypass;
mod completion;
mod faults;
mod hostile;
mod requests;

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::fake::FakeHost;
use crate::host::Permission;
use crate::virtio::harness::*;
use crate::virtio::{VirtioPci, status};

/// The endpoints.
const NET: u32 = 0x10;
const OTHER: u32 = 0x18;
/// Vector of the request queue.
const REQUEST_VECTOR: u32 = 1;
const RING_SIZE: u16 = 256;

// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const ALL: u64 =
    F_VERSION_1 | F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_BYPASS_CONFIG;

// VIRTIO_IOMMU_S_*.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const INVAL: u8 = 4;
const RANGE: u8 = 5;
const NOENT: u8 = 6;
const NOMEM: u8 = 8;

const READ: u32 = 1;
const READ_WRITE: u32 = 3;

/// A request's bytes: head, and these fields.
fn request(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    // The head's reserved bytes are to be ignored.
    let mut bytes = vec![kind, 0xaa, 0xbb, 0xcc];
    bytes.extend(fields.concat());
    bytes
}

fn attach_with(domain: u32, endpoint: u32, flags: u32, reserved: u32) -> Vec<u8> {
    let fields = [domain, endpoint, flags, reserved].map(u32::to_le_bytes);
    request(1, &[&fields.concat()])
}

fn attach(domain: u32, endpoint: u32) -> Vec<u8> {
    attach_with(domain, endpoint, 0, 0)
}

fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
    let fields = [domain, endpoint].map(u32::to_le_bytes);
    // These reserved bytes are to be ignored too.
    request(2, &[&fields.concat(), &[0xdd; 8]])
}

fn map(domain: u32, first: u64, last: u64, gpa: u64, flags: u32) -> Vec<u8> {
    let range = [first, last, gpa].map(u64::to_le_bytes).concat();
    request(3, &[&domain.to_le_bytes(), &range, &flags.to_le_bytes()])
}

fn unmap(domain: u32, first: u64, last: u64) -> Vec<u8> {
    let range = [first, last].map(u64::to_le_bytes).concat();
    request(4, &[&domain.to_le_bytes(), &range, &[0; 4]])
}

fn probe(endpoint: u32) -> Vec<u8> {
    request(5, &[&endpoint.to_le_bytes(), &[0xee; 64]])
}

/// A machine with the device, two endpoints, a driver, and the event loop, all on the test's thread.
struct Rig {
    host: Arc<FakeHost>,
    device: Arc<VirtioIommu>,
    driver: Driver,
    events: EventManager<Box<dyn MutEventSubscriber + Send>>,
    net: Arc<Endpoint>,
    other: Arc<Endpoint>,
    requests: Ring,
    faults: Ring,
    /// Requests made so far, used elements seen so far in each queue.
    made: u16,
    seen: [u16; 2],
}

impl Rig {
    fn new() -> Self {
        Self::with(IommuConfig::default(), ALL)
    }

    /// A driver that is live, having accepted `features`.
    fn with(config: IommuConfig, features: u64) -> Self {
        let mut rig = Self::idle(config);
        rig.start(features);
        rig
    }

    fn idle(config: IommuConfig) -> Self {
        let host = FakeHost::new();
        let device = VirtioIommu::new(config, host.clone()).unwrap();
        let function = VirtioPci::new(device.clone(), host.clone()).unwrap();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.subscriber());
        let [net, other] = [NET, OTHER].map(|id| {
            let endpoint = Endpoint::new().unwrap();
            device.add_endpoint(id, endpoint.clone());
            endpoint
        });
        let driver = Driver::new(function, host.clone());
        let requests = Ring::new(&host, 0x10_0000, RING_SIZE);
        let faults = Ring::new(&host, 0x40_0000, RING_SIZE);
        Self {
            host,
            device,
            driver,
            events,
            net,
            other,
            requests,
            faults,
            made: 0,
            seen: [0; 2],
        }
    }

    /// Sets the device up, with rings that are empty.
    fn start(&mut self, features: u64) {
        self.requests = Ring::new(&self.host, 0x10_0000, RING_SIZE);
        self.faults = Ring::new(&self.host, 0x40_0000, RING_SIZE);
        for ring in [&self.requests, &self.faults] {
            ring.put(ring.avail(), &[0; 4]);
            ring.put(ring.used(), &[0; 4]);
        }
        (self.made, self.seen) = (0, [0; 2]);
        let driver = &self.driver;
        driver.enable_msix();
        assert!(driver.negotiate(features));
        driver.write(16, &0u16.to_le_bytes());
        driver.setup_queue(0, &self.requests, 1);
        driver.setup_queue(1, &self.faults, 2);
        driver.set_status(status::DRIVER_OK);
        self.pump();
    }

    /// Lets the device thread do all that there is to do.
    fn pump(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device thread never comes to rest");
    }

    /// Puts a request into the queue, with `room` bytes for the answer. Returns its head.
    fn post(&mut self, bytes: &[u8], room: u32) -> u16 {
        let head = 2 * self.made % RING_SIZE;
        self.made += 1;
        let ring = &mut self.requests;
        let (at, len) = (ring.buffer(head), u32::try_from(bytes.len()).unwrap());
        ring.put(at, bytes);
        ring.set_desc(head, at, len, NEXT, head + 1);
        let answer = ring.buffer(head + 1);
        let whole = usize::try_from(room.min(4096)).unwrap();
        ring.put(answer, &vec![0x55; whole]);
        ring.set_desc(head + 1, answer, room, WRITE, 0);
        ring.publish(head);
        head
    }

    /// The next used element of a queue: its head and length.
    fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = [&self.requests, &self.faults][queue];
        let seen = &mut self.seen[queue];
        let index = u16::from_le_bytes(ring.get(ring.used() + 2, 2).try_into().unwrap());
        if index == *seen {
            return None;
        }
        let at = ring.used() + 4 + 8 * u64::from(*seen % RING_SIZE);
        let element = ring.get(at, 8);
        *seen = seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((u16::try_from(word(0)).unwrap(), word(4)))
    }

    /// The heads of the requests that are complete and were not before.
    fn completed(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.used(0))
            .map(|(head, _)| head)
            .collect()
    }

    fn kick(&mut self) {
        self.driver.notify(0);
        self.pump();
    }

    /// Makes a request and waits for its answer, which is used once, and whole.
    fn answer(&mut self, bytes: &[u8], room: u32) -> Vec<u8> {
        let head = self.post(bytes, room);
        self.kick();
        assert_eq!(self.used(0), Some((head, room)));
        assert_eq!(self.used(0), None);
        let at = self.requests.buffer(head + 1);
        self.requests.get(at, usize::try_from(room).unwrap())
    }

    /// Makes a request and waits for its status.
    fn ask(&mut self, bytes: &[u8]) -> u8 {
        match self.answer(bytes, 4)[..] {
            [status, 0, 0, 0] => status,
            ref tail => panic!("reserved bytes of the tail: {tail:?}"),
        }
    }

    /// The status of a request that was completed, by its head.
    fn status(&self, head: u16) -> u8 {
        self.requests.get(self.requests.buffer(head + 1), 1)[0]
    }

    fn reset(&mut self) {
        self.driver.write(STATUS, &[0]);
        self.pump();
    }

    fn device_status(&self) -> u8 {
        self.driver.u8(STATUS)
    }
}

/// Carries out all changes that there are, as a follower that is quick; returns them.
fn follow_up(endpoint: &Endpoint) -> Vec<Change> {
    let mut changes = Vec::new();
    while let Some((number, change)) = endpoint.next_change() {
        changes.push(change);
        endpoint.done(number);
    }
    changes
}

fn mapping(iova: u64, gpa: u64, len: u64, permission: Permission) -> Mapping {
    Mapping {
        iova,
        gpa,
        len,
        permission,
    }
}
