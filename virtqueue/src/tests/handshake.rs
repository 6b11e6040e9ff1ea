//! The wake-up handshake, exhaustively: one side publishes while the other goes to sleep. Every interleaving of their accesses is run, with
//! each side's stores either visible at once or held back until its fence, as a processor's store buffer does.

use core::cell::RefCell;
use core::sync::atomic::Ordering;
use std::boxed::Box;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use std::thread;

use super::*;
use crate::Region;

/// Accesses of a side in the handshake: store, fence, load.
const STEPS: u32 = 3;

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// Whose access is next; anybody's where it has ended.
    schedule: Vec<usize>,
    step: usize,
    done: [bool; 2],
}

#[derive(Clone, Debug)]
struct World(Arc<(Mutex<State>, Condvar)>);

/// A thread that plays a side.
struct Side {
    world: World,
    number: usize,
    /// Stores wait in `held` for a fence.
    lazy: bool,
    /// Fences work.
    fenced: bool,
    held: Vec<(usize, Vec<u8>)>,
}

std::thread_local! {
    /// None while a ring is made ready.
    static SIDE: RefCell<Option<Side>> = const { RefCell::new(None) };
}

impl World {
    fn new() -> Self {
        let state = State {
            bytes: vec![0; usize::try_from(DATA - RING).unwrap()],
            schedule: Vec::new(),
            step: 0,
            done: [false; 2],
        };
        Self(Arc::new((Mutex::new(state), Condvar::new())))
    }

    /// One access, when it is the caller's turn.
    fn access<T>(&self, act: impl FnOnce(Option<&mut Side>, &mut Vec<u8>) -> T) -> T {
        SIDE.with_borrow_mut(|side| {
            let (lock, changed) = &*self.0;
            let mut state = lock.lock().unwrap();
            if let Some(Side { number, .. }) = side {
                let waits = |s: &mut State| {
                    !s.done[1 - *number] && s.schedule.get(s.step).is_some_and(|n| n != number)
                };
                // The other side may have failed: then the count of steps tells.
                let limit = Duration::from_secs(10);
                state = changed.wait_timeout_while(state, limit, waits).unwrap().0;
                state.step += 1;
                changed.notify_all();
            }
            act(side.as_mut(), &mut state.bytes)
        })
    }

    /// Plays a side to its end.
    fn play<T>(&self, number: usize, lazy: bool, fenced: bool, act: impl FnOnce() -> T) -> T {
        SIDE.set(Some(Side {
            world: self.clone(),
            number,
            lazy,
            fenced,
            held: Vec::new(),
        }));
        let result = act();
        // What is still held becomes visible some time: here, too late for the other side.
        SIDE.set(None);
        let (lock, changed) = &*self.0;
        lock.lock().unwrap().done[number] = true;
        changed.notify_all();
        result
    }
}

fn flush(held: Vec<(usize, Vec<u8>)>, bytes: &mut [u8]) {
    for (at, value) in held {
        bytes[at..at + value.len()].copy_from_slice(&value);
    }
}

impl Memory for World {
    type Region = Part;
    fn region(&self, addr: u64, _: usize, _: usize) -> Option<Part> {
        Some(Part {
            world: self.clone(),
            start: usize::try_from(addr - RING).unwrap(),
        })
    }
    fn contains(&self, _: u64, _: u32) -> bool {
        true
    }
}

#[derive(Debug)]
struct Part {
    world: World,
    start: usize,
}

impl Part {
    fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        let at = self.start + offset;
        self.world.access(|side, bytes| {
            // A side sees its own stores.
            let own = side.and_then(|s| s.held.iter().rfind(|(a, _)| *a == at));
            let value = own.map_or(&bytes[at..at + N], |(_, value)| value);
            value.try_into().unwrap()
        })
    }

    fn store<const N: usize>(&self, offset: usize, value: [u8; N]) {
        let store = (self.start + offset, value.to_vec());
        self.world.access(|side, bytes| match side {
            Some(side) if side.lazy => side.held.push(store),
            _ => flush(vec![store], bytes),
        });
    }
}

impl Region for Part {
    fn load_u16(&self, offset: usize, _: Ordering) -> u16 {
        u16::from_le_bytes(self.load(offset))
    }
    fn load_u32(&self, offset: usize, _: Ordering) -> u32 {
        u32::from_le_bytes(self.load(offset))
    }
    fn load_u64(&self, offset: usize, _: Ordering) -> u64 {
        u64::from_le_bytes(self.load(offset))
    }
    fn store_u16(&self, offset: usize, value: u16, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn store_u32(&self, offset: usize, value: u32, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn store_u64(&self, offset: usize, value: u64, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn fence(order: Ordering) {
        assert_eq!(order, Ordering::SeqCst);
        let world = SIDE.with_borrow(|side| side.as_ref().map(|side| side.world.clone()));
        if let Some(world) = world {
            world.access(|side, bytes| match side {
                Some(side) if side.fenced => flush(core::mem::take(&mut side.held), bytes),
                _ => (),
            });
        }
    }
}

/// All orders of two sides with [`STEPS`] accesses each.
fn schedules() -> impl Iterator<Item = Vec<usize>> {
    (0u32..1 << (2 * STEPS))
        .filter(|bits| bits.count_ones() == STEPS)
        .map(|bits| {
            (0..2 * STEPS)
                .map(|n| usize::from(bits >> n & 1 == 1))
                .collect()
        })
}

/// Runs every schedule; in how many of them nobody noticed what was published.
fn lost<L>(event_idx: bool, fenced: bool, device_sleeps: bool) -> usize
where
    L: Tested<Driver<World>: Send, Device<World>: Send>,
{
    let config = RingConfig {
        event_idx,
        ..config::<L>(4)
    };
    let start = L::start(4, 1);
    let runs = schedules().flat_map(|s| (0..4).map(move |lazy| (s.clone(), lazy)));
    let lost = runs.filter(|(schedule, lazy)| {
        let world = World::new();
        let mut driver = L::driver_at(world.clone(), &config, start).unwrap();
        let mut device = L::device_at(world.clone(), &config, start).unwrap();
        driver.disable_calls();
        device.disable_kicks();
        driver.add(&[buffer(0, false)]).unwrap();
        if !device_sleeps {
            driver.publish();
            let (chain, _) = get(&mut device, 1)[0];
            device.put(chain.id, 0);
        }
        world.0.0.lock().unwrap().schedule = schedule.clone();
        let (publishes, sleeps): (Act<'_>, Act<'_>) = if device_sleeps {
            (
                Box::new(|| driver.publish()),
                Box::new(|| device.enable_kicks()),
            )
        } else {
            (
                Box::new(|| device.publish()),
                Box::new(|| driver.enable_calls()),
            )
        };
        let (notified, seen) = thread::scope(|scope| {
            let publisher = scope.spawn(|| world.play(0, lazy & 1 != 0, fenced, publishes));
            let sleeper = scope.spawn(|| world.play(1, lazy & 2 != 0, fenced, sleeps));
            (publisher.join().unwrap(), sleeper.join().unwrap())
        });
        let steps = world.0.0.lock().unwrap().step;
        assert_eq!(steps, schedule.len(), "the schedule covers everything");
        !notified && !seen
    });
    lost.count()
}

type Act<'a> = Box<dyn FnOnce() -> bool + Send + 'a>;

/// All cases of `lost`.
fn all_lost<L>(fenced: bool) -> Vec<usize>
where
    L: Tested<Driver<World>: Send, Device<World>: Send>,
{
    let cases = [(false, false), (false, true), (true, false), (true, true)];
    cases
        .into_iter()
        .map(|(event_idx, device_sleeps)| lost::<L>(event_idx, fenced, device_sleeps))
        .collect()
}

#[test]
fn no_interleaving_loses_a_wake_up() {
    assert_eq!(all_lost::<Split>(true), [0; 4]);
    assert_eq!(all_lost::<Packed>(true), [0; 4]);
}

/// The model would notice.
#[test]
fn without_fences_some_interleaving_loses_a_wake_up() {
    assert!(all_lost::<Split>(false).iter().all(|lost| *lost > 0));
    assert!(all_lost::<Packed>(false).iter().all(|lost| *lost > 0));
}
