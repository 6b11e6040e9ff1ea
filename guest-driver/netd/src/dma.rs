//! Memory that the device reaches: for the driver's control queues, and their messages.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use guest_driver::Dma;
use virtqueue::linear::Linear;

use crate::sys;

/// Bytes of an arena by physical address: a page of the size that stays where it is.
const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;
/// What the device looks at shares no pair of cache lines with anything else.
const LINES: usize = 128;

/// Why there is no memory that a device can reach.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No page of 2 MiB.
    #[error(
        "no free page of 2 MiB for the device's queues ({0}); 'sysctl vm.nr_hugepages=1' (as root) reserves one"
    )]
    HugePage(#[source] io::Error),
    /// No memory at all.
    #[error("no memory for the device's queues that can be locked: {0}")]
    Memory(#[source] io::Error),
    /// No look at physical addresses.
    #[error("cannot read /proc/self/pagemap: {0}")]
    Pagemap(#[source] io::Error),
    /// They read as zero.
    #[error("the kernel hides physical addresses from this process: it needs CAP_SYS_ADMIN (root)")]
    Hidden,
}

/// Memory with consecutive device addresses, given away piece by piece and never taken back: the device may write to it until it is reset.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    addr: u64,
    len: usize,
    used: Cell<usize>,
}

impl Arena {
    /// Memory whose device addresses are its guest physical ones: for a device that no IOMMU translates for. Needs a page of 2 MiB: others the kernel may
    /// move, and the device would not know.
    pub fn physical() -> Result<Self, Error> {
        let base = sys::map_locked(HUGE, true).map_err(Error::HugePage)?;
        Ok(Self {
            base,
            addr: physical_address(base)?,
            len: HUGE,
            used: Cell::new(0),
        })
    }

    /// `len` bytes that whoever calls this maps for the device from device address `addr` on.
    pub fn at(addr: u64, len: usize) -> Result<Self, Error> {
        Ok(Self {
            base: sys::map_locked(len, false).map_err(Error::Memory)?,
            addr,
            len,
            used: Cell::new(0),
        })
    }

    /// Where it is in this process.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Its device addresses: the first, and how many.
    #[must_use]
    pub fn range(&self) -> (u64, usize) {
        (self.addr, self.len)
    }

    /// All of it, by device address, as rings reach it.
    #[must_use]
    #[allow(unsafe_code)] // one block: a mapping becomes memory that rings can lie in
    pub fn memory(&self) -> Linear {
        // SAFETY: mapped for ever; nothing of Rust's is in it, since `take` gives each byte away as a pointer.
        unsafe { Linear::new(self.base.as_ptr(), self.addr, self.len as u64) }
    }

    /// Zeroed bytes; `align` is a power of two. `None` when there are no more.
    pub fn take(&self, len: usize, align: usize) -> Option<Dma> {
        let whole = len.max(1).checked_next_multiple_of(LINES)?;
        // The base is aligned to pages at least, in either address.
        let start = self
            .used
            .get()
            .checked_next_multiple_of(align.clamp(LINES, PAGE))?;
        let end = start.checked_add(whole).filter(|&end| end <= self.len)?;
        if align > PAGE {
            return None;
        }
        self.used.set(end);
        Some(Dma {
            ptr: NonNull::new(self.base.as_ptr().wrapping_add(start))?,
            addr: self.addr + start as u64,
            len,
        })
    }
}

/// The guest physical address of a page of this process (Linux, Documentation/admin-guide/mm/pagemap.rst).
fn physical_address(page: NonNull<u8>) -> Result<u64, Error> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    let number = (page.addr().get() / PAGE) as u64;
    File::open("/proc/self/pagemap")
        .and_then(|map| map.read_exact_at(&mut entry, number * 8))
        .map_err(Error::Pagemap)?;
    let entry = u64::from_le_bytes(entry);
    match entry & FRAME {
        0 => Err(Error::Hidden),
        frame if entry & PRESENT != 0 => Ok(frame * PAGE as u64),
        _ => Err(Error::Hidden),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_zeroed_apart_and_end_with_the_arena() {
        let arena = Arena::at(0x40_0000, 4 * PAGE).unwrap();
        let mut last = 0x40_0000;
        for (len, align) in [(1, 1), (64, 64), (100, 4096), (4096, 4096)] {
            let piece = arena.take(len, align).unwrap();
            assert_eq!(piece.len, len);
            assert!(piece.addr >= last && piece.addr.is_multiple_of(align.max(LINES) as u64));
            assert!(piece.ptr.addr().get().is_multiple_of(align.max(LINES)));
            let at = arena.memory().ptr(piece.addr, len).unwrap();
            assert_eq!(at, piece.ptr.as_ptr(), "the same byte by either address");
            last = piece.addr + len as u64;
        }
        assert!(arena.take(PAGE, PAGE).is_some());
        assert!(arena.take(1, 1).is_none(), "nothing is left");
        assert!(arena.take(usize::MAX, 1).is_none());
        let fresh = Arena::at(0, 4 * PAGE).unwrap();
        assert!(fresh.take(1, 2 * PAGE).is_none(), "no more than a page");
    }

    #[test]
    fn one_page_mapped_twice_has_one_physical_address_and_another_page_has_another() {
        let file = vmm_sys_util::tempfile::TempFile::new_in(std::path::Path::new("/dev/shm"))
            .unwrap()
            .into_file();
        file.set_len(2 * PAGE as u64).unwrap();
        file.write_all_at(&[1; 2 * PAGE], 0).unwrap();
        let map = |offset| {
            let page = sys::map_file(&file, offset, PAGE as u64).unwrap();
            // The page table has an entry once the page was touched.
            let linear = |at: NonNull<u8>| {
                Arena {
                    base: at,
                    addr: 0,
                    len: PAGE,
                    used: Cell::new(0),
                }
                .memory()
            };
            use virtqueue::{Memory, Region};
            let region = linear(page).region(0, 8, 8).unwrap();
            assert_eq!(
                region.load_u16(0, std::sync::atomic::Ordering::Relaxed),
                0x101
            );
            page
        };
        let [a, b, c] = [map(0), map(0), map(PAGE as u64)]
            .map(|page| physical_address(page).expect("root reads physical addresses"));
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert!(a.is_multiple_of(PAGE as u64) && a != 0);
    }
}
