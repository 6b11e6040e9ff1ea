//! The rings under the C11 memory model, every interleaving and every value that a load may return: `RUSTFLAGS="--cfg loom"
//! cargo test -p virtqueue --release --lib loom`.
//!
//! Each property is there twice: for the ring as it is, and for the ring over a [`Region`] whose orderings or fences have been taken
//! out, of both sides or of one; then it must fail. A model that holds either way proves nothing.

use core::marker::PhantomData;
use core::sync::atomic::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::vec::Vec;

use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};
use loom::thread;

use crate::packed::Packed;
use crate::split::Split;
use crate::{Buffer, Chain, DeviceRing, DriverRing, Layout, Memory, Region, RingConfig, Used};

/// Where the areas are.
const AREAS: [u64; 3] = [0x1000, 0x2000, 0x3000];
/// Where the buffers are.
const DATA: u64 = 0x10_0000;

/// What is left of the ring's orderings and fences.
trait Order: Send + Sync + 'static {
    /// Acquire and Release are what they say; otherwise Relaxed.
    const ORDERS: bool;
    /// Fences are there.
    const FENCES: bool;
}

/// The ring as it is.
struct Sound;
impl Order for Sound {
    const ORDERS: bool = true;
    const FENCES: bool = true;
}

/// Without the fence between publishing and looking at the other side's wish, and between wishing and looking for more.
struct NoFence;
impl Order for NoFence {
    const ORDERS: bool = true;
    const FENCES: bool = false;
}

/// Published and read without release and acquire.
struct NoOrder;
impl Order for NoOrder {
    const ORDERS: bool = false;
    const FENCES: bool = true;
}

/// An atomic of the model, as wide as the widest access to it: a narrower load takes its part, a narrower store is not modelled.
#[derive(Debug)]
enum Cell {
    Two(AtomicU16),
    Four(AtomicU32),
    Eight(AtomicU64),
}

impl Cell {
    fn new(width: u64) -> Self {
        match width {
            2 => Self::Two(AtomicU16::new(0)),
            4 => Self::Four(AtomicU32::new(0)),
            8 => Self::Eight(AtomicU64::new(0)),
            _ => panic!("no atomic of {width} bytes"),
        }
    }
}

/// Layouts whose cells are known.
trait Shape: Layout + 'static {
    /// Address and width of every cell of a ring of `size`.
    fn cells(size: u16) -> Vec<(u64, u64)>;
}

fn descriptors(size: u16) -> impl Iterator<Item = (u64, u64)> {
    (0..2 * u64::from(size)).map(|n| (AREAS[0] + 8 * n, 8))
}

impl Shape for Split {
    fn cells(size: u16) -> Vec<(u64, u64)> {
        let size64 = u64::from(size);
        let avail = (0..3 + size64).map(|n| (AREAS[1] + 2 * n, 2));
        let used = (0..2 * size64).map(|n| (AREAS[2] + 4 + 4 * n, 4));
        let ends = [0, 2, 4 + 8 * size64].map(|at| (AREAS[2] + at, 2));
        descriptors(size)
            .chain(avail)
            .chain(used)
            .chain(ends)
            .collect()
    }
}

impl Shape for Packed {
    fn cells(size: u16) -> Vec<(u64, u64)> {
        let events = [AREAS[1], AREAS[2]].map(|area| (area, 4));
        descriptors(size).chain(events).collect()
    }
}

/// Memory of the model, as somebody with the orderings and fences of `O` reaches it.
struct World<O> {
    cells: Arc<BTreeMap<u64, Cell>>,
    order: PhantomData<O>,
}

impl<O> World<O> {
    fn new<L: Shape>(size: u16) -> Self {
        let cells = L::cells(size)
            .into_iter()
            .map(|(addr, width)| (addr, Cell::new(width)));
        Self {
            cells: Arc::new(cells.collect()),
            order: PhantomData,
        }
    }

    /// The same memory as another side reaches it.
    fn seen_by<P>(&self) -> World<P> {
        World {
            cells: self.cells.clone(),
            order: PhantomData,
        }
    }
}

impl<O: Order> Memory for World<O> {
    type Region = Part<O>;

    fn region(&self, addr: u64, _: usize, _: usize) -> Option<Part<O>> {
        Some(Part {
            world: self.seen_by(),
            start: addr,
        })
    }

    /// A stale descriptor is for the test to find.
    fn contains(&self, _: u64, _: u32) -> bool {
        true
    }
}

struct Part<O> {
    world: World<O>,
    start: u64,
}

impl<O: Order> Part<O> {
    /// The cell that an address is in, and how far in, in bits.
    fn cell(&self, offset: usize) -> (&Cell, u32) {
        let addr = self.start + u64::try_from(offset).unwrap();
        let (start, cell) = self.world.cells.range(..=addr).next_back().unwrap();
        (cell, u32::try_from(8 * (addr - start)).unwrap())
    }

    fn order(order: Ordering) -> Ordering {
        if O::ORDERS { order } else { Ordering::Relaxed }
    }

    fn load(&self, offset: usize, width: u32, order: Ordering) -> u64 {
        let order = Self::order(order);
        let (cell, shift) = self.cell(offset);
        let (value, room) = match cell {
            Cell::Two(cell) => (cell.load(order).into(), 16),
            Cell::Four(cell) => (cell.load(order).into(), 32),
            Cell::Eight(cell) => (cell.load(order), 64),
        };
        assert!(
            shift + width <= room,
            "a load of {width} bits at {offset} is not in one cell"
        );
        value >> shift
    }
}

/// A load, and a store that is a whole cell.
macro_rules! access {
    ($load:ident, $store:ident, $int:ty, $cell:ident) => {
        fn $load(&self, offset: usize, order: Ordering) -> $int {
            // Cut to the width that was asked for.
            #[allow(clippy::cast_possible_truncation)]
            let value = self.load(offset, <$int>::BITS, order) as $int;
            value
        }

        fn $store(&self, offset: usize, value: $int, order: Ordering) {
            match self.cell(offset) {
                (Cell::$cell(cell), 0) => cell.store(value, Self::order(order)),
                (cell, shift) => {
                    panic!(
                        "a store of {} bits at bit {shift} of {cell:?}",
                        <$int>::BITS
                    )
                }
            }
        }
    };
}

impl<O: Order> Region for Part<O> {
    access!(load_u16, store_u16, u16, Two);
    access!(load_u32, store_u32, u32, Four);
    access!(load_u64, store_u64, u64, Eight);

    fn fence(order: Ordering) {
        if O::FENCES {
            fence(order);
        }
    }
}

/// Which features are on.
#[derive(Clone, Copy)]
struct Features {
    event_idx: bool,
    in_order: bool,
}

const PLAIN: Features = Features {
    event_idx: false,
    in_order: false,
};
const EVENT_IDX: Features = Features {
    event_idx: true,
    in_order: false,
};
const IN_ORDER: Features = Features {
    event_idx: false,
    in_order: true,
};

type Pair<L, A, B> = (
    <L as Layout>::Driver<World<A>>,
    <L as Layout>::Device<World<B>>,
);

/// A fresh ring: its driver with the orderings of `A`, its device with those of `B`.
fn pair<L: Shape, A: Order, B: Order>(size: u16, features: Features) -> Pair<L, A, B> {
    let [desc, driver, device] = AREAS;
    let config = RingConfig {
        size,
        desc,
        driver,
        device,
        event_idx: features.event_idx,
        in_order: features.in_order,
        indirect: false,
    };
    let memory = World::<A>::new::<L>(size);
    let other = memory.seen_by::<B>();
    (
        L::driver(memory, &config).unwrap(),
        L::device(other, &config).unwrap(),
    )
}

/// Runs every execution. With a bound, those with at most that many switches away from a thread that could have gone on.
fn explore(bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 20_000;
    builder.preemption_bound = bound;
    builder.check(model);
}

fn readable(n: u32) -> Buffer {
    Buffer {
        addr: DATA + u64::from(n) * 64,
        len: 16 + n,
        device_writes: false,
    }
}

fn writable(n: u32) -> Buffer {
    Buffer {
        device_writes: true,
        ..readable(n)
    }
}

/// One chain, if there is one: its id and buffers. The other side is honest, so an error comes from what is not there yet.
fn get(device: &mut impl DeviceRing) -> Option<(u16, Vec<Buffer>)> {
    let mut chains = [Chain::default(); 1];
    let mut buffers = [Buffer::default(); 2];
    let count = device.get(&mut chains, &mut buffers).expect("torn");
    let [chain] = chains;
    (count > 0).then(|| (chain.id, buffers[..usize::from(chain.count)].to_vec()))
}

fn take(driver: &mut impl DriverRing) -> Option<Used> {
    let mut used = [Used::default(); 1];
    let count = driver.take(&mut used).expect("torn");
    (count > 0).then_some(used[0])
}

/// The device sees nothing of a chain, or all of it and what its buffers hold.
fn available<L: Shape, A: Order, B: Order>(features: Features) {
    explore(None, move || {
        let (mut driver, mut device) = pair::<L, A, B>(2, features);
        let payload = Arc::new(AtomicU32::new(0));
        let chain = [readable(1), writable(2)];
        let theirs = payload.clone();
        let peer = thread::spawn(move || {
            theirs.store(7, Ordering::Relaxed);
            driver.add(&chain).unwrap();
            driver.publish();
        });
        for _ in 0..2 {
            if let Some((_, buffers)) = get(&mut device) {
                assert_eq!(buffers, chain, "torn: chain");
                assert_eq!(payload.load(Ordering::Relaxed), 7, "torn: payload");
                break;
            }
        }
        peer.join().unwrap();
    });
}

/// The driver sees nothing of a used chain, or all of it and what was written to its buffers.
fn used<L: Shape, A: Order, B: Order>(features: Features) {
    explore(None, move || {
        let (mut driver, mut device) = pair::<L, A, B>(2, features);
        let payload = Arc::new(AtomicU32::new(0));
        let token = driver.add(&[readable(1), writable(2)]).unwrap();
        driver.publish();
        let (id, _) = get(&mut device).unwrap();
        let theirs = payload.clone();
        let peer = thread::spawn(move || {
            theirs.store(7, Ordering::Relaxed);
            device.put(id, 5);
            device.publish();
        });
        for _ in 0..2 {
            if let Some(used) = take(&mut driver) {
                assert_eq!(used, Used { id: token, len: 5 }, "torn: element");
                assert_eq!(payload.load(Ordering::Relaxed), 7, "torn: payload");
                break;
            }
        }
        peer.join().unwrap();
    });
}

/// A descriptor that is used again shows its new contents only, and what one side wrote before it handed a buffer over does not mix with
/// what the other wrote before that.
fn reuse<L: Shape, A: Order, B: Order>(features: Features) {
    explore(Some(3), move || {
        let (mut driver, mut device) = pair::<L, A, B>(1, features);
        let payload = Arc::new(AtomicU32::new(0));
        let theirs = payload.clone();
        let peer = thread::spawn(move || {
            for n in 1..=2 {
                theirs.store(n, Ordering::Relaxed);
                driver.add(&[writable(n)]).unwrap();
                driver.publish();
                let used = loop {
                    match take(&mut driver) {
                        Some(used) => break used,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(used.len, n, "torn: element");
                assert_eq!(theirs.load(Ordering::Relaxed), 10 * n, "torn: reply");
            }
        });
        for n in 1..=2 {
            let (id, buffers) = loop {
                match get(&mut device) {
                    Some(chain) => break chain,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(buffers, [writable(n)], "torn: chain");
            assert_eq!(payload.load(Ordering::Relaxed), n, "torn: request");
            payload.store(10 * n, Ordering::Relaxed);
            device.put(id, n);
            device.publish();
        }
        peer.join().unwrap();
    });
}

/// The driver publishes while the device goes to sleep: it is kicked, or it sees the chain.
fn kick<L: Shape, A: Order, B: Order>(features: Features) {
    explore(None, move || {
        let (mut driver, mut device) = pair::<L, A, B>(2, features);
        device.disable_kicks();
        let peer = thread::spawn(move || {
            driver.add(&[readable(0)]).unwrap();
            driver.publish()
        });
        let seen = device.enable_kicks();
        let kicked = peer.join().unwrap();
        assert!(kicked || seen, "a lost kick");
    });
}

/// The device publishes while the driver goes to sleep: it is called, or it sees the used chain.
fn call<L: Shape, A: Order, B: Order>(features: Features) {
    explore(None, move || {
        let (mut driver, mut device) = pair::<L, A, B>(2, features);
        driver.disable_calls();
        driver.add(&[readable(0)]).unwrap();
        driver.publish();
        let (id, _) = get(&mut device).unwrap();
        let peer = thread::spawn(move || {
            device.put(id, 0);
            device.publish()
        });
        let seen = driver.enable_calls();
        let called = peer.join().unwrap();
        assert!(called || seen, "a lost call");
    });
}

/// Request and reply, twice, both sides asleep whenever there is nothing to do. A lost wake-up leaves both asleep, which is a
/// deadlock of the model.
fn sleepers<L: Shape, A: Order, B: Order>(features: Features) {
    explore(Some(3), move || {
        let (mut driver, mut device) = pair::<L, A, B>(1, features);
        let bells = Arc::new((Notify::new(), Notify::new()));
        let theirs = bells.clone();
        let peer = thread::spawn(move || {
            let (kick, call) = &*theirs;
            for n in 1..=2 {
                driver.add(&[writable(n)]).unwrap();
                if driver.publish() {
                    kick.notify();
                }
                let used = loop {
                    if let Some(used) = take(&mut driver) {
                        break used;
                    }
                    if !driver.enable_calls() {
                        call.wait();
                    }
                    driver.disable_calls();
                };
                assert_eq!(used.len, n);
            }
        });
        let (kick, call) = &*bells;
        for n in 1..=2 {
            let (id, _) = loop {
                if let Some(chain) = get(&mut device) {
                    break chain;
                }
                if !device.enable_kicks() {
                    kick.wait();
                }
                device.disable_kicks();
            };
            device.put(id, n);
            if device.publish() {
                call.notify();
            }
        }
        peer.join().unwrap();
    });
}

/// The properties of a layout, and that each fails without what it needs.
macro_rules! models {
    ($module:ident, $layout:ty) => {
        mod $module {
            use super::*;

            #[test]
            fn what_is_available_is_whole() {
                available::<$layout, Sound, Sound>(PLAIN);
                available::<$layout, Sound, Sound>(IN_ORDER);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_available_is_not_whole_without_the_drivers_release() {
                available::<$layout, NoOrder, Sound>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_available_is_not_whole_without_the_devices_acquire() {
                available::<$layout, Sound, NoOrder>(PLAIN);
            }

            #[test]
            fn what_is_used_is_whole() {
                used::<$layout, Sound, Sound>(PLAIN);
                used::<$layout, Sound, Sound>(IN_ORDER);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_used_is_not_whole_without_the_devices_release() {
                used::<$layout, Sound, NoOrder>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_used_is_not_whole_without_the_drivers_acquire() {
                used::<$layout, NoOrder, Sound>(PLAIN);
            }

            #[test]
            fn what_is_used_again_is_new() {
                reuse::<$layout, Sound, Sound>(PLAIN);
                reuse::<$layout, Sound, Sound>(IN_ORDER);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_used_again_is_old_without_the_drivers_release_and_acquire() {
                reuse::<$layout, NoOrder, Sound>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "torn")]
            fn what_is_used_again_is_old_without_the_devices_release_and_acquire() {
                reuse::<$layout, Sound, NoOrder>(PLAIN);
            }

            #[test]
            fn no_kick_is_lost() {
                kick::<$layout, Sound, Sound>(PLAIN);
                kick::<$layout, Sound, Sound>(EVENT_IDX);
            }

            #[test]
            #[should_panic(expected = "a lost kick")]
            fn a_kick_is_lost_without_the_drivers_fence() {
                kick::<$layout, NoFence, Sound>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "a lost kick")]
            fn a_kick_is_lost_without_the_devices_fence() {
                kick::<$layout, Sound, NoFence>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "a lost kick")]
            fn a_kick_is_lost_without_the_drivers_fence_with_event_indices() {
                kick::<$layout, NoFence, Sound>(EVENT_IDX);
            }

            #[test]
            #[should_panic(expected = "a lost kick")]
            fn a_kick_is_lost_without_the_devices_fence_with_event_indices() {
                kick::<$layout, Sound, NoFence>(EVENT_IDX);
            }

            #[test]
            fn no_call_is_lost() {
                call::<$layout, Sound, Sound>(PLAIN);
                call::<$layout, Sound, Sound>(EVENT_IDX);
            }

            #[test]
            #[should_panic(expected = "a lost call")]
            fn a_call_is_lost_without_the_devices_fence() {
                call::<$layout, Sound, NoFence>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "a lost call")]
            fn a_call_is_lost_without_the_drivers_fence() {
                call::<$layout, NoFence, Sound>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "a lost call")]
            fn a_call_is_lost_without_the_devices_fence_with_event_indices() {
                call::<$layout, Sound, NoFence>(EVENT_IDX);
            }

            #[test]
            #[should_panic(expected = "a lost call")]
            fn a_call_is_lost_without_the_drivers_fence_with_event_indices() {
                call::<$layout, NoFence, Sound>(EVENT_IDX);
            }

            #[test]
            fn never_are_both_asleep() {
                sleepers::<$layout, Sound, Sound>(PLAIN);
                sleepers::<$layout, Sound, Sound>(EVENT_IDX);
            }

            #[test]
            #[should_panic(expected = "deadlock")]
            fn both_are_asleep_without_the_drivers_fence() {
                sleepers::<$layout, NoFence, Sound>(PLAIN);
            }

            #[test]
            #[should_panic(expected = "deadlock")]
            fn both_are_asleep_without_the_devices_fence() {
                sleepers::<$layout, Sound, NoFence>(EVENT_IDX);
            }
        }
    };
}

models!(split, Split);
models!(packed, Packed);
