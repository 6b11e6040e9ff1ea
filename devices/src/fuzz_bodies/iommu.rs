//! Requests to a virtio-iommu.

use super::*;
use crate::virtio::F_ACCESS_PLATFORM;

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
