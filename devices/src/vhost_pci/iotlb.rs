//! The translations of one connection: which device addresses lead where.

use std::collections::BTreeMap;

use crate::host::{Access, Permission};

/// A range of device addresses that leads into one region of the memory table. In bytes, whole pages; it does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) iova: u64,
    /// Not zero.
    pub(super) len: u64,
    /// The region's guest address, which no other region has.
    pub(super) region: u64,
    /// Where it starts in the region.
    pub(super) offset: u64,
    pub(super) permission: Permission,
}

impl Translation {
    fn end(&self) -> u64 {
        self.iova + self.len
    }

    /// Its part between two addresses that it has bytes between.
    fn part(&self, start: u64, end: u64) -> Self {
        let iova = self.iova.max(start);
        Self {
            iova,
            len: self.end().min(end) - iova,
            offset: self.offset + (iova - self.iova),
            ..*self
        }
    }

    /// Whether both lead to the same byte from the same address, for the same accesses.
    fn agrees(&self, other: &Self) -> bool {
        let shift = |t: &Self| t.offset.wrapping_sub(t.iova);
        (self.region, self.permission, shift(self))
            == (other.region, other.permission, shift(other))
    }
}

/// They do not overlap. Ranges are from `start` to before `end`.
#[derive(Default)]
pub(super) struct Translations(BTreeMap<u64, Translation>);

impl Translations {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Those with bytes in the range, in order.
    fn touching(&self, start: u64, end: u64) -> impl DoubleEndedIterator<Item = &Translation> {
        let across = self.0.range(..start).next_back().map(|(_, t)| t);
        let first = across.filter(|t| t.end() > start).map_or(start, |t| t.iova);
        self.0.range(first..end.max(first)).map(|(_, t)| t)
    }

    /// From the first to the last byte in the range that is translated.
    pub(super) fn span(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let mut touching = self.touching(start, end);
        let first = touching.next()?;
        let last = touching.next_back().unwrap_or(first);
        Some((first.iova.max(start), last.end().min(end)))
    }

    /// How many there would be without the range; one that lies across it becomes two.
    pub(super) fn count_without(&self, start: u64, end: u64) -> usize {
        let (mut gone, mut parts) = (0, 0);
        for t in self.touching(start, end) {
            gone += 1;
            parts += usize::from(t.iova < start) + usize::from(t.end() > end);
        }
        self.len() + parts - gone
    }

    /// Nothing in the range is translated any more.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        let touched: Vec<_> = self.touching(start, end).copied().collect();
        for t in touched {
            self.0.remove(&t.iova);
            if t.iova < start {
                self.insert(t.part(t.iova, start));
            }
            if t.end() > end {
                self.insert(t.part(end, t.end()));
            }
        }
    }

    /// Adds one, which overlaps none.
    pub(super) fn insert(&mut self, translation: Translation) {
        self.0.insert(translation.iova, translation);
    }

    /// Whether all of this is translated so already.
    pub(super) fn has(&self, wanted: &Translation) -> bool {
        let mut next = wanted.iova;
        for t in self.touching(wanted.iova, wanted.end()) {
            if t.iova > next || !t.agrees(wanted) {
                return false;
            }
            next = t.end();
        }
        next >= wanted.end()
    }

    /// The first byte of the range that this access cannot have.
    pub(super) fn first_missing(&self, start: u64, end: u64, access: Access) -> Option<u64> {
        let mut next = start;
        for t in self.touching(start, end) {
            if t.iova > next || !t.permission.allows(access) {
                break;
            }
            next = t.end();
        }
        (next < end).then_some(next)
    }

    /// Where translations lead into a region: start and end of each.
    pub(super) fn leading_to(&self, region: u64) -> Vec<(u64, u64)> {
        let there = self.0.values().filter(|t| t.region == region);
        there.map(|t| (t.iova, t.end())).collect()
    }
}
