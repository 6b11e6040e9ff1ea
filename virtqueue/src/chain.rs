//! What both layouts do with a chain of more than one descriptor: the device's checks, and tables of indirect descriptors.

use crate::{Buffer, Error, Memory};

/// Size of a descriptor in bytes, in a ring as in a table, in both layouts.
pub(crate) const DESC_LEN: usize = 16;
/// [`DESC_LEN`] in the unit of a descriptor's length.
const DESC_LEN_32: u32 = 16;

/// Checks the buffers of a chain, one behind the other, and puts them into the caller's array.
pub(crate) struct Collector<'a, M> {
    memory: &'a M,
    out: core::slice::IterMut<'a, Buffer>,
    total: u32,
    /// Buffers from here on have to be for the device to write.
    writable: bool,
    count: u16,
}

impl<'a, M: Memory> Collector<'a, M> {
    pub(crate) fn new(memory: &'a M, out: &'a mut [Buffer]) -> Self {
        Self {
            memory,
            out: out.iter_mut(),
            total: 0,
            writable: false,
            count: 0,
        }
    }

    /// Adds a buffer. Returns whether there was a place for it; a chain that gets none is not taken.
    #[inline]
    pub(crate) fn push(&mut self, buffer: Buffer) -> Result<bool, Error> {
        if !self.memory.contains(buffer.addr, buffer.len) {
            return Err(Error::BadAddress);
        }
        if self.writable && !buffer.device_writes {
            return Err(Error::BadFlags);
        }
        self.writable = buffer.device_writes;
        self.total = self.total.checked_add(buffer.len).ok_or(Error::BadLength)?;
        let Some(place) = self.out.next() else {
            return Ok(false);
        };
        *place = buffer;
        self.count += 1;
        Ok(true)
    }

    /// How many buffers the chain has.
    #[inline]
    pub(crate) fn count(&self) -> u16 {
        self.count
    }
}

/// The table that a peer's descriptor refers to, and how many descriptors it has. A chain through it may not be longer than the ring's
/// `size` (sections 2.7.5.3.1 and 2.8.17).
pub(crate) fn open_table<M: Memory>(
    memory: &M,
    addr: u64,
    len: u32,
    size: u16,
) -> Result<(M::Region, u16), Error> {
    let count = len / DESC_LEN_32;
    if count == 0 || !len.is_multiple_of(DESC_LEN_32) {
        return Err(Error::BadLength);
    }
    let count = u16::try_from(count).map_err(|_| Error::ChainTooLong)?;
    if count > size {
        return Err(Error::ChainTooLong);
    }
    // The specification asks for no alignment; that of the accesses is needed.
    let region = memory
        .region(addr, DESC_LEN * usize::from(count), 8)
        .ok_or(Error::BadAddress)?;
    Ok((region, count))
}

/// The caller's memory for a table of `count` descriptors, and its length in bytes; `None` where it is not there, or where a chain may not be so long.
pub(crate) fn make_table<M: Memory>(
    memory: &M,
    addr: u64,
    count: usize,
    size: u16,
) -> Option<(M::Region, u32)> {
    let count = u16::try_from(count).ok()?;
    if count == 0 || count > size {
        return None;
    }
    let region = memory.region(addr, DESC_LEN * usize::from(count), DESC_LEN)?;
    Some((region, DESC_LEN_32 * u32::from(count)))
}

/// How many bytes the device may write into a chain. The sum saturates: a caller whose chain is longer than 4 GiB offers what
/// the device refuses.
#[inline]
pub(crate) fn writable(buffers: &[Buffer]) -> u32 {
    buffers
        .iter()
        .filter(|buffer| buffer.device_writes)
        .fold(0, |sum, buffer| sum.saturating_add(buffer.len))
}
