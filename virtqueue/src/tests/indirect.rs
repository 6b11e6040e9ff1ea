//! Tables of indirect descriptors, between our two sides.

use super::*;

const TABLE: u64 = DATA + 0x9000;

fn pair_with<L: Layout>(memory: &Fake, size: u16, start: u32) -> Pair<L> {
    let config = RingConfig {
        indirect: true,
        ..config::<L>(size)
    };
    pair::<L>(memory, &config, start)
}

layouts! {

fn a_chain_through_a_table_comes_out_like_any_other_and_takes_one_descriptor<L>() {
    for size in [4, 8] {
        let memory = fake();
        let (mut driver, mut device) = pair_with::<L>(&memory, size, L::start(size, 2));
        for round in 0..20u32 {
            let chains: Vec<Vec<_>> = (0..u32::from(size))
                .map(|n| (0..=n).map(|at| buffer(round + n + at, at > n / 2)).collect())
                .collect();
            let mut ids = Vec::new();
            for (n, chain) in (0u64..).zip(&chains) {
                let id = if n % 3 == 2 && chain.len() == 1 {
                    driver.add(chain)
                } else {
                    driver.add_indirect(TABLE + 0x100 * n, chain)
                };
                ids.push(id.unwrap());
            }
            assert_eq!(driver.free(), 0);
            assert_eq!(driver.add_indirect(TABLE, &chains[0]), None);
            driver.publish();
            let got = get(&mut device, 64);
            assert!(got.iter().map(|(chain, _)| chain.id).eq(ids.iter().copied()));
            assert!(got.iter().map(|(_, buffers)| buffers).eq(&chains));
            let mut uses = Vec::new();
            for (id, chain) in ids.into_iter().zip(&chains).rev() {
                device.put(id, writable(chain));
                uses.push(Used { id, len: writable(chain) });
            }
            device.publish();
            assert_eq!(take(&mut driver, 64), uses);
            memory.stores();
            memory.loads();
        }
    }
}

fn a_table_that_cannot_be_is_not_added<L>() {
    let memory = fake();
    let one = [buffer(0, false)];
    let (mut driver, _) = pair::<L>(&memory, &config::<L>(8), L::FRESH);
    assert_eq!(driver.add_indirect(TABLE, &one), None, "not negotiated");
    let (mut driver, _) = pair_with::<L>(&memory, 8, L::FRESH);
    assert_eq!(driver.add_indirect(TABLE, &[]), None);
    assert_eq!(driver.add_indirect(TABLE, &[one[0]; 9]), None, "longer than the ring");
    assert_eq!(driver.add_indirect(TABLE + 8, &one), None, "not aligned");
    assert_eq!(driver.add_indirect(END - 16, &[one[0]; 2]), None, "not in memory");
    assert_eq!(driver.add_indirect(u64::MAX - 15, &one), None);
    assert_eq!((driver.free(), memory.stores()), (8, vec![]));
    assert!(!driver.publish());
    assert!(driver.add_indirect(END - 16, &one).is_some());
    assert!(driver.add_indirect(TABLE, &[one[0]; 8]).is_some());
    assert_eq!(driver.free(), 6);
}

fn a_table_is_written_before_it_is_published<L>() {
    let memory = fake();
    let (mut driver, mut device) = pair_with::<L>(&memory, 4, L::start(4, 1));
    let chain = [buffer(1, false), buffer(2, true), buffer(3, true)];
    driver.add_indirect(TABLE, &chain).unwrap();
    let stores = memory.stores();
    assert!(stores.iter().all(|store| !store.release));
    let (each, first) = L::ADD_STORES;
    assert_eq!(stores.len(), 6 + each - first);
    assert!(get(&mut device, 1).is_empty());
    driver.publish();
    assert_eq!(memory.stores().len(), 1);
    assert_eq!(get(&mut device, 1)[0].1, chain);
}

}
