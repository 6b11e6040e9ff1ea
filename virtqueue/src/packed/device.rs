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
    /// A ring that starts at its first descriptor, as after a reset. Kicks are asked for.
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

    /// The second half of the descriptor at `at`, if it is available.
    #[inline]
    fn available(&self, at: Position) -> Option<u64> {
        let word = self.areas.desc.load_u64(at.offset() + 8, Acquire);
        (word & STATE == at.available()).then_some(word)
    }

    /// Whether a chain with this id is taken and not put, given what [`Device::by_id`] holds for it.
    #[inline]
    fn is_out(&self, entry: u64, taken: u64) -> bool {
        if self.in_order {
            // From 1 on, modulo 2^64.
            entry.wrapping_sub(self.done).wrapping_sub(1) < taken.wrapping_sub(self.done)
        } else {
            entry != 0
        }
    }

    /// The body of [`DeviceRing::get`]; the caller latches the error.
    #[inline]
    fn walk(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error> {
        // A chain has at least one buffer. `Chain::first` is what limits the array.
        let limit = buffers.len().min(usize::from(u16::MAX));
        let (mut room, _) = buffers.split_at_mut(limit);
        let size = self.size;
        let mut next = self.next;
        let mut taken = self.taken;
        let mut filled = 0u16;
        let mut count = 0;
        for chain in chains {
            let Some(word) = self.available(next) else {
                break;
            };
            // What the driver has got back and what it never had.
            let free = u64::from(size).wrapping_sub(taken.wrapping_sub(self.shown));
            if free == 0 {
                return Err(Error::IndexOutOfRange);
            }
            let place = core::mem::take(&mut room);
            let found = if word & in_word(NEXT | INDIRECT) == 0 {
                let Some(place) = place.first_mut() else {
                    break;
                };
                let addr = self.areas.desc.load_u64(next.offset(), Relaxed);
                let checked = buffer(addr, word);
                if !self.memory.contains(checked.addr, checked.len) {
                    return Err(Error::BadAddress);
                }
                *place = checked;
                Found {
                    id: id_of(word),
                    descriptors: 1,
                    count: 1,
                }
            } else {
                if place.is_empty() {
                    break;
                }
                match self.follow(next, word, free, place)? {
                    Some(found) => found,
                    None if filled == 0 => return Err(Error::ChainTooLong),
                    None => break,
                }
            };
            let entry = *self.by_id.get(usize::from(found.id)).ok_or(Error::BadId)?;
            if self.is_out(entry, taken) {
                return Err(Error::BadId);
            }
            let length = u64::from(found.descriptors);
            taken = taken.wrapping_add(length);
            if let Some(entry) = self.by_id.get_mut(usize::from(found.id)) {
                *entry = if self.in_order { taken } else { length };
            }
            let end = next.step(found.descriptors - 1, size);
            if let Some(end) = self.by_end.get_mut(usize::from(end.slot)) {
                *end = (found.id, found.descriptors);
            }
            next = end.step(1, size);
            *chain = Chain {
                id: found.id,
                first: filled,
                count: found.count,
            };
            filled += found.count;
            room = place
                .get_mut(usize::from(found.count)..)
                .unwrap_or_default();
            count += 1;
        }
        self.next = next;
        self.taken = taken;
        Ok(count)
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
                at = at.step(1, self.size);
                // The driver has written all of the list before its first descriptor.
                word = self.available(at).ok_or(Error::BadFlags)?;
                if word & in_word(INDIRECT) != 0 {
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

    /// How many descriptors are used with the chain of this id; `None` where it is not outstanding.
    #[inline]
    fn finish(&mut self, id: u16) -> Option<u16> {
        let entry = *self.by_id.get(usize::from(id))?;
        if !self.is_out(entry, self.taken) {
            return None;
        }
        if self.in_order {
            return u16::try_from(entry.wrapping_sub(self.done)).ok();
        }
        *self.by_id.get_mut(usize::from(id))? = 0;
        u16::try_from(entry).ok()
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
        let result = self.walk(chains, buffers);
        if result.is_err() {
            self.broken = true;
        }
        result
    }

    fn unget(&mut self, n: usize) {
        for _ in 0..n {
            // No further than what is taken and not put, whatever the caller says.
            let end = self.next.back(1, self.size);
            let Some(&(id, count)) = self.by_end.get(usize::from(end.slot)) else {
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
        let Some(count) = self.finish(id) else {
            return;
        };
        let write = if written > 0 { in_word(WRITE) } else { 0 };
        let word = pack(written, id, self.used.used() | write);
        if self.done == self.shown {
            self.head = word;
        } else {
            let at = self.used.offset() + 8;
            self.areas.desc.store_u64(at, word, Relaxed);
        }
        self.used = self.used.step(count, self.size);
        self.done = self.done.wrapping_add(u64::from(count));
    }

    #[inline]
    fn put_read(&mut self, chains: &[Chain]) {
        if self.in_order {
            // Section 2.8.8: one descriptor for all, in the place of the first, with the id of the last. The driver takes the others
            // to be used completely, which for chains that it only lets us read is the same as what we would write.
            if let Some(last) = chains.last() {
                self.put(last.id, 0);
            }
        } else {
            for chain in chains {
                self.put(chain.id, 0);
            }
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
        self.available(self.next).is_some()
    }

    #[inline]
    fn base(&self) -> u32 {
        u32::from(self.next.bits()) | u32::from(self.published.bits()) << 16
    }
}
