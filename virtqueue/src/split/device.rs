//! The device's side of a split ring.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{
    Areas, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, FLAGS, IDX, ask, avail_entry, hush, used_entry,
    wants,
};
use crate::chain::{Collector, DESC_LEN, open_table};
use crate::{Buffer, Chain, DeviceRing, Error, Memory, Region, RingConfig};

/// How many chains ahead the descriptor is fetched. More than the processor sees by itself.
const AHEAD: u16 = 8;

/// The device's side of a split ring (VIRTIO 1.3 section 2.7).
///
/// Every number that the driver wrote is read once and checked; descriptor flags without a meaning are ignored.
///
/// With `in_order` the caller puts chains back in the order in which it got them, as VIRTIO_F_IN_ORDER asks (section 2.7.9).
#[derive(Debug)]
pub struct Device<M: Memory> {
    memory: M,
    areas: Areas<M::Region>,
    size: u16,
    mask: u16,
    event_idx: bool,
    in_order: bool,
    indirect: bool,
    broken: bool,
    /// Kicks are asked for.
    armed: bool,
    /// The next available index to take.
    next: u16,
    /// The driver's index as it was read last.
    seen: u16,
    /// The next used index to write.
    used: u16,
    /// The used index as the driver sees it.
    published: u16,
}

/// A descriptor, copied out of the table: its two words as they are. (Taken apart into fields, it would be assembled in memory
/// for every frame.)
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    word: u64,
}

impl Descriptor {
    /// Copies the descriptor with this index out of a table.
    #[inline]
    fn read(table: &impl Region, index: u16) -> Self {
        let at = DESC_LEN * usize::from(index);
        Self {
            addr: table.load_u64(at, Relaxed),
            word: table.load_u64(at + 8, Relaxed),
        }
    }

    #[inline]
    fn buffer(self) -> Buffer {
        let [l0, l1, l2, l3, ..] = self.word.to_le_bytes();
        Buffer {
            addr: self.addr,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            device_writes: self.has(DESC_WRITE),
        }
    }

    #[inline]
    fn has(self, flags: u16) -> bool {
        self.word & u64::from(flags) << 32 != 0
    }

    #[inline]
    fn next(self) -> u16 {
        let [.., n0, n1] = self.word.to_le_bytes();
        u16::from_le_bytes([n0, n1])
    }
}

impl<M: Memory> Device<M> {
    /// A ring that starts at index 0, as after a reset (sections 2.7.6 and 2.7.8). Kicks are asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the size is no power of two up to [`MAX_SIZE`](super::MAX_SIZE), or an area is not aligned or not in memory.
    pub fn new(memory: M, config: &RingConfig) -> Result<Self, Error> {
        let areas = Areas::new(&memory, config)?;
        Ok(Self::start(memory, areas, config, 0, 0))
    }

    /// A ring that goes on at the available index `base` (section 2.7.6, VHOST_USER_SET_VRING_BASE) and at the used index that the ring holds.
    /// Chains between the two are another device's: it is not known whether it used them, so they are not taken again.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Device::new`], where `base` is no index, and where the used index is not
    /// within the ring's size behind it.
    pub fn with_base(memory: M, config: &RingConfig, base: u32) -> Result<Self, Error> {
        let areas = Areas::new(&memory, config)?;
        let base = u16::try_from(base).map_err(|_| Error::Config)?;
        let used = areas.used.load_u16(IDX, Acquire);
        if base.wrapping_sub(used) > config.size {
            return Err(Error::Config);
        }
        Ok(Self::start(memory, areas, config, base, used))
    }

    fn start(
        memory: M,
        areas: Areas<M::Region>,
        config: &RingConfig,
        next: u16,
        used: u16,
    ) -> Self {
        let mut ring = Self {
            memory,
            areas,
            size: config.size,
            mask: config.size.wrapping_sub(1),
            event_idx: config.event_idx,
            in_order: config.in_order,
            indirect: config.indirect,
            broken: false,
            armed: false,
            next,
            seen: next,
            used,
            published: used,
        };
        ring.arm();
        // A device before us may have left it set, and with event indices it has to be clear (section 2.7.10.1).
        ring.areas.used.store_u16(FLAGS, 0, Relaxed);
        ring
    }

    /// The memory that buffers (section 2.7) are in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// How many chains can be taken, as far as it matters to somebody who wants `wanted`.
    #[inline]
    fn available(&mut self, wanted: usize) -> Result<usize, Error> {
        let known = self.seen.wrapping_sub(self.next);
        if usize::from(known) >= wanted {
            return Ok(wanted);
        }
        let seen = self.areas.avail.load_u16(IDX, Acquire);
        // With more chains than descriptors, some are there that the driver has not got back.
        let out = self.next.wrapping_sub(self.published);
        let count = seen.wrapping_sub(self.next);
        if count > self.size.saturating_sub(out) {
            return Err(Error::IndexOutOfRange);
        }
        self.seen = seen;
        Ok(usize::from(count).min(wanted))
    }

    /// Takes up to `count` chains and shows each with its head; `each` says whether it takes it, and where it does not, that and those behind it are left.
    #[inline]
    fn walk(
        &mut self,
        count: usize,
        mut each: impl FnMut(&Self, u16, Descriptor) -> Result<bool, Error>,
    ) -> Result<usize, Error> {
        let available = self.available(count)?;
        let mut next = self.next;
        for ahead in usize::from(AHEAD)..usize::from(AHEAD) + available {
            // Not beyond what is published: that would take lines away which the driver is about to write.
            if ahead < available {
                let entry = avail_entry(next.wrapping_add(AHEAD) & self.mask);
                let hint = self.areas.avail.load_u16(entry, Relaxed) & self.mask;
                self.areas.desc.prefetch(DESC_LEN * usize::from(hint));
            }
            let entry = avail_entry(next & self.mask);
            let head = self.areas.avail.load_u16(entry, Relaxed);
            if head >= self.size {
                return Err(Error::BadId);
            }
            let first = Descriptor::read(&self.areas.desc, head);
            if !each(self, head, first)? {
                break;
            }
            next = next.wrapping_add(1);
        }
        let taken = next.wrapping_sub(self.next);
        self.next = next;
        Ok(usize::from(taken))
    }

    /// The buffer of a chain of one.
    #[inline]
    fn checked(&self, first: Descriptor) -> Result<Buffer, Error> {
        let buffer = first.buffer();
        if self.memory.contains(buffer.addr, buffer.len) {
            Ok(buffer)
        } else {
            Err(Error::BadAddress)
        }
    }

    /// The body of [`DeviceRing::get`]; the caller latches the error.
    #[inline]
    fn chains(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error> {
        // A chain has at least one buffer. `Chain::first` is what limits the array.
        let limit = buffers.len().min(usize::from(u16::MAX));
        let (mut room, _) = buffers.split_at_mut(limit);
        let mut filled = 0u16;
        let most = chains.len().min(limit);
        let mut places = chains.iter_mut();
        self.walk(most, |ring, head, first| {
            let place = core::mem::take(&mut room);
            if place.is_empty() {
                return Ok(false);
            }
            let count = if first.has(DESC_NEXT | DESC_INDIRECT) {
                match ring.follow(first, place)? {
                    Some(count) => count,
                    None if filled == 0 => return Err(Error::ChainTooLong),
                    None => return Ok(false),
                }
            } else {
                if let Some(buffer) = place.first_mut() {
                    *buffer = ring.checked(first)?;
                }
                1
            };
            room = place.get_mut(usize::from(count)..).unwrap_or_default();
            if let Some(chain) = places.next() {
                *chain = Chain {
                    id: head,
                    first: filled,
                    count,
                };
            }
            filled += count;
            Ok(true)
        })
    }

    /// Follows a chain of more than one descriptor. Returns how many buffers it has, or `None` where they do not fit in `out`.
    #[inline(never)]
    fn follow(&self, first: Descriptor, out: &mut [Buffer]) -> Result<Option<u16>, Error> {
        let mut chain = Collector::new(&self.memory, out);
        let mut this = first;
        while !this.has(DESC_INDIRECT) {
            if !chain.push(this.buffer())? {
                return Ok(None);
            }
            if !this.has(DESC_NEXT) {
                return Ok(Some(chain.count()));
            }
            // Longer than the table: some descriptor is there twice.
            if chain.count() == self.size {
                return Err(Error::ChainTooLong);
            }
            if this.next() >= self.size {
                return Err(Error::BadId);
            }
            this = Descriptor::read(&self.areas.desc, this.next());
        }
        // Section 2.7.5.3: the rest of the chain is in a table. Not without the feature, and nothing comes behind it.
        if !self.indirect || this.has(DESC_NEXT) {
            return Err(Error::BadFlags);
        }
        let length = this.buffer().len;
        let (table, length) = open_table(&self.memory, this.addr, length, self.size)?;
        let mut index = 0;
        loop {
            this = Descriptor::read(&table, index);
            if this.has(DESC_INDIRECT) {
                return Err(Error::BadFlags);
            }
            // Neither longer than the ring, nor a descriptor twice.
            if chain.count() == self.size {
                return Err(Error::ChainTooLong);
            }
            if !chain.push(this.buffer())? {
                return Ok(None);
            }
            if !this.has(DESC_NEXT) {
                return Ok(Some(chain.count()));
            }
            index = this.next();
            if index >= length {
                return Err(Error::BadId);
            }
        }
    }

    /// Writes a used element. It is not one store: with the ring aligned to 8 bytes, as it mostly is, an element
    /// lies across two aligned words.
    #[inline]
    fn write_used(&self, slot: u16, id: u16, len: u32) {
        let at = used_entry(slot);
        self.areas.used.store_u32(at, u32::from(id), Relaxed);
        self.areas.used.store_u32(at + 4, len, Relaxed);
    }

    /// Asks for a kick at the next chain.
    #[inline]
    fn arm(&mut self) {
        self.armed = true;
        let event = used_entry(self.size);
        ask(&self.areas.used, event, self.event_idx, self.next);
    }
}

impl<M: Memory> DeviceRing for Device<M> {
    #[inline]
    fn get(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        let result = self.chains(chains, buffers);
        if result.is_err() {
            self.broken = true;
        }
        result
    }

    #[inline]
    fn get_each(
        &mut self,
        count: usize,
        mut each: impl FnMut(u16, Buffer),
    ) -> Result<usize, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        let result = self.walk(count, |ring, head, first| {
            let single = !first.has(DESC_NEXT | DESC_INDIRECT);
            if single {
                each(head, ring.checked(first)?);
            }
            Ok(single)
        });
        if result.is_err() {
            self.broken = true;
        }
        result
    }

    #[inline]
    fn unget(&mut self, n: usize) {
        // No further than what is taken and not put, whatever the caller says.
        let out = self.next.wrapping_sub(self.used);
        self.next = self
            .next
            .wrapping_sub(u16::try_from(n).map_or(out, |n| n.min(out)));
    }

    #[inline]
    fn put(&mut self, id: u16, written: u32) {
        self.write_used(self.used & self.mask, id, written);
        self.used = self.used.wrapping_add(1);
    }

    fn put_read(&mut self, chains: &[Chain]) {
        self.put_read_each(chains.iter().map(|chain| chain.id));
    }

    #[inline]
    fn put_read_each(&mut self, mut ids: impl ExactSizeIterator<Item = u16> + DoubleEndedIterator) {
        if !self.in_order {
            for id in ids {
                self.put(id, 0);
            }
            return;
        }
        // Section 2.7.9: one element for all, in the place of the first, with the id of the last. The driver takes the others
        // to be used completely, which for chains that it only lets us read is the same as what we would write.
        if let (Ok(count), Some(last)) = (u16::try_from(ids.len()), ids.next_back()) {
            self.write_used(self.used & self.mask, last, 0);
            self.used = self.used.wrapping_add(count);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let old = self.published;
        let new = self.used;
        if old == new || self.broken {
            return false;
        }
        self.areas.used.store_u16(IDX, new, Release);
        self.published = new;
        // The driver stores its wish and then looks at the index; we store the index and then look at its wish. Without a fence on
        // both sides both can miss the other's store, and the driver sleeps on used chains.
        M::Region::fence(SeqCst);
        let event = avail_entry(self.size);
        wants(&self.areas.avail, event, self.event_idx, new, old)
    }

    #[inline]
    fn disable_kicks(&mut self) {
        if self.armed {
            self.armed = false;
            let event = used_entry(self.size);
            hush(&self.areas.used, event, self.event_idx, self.next);
        }
    }

    #[inline]
    fn enable_kicks(&mut self) -> bool {
        self.arm();
        // The other half of the driver's fence in `publish`.
        M::Region::fence(SeqCst);
        self.areas.avail.load_u16(IDX, Relaxed) != self.next
    }

    #[inline]
    fn present(&self) -> bool {
        // Behind all that was read so far.
        M::Region::fence(Acquire);
        // A descriptor's number, from the first chain on; zero before.
        self.areas.avail.load_u16(avail_entry(0), Relaxed) < self.size
    }

    #[inline]
    fn base(&self) -> u32 {
        u32::from(self.next)
    }
}
