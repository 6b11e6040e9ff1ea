//! A hostile peer that does what a byte string says: the body of the fuzz targets, and of tests that make the strings up.
//!
//! The strict memory panics at an access outside of the areas or across its alignment; the bodies panic where a ring breaks what it
//! promises to its user. They end with the string.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use crate::test_memory::Fake;
use crate::{Buffer, Chain, DeviceRing, DriverRing, Error, Layout, Memory, RingConfig, Used};

/// Where the memory is: not at 0, so that small numbers are bad addresses.
const BASE: u64 = 0x1_0000;
const LEN: usize = 0x4000;
/// Where buffers and tables that are meant to be good lie: behind the areas.
const DATA: u64 = BASE + 0x2000;
/// The longest ring; longer ones have no other code.
const MAX_SIZE: u16 = 64;

/// The rest of the byte string. Behind its end everything is 0.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (front, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(front);
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.half()) % end.max(1)
    }

    /// Nearly always the address of something.
    fn addr(&mut self) -> u64 {
        match self.byte() {
            0 => self.long(),
            1 => BASE + u64::from(self.half()),
            n => DATA + u64::from(n) * 16,
        }
    }

    fn buffer(&mut self) -> Buffer {
        Buffer {
            addr: self.addr(),
            len: u32::from(self.half() % 300),
            device_writes: self.byte().is_multiple_of(2),
        }
    }

    fn over(&self) -> bool {
        self.0.is_empty()
    }
}

/// A ring somewhere in a memory that holds anything.
struct Bed {
    memory: Fake,
    config: RingConfig,
    /// Bytes of each area.
    lens: [usize; 3],
    base: u32,
}

impl Bed {
    fn new<L: Layout>(input: &mut Input<'_>) -> Self {
        let wanted = 1 + input.half() % MAX_SIZE;
        let size = match L::area_sizes(wanted) {
            Some(_) => wanted,
            None => wanted.next_power_of_two(),
        };
        let flags = input.byte();
        let base = input.word();
        let memory = Fake::new(BASE, LEN);
        // What was in the memory before: the start of the string, over and over.
        let pattern: [u8; 8] = input.take();
        for at in (0..).step_by(8).take(LEN / 8) {
            memory.poke(BASE + at, pattern);
        }
        let lens = L::area_sizes(size).unwrap_or_default();
        let config = RingConfig {
            size,
            desc: BASE,
            driver: BASE + 0x800,
            device: BASE + 0x1000,
            event_idx: flags & 1 != 0,
            in_order: flags & 2 != 0,
            indirect: flags & 4 != 0,
        };
        Self {
            memory,
            config,
            lens,
            base,
        }
    }

    /// A place in one of the areas, aligned to 2 bytes.
    fn place(&self, input: &mut Input<'_>) -> u64 {
        let (start, len) = match input.byte() % 4 {
            0 => (self.config.driver, self.lens[1]),
            1 => (self.config.device, self.lens[2]),
            _ => (self.config.desc, self.lens[0]),
        };
        start + u64::try_from(input.below(len / 2) * 2).unwrap_or(0)
    }

    /// Something that the peer writes: anything; or a descriptor of either layout, which is mostly well-formed.
    fn attack(&self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => self.memory.poke(self.place(input), input.take::<2>()),
            1 => self.memory.poke(
                input.addr() & (LEN as u64 / 2 - 1) | BASE,
                input.take::<2>(),
            ),
            2 => {
                // Indices, and the positions of events.
                let area = [self.config.driver, self.config.device][usize::from(input.byte() % 2)];
                let at = area + u64::from(input.byte() % 2) * 2;
                let now = u16::from_le_bytes(self.memory.peek(at));
                let next = now.wrapping_add(u16::from(input.byte() % 8));
                self.memory.poke(at, next.to_le_bytes());
            }
            3 => {
                let loads = input.below(40);
                let place = self.place(input) & !7;
                self.memory.poke_after(loads, place, input.long());
            }
            n => {
                let in_table = n == 7;
                let slot = u64::from(input.half() % self.config.size);
                let at = if in_table { DATA } else { self.config.desc } + 16 * slot;
                self.memory.poke(at, input.addr().to_le_bytes());
                let len = match input.byte() {
                    0 => input.word(),
                    n => u32::from(n) / 16 * 16,
                };
                self.memory.poke(at + 8, len.to_le_bytes());
                self.memory.poke(at + 12, input.half().to_le_bytes());
                self.memory.poke(at + 14, input.half().to_le_bytes());
                // One of the flags' positions in either layout, mostly few flags.
                let flags = match input.byte() {
                    0 => input.half(),
                    n => [0x80, 0x8000, 0x8080, 0][usize::from(n % 4)] | u16::from(n >> 2 & 3),
                };
                let flags_at = if input.byte().is_multiple_of(2) {
                    14
                } else {
                    12
                };
                self.memory.poke(at + flags_at, flags.to_le_bytes());
                let head = u16::try_from(slot).unwrap_or(0);
                let entry = self.config.driver + 4 + 2 * u64::from(input.half() % self.config.size);
                if usize::try_from(entry - self.config.driver).unwrap_or(usize::MAX) < self.lens[1]
                {
                    self.memory.poke(entry, head.to_le_bytes());
                }
            }
        }
    }
}

/// A violation is reported once, and the queue stays broken.
fn latched(error: Error, broken: &mut bool) {
    assert_eq!(error == Error::Broken, *broken, "{error}");
    *broken = true;
}

/// The device's side against a hostile driver. `data` is what the memory holds, what the driver writes, and what the device's user does.
///
/// # Panics
///
/// Where the device breaks a promise.
pub fn fuzz_device<L: Layout>(_layout: L, data: &[u8]) {
    let mut input = Input(data);
    let bed = Bed::new::<L>(&mut input);
    let memory = bed.memory.clone();
    let Ok(mut device) = L::device_at(memory.clone(), &bed.config, bed.base)
        .or_else(|_| L::device(memory.clone(), &bed.config))
    else {
        panic!("a ring that fits was refused");
    };
    let size = usize::from(bed.config.size);
    let mut out: Vec<Chain> = Vec::new();
    // How many of them, from the end, can be put back.
    let mut fresh = 0;
    // Chains were put that were not taken: the queue is still safe, but nothing adds up any more.
    let mut misused = false;
    let mut broken = false;
    while !input.over() {
        memory.stores();
        match input.byte() % 16 {
            0..8 => bed.attack(&mut input),
            8 | 9 => {
                let mut chains = vec![Chain::default(); input.below(size + 2)];
                let mut buffers = vec![Buffer::default(); input.below(2 * size + 2)];
                match device.get(&mut chains, &mut buffers) {
                    Ok(count) => {
                        assert!(!broken && count <= chains.len());
                        check_got(&memory, &chains[..count], &buffers, size);
                        out.extend(&chains[..count]);
                        fresh += count;
                        assert!(misused || out.len() <= size, "more chains than descriptors");
                    }
                    Err(error) => latched(error, &mut broken),
                }
                assert_eq!(memory.stores(), [], "a look writes nothing");
            }
            10 if !out.is_empty() => {
                let which = input.below(if bed.config.in_order { 1 } else { out.len() });
                device.put(out.remove(which).id, input.word());
                fresh = fresh.min(out.len() - which);
            }
            11 => {
                let count = input.below(out.len() + 1);
                let chains: Vec<_> = out.drain(..count).collect();
                device.put_read(&chains);
                fresh = fresh.min(out.len());
            }
            12 => {
                device.publish();
            }
            13 => {
                let count = input.below(fresh + 1);
                out.truncate(out.len() - count);
                fresh -= count;
                device.unget(count);
            }
            14 => {
                device.enable_kicks();
            }
            15 => device.disable_kicks(),
            // What its user should not do must not hurt either.
            _ => {
                misused = true;
                device.put(input.half(), input.word());
            }
        }
        device.base();
    }
}

/// What [`DeviceRing::get`] promises of what it returns.
fn check_got(memory: &Fake, chains: &[Chain], buffers: &[Buffer], size: usize) {
    let mut first = 0;
    for chain in chains {
        assert_eq!(usize::from(chain.first), first);
        assert!(usize::from(chain.id) < size);
        let count = usize::from(chain.count);
        assert!((1..=size).contains(&count));
        let chain = &buffers[first..first + count];
        assert!(chain.is_sorted_by_key(|buffer| buffer.device_writes));
        for buffer in chain {
            assert!(memory.contains(buffer.addr, buffer.len), "{buffer:?}");
        }
        let total: u64 = chain.iter().map(|buffer| u64::from(buffer.len)).sum();
        assert!(u32::try_from(total).is_ok());
        first += count;
    }
}

/// What the driver's user knows of a chain.
struct Sent {
    writable: u32,
    descriptors: usize,
    published: bool,
}

/// The driver's side against a hostile device. `data` is what the device writes, and what the driver's user does.
///
/// # Panics
///
/// Where the driver breaks a promise.
pub fn fuzz_driver<L: Layout>(_layout: L, data: &[u8]) {
    let mut input = Input(data);
    let bed = Bed::new::<L>(&mut input);
    let memory = bed.memory.clone();
    let Ok(mut driver) = L::driver_at(memory.clone(), &bed.config, bed.base)
        .or_else(|_| L::driver(memory.clone(), &bed.config))
    else {
        panic!("a ring that fits was refused");
    };
    let size = usize::from(bed.config.size);
    let mut sent: BTreeMap<u16, Sent> = BTreeMap::new();
    let mut broken = false;
    while !input.over() {
        memory.stores();
        memory.loads();
        match input.byte() % 16 {
            0..6 => bed.attack(&mut input),
            kind @ 6..9 => {
                let count = input.below(6);
                let mut buffers: Vec<_> = (0..count).map(|_| input.buffer()).collect();
                buffers.sort_by_key(|buffer| buffer.device_writes);
                let indirect = kind == 8;
                let free = usize::from(driver.free());
                let id = if indirect {
                    driver.add_indirect(DATA + 0x1000, &buffers)
                } else {
                    driver.add(&buffers)
                };
                let descriptors = if indirect { 1 } else { count };
                let allowed = !indirect || bed.config.indirect && count <= size;
                assert_eq!(id.is_some(), allowed && count > 0 && descriptors <= free);
                let Some(id) = id else {
                    continue;
                };
                assert!(usize::from(id) < size);
                let writable = buffers.iter().filter(|buffer| buffer.device_writes);
                let chain = Sent {
                    writable: writable.map(|buffer| buffer.len).sum(),
                    descriptors,
                    published: false,
                };
                assert!(sent.insert(id, chain).is_none(), "an id is used twice");
            }
            9 | 10 => {
                driver.publish();
                assert!(!broken || memory.stores().is_empty());
                for chain in sent.values_mut() {
                    chain.published = true;
                }
            }
            11..14 => {
                let mut used = vec![Used::default(); input.below(size + 2)];
                match driver.take(&mut used) {
                    Ok(count) => {
                        assert!(!broken && count <= used.len());
                        for used in &used[..count] {
                            let chain = sent.remove(&used.id);
                            let Some(chain) = chain.filter(|chain| chain.published) else {
                                panic!("{used:?} was not with the device");
                            };
                            assert!(used.len <= chain.writable);
                        }
                    }
                    Err(error) => latched(error, &mut broken),
                }
                assert_eq!(memory.stores(), [], "a look writes nothing");
            }
            14 => {
                driver.enable_calls();
            }
            _ => driver.disable_calls(),
        }
        let out: usize = sent.values().map(|chain| chain.descriptors).sum();
        let free = if broken { 0 } else { size - out };
        assert_eq!(usize::from(driver.free()), free);
    }
}
