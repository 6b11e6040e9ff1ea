//! Properties of both halves together, over a strict memory.

mod handshake;
mod hostile;
mod model;
mod oracle;

use std::thread;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::linear;
use crate::test_memory::{Fake, Store};
use crate::{Chain, DeviceRing, DriverRing, Used};

/// Where tests put the descriptor table.
const RING: u64 = 0x1_0000;
/// Where their buffers are: behind the areas of the longest ring.
const DATA: u64 = 0x10_0000;
/// Where their memory ends.
const END: u64 = 0x20_0000;

/// Areas with no more alignment than they need, and a gap behind each.
fn config(size: u16) -> RingConfig {
    let driver = RING + 16 * u64::from(size) + 2;
    let device = (driver + 6 + 2 * u64::from(size) + 2).next_multiple_of(4);
    RingConfig {
        size,
        desc: RING,
        driver,
        device,
        event_idx: false,
        in_order: false,
    }
}

fn fake() -> Fake {
    Fake::new(RING, usize::try_from(END - RING).unwrap())
}

type Pair = (Driver<Fake>, Device<Fake>);

fn pair(memory: &Fake, config: &RingConfig, base: u32) -> Pair {
    let driver = Driver::with_base(memory.clone(), config, base).unwrap();
    let device = Device::with_base(memory.clone(), config, base).unwrap();
    memory.stores();
    (driver, device)
}

/// A buffer that can be told from others.
fn buffer(n: u32, device_writes: bool) -> Buffer {
    Buffer {
        addr: DATA + u64::from(n % 0x8000) * 16,
        len: n % 1000 + 1,
        device_writes,
    }
}

/// Gets everything there is, up to `limit` chains.
fn get(device: &mut impl DeviceRing, limit: usize) -> Vec<(Chain, Vec<Buffer>)> {
    let mut chains = vec![Chain::default(); limit];
    let mut buffers = vec![Buffer::default(); limit.max(64)];
    let count = device.get(&mut chains, &mut buffers).unwrap();
    let of = |chain: &Chain| {
        let first = usize::from(chain.first);
        buffers[first..first + usize::from(chain.count)].to_vec()
    };
    chains[..count]
        .iter()
        .map(|chain| (*chain, of(chain)))
        .collect()
}

fn take(driver: &mut impl DriverRing, limit: usize) -> Vec<Used> {
    let mut out = vec![Used::default(); limit];
    let count = driver.take(&mut out).unwrap();
    out.truncate(count);
    out
}

#[test]
fn a_configuration_that_does_not_fit_is_refused() {
    let good = config(8);
    let bad = [
        RingConfig { size: 0, ..good },
        RingConfig { size: 3, ..good },
        RingConfig {
            size: 32769,
            ..good
        },
        RingConfig {
            size: u16::MAX,
            ..good
        },
        RingConfig {
            desc: good.desc + 8,
            ..good
        },
        RingConfig {
            driver: good.driver + 1,
            ..good
        },
        RingConfig {
            device: good.device + 2,
            ..good
        },
        RingConfig {
            desc: RING - 16,
            ..good
        },
        RingConfig {
            desc: END - 16 * 7,
            ..good
        },
        RingConfig {
            driver: END - 6 - 2 * 8 + 2,
            ..good
        },
        RingConfig {
            device: END - 6 - 8 * 8 + 2,
            ..good
        },
        RingConfig {
            desc: u64::MAX - 15,
            ..good
        },
        RingConfig {
            device: u64::MAX - 3,
            ..good
        },
    ];
    for config in bad {
        let driver = Driver::new(fake(), &config);
        assert_eq!(driver.err(), Some(Error::Config), "{config:?}");
        let device = Device::new(fake(), &config);
        assert_eq!(device.err(), Some(Error::Config), "{config:?}");
    }
    assert!(Driver::new(fake(), &good).is_ok());
    assert!(Device::new(fake(), &good).is_ok());
    let exact = RingConfig {
        desc: END - 16 * 8,
        ..good
    };
    assert!(Device::new(fake(), &exact).is_ok());
}

#[test]
fn a_base_that_is_no_index_or_does_not_follow_the_used_index_is_refused() {
    let (memory, config) = (fake(), config(8));
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
fn everything_added_comes_out_in_order_and_comes_back() {
    for (size, base) in [(1, 65535), (2, 65534), (256, 65500), (32768, 40000)] {
        for event_idx in [false, true] {
            for in_order in [false, true] {
                let config = RingConfig {
                    event_idx,
                    in_order,
                    ..config(size)
                };
                let memory = fake();
                let (mut driver, mut device) = pair(&memory, &config, base);
                let mut n = 0u32;
                // Three times around the ring, full each time.
                for _ in 0..3 {
                    let mut sent = Vec::new();
                    while driver.free() > 0 {
                        let buffer = buffer(n, n.is_multiple_of(2));
                        sent.push((driver.add(&[buffer]).unwrap(), buffer));
                        n += 1;
                    }
                    assert_eq!(sent.len(), usize::from(size));
                    assert_eq!(driver.add(&[buffer(n, true)]), None);
                    assert!(get(&mut device, 1).is_empty(), "not published");
                    driver.publish();
                    let got = get(&mut device, 40_000);
                    let expected: Vec<_> = sent.iter().map(|&(id, b)| (id, vec![b])).collect();
                    let actual: Vec<_> = got.into_iter().map(|(c, b)| (c.id, b)).collect();
                    assert_eq!(actual, expected);
                    let mut uses = Vec::new();
                    for &(id, buffer) in &sent {
                        let len = if buffer.device_writes { buffer.len } else { 0 };
                        device.put(id, len);
                        uses.push(Used { id, len });
                    }
                    assert!(take(&mut driver, 1).is_empty(), "not published");
                    device.publish();
                    assert_eq!(take(&mut driver, 40_000), uses);
                    assert_eq!(driver.free(), size);
                }
            }
        }
    }
}

#[test]
fn in_batches_of_any_size_the_indices_wrap_at_sixteen_bits() {
    for batch in [1usize, 3, 7, 8] {
        let memory = fake();
        let (mut driver, mut device) = pair(&memory, &config(8), 60_000);
        let mut n = 0u32;
        while n < 10_000 {
            let first = n;
            for _ in 0..batch {
                driver.add(&[buffer(n, true)]).unwrap();
                n += 1;
            }
            driver.publish();
            let got = get(&mut device, batch);
            assert_eq!(got.len(), batch);
            for ((chain, buffers), n) in got.iter().zip(first..) {
                assert_eq!(buffers, &[buffer(n, true)]);
                device.put(chain.id, n % 2);
            }
            device.publish();
            let used = take(&mut driver, batch);
            assert!(used.iter().map(|u| u.len).eq((first..n).map(|n| n % 2)));
            memory.stores();
        }
    }
}

#[test]
fn a_batch_costs_one_store_of_the_index_behind_all_others() {
    let (memory, config) = (fake(), config(32));
    let (mut driver, mut device) = pair(&memory, &config, 0);
    for n in 0..16 {
        driver.add(&[buffer(n, false)]).unwrap();
    }
    // A descriptor is two stores, its entry in the ring one.
    let stores = memory.stores();
    assert_eq!(stores.len(), 16 * 3);
    assert!(
        stores
            .iter()
            .all(|s| s.addr != config.driver + 2 && !s.release)
    );
    driver.publish();
    let index = |addr, value| Store {
        addr,
        value,
        release: true,
    };
    assert_eq!(memory.stores(), [index(config.driver + 2, 16)]);

    let got = get(&mut device, 32);
    assert_eq!(memory.stores(), []);
    for (chain, _) in &got {
        device.put(chain.id, 0);
    }
    let stores = memory.stores();
    assert_eq!(stores.len(), 16 * 2);
    assert!(
        stores
            .iter()
            .all(|s| s.addr != config.device + 2 && !s.release)
    );
    device.publish();
    assert_eq!(memory.stores(), [index(config.device + 2, 16)]);
    assert_eq!(take(&mut driver, 32).len(), 16);
    assert_eq!(memory.stores(), []);
}

#[test]
fn publishing_nothing_stores_nothing_and_asks_for_nothing() {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config(4), 7);
    assert!(!driver.publish());
    assert!(!device.publish());
    assert_eq!(memory.stores(), []);
    driver.add(&[buffer(0, true)]).unwrap();
    assert!(driver.publish());
    memory.stores();
    assert!(!driver.publish());
    assert_eq!(memory.stores(), []);
}

#[test]
fn a_chain_comes_out_whole_and_its_descriptors_are_free_again() {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config(8), 65535);
    for round in 0..20 {
        let a: Vec<_> = (0..3).map(|n| buffer(round + n, n == 2)).collect();
        let b: Vec<_> = (0..4).map(|n| buffer(round + 9 + n, n > 0)).collect();
        let first = driver.add(&a).unwrap();
        let second = driver.add(&b).unwrap();
        assert_eq!(driver.free(), 1);
        assert_eq!(driver.add(&a), None);
        assert_eq!(driver.add(&[]), None);
        driver.publish();
        let got = get(&mut device, 8);
        assert_eq!(got.len(), 2);
        assert_eq!((got[0].0.id, &got[0].1), (first, &a));
        assert_eq!((got[1].0.id, &got[1].1), (second, &b));
        // Out of order, with all that the chain lets the device write.
        let writable = |chain: &[Buffer]| {
            chain
                .iter()
                .filter(|b| b.device_writes)
                .map(|b| b.len)
                .sum()
        };
        device.put(second, writable(&b));
        device.put(first, writable(&a));
        device.publish();
        let ids: Vec<_> = take(&mut driver, 8).iter().map(|u| u.id).collect();
        assert_eq!(ids, [second, first]);
        assert_eq!(driver.free(), 8);
    }
}

#[test]
fn a_chain_may_be_as_long_as_the_ring() {
    let memory = fake();
    for size in [1u16, 2, 64] {
        let (mut driver, mut device) = pair(&memory, &config(size), 3);
        let chain: Vec<_> = (0..u32::from(size)).map(|n| buffer(n, true)).collect();
        driver.add(&chain).unwrap();
        driver.publish();
        assert_eq!(get(&mut device, 1)[0].1, chain);
    }
}

#[test]
fn a_chain_without_room_waits_for_the_next_call() {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config(8), 0);
    for n in 0..2 {
        let chain = [buffer(n, false), buffer(n, false), buffer(n, true)];
        driver.add(&chain).unwrap();
    }
    driver.publish();
    let mut chains = [Chain::default(); 8];
    let mut buffers = [Buffer::default(); 5];
    assert_eq!(device.get(&mut chains, &mut []), Ok(0));
    assert_eq!(device.get(&mut [], &mut buffers), Ok(0));
    for n in 0..2 {
        assert_eq!(device.get(&mut chains, &mut buffers), Ok(1));
        assert_eq!(buffers[2], buffer(n, true));
        assert_eq!((chains[0].first, chains[0].count), (0, 3));
    }
    assert_eq!(device.get(&mut chains, &mut buffers), Ok(0));
    device.unget(1);
    assert_eq!(
        device.get(&mut chains, &mut buffers[..2]),
        Err(Error::ChainTooLong)
    );
}

#[test]
fn what_was_put_back_comes_again() {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config(8), 65533);
    let ids: Vec<_> = (0..6)
        .map(|n| driver.add(&[buffer(n, false)]).unwrap())
        .collect();
    driver.publish();
    assert_eq!(get(&mut device, 4).len(), 4);
    assert_eq!(device.base(), 1);
    device.unget(3);
    assert_eq!(device.base(), 65534);
    let again: Vec<_> = get(&mut device, 8).iter().map(|(c, _)| c.id).collect();
    assert_eq!(again, ids[1..]);
    // No further than what is taken and not put.
    device.put(ids[0], 0);
    device.unget(1000);
    assert_eq!(device.base(), 65534);
}

#[test]
fn another_device_goes_on_where_the_first_stopped() {
    let (memory, config) = (fake(), config(8));
    let (mut driver, mut device) = pair(&memory, &config, 65534);
    let ids: Vec<_> = (0..6)
        .map(|n| driver.add(&[buffer(n, false)]).unwrap())
        .collect();
    driver.publish();
    for (chain, _) in get(&mut device, 3) {
        device.put(chain.id, 0);
    }
    device.publish();
    let mut device = Device::with_base(memory, &config, device.base()).unwrap();
    for (chain, _) in get(&mut device, 8) {
        device.put(chain.id, 0);
    }
    device.publish();
    let used: Vec<_> = take(&mut driver, 8).iter().map(|u| u.id).collect();
    assert_eq!(used, ids);
}

#[test]
fn in_order_one_element_stands_for_a_batch() {
    let config = RingConfig {
        in_order: true,
        ..config(8)
    };
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config, 65530);
    for _ in 0..5 {
        let chain = [buffer(1, false), buffer(2, false)];
        let mut ids: Vec<_> = (0..2).map(|_| driver.add(&chain).unwrap()).collect();
        ids.extend((0..4).map(|n| driver.add(&[buffer(n, false)]).unwrap()));
        driver.publish();
        let got = get(&mut device, 8);
        let chains: Vec<_> = got.iter().map(|(chain, _)| *chain).collect();
        memory.stores();
        device.put_read(&chains[..5]);
        assert_eq!(memory.stores().len(), 2);
        device.put_read(&chains[5..]);
        device.put_read(&[]);
        device.publish();
        // However the driver cuts it up.
        let mut used = take(&mut driver, 2);
        used.extend(take(&mut driver, 1));
        used.extend(take(&mut driver, 9));
        assert!(used.iter().map(|u| u.id).eq(ids));
        assert!(used.iter().all(|u| u.len == 0));
        assert_eq!(driver.free(), 8);
    }
}

#[test]
fn in_order_descriptors_follow_the_table_and_skipped_chains_are_full() {
    let config = RingConfig {
        in_order: true,
        ..config(8)
    };
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config, 0);
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

#[test]
fn notification_flags_are_obeyed_both_ways() {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config(8), 65535);
    let round = |driver: &mut Driver<_>, device: &mut Device<_>| {
        driver.add(&[buffer(0, true)]).unwrap();
        let kick = driver.publish();
        for (chain, _) in get(device, 8) {
            device.put(chain.id, 0);
        }
        let call = device.publish();
        take(driver, 8);
        (kick, call)
    };
    assert_eq!(round(&mut driver, &mut device), (true, true));
    device.disable_kicks();
    assert_eq!(round(&mut driver, &mut device), (false, true));
    driver.disable_calls();
    assert_eq!(round(&mut driver, &mut device), (false, false));
    memory.stores();
    driver.disable_calls();
    device.disable_kicks();
    assert_eq!(memory.stores(), [], "disabled already");
    assert!(!device.enable_kicks());
    assert_eq!(round(&mut driver, &mut device), (true, false));
    assert!(!driver.enable_calls());
    assert_eq!(round(&mut driver, &mut device), (true, true));
}

#[test]
fn event_indices_ask_for_one_notification() {
    let config = RingConfig {
        event_idx: true,
        ..config(8)
    };
    for base in [0, 1, 65530, 65533, 65535] {
        let memory = fake();
        let (mut driver, mut device) = pair(&memory, &config, base);
        let add = |driver: &mut Driver<_>| {
            driver.add(&[buffer(0, true)]).unwrap();
            driver.publish()
        };
        // The first chain passes the event, the others do not.
        assert_eq!([(); 3].map(|()| add(&mut driver)), [true, false, false]);
        assert!(device.enable_kicks(), "three are there");
        let got = get(&mut device, 3);
        // The event that was asked for is behind the index.
        assert!(!add(&mut driver));
        assert!(device.enable_kicks());
        get(&mut device, 3);
        assert!(!device.enable_kicks());
        assert!(add(&mut driver));
        device.disable_kicks();
        assert!(!add(&mut driver));

        for (chain, _) in &got {
            device.put(chain.id, 0);
        }
        assert!(device.publish());
        assert!(driver.enable_calls(), "three are there");
        assert_eq!(take(&mut driver, 8).len(), 3);
        assert!(!driver.enable_calls());
        driver.disable_calls();
        for (chain, _) in get(&mut device, 1) {
            device.put(chain.id, 0);
        }
        assert!(!device.publish());
        assert_eq!(take(&mut driver, 8).len(), 1);
        assert!(!driver.enable_calls());
        for (chain, _) in get(&mut device, 1) {
            device.put(chain.id, 0);
        }
        assert!(device.publish());
        let flags = [config.driver, config.device].map(|ring| memory.peek_u16(ring));
        assert_eq!(flags, [0, 0]);
    }
}

#[test]
fn disabled_event_indices_stay_quiet_for_a_whole_turn() {
    let config = RingConfig {
        event_idx: true,
        ..config(256)
    };
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, &config, 1000);
    driver.disable_calls();
    device.disable_kicks();
    for _ in 0..255 {
        for n in 0..256 {
            driver.add(&[buffer(n, true)]).unwrap();
        }
        assert!(!driver.publish());
        for (chain, _) in get(&mut device, 256) {
            device.put(chain.id, 0);
        }
        assert!(!device.publish());
        assert_eq!(take(&mut driver, 256).len(), 256);
        memory.stores();
    }
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

#[test]
fn two_threads_exchange_two_million_buffers() {
    const COUNT: u32 = 2_000_000;
    let memory = linear::tests::leak(RING, 512);
    let config = config(256);
    let mut driver = Driver::with_base(memory, &config, 65000).unwrap();
    let mut device = Device::with_base(memory, &config, 65000).unwrap();
    let length = |n: u32| n % 1500 + 1;
    let worker = thread::spawn(move || {
        let mut chains = [Chain::default(); 64];
        let mut buffers = [Buffer::default(); 64];
        let mut expected = 0;
        while expected < COUNT {
            let count = device.get(&mut chains, &mut buffers).unwrap();
            if count == 0 {
                thread::yield_now();
            }
            for chain in &chains[..count] {
                let buffer = buffers[usize::from(chain.first)];
                assert_eq!(buffer.addr, RING + u64::from(expected % 1024));
                assert_eq!(buffer.len, length(expected));
                device.put(chain.id, expected % buffer.len);
                expected += 1;
            }
            device.publish();
        }
    });
    let mut sent = [0; 256];
    let mut used = [Used::default(); 64];
    let (mut added, mut done) = (0, 0);
    while done < COUNT {
        for _ in 0..64 {
            let buffer = Buffer {
                addr: RING + u64::from(added % 1024),
                len: length(added),
                device_writes: true,
            };
            if added == COUNT {
                break;
            }
            let Some(id) = driver.add(&[buffer]) else {
                break;
            };
            sent[usize::from(id)] = added;
            added += 1;
        }
        driver.publish();
        let over = worker.is_finished();
        let count = driver.take(&mut used).unwrap();
        if count == 0 {
            assert!(!over, "the other thread failed");
            thread::yield_now();
        }
        for used in &used[..count] {
            assert_eq!(sent[usize::from(used.id)], done);
            assert_eq!(used.len, done % length(done));
            done += 1;
        }
    }
    worker.join().unwrap();
    assert_eq!(driver.free(), 256);
}
