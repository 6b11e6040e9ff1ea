//! What only the split layout has.

mod oracle;

use std::vec;
use std::vec::Vec;

use super::*;
use crate::tests::{buffer, config, fake, get, pair, take};
use crate::{Chain, DeviceRing, DriverRing, Used};

#[test]
fn sizes_are_powers_of_two() {
    let sizes = (0..=u16::MAX).filter(|size| Split::area_sizes(*size).is_some());
    assert!(sizes.eq((0..16).map(|order| 1 << order)));
    assert_eq!(Split::area_sizes(256), Some([4096, 518, 2054]));
    for size in [0, 3, 12, 768, 32769] {
        let config = config::<Split>(size);
        assert_eq!(Driver::new(fake(), &config).err(), Some(Error::Config));
        assert_eq!(Device::new(fake(), &config).err(), Some(Error::Config));
    }
}

#[test]
fn a_base_that_is_no_index_or_does_not_follow_the_used_index_is_refused() {
    let (memory, config) = (fake(), config::<Split>(8));
    assert!(Driver::with_base(memory.clone(), &config, 0x1_0000).is_err());
    Driver::with_base(memory.clone(), &config, 65530).unwrap();
    let device = |base| Device::with_base(memory.clone(), &config, base);
    for base in [0x1_fffa, 65529, 3, 0x7fff] {
        assert_eq!(device(base).err(), Some(Error::Config), "{base}");
    }
    for base in [65530, 65535, 0, 2] {
        assert_eq!(device(base).unwrap().base(), base);
    }
}

#[test]
fn in_order_descriptors_follow_the_table_and_skipped_chains_are_full() {
    let config = RingConfig {
        in_order: true,
        ..config::<Split>(8)
    };
    let memory = fake();
    let (mut driver, mut device) = pair::<Split>(&memory, &config, 0);
    let mut expected = 0u16;
    for round in 0..20u32 {
        let long = [buffer(round, true), buffer(round + 1, true)];
        let a = driver.add(&long).unwrap();
        let b = driver.add(&long[..1]).unwrap();
        let c = driver.add(&long).unwrap();
        assert_eq!([a, b, c], [0, 2, 3].map(|n| (expected + n) % 8));
        // Section 2.7.9.1: `next` of all but the last descriptor of the table is the one behind it.
        let next = memory.peek_u16(config.desc + 16 * u64::from(a) + 14);
        assert_eq!(next, (a + 1) % 8);
        driver.publish();
        assert_eq!(get(&mut device, 8).len(), 3);
        // A device of somebody else: one element at the place of the first, with the id and length of the last.
        device.put(c, 1);
        device.put(0xffff, 0xffff_ffff);
        device.put(0xffff, 0xffff_ffff);
        device.publish();
        let [first, second] = long.map(|b| b.len);
        let used = take(&mut driver, 8);
        assert_eq!(
            used,
            [(a, first + second), (b, first), (c, 1)].map(|(id, len)| Used { id, len })
        );
        expected += 5;
    }
}

/// A ring whose driver is the test: it writes descriptor `index`, and makes `head` available.
struct ByHand(crate::test_memory::Fake, RingConfig);

impl ByHand {
    fn new(size: u16) -> Self {
        let config = RingConfig {
            indirect: true,
            ..config::<Split>(size)
        };
        let memory = fake();
        Driver::new(memory.clone(), &config).unwrap();
        Self(memory, config)
    }

    /// `table` is the address of the table: the ring's, or another.
    fn descriptor(&self, table: u64, index: u16, (addr, len): (u64, u32), flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.0.poke(at, addr.to_le_bytes());
        self.0.poke(at + 8, len.to_le_bytes());
        self.0.poke(at + 12, flags.to_le_bytes());
        self.0.poke(at + 14, next.to_le_bytes());
    }

    /// What a device makes of the chain at `head`.
    fn get(&self, head: u16) -> Result<Vec<Buffer>, Error> {
        self.0.poke(self.1.driver + 4, head.to_le_bytes());
        self.0.poke(self.1.driver + 2, 1u16.to_le_bytes());
        let mut device = Device::new(self.0.clone(), &self.1)?;
        let mut chains = [Chain::default(); 1];
        let mut buffers = vec![Buffer::default(); 64];
        assert_eq!(device.get(&mut chains, &mut buffers)?, 1);
        buffers.truncate(chains[0].count.into());
        Ok(buffers)
    }
}

const DATA: (u64, u32) = (crate::tests::DATA, 1);
const TABLE: u64 = crate::tests::DATA + 0x8000;

#[test]
fn a_next_outside_the_table_is_a_bad_id() {
    for next in [8, u16::MAX] {
        let ring = ByHand::new(8);
        ring.descriptor(ring.1.desc, 7, DATA, DESC_NEXT, next);
        assert_eq!(ring.get(7), Err(Error::BadId));
    }
}

#[test]
fn a_descriptor_that_is_its_own_next_is_a_chain_that_is_too_long() {
    let ring = ByHand::new(8);
    ring.descriptor(ring.1.desc, 3, DATA, DESC_NEXT, 3);
    assert_eq!(ring.get(3), Err(Error::ChainTooLong));
}

#[test]
fn a_loop_that_does_not_come_back_to_the_head_is_a_chain_that_is_too_long() {
    let ring = ByHand::new(8);
    ring.descriptor(ring.1.desc, 0, DATA, DESC_NEXT, 3);
    ring.descriptor(ring.1.desc, 3, DATA, DESC_NEXT, 4);
    ring.descriptor(ring.1.desc, 4, DATA, DESC_NEXT, 3);
    assert_eq!(ring.get(0), Err(Error::ChainTooLong));
}

#[test]
fn a_table_may_end_a_chain() {
    // Section 2.7.5.3.2. And its descriptors need not be in order.
    let ring = ByHand::new(8);
    let at = |n: u64| (crate::tests::DATA + n, 1);
    ring.descriptor(ring.1.desc, 0, at(0), DESC_NEXT, 5);
    ring.descriptor(ring.1.desc, 5, (TABLE, 48), DESC_INDIRECT | DESC_WRITE, 0);
    ring.descriptor(TABLE, 0, at(1), DESC_NEXT, 2);
    ring.descriptor(TABLE, 2, at(2), DESC_NEXT | DESC_WRITE, 1);
    ring.descriptor(TABLE, 1, at(3), DESC_WRITE, 0);
    let got = ring.get(0).unwrap();
    let expected = (0..4).map(|n| (crate::tests::DATA + n, n > 1));
    assert!(got.iter().map(|b| (b.addr, b.device_writes)).eq(expected));
}

#[test]
fn a_chain_that_ends_in_a_table_is_no_longer_than_the_ring() {
    for (size, fits) in [(4, true), (2, false)] {
        let ring = ByHand::new(size);
        ring.descriptor(ring.1.desc, 0, DATA, DESC_NEXT, 1);
        ring.descriptor(ring.1.desc, 1, (TABLE, 32), DESC_INDIRECT, 0);
        ring.descriptor(TABLE, 0, DATA, DESC_NEXT, 1);
        ring.descriptor(TABLE, 1, DATA, 0, 0);
        let expected = if fits {
            Ok(3)
        } else {
            Err(Error::ChainTooLong)
        };
        assert_eq!(ring.get(0).map(|buffers| buffers.len()), expected);
    }
}

#[test]
fn a_next_outside_an_indirect_table_is_a_bad_id() {
    for next in [2, 7, u16::MAX] {
        let ring = ByHand::new(8);
        ring.descriptor(ring.1.desc, 0, (TABLE, 32), DESC_INDIRECT, 0);
        ring.descriptor(TABLE, 0, DATA, DESC_NEXT, next);
        assert_eq!(ring.get(0), Err(Error::BadId));
    }
}

#[test]
fn a_loop_in_an_indirect_table_is_a_chain_that_is_too_long() {
    let ring = ByHand::new(8);
    ring.descriptor(ring.1.desc, 0, (TABLE, 32), DESC_INDIRECT, 0);
    ring.descriptor(TABLE, 0, DATA, DESC_NEXT, 1);
    ring.descriptor(TABLE, 1, DATA, DESC_NEXT, 0);
    assert_eq!(ring.get(0), Err(Error::ChainTooLong));
}

#[test]
fn a_table_behind_others_in_a_table_is_bad_flags() {
    let ring = ByHand::new(8);
    ring.descriptor(ring.1.desc, 0, (TABLE, 32), DESC_INDIRECT, 0);
    ring.descriptor(TABLE, 0, DATA, DESC_NEXT, 1);
    ring.descriptor(TABLE, 1, (TABLE, 16), DESC_INDIRECT, 0);
    assert_eq!(ring.get(0), Err(Error::BadFlags));
}

#[test]
fn event_indices_leave_the_flags_alone() {
    let config = RingConfig {
        event_idx: true,
        ..config::<Split>(8)
    };
    let memory = fake();
    let (mut driver, mut device) = pair::<Split>(&memory, &config, 0);
    driver.disable_calls();
    device.disable_kicks();
    driver.enable_calls();
    device.enable_kicks();
    let flags = [config.driver, config.device].map(|ring| memory.peek_u16(ring));
    assert_eq!(flags, [0, 0]);
}

#[test]
fn passing_an_event_is_modular() {
    assert!(passes(65530, 2, 65529));
    assert!(passes(65535, 0, 65535));
    assert!(passes(0, 1, 0));
    assert!(passes(65529, 65530, 65529));
    assert!(!passes(65528, 2, 65529));
    assert!(!passes(2, 2, 65529));
    assert!(!passes(5, 5, 5));
    // An event is passed when the step behind it is one of the steps taken.
    for old in [0u16, 1, 32767, 65529, 65535] {
        for step in [1u16, 2, 256, 32768] {
            let new = old.wrapping_add(step);
            for event in 0..=u16::MAX {
                let taken = (event.wrapping_sub(old)) < step;
                assert_eq!(passes(event, new, old), taken, "{event} {new} {old}");
            }
        }
    }
}
