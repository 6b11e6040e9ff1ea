//! What a hostile driver can write, one test a violation; each latches.

use super::peers::{Desc, INDIRECT, NEXT, Peer, Raw, WRITE, hostile};
use super::*;

/// A device's ring whose driver is the test.
struct Bad<L: Layout> {
    peer: Peer,
    device: L::Device<Fake>,
}

/// A descriptor that nothing is wrong with.
const GOOD: Desc = (DATA, 1, 0);
/// Where tables lie.
const TABLE: u64 = DATA + 0x8000;

impl<L: Raw> Bad<L> {
    fn new(size: u16) -> Self {
        Self::with(RingConfig {
            indirect: true,
            ..config::<L>(size)
        })
    }

    fn with(config: RingConfig) -> Self {
        let memory = fake();
        let start = L::start(config.size, 3);
        let (_, device) = pair::<L>(&memory, &config, start);
        let peer = Peer {
            memory,
            config,
            start,
            offered: 0,
            used: 0,
        };
        Self { peer, device }
    }

    fn offer(&mut self, id: u16, chain: &[Desc]) -> &mut Self {
        L::offer(&mut self.peer, id, chain);
        self
    }

    /// A chain of one descriptor that refers to a table.
    fn offer_table(&mut self, at: u64, table: &[Desc]) -> &mut Self {
        let len = u32::try_from(16 * table.len()).unwrap();
        self.write_table(at, table);
        self.offer(0, &[(at, len, INDIRECT)])
    }

    fn write_table(&self, at: u64, table: &[Desc]) {
        let mut table = table.to_vec();
        L::link(&mut table);
        for (n, desc) in (0u16..).zip(table) {
            let at = at + 16 * u64::from(n);
            self.peer.descriptor(at, desc, 0, n + 1, L::PACKED);
        }
    }

    fn get(&mut self) -> Result<usize, Error> {
        let mut chains = [Chain::default(); 64];
        let mut buffers = [Buffer::default(); 64];
        self.device.get(&mut chains, &mut buffers)
    }

    /// Reported once; then the queue is broken, even where the driver repairs what it wrote, and publishes nothing.
    fn expect(&mut self, error: Error) {
        let base = self.device.base();
        assert_eq!(self.get(), Err(error));
        self.peer.offered = 0;
        self.offer(0, &[GOOD]);
        assert_eq!(self.get(), Err(Error::Broken));
        assert_eq!(self.device.base(), base);
        self.device.put(0, 0);
        self.peer.memory.stores();
        assert!(!self.device.publish());
        assert_eq!(self.peer.memory.stores(), []);
        assert_eq!(self.get(), Err(Error::Broken));
    }
}

hostile! {

fn as_many_chains_as_descriptors_and_no_more<L>() {
    let mut bad = Bad::<L>::new(8);
    for id in 0..8 {
        bad.offer(id, &[GOOD]);
    }
    assert_eq!(bad.get(), Ok(8));
    bad.offer(0, &[GOOD]).expect(Error::IndexOutOfRange);
}

fn a_chain_that_the_device_holds_is_not_offered_again<L>() {
    // Two are used, so there is room for two.
    let mut bad = Bad::<L>::new(4);
    for id in 0..4 {
        bad.offer(id, &[GOOD]);
    }
    assert_eq!(bad.get(), Ok(4));
    bad.device.put(2, 0);
    bad.device.put(1, 0);
    bad.device.publish();
    bad.offer(1, &[GOOD]).offer(2, &[GOOD]);
    assert_eq!(bad.get(), Ok(2));
    bad.offer(0, &[GOOD]).expect(Error::IndexOutOfRange);
}

fn a_used_chain_that_is_not_published_makes_no_room<L>() {
    let mut bad = Bad::<L>::new(4);
    for id in 0..4 {
        bad.offer(id, &[GOOD]);
    }
    assert_eq!(bad.get(), Ok(4));
    bad.device.put(0, 0);
    bad.offer(0, &[GOOD]);
    assert_eq!(bad.get(), Err(Error::IndexOutOfRange));
}

fn more_chains_than_descriptors_in_one_go_are_not_taken<L>() {
    for size in [1, 4, 8] {
        for offers in [size + 1, 2 * size] {
            let mut bad = Bad::<L>::new(size);
            for id in 0..offers {
                bad.offer(id % size, &[GOOD]);
            }
            if L::PACKED {
                // Those of the next turn have taken the place of the first, which is now not available.
                assert_eq!(bad.get(), Ok(0));
            } else {
                bad.expect(Error::IndexOutOfRange);
            }
        }
    }
}

fn an_id_outside_the_ring_is_a_bad_id<L>() {
    for id in [8, 9, 0x7fff, u16::MAX] {
        Bad::<L>::new(8).offer(id, &[GOOD]).expect(Error::BadId);
    }
}

fn a_chain_without_an_end_is_too_long<L>() {
    for size in [1, 2, 8] {
        let mut bad = Bad::<L>::new(size);
        L::offer_endless(&mut bad.peer);
        bad.expect(Error::ChainTooLong);
    }
}

fn a_chain_without_an_end_that_is_longer_than_the_array_is_too<L>() {
    let mut bad = Bad::<L>::new(256);
    L::offer_endless(&mut bad.peer);
    bad.expect(Error::ChainTooLong);
}

fn a_chain_is_no_longer_than_the_array<L>() {
    let mut bad = Bad::<L>::new(256);
    bad.offer(0, &[GOOD; 65]).expect(Error::ChainTooLong);
    assert_eq!(Bad::<L>::new(256).offer(0, &[GOOD; 64]).get(), Ok(1));
}

fn a_readable_buffer_behind_a_writable_one_is_bad_flags<L>() {
    let writable = (DATA, 1, WRITE);
    Bad::<L>::new(8).offer(0, &[writable, GOOD]).expect(Error::BadFlags);
    Bad::<L>::new(8).offer(0, &[GOOD, writable, GOOD]).expect(Error::BadFlags);
    assert_eq!(Bad::<L>::new(8).offer(0, &[GOOD, writable]).get(), Ok(1));
}

fn a_flag_without_a_meaning_is_ignored<L>() {
    let others = !(NEXT | WRITE | INDIRECT | 0x8080);
    let mut bad = Bad::<L>::new(8);
    bad.offer(0, &[(DATA, 1, others)]).offer(1, &[(DATA, 1, others), GOOD]);
    assert_eq!(bad.get(), Ok(2));
}

fn a_buffer_that_is_not_all_in_memory_is_a_bad_address<L>() {
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
        Bad::<L>::new(8).offer(0, &[(addr, len, 0)]).expect(Error::BadAddress);
        Bad::<L>::new(8).offer(0, &[GOOD, (addr, len, 0)]).expect(Error::BadAddress);
        let mut bad = Bad::<L>::new(8);
        bad.offer_table(TABLE, &[GOOD, (addr, len, WRITE)]).expect(Error::BadAddress);
    }
}

fn a_chain_whose_length_does_not_fit_32_bits_is_a_bad_length<L>() {
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
        let chain = [(DATA, 1 << 31, 0), (DATA, (1 << 31) - 1, 0), (DATA, last, WRITE)];
        for indirect in [false, true] {
            let mut bad = Bad::<L>::new(8);
            if indirect {
                bad.offer_table(TABLE, &chain);
            } else {
                bad.offer(0, &chain);
            }
            let memory = Everything(bad.peer.memory.clone());
            let mut device = L::device_at(memory, &bad.peer.config, bad.peer.start).unwrap();
            let result = device.get(&mut [Chain::default(); 1], &mut [Buffer::default(); 3]);
            assert_eq!(result, if fits { Ok(1) } else { Err(Error::BadLength) });
        }
    }
}

fn the_violation_of_a_later_chain_takes_none_of_its_batch<L>() {
    let mut bad = Bad::<L>::new(8);
    assert_eq!(bad.offer(0, &[GOOD]).get(), Ok(1));
    bad.offer(1, &[GOOD]).offer(8, &[GOOD]).expect(Error::BadId);
}

fn an_id_that_was_never_taken_stays_inside_the_ring<L>() {
    // The fake memory panics on a store beyond the region.
    for in_order in [false, true] {
        let mut bad = Bad::<L>::with(RingConfig { in_order, ..config::<L>(2) });
        for id in [0, 1, 2, 0x8000, u16::MAX] {
            for _ in 0..5 {
                bad.device.put(id, u32::MAX);
                bad.device.put_read(&[Chain { id, first: 0, count: 1 }]);
            }
            bad.device.publish();
        }
        bad.device.unget(usize::MAX);
        let _ = bad.get();
    }
}

fn a_descriptor_that_changes_while_it_is_read_is_used_as_it_was<L>() {
    // Each place, at each moment: what is handed out was checked.
    for loads in 0..10 {
        for at in (0..64).step_by(8) {
            for value in [u64::MAX, 0, NEXT.into(), 0x0005_0005_ffff_ffff, 0x8085_0000_ffff_ffff] {
                let mut bad = Bad::<L>::new(4);
                bad.offer(0, &[GOOD, GOOD]).offer(2, &[(DATA, 9, WRITE)]);
                bad.peer.memory.poke_after(loads, bad.peer.config.desc + at, value);
                let mut chains = [Chain::default(); 4];
                let mut buffers = [Buffer::default(); 4];
                let result = bad.device.get(&mut chains, &mut buffers);
                let buffers = &buffers[..result.map_or(0, |n| chains[..n].iter().map(|c| usize::from(c.count)).sum())];
                for buffer in buffers {
                    assert!(bad.peer.memory.contains(buffer.addr, buffer.len), "{buffer:?}");
                }
            }
        }
    }
}

fn a_table_that_changes_while_it_is_read_is_used_as_it_was<L>() {
    for loads in 0..10 {
        for at in (0..32).step_by(8) {
            for value in [u64::MAX, 0, NEXT.into(), 0x0001_0007_0000_0010] {
                let mut bad = Bad::<L>::new(4);
                bad.offer_table(TABLE, &[GOOD, (DATA, 9, WRITE)]);
                bad.peer.memory.poke_after(loads, TABLE + at, value);
                let mut buffers = [Buffer::default(); 4];
                if bad.device.get(&mut [Chain::default(); 1], &mut buffers).is_ok() {
                    for buffer in buffers {
                        let contains = bad.peer.memory.contains(buffer.addr, buffer.len);
                        assert!(contains || buffer == Buffer::default(), "{buffer:?}");
                    }
                }
            }
        }
    }
}

fn whatever_the_driver_wishes_publishing_ends<L>() {
    for event_idx in [false, true] {
        for flags in 0..=4 {
            for position in [0, 1, 7, 8, 9, 0x7fff, 0x8000, 0x8003, 0x8007, 0x8008, u16::MAX] {
                let mut bad = Bad::<L>::with(RingConfig { event_idx, ..config::<L>(8) });
                for id in 0..8 {
                    bad.offer(id, &[GOOD]);
                }
                assert_eq!(bad.get(), Ok(8));
                for id in 0..8 {
                    bad.device.put(id, 0);
                }
                L::wish(&bad.peer, true, flags, position);
                let call = bad.device.publish();
                // With event indices a split ring has no flags.
                if L::PACKED || !event_idx {
                    match flags {
                        0 => assert!(call),
                        1 => assert!(!call),
                        _ => (),
                    }
                }
            }
        }
    }
}

fn an_indirect_table_that_was_not_negotiated_is_bad_flags_wherever_it_stands<L>() {
    let plain = || Bad::<L>::with(config::<L>(8));
    plain().offer_table(TABLE, &[GOOD]).expect(Error::BadFlags);
    plain().offer(0, &[(DATA, 16, INDIRECT), GOOD]).expect(Error::BadFlags);
    plain().offer(0, &[GOOD, (DATA, 16, INDIRECT)]).expect(Error::BadFlags);
}

fn a_table_is_the_end_of_its_list<L>() {
    Bad::<L>::new(8).offer(0, &[(TABLE, 16, INDIRECT), GOOD]).expect(Error::BadFlags);
    Bad::<L>::new(8).offer(0, &[(TABLE, 16, INDIRECT | NEXT)]).expect(Error::BadFlags);
}

fn a_table_holds_whole_descriptors_and_at_least_one<L>() {
    for len in [0, 1, 15, 17, 31, 16 * 8 + 1, u32::MAX] {
        Bad::<L>::new(8).offer(0, &[(TABLE, len, INDIRECT)]).expect(Error::BadLength);
    }
}

fn a_table_is_no_longer_than_the_ring<L>() {
    for len in [16 * 9, 16 * 0x1_0000, u32::MAX - 15] {
        Bad::<L>::new(8).offer(0, &[(TABLE, len, INDIRECT)]).expect(Error::ChainTooLong);
    }
    assert_eq!(Bad::<L>::new(8).offer_table(TABLE, &[GOOD; 8]).get(), Ok(1));
}

fn a_table_that_is_not_all_in_memory_is_a_bad_address<L>() {
    for at in [0, RING - 16, END - 16, END, u64::MAX - 15, u64::MAX - 31, TABLE + 4, TABLE + 1] {
        Bad::<L>::new(8).offer(0, &[(at, 32, INDIRECT)]).expect(Error::BadAddress);
    }
}

fn a_table_for_the_device_to_write_is_a_table<L>() {
    // The flag has no meaning there.
    let mut bad = Bad::<L>::new(8);
    bad.write_table(TABLE, &[GOOD]);
    assert_eq!(bad.offer(0, &[(TABLE, 16, INDIRECT | WRITE)]).get(), Ok(1));
}

fn a_readable_buffer_behind_a_writable_one_in_a_table_is_bad_flags<L>() {
    let mut bad = Bad::<L>::new(8);
    bad.offer_table(TABLE, &[GOOD, (DATA, 1, WRITE), GOOD]).expect(Error::BadFlags);
    // A frame to send as DPDK's driver puts it into a packed ring (docs/interop.md): the header for the device to write, and the rest to read.
    let mut bad = Bad::<L>::new(8);
    bad.offer_table(TABLE, &[(DATA, 12, WRITE), GOOD, GOOD]).expect(Error::BadFlags);
}

fn a_table_in_a_table_is_never_followed<L>() {
    let mut bad = Bad::<L>::new(8);
    bad.write_table(TABLE + 0x100, &[(DATA + 0x40, 9, 0)]);
    bad.offer_table(TABLE, &[(TABLE + 0x100, 16, INDIRECT)]);
    if L::PACKED {
        // Section 2.8.7: the flag is ignored.
        let got = get(&mut bad.device, 8);
        assert_eq!(got[0].1, [Buffer { addr: TABLE + 0x100, len: 16, device_writes: false }]);
    } else {
        bad.expect(Error::BadFlags);
    }
}

fn a_table_that_lies_in_the_ring_ends<L>() {
    // Of the ring's own descriptors, the one that refers to them among them.
    let mut bad = Bad::<L>::new(8);
    let ring = bad.peer.config.desc;
    bad.offer(0, &[(ring, 16 * 8, INDIRECT)]);
    let _ = bad.get();
}

fn a_table_without_room_waits_and_one_that_never_fits_is_too_long<L>() {
    let mut bad = Bad::<L>::new(8);
    bad.offer(1, &[GOOD]).offer_table(TABLE, &[GOOD; 3]);
    let mut chains = [Chain::default(); 4];
    let mut buffers = [Buffer::default(); 3];
    assert_eq!(bad.device.get(&mut chains, &mut buffers), Ok(1));
    assert_eq!(bad.device.get(&mut chains, &mut buffers), Ok(1));
    bad.device.unget(1);
    let result = bad.device.get(&mut chains, &mut buffers[..2]);
    assert_eq!(result, Err(Error::ChainTooLong));
}

}
