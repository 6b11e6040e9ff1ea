//! The device's side of a packed ring.

use alloc::boxed::Box;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{
    Areas, Cursor, EVENT_DISABLE, INDIRECT, NEXT, Position, STATE, WRITE, id_of, in_word, len_of,
    pack, wants, wish,
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

    /// A ring that goes on at the position `base` (section 2.8.1, [`Layout::device_at`](crate::Layout::device_at), VHOST_USER_SET_VRING_BASE). Chains between its two halves are
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

    /// The memory that buffers (section 2.8) are in.
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

    /// The body of [`DeviceRing::get_each`]; the caller latches the error. Returns how many chains there were, and the second half of the descriptor that stopped it,
    /// if one did.
    #[inline]
    fn singles<const IN_ORDER: bool>(
        &mut self,
        count: usize,
        mut each: impl FnMut(u16, Buffer),
    ) -> Result<(usize, Option<u64>), Error> {
        let mut next = Cursor::available(self.next, self.size);
        let (done, mut taken) = (self.done, self.taken);
        let free = usize::try_from(self.free(taken)).unwrap_or(usize::MAX);
        let most = count.min(free);
        let mut got = 0;
        let mut stopped = None;
        while got < most {
            let word = self.areas.desc.load_u64(next.at + 8, Acquire);
            if word & (STATE | in_word(NEXT | INDIRECT)) != next.state {
                stopped = Some(word);
                break;
            }
            let checked = buffer(self.areas.desc.load_u64(next.at, Relaxed), word);
            if !self.memory.contains(checked.addr, checked.len) {
                return Err(Error::BadAddress);
            }
            taken = taken.wrapping_add(1);
            let id = id_of(word);
            Self::book::<IN_ORDER>(self.by_id.get_mut(usize::from(id)), done, 1, taken)?;
            if let Some(end) = self.by_end.get_mut(next.at / DESC_LEN)
                && *end != (id, 1)
            {
                *end = (id, 1);
            }
            next.advance();
            got += 1;
            each(id, checked);
        }
        let next = next.position();
        // More chains than there are descriptors.
        if got == free && got < count && self.word(next) & STATE == next.available() {
            return Err(Error::IndexOutOfRange);
        }
        (self.next, self.taken) = (next, taken);
        Ok((got, stopped))
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
        let (buffers, _) = buffers.split_at_mut(limit);
        let wanted = chains.len();
        let (mut got, mut filled) = (0, 0);
        while got < wanted && filled < limit {
            let mut places = chains
                .iter_mut()
                .skip(got)
                .zip(buffers.iter_mut().skip(filled));
            let most = (wanted - got).min(limit - filled);
            let mut first = filled;
            let (singles, stopped) = self.singles::<IN_ORDER>(most, |id, buffer| {
                if let Some((chain, place)) = places.next() {
                    *chain = Chain {
                        id,
                        first: u16::try_from(first).unwrap_or_default(),
                        count: 1,
                    };
                    *place = buffer;
                }
                first += 1;
            })?;
            got += singles;
            filled += singles;
            let (Some(chain), Some(room)) = (chains.get_mut(got), buffers.get_mut(filled..)) else {
                break;
            };
            let word = stopped.filter(|word| word & STATE == self.next.available());
            let Some(word) = word.filter(|_| !room.is_empty()) else {
                break;
            };
            let found = match self.other::<IN_ORDER>(word, room)? {
                Some(found) => found,
                None if filled == 0 => return Err(Error::ChainTooLong),
                None => break,
            };
            *chain = Chain {
                id: found.id,
                first: u16::try_from(filled).unwrap_or_default(),
                count: found.count,
            };
            got += 1;
            filled += usize::from(found.count);
        }
        Ok(got)
    }

    /// Takes the next chain, which is of several descriptors or has a table, `word` being the second half of its first. `None` where it does not fit in `room`.
    #[inline(never)]
    fn other<const IN_ORDER: bool>(
        &mut self,
        word: u64,
        room: &mut [Buffer],
    ) -> Result<Option<Found>, Error> {
        let first = self.next;
        let free = self.free(self.taken);
        let Some(found) = self.follow(first, word, free, room)? else {
            return Ok(None);
        };
        let length = u64::from(found.descriptors);
        self.taken = self.taken.wrapping_add(length);
        let entry = self.by_id.get_mut(usize::from(found.id));
        Self::book::<IN_ORDER>(entry, self.done, length, self.taken)?;
        let end = first.step(found.descriptors.wrapping_sub(1), self.size);
        if let Some(end) = self.by_end.get_mut(usize::from(end.slot())) {
            *end = (found.id, found.descriptors);
        }
        self.next = end.next(self.size);
        Ok(Some(found))
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
        let mut used = Cursor::used(self.used, self.size);
        let (mut done, taken) = (self.done, self.taken);
        let mut first = done == self.shown;
        for (id, written) in chains {
            let Some(entry) = self.by_id.get_mut(usize::from(id)) else {
                continue;
            };
            if !is_out::<IN_ORDER>(*entry, done, taken) {
                continue;
            }
            let length = if IN_ORDER {
                entry.wrapping_sub(done)
            } else {
                core::mem::take(entry)
            };
            let write = if written > 0 { in_word(WRITE) } else { 0 };
            let word = pack(written, id, used.state | write);
            if first {
                first = false;
                self.head = word;
            } else {
                self.areas.desc.store_u64(used.at + 8, word, Relaxed);
            }
            // Not more than the ring has.
            used.skip(u16::try_from(length).unwrap_or_default());
            done = done.wrapping_add(length);
        }
        (self.used, self.done) = (used.position(), done);
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
    fn get_each(&mut self, count: usize, each: impl FnMut(u16, Buffer)) -> Result<usize, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        let result = if self.in_order {
            self.singles::<true>(count, each)
        } else {
            self.singles::<false>(count, each)
        };
        if result.is_err() {
            self.broken = true;
        }
        result.map(|(got, _)| got)
    }

    #[inline]
    fn put_each(&mut self, ids: impl Iterator<Item = u16>, written: u32) {
        let each = ids.map(|id| (id, written));
        if self.in_order {
            self.write_used::<true>(each);
        } else {
            self.write_used::<false>(each);
        }
    }

    fn put_read(&mut self, chains: &[Chain]) {
        self.put_read_each(chains.iter().map(|chain| chain.id));
    }

    #[inline]
    fn put_read_each(&mut self, mut ids: impl ExactSizeIterator<Item = u16> + DoubleEndedIterator) {
        if self.in_order {
            // Section 2.8.8: one descriptor for all, in the place of the first, with the id of the last. The driver takes the others
            // to be used completely, which for chains that it only lets us read is the same as what we would write.
            self.write_used::<true>(ids.next_back().map(|id| (id, 0)).into_iter());
        } else {
            self.write_used::<false>(ids.map(|id| (id, 0)));
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
