//! Properties of both halves together, over a strict memory. One body runs for both layouts.

mod fuzz;
mod handshake;
mod hostile_device;
mod hostile_driver;
mod indirect;
mod model;
mod notify;
mod peers;
mod stress;

use std::vec;
use std::vec::Vec;

use crate::packed::Packed;
use crate::split::Split;
use crate::test_memory::Fake;
use crate::{Buffer, Chain, DeviceRing, DriverRing, Error, Layout, Memory, RingConfig, Used};

/// Where tests put the descriptors.
pub(crate) const RING: u64 = 0x1_0000;
/// Where their buffers are: behind the areas of the longest ring.
pub(crate) const DATA: u64 = 0x10_0000;
/// Where their memory ends.
pub(crate) const END: u64 = 0x20_0000;

/// A layout, and what the tests have to know of it.
pub(crate) trait Tested: Layout + Copy + core::fmt::Debug + 'static {
    /// Packed.
    const PACKED: bool;
    /// Sizes worth a test, from the shortest to the longest.
    const SIZES: &'static [u16];
    /// Stores that add a descriptor that is not the first of a batch, and fewer for the first.
    const ADD_STORES: (usize, usize);
    /// Stores that put a chain that is not the first of a batch, and fewer for the first.
    const PUT_STORES: (usize, usize);

    /// The position of an empty ring whose indices, or places, wrap `before` chains of one descriptor later.
    fn start(size: u16, before: u16) -> u32;
    /// The position `taken` and `used` chains of one descriptor behind `start`.
    fn position(start: u32, size: u16, taken: u16, used: u16) -> u32;
}

impl Tested for Split {
    const PACKED: bool = false;
    const SIZES: &'static [u16] = &[1, 2, 256, 32768];
    // The descriptor's two words, and its entry in the available ring.
    const ADD_STORES: (usize, usize) = (3, 0);
    const PUT_STORES: (usize, usize) = (2, 0);

    fn start(_: u16, before: u16) -> u32 {
        0u16.wrapping_sub(before).into()
    }
    fn position(start: u32, _: u16, taken: u16, _: u16) -> u32 {
        (start + u32::from(taken)) & 0xffff
    }
}

impl Tested for Packed {
    const PACKED: bool = true;
    const SIZES: &'static [u16] = &[1, 2, 3, 7, 256, 768, 32768];
    const ADD_STORES: (usize, usize) = (2, 1);
    const PUT_STORES: (usize, usize) = (1, 1);

    fn start(size: u16, before: u16) -> u32 {
        let slot = u32::from(size - 1 - before.wrapping_sub(1) % size);
        // As it would be after an odd number of turns, and after an even one.
        let wrap = u32::from(before) & 2;
        (slot | wrap << 14) * 0x1_0001
    }
    fn position(start: u32, size: u16, taken: u16, used: u16) -> u32 {
        let at = |steps: u16| {
            let slot = (start & 0x7fff) + u32::from(steps);
            let turns = slot / u32::from(size);
            (slot % u32::from(size)) | ((((start >> 15) & 1) + turns) % 2) << 15
        };
        at(taken) | at(used) << 16
    }
}

/// Tests of a body that is generic over the layout.
macro_rules! layouts {
    ($($(#[$meta:meta])* fn $name:ident<$layout:ident>() $body:block)*) => {
        $($(#[$meta])* fn $name<$layout: $crate::tests::Tested>() $body)*
        mod split {
            $(#[test] fn $name() { super::$name::<crate::split::Split>(); })*
        }
        mod packed {
            $(#[test] fn $name() { super::$name::<crate::packed::Packed>(); })*
        }
    };
}
pub(crate) use layouts;

/// Areas with no more alignment than they need, and a gap behind each.
pub(crate) fn config<L: Layout>(size: u16) -> RingConfig {
    let lens = L::area_sizes(size.clamp(1, 32768)).unwrap_or([16; 3]);
    let mut end = RING;
    let [desc, driver, device] = [0, 1, 2].map(|n| {
        let align = u64::try_from(L::ALIGN[n]).unwrap();
        let mut start = end.next_multiple_of(align);
        if n > 0 && start.is_multiple_of(2 * align) {
            start += align;
        }
        end = start + u64::try_from(lens[n]).unwrap() + 2;
        start
    });
    RingConfig {
        size,
        desc,
        driver,
        device,
        event_idx: false,
        in_order: false,
        indirect: false,
    }
}

/// The same with both features that change how chains are used, and without.
pub(crate) fn configs<L: Layout>(size: u16) -> impl Iterator<Item = RingConfig> {
    [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .map(move |(event_idx, in_order)| RingConfig {
            event_idx,
            in_order,
            ..config::<L>(size)
        })
}

pub(crate) fn fake() -> Fake {
    Fake::new(RING, usize::try_from(END - RING).unwrap())
}

type Pair<L> = (<L as Layout>::Driver<Fake>, <L as Layout>::Device<Fake>);

pub(crate) fn pair<L: Layout>(memory: &Fake, config: &RingConfig, base: u32) -> Pair<L> {
    let driver = L::driver_at(memory.clone(), config, base).unwrap();
    let device = L::device_at(memory.clone(), config, base).unwrap();
    memory.stores();
    (driver, device)
}

/// A buffer that can be told from others.
pub(crate) fn buffer(n: u32, device_writes: bool) -> Buffer {
    Buffer {
        addr: DATA + u64::from(n % 0x8000) * 16,
        len: n % 1000 + 1,
        device_writes,
    }
}

/// How much the device may write.
pub(crate) fn writable(chain: &[Buffer]) -> u32 {
    let writable = chain.iter().filter(|buffer| buffer.device_writes);
    writable.map(|buffer| buffer.len).sum()
}

/// Gets everything there is, up to `limit` chains.
pub(crate) fn get(device: &mut impl DeviceRing, limit: usize) -> Vec<(Chain, Vec<Buffer>)> {
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

pub(crate) fn take(driver: &mut impl DriverRing, limit: usize) -> Vec<Used> {
    let mut out = vec![Used::default(); limit];
    let count = driver.take(&mut out).unwrap();
    out.truncate(count);
    out
}

layouts! {

fn a_configuration_that_does_not_fit_is_refused<L>() {
    let good = config::<L>(8);
    let [desc, driver, device] = L::area_sizes(8).unwrap().map(|len| u64::try_from(len).unwrap());
    let half = L::ALIGN.map(|align| u64::try_from(align / 2).unwrap());
    let bad = [
        RingConfig { size: 0, ..good },
        RingConfig { size: 32769, ..good },
        RingConfig { size: u16::MAX, ..good },
        RingConfig { desc: good.desc + half[0], ..good },
        RingConfig { driver: good.driver + half[1], ..good },
        RingConfig { device: good.device + half[2], ..good },
        RingConfig { desc: RING - 16, ..good },
        RingConfig { desc: END - desc + 16, ..good },
        RingConfig { driver: (END - driver + 4).next_multiple_of(4), ..good },
        RingConfig { device: (END - device + 4).next_multiple_of(4), ..good },
        RingConfig { desc: u64::MAX - 15, ..good },
        RingConfig { driver: u64::MAX - 3, ..good },
        RingConfig { device: u64::MAX - 3, ..good },
    ];
    for config in bad {
        assert_eq!(L::driver(fake(), &config).err(), Some(Error::Config), "{config:?}");
        assert_eq!(L::device(fake(), &config).err(), Some(Error::Config), "{config:?}");
        assert_eq!(L::device_at(fake(), &config, L::FRESH).err(), Some(Error::Config));
    }
    assert!(L::driver(fake(), &good).is_ok());
    assert!(L::device(fake(), &good).is_ok());
    let exact = RingConfig { desc: END - desc, ..good };
    assert!(L::device(fake(), &exact).is_ok());
}

fn a_fresh_ring_is_empty_whatever_was_in_the_memory<L>() {
    for &size in L::SIZES {
        for base in [L::FRESH, L::start(size, 1), L::start(size, 3)] {
            for byte in [0, 0x80, 0xff] {
                let memory = fake();
                for addr in (RING..DATA).step_by(8) {
                    memory.poke(addr, [byte; 8]);
                }
                let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(size), base);
                for _ in 0..u32::from(size.min(700)) + 1 {
                    assert!(get(&mut device, 1).is_empty());
                    assert!(take(&mut driver, 1).is_empty());
                    let id = driver.add(&[buffer(0, true)]).unwrap();
                    driver.publish();
                    assert!(take(&mut driver, 1).is_empty());
                    assert_eq!(get(&mut device, 2).len(), 1);
                    device.put(id, 1);
                    device.publish();
                    assert_eq!(take(&mut driver, 2), [Used { id, len: 1 }]);
                    memory.stores();
                    memory.loads();
                }
            }
        }
    }
}

fn everything_added_comes_out_in_order_and_comes_back<L>() {
    for &size in L::SIZES {
        for config in configs::<L>(size) {
            let memory = fake();
            let base = L::start(size, 1 + size / 3);
            let (mut driver, mut device) = pair::<L>(&memory, &config, base);
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
                assert!(get(&mut device, 1).is_empty(), "all taken");
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
                memory.stores();
                memory.loads();
            }
        }
    }
}

fn chains_come_back_in_any_order<L>() {
    for size in L::SIZES.iter().copied().filter(|size| *size <= 256) {
        let memory = fake();
        let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(size), L::start(size, 2));
        let mut out: Vec<(u16, u32)> = Vec::new();
        let mut n = 0u32;
        for round in 0..200u32 {
            while let Some(id) = driver.add(&[buffer(n, true)]) {
                assert!(out.iter().all(|(other, _)| *other != id), "ids are unique");
                out.push((id, n));
                n += 1;
            }
            driver.publish();
            let got = get(&mut device, usize::from(size));
            for (chain, buffers) in got {
                let (_, n) = out.iter().find(|(id, _)| *id == chain.id).unwrap();
                assert_eq!(buffers, [buffer(*n, true)]);
            }
            // Some of them, from anywhere; one may stay behind for long.
            let some = 1 + round as usize * 7 % out.len();
            let mut uses = Vec::new();
            for turn in 0..some {
                let (id, n) = out.remove((turn * 5 + 1) % out.len());
                device.put(id, n % buffer(n, true).len);
                uses.push(Used { id, len: n % buffer(n, true).len });
            }
            device.publish();
            assert_eq!(take(&mut driver, 1000), uses);
            assert_eq!(usize::from(driver.free()), usize::from(size) - out.len());
            memory.stores();
        }
    }
}

fn in_batches_of_any_size_the_ring_wraps<L>() {
    for size in [8, 7] {
        let Some(_) = L::area_sizes(size) else {
            continue;
        };
        for config in configs::<L>(size) {
            for batch in [1usize, 3, 6, 7] {
                let memory = fake();
                let base = L::start(size, 5000);
                let (mut driver, mut device) = pair::<L>(&memory, &config, base);
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
                    memory.loads();
                }
            }
        }
    }
}

fn a_batch_costs_one_store_with_release_behind_all_others<L>() {
    let (memory, config) = (fake(), config::<L>(32));
    let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(32, 7));
    let stores = |(each, first): (usize, usize)| 16 * each - first;
    for _ in 0..3 {
        for n in 0..16 {
            driver.add(&[buffer(n, false)]).unwrap();
        }
        let before = memory.stores();
        assert_eq!(before.len(), stores(L::ADD_STORES));
        assert!(before.iter().all(|store| !store.release));
        driver.publish();
        let [last] = memory.stores()[..] else {
            panic!("one store");
        };
        assert!(last.release && before.iter().all(|store| store.addr != last.addr));

        let got = get(&mut device, 32);
        assert_eq!(memory.stores(), []);
        for (chain, _) in &got {
            device.put(chain.id, 0);
        }
        let before = memory.stores();
        assert_eq!(before.len(), stores(L::PUT_STORES));
        assert!(before.iter().all(|store| !store.release));
        device.publish();
        let [last] = memory.stores()[..] else {
            panic!("one store");
        };
        assert!(last.release && before.iter().all(|store| store.addr != last.addr));
        assert_eq!(take(&mut driver, 32).len(), 16);
        assert_eq!(memory.stores(), []);
    }
}

fn each_word_of_the_peer_is_read_once<L>() {
    let memory = fake();
    let config = RingConfig { indirect: true, ..config::<L>(32) };
    let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(32, 3));
    let chain = [buffer(1, false), buffer(2, true), buffer(3, true)];
    driver.add(&chain).unwrap();
    driver.add_indirect(DATA + 0x8000, &chain).unwrap();
    driver.add(&chain[..1]).unwrap();
    driver.publish();
    memory.loads();
    let got = get(&mut device, 3);
    assert_eq!(got.len(), 3);
    let mut loads = memory.loads();
    let count = loads.len();
    loads.sort_unstable();
    loads.dedup();
    assert_eq!(loads.len(), count, "{loads:x?}");
    for (chain, _) in got {
        device.put(chain.id, 0);
    }
    device.publish();
    memory.loads();
    assert_eq!(take(&mut driver, 3).len(), 3);
    let mut loads = memory.loads();
    let count = loads.len();
    loads.sort_unstable();
    loads.dedup();
    assert_eq!(loads.len(), count, "{loads:x?}");
}

fn publishing_nothing_stores_nothing_and_asks_for_nothing<L>() {
    let memory = fake();
    let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(4), L::start(4, 2));
    assert!(!driver.publish());
    assert!(!device.publish());
    assert_eq!(memory.stores(), []);
    driver.add(&[buffer(0, true)]).unwrap();
    assert!(driver.publish());
    memory.stores();
    assert!(!driver.publish());
    assert_eq!(memory.stores(), []);
}

fn a_chain_comes_out_whole_and_its_descriptors_are_free_again<L>() {
    for size in [8, 9] {
        if L::area_sizes(size).is_none() {
            continue;
        }
        let memory = fake();
        let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(size), L::start(size, 1));
        for round in 0..20 {
            let a: Vec<_> = (0..3).map(|n| buffer(round + n, n == 2)).collect();
            let b: Vec<_> = (0..4).map(|n| buffer(round + 9 + n, n > 0)).collect();
            let first = driver.add(&a).unwrap();
            let second = driver.add(&b).unwrap();
            assert_eq!(driver.free(), size - 7);
            assert_eq!(driver.add(&a), None);
            assert_eq!(driver.add(&[]), None);
            driver.publish();
            let got = get(&mut device, 8);
            assert_eq!(got.len(), 2);
            assert_eq!((got[0].0.id, &got[0].1), (first, &a));
            assert_eq!((got[1].0.id, &got[1].1), (second, &b));
            // Out of order, with all that the chain lets the device write.
            device.put(second, writable(&b));
            device.put(first, writable(&a));
            device.publish();
            let ids: Vec<_> = take(&mut driver, 8).iter().map(|u| u.id).collect();
            assert_eq!(ids, [second, first]);
            assert_eq!(driver.free(), size);
        }
    }
}

fn a_chain_may_be_as_long_as_the_ring<L>() {
    for &size in L::SIZES.iter().filter(|size| **size <= 1000) {
        for before in [1, 2, 5] {
            let memory = fake();
            let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(size), L::start(size, before));
            let chain: Vec<_> = (0..u32::from(size)).map(|n| buffer(n, true)).collect();
            for _ in 0..3 {
                let id = driver.add(&chain).unwrap();
                assert_eq!(driver.free(), 0);
                driver.publish();
                assert_eq!(get(&mut device, 1000), [(Chain { id, first: 0, count: size }, chain.clone())]);
                device.put(id, writable(&chain));
                device.publish();
                assert_eq!(take(&mut driver, 9), [Used { id, len: writable(&chain) }]);
            }
        }
    }
}

fn a_chain_without_room_waits_for_the_next_call<L>() {
    let memory = fake();
    let (mut driver, mut device) = pair::<L>(&memory, &config::<L>(8), L::start(8, 5));
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

fn what_was_put_back_comes_again<L>() {
    let memory = fake();
    let base = L::start(8, 3);
    for in_order in [false, true] {
        let config = RingConfig { in_order, ..config::<L>(8) };
        let (mut driver, mut device) = pair::<L>(&memory, &config, base);
        let ids: Vec<_> = (0..6)
            .map(|n| driver.add(&[buffer(n, false)]).unwrap())
            .collect();
        driver.publish();
        assert_eq!(get(&mut device, 4).len(), 4);
        assert_eq!(device.base(), L::position(base, 8, 4, 0));
        device.unget(3);
        assert_eq!(device.base(), L::position(base, 8, 1, 0));
        let again: Vec<_> = get(&mut device, 8).iter().map(|(c, _)| c.id).collect();
        assert_eq!(again, ids[1..]);
        // No further than what is taken and not put.
        device.put(ids[0], 0);
        device.publish();
        device.unget(1000);
        assert_eq!(device.base(), L::position(base, 8, 1, 1));
        let again: Vec<_> = get(&mut device, 8).iter().map(|(c, _)| c.id).collect();
        assert_eq!(again, ids[1..]);
    }
}

fn chains_put_back_are_as_long_as_they_were<L>() {
    for in_order in [false, true] {
        let memory = fake();
        let config = RingConfig { in_order, indirect: true, ..config::<L>(16) };
        let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(16, 4));
        let chain = [buffer(1, false), buffer(2, true), buffer(3, true)];
        for _ in 0..10 {
            let ids = [
                driver.add(&chain).unwrap(),
                driver.add(&chain[..1]).unwrap(),
                driver.add_indirect(DATA + 0x8000, &chain).unwrap(),
                driver.add(&chain[..2]).unwrap(),
            ];
            driver.publish();
            for back in [4, 3, 2, 1, 0] {
                let got: Vec<_> = get(&mut device, 8).iter().map(|(c, b)| (c.id, b.len())).collect();
                let all = [(ids[0], 3), (ids[1], 1), (ids[2], 3), (ids[3], 2)];
                assert!(all.ends_with(&got));
                device.unget(back);
            }
            for id in ids {
                device.put(id, 0);
            }
            device.publish();
            assert!(take(&mut driver, 8).iter().map(|used| used.id).eq(ids));
            assert_eq!(driver.free(), 16);
        }
    }
}

fn another_device_goes_on_where_the_first_stopped<L>() {
    for in_order in [false, true] {
        let (memory, config) = (fake(), RingConfig { in_order, ..config::<L>(8) });
        let base = L::start(8, 2);
        let (mut driver, mut device) = pair::<L>(&memory, &config, base);
        for _ in 0..5 {
            let ids: Vec<_> = (0..6)
                .map(|n| driver.add(&[buffer(n, false)]).unwrap())
                .collect();
            driver.publish();
            for (chain, _) in get(&mut device, 3) {
                device.put(chain.id, 0);
            }
            device.publish();
            device = L::device_at(memory.clone(), &config, device.base()).unwrap();
            for (chain, _) in get(&mut device, 8) {
                device.put(chain.id, 0);
            }
            device.publish();
            let used: Vec<_> = take(&mut driver, 8).iter().map(|u| u.id).collect();
            assert_eq!(used, ids);
        }
    }
}

fn a_device_leaves_alone_what_another_had_taken<L>() {
    let (memory, config) = (fake(), config::<L>(8));
    let base = L::start(8, 6);
    let (mut driver, mut device) = pair::<L>(&memory, &config, base);
    let ids: Vec<_> = (0..8)
        .map(|n| driver.add(&[buffer(n, true)]).unwrap())
        .collect();
    driver.publish();
    let got = get(&mut device, 3);
    device.put(got[1].0.id, 1);
    device.publish();
    let at = device.base();
    assert_eq!(at, L::position(base, 8, 3, 1));
    let mut device = L::device_at(memory, &config, at).unwrap();
    let rest: Vec<_> = get(&mut device, 8).iter().map(|(chain, _)| chain.id).collect();
    assert_eq!(rest, ids[3..]);
    for id in rest {
        device.put(id, 1);
    }
    device.publish();
    assert_eq!(take(&mut driver, 8).len(), 6);
    // Two are lost: the driver has to reset the queue to get them back.
    assert_eq!(driver.free(), 6);
}

fn in_order_one_store_stands_for_a_batch<L>() {
    let config = RingConfig { in_order: true, ..config::<L>(8) };
    let memory = fake();
    let (mut driver, mut device) = pair::<L>(&memory, &config, L::start(8, 5));
    for _ in 0..5 {
        let chain = [buffer(1, false), buffer(2, false)];
        let mut ids: Vec<_> = (0..2).map(|_| driver.add(&chain).unwrap()).collect();
        ids.extend((0..4).map(|n| driver.add(&[buffer(n, false)]).unwrap()));
        driver.publish();
        let got = get(&mut device, 8);
        let chains: Vec<_> = got.iter().map(|(chain, _)| *chain).collect();
        memory.stores();
        let (each, first) = L::PUT_STORES;
        device.put_read(&chains[..5]);
        assert_eq!(memory.stores().len(), each - first);
        device.put_read(&chains[5..]);
        assert_eq!(memory.stores().len(), each);
        device.put_read(&[]);
        device.publish();
        // However the driver cuts it up.
        let mut used = take(&mut driver, 2);
        assert!(driver.enable_calls(), "three are there");
        used.extend(take(&mut driver, 1));
        used.extend(take(&mut driver, 9));
        assert!(!driver.enable_calls());
        assert!(used.iter().map(|u| u.id).eq(ids));
        assert!(used.iter().all(|u| u.len == 0));
        assert_eq!(driver.free(), 8);
    }
}

}

#[test]
fn a_buffer_of_the_device_is_reached_through_its_memory() {
    let (_, device) = pair::<Packed>(&fake(), &config::<Packed>(3), Packed::FRESH);
    assert!(device.memory().contains(DATA, 1));
    let (_, device) = pair::<Split>(&fake(), &config::<Split>(4), 0);
    assert!(device.memory().contains(DATA, 1));
}
