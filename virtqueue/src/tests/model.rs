//! Both halves against queues, under random operations.

use std::collections::VecDeque;

use proptest::collection::vec as vec_of;
use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    /// Readable and writable buffers of a chain, and whether it goes through a table.
    Add(usize, usize, bool),
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
    /// Look at the ring the way that a sleeper does: the driver, the device.
    EnableCalls,
    EnableKicks,
    Disable,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..4, 0usize..4, any::<bool>()).prop_map(|(r, w, table)| Op::Add(r, w, table)),
        2 => Just(Op::PublishAdded),
        3 => (0usize..9, 0usize..12).prop_map(|(c, b)| Op::Get(c, b)),
        1 => (0usize..9).prop_map(Op::Unget),
        5 => (any::<usize>(), any::<u32>()).prop_map(|(n, len)| Op::Put(n, len)),
        1 => (0usize..6).prop_map(Op::PutRead),
        2 => Just(Op::PublishUsed),
        3 => (0usize..9).prop_map(Op::Take),
        1 => Just(Op::EnableCalls),
        1 => Just(Op::EnableKicks),
        1 => Just(Op::Disable),
    ]
}

/// A chain on its way.
#[derive(Clone, Debug)]
struct Travelling {
    id: u16,
    buffers: Vec<Buffer>,
    /// Descriptors that it takes in the ring.
    descriptors: usize,
    /// How much the device wrote.
    len: u32,
}

/// When a side wants to hear: positions count what the other side publishes, in chains (split) or descriptors (packed).
#[derive(Clone, Copy)]
enum Wish {
    Always,
    At(usize),
    Never,
}

impl Wish {
    /// How it is with `new` positions published behind `old`, where a position looks like the one `cycle` before it: a wish that is not renewed comes
    /// round again.
    fn wants(self, old: usize, new: usize, cycle: usize) -> bool {
        match self {
            Self::Always => new > 0,
            Self::At(position) => (old..old + new).any(|at| at % cycle == position % cycle),
            Self::Never => false,
        }
    }
}

/// What the rings have to agree with: five queues, one behind the other, and how far each side is.
struct Model {
    added: VecDeque<Travelling>,
    available: VecDeque<Travelling>,
    taken: VecDeque<Travelling>,
    /// How many of `taken`, from its end, were not touched since they were taken.
    fresh: usize,
    put: VecDeque<Travelling>,
    used: VecDeque<Travelling>,
    outstanding: usize,
    /// Positions: published by the driver, taken by the device, published by the device, taken by the driver.
    offered: usize,
    got: usize,
    shown: usize,
    done: usize,
    calls: Wish,
    kicks: Wish,
}

/// A ring, what it should be, and what makes a wish.
struct Run<L: Layout> {
    config: RingConfig,
    memory: Fake,
    driver: L::Driver<Fake>,
    device: L::Device<Fake>,
    model: Model,
}

impl<L: Tested> Run<L> {
    fn new(config: RingConfig, before: u16) -> Self {
        let memory = fake();
        let (driver, device) = pair::<L>(&memory, &config, L::start(config.size, before));
        let model = Model {
            added: VecDeque::new(),
            available: VecDeque::new(),
            taken: VecDeque::new(),
            fresh: 0,
            put: VecDeque::new(),
            used: VecDeque::new(),
            outstanding: 0,
            offered: 0,
            got: 0,
            shown: 0,
            done: 0,
            calls: Self::wish(&config, 0),
            kicks: Self::wish(&config, 0),
        };
        Self {
            config,
            memory,
            driver,
            device,
            model,
        }
    }

    fn wish(config: &RingConfig, position: usize) -> Wish {
        if config.event_idx {
            Wish::At(position)
        } else {
            Wish::Always
        }
    }

    /// Positions that chains take.
    fn positions<'a>(chains: impl IntoIterator<Item = &'a Travelling>) -> usize {
        let each = |chain: &Travelling| if L::PACKED { chain.descriptors } else { 1 };
        chains.into_iter().map(each).sum()
    }

    fn step(&mut self, n: u32, op: &Op) -> Result<(), TestCaseError> {
        let Self {
            config,
            memory,
            driver,
            device,
            model,
        } = self;
        memory.stores();
        memory.loads();
        let cycle = if L::PACKED {
            2 * usize::from(config.size)
        } else {
            1 << 16
        };
        match *op {
            Op::Add(readable, writable, table) => {
                let buffers: Vec<_> = (0..readable + writable)
                    .zip(n..)
                    .map(|(at, n)| buffer(n, at >= readable))
                    .collect();
                let room = usize::from(config.size) - model.outstanding;
                let descriptors = if table { 1 } else { buffers.len() };
                let allowed = !table || config.indirect && buffers.len() <= config.size.into();
                let fits = allowed && !buffers.is_empty() && descriptors <= room;
                let id = if table {
                    // As many as there are steps: none is used twice.
                    driver.add_indirect(DATA + 0x8_0000 + u64::from(n) * 16, &buffers)
                } else {
                    driver.add(&buffers)
                };
                prop_assert_eq!(id.is_some(), fits);
                if let Some(id) = id {
                    model.outstanding += descriptors;
                    let chain = Travelling {
                        id,
                        buffers,
                        descriptors,
                        len: 0,
                    };
                    model.added.push_back(chain);
                }
            }
            Op::PublishAdded => {
                let new = Self::positions(&model.added);
                let kick = driver.publish();
                prop_assert_eq!(kick, model.kicks.wants(model.offered, new, cycle));
                prop_assert_eq!(memory.stores().len(), new.min(1));
                model.offered += new;
                model.available.append(&mut model.added);
            }
            Op::Get(limit, room) => {
                let mut chains = vec![Chain::default(); limit];
                let mut buffers = vec![Buffer::default(); room];
                let mut expected = 0;
                let mut filled = 0;
                for chain in model.available.iter().take(limit) {
                    if filled + chain.buffers.len() > room {
                        break;
                    }
                    expected += 1;
                    filled += chain.buffers.len();
                }
                if limit > 0 && room > 0 && expected == 0 && !model.available.is_empty() {
                    // It would be the end of the queue.
                    return Ok(());
                }
                let count = device.get(&mut chains, &mut buffers).unwrap();
                prop_assert_eq!(count, expected);
                for (chain, expected) in chains.iter().zip(model.available.drain(..count)) {
                    let first = usize::from(chain.first);
                    let got = &buffers[first..first + usize::from(chain.count)];
                    prop_assert_eq!((chain.id, got), (expected.id, &expected.buffers[..]));
                    model.got += Self::positions([&expected]);
                    model.taken.push_back(expected);
                }
                model.fresh += count;
            }
            Op::Unget(count) => {
                let count = count.min(model.fresh);
                device.unget(count);
                model.fresh -= count;
                for chain in model.taken.drain(model.taken.len() - count..).rev() {
                    model.got -= Self::positions([&chain]);
                    model.available.push_front(chain);
                }
            }
            Op::Put(which, len) => {
                if model.taken.is_empty() {
                    return Ok(());
                }
                let which = if config.in_order {
                    0
                } else {
                    which % model.taken.len()
                };
                // What stands behind it can still be put back, what stands before it not.
                model.fresh = model.fresh.min(model.taken.len() - 1 - which);
                let mut chain = model.taken.remove(which).unwrap();
                chain.len = len % (writable(&chain.buffers) + 1);
                device.put(chain.id, chain.len);
                model.put.push_back(chain);
            }
            Op::PutRead(count) => {
                let readable = |chain: &&Travelling| writable(&chain.buffers) == 0;
                let count = count.min(model.taken.iter().take_while(readable).count());
                let first = model.put.is_empty();
                let mut chains = Vec::new();
                for chain in model.taken.drain(..count) {
                    chains.push(Chain {
                        id: chain.id,
                        ..Chain::default()
                    });
                    model.put.push_back(chain);
                }
                model.fresh = model.fresh.min(model.taken.len());
                device.put_read(&chains);
                let elements = if config.in_order { count.min(1) } else { count };
                let (each, less) = L::PUT_STORES;
                let less = if first { less.min(elements) } else { 0 };
                prop_assert_eq!(memory.stores().len(), each * elements - less);
            }
            Op::PublishUsed => {
                let new = Self::positions(&model.put);
                let call = device.publish();
                prop_assert_eq!(call, model.calls.wants(model.shown, new, cycle));
                prop_assert_eq!(memory.stores().len(), new.min(1));
                model.shown += new;
                model.used.append(&mut model.put);
            }
            Op::Take(limit) => {
                let used = take(driver, limit);
                let count = limit.min(model.used.len());
                let expected: Vec<_> = model.used.drain(..count).collect();
                let expected_used = expected.iter().map(|chain| Used {
                    id: chain.id,
                    len: chain.len,
                });
                prop_assert!(used.into_iter().eq(expected_used));
                model.done += Self::positions(&expected);
                model.outstanding -= expected.iter().map(|c| c.descriptors).sum::<usize>();
            }
            Op::EnableCalls => {
                prop_assert_eq!(driver.enable_calls(), !model.used.is_empty());
                model.calls = Self::wish(config, model.done);
            }
            Op::EnableKicks => {
                prop_assert_eq!(device.enable_kicks(), !model.available.is_empty());
                model.kicks = Self::wish(config, model.got);
            }
            Op::Disable => {
                driver.disable_calls();
                device.disable_kicks();
                model.calls = Wish::Never;
                model.kicks = Wish::Never;
            }
        }
        let room = usize::from(config.size) - model.outstanding;
        prop_assert_eq!(usize::from(driver.free()), room);
        Ok(())
    }

    fn all(config: RingConfig, before: u16, ops: &[Op]) -> Result<(), TestCaseError> {
        let mut run = Self::new(config, before);
        for (n, op) in (0u32..).step_by(8).zip(ops) {
            run.step(n, op)?;
        }
        Ok(())
    }
}

/// Features: any of the eight.
fn with_features(config: RingConfig, features: u8) -> RingConfig {
    RingConfig {
        event_idx: features & 1 != 0,
        in_order: features & 2 != 0,
        indirect: features & 4 != 0,
        ..config
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn both_halves_of_a_split_ring_behave_like_queues(
        order in 0u32..7,
        before in 0u16..100,
        features in 0u8..8,
        ops in vec_of(op(), 1..400),
    ) {
        Run::<Split>::all(with_features(config::<Split>(1 << order), features), before, &ops)?;
    }

    #[test]
    fn both_halves_of_a_packed_ring_behave_like_queues(
        size in prop_oneof![1u16..70, Just(768u16)],
        before in 0u16..100,
        features in 0u8..8,
        ops in vec_of(op(), 1..400),
    ) {
        Run::<Packed>::all(with_features(config::<Packed>(size), features), before, &ops)?;
    }
}
