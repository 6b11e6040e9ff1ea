//! Both halves against queues, under random operations.

use std::collections::VecDeque;

use proptest::collection::vec as vec_of;
use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    /// Readable and writable buffers of a chain.
    Add(usize, usize),
    PublishAdded,
    /// Limits in chains and buffers.
    Get(usize, usize),
    Unget(usize),
    /// Which of the chains taken, and how much of its writable bytes.
    Put(usize, u32),
    /// How many of the oldest chains, if they let the device only read.
    PutRead(usize),
    PublishUsed,
    Take(usize),
    /// Look at the ring the way that a sleeper does.
    Enable,
    Disable,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..4, 0usize..4).prop_map(|(r, w)| Op::Add(r, w)),
        2 => Just(Op::PublishAdded),
        3 => (0usize..9, 0usize..12).prop_map(|(c, b)| Op::Get(c, b)),
        1 => (0usize..9).prop_map(Op::Unget),
        5 => (any::<usize>(), any::<u32>()).prop_map(|(n, len)| Op::Put(n, len)),
        1 => (0usize..6).prop_map(Op::PutRead),
        2 => Just(Op::PublishUsed),
        3 => (0usize..9).prop_map(Op::Take),
        1 => Just(Op::Enable),
        1 => Just(Op::Disable),
    ]
}

/// A chain on its way: id and buffers.
type Travelling = (u16, Vec<Buffer>);

fn writable(chain: &[Buffer]) -> u32 {
    chain
        .iter()
        .filter(|b| b.device_writes)
        .map(|b| b.len)
        .sum()
}

/// What the rings have to agree with.
#[derive(Default)]
struct Model {
    added: VecDeque<Travelling>,
    available: VecDeque<Travelling>,
    taken: VecDeque<Travelling>,
    /// How many of `taken`, from its end, were not touched since they were taken.
    fresh: usize,
    put: VecDeque<(Used, usize)>,
    used: VecDeque<(Used, usize)>,
    outstanding: usize,
}

fn run(config: &RingConfig, base: u32, ops: &[Op]) -> Result<(), TestCaseError> {
    let memory = fake();
    let (mut driver, mut device) = pair(&memory, config, base);
    let mut model = Model::default();
    for (n, op) in (0u32..).step_by(8).zip(ops) {
        memory.stores();
        match *op {
            Op::Add(readable, writable) => {
                let chain: Vec<_> = (0..readable + writable)
                    .zip(n..)
                    .map(|(at, n)| buffer(n, at >= readable))
                    .collect();
                let room = usize::from(config.size) - model.outstanding;
                let fits = !chain.is_empty() && chain.len() <= room;
                let id = driver.add(&chain);
                prop_assert_eq!(id.is_some(), fits);
                if let Some(id) = id {
                    model.outstanding += chain.len();
                    model.added.push_back((id, chain));
                }
            }
            Op::PublishAdded => {
                let nothing = model.added.is_empty();
                model.available.append(&mut model.added);
                let kick = driver.publish();
                prop_assert_eq!(memory.stores().len(), usize::from(!nothing));
                prop_assert!(!(kick && nothing));
            }
            Op::Get(limit, room) => {
                let mut chains = vec![Chain::default(); limit];
                let mut buffers = vec![Buffer::default(); room];
                let mut expected = Vec::new();
                let mut filled = 0;
                for (id, chain) in model.available.iter().take(limit) {
                    if filled + chain.len() > room {
                        break;
                    }
                    expected.push((*id, chain.clone()));
                    filled += chain.len();
                }
                if limit > 0 && room > 0 && expected.is_empty() && !model.available.is_empty() {
                    // It would be the end of the queue.
                    continue;
                }
                let count = device.get(&mut chains, &mut buffers).unwrap();
                prop_assert_eq!(count, expected.len());
                for (chain, expected) in chains.iter().zip(&expected) {
                    let first = usize::from(chain.first);
                    let got = &buffers[first..first + usize::from(chain.count)];
                    prop_assert_eq!((chain.id, got), (expected.0, &expected.1[..]));
                }
                model.available.drain(..count);
                model.fresh += count;
                model.taken.extend(expected);
            }
            Op::Unget(count) => {
                let count = count.min(model.fresh);
                device.unget(count);
                model.fresh -= count;
                for chain in model.taken.drain(model.taken.len() - count..).rev() {
                    model.available.push_front(chain);
                }
            }
            Op::Put(which, len) => {
                if model.taken.is_empty() {
                    continue;
                }
                let which = if config.in_order {
                    0
                } else {
                    which % model.taken.len()
                };
                // What stands behind it can still be put back, what stands before it not.
                model.fresh = model.fresh.min(model.taken.len() - 1 - which);
                let (id, chain) = model.taken.remove(which).unwrap();
                let len = len % (writable(&chain) + 1);
                device.put(id, len);
                model.put.push_back((Used { id, len }, chain.len()));
            }
            Op::PutRead(count) => {
                let readable = model
                    .taken
                    .iter()
                    .take_while(|(_, chain)| chain.iter().all(|b| !b.device_writes));
                let count = readable.count().min(count);
                let mut chains = Vec::new();
                for (id, chain) in model.taken.drain(..count) {
                    chains.push(Chain {
                        id,
                        ..Chain::default()
                    });
                    model.put.push_back((Used { id, len: 0 }, chain.len()));
                }
                model.fresh = model.fresh.min(model.taken.len());
                device.put_read(&chains);
                let stores = if config.in_order { count.min(1) } else { count };
                prop_assert_eq!(memory.stores().len(), 2 * stores);
            }
            Op::PublishUsed => {
                let nothing = model.put.is_empty();
                model.used.append(&mut model.put);
                let call = device.publish();
                prop_assert_eq!(memory.stores().len(), usize::from(!nothing));
                prop_assert!(!(call && nothing));
            }
            Op::Take(limit) => {
                let used = take(&mut driver, limit);
                let count = limit.min(model.used.len());
                let expected: Vec<_> = model.used.drain(..count).collect();
                prop_assert!(used.iter().eq(expected.iter().map(|(used, _)| used)));
                model.outstanding -= expected.iter().map(|(_, len)| len).sum::<usize>();
            }
            Op::Enable => {
                prop_assert_eq!(driver.enable_calls(), !model.used.is_empty());
                prop_assert_eq!(device.enable_kicks(), !model.available.is_empty());
            }
            Op::Disable => {
                driver.disable_calls();
                device.disable_kicks();
            }
        }
        let room = usize::from(config.size) - model.outstanding;
        prop_assert_eq!(usize::from(driver.free()), room);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn both_halves_behave_like_queues(
        order in 0u32..7,
        base in prop_oneof![Just(0u32), 65500u32..65536],
        event_idx in any::<bool>(),
        in_order in any::<bool>(),
        ops in vec_of(op(), 1..400),
    ) {
        let config = RingConfig { event_idx, in_order, ..config(1 << order) };
        run(&config, base, &ops)?;
    }
}
