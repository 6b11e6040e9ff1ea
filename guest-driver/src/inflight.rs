//! Where a packed ring stands, kept where the next back-end finds it (vhost-user specification, "Inflight I/O tracking"): a packed ring does not say itself how
//! far it has been used, a split one does.
//!
//! The data path uses what it takes in the same burst and in order, so nothing is in flight between two bursts, and what counts then is one position: where
//! the next descriptor is both taken and used. Within a burst, used descriptors are written over available ones before the first of them becomes visible. So
//! the record keeps what they were, and a burst that was not published is undone by the next back-end.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use virtqueue::linear::{Linear, LinearRegion};
use virtqueue::{Memory, Region, RingConfig};

/// Bytes of a packed ring's header, and of an entry for each descriptor behind it.
const HEADER: u64 = 32;
const ENTRY: u64 = 32;
/// Each ring's record starts at a multiple of this.
const ALIGNMENT: u64 = 64;

// Fields of the header: le16 version, le16 number of descriptors, le16 heads of the list of free entries; and in one aligned word the position behind what
// is used, the same as it was before the last batch, and the wrap counters of both, a byte each.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
const POSITIONS: usize = 16;
/// What [`VERSION`] is in a record that is in use.
const CURRENT: u16 = 1;
/// In an entry: u8 whether it is in flight, le16 the next of its list; le16 id, le16 flags and le32 length of the descriptor in its place.
const IN_FLIGHT: u64 = 0;
const NEXT: u64 = 2;
const WORD: u64 = 16;

/// The wrap counter in half a base of SET_VRING_BASE.
const WRAP: u16 = 1 << 15;

/// Flags of a packed descriptor (VIRTIO 1.3, section 2.8.1), and where they are in it.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const FLAGS: u64 = 14;
/// A descriptor, and its second half: le32 length, le16 id, le16 flags.
const DESCRIPTOR: u64 = 16;
const SECOND: u64 = 8;

/// What SET_INFLIGHT_FD says of the area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// How many rings it is for.
    pub queues: u16,
    /// How many descriptors the largest of them has.
    pub queue_size: u16,
}

/// The record of one packed ring.
#[derive(Debug)]
pub struct Record {
    /// The header, and the entries behind it.
    header: LinearRegion,
    /// The ring's descriptors.
    ring: LinearRegion,
    size: u16,
}

impl Record {
    /// The record of ring `index` in `memory`, which starts at device address 0, and the base at which the ring goes on: the one that is recorded, or
    /// `base` where the record is new. `ring` lies in `window`.
    ///
    /// `None` where the area has no room for it, and where it says something that cannot be: it may come from another back-end, which has
    /// descriptors in flight, or from nobody.
    #[must_use]
    pub fn open(
        memory: Linear,
        area: Area,
        index: usize,
        window: Linear,
        ring: &RingConfig,
        base: u32,
    ) -> Option<(Self, u32)> {
        if index >= usize::from(area.queues) || ring.size > area.queue_size {
            return None;
        }
        let stride = (HEADER + ENTRY * u64::from(area.queue_size)).next_multiple_of(ALIGNMENT);
        let at = stride * u64::try_from(index).ok()?;
        let bytes = |table| usize::try_from(table * u64::from(ring.size)).ok();
        let record = Self {
            header: memory.region(at, bytes(ENTRY)? + usize::try_from(HEADER).ok()?, 8)?,
            ring: window.region(ring.desc, bytes(DESCRIPTOR)?, 16)?,
            size: ring.size,
        };
        let base = match record.header.load_u16(VERSION, Acquire) {
            0 => {
                record.begin(half(base >> 16));
                base
            }
            CURRENT => record.resume()?,
            _ => return None,
        };
        Some((record, base))
    }

    fn begin(&self, at: u16) {
        for slot in 0..self.size {
            self.header
                .store_u16(entry(slot, NEXT), slot.wrapping_add(1), Relaxed);
        }
        self.header.store_u16(DESC_NUM, self.size, Relaxed);
        self.header.store_u16(FREE_HEAD, 0, Relaxed);
        self.header.store_u16(OLD_FREE_HEAD, 0, Relaxed);
        self.put(at, at);
        self.header.store_u16(VERSION, CURRENT, Release);
    }

    /// Where the back-end before this one has left the ring.
    fn resume(&self) -> Option<u32> {
        let in_flight = (0..self.size).any(|slot| {
            let [in_flight, _] = self
                .header
                .load_u16(entry(slot, IN_FLIGHT), Relaxed)
                .to_le_bytes();
            in_flight != 0
        });
        if in_flight || self.header.load_u16(DESC_NUM, Relaxed) != self.size {
            return None;
        }
        let word = self.header.load_u64(POSITIONS, Acquire);
        let [u0, u1, o0, o1, used_wrap, old_wrap, ..] = word.to_le_bytes();
        let used = position(u16::from_le_bytes([u0, u1]), used_wrap, self.size)?;
        let old = position(u16::from_le_bytes([o0, o1]), old_wrap, self.size)?;
        let now = if used != old && self.is_still_available(old) {
            self.undo(old, used);
            old
        } else {
            used
        };
        self.put(now, now);
        Some(u32::from(now) | u32::from(now) << 16)
    }

    /// Whether the first descriptor of the burst that was taken and perhaps not published is as the driver made it available: then the burst was not. It is
    /// not enough to look for a used one, because the driver may have used its place again by now.
    fn is_still_available(&self, old: u16) -> bool {
        let flags = self.ring.load_u16(descriptor(old & !WRAP, FLAGS), Acquire);
        let wrap = old & WRAP != 0;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
    }

    /// Makes the descriptors of a burst what they were when they were taken.
    fn undo(&self, from: u16, to: u16) {
        for slot in slots(from, to, self.size) {
            let word = self.header.load_u64(entry(slot, WORD), Relaxed);
            self.ring
                .store_u64(descriptor(slot, SECOND), word.rotate_left(32), Relaxed);
        }
    }

    /// Descriptors were taken, and none of them is used yet: the ring's base before and after.
    #[inline(always)]
    pub fn taken(&self, before: u32, after: u32) {
        for slot in slots(half(before), half(after), self.size) {
            let word = self.ring.load_u64(descriptor(slot, SECOND), Relaxed);
            self.header
                .store_u64(entry(slot, WORD), word.rotate_left(32), Relaxed);
        }
        self.publishing(after);
    }

    /// The ring's used half is about to become its available half. `base` is the ring's.
    #[inline(always)]
    pub fn publishing(&self, base: u32) {
        self.put(half(base), half(base >> 16));
    }

    /// The driver sees what was used up to the available half of `base`.
    #[inline(always)]
    pub fn published(&self, base: u32) {
        self.put(half(base), half(base));
    }

    /// One store: whoever finds the record finds all of it.
    #[inline(always)]
    fn put(&self, used: u16, old: u16) {
        let [u0, u1] = (used & !WRAP).to_le_bytes();
        let [o0, o1] = (old & !WRAP).to_le_bytes();
        let [used_wrap, old_wrap] = [used, old].map(|at| u8::from(at & WRAP != 0));
        let word = u64::from_le_bytes([u0, u1, o0, o1, used_wrap, old_wrap, 0, 0]);
        self.header.store_u64(POSITIONS, word, Release);
    }
}

/// The lower half of a base.
#[inline(always)]
fn half(base: u32) -> u16 {
    let [low, high, ..] = base.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// A recorded position as half a base.
fn position(index: u16, wrap: u8, size: u16) -> Option<u16> {
    match wrap {
        0 if index < size => Some(index),
        1 if index < size => Some(index | WRAP),
        _ => None,
    }
}

/// Where a field of an entry is in a record.
#[inline(always)]
fn entry(slot: u16, field: u64) -> usize {
    place(HEADER, ENTRY, slot, field)
}

/// Where a field of a descriptor is in a ring.
#[inline(always)]
fn descriptor(slot: u16, field: u64) -> usize {
    place(0, DESCRIPTOR, slot, field)
}

/// Below 2^21, so that it is a `usize`.
#[inline(always)]
fn place(table: u64, element: u64, slot: u16, field: u64) -> usize {
    usize::try_from(table + element * u64::from(slot) + field).unwrap_or(usize::MAX)
}

/// The places of a ring from one position to before another, which is at most a round ahead.
#[inline(always)]
fn slots(from: u16, to: u16, size: u16) -> impl Iterator<Item = u16> {
    let (first, end) = (from & !WRAP, to & !WRAP);
    // Up to the end of the ring, then from its start.
    let (until, again) = match (from ^ to) & WRAP {
        0 => (end.max(first), 0),
        _ => (size, end),
    };
    (first..until).chain(0..again)
}

#[cfg(test)]
mod tests;
