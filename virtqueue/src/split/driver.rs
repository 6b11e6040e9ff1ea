//! The driver's side of a split ring.

use alloc::boxed::Box;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{Areas, DESC_INDIRECT, FLAGS, IDX, ask, avail_entry, hush, pack, used_entry, wants};
use crate::chain::{self, DESC_LEN};
use crate::{Buffer, DriverRing, Error, Memory, Region, RingConfig, Used};

/// What is known of the descriptor with this index, and one cell of the queue of free descriptors.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Head: bytes that the device may write into the chain.
    writable: u32,
    /// Head of an outstanding chain: its length. Otherwise 0.
    count: u16,
    /// In a chain: the descriptor behind this one.
    next: u16,
    /// The cell: a free descriptor, or one that was taken from here and is not free yet.
    free: u16,
    /// Where `count` waits while a chain that is not published is being hidden.
    hidden: u16,
}

/// The driver's side of a split ring (VIRTIO 1.3 section 2.7).
///
/// It allocates once, in `new`. It never reads a descriptor back: the device can write the table too.
///
/// Free descriptors are a queue: what becomes free first is used first. Where the device uses chains in order that is the order of
/// the table, so `in_order` (section 2.7.9) needs nothing else when adding.
#[derive(Debug)]
pub struct Driver<M: Memory> {
    memory: M,
    areas: Areas<M::Region>,
    slots: Box<[Slot]>,
    size: u16,
    mask: u16,
    event_idx: bool,
    in_order: bool,
    indirect: bool,
    broken: bool,
    /// Calls are asked for.
    armed: bool,
    /// How many descriptors are free.
    free: u16,
    /// The queue of free descriptors is `free` cells from here on.
    free_head: u16,
    /// `free_head` at the last publish: the cells from there on hold the descriptors that are not published.
    free_published: u16,
    /// The next available index to write.
    next: u16,
    /// The available index as the device sees it.
    published: u16,
    /// The next used index to take.
    last: u16,
    /// The device's index as it was read last.
    seen: u16,
    /// In order: the head of the oldest outstanding chain.
    oldest: u16,
    /// In order: the element that stands for the chains up to its own.
    batch: Option<(u16, u32)>,
}

impl<M: Memory> Driver<M> {
    /// A fresh ring: clears both rings (sections 2.7.6 and 2.7.8). Calls are asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the size is no power of two up to [`MAX_SIZE`](super::MAX_SIZE), or an area is not aligned or not in memory.
    pub fn new(memory: M, config: &RingConfig) -> Result<Self, Error> {
        Self::with_base(memory, config, 0)
    }

    /// A fresh ring whose indices (sections 2.7.6 and 2.7.8) start at `base`, for a device that starts there too (VHOST_USER_SET_VRING_BASE).
    ///
    /// # Errors
    ///
    /// As for [`Driver::new`], and [`Error::Config`] where `base` is no index.
    pub fn with_base(memory: M, config: &RingConfig, base: u32) -> Result<Self, Error> {
        let areas = Areas::new(&memory, config)?;
        let base = u16::try_from(base).map_err(|_| Error::Config)?;
        let size = config.size;
        let slots = (0..size)
            .map(|free| Slot {
                free,
                ..Slot::default()
            })
            .collect();
        // A device that is there at the first chain wants to hear of it until it says otherwise.
        for (ring, event) in [
            (&areas.avail, avail_entry(size)),
            (&areas.used, used_entry(size)),
        ] {
            ring.store_u16(FLAGS, 0, Relaxed);
            ring.store_u16(event, base, Relaxed);
            ring.store_u16(IDX, base, Release);
        }
        Ok(Self {
            memory,
            areas,
            slots,
            size,
            mask: size.wrapping_sub(1),
            event_idx: config.event_idx,
            in_order: config.in_order,
            indirect: config.indirect,
            broken: false,
            armed: true,
            free: size,
            free_head: 0,
            free_published: 0,
            next: base,
            published: base,
            last: base,
            seen: base,
            oldest: 0,
            batch: None,
        })
    }

    /// The descriptor in the cell of the free queue at `position`.
    #[inline]
    fn free_at(&self, position: u16) -> Option<u16> {
        let cell = usize::from(position & self.mask);
        self.slots.get(cell).map(|slot| slot.free)
    }

    #[inline]
    fn write_descriptor(&self, index: u16, buffer: &Buffer, next: Option<u16>) {
        let at = DESC_LEN * usize::from(index);
        self.areas.desc.store_u64(at, buffer.addr, Relaxed);
        self.areas
            .desc
            .store_u64(at + 8, pack(buffer, next), Relaxed);
    }

    /// Writes a chain of more than one buffer, from its end to its head. Returns the head.
    #[inline(never)]
    fn write_chain(&mut self, buffers: &[Buffer], count: u16) -> Option<u16> {
        let mut next = None;
        let mut position = self.free_head.wrapping_add(count);
        for buffer in buffers.iter().rev() {
            position = position.wrapping_sub(1);
            let index = self.free_at(position)?;
            self.write_descriptor(index, buffer, next);
            self.slots.get_mut(usize::from(index))?.next = next.unwrap_or_default();
            next = Some(index);
        }
        next
    }

    /// Books a chain that has been written, and puts it into the available ring.
    #[inline]
    fn make_available(&mut self, head: u16, count: u16, writable: u32) -> Option<u16> {
        let slot = self.slots.get_mut(usize::from(head))?;
        slot.writable = writable;
        slot.count = count;
        self.free_head = self.free_head.wrapping_add(count);
        self.free = self.free.wrapping_sub(count);
        let entry = avail_entry(self.next & self.mask);
        self.areas.avail.store_u16(entry, head, Relaxed);
        self.next = self.next.wrapping_add(1);
        Some(head)
    }

    /// Frees a chain of `count` descriptors.
    #[inline]
    fn release(&mut self, head: u16, count: u16) {
        let mut index = head;
        for left in (0..count).rev() {
            let tail = self.free_head.wrapping_add(self.free) & self.mask;
            if let Some(cell) = self.slots.get_mut(usize::from(tail)) {
                cell.free = index;
            }
            self.free = self.free.wrapping_add(1);
            if left > 0 {
                index = self
                    .slots
                    .get(usize::from(index))
                    .map_or(index, |slot| slot.next);
            }
        }
    }

    /// How many chains can be taken, as far as it matters to somebody who wants `wanted`.
    #[inline]
    fn used(&mut self, wanted: usize) -> Result<usize, Error> {
        let known = self.seen.wrapping_sub(self.last);
        if usize::from(known) >= wanted {
            return Ok(wanted);
        }
        let seen = self.areas.used.load_u16(IDX, Acquire);
        let count = seen.wrapping_sub(self.last);
        if count > self.published.wrapping_sub(self.last) {
            return Err(Error::IndexOutOfRange);
        }
        self.seen = seen;
        Ok(usize::from(count).min(wanted))
    }

    /// Reads a used element. Whether there is such an id is for the slots to say.
    #[inline]
    fn element(&self, slot: u16) -> Result<(u16, u32), Error> {
        let at = used_entry(slot);
        let id = self.areas.used.load_u32(at, Relaxed);
        let len = self.areas.used.load_u32(at + 4, Relaxed);
        u16::try_from(id)
            .map(|id| (id, len))
            .map_err(|_| Error::BadId)
    }

    #[inline]
    fn take_any_order(&mut self, count: usize, mut each: impl FnMut(Used)) -> Result<(), Error> {
        let mut last = self.last;
        for _ in 0..count {
            let (id, len) = self.element(last & self.mask)?;
            let slot = self.slots.get_mut(usize::from(id)).ok_or(Error::BadId)?;
            let count = slot.count;
            if count == 0 {
                return Err(Error::BadId);
            }
            if len > slot.writable {
                return Err(Error::BadLength);
            }
            slot.count = 0;
            self.release(id, count);
            last = last.wrapping_add(1);
            each(Used { id, len });
        }
        self.last = last;
        Ok(())
    }

    /// Section 2.7.9: an element may stand for all chains up to its own; it is in the place of the first of them.
    #[inline]
    fn take_in_order(&mut self, count: usize, mut each: impl FnMut(Used)) -> Result<(), Error> {
        for _ in 0..count {
            let id = self.oldest;
            let (end, len) = match self.batch {
                Some(batch) => batch,
                None => self.element(self.last & self.mask)?,
            };
            let slot = self.slots.get_mut(usize::from(id)).ok_or(Error::BadId)?;
            let count = slot.count;
            let writable = slot.writable;
            slot.count = 0;
            self.last = self.last.wrapping_add(1);
            let written = if end == id {
                self.batch = None;
                len
            } else {
                // The end must be an outstanding head that the index reaches.
                let outstanding = self
                    .slots
                    .get(usize::from(end))
                    .is_some_and(|slot| slot.count > 0);
                if self.last == self.seen || !outstanding {
                    return Err(Error::BadId);
                }
                self.batch = Some((end, len));
                writable
            };
            if written > writable {
                return Err(Error::BadLength);
            }
            self.release(id, count);
            self.oldest = id.wrapping_add(count) & self.mask;
            each(Used { id, len: written });
        }
        Ok(())
    }

    /// Hides the chains that are added and not published, so that a device that guesses their ids finds nothing outstanding; done
    /// twice, it shows them again. Their cells in the free queue are untouched: what is freed meanwhile was allocated before them.
    #[inline(never)]
    fn toggle_unpublished(&mut self) {
        let mut position = self.free_published;
        while position != self.free_head {
            let Some(slot) = self
                .free_at(position)
                .and_then(|head| self.slots.get_mut(usize::from(head)))
            else {
                return;
            };
            let count = slot.count.max(slot.hidden).max(1);
            core::mem::swap(&mut slot.count, &mut slot.hidden);
            position = position.wrapping_add(count);
        }
    }

    /// The body of [`DriverRing::take_each`]; the caller latches the error. Returns how many were taken.
    #[inline]
    fn reap(&mut self, wanted: usize, each: impl FnMut(Used)) -> Result<usize, Error> {
        let count = self.used(wanted)?;
        if count == 0 {
            return Ok(0);
        }
        let unpublished = self.next != self.published;
        if unpublished {
            self.toggle_unpublished();
        }
        if self.in_order {
            self.take_in_order(count, each)?;
        } else {
            self.take_any_order(count, each)?;
        }
        if unpublished {
            self.toggle_unpublished();
        }
        Ok(count)
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
        let head = if let [buffer] = buffers {
            let head = self.free_at(self.free_head)?;
            self.write_descriptor(head, buffer, None);
            head
        } else {
            self.write_chain(buffers, count)?
        };
        self.make_available(head, count, chain::writable(buffers))
    }

    fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        if !self.indirect || self.free == 0 {
            return None;
        }
        let (region, len) = chain::make_table(&self.memory, table, buffers.len(), self.size)?;
        let head = self.free_at(self.free_head)?;
        for (buffer, n) in buffers.iter().zip(1u16..) {
            let at = DESC_LEN * usize::from(n - 1);
            let next = (usize::from(n) < buffers.len()).then_some(n);
            region.store_u64(at, buffer.addr, Relaxed);
            region.store_u64(at + 8, pack(buffer, next), Relaxed);
        }
        let at = DESC_LEN * usize::from(head);
        let word = u64::from(len) | u64::from(DESC_INDIRECT) << 32;
        self.areas.desc.store_u64(at, table, Relaxed);
        self.areas.desc.store_u64(at + 8, word, Relaxed);
        self.make_available(head, 1, chain::writable(buffers))
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let old = self.published;
        let new = self.next;
        if old == new {
            return false;
        }
        self.areas.avail.store_u16(IDX, new, Release);
        self.published = new;
        self.free_published = self.free_head;
        // The device stores its wish and then looks at the index; we store the index and then look at its wish. Without a fence on
        // both sides both can miss the other's store, and the device sleeps on available chains.
        M::Region::fence(SeqCst);
        let event = used_entry(self.size);
        wants(&self.areas.used, event, self.event_idx, new, old)
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
            let event = avail_entry(self.size);
            hush(&self.areas.avail, event, self.event_idx, self.last);
        }
    }

    #[inline]
    fn enable_calls(&mut self) -> bool {
        self.armed = true;
        let event = avail_entry(self.size);
        ask(&self.areas.avail, event, self.event_idx, self.last);
        // The other half of the device's fence in `publish`.
        M::Region::fence(SeqCst);
        self.areas.used.load_u16(IDX, Relaxed) != self.last
    }
}
