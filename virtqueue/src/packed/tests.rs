//! What only the packed layout has.

use std::vec::Vec;

use super::*;
use crate::test_memory::Fake;
use crate::tests::{DATA, buffer, config, fake, get, pair, take};
use crate::{Chain, DeviceRing, DriverRing, Used};

#[test]
fn every_size_up_to_the_largest_is_one() {
    let sizes = (0..=u16::MAX).filter(|size| Packed::area_sizes(*size).is_some());
    assert!(sizes.eq(1..=MAX_SIZE));
    assert_eq!(Packed::area_sizes(768), Some([12288, 4, 4]));
}

#[test]
fn a_base_outside_the_ring_or_in_front_of_what_is_used_is_refused() {
    let (memory, config) = (fake(), config::<Packed>(6));
    let base = |next: u32, used: u32| next | used << 16;
    for (at, empty) in [
        (base(0x8000, 0x8000), true),
        (base(0x8005, 0x8005), true),
        (base(0, 0), true),
        (base(5, 5), true),
        // Taken and not used: one; up to the end of the ring; around it; all of it.
        (base(0x8003, 0x8002), false),
        (base(0x0000, 0x8002), false),
        (base(0x0001, 0x8002), false),
        (base(0x8002, 0x0002), false),
    ] {
        let driver = Driver::with_base(memory.clone(), &config, at);
        assert_eq!(driver.err(), (!empty).then_some(Error::Config), "{at:x}");
        let device = Device::with_base(memory.clone(), &config, at).unwrap();
        assert_eq!(device.base(), at);
    }
    for at in [
        base(0x8006, 0x8006),
        base(0x8000, 0x8006),
        base(0x8006, 0x8000),
        base(0x7fff, 0x8000),
        // Less than nothing, more than everything.
        base(0x8001, 0x8002),
        base(0x0003, 0x8002),
        base(0x8003, 0x0002),
    ] {
        let device = Device::with_base(memory.clone(), &config, at);
        assert_eq!(device.err(), Some(Error::Config), "{at:x}");
    }
}

fn position(slot: u16, wrap: bool) -> Position {
    Position(slot | u16::from(wrap) << 15)
}

#[test]
fn a_position_is_as_far_ahead_as_it_was_stepped() {
    for size in [1, 2, 3, 768, MAX_SIZE] {
        for slot in [0, 1, size / 2, size - 1].map(|slot| slot.min(size - 1)) {
            for wrap in [false, true] {
                let from = position(slot, wrap);
                assert_eq!((from.slot(), from.wrap()), (slot, wrap));
                for count in [0, 1, size / 2, size - 1, size] {
                    let to = from.step(count, size);
                    assert!(to.slot() < size);
                    assert_eq!(to.ahead(from, size), i32::from(count));
                    assert_eq!(to.back(count, size), from);
                }
            }
        }
    }
}

#[test]
fn an_event_is_wanted_when_it_is_one_of_the_places_passed() {
    for size in [1u16, 2, 5, 8, 13] {
        for first in 0..2 * size {
            let at = |n: u16| Position::START.step(n % size, size);
            let from = if first < size {
                at(first)
            } else {
                at(first).other_turn()
            };
            for count in 1..=size {
                let places: Vec<_> = (0..count).map(|n| from.step(n, size)).collect();
                for slot in 0..size {
                    for wrap in [false, true] {
                        let event = position(slot, wrap);
                        let word = EVENT_DESC | u32::from(event.0);
                        let wanted = wants(word, true, from, count, size);
                        assert_eq!(
                            wanted,
                            places.contains(&event),
                            "{from:?} {count} {event:?}"
                        );
                        assert!(!wants(
                            word & 0xffff | EVENT_DISABLE,
                            true,
                            from,
                            count,
                            size
                        ));
                        assert!(wants(word & 0xffff, true, from, count, size));
                        // Reserved, and not negotiated.
                        assert!(wants(word | EVENT_FLAGS, true, from, count, size));
                        assert!(wants(word, false, from, count, size));
                    }
                }
            }
        }
    }
}

/// The descriptor in a slot: address, length, id, flags.
fn descriptor(memory: &Fake, config: &RingConfig, slot: u64) -> (u64, u32, u16, u16) {
    let at = config.desc + 16 * slot;
    (
        u64::from_le_bytes(memory.peek(at)),
        u32::from_le_bytes(memory.peek(at + 8)),
        memory.peek_u16(at + 12),
        memory.peek_u16(at + 14),
    )
}

#[test]
fn descriptors_are_as_the_specification_has_them() {
    let (memory, config) = (fake(), config::<Packed>(3));
    let (mut driver, mut device) = pair::<Packed>(&memory, &config, Packed::FRESH);
    let (read, write) = (buffer(1, false), buffer(2, true));
    let first = driver.add(&[read, write]).unwrap();
    driver.publish();
    let d = |slot| descriptor(&memory, &config, slot);
    // NEXT and AVAIL; WRITE and AVAIL.
    assert_eq!(d(0), (read.addr, read.len, first, 0x0081));
    assert_eq!(d(1), (write.addr, write.len, first, 0x0082));
    assert_eq!(d(2), (0, 0, 0, 0));
    assert_eq!(get(&mut device, 1).len(), 1);
    device.put(first, 3);
    device.publish();
    // Used with something written. Only the first descriptor of the list.
    assert_eq!(d(0), (read.addr, 3, first, 0x8082));
    assert_eq!(d(1), (write.addr, write.len, first, 0x0082));
    take(&mut driver, 1);
    let second = driver.add(&[read]).unwrap();
    let third = driver.add(&[write]).unwrap();
    driver.publish();
    assert_eq!(d(2), (read.addr, read.len, second, 0x0080));
    // The driver's wrap counter has changed: USED instead of AVAIL.
    assert_eq!(d(0), (write.addr, write.len, third, 0x8002));
    assert_eq!(get(&mut device, 2).len(), 2);
    device.put(third, 0);
    device.put(second, 0);
    device.publish();
    assert_eq!(d(2), (read.addr, 0, third, 0x8080));
    // The device's wrap counter has changed.
    assert_eq!(d(0), (write.addr, 0, second, 0));
    let used = take(&mut driver, 2);
    assert_eq!(used, [third, second].map(|id| Used { id, len: 0 }));
}

#[test]
fn an_indirect_descriptor_is_as_the_specification_has_it() {
    let config = RingConfig {
        indirect: true,
        ..config::<Packed>(2)
    };
    let memory = fake();
    let (mut driver, _) = pair::<Packed>(&memory, &config, Packed::FRESH);
    let (read, write) = (buffer(1, false), buffer(2, true));
    let id = driver.add_indirect(DATA, &[read, write]).unwrap();
    driver.publish();
    assert_eq!(descriptor(&memory, &config, 0), (DATA, 32, id, 0x0084));
    let table = RingConfig {
        desc: DATA,
        ..config
    };
    assert_eq!(descriptor(&memory, &table, 0), (read.addr, read.len, 0, 0));
    assert_eq!(
        descriptor(&memory, &table, 1),
        (write.addr, write.len, 0, 2)
    );
}

#[test]
fn event_structures_are_as_the_specification_has_them() {
    let config = RingConfig {
        event_idx: true,
        ..config::<Packed>(3)
    };
    let memory = fake();
    let (mut driver, mut device) = pair::<Packed>(&memory, &config, Packed::FRESH);
    let area = |at| u32::from_le_bytes(memory.peek(at));
    assert_eq!(
        (area(config.driver), area(config.device)),
        (0x2_8000, 0x2_8000)
    );
    for n in 0..3 {
        driver.add(&[buffer(n, false)]).unwrap();
    }
    driver.publish();
    let got: Vec<_> = get(&mut device, 3)
        .iter()
        .map(|(chain, _)| *chain)
        .collect();
    device.put_read(&got[..2]);
    device.publish();
    take(&mut driver, 3);
    driver.enable_calls();
    device.enable_kicks();
    // Place 2 in the first turn, place 0 in the second.
    assert_eq!(
        (area(config.driver), area(config.device)),
        (0x2_8002, 0x2_0000)
    );
    driver.disable_calls();
    device.disable_kicks();
    assert_eq!(area(config.driver) >> 16, 1);
    assert_eq!(area(config.device) >> 16, 1);
}

#[test]
fn nothing_of_a_batch_is_seen_before_its_first_descriptor() {
    // Whatever the place of the first, and around the end.
    for slot in 0..8 {
        let (memory, config) = (fake(), config::<Packed>(8));
        let start = (slot | 0x8000) * 0x1_0001;
        let (mut driver, mut device) = pair::<Packed>(&memory, &config, start);
        let ids: Vec<_> = (0..8)
            .map(|n| driver.add(&[buffer(n, true)]).unwrap())
            .collect();
        let flags = |slot: u32| descriptor(&memory, &config, (slot % 8).into()).3;
        assert_eq!(flags(slot), 0, "as it was");
        assert!((slot + 1..slot + 8).all(|slot| flags(slot) & 0x8080 != 0x8080));
        assert!(get(&mut device, 8).is_empty());
        driver.publish();
        assert_eq!(get(&mut device, 8).len(), 8);
        for id in ids {
            device.put(id, 1);
        }
        assert!(take(&mut driver, 8).is_empty());
        device.publish();
        assert_eq!(take(&mut driver, 8).len(), 8);
    }
}

/// What a device makes of descriptors that are written by hand, from the start of a ring of `size` on.
fn by_hand(size: u16, descriptors: &[(u64, u32, u16, u16)]) -> Result<Vec<Chain>, Error> {
    let config = RingConfig {
        indirect: true,
        ..config::<Packed>(size)
    };
    let memory = fake();
    let (_, mut device) = pair::<Packed>(&memory, &config, Packed::FRESH);
    for (n, (addr, len, id, flags)) in (0u64..).zip(descriptors) {
        let at = config.desc + 16 * n;
        memory.poke(at, addr.to_le_bytes());
        memory.poke(at + 8, len.to_le_bytes());
        memory.poke(at + 12, id.to_le_bytes());
        memory.poke(at + 14, flags.to_le_bytes());
    }
    let mut chains = [Chain::default(); 16];
    let count = device.get(&mut chains, &mut [Buffer::default(); 32])?;
    Ok(chains[..count].to_vec())
}

#[test]
fn a_list_whose_rest_is_not_available_is_bad_flags() {
    // As in the turn before, as in the next one, as used.
    for state in [0, 0x8000, 0x8080] {
        let list = [(DATA, 1, 0, 0x81), (DATA, 1, 0, state)];
        assert_eq!(by_hand(4, &list), Err(Error::BadFlags));
    }
    let list = [(DATA, 1, 0, 0x81), (DATA, 1, 0, 0x80)];
    assert_eq!(by_hand(4, &list).map(|chains| chains.len()), Ok(1));
}

#[test]
fn a_list_that_goes_on_where_the_wrap_counter_has_not_changed_is_bad_flags() {
    // The last descriptor's next is the first of the ring, with the flags of the same turn.
    let list = [(DATA, 1, 0, 0x80), (DATA, 1, 1, 0x81)];
    assert_eq!(by_hand(2, &list), Err(Error::ChainTooLong));
    let config = config::<Packed>(2);
    let memory = fake();
    let (_, mut device) = pair::<Packed>(&memory, &config, 0x8001_8001);
    memory.poke(config.desc + 16, DATA.to_le_bytes());
    memory.poke(config.desc + 24, 0x0081_0000_0000_0001u64.to_le_bytes());
    memory.poke(config.desc, DATA.to_le_bytes());
    memory.poke(config.desc + 8, 0x0080_0000_0000_0001u64.to_le_bytes());
    let result = device.get(&mut [Chain::default(); 2], &mut [Buffer::default(); 4]);
    assert_eq!(result, Err(Error::BadFlags));
}

#[test]
fn a_descriptor_is_available_in_its_turn_only() {
    for (flags, chains) in [(0x0080, 1), (0x8000, 0), (0x8080, 0), (0, 0)] {
        let got = by_hand(4, &[(DATA, 1, 0, flags)]).unwrap();
        assert_eq!(got.len(), chains, "{flags:x}");
    }
}

#[test]
fn the_id_of_a_list_is_that_of_its_last_descriptor() {
    let list = [
        (DATA, 1, 77, 0x81),
        (DATA, 1, u16::MAX, 0x81),
        (DATA, 1, 3, 0x80),
    ];
    assert_eq!(by_hand(4, &list).unwrap()[0].id, 3);
    let list = [(DATA, 1, 0, 0x81), (DATA, 1, 4, 0x80)];
    assert_eq!(by_hand(4, &list), Err(Error::BadId));
}

#[test]
fn an_id_that_is_outstanding_is_not_taken_again() {
    let twice = [(DATA, 1, 2, 0x80), (DATA, 1, 2, 0x80)];
    assert_eq!(by_hand(4, &twice), Err(Error::BadId));
    let config = config::<Packed>(4);
    for in_order in [false, true] {
        let config = RingConfig { in_order, ..config };
        let memory = fake();
        let (_, mut device) = pair::<Packed>(&memory, &config, Packed::FRESH);
        let mut offer = |slot: u64| {
            memory.poke(config.desc + 16 * slot, DATA.to_le_bytes());
            memory.poke(
                config.desc + 16 * slot + 8,
                0x0080_0002_0000_0001u64.to_le_bytes(),
            );
            let mut buffers = [Buffer::default(); 4];
            let result = device.get(&mut [Chain::default(); 4], &mut buffers);
            if slot == 0 {
                device.put(2, 0);
                device.publish();
            }
            result
        };
        assert_eq!([0, 1, 2].map(&mut offer), [Ok(1), Ok(1), Err(Error::BadId)]);
    }
}

#[test]
fn a_used_descriptor_of_another_turn_is_none() {
    for in_order in [false, true] {
        for state in [0x0000, 0x0080, 0x8000, 0x8080] {
            let config = RingConfig {
                in_order,
                ..config::<Packed>(2)
            };
            let memory = fake();
            let (mut driver, _) = pair::<Packed>(&memory, &config, Packed::FRESH);
            let id = driver.add(&[buffer(9, true)]).unwrap();
            driver.publish();
            memory.poke(config.desc + 12, id.to_le_bytes());
            memory.poke(config.desc + 8, 10u32.to_le_bytes());
            memory.poke(config.desc + 14, u16::to_le_bytes(state));
            let count = usize::from(state == 0x8080);
            assert_eq!(take(&mut driver, 2).len(), count, "{state:x}");
        }
    }
}

#[test]
fn a_length_counts_without_the_flag_that_says_that_there_is_one() {
    let (memory, config) = (fake(), config::<Packed>(2));
    let (mut driver, _) = pair::<Packed>(&memory, &config, Packed::FRESH);
    driver.add(&[buffer(9, true)]).unwrap();
    driver.publish();
    memory.poke(config.desc + 8, 0x8080_0000_0000_000au64.to_le_bytes());
    assert_eq!(take(&mut driver, 2), [Used { id: 0, len: 10 }]);
}

#[test]
fn in_order_ids_count() {
    let config = RingConfig {
        in_order: true,
        ..config::<Packed>(5)
    };
    let memory = fake();
    let (mut driver, mut device) = pair::<Packed>(&memory, &config, Packed::FRESH);
    let mut n = 0;
    for round in 0..20 {
        let chain = [buffer(round, true), buffer(round, true)];
        for length in [2, 1, 2] {
            assert_eq!(driver.add(&chain[..length]), Some(n % 5));
            n += 1;
        }
        driver.publish();
        // One that stands for all of them.
        assert_eq!(get(&mut device, 9).len(), 3);
        device.put((n - 1) % 5, 1);
        device.publish();
        let ids: Vec<_> = take(&mut driver, 9).iter().map(|used| used.id).collect();
        assert_eq!(ids, [(n - 3) % 5, (n - 2) % 5, (n - 1) % 5]);
    }
}
