//! Drivers that mean no good: no panic, no standstill, and a status wherever there is room for one.

use super::*;
use crate::fake::MEMORY_SIZE;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A number that is likely to be at some edge.
    fn edgy(&mut self) -> u64 {
        let edges = [0, 0x1000, 0xfee0_0000, 1 << 36, MEMORY_SIZE, u64::MAX];
        let base = edges[usize::try_from(self.below(6)).unwrap()];
        match self.below(4) {
            0 => base,
            1 => base.wrapping_sub(1),
            2 => base.wrapping_add(self.below(16) << 12),
            _ => base.wrapping_add((self.below(16) << 12) + 0xfff),
        }
    }
}

#[test]
fn random_bytes_are_answered_with_a_status() {
    let mut random = Random(1);
    let mut rig = Rig::new();
    for round in 0..3000 {
        let len = random.below(100);
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next().to_le_bytes()[0]).collect();
        if let Some(kind) = bytes.first_mut()
            && round % 4 != 0
        {
            *kind %= 7;
        }
        let room = u32::try_from(random.below(200)).unwrap() + 4;
        let answer = rig.answer(&bytes, room);
        let status = answer[answer.len() - 4];
        assert!(status <= 8 && status != 7, "{bytes:?}: {status}");
    }
    assert_eq!(rig.device_status() & status::NEEDS_RESET, 0);
}

/// What a driver that is followed sees at the other end is what the endpoint says, whatever it asks for; and nothing but shared memory.
#[test]
fn a_follower_of_random_requests_ends_with_what_the_endpoint_allows() {
    let mut random = Random(2);
    let config = IommuConfig {
        max_domains: 3,
        max_mappings: 24,
        ..IommuConfig::default()
    };
    let mut rig = Rig::with(config, ALL);
    rig.net.follow();
    let mut shown = std::collections::BTreeMap::<u64, Mapping>::new();
    let mut succeeded = 0;
    for _ in 0..5000 {
        let domain = u32::try_from(random.below(4)).unwrap();
        let endpoint = [NET, OTHER, 0x99][usize::try_from(random.below(3)).unwrap()];
        let (first, last) = (random.edgy(), random.edgy());
        let page = random.below(24) << 12;
        let bytes = match random.below(10) {
            0 => attach_with(domain, endpoint, u32::from(random.below(8) == 0), 0),
            1 if random.below(3) == 0 => detach(domain, endpoint),
            2 => map(domain, first, last, random.edgy(), READ_WRITE),
            3 => unmap(domain, first, last),
            4 => unmap(domain, page, page + (random.below(4) << 12) + 0xfff),
            5 => {
                rig.driver
                    .write(DEVICE + 36, &[u8::from(random.below(8) == 0)]);
                detach(domain, endpoint)
            }
            _ => {
                let len = (random.below(3) + 1) << 12;
                let flags = u32::try_from(random.below(4)).unwrap();
                map(domain, page, page + len - 1, random.below(64) << 12, flags)
            }
        };
        let head = rig.post(&bytes, 4);
        rig.kick();
        for change in follow_up(&rig.net) {
            match change {
                Change::Map(mapping) => {
                    let end = mapping.iova + mapping.len;
                    assert!(mapping.gpa + mapping.len <= MEMORY_SIZE);
                    assert!(
                        shown
                            .values()
                            .all(|m| m.iova + m.len <= mapping.iova || end <= m.iova)
                    );
                    shown.insert(mapping.iova, mapping);
                }
                Change::Unmap { iova, len } => {
                    let end = iova + len;
                    let whole = |m: &Mapping| iova <= m.iova && m.iova + m.len <= end;
                    assert!(
                        shown
                            .values()
                            .all(|m| whole(m) || m.iova >= end || m.iova + m.len <= iova)
                    );
                    shown.retain(|_, m| !whole(m));
                }
            }
        }
        rig.pump();
        assert_eq!(rig.completed(), [head]);
        succeeded += u32::from(rig.status(head) == OK);
        assert!(rig.device.stats().mappings <= 24);
        for mapping in shown.values() {
            assert_eq!(rig.net.lookup(mapping.iova), Some(*mapping));
        }
        for page in (0..40)
            .map(|n| n << 12)
            .filter(|at| rig.net.lookup(*at).is_some())
        {
            assert!(
                shown
                    .range(..=page)
                    .next_back()
                    .is_some_and(|(_, m)| page < m.iova + m.len)
            );
        }
    }
    assert!(
        succeeded > 500,
        "{succeeded}: the requests are too wild to show anything"
    );
}

#[test]
fn a_chain_that_cannot_be_answered_goes_back_empty_and_the_next_is_served() {
    let mut rig = Rig::new();
    let bytes = attach(1, NET);
    let at = rig.requests.buffer(2);
    rig.requests.put(at, &bytes);
    let read = (at, 20u32, 0u16);
    let tail = (at + 100, 4u32, WRITE);
    let outside = MEMORY_SIZE;
    let chains: [&[(u64, u32, u16)]; 9] = [
        // Without a tail, or without all of it.
        &[read],
        &[read, (at + 100, 3, WRITE)],
        &[read, (at + 100, 0, WRITE)],
        // In no memory, or beyond its end, or around.
        &[read, (outside, 4, WRITE)],
        &[read, (outside - 2, 4, WRITE)],
        &[read, (u64::MAX - 1, 4, WRITE)],
        &[read, tail, (outside, 1, WRITE)],
        // More than any answer.
        &[read, (at + 100, 1 << 20, WRITE)],
        &[read, (0, u32::MAX, WRITE), tail],
    ];
    for chain in chains {
        for (n, &(address, len, flags)) in (0u16..).zip(chain) {
            let last = usize::from(n) + 1 == chain.len();
            let next = if last { 0 } else { NEXT };
            rig.requests
                .set_desc(2 + n, address, len, flags | next, 3 + n);
        }
        rig.requests.publish(2);
        rig.kick();
        assert_eq!(rig.used(0), Some((2, 0)), "{chain:x?}");
        rig.made = 16;
        // It had no effect.
        assert_eq!(rig.ask(&detach(1, NET)), INVAL);
    }
    assert_eq!(rig.device.stats().malformed, chains.len() as u64);
    // A chain in a circle.
    rig.requests.set_desc(2, at, 1, NEXT, 3);
    rig.requests.set_desc(3, at + 100, 1, WRITE | NEXT, 2);
    rig.requests.publish(2);
    rig.kick();
    assert_eq!(rig.used(0).map(|(head, _)| head), Some(2));
    assert_eq!(rig.ask(&attach(1, NET)), OK);
}

#[test]
fn a_request_that_cannot_be_read_has_a_status() {
    let mut rig = Rig::new();
    for address in [MEMORY_SIZE, MEMORY_SIZE - 10, u64::MAX - 3] {
        let head = rig.post(&attach(1, NET), 4);
        rig.requests.set_desc(head, address, 20, NEXT, head + 1);
        rig.kick();
        assert_eq!(rig.used(0), Some((head, 4)));
        assert_eq!(rig.status(head), IOERR);
    }
    // No request at all.
    let head = rig.post(&[], 4);
    rig.kick();
    assert_eq!(rig.used(0), Some((head, 4)));
    assert_eq!(rig.status(head), INVAL);
}

#[test]
fn a_broken_ring_needs_a_reset_and_the_next_driver_is_served() {
    let breaks: [fn(&mut Rig); 3] = [
        |rig| rig.requests.set_avail_index(1000),
        // A head that is no descriptor.
        |rig| {
            rig.requests
                .put(rig.requests.avail() + 4, &300u16.to_le_bytes());
            rig.requests.set_avail_index(1);
        },
        |rig| {
            rig.net.report(0, crate::host::Access::Read);
            rig.pump();
            rig.faults.set_avail_index(1000);
            rig.driver.notify(1);
        },
    ];
    for break_it in breaks {
        let mut rig = Rig::new();
        break_it(&mut rig);
        rig.kick();
        assert_ne!(rig.device_status() & status::NEEDS_RESET, 0);
        rig.kick();
        rig.reset();
        assert_eq!(rig.device_status(), 0);
        rig.start(ALL);
        assert_eq!(rig.ask(&attach(1, NET)), OK);
    }
}

#[test]
fn rings_that_are_not_in_memory_need_a_reset() {
    let mut rig = Rig::idle(IommuConfig::default());
    rig.driver.enable_msix();
    assert!(rig.driver.negotiate(ALL));
    rig.driver.setup_queue(0, &rig.requests, 1);
    let outside = Ring::new(&rig.host, MEMORY_SIZE - 0x1000, RING_SIZE);
    rig.driver.setup_queue(1, &outside, 2);
    rig.driver.set_status(status::DRIVER_OK);
    rig.pump();
    assert_ne!(rig.device_status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_driver_that_makes_more_requests_than_the_ring_holds_needs_a_reset() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    rig.net.follow();
    assert_eq!(rig.ask(&probe(OTHER)), INVAL);
    let mut page = 0u64;
    let mut batch = |rig: &mut Rig, count: u64| {
        for _ in 0..count {
            rig.post(&map(1, page << 12, (page << 12) + 0xfff, 0, READ), 4);
            page += 1;
        }
        rig.kick();
    };
    // As many as there is room for: nothing is done by the follower, so nothing is used.
    batch(&mut rig, 128);
    batch(&mut rig, 128);
    assert_eq!(rig.device_status() & status::NEEDS_RESET, 0);
    assert_eq!(rig.net.outstanding(), 256);
    batch(&mut rig, 1);
    assert_ne!(rig.device_status() & status::NEEDS_RESET, 0);
    assert_eq!(rig.net.outstanding(), 256);
}
