//! Checks of the rings that a guest's driver set up, before a back-end gets to see them.

use std::sync::atomic::Ordering;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::host::{Access, MemoryRegion};
use crate::virtio::QueueSetup;
use crate::virtio_iommu::Endpoint;

/// Length of a descriptor, in either layout.
const DESCRIPTOR: u64 = 16;

/// A ring that cannot be: a fault of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum RingError {
    /// Zero, larger than the device allows, or a split ring whose size is no power of two.
    #[error("a queue of {0} descriptors")]
    Size(u16),
    /// A part of the ring is not aligned as VIRTIO 1.3, sections 2.7 and 2.8.10.1 want it.
    #[error("a ring at {0:#x}, which is not aligned")]
    Alignment(u64),
    /// A part of the ring is not in memory, or not in one piece of it.
    #[error("a ring at {0:#x}, which is not in memory")]
    Memory(u64),
    /// A part of the ring is not mapped for what the device does there, or not in one piece.
    #[error("a ring at the IO virtual address {iova:#x}, which is not mapped for this")]
    Unmapped {
        /// Where that part starts.
        iova: u64,
        /// What the device does there.
        access: Access,
    },
}

/// What the addresses of rings mean.
#[derive(Clone, Copy)]
pub(super) struct Space<'a> {
    /// The guest's memory, as a back-end maps it.
    pub(super) regions: &'a [MemoryRegion],
    /// What leads there where the device is behind an IOMMU.
    pub(super) endpoint: Option<&'a Endpoint>,
}

impl Space<'_> {
    /// The guest physical address of `len` bytes of a ring.
    fn find(&self, address: u64, len: u64, access: Access) -> Result<u64, RingError> {
        let gpa = match self.endpoint {
            None => address,
            Some(endpoint) => {
                endpoint
                    .translate(address, len, access)
                    .ok_or(RingError::Unmapped {
                        iova: address,
                        access,
                    })?
            }
        };
        // A back-end maps each region by itself, so that a ring across two of them is in pieces for it.
        let mut regions = self.regions.iter();
        if regions.any(|region| contains(region, gpa, len)) {
            Ok(gpa)
        } else {
            Err(RingError::Memory(address))
        }
    }

    /// Whether guest physical memory is all there, be it in pieces.
    pub(super) fn has(&self, mut gpa: u64, mut len: u64) -> bool {
        while len > 0 {
            let mut regions = self.regions.iter();
            let Some(region) = regions.find(|region| contains(region, gpa, 1)) else {
                return false;
            };
            // Not more than the region has from here on, so that neither wraps.
            let here = len.min(region.shared.len - (gpa - region.gpa));
            len -= here;
            gpa = gpa.saturating_add(here);
        }
        true
    }
}

/// Checks size, alignment and place of a ring (VIRTIO 1.3, section 2.7; packed: sections 2.8.10.1 and 2.8.14).
pub(super) fn check(
    queue: &QueueSetup,
    packed: bool,
    max_size: u16,
    space: Space,
) -> Result<(), RingError> {
    let fits = (1..=max_size).contains(&queue.size);
    if !fits || !(packed || queue.size.is_power_of_two()) {
        return Err(RingError::Size(queue.size));
    }
    let size = u64::from(queue.size);
    // Packed: the driver and the device area are one event suppression structure each, and both sides write descriptors.
    let [(driver, driver_align), (device, device_align)] = if packed {
        [(4, 4), (4, 4)]
    } else {
        [(6 + 2 * size, 2), (6 + 8 * size, 4)]
    };
    let descriptors: &[Access] = if packed {
        &[Access::Read, Access::Write]
    } else {
        &[Access::Read]
    };
    for (address, len, align, accesses) in [
        (queue.desc, DESCRIPTOR * size, 16, descriptors),
        (queue.driver, driver, driver_align, &[Access::Read]),
        (queue.device, device, device_align, &[Access::Write]),
    ] {
        if address % align != 0 {
            return Err(RingError::Alignment(address));
        }
        for &access in accesses {
            space.find(address, len, access)?;
        }
    }
    Ok(())
}

fn contains(region: &MemoryRegion, gpa: u64, len: u64) -> bool {
    gpa.checked_sub(region.gpa)
        .and_then(|offset| offset.checked_add(len))
        .is_some_and(|end| end <= region.shared.len)
}

/// The index up to which a back-end has used the buffers of a split ring: the next one may go on there, and serves again
/// what its predecessor had taken and not given back.
pub(super) fn used_index(
    queue: &QueueSetup,
    space: Space,
    memory: &GuestMemoryMmap,
) -> Result<u16, RingError> {
    let outside = RingError::Memory(queue.device);
    let address = queue.device.checked_add(2).ok_or(outside)?;
    // The guest let the device write there: that is what it did. Reading it back is the VMM's own doing.
    let gpa = space.find(address, 2, Access::Write)?;
    memory
        .load::<u16>(GuestAddress(gpa), Ordering::Acquire)
        .map(u16::from_le)
        .map_err(|_| outside)
}

/// Whether a packed ring has not been touched: the driver has not made anything available, so no back-end has used anything.
///
/// This is told from the first descriptor alone. It is zero in a ring that was not touched, provided that the driver cleared it,
/// and a descriptor that has been made available has an address ever after, because using it does not overwrite that. (Its
/// flags tell less: after two laps they are those of the beginning.)
pub(super) fn is_blank(queue: &QueueSetup, space: Space, memory: &GuestMemoryMmap) -> bool {
    let words = [0, 8].map(|offset| {
        let address = queue.desc.checked_add(offset)?;
        let gpa = space.find(address, 8, Access::Read).ok()?;
        memory
            .load::<u64>(GuestAddress(gpa), Ordering::Acquire)
            .ok()
    });
    words == [Some(0); 2]
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::host::SharedRegion;
    use crate::virtio::event;

    fn memory() -> Vec<MemoryRegion> {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let region = |gpa, len| MemoryRegion {
            gpa,
            shared: SharedRegion {
                file: file.clone(),
                file_offset: 0,
                len,
            },
        };
        vec![region(0x1_0000, 0x1_0000), region(0x2_0000, 0x1_0000)]
    }

    fn plain(regions: &[MemoryRegion]) -> Space<'_> {
        Space {
            regions,
            endpoint: None,
        }
    }

    fn queue(size: u16, desc: u64, driver: u64, device: u64) -> QueueSetup {
        QueueSetup {
            size,
            desc,
            driver,
            device,
            enabled: true,
            kick: Arc::new(event::new().unwrap()),
            call: Arc::new(event::new().unwrap()),
        }
    }

    #[test]
    fn a_ring_up_to_the_last_byte_of_a_region_passes_and_one_byte_further_does_not() {
        let end = 0x2_0000;
        let memory = &memory()[..1];
        let memory = plain(memory);
        let fits = queue(256, end - 4096, 0x1_0000, 0x1_1000);
        assert_eq!(check(&fits, false, 256, memory), Ok(()));
        let fits = queue(256, 0x1_0000, end - 518, 0x1_1000);
        assert_eq!(check(&fits, false, 256, memory), Ok(()));
        for (desc, driver, device) in [
            (end - 4080, 0x1_1000, 0x1_2000),
            (0x1_0000, end - 516, 0x1_2000),
            (0x1_0000, 0x1_1000, end - 2052),
            (0x0_fff0, 0x1_1000, 0x1_2000),
            (u64::MAX - 15, 0x1_1000, 0x1_2000),
        ] {
            let result = check(&queue(256, desc, driver, device), false, 256, memory);
            assert!(matches!(result, Err(RingError::Memory(_))), "{result:?}");
        }
    }

    #[test]
    fn a_ring_across_two_regions_is_refused() {
        let across = queue(256, 0x2_0000 - 2048, 0x1_0000, 0x1_1000);
        let result = check(&across, false, 256, plain(&memory()));
        assert_eq!(result, Err(RingError::Memory(0x2_0000 - 2048)));
    }

    #[test]
    fn sizes_and_alignments_that_split_rings_cannot_have_are_refused() {
        let memory = memory();
        for size in [0, 3, 255, 512] {
            let result = check(
                &queue(size, 0x1_0000, 0x1_1000, 0x1_2000),
                false,
                256,
                plain(&memory),
            );
            assert_eq!(result, Err(RingError::Size(size)));
        }
        for (desc, driver, device) in [(8, 0, 0), (0, 1, 0), (0, 0, 2)] {
            let ring = queue(16, 0x1_0000 + desc, 0x1_1000 + driver, 0x1_2000 + device);
            let result = check(&ring, false, 256, plain(&memory));
            assert!(matches!(result, Err(RingError::Alignment(_))), "{result:?}");
        }
    }
}
