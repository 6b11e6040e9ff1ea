//! A hostile guest or peer that does what a byte string says: the bodies of the fuzz targets, and of tests that make the strings up. They panic where a device
//! breaks what it promises, and end with the string.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use crate::fake::FakeHost;
use crate::host::{Files, Host};
use crate::pci::{PciFunction, PciRoot};
use crate::vhost_pci::{VhostPci, VhostPciConfig};
use crate::vhost_user::{
    Connection, Iotlb, MemoryTable, Payload, SingleMemoryRegion, SocketRole, U64, VringAddr,
    VringFd, VringState,
};
use crate::virtio::harness::{Driver, Ring};
use crate::virtio::{F_ACCESS_PLATFORM, VirtioPci, status};
use crate::virtio_iommu::{Endpoint, IommuConfig, VirtioIommu};

/// Where BARs go.
const MMIO32: u64 = 0xd000_0000;
const MMIO64: u64 = 0x10_0000_0000;
/// What a queue's registers take.
const RINGS: u64 = 0x10_0000;
/// Most capabilities that 256 bytes have room for.
const MOST_CAPABILITIES: usize = 48;

/// The rest of the byte string. Behind its end everything is 0.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let front = self.slice(N);
        bytes[..front.len()].copy_from_slice(front);
        bytes
    }

    fn slice(&mut self, len: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn over(&self) -> bool {
        self.0.is_empty()
    }
}

type Events = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// Lets the device thread do what it can.
fn turn(events: &mut Events) {
    for _ in 0..8 {
        if events.run_with_timeout(0).expect("epoll works") == 0 {
            return;
        }
    }
}

/// A guest that reads and writes configuration space, MSI-X, BARs and memory of a vhost-pci device and a virtio-iommu as it likes. What a device is
/// stays what it is, its capabilities can be walked, and it answers each access.
pub fn fuzz_function(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let mut events: Events = EventManager::new().expect("epoll");
    let root = PciRoot::new();
    let iommu = VirtioIommu::new(IommuConfig::default(), host.clone()).expect("a configuration");
    events.add_subscriber(iommu.subscriber());
    let endpoint = Endpoint::new().expect("an eventfd");
    let behind = input
        .byte()
        .is_multiple_of(2)
        .then(|| Arc::clone(&endpoint));
    let config = VhostPciConfig {
        // Nobody is there.
        socket: "/proc/no-such-socket".into(),
        role: SocketRole::Connect,
        window: 1 << 30,
        queues: 4,
        uuid: [0; 16],
        miss_timeout: Duration::ZERO,
        files: Files::Sealed,
        inflight: true,
        log: false,
    };
    let window = VhostPci::new(config, behind.clone(), host.clone()).expect("a configuration");
    events.add_subscriber(window.subscriber());
    let functions: [Arc<VirtioPci>; 2] = [
        VirtioPci::new(iommu.clone(), host.clone()).expect("a device"),
        VirtioPci::new(window, host.clone()).expect("a device"),
    ];
    let slots = functions
        .each_ref()
        .map(|f| root.add(f.clone()).expect("a slot"));
    if behind.is_some() {
        iommu.add_endpoint(u32::from(slots[1]) << 3, endpoint);
    }
    root.assign_bars(MMIO32..MMIO32 + (1 << 28), MMIO64..MMIO64 << 1)
        .expect("room");
    while !input.over() {
        let which = usize::from(input.byte());
        let (function, slot) = (&functions[which % 2], u64::from(slots[which % 2]));
        let config = |offset: u16| slot << 15 | u64::from(offset % 4096);
        match which / 2 % 8 {
            0 => {
                let offset = config(input.half() % 256);
                let len = 1 << (input.byte() % 3);
                root.ecam_write(offset, input.slice(len));
            }
            1 => {
                let mut data = [0; 4];
                root.ecam_read(config(input.half()), &mut data);
            }
            // Common configuration, where nearly everything happens; then all of BAR 0, with odd lengths.
            2 | 3 => {
                let offset = u64::from(input.byte() % 64);
                let len = 1 << (input.byte() % 4);
                function.bar_write(0, offset, input.slice(len));
            }
            4 => {
                let offset = u64::from(input.half());
                let len = usize::from(input.byte() % 9);
                function.bar_write(0, offset, input.slice(len));
            }
            5 => {
                let mut data = [0; 8];
                let len = usize::from(input.byte() % 9);
                function.bar_read(0, input.half().into(), &mut data[..len]);
                let bar = MMIO32 + u64::from(input.half());
                root.mmio_read(bar, &mut data[..len]);
            }
            6 => {
                let at = RINGS + u64::from(input.half());
                let len = usize::from(input.byte());
                let written = host
                    .memory()
                    .write_slice(input.slice(len), GuestAddress(at));
                written.expect("it is memory");
            }
            _ => turn(&mut events),
        }
        for (slot, device) in slots.iter().zip([0x1057_1af4_u32, 0x107d_1af4]) {
            expect_identity(&root, u64::from(*slot) << 15, device);
        }
    }
    turn(&mut events);
}

fn config_word(root: &PciRoot, offset: u64) -> u32 {
    let mut data = [0; 4];
    root.ecam_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn expect_identity(root: &PciRoot, base: u64, device: u32) {
    assert_eq!(
        config_word(root, base),
        device,
        "a device's identity changed"
    );
    let [mut at, ..] = config_word(root, base | 0x34).to_le_bytes();
    let mut count = 0;
    while at != 0 {
        assert!(at >= 0x40 && at.is_multiple_of(4) && count < MOST_CAPABILITIES);
        [_, at, ..] = config_word(root, base | u64::from(at)).to_le_bytes();
        count += 1;
    }
    assert!(count > 4, "capabilities are gone");
}

/// A guest whose driver sends whatever requests to a virtio-iommu. Each is answered once, and what gets mapped leads into memory.
pub fn fuzz_iommu(data: &[u8]) {
    const ENDPOINT: u32 = 0x10;
    let mut input = Input(data);
    let host = FakeHost::new();
    let iommu = VirtioIommu::new(IommuConfig::default(), host.clone()).expect("a configuration");
    let mut events: Events = EventManager::new().expect("epoll");
    events.add_subscriber(iommu.subscriber());
    let endpoint = Endpoint::new().expect("an eventfd");
    iommu.add_endpoint(ENDPOINT, endpoint);
    let function = VirtioPci::new(iommu.clone(), host.clone()).expect("a device");
    let driver = Driver::new(function, host.clone());
    let ring = Ring::new(&host, RINGS, RING_SIZE);
    assert!(driver.negotiate(driver.offered() & !F_ACCESS_PLATFORM));
    driver.setup_queue(0, &ring, 0);
    driver.setup_queue(1, &Ring::new(&host, 4 * RINGS, RING_SIZE), 0);
    driver.set_status(status::DRIVER_OK);
    turn(&mut events);
    let mut requests = Requests { ring, sent: 0 };
    while !input.over() {
        // A request of a kind that there is, mostly; numbers that are small, mostly.
        let mut request = vec![input.byte() % 7, 0, 0, 0];
        for _ in 0..input.byte() % 12 {
            let word = match input.byte() {
                n @ 0..4 => u32::from(n),
                4 => ENDPOINT,
                5 => u32::MAX,
                n @ 6..128 => u32::from(n) << 12,
                _ => u32::from_le_bytes(input.take()),
            };
            request.extend(word.to_le_bytes());
        }
        request.truncate(request.len() - usize::from(input.byte() % 4));
        // Where the answer goes, sometimes too short for one.
        requests.send(&request, input.byte().into());
        driver.notify(0);
        turn(&mut events);
        assert_eq!(
            requests.answered(),
            requests.sent,
            "a request has no answer"
        );
        let most = IommuConfig::default().max_mappings as u64;
        assert!(
            iommu.stats().mappings <= most,
            "there are too many mappings"
        );
    }
}

const RING_SIZE: u16 = 64;

/// The queue of requests, of two descriptors each.
struct Requests {
    ring: Ring,
    sent: u16,
}

impl Requests {
    fn send(&mut self, request: &[u8], room: u32) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let ring = &mut self.ring;
        let head = self.sent.wrapping_mul(2) % RING_SIZE;
        let [from, to] = [head, head + 1].map(|slot| ring.buffer(slot));
        ring.put(from, request);
        let len = u32::try_from(request.len()).expect("a request is short");
        ring.set_desc(head, from, len, NEXT, head + 1);
        ring.set_desc(head + 1, to, room, WRITE, 0);
        ring.publish(head);
        self.sent = self.sent.wrapping_add(1);
    }

    /// The used index.
    fn answered(&self) -> u16 {
        let bytes = self.ring.get(self.ring.used() + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}

/// A peer that sends whatever bytes. Messages come out whole or the connection ends; what a payload decodes to has the same meaning when it is encoded.
pub fn fuzz_messages(data: &[u8]) {
    let (mut theirs, ours) = UnixStream::pair().expect("a socket pair");
    let mut connection = Connection::new(ours).expect("a stream");
    // Less than a socket holds.
    let data = &data[..data.len().min(1 << 15)];
    theirs.write_all(data).expect("room");
    drop(theirs);
    let mut bytes = 0;
    // Each turn takes a message's header at least, or ends.
    while let Ok(Some(message)) = connection.receive() {
        bytes += 12 + message.payload.len();
        assert!(bytes <= data.len(), "more came than was sent");
        round_trip::<U64>(&message.payload);
        round_trip::<VringState>(&message.payload);
        round_trip::<VringAddr>(&message.payload);
        round_trip::<Iotlb>(&message.payload);
        round_trip::<SingleMemoryRegion>(&message.payload);
        let _ = VringFd::decode(&message.payload);
        let _ = MemoryTable::decode(&message.payload);
    }
}

fn round_trip<P: Payload>(bytes: &[u8]) {
    if let Ok(payload) = P::decode(bytes) {
        let encoded = payload.encode();
        assert_eq!(encoded.len(), bytes.len(), "a payload has another length");
        // What is padding is not kept; all else is.
        let again = P::decode(&encoded).map(|payload| payload.encode());
        assert_eq!(again.ok(), Some(encoded), "a payload is not what it was");
    }
}
