//! What a hostile side can write, one test a violation; each latches.

use super::*;

/// A device's ring whose driver is this test.
struct Bad {
    memory: Fake,
    config: RingConfig,
    device: Device<Fake>,
}

impl Bad {
    fn new(size: u16) -> Self {
        let (memory, config) = (fake(), config(size));
        let (_, device) = pair(&memory, &config, 0);
        Self {
            memory,
            config,
            device,
        }
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.config.desc + 16 * u64::from(index);
        self.memory.poke(at, addr.to_le_bytes());
        self.memory.poke(at + 8, len.to_le_bytes());
        self.memory.poke(at + 12, flags.to_le_bytes());
        self.memory.poke(at + 14, next.to_le_bytes());
    }

    fn available(&self, slot: u16, head: u16, idx: u16) {
        let entry = self.config.driver + 4 + 2 * u64::from(slot);
        self.memory.poke(entry, head.to_le_bytes());
        self.memory.poke(self.config.driver + 2, idx.to_le_bytes());
    }

    fn get(&mut self) -> Result<usize, Error> {
        let mut chains = [Chain::default(); 64];
        let mut buffers = [Buffer::default(); 64];
        self.device.get(&mut chains, &mut buffers)
    }

    /// Reported once; then the queue is broken, even where the driver repairs what it wrote, and publishes nothing.
    fn expect(mut self, error: Error) {
        let base = self.device.base();
        assert_eq!(self.get(), Err(error));
        self.descriptor(0, DATA, 1, 0, 0);
        self.available(0, 0, 1);
        assert_eq!(self.get(), Err(Error::Broken));
        assert_eq!(self.device.base(), base);
        self.memory.stores();
        self.device.put(0, 0);
        self.memory.stores();
        assert!(!self.device.publish());
        assert_eq!(self.memory.stores(), []);
        assert_eq!(self.get(), Err(Error::Broken));
    }
}

#[test]
fn an_available_index_may_move_by_the_ring_size_and_no_more() {
    let mut bad = Bad::new(8);
    bad.descriptor(0, DATA, 1, 0, 0);
    for slot in 0..8 {
        bad.available(slot, 0, 8);
    }
    assert_eq!(bad.get(), Ok(8));
    bad.available(0, 0, 17);
    bad.expect(Error::IndexOutOfRange);

    for idx in [9, 0x8000, u16::MAX] {
        let bad = Bad::new(8);
        bad.available(0, 0, idx);
        bad.expect(Error::IndexOutOfRange);
    }
}

#[test]
fn a_head_outside_the_table_is_a_bad_id() {
    for head in [8, 9, u16::MAX] {
        let bad = Bad::new(8);
        bad.available(0, head, 1);
        bad.expect(Error::BadId);
    }
}

#[test]
fn a_next_outside_the_table_is_a_bad_id() {
    for next in [8, u16::MAX] {
        let bad = Bad::new(8);
        bad.descriptor(7, DATA, 1, DESC_NEXT, next);
        bad.available(0, 7, 1);
        bad.expect(Error::BadId);
    }
}

#[test]
fn a_loop_is_a_chain_that_is_too_long() {
    let bad = Bad::new(8);
    bad.descriptor(3, DATA, 1, DESC_NEXT, 3);
    bad.available(0, 3, 1);
    bad.expect(Error::ChainTooLong);

    let bad = Bad::new(4);
    for n in 0..4 {
        bad.descriptor(n, DATA, 1, DESC_NEXT, (n + 1) % 4);
    }
    bad.available(0, 2, 1);
    bad.expect(Error::ChainTooLong);
}

#[test]
fn a_loop_that_is_longer_than_the_array_is_too() {
    let bad = Bad::new(256);
    bad.descriptor(3, DATA, 1, DESC_NEXT, 4);
    bad.descriptor(4, DATA, 1, DESC_NEXT, 3);
    bad.available(0, 3, 1);
    bad.expect(Error::ChainTooLong);
}

#[test]
fn a_readable_buffer_behind_a_writable_one_is_bad_flags() {
    let bad = Bad::new(8);
    bad.descriptor(0, DATA, 1, DESC_NEXT | DESC_WRITE, 1);
    bad.descriptor(1, DATA, 1, 0, 0);
    bad.available(0, 0, 1);
    bad.expect(Error::BadFlags);
}

#[test]
fn an_indirect_table_is_bad_flags_wherever_it_stands() {
    for flags in [DESC_INDIRECT, DESC_INDIRECT | DESC_NEXT] {
        let bad = Bad::new(8);
        bad.descriptor(0, DATA, 16, flags, 1);
        bad.available(0, 0, 1);
        bad.expect(Error::BadFlags);
    }
    let bad = Bad::new(8);
    bad.descriptor(0, DATA, 1, DESC_NEXT, 1);
    bad.descriptor(1, DATA, 16, DESC_INDIRECT, 1);
    bad.available(0, 0, 1);
    bad.expect(Error::BadFlags);
}

#[test]
fn a_flag_without_a_meaning_is_ignored() {
    let mut bad = Bad::new(8);
    bad.descriptor(0, DATA, 1, 0xfff8, 0xffff);
    bad.available(0, 0, 1);
    assert_eq!(bad.get(), Ok(1));
}

#[test]
fn a_buffer_that_is_not_all_in_memory_is_a_bad_address() {
    for (addr, len) in [
        (END, 1),
        (END - 1, 2),
        (RING - 1, 1),
        (RING - 1, 2),
        (0, 1),
        (RING, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 0xffff, 0x1_0000),
    ] {
        let bad = Bad::new(8);
        bad.descriptor(0, addr, len, 0, 0);
        bad.available(0, 0, 1);
        bad.expect(Error::BadAddress);

        let bad = Bad::new(8);
        bad.descriptor(0, DATA, 1, DESC_NEXT, 1);
        bad.descriptor(1, addr, len, 0, 0);
        bad.available(0, 0, 1);
        bad.expect(Error::BadAddress);
    }
}

#[test]
fn a_chain_whose_length_does_not_fit_32_bits_is_a_bad_length() {
    // A window that shows everything, of which nothing but the ring is touched.
    #[derive(Clone)]
    struct Everything(Fake);
    impl Memory for Everything {
        type Region = <Fake as Memory>::Region;
        fn region(&self, addr: u64, len: usize, align: usize) -> Option<Self::Region> {
            self.0.region(addr, len, align)
        }
        fn contains(&self, _: u64, _: u32) -> bool {
            true
        }
    }
    for (last, fits) in [(0, true), (1, false), (u32::MAX, false)] {
        let bad = Bad::new(8);
        bad.descriptor(0, DATA, 1 << 31, DESC_NEXT, 1);
        bad.descriptor(1, DATA, (1 << 31) - 1, DESC_NEXT, 2);
        bad.descriptor(2, DATA, last, 0, 0);
        bad.available(0, 0, 1);
        let mut device = Device::new(Everything(bad.memory.clone()), &bad.config).unwrap();
        let result = device.get(&mut [Chain::default(); 1], &mut [Buffer::default(); 3]);
        assert_eq!(result, if fits { Ok(1) } else { Err(Error::BadLength) });
    }
}

#[test]
fn the_violation_of_a_later_chain_takes_none_of_its_batch() {
    let mut bad = Bad::new(8);
    bad.descriptor(0, DATA, 1, 0, 0);
    bad.available(0, 0, 1);
    assert_eq!(bad.get(), Ok(1));
    bad.available(1, 0, 2);
    bad.available(2, 8, 3);
    bad.expect(Error::BadId);
}

#[test]
fn an_id_that_was_never_taken_stays_inside_the_ring() {
    // The fake memory panics on a store beyond the region.
    let mut bad = Bad::new(2);
    for id in [2, 0x8000, u16::MAX] {
        for _ in 0..5 {
            bad.device.put(id, u32::MAX);
        }
        bad.device.publish();
    }
    for store in bad.memory.stores() {
        let used = bad.config.device..bad.config.device + 4 + 8 * 2;
        assert!(used.contains(&store.addr), "{store:?}");
    }
}

/// A driver's ring whose device is this test. Outstanding: a chain with 10 writable bytes, and one that is read only.
struct BadDevice {
    memory: Fake,
    config: RingConfig,
    driver: Driver<Fake>,
    writable: u16,
    readable: u16,
}

impl BadDevice {
    fn new(in_order: bool) -> Self {
        let memory = fake();
        let config = RingConfig {
            in_order,
            ..config(8)
        };
        let mut driver = Driver::new(memory.clone(), &config).unwrap();
        let buffer = |len, device_writes| Buffer {
            addr: DATA,
            len,
            device_writes,
        };
        let chain = [buffer(100, false), buffer(4, true), buffer(6, true)];
        let writable = driver.add(&chain).unwrap();
        let readable = driver.add(&chain[..1]).unwrap();
        driver.publish();
        Self {
            memory,
            config,
            driver,
            writable,
            readable,
        }
    }

    fn used(&self, slot: u16, id: u32, len: u32, idx: u16) {
        let at = self.config.device + 4 + 8 * u64::from(slot);
        self.memory.poke(at, id.to_le_bytes());
        self.memory.poke(at + 4, len.to_le_bytes());
        self.memory.poke(self.config.device + 2, idx.to_le_bytes());
    }

    fn take(&mut self) -> Result<usize, Error> {
        self.driver.take(&mut [Used::default(); 8])
    }

    /// Reported once; then the queue is broken: nothing is taken, added or published.
    fn expect(mut self, error: Error) {
        assert_eq!(self.take(), Err(error));
        self.used(0, self.writable.into(), 0, 1);
        assert_eq!(self.take(), Err(Error::Broken));
        assert_eq!(self.driver.free(), 0);
        let buffer = buffer(0, true);
        assert_eq!(self.driver.add(&[buffer]), None);
        self.memory.stores();
        assert!(!self.driver.publish());
        assert_eq!(self.memory.stores(), []);
    }
}

#[test]
fn a_used_index_beyond_what_is_outstanding_is_out_of_range() {
    for in_order in [false, true] {
        for idx in [3, 8, 9, 0x8000, u16::MAX] {
            let bad = BadDevice::new(in_order);
            bad.used(0, bad.writable.into(), 0, idx);
            bad.expect(Error::IndexOutOfRange);
        }
    }
}

#[test]
fn chains_that_are_not_published_cannot_be_used() {
    for in_order in [false, true] {
        let mut bad = BadDevice::new(in_order);
        bad.driver.add(&[buffer(0, true)]).unwrap();
        bad.used(0, bad.writable.into(), 0, 3);
        bad.expect(Error::IndexOutOfRange);

        let mut bad = BadDevice::new(in_order);
        let id = bad.driver.add(&[buffer(0, true)]).unwrap();
        bad.used(0, id.into(), 0, 1);
        bad.expect(Error::BadId);
    }
}

#[test]
fn chains_that_are_not_published_are_outstanding_afterwards() {
    let mut bad = BadDevice::new(false);
    let late = [buffer(0, true), buffer(1, true)];
    let id = bad.driver.add(&late).unwrap();
    let other = bad.driver.add(&late[..1]).unwrap();
    bad.used(0, bad.readable.into(), 0, 1);
    assert_eq!(bad.take(), Ok(1));
    bad.driver.publish();
    bad.used(1, other.into(), 1, 2);
    bad.used(2, id.into(), 3, 3);
    assert_eq!(bad.take(), Ok(2));
    bad.used(3, bad.writable.into(), 10, 4);
    assert_eq!(bad.take(), Ok(1));
    assert_eq!(bad.driver.free(), 8);
}

#[test]
fn a_used_id_that_is_no_outstanding_head_is_a_bad_id() {
    // Outside the table, free, and inside of a chain.
    for in_order in [false, true] {
        for id in [8, 9, 0xffff, 0x1_0000, u32::MAX, 7, 4, 1, 2] {
            let bad = BadDevice::new(in_order);
            bad.used(0, id, 0, 1);
            bad.expect(Error::BadId);
        }
    }
}

#[test]
fn a_chain_is_used_once() {
    for in_order in [false, true] {
        let mut bad = BadDevice::new(in_order);
        bad.used(0, bad.writable.into(), 0, 1);
        assert_eq!(bad.take(), Ok(1));
        bad.used(1, bad.writable.into(), 0, 2);
        bad.expect(Error::BadId);

        let bad = BadDevice::new(in_order);
        bad.used(0, bad.writable.into(), 0, 1);
        bad.used(1, bad.writable.into(), 0, 2);
        bad.expect(Error::BadId);
    }
}

#[test]
fn in_order_an_element_may_not_stand_for_more_than_the_index_says() {
    let bad = BadDevice::new(true);
    bad.used(0, bad.readable.into(), 0, 1);
    bad.expect(Error::BadId);
}

#[test]
fn in_order_an_element_stands_for_nothing_when_it_names_nothing_outstanding() {
    for id in [7, 8, 0xffff, 1] {
        let mut bad = BadDevice::new(true);
        bad.used(0, id, 0, 2);
        // Not one chain is taken on its word.
        let result = bad.driver.take(&mut [Used::default(); 1]);
        assert_eq!(result, Err(Error::BadId));
    }
}

#[test]
fn a_used_length_beyond_the_writable_bytes_is_a_bad_length() {
    for in_order in [false, true] {
        for len in [11, 110, u32::MAX] {
            let bad = BadDevice::new(in_order);
            bad.used(0, bad.writable.into(), len, 1);
            bad.expect(Error::BadLength);
        }
        for len in [1, u32::MAX] {
            let bad = BadDevice::new(in_order);
            bad.used(0, bad.writable.into(), 10, 1);
            bad.used(1, bad.readable.into(), len, 2);
            bad.expect(Error::BadLength);
        }
        let mut bad = BadDevice::new(in_order);
        bad.used(0, bad.writable.into(), 10, 1);
        assert_eq!(bad.take(), Ok(1));
    }
    let bad = BadDevice::new(true);
    bad.used(0, bad.readable.into(), 1, 2);
    bad.expect(Error::BadLength);
}

#[test]
fn what_the_device_does_to_the_descriptors_changes_nothing() {
    let mut bad = BadDevice::new(false);
    for at in (0..16 * 8).step_by(8) {
        bad.memory.poke(bad.config.desc + at, [0xff; 8]);
    }
    for at in (2..4 + 2 * 8).step_by(2) {
        bad.memory.poke(bad.config.driver + at, [0xff; 2]);
    }
    bad.used(0, bad.writable.into(), 10, 1);
    bad.used(1, bad.readable.into(), 0, 2);
    assert_eq!(bad.take(), Ok(2));
    assert_eq!(bad.driver.free(), 8);
    let mut ids: Vec<_> = (0..8)
        .map(|n| bad.driver.add(&[buffer(n, true)]).unwrap())
        .collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..8));
}
