//! What a hostile device can write, one test a violation; each latches.

use super::peers::{Peer, Raw, hostile};
use super::*;

/// A driver's ring whose device is the test. Outstanding: a chain of three with 10 writable bytes, and one that is read only.
struct Bad<L: Layout> {
    peer: Peer,
    driver: L::Driver<Fake>,
    writable: u16,
    readable: u16,
}

impl<L: Raw> Bad<L> {
    fn new(in_order: bool) -> Self {
        Self::with(RingConfig {
            in_order,
            ..config::<L>(8)
        })
    }

    fn with(config: RingConfig) -> Self {
        let memory = fake();
        let start = L::start(8, 2);
        let mut driver = L::driver_at(memory.clone(), &config, start).unwrap();
        let buffer = |len, device_writes| Buffer {
            addr: DATA,
            len,
            device_writes,
        };
        let chain = [buffer(100, false), buffer(4, true), buffer(6, true)];
        let writable = driver.add(&chain).unwrap();
        let readable = driver.add(&chain[..1]).unwrap();
        driver.publish();
        let peer = Peer {
            memory,
            config,
            start,
            offered: 0,
            used: 0,
        };
        Self {
            peer,
            driver,
            writable,
            readable,
        }
    }

    /// A used chain, which takes `descriptors` in the ring.
    fn put(&mut self, id: impl Into<u32>, len: u32, descriptors: u16) -> &mut Self {
        L::put(&mut self.peer, id.into(), len, 1, descriptors);
        self
    }

    /// The two that are outstanding.
    fn put_writable(&mut self, len: u32) -> &mut Self {
        self.put(self.writable, len, 3)
    }

    fn put_readable(&mut self, len: u32) -> &mut Self {
        self.put(self.readable, len, 1)
    }

    fn take(&mut self) -> Result<usize, Error> {
        self.driver.take(&mut [Used::default(); 8])
    }

    /// Reported once; then the queue is broken: nothing is taken, added or published.
    fn expect(&mut self, error: Error) {
        assert_eq!(self.take(), Err(error));
        self.peer.used = 0;
        self.put_writable(0);
        assert_eq!(self.take(), Err(Error::Broken));
        assert_eq!(self.driver.free(), 0);
        let buffer = buffer(0, true);
        assert_eq!(self.driver.add(&[buffer]), None);
        assert_eq!(self.driver.add_indirect(DATA, &[buffer]), None);
        self.peer.memory.stores();
        assert!(!self.driver.publish());
        assert_eq!(self.peer.memory.stores(), []);
        self.driver.enable_calls();
        self.driver.disable_calls();
        assert_eq!(self.take(), Err(Error::Broken));
    }
}

hostile! {

fn a_chain_used_before_any_was_published_is_a_violation<L>() {
    for in_order in [false, true] {
        for id in 0..9u16 {
            let memory = fake();
            let config = RingConfig { in_order, ..config::<L>(8) };
            let start = L::start(8, 8);
            let mut driver = L::driver_at(memory.clone(), &config, start).unwrap();
            // Added, but the device cannot know.
            driver.add(&[buffer(0, true)]).unwrap();
            let mut peer = Peer { memory, config, start, offered: 0, used: 0 };
            L::put(&mut peer, id.into(), 0, 1, 1);
            let result = driver.take(&mut [Used::default(); 8]);
            assert_eq!(result, Err(L::TOO_MANY_USED));
        }
    }
}

fn more_used_chains_than_are_outstanding_are_a_violation<L>() {
    for in_order in [false, true] {
        for again in 0..8u16 {
            let mut bad = Bad::<L>::new(in_order);
            bad.put_writable(0).put_readable(0).put(again, 0, 1).expect(L::TOO_MANY_USED);
        }
    }
}

fn chains_that_are_not_published_cannot_be_used<L>() {
    for in_order in [false, true] {
        let mut bad = Bad::<L>::new(in_order);
        let id = bad.driver.add(&[buffer(0, true)]).unwrap();
        bad.put_writable(0).put_readable(0).put(id, 0, 1).expect(L::TOO_MANY_USED);

        let mut bad = Bad::<L>::new(in_order);
        let id = bad.driver.add(&[buffer(0, true)]).unwrap();
        bad.put(id, 0, 1).expect(Error::BadId);
    }
}

fn chains_that_are_not_published_are_outstanding_afterwards<L>() {
    let mut bad = Bad::<L>::new(false);
    let late = [buffer(0, true), buffer(1, true)];
    let id = bad.driver.add(&late).unwrap();
    let other = bad.driver.add(&late[..1]).unwrap();
    assert_eq!(bad.put_readable(0).take(), Ok(1));
    bad.driver.publish();
    assert_eq!(bad.put(other, 1, 1).put(id, 3, 2).take(), Ok(2));
    assert_eq!(bad.put_writable(10).take(), Ok(1));
    assert_eq!(bad.driver.free(), 8);
}

fn an_id_that_names_nothing_outstanding_is_a_bad_id<L>() {
    // Outside the ring, free, and inside of a chain.
    for in_order in [false, true] {
        for id in [8, 9, 0x7fff, 0xffff, 0x1_0000, u32::MAX, 7, 4, 5] {
            Bad::<L>::new(in_order).put(id, 0, 1).expect(Error::BadId);
        }
    }
}

fn a_chain_is_used_once<L>() {
    for in_order in [false, true] {
        let mut bad = Bad::<L>::new(in_order);
        assert_eq!(bad.put_writable(0).take(), Ok(1));
        bad.put_writable(0).expect(Error::BadId);

        let mut bad = Bad::<L>::new(in_order);
        bad.put_writable(0).put_writable(0).expect(Error::BadId);
    }
}

fn a_chain_that_is_offered_again_can_be_used_again<L>() {
    for in_order in [false, true] {
        let mut bad = Bad::<L>::new(in_order);
        assert_eq!(bad.put_writable(10).put_readable(0).take(), Ok(2));
        for n in 0..30 {
            let id = bad.driver.add(&[buffer(n, true), buffer(n, true)]).unwrap();
            bad.driver.publish();
            assert_eq!(bad.put(id, 1, 2).take(), Ok(1));
        }
    }
}

fn in_order_an_element_stands_for_all_before_it_and_they_are_full<L>() {
    let mut bad = Bad::<L>::new(true);
    L::put(&mut bad.peer, bad.readable.into(), 0, 2, 4);
    let used = take(&mut bad.driver, 8);
    assert_eq!(used, [(bad.writable, 10), (bad.readable, 0)].map(|(id, len)| Used { id, len }));
    assert_eq!(bad.driver.free(), 8);
}

fn in_order_an_element_stands_for_nothing_when_it_names_nothing_outstanding<L>() {
    for id in [7, 8, 0xffff, 5] {
        let mut bad = Bad::<L>::new(true);
        L::put(&mut bad.peer, id, 0, 2, 4);
        // Not one chain is taken on its word.
        let result = bad.driver.take(&mut [Used::default(); 1]);
        assert_eq!(result, Err(Error::BadId));
    }
}

fn in_order_an_element_does_not_stand_for_what_is_not_published<L>() {
    let mut bad = Bad::<L>::new(true);
    let id = bad.driver.add(&[buffer(0, true)]).unwrap();
    L::put(&mut bad.peer, id.into(), 0, 2, 5);
    bad.expect(Error::BadId);
}

fn in_order_the_length_is_that_of_the_last_chain<L>() {
    let mut bad = Bad::<L>::new(true);
    // It would fit the first of the three.
    let id = bad.driver.add(&[buffer(0, true)]).unwrap();
    bad.driver.publish();
    L::put(&mut bad.peer, id.into(), 10, 3, 5);
    bad.expect(Error::BadLength);
}

fn a_length_beyond_the_writable_bytes_is_a_bad_length<L>() {
    for in_order in [false, true] {
        for len in [11, 110, u32::MAX] {
            Bad::<L>::new(in_order).put_writable(len).expect(Error::BadLength);
        }
        assert_eq!(Bad::<L>::new(in_order).put_writable(10).take(), Ok(1));
    }
}

fn a_length_where_nothing_could_be_written_is_ignored_in_packed_rings_alone<L>() {
    for in_order in [false, true] {
        // On its own, and as the last of a batch.
        for batch in [false, true] {
            for len in [1, 100, u32::MAX] {
                let mut bad = Bad::<L>::new(in_order);
                let ids = [bad.writable, bad.readable];
                if batch && in_order {
                    L::put(&mut bad.peer, bad.readable.into(), len, 2, 4);
                } else {
                    bad.put_writable(10).put_readable(len);
                }
                if !L::PACKED {
                    bad.expect(Error::BadLength);
                    continue;
                }
                let used = take(&mut bad.driver, 8);
                assert_eq!(used, [(ids[0], 10), (ids[1], 0)].map(|(id, len)| Used { id, len }));
                assert_eq!(bad.driver.free(), 8);
            }
        }
    }
}

fn a_length_beyond_the_writable_bytes_of_a_table_is_a_bad_length<L>() {
    for (len, fits) in [(10, true), (11, false), (16, false)] {
        let mut bad = Bad::<L>::with(RingConfig { indirect: true, ..config::<L>(8) });
        let chain = [buffer(99, false), buffer(3, true), buffer(5, true)];
        assert_eq!(writable(&chain), 10);
        let id = bad.driver.add_indirect(DATA, &chain).unwrap();
        bad.driver.publish();
        bad.put(id, len, 1);
        assert_eq!(bad.take(), if fits { Ok(1) } else { Err(Error::BadLength) });
    }
}

fn what_the_device_does_to_the_ring_and_to_a_table_changes_nothing<L>() {
    let mut bad = Bad::<L>::with(RingConfig { indirect: true, ..config::<L>(8) });
    let chain = [buffer(99, false), buffer(3, true)];
    let table = bad.driver.add_indirect(DATA, &chain).unwrap();
    bad.driver.publish();
    for at in (0..16 * 8).step_by(8) {
        // In the packed layout these are no used descriptors, whatever the turn.
        let value = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        bad.peer.memory.poke(bad.peer.config.desc + at, value);
    }
    bad.peer.memory.poke(DATA, [0xff; 32]);
    let area = bad.peer.config.driver;
    for at in (2..u64::try_from(L::area_sizes(8).unwrap()[1]).unwrap()).step_by(2) {
        bad.peer.memory.poke(area + at, [0xff; 2]);
    }
    assert_eq!(bad.put_readable(0).put_writable(10).put(table, 4, 1).take(), Ok(3));
    assert_eq!(bad.driver.free(), 8);
    let mut ids: Vec<_> = (0..8)
        .map(|n| bad.driver.add(&[buffer(n, true)]).unwrap())
        .collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..8));
}

fn an_element_that_changes_while_it_is_read_is_used_as_it_was<L>() {
    for in_order in [false, true] {
        for loads in 0..6 {
            for at in 0..8 {
                for value in [u64::MAX, 0, 0x8080_0007_ffff_ffff, 0x8080_0000_0000_000a, 0x0000_00ff_0000_0001] {
                    let mut bad = Bad::<L>::new(in_order);
                    let ids = [bad.writable, bad.readable];
                    bad.put_writable(10).put_readable(0);
                    let area = if L::PACKED { bad.peer.config.desc } else { bad.peer.config.device };
                    bad.peer.memory.poke_after(loads, area + 8 * at, value);
                    let mut out = [Used::default(); 8];
                    let Ok(count) = bad.driver.take(&mut out) else {
                        continue;
                    };
                    assert!(count <= 2);
                    for used in &out[..count] {
                        assert!(ids.contains(&used.id) && used.len <= 10, "{used:?}");
                    }
                }
            }
        }
    }
}

fn whatever_the_device_wishes_publishing_ends<L>() {
    for event_idx in [false, true] {
        for flags in 0..=4 {
            for position in [0, 1, 7, 8, 9, 0x7fff, 0x8000, 0x8003, 0x8007, 0x8008, u16::MAX] {
                let mut bad = Bad::<L>::with(RingConfig { event_idx, ..config::<L>(8) });
                bad.driver.add(&[buffer(0, true), buffer(1, true)]).unwrap();
                L::wish(&bad.peer, false, flags, position);
                let kick = bad.driver.publish();
                // With event indices a split ring has no flags.
                if L::PACKED || !event_idx {
                    match flags {
                        0 => assert!(kick),
                        1 => assert!(!kick),
                        _ => (),
                    }
                }
            }
        }
    }
}

fn after_a_violation_the_rest_of_its_batch_is_not_taken<L>() {
    for in_order in [false, true] {
        let mut bad = Bad::<L>::new(in_order);
        bad.put_writable(0).put(8u16, 0, 1).put_readable(0);
        assert!(bad.take().is_err());
        assert_eq!(bad.take(), Err(Error::Broken));
    }
}

}
