//! The guest's memory as a device reaches it for the queues that the VMM itself serves: by guest physical address, or through the IOMMU that it is behind.
//!
//! Every access is translated anew and nothing is remembered, so a mapping that is gone is gone with the next access. The IOMMU and
//! this device are served by the same thread: no request of the guest completes between a translation and its use.

use std::cell::Cell;
use std::iter::FusedIterator;
use std::vec;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, Permissions,
    VolatileSlice,
};

use super::RingFault;
use crate::host::Access;
use crate::virtio_iommu::Endpoint;

type Result<T> = std::result::Result<T, GuestMemoryError>;

const ACCESSES: [(Permissions, Access); 2] = [
    (Permissions::Read, Access::Read),
    (Permissions::Write, Access::Write),
];

/// Memory by device address.
pub(crate) struct DeviceMemory<'m> {
    memory: &'m GuestMemoryMmap,
    endpoint: Option<&'m Endpoint>,
    refused: Cell<bool>,
}

impl<'m> DeviceMemory<'m> {
    pub(crate) fn new(memory: &'m GuestMemoryMmap, endpoint: Option<&'m Endpoint>) -> Self {
        Self {
            memory,
            endpoint,
            refused: Cell::new(false),
        }
    }

    /// Whether the IOMMU has refused an access. It was told of each.
    pub(crate) fn refused(&self) -> bool {
        self.refused.get()
    }

    /// An error where that has happened. The virtio-queue crate takes what it cannot read for the end of a chain or of the ring, so who
    /// reads a ring through this has to ask.
    pub(crate) fn check(&self, ring: &'static str) -> std::result::Result<(), RingFault> {
        if self.refused() {
            return Err(RingFault::Unmapped(ring));
        }
        Ok(())
    }

    /// Where `count` bytes lie in the guest physical address space. The caller's `count` bounds the pieces.
    fn pieces(
        &self,
        address: GuestAddress,
        count: usize,
        permissions: Permissions,
    ) -> Result<Vec<(GuestAddress, usize)>> {
        let Some(endpoint) = self.endpoint else {
            return Ok(vec![(address, count)]);
        };
        let mut pieces = Vec::new();
        let (mut next, mut left) = (address.0, count as u64);
        while left > 0 {
            let mapping = endpoint.lookup(next);
            let refused = ACCESSES.into_iter().find(|&(needed, access)| {
                permissions.allow(needed)
                    && !mapping.is_some_and(|mapping| mapping.permission.allows(access))
            });
            let (Some(mapping), None) = (mapping, refused) else {
                self.refused.set(true);
                endpoint.report(next, refused.map_or(Access::Read, |(_, access)| access));
                return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(next)));
            };
            let inside = next - mapping.iova;
            let len = left.min(mapping.len - inside);
            // It is not more than `count`.
            let piece = usize::try_from(len).unwrap_or(usize::MAX);
            pieces.push((GuestAddress(mapping.gpa + inside), piece));
            left -= len;
            next = match next.checked_add(len) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(GuestMemoryError::GuestAddressOverflow),
            };
        }
        Ok(pieces)
    }
}

impl GuestMemory for DeviceMemory<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        self.pieces(address, count, access).is_ok_and(|pieces| {
            pieces
                .iter()
                .all(|&(at, len)| GuestMemoryBackend::check_range(self.memory, at, len))
        })
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        let pieces = self.pieces(address, count, access)?;
        let slices: Result<Vec<_>> = pieces
            .into_iter()
            .flat_map(|(at, len)| GuestMemoryBackend::get_slices(self.memory, at, len))
            .collect();
        Ok(Slices(slices?.into_iter()))
    }
}

/// The parts of a range, in order.
struct Slices<'a>(vec::IntoIter<VolatileSlice<'a>>);

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(Ok)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}
