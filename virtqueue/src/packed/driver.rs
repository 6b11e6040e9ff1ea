//! The driver's side of a packed ring.

use alloc::boxed::Box;
use core::hint::cold_path;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{
    Areas, Cursor, EVENT_DISABLE, EVENT_ENABLE, INDIRECT, NEXT, Position, STATE, id_of, in_word,
    len_of, pack, wants, wish, write_flag,
};
use crate::chain::{self, DESC_LEN};
use crate::{Buffer, DriverRing, Error, Memory, Region, RingConfig, Used};

/// What is known of the chain with this id.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    /// Bytes that the device may write into it.
    writable: u32,
    /// Outstanding: how many descriptors it takes in the ring. Otherwise 0 (in order: whatever it was).
    count: u16,
    /// Where `count` waits while a chain that is not published is being hidden.
    hidden: u16,
}

/// The driver's side of a packed ring (VIRTIO 1.3 section 2.8).
///
/// It allocates once, when it is made. It never reads back what it wrote: the device can write all of the ring.
///
/// Ids are a queue: the one that has been free longest is given next. Where the device uses chains in order (section 2.8.8) they
/// simply count, modulo the ring's size.
#[derive(Debug)]
pub struct Driver<M: Memory> {
    memory: M,
    areas: Areas<M::Region>,
    /// By id.
    sent: Box<[Sent]>,
    /// The queue of free ids, as a ring from `id_head` to `id_tail`. (In order every cell holds its own index, and
    /// the array is not looked at.)
    ids: Box<[u16]>,
    size: u16,
    event_idx: bool,
    in_order: bool,
    indirect: bool,
    broken: bool,
    /// Calls are asked for.
    armed: bool,
    /// How many descriptors are free.
    free: u16,
    /// The next id to give.
    id_head: u16,
    /// `id_head` at the last publish: the cells from there on hold the ids that are not published.
    id_published: u16,
    /// The next cell to put a free id into. In order: the id of the oldest outstanding chain.
    id_tail: u16,
    /// The next descriptor to write.
    next: Position,
    /// The first descriptor that is not published.
    published: Position,
    /// In order: how many chains are published and not taken.
    waiting: u16,
    /// The second half of the descriptor at `published`, where that is not `next`.
    head: u64,
    /// Where the next used descriptor will be.
    last: Position,
    /// In order: how many more chains the used descriptor stands for that was read last, and the length in it.
    batch: (u16, u32),
}

/// The cell behind another, of the queue of ids.
#[inline]
fn behind(cell: u16, size: u16) -> u16 {
    let next = cell.wrapping_add(1);
    if next == size {
        cold_path();
        return 0;
    }
    next
}

/// How many bytes a used descriptor that says `len` says were written into a chain that has room for `writable`. Whether or not the flag is there that says
/// that anything was written, the length counts: not every device sets it. Where nothing could be written, the length means nothing (section 2.8): DPDK
/// leaves it as it was.
#[inline]
fn written(len: u32, writable: u32) -> Result<u32, Error> {
    if len <= writable {
        Ok(len)
    } else if writable == 0 {
        Ok(0)
    } else {
        Err(Error::BadLength)
    }
}

impl<M: Memory> Driver<M> {
    /// A fresh ring: clears the descriptors, wrap counters are 1 (section 2.8.1). Calls are asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the size is 0 or more than [`MAX_SIZE`](super::MAX_SIZE), or an area is not aligned or not in memory.
    pub fn new(memory: M, config: &RingConfig) -> Result<Self, Error> {
        Self::start(memory, config, Position::START)
    }

    /// A fresh ring that starts at the position `base` (section 2.8.1, [`Layout::device_at`](crate::Layout::device_at)), for a device that starts there too.
    ///
    /// # Errors
    ///
    /// As for [`Driver::new`], and [`Error::Config`] where `base` is outside the ring, or not the same for available and used descriptors.
    pub fn with_base(memory: M, config: &RingConfig, base: u32) -> Result<Self, Error> {
        let [available, used] = Position::from_base(base, config.size)?;
        if available != used {
            return Err(Error::Config);
        }
        Self::start(memory, config, available)
    }

    fn start(memory: M, config: &RingConfig, first: Position) -> Result<Self, Error> {
        let areas = Areas::new(&memory, config)?;
        let size = config.size;
        // As if each had been used one turn ago: neither available nor used as seen from `first`.
        let mut at = first;
        for _ in 0..size {
            areas.desc.store_u64(at.offset(), 0, Relaxed);
            let word = pack(0, 0, at.other_turn().used());
            areas.desc.store_u64(at.offset() + 8, word, Relaxed);
            at = at.next(size);
        }
        // A device that is there at the first chain wants to hear of it until it says otherwise.
        areas.device.store_u32(0, EVENT_ENABLE, Relaxed);
        let wish = wish(first, config.event_idx);
        areas.driver.store_u32(0, wish, Release);
        Ok(Self {
            memory,
            areas,
            sent: (0..size).map(|_| Sent::default()).collect(),
            ids: (0..size).collect(),
            size,
            event_idx: config.event_idx,
            in_order: config.in_order,
            indirect: config.indirect,
            broken: false,
            armed: true,
            free: size,
            id_head: 0,
            id_published: 0,
            id_tail: 0,
            next: first,
            published: first,
            waiting: 0,
            head: 0,
            last: first,
            batch: (0, 0),
        })
    }

    /// The next free id, and its cell. There is one wherever there is a free descriptor.
    #[inline]
    fn next_id(&self) -> Option<(u16, u16)> {
        let cell = self.id_head;
        let id = if self.in_order {
            cell
        } else {
            *self.ids.get(usize::from(cell))?
        };
        Some((id, cell))
    }

    /// Writes the next descriptor. The first of a batch stays incomplete.
    #[inline]
    fn write_descriptor(&mut self, addr: u64, len: u32, id: u16, flags: u64) {
        let next = self.next;
        let at = next.offset();
        let word = pack(len, id, flags | next.available());
        self.areas.desc.store_u64(at, addr, Relaxed);
        if next == self.published {
            self.head = word;
        } else {
            self.areas.desc.store_u64(at + 8, word, Relaxed);
        }
        self.next = next.next(self.size);
    }

    /// Writes a chain of more than one buffer.
    #[inline(never)]
    fn write_chain(&mut self, buffers: &[Buffer], count: u16, id: u16) {
        for (buffer, left) in buffers.iter().zip((0..count).rev()) {
            let next = if left > 0 { in_word(NEXT) } else { 0 };
            self.write_descriptor(buffer.addr, buffer.len, id, write_flag(buffer) | next);
        }
    }

    /// Books a chain of `count` descriptors that has been written.
    #[inline]
    fn book(&mut self, (id, cell): (u16, u16), count: u16, writable: u32) -> Option<u16> {
        let sent = self.sent.get_mut(usize::from(id))?;
        sent.writable = writable;
        sent.count = count;
        self.id_head = behind(cell, self.size);
        self.free = self.free.wrapping_sub(count);
        Some(id)
    }

    /// The second half of the descriptor at `at`, if it is used.
    #[inline]
    fn used_word(&self, at: Position) -> Option<u64> {
        let word = self.areas.desc.load_u64(at.offset() + 8, Acquire);
        (word & STATE == at.used()).then_some(word)
    }

    /// Returns how many were taken.
    #[inline]
    fn take_any_order(&mut self, count: usize, mut each: impl FnMut(Used)) -> Result<usize, Error> {
        let size = self.size;
        let (mut last, mut tail, mut free) = (self.last, self.id_tail, self.free);
        let mut taken = 0;
        while taken < count {
            let Some(word) = self.used_word(last) else {
                break;
            };
            let id = id_of(word);
            let sent = self.sent.get_mut(usize::from(id)).ok_or(Error::BadId)?;
            let descriptors = sent.count;
            if descriptors == 0 {
                return Err(Error::BadId);
            }
            let len = written(len_of(word), sent.writable)?;
            sent.count = 0;
            if let Some(cell) = self.ids.get_mut(usize::from(tail)) {
                *cell = id;
            }
            tail = behind(tail, size);
            free = free.wrapping_add(descriptors);
            last = last.step(descriptors, size);
            taken += 1;
            each(Used { id, len });
        }
        (self.last, self.id_tail, self.free) = (last, tail, free);
        Ok(taken)
    }

    /// Section 2.8.8: a used descriptor stands for all chains up to the one that it names; it is in the place of the first of them. Returns
    /// how many were taken.
    #[inline]
    fn take_in_order(&mut self, count: usize, mut each: impl FnMut(Used)) -> Result<usize, Error> {
        let size = self.size;
        let mut last = Cursor::used(self.last, size);
        let (mut oldest, mut free) = (self.id_tail, self.free);
        let (mut left, mut len) = self.batch;
        let waiting = self.waiting;
        let most = count.min(usize::from(waiting));
        let mut taken = 0;
        while taken < most {
            if left == 0 {
                let word = self.areas.desc.load_u64(last.at + 8, Acquire);
                if word & STATE != last.state {
                    break;
                }
                len = len_of(word);
                left = 1;
                let id = id_of(word);
                if id != oldest {
                    cold_path();
                    let others = if id >= oldest {
                        id.wrapping_sub(oldest)
                    } else {
                        id.wrapping_add(size).wrapping_sub(oldest)
                    };
                    if id >= size || usize::from(others) >= usize::from(waiting) - taken {
                        return Err(Error::BadId);
                    }
                    left = others.wrapping_add(1);
                }
            }
            let sent = self.sent.get(usize::from(oldest)).ok_or(Error::BadId)?;
            let used = Used {
                id: oldest,
                len: match left {
                    1 => written(len, sent.writable)?,
                    _ => sent.writable,
                },
            };
            left = left.wrapping_sub(1);
            free = free.wrapping_add(sent.count);
            last.skip(sent.count);
            oldest = behind(oldest, size);
            taken += 1;
            each(used);
        }
        // More than there are.
        if taken == usize::from(waiting)
            && taken < count
            && self.areas.desc.load_u64(last.at + 8, Relaxed) & STATE == last.state
        {
            return Err(Error::BadId);
        }
        (self.last, self.id_tail, self.free) = (last.position(), oldest, free);
        // No more than there were.
        self.waiting = waiting.wrapping_sub(u16::try_from(taken).unwrap_or(waiting));
        self.batch = (left, len);
        Ok(taken)
    }

    /// How many chains are added and not published.
    #[inline]
    fn pending_chains(&self) -> u16 {
        let (first, end) = (self.id_published, self.id_head);
        if self.next == self.published {
            0
        } else if end > first {
            end.wrapping_sub(first)
        } else {
            // Around the end; all of the ids where both are the same.
            end.wrapping_add(self.size).wrapping_sub(first)
        }
    }

    /// Hides the chains that are added and not published, so that a device that guesses their ids finds nothing outstanding; done
    /// twice, it shows them again. Their cells in the queue of ids are untouched: what is freed meanwhile was given before them.
    #[inline(never)]
    fn toggle_unpublished(&mut self) {
        let mut cell = self.id_published;
        for _ in 0..self.pending_chains() {
            let id = self.ids.get(usize::from(cell)).copied().unwrap_or_default();
            if let Some(sent) = self.sent.get_mut(usize::from(id)) {
                core::mem::swap(&mut sent.count, &mut sent.hidden);
            }
            cell = behind(cell, self.size);
        }
    }

    /// The body of [`DriverRing::take_each`]; the caller latches the error.
    #[inline]
    fn reap(&mut self, count: usize, each: impl FnMut(Used)) -> Result<usize, Error> {
        if self.in_order {
            return self.take_in_order(count, each);
        }
        if self.next == self.published {
            return self.take_any_order(count, each);
        }
        self.toggle_unpublished();
        let taken = self.take_any_order(count, each)?;
        self.toggle_unpublished();
        Ok(taken)
    }
}

impl<M: Memory> DriverRing for Driver<M> {
    #[inline]
    fn free(&self) -> u16 {
        self.free
    }

    #[inline]
    fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let count = u16::try_from(buffers.len()).ok()?;
        if count == 0 || count > self.free {
            return None;
        }
        let (id, cell) = self.next_id()?;
        if let [buffer] = buffers {
            self.write_descriptor(buffer.addr, buffer.len, id, write_flag(buffer));
        } else {
            self.write_chain(buffers, count, id);
        }
        self.book((id, cell), count, chain::writable(buffers))
    }

    #[inline]
    fn add_each(
        &mut self,
        count: usize,
        mut buffer: impl FnMut(usize) -> Buffer,
        mut added: impl FnMut(usize, u16),
    ) -> usize {
        let count = count.min(usize::from(self.free));
        let size = self.size;
        let mut next = Cursor::available(self.next, size);
        let mut cell = self.id_head;
        let mut first = self.next == self.published;
        for n in 0..count {
            let id = if self.in_order {
                cell
            } else {
                self.ids.get(usize::from(cell)).copied().unwrap_or_default()
            };
            let buffer = buffer(n);
            let word = pack(buffer.len, id, write_flag(&buffer) | next.state);
            self.areas.desc.store_u64(next.at, buffer.addr, Relaxed);
            if first {
                first = false;
                self.head = word;
            } else {
                self.areas.desc.store_u64(next.at + 8, word, Relaxed);
            }
            if let Some(sent) = self.sent.get_mut(usize::from(id)) {
                let writable = if buffer.device_writes { buffer.len } else { 0 };
                // It is the same time and again in a pool of equal buffers, and each store takes a place in the processor's queue of them.
                if (sent.writable, sent.count) != (writable, 1) {
                    (sent.writable, sent.count) = (writable, 1);
                }
            }
            next.advance();
            cell = behind(cell, size);
            added(n, id);
        }
        (self.next, self.id_head) = (next.position(), cell);
        // No more than what is free.
        self.free = self
            .free
            .wrapping_sub(u16::try_from(count).unwrap_or(self.free));
        count
    }

    fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        if !self.indirect || self.free == 0 {
            return None;
        }
        let (region, len) = chain::make_table(&self.memory, table, buffers.len(), self.size)?;
        let (id, cell) = self.next_id()?;
        for (buffer, at) in buffers.iter().zip((0..).step_by(DESC_LEN)) {
            region.store_u64(at, buffer.addr, Relaxed);
            let word = pack(buffer.len, 0, write_flag(buffer));
            region.store_u64(at + 8, word, Relaxed);
        }
        self.write_descriptor(table, len, id, in_word(INDIRECT));
        self.book((id, cell), 1, chain::writable(buffers))
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let first = self.published;
        if self.next == first {
            return false;
        }
        // At least one, and no more than there are.
        let count = u16::try_from(self.next.ahead(first, self.size)).unwrap_or(self.size);
        self.waiting = self.waiting.wrapping_add(self.pending_chains());
        let at = first.offset() + 8;
        self.areas.desc.store_u64(at, self.head, Release);
        self.published = self.next;
        self.id_published = self.id_head;
        // The device stores its wish and then looks at the descriptor; we store the descriptor and then look at its wish. Without a fence on
        // both sides both can miss the other's store, and the device sleeps on available chains.
        M::Region::fence(SeqCst);
        let event = self.areas.device.load_u32(0, Relaxed);
        wants(event, self.event_idx, first, count, self.size)
    }

    #[inline]
    fn take(&mut self, out: &mut [Used]) -> Result<usize, Error> {
        let mut places = out.iter_mut();
        self.take_each(places.len(), |used| {
            if let Some(place) = places.next() {
                *place = used;
            }
        })
    }

    #[inline]
    fn take_each(&mut self, count: usize, each: impl FnMut(Used)) -> Result<usize, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        let result = self.reap(count, each);
        if result.is_err() {
            self.broken = true;
            // Nothing can be added or published any more.
            self.free = 0;
            self.next = self.published;
        }
        result
    }

    #[inline]
    fn disable_calls(&mut self) {
        if self.armed {
            self.armed = false;
            self.areas.driver.store_u32(0, EVENT_DISABLE, Relaxed);
        }
    }

    #[inline]
    fn enable_calls(&mut self) -> bool {
        self.armed = true;
        let wish = wish(self.last, self.event_idx);
        self.areas.driver.store_u32(0, wish, Relaxed);
        // The other half of the device's fence in `publish`.
        M::Region::fence(SeqCst);
        self.batch.0 > 0 || self.used_word(self.last).is_some()
    }
}
