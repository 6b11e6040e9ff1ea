//! The device's side of a packed ring.

use alloc::boxed::Box;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{
    Areas, EVENT_DISABLE, INDIRECT, NEXT, Position, STATE, WRITE, id_of, in_word, len_of, pack,
    wants, wish,
};
use crate::chain::{Collector, DESC_LEN, open_table};
use crate::{Buffer, Chain, DeviceRing, Error, Memory, Region, RingConfig};

/// The device's side of a packed ring (VIRTIO 1.3 section 2.8).
///
/// It allocates once, when it is made. Every number that the driver wrote is read once and checked; descriptor flags without a meaning are
/// ignored.
///
/// With `in_order` the caller puts chains back in the order in which it got them (section 2.8.8), and one that it puts stands for all before it.
#[derive(Debug)]
pub struct Device<M: Memory> {
    memory: M,
    areas: Areas<M::Region>,
    /// By id. In order: `taken` when the chain with this id had been taken. Otherwise its length in descriptors, 0 where
    /// it is not outstanding.
    by_id: Box<[u64]>,
    /// By the place of a chain's last descriptor: id and length.
    by_end: Box<[(u16, u16)]>,
    size: u16,
    event_idx: bool,
    in_order: bool,
    indirect: bool,
    broken: bool,
    /// Kicks are asked for.
    armed: bool,
    /// The next descriptor to take.
    next: Position,
    /// Where the next used descriptor goes.
    used: Position,
    /// Where the first used descriptor goes that the driver does not see.
    published: Position,
    /// Descriptors so far up to `next`.
    taken: u64,
    /// Descriptors so far up to `used`.
    done: u64,
    /// Descriptors so far up to `published`.
    shown: u64,
    /// The second half of the descriptor at `published`, while there is one.
    head: u64,
}

/// A chain, as it is in the ring.
struct Found {
    id: u16,
    /// How many descriptors it has there.
    descriptors: u16,
    /// How many buffers it has.
    count: u16,
}

/// What is left of the caller's arrays, and how far the ring has been read.
struct Burst<'a> {
    chains: &'a mut [Chain],
    room: &'a mut [Buffer],
    /// Buffers that have been filled.
    filled: u16,
    next: Position,
    taken: u64,
}

impl Burst<'_> {
    /// Has used up some of the arrays.
    #[inline]
    fn skip(&mut self, chains: usize, buffers: u16) {
        let rest = core::mem::take(&mut self.chains);
        self.chains = rest.get_mut(chains..).unwrap_or_default();
        let rest = core::mem::take(&mut self.room);
        self.room = rest.get_mut(usize::from(buffers)..).unwrap_or_default();
        self.filled = self.filled.wrapping_add(buffers);
    }
}

/// Whether a chain is taken and not put, given what [`Device::by_id`] holds for its id.
#[inline]
fn is_out<const IN_ORDER: bool>(entry: u64, done: u64, taken: u64) -> bool {
    if IN_ORDER {
        // From 1 on, modulo 2^64.
        entry.wrapping_sub(done).wrapping_sub(1) < taken.wrapping_sub(done)
    } else {
        entry != 0
    }
}

/// The buffer of a descriptor.
#[inline]
fn buffer(addr: u64, word: u64) -> Buffer {
    Buffer {
        addr,
        len: len_of(word),
        device_writes: word & in_word(WRITE) != 0,
    }
}

impl<M: Memory> Device<M> {
    /// A ring that starts at its first descriptor, as after a reset (section 2.8.1). Kicks are asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the size is 0 or more than [`MAX_SIZE`](super::MAX_SIZE), or an area is not aligned or not in memory.
    pub fn new(memory: M, config: &RingConfig) -> Result<Self, Error> {
        Self::start(memory, config, Position::START, Position::START, 0)
    }

    /// A ring that goes on at the position `base` ([`Layout::device_at`](crate::Layout::device_at), VHOST_USER_SET_VRING_BASE). Chains between its two halves are
    /// another device's: their lengths are not known, so they can't be used any more.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Device::new`], where `base` is outside the ring, and where its available half is not within the
    /// ring's size behind its used half.
    pub fn with_base(memory: M, config: &RingConfig, base: u32) -> Result<Self, Error> {
        let [next, used] = Position::from_base(base, config.size)?;
        let taken = u16::try_from(next.ahead(used, config.size)).map_err(|_| Error::Config)?;
        if taken > config.size {
            return Err(Error::Config);
        }
        Self::start(memory, config, next, used, taken)
    }

    fn start(
        memory: M,
        config: &RingConfig,
        next: Position,
        used: Position,
        taken: u16,
    ) -> Result<Self, Error> {
        let areas = Areas::new(&memory, config)?;
        let mut ring = Self {
            memory,
            areas,
            by_id: (0..config.size).map(|_| 0).collect(),
            by_end: (0..config.size).map(|_| (0, 0)).collect(),
            size: config.size,
            event_idx: config.event_idx,
            in_order: config.in_order,
            indirect: config.indirect,
            broken: false,
            armed: false,
            next,
            used,
            published: used,
            taken: u64::from(taken),
            done: 0,
            shown: 0,
            head: 0,
        };
        ring.arm();
        Ok(ring)
    }

    /// The memory that buffers are in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The second half of the descriptor at `at`.
    #[inline]
    fn word(&self, at: Position) -> u64 {
        self.areas.desc.load_u64(at.offset() + 8, Acquire)
    }

    /// Books a chain of `length` descriptors, which `taken` counts as well. An id that is not in the ring, or outstanding, is a violation.
    #[inline]
    fn book<const IN_ORDER: bool>(
        entry: Option<&mut u64>,
        done: u64,
        length: u64,
        taken: u64,
    ) -> Result<(), Error> {
        let entry = entry.ok_or(Error::BadId)?;
        if is_out::<IN_ORDER>(*entry, done, taken.wrapping_sub(length)) {
            return Err(Error::BadId);
        }
        *entry = if IN_ORDER { taken } else { length };
        Ok(())
    }

    /// How many more descriptors can be available: what the driver has got back and what it never had.
    #[inline]
    fn free(&self, taken: u64) -> u64 {
        u64::from(self.size).wrapping_sub(taken.wrapping_sub(self.shown))
    }

    /// Takes chains of one descriptor, up to the first other thing and not beyond the end of the ring. Returns how many, and the second half
    /// of the descriptor that stopped it.
    #[inline]
    fn run<const IN_ORDER: bool>(
        &mut self,
        burst: &mut Burst<'_>,
    ) -> Result<(u16, Option<u64>), Error> {
        let expected = burst.next.available();
        let done = self.done;
        let free = usize::try_from(self.free(burst.taken)).unwrap_or(usize::MAX);
        let slot = usize::from(burst.next.slot());
        let mut at = burst.next.offset();
        let mut taken = burst.taken;
        let mut first = burst.filled;
        let mut count = 0u16;
        let ends = self.by_end.get_mut(slot..).unwrap_or_default();
        let places = burst.chains.iter_mut().zip(burst.room.iter_mut()).zip(ends);
        for ((chain, place), end) in places.take(free) {
            let word = self.areas.desc.load_u64(at + 8, Acquire);
            if word & (STATE | in_word(NEXT | INDIRECT)) != expected {
                return Ok((count, Some(word)));
            }
            let checked = buffer(self.areas.desc.load_u64(at, Relaxed), word);
            if !self.memory.contains(checked.addr, checked.len) {
                return Err(Error::BadAddress);
            }
            taken = taken.wrapping_add(1);
            let id = id_of(word);
            Self::book::<IN_ORDER>(self.by_id.get_mut(usize::from(id)), done, 1, taken)?;
            *place = checked;
            *end = (id, 1);
            *chain = Chain {
                id,
                first,
                count: 1,
            };
            first = first.wrapping_add(1);
            count = count.wrapping_add(1);
            at = at.wrapping_add(DESC_LEN);
        }
        Ok((count, None))
    }

    /// The body of [`DeviceRing::get`]; the caller latches the error.
    #[inline]
    fn walk<const IN_ORDER: bool>(
        &mut self,
        chains: &mut [Chain],
        buffers: &mut [Buffer],
    ) -> Result<usize, Error> {
        // A chain has at least one buffer. `Chain::first` is what limits the array.
        let limit = buffers.len().min(usize::from(u16::MAX));
        let (room, _) = buffers.split_at_mut(limit);
        let wanted = chains.len();
        let mut burst = Burst {
            chains,
            room,
            filled: 0,
            next: self.next,
            taken: self.taken,
        };
        while !burst.chains.is_empty() && !burst.room.is_empty() {
            let (count, stopped) = self.run::<IN_ORDER>(&mut burst)?;
            burst.skip(usize::from(count), count);
            burst.next = burst.next.step(count, self.size);
            burst.taken = burst.taken.wrapping_add(count.into());
            let free = self.free(burst.taken);
            let word = match stopped {
                Some(word) => word,
                None if burst.chains.is_empty() || burst.room.is_empty() => break,
                // The end of the ring.
                None if free > 0 => continue,
                None => self.word(burst.next),
            };
            if word & STATE != burst.next.available() {
                break;
            }
            if free == 0 {
                return Err(Error::IndexOutOfRange);
            }
            let found = match self.follow(burst.next, word, free, burst.room)? {
                Some(found) => found,
                None if burst.filled == 0 => return Err(Error::ChainTooLong),
                None => break,
            };
            let length = u64::from(found.descriptors);
            burst.taken = burst.taken.wrapping_add(length);
            let entry = self.by_id.get_mut(usize::from(found.id));
            Self::book::<IN_ORDER>(entry, self.done, length, burst.taken)?;
            let end = burst
                .next
                .step(found.descriptors.wrapping_sub(1), self.size);
            if let Some(end) = self.by_end.get_mut(usize::from(end.slot())) {
                *end = (found.id, found.descriptors);
            }
            burst.next = end.next(self.size);
            if let Some(chain) = burst.chains.first_mut() {
                *chain = Chain {
                    id: found.id,
                    first: burst.filled,
                    count: found.count,
                };
            }
            burst.skip(1, found.count);
        }
        self.next = burst.next;
        self.taken = burst.taken;
        Ok(wanted.wrapping_sub(burst.chains.len()))
    }

    /// Follows a chain of more than one descriptor, `word` being the second half of its first, and at most `free` in the ring. `None` where it does not fit in `out`.
    #[inline(never)]
    fn follow(
        &self,
        first: Position,
        mut word: u64,
        free: u64,
        out: &mut [Buffer],
    ) -> Result<Option<Found>, Error> {
        let mut at = first;
        let mut descriptors = 1;
        let mut chain = Collector::new(&self.memory, out);
        if word & in_word(INDIRECT) != 0 {
            // Section 2.8.19: not without the feature, and not in a list.
            if !self.indirect || word & in_word(NEXT) != 0 {
                return Err(Error::BadFlags);
            }
            let addr = self.areas.desc.load_u64(at.offset(), Relaxed);
            let (table, length) = open_table(&self.memory, addr, len_of(word), self.size)?;
            for at in (0..usize::from(length)).map(|n| DESC_LEN * n) {
                // Section 2.8.7: of the flags only the one for writing counts, so there is no table in a table.
                let addr = table.load_u64(at, Relaxed);
                if !chain.push(buffer(addr, table.load_u64(at + 8, Relaxed)))? {
                    return Ok(None);
                }
            }
        } else {
            loop {
                let addr = self.areas.desc.load_u64(at.offset(), Relaxed);
                if !chain.push(buffer(addr, word))? {
                    return Ok(None);
                }
                if word & in_word(NEXT) == 0 {
                    break;
                }
                if descriptors == free {
                    return Err(Error::ChainTooLong);
                }
                descriptors += 1;
                at = at.next(self.size);
                // The driver has written all of the list before its first descriptor.
                word = self.word(at);
                if word & STATE != at.available() || word & in_word(INDIRECT) != 0 {
                    return Err(Error::BadFlags);
                }
            }
        }
        Ok(Some(Found {
            // Section 2.8.6: it is in the last descriptor.
            id: id_of(word),
            descriptors: u16::try_from(descriptors).map_err(|_| Error::ChainTooLong)?,
            count: chain.count(),
        }))
    }

    /// Writes used descriptors: ids, and how much was written. The first of a batch is held back.
    #[inline]
    fn write_used<const IN_ORDER: bool>(&mut self, chains: impl Iterator<Item = (u16, u32)>) {
        let mut used = self.used;
        let mut done = self.done;
        for (id, written) in chains {
            let Some(entry) = self.by_id.get_mut(usize::from(id)) else {
                continue;
            };
            if !is_out::<IN_ORDER>(*entry, done, self.taken) {
                continue;
            }
            let length = if IN_ORDER {
                entry.wrapping_sub(done)
            } else {
                core::mem::take(entry)
            };
            // Not more than the ring has.
            let Ok(count) = u16::try_from(length) else {
                continue;
            };
            let write = if written > 0 { in_word(WRITE) } else { 0 };
            let word = pack(written, id, used.used() | write);
            if done == self.shown {
                self.head = word;
            } else {
                let at = used.offset() + 8;
                self.areas.desc.store_u64(at, word, Relaxed);
            }
            used = used.step(count, self.size);
            done = done.wrapping_add(length);
        }
        self.used = used;
        self.done = done;
    }

    /// Asks for a kick at the next chain. The order of this store and a later look at the descriptor is up to the caller.
    #[inline]
    fn arm(&mut self) {
        self.armed = true;
        let wish = wish(self.next, self.event_idx);
        self.areas.device.store_u32(0, wish, Relaxed);
    }
}

impl<M: Memory> DeviceRing for Device<M> {
    #[inline]
    fn get(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        let result = if self.in_order {
            self.walk::<true>(chains, buffers)
        } else {
            self.walk::<false>(chains, buffers)
        };
        if result.is_err() {
            self.broken = true;
        }
        result
    }

    fn unget(&mut self, n: usize) {
        for _ in 0..n {
            // No further than what is taken and not put, whatever the caller says.
            let end = self.next.back(1, self.size);
            let Some(&(id, count)) = self.by_end.get(usize::from(end.slot())) else {
                return;
            };
            let out = self.taken.wrapping_sub(self.done);
            let Some(entry) = self.by_id.get_mut(usize::from(id)) else {
                return;
            };
            if count == 0 || u64::from(count) > out || !self.in_order && *entry == 0 {
                return;
            }
            if !self.in_order {
                *entry = 0;
            }
            self.next = self.next.back(count, self.size);
            self.taken = self.taken.wrapping_sub(u64::from(count));
        }
    }

    #[inline]
    fn put(&mut self, id: u16, written: u32) {
        let one = core::iter::once((id, written));
        if self.in_order {
            self.write_used::<true>(one);
        } else {
            self.write_used::<false>(one);
        }
    }

    #[inline]
    fn put_read(&mut self, chains: &[Chain]) {
        if self.in_order {
            // Section 2.8.8: one descriptor for all, in the place of the first, with the id of the last. The driver takes the others
            // to be used completely, which for chains that it only lets us read is the same as what we would write.
            self.write_used::<true>(chains.last().map(|chain| (chain.id, 0)).into_iter());
        } else {
            self.write_used::<false>(chains.iter().map(|chain| (chain.id, 0)));
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.done == self.shown || self.broken {
            return false;
        }
        let first = self.published;
        let at = first.offset() + 8;
        self.areas.desc.store_u64(at, self.head, Release);
        let count = u16::try_from(self.done.wrapping_sub(self.shown)).unwrap_or(self.size);
        self.published = self.used;
        self.shown = self.done;
        // The driver stores its wish and then looks at the descriptor; we store the descriptor and then look at its wish. Without a fence on
        // both sides both can miss the other's store, and the driver sleeps on used chains.
        M::Region::fence(SeqCst);
        let event = self.areas.driver.load_u32(0, Relaxed);
        wants(event, self.event_idx, first, count, self.size)
    }

    #[inline]
    fn disable_kicks(&mut self) {
        if self.armed {
            self.armed = false;
            self.areas.device.store_u32(0, EVENT_DISABLE, Relaxed);
        }
    }

    #[inline]
    fn enable_kicks(&mut self) -> bool {
        self.arm();
        // The other half of the driver's fence in `publish`.
        M::Region::fence(SeqCst);
        self.word(self.next) & STATE == self.next.available()
    }

    #[inline]
    fn present(&self) -> bool {
        // Behind all that was read so far.
        M::Region::fence(Acquire);
        // Flags that no descriptor has, and a number beyond any ring.
        self.areas.desc.load_u64(8, Relaxed) != u64::MAX
    }

    #[inline]
    fn base(&self) -> u32 {
        u32::from(self.next.0) | u32::from(self.published.0) << 16
    }
}
