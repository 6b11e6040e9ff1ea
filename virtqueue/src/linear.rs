//! [`Linear`]: one mapped stretch of shared memory.
//!
//! The other side may be another process or another virtual machine and writes whenever it likes, so rings are reached through raw
//! pointers and atomics only: there is never a reference to shared bytes.

// The one module of the crate that turns addresses into accesses.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::{Memory, Region};

/// A [`Memory`] over one mapped stretch: `len` bytes, the first of which has the device address `first_addr` and is mapped at `base`.
///
/// For a guest that maps its memory one to one, `base` is the address itself; for a window that starts at device address 0,
/// `base` is where the BAR is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    base: *mut u8,
    first_addr: u64,
    len: u64,
}

// SAFETY: a `Linear` holds an address and two numbers. Whoever made it promised that the memory is there for every thread that
// gets a copy (`Linear::new`), and all accesses through it are atomic.
unsafe impl Send for Linear {}
// SAFETY: as for `Send`; it has no interior state.
unsafe impl Sync for Linear {}

impl Linear {
    /// Describes a mapped stretch.
    ///
    /// # Safety
    ///
    /// * As long as a copy of the result or a region of it is used, `len` bytes from `base` on are mapped, readable and writable, in one
    ///   allocation (or outside of everything that Rust knows of), and `len` is at most `isize::MAX`.
    /// * Nothing holds a reference to these bytes while they are used, other than to atomics.
    /// * Whoever calls the methods of a [`LinearRegion`] keeps what [`Region`] says about offsets. The rings of this crate do.
    pub unsafe fn new(base: *mut u8, first_addr: u64, len: u64) -> Self {
        Self {
            base,
            first_addr,
            len,
        }
    }

    /// Where the `len` bytes at device address `addr` are mapped; `None` where not all of them are. This is how payload is reached: the caller
    /// copies through the pointer, and expects that the other side writes at the same time.
    #[inline]
    pub fn ptr(&self, addr: u64, len: usize) -> Option<*mut u8> {
        let offset = self.offset(addr, u64::try_from(len).ok()?)?;
        Some(self.base.wrapping_add(usize::try_from(offset).ok()?))
    }

    /// Two comparisons, none of which can overflow: `len` first, so that what is left for the start is known.
    #[inline]
    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.wrapping_sub(self.first_addr);
        (len <= self.len && offset <= self.len - len).then_some(offset)
    }
}

impl Memory for Linear {
    type Region = LinearRegion;

    #[inline]
    fn region(&self, addr: u64, len: usize, align: usize) -> Option<LinearRegion> {
        let start = self.ptr(addr, len)?;
        // Both: the device address because the specification asks for it, the pointer because the accesses need it.
        let mask = align.checked_sub(1)?;
        let aligned = addr & u64::try_from(mask).ok()? == 0 && start.addr() & mask == 0;
        aligned.then_some(LinearRegion {
            start,
            #[cfg(debug_assertions)]
            len,
        })
    }

    #[inline]
    fn contains(&self, addr: u64, len: u32) -> bool {
        self.offset(addr, u64::from(len)).is_some()
    }
}

/// A [`Region`] of a [`Linear`]. Values in memory are little-endian.
#[derive(Clone, Copy, Debug)]
pub struct LinearRegion {
    start: *mut u8,
    #[cfg(debug_assertions)]
    len: usize,
}

// SAFETY: as for `Linear`, whose promise covers its regions.
unsafe impl Send for LinearRegion {}
// SAFETY: as for `Linear`.
unsafe impl Sync for LinearRegion {}

impl LinearRegion {
    /// The address of a value of `size` bytes at `offset`.
    #[inline]
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        #[cfg(debug_assertions)]
        assert!(
            offset.checked_add(size).is_some_and(|end| end <= self.len)
                && (self.start.addr() + offset).is_multiple_of(size),
            "the ring code reaches {size} bytes at {offset} of {}",
            self.len
        );
        let _ = size;
        self.start.wrapping_add(offset)
    }
}

/// One load and one store of a width.
macro_rules! access {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        #[inline]
        fn $load(&self, offset: usize, order: Ordering) -> $int {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            // SAFETY: the region was checked against the `Linear`, whose maker promised that it is mapped and reached atomically;
            // that the offset is in bounds and aligned is the contract of `Region`, which the ring code keeps.
            <$int>::from_le(unsafe { <$atomic>::from_ptr(at) }.load(order))
        }

        #[inline]
        fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let at = self.at(offset, size_of::<$int>()).cast::<$int>();
            // SAFETY: as for the load; the maker of the `Linear` promised that it is writable.
            unsafe { <$atomic>::from_ptr(at) }.store(value.to_le(), order);
        }
    };
}

impl Region for LinearRegion {
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);
    access!(load_u64, store_u64, u64, AtomicU64);

    #[inline]
    fn fence(order: Ordering) {
        // A locked instruction is as full a fence as mfence is for memory of this kind, and takes half the time.
        #[cfg(target_arch = "x86_64")]
        if order == Ordering::SeqCst {
            // SAFETY: the word at the top of the stack is ours, and keeps its value.
            unsafe { core::arch::asm!("lock or dword ptr [rsp], 0") };
            return;
        }
        fence(order);
    }

    #[inline]
    fn prefetch(&self, offset: usize) {
        #[cfg(all(target_arch = "x86_64", target_feature = "sse"))]
        {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch reads nothing and does not fault, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.start.wrapping_add(offset).cast::<i8>()) };
        }
        #[cfg(not(all(target_arch = "x86_64", target_feature = "sse")))]
        let _ = offset;
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests {
    use std::boxed::Box;
    use std::vec::Vec;

    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    /// A page of memory that is only ever reached atomically.
    #[repr(align(4096))]
    struct Page(#[expect(dead_code, reason = "reached by address")] [AtomicU64; 512]);

    /// Zeroed memory that is never freed.
    pub(crate) fn leak(first_addr: u64, pages: usize) -> Linear {
        let memory: Vec<Page> = (0..pages)
            .map(|_| Page([const { AtomicU64::new(0) }; 512]))
            .collect();
        let base = Box::leak(memory.into_boxed_slice())
            .as_mut_ptr()
            .cast::<u8>();
        let len = u64::try_from(pages * 4096).unwrap();
        // SAFETY: the pages are leaked and consist of atomics; the leaked reference is gone.
        unsafe { Linear::new(base, first_addr, len) }
    }

    /// The same memory twice: as the device of another crate sees it, and as ours.
    pub(crate) fn leak_guest(len: usize) -> (&'static GuestMemoryMmap, Linear) {
        let ranges = [(GuestAddress(0), len)];
        let memory: &'static GuestMemoryMmap =
            Box::leak(Box::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()));
        let base = memory.get_host_address(GuestAddress(0)).unwrap();
        // SAFETY: the mapping is leaked, and `GuestMemoryMmap` gives no references to it out.
        (memory, unsafe {
            Linear::new(base, 0, u64::try_from(len).unwrap())
        })
    }

    #[test]
    fn contains_exactly_the_ranges_that_lie_within() {
        let linear = leak(0x1000, 1);
        for (addr, len, inside) in [
            (0x1000, 0x1000, true),
            (0x1000, 0, true),
            (0x2000, 0, true),
            (0x1fff, 1, true),
            (0x1fff, 2, false),
            (0x2000, 1, false),
            (0x2001, 0, false),
            (0xfff, 1, false),
            (0xfff, 2, false),
            (0, 0x1001, false),
            (0x1000, 0x1001, false),
            (0x1001, 0x1000, false),
            (u64::MAX, 1, false),
            (u64::MAX, u32::MAX, false),
            (u64::MAX - 0xfff, 0x1000, false),
            (0x1800, u32::MAX, false),
        ] {
            assert_eq!(linear.contains(addr, len), inside, "{addr:#x} {len:#x}");
            let ptr = linear.ptr(addr, usize::try_from(len).unwrap());
            let expected = addr
                .checked_sub(0x1000)
                .map(|o| linear.base.wrapping_add(usize::try_from(o).unwrap()));
            assert_eq!(
                ptr,
                expected.filter(|_| inside),
                "{addr:#x} {len:#x} as a pointer"
            );
        }
    }

    #[test]
    fn contains_no_range_whose_end_overflows() {
        // SAFETY: nothing is accessed.
        let linear = unsafe { Linear::new(core::ptr::null_mut(), 0, u64::MAX >> 1) };
        assert!(!linear.contains(u64::MAX, 2));
        assert!(!linear.contains(u64::MAX >> 1, 1));
        assert!(linear.contains((u64::MAX >> 1) - 1, 1));
        assert_eq!(linear.ptr(u64::MAX - 7, 16), None);
    }

    #[test]
    fn a_region_is_aligned_and_inside() {
        let linear = leak(0x1_0000, 1);
        assert!(linear.region(0x1_0000, 4096, 16).is_some());
        assert!(linear.region(0x1_0008, 16, 8).is_some());
        assert!(linear.region(0x1_0008, 16, 16).is_none());
        assert!(linear.region(0x1_0001, 2, 2).is_none());
        assert!(linear.region(0x1_0010, 4096, 16).is_none());
        assert!(linear.region(0x1_0000, 16, 0).is_none());
        // The device address is aligned, the place where it is mapped is not.
        let base = linear.base.wrapping_add(8);
        // SAFETY: a part of the leaked page.
        let odd = unsafe { Linear::new(base, 0, 1024) };
        assert!(odd.region(0, 64, 8).is_some());
        assert!(odd.region(0, 64, 16).is_none());
    }

    #[test]
    fn values_are_little_endian_and_of_every_width() {
        let linear = leak(0, 1);
        let region = linear.region(0, 4096, 16).unwrap();
        region.store_u64(8, 0x8877_6655_4433_2211, Ordering::Relaxed);
        assert_eq!(region.load_u16(8, Ordering::Relaxed), 0x2211);
        assert_eq!(region.load_u32(12, Ordering::Relaxed), 0x8877_6655);
        region.store_u16(10, 0xabcd, Ordering::Release);
        region.store_u32(12, 0x0102_0304, Ordering::Release);
        assert_eq!(region.load_u64(8, Ordering::Acquire), 0x0102_0304_abcd_2211);
        region.prefetch(0);
    }
}
