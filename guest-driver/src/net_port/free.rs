//! Which transmit buffers are not with the device.

use alloc::vec::Vec;

/// Free buffers, in the order in which they came back: who takes the first ones goes round the pool as it lies in memory.
///
/// (A stack mixes them up in the course of time. Long frames that do not lie one behind the other took their receiver a third longer.)
#[derive(Debug)]
pub(super) struct Free {
    /// Those before `first` were taken; there is room for twice as many as the pool has, so that they need not be dropped each time.
    list: Vec<u16>,
    first: usize,
}

impl Free {
    /// All buffers of a pool.
    pub(super) fn all(count: u16) -> Self {
        let mut list = Vec::with_capacity(2 * usize::from(count));
        list.extend(0..count);
        Self { list, first: 0 }
    }

    /// How many there are.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.list.len() - self.first
    }

    /// The first `count`, or all where there are fewer.
    #[inline(always)]
    pub(super) fn first(&self, count: usize) -> &[u16] {
        let end = self.first + count.min(self.len());
        self.list.get(self.first..end).unwrap_or_default()
    }

    /// Takes the first `count`, or all where there are fewer.
    #[inline(always)]
    pub(super) fn take(&mut self, count: usize) {
        self.first += count.min(self.len());
    }

    /// One came back.
    #[inline(always)]
    pub(super) fn put(&mut self, buffer: u16) {
        if self.list.len() == self.list.capacity() {
            self.list.drain(..self.first);
            self.first = 0;
        }
        self.list.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::VecDeque;

    use super::*;

    #[test]
    fn buffers_come_back_behind_the_others_and_no_memory_is_asked_for() {
        for count in 1u16..20 {
            let mut free = Free::all(count);
            let room = free.list.capacity();
            let mut model: VecDeque<u16> = (0..count).collect();
            let mut taken = VecDeque::new();
            for step in 0..1000usize {
                let (take, put) = (step * 7 % 11, step * 5 % 13);
                let expected: Vec<u16> = model.iter().take(take).copied().collect();
                assert_eq!(free.first(take), expected);
                free.take(take);
                taken.extend(model.drain(..expected.len()));
                for buffer in taken.drain(..put.min(taken.len())) {
                    free.put(buffer);
                    model.push_back(buffer);
                }
                assert_eq!(free.len(), model.len());
            }
            assert_eq!(free.list.capacity(), room);
        }
    }
}
