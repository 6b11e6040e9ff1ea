//! Where a back-end keeps what it is doing ("Inflight I/O tracking"): an area of shared memory that outlives it. The front-end holds on to the file
//! and gives it to the next back-end, and looks at nothing in it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::wire::{DecodeError, Payload, exactly, u16_at, u64_at};

/// "Inflight description".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inflight {
    /// Length of the area in bytes; 0: there is none.
    pub mmap_size: u64,
    /// Where it starts in the file that comes with it.
    pub mmap_offset: u64,
    /// How many vrings it is for.
    pub num_queues: u16,
    /// How many descriptors the largest of them has.
    pub queue_size: u16,
}

impl Payload for Inflight {
    /// With the four bytes behind it that a C compiler appends: all implementations have them.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.extend_from_slice(&self.mmap_size.to_le_bytes());
        out.extend_from_slice(&self.mmap_offset.to_le_bytes());
        out.extend_from_slice(&self.num_queues.to_le_bytes());
        out.extend_from_slice(&self.queue_size.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes: &[u8; 24] = exactly(payload)?;
        Ok(Self {
            mmap_size: u64_at::<0, 24>(bytes),
            mmap_offset: u64_at::<8, 24>(bytes),
            num_queues: u16_at::<16, 24>(bytes),
            queue_size: u16_at::<18, 24>(bytes),
        })
    }
}

/// An area and its file.
#[derive(Clone, Debug)]
pub struct InflightArea {
    pub(super) description: Inflight,
    pub(super) file: Arc<OwnedFd>,
}
