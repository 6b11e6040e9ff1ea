//! The front-end's dirty log: a bit for each page of its memory that was written, for whoever moves that memory elsewhere while it is in use (vhost-user
//! specification, "Migration").
//!
//! Unsafe code: the log lies in memory that the front-end reads and clears at any moment; its bytes are reached by atomics alone, each after a check
//! against the log's length.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU8, Ordering, fence};

use virtqueue::linear::Linear;
use virtqueue::{Buffer, Chain};

use crate::peer::pieces;

/// VHOST_F_LOG_ALL, in the features of a front-end: what is written to its memory is logged.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG, in the flags of SET_VRING_ADDR: what is written to the ring is.
pub const VRING_F_LOG: u32 = 1 << 0;

/// log2 of what a bit stands for, in bytes.
const PAGE_SHIFT: u32 = 12;

/// A range of device addresses that a ring's device side writes: address and length.
pub type Range = (u64, u64);

/// A log of `len` bytes, from the lowest bit of the first byte on.
#[derive(Clone, Copy, Debug)]
pub struct DirtyLog {
    memory: Linear,
    len: u64,
}

impl DirtyLog {
    /// The log is the first `len` bytes of `memory`, which starts at device address 0. What `memory` does not hold of it is not written.
    #[must_use]
    pub fn new(memory: Linear, len: u64) -> Self {
        Self { memory, len }
    }

    /// Marks the pages of a range as written, those that the log has bits for. Comes behind a fence behind the writes.
    fn mark(&self, (addr, len): Range) {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else {
            return;
        };
        for page in addr >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            let (at, bit) = (page / 8, 1u8 << (page % 8));
            let Some(byte) = self.memory.ptr(at, 1).filter(|_| at < self.len) else {
                return;
            };
            // SAFETY: `ptr` checked that the byte is in the log's memory, which stays mapped, and nothing but atomics of either side reaches it.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            // Who finds the bit set has written before it is cleared, and what is written before that is copied after it.
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

/// What a data path logs.
#[derive(Clone, Copy, Debug)]
pub struct PortLog {
    /// The log.
    pub log: DirtyLog,
    /// For the receive and the transmit ring, what of it is logged when it is written: of a split ring the device area, of a packed one the descriptors too.
    pub rings: [[Range; 2]; 2],
}

impl PortLog {
    /// Up to `packet` bytes were written to the buffers of each of these chains that are for writing, and used elements to the receive ring.
    #[cold]
    pub(crate) fn sent(&self, chains: &[Chain], buffers: &[Buffer], packet: usize) {
        if chains.is_empty() {
            return;
        }
        fence(Ordering::SeqCst);
        for chain in chains {
            for piece in pieces(buffers, chain).iter().filter(|p| p.device_writes) {
                let len = u64::from(piece.len).min(packet as u64);
                self.log.mark((piece.addr, len));
            }
        }
        self.mark_ring(0);
    }

    /// `len` bytes were written at each of these places of `window`, which starts at device address 0.
    #[cold]
    pub(crate) fn wrote(&self, window: Linear, at: impl Iterator<Item = *mut u8>, len: usize) {
        let Some(start) = window.ptr(0, 0) else {
            return;
        };
        fence(Ordering::SeqCst);
        for ptr in at {
            let addr = ptr.addr().wrapping_sub(start.addr()) as u64;
            self.log.mark((addr, len as u64));
        }
    }

    /// The device side of this ring has been written: the receive ring is 0, the transmit ring 1.
    #[cold]
    pub(crate) fn ring(&self, ring: usize) {
        fence(Ordering::SeqCst);
        self.mark_ring(ring);
    }

    fn mark_ring(&self, ring: usize) {
        for range in self.rings.get(ring).into_iter().flatten() {
            self.log.mark(*range);
        }
    }
}

#[cfg(test)]
mod tests;
