//! The guest's memory as the ring core reaches it, over the vm-memory crate: every access is checked there again, so that there is no unsafe code
//! here. That costs a few nanoseconds an access, of a system call a frame.

use std::sync::atomic::{Ordering, fence};

use virtqueue::{Memory, Region};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// All of it, by guest physical address.
#[derive(Clone, Debug)]
pub(super) struct Ram(pub(super) GuestMemoryMmap);

/// A part that was checked.
#[derive(Debug)]
pub(super) struct Part {
    ram: GuestMemoryMmap,
    start: u64,
}

impl Memory for Ram {
    type Region = Part;

    fn region(&self, addr: u64, len: usize, align: usize) -> Option<Part> {
        let inside = self.contains(addr, u32::try_from(len).ok()?);
        // A region of memory starts at a page in either space.
        let aligned = addr & u64::try_from(align.checked_sub(1)?).ok()? == 0;
        (inside && aligned).then(|| Part {
            ram: self.0.clone(),
            start: addr,
        })
    }

    fn contains(&self, addr: u64, len: u32) -> bool {
        let Ok(count) = usize::try_from(len) else {
            return false;
        };
        addr.checked_add(len.into()).is_some()
            && self
                .0
                .check_range(GuestAddress(addr), count, Permissions::ReadWrite)
    }
}

/// One load and one store of a width. They do not fail, for the part was checked and memory stays where it is.
macro_rules! access {
    ($load:ident, $store:ident, $int:ty) => {
        fn $load(&self, offset: usize, order: Ordering) -> $int {
            let value = self.ram.load::<$int>(self.at(offset), order);
            <$int>::from_le(value.unwrap_or_default())
        }

        fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let _ = self.ram.store(value.to_le(), self.at(offset), order);
        }
    };
}

impl Part {
    fn at(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.start.saturating_add(offset as u64))
    }
}

impl Region for Part {
    access!(load_u16, store_u16, u16);
    access!(load_u32, store_u32, u32);
    access!(load_u64, store_u64, u64);

    fn fence(order: Ordering) {
        fence(order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_there_up_to_its_last_byte_and_aligned_or_not_at_all() {
        let ranges = [
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ];
        let ram = Ram(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        for (addr, len, inside) in [
            (0x1000, 0x1000, true),
            (0x1ff8, 8, true),
            (0x1ff8, 16, false),
            (0xff8, 16, false),
            (0x3ff8, 16, false),
            (0x4ff8, 8, true),
            (u64::MAX - 7, 8, false),
            (u64::MAX - 7, 16, false),
        ] {
            assert_eq!(ram.contains(addr, len), inside, "{addr:#x}");
            let len = usize::try_from(len).unwrap();
            assert_eq!(ram.region(addr, len, 8).is_some(), inside, "{addr:#x}");
        }
        assert!(ram.region(0x1004, 8, 8).is_none());
        let part = ram.region(0x1008, 8, 8).unwrap();
        part.store_u32(4, 0x1122_3344, Ordering::Release);
        let bytes: [u8; 4] = ram.0.read_obj(GuestAddress(0x100c)).unwrap();
        assert_eq!(bytes, [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(part.load_u64(0, Ordering::Acquire), 0x1122_3344_0000_0000);
    }
}
