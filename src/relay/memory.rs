//! A front-end's memory, mapped by guest physical address.
//!
//! Unsafe code: the mappings, and the promise that rings are made of. A [`Table`] keeps what it shows mapped for as long as any copy of it is there.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::Arc;

use devices::vhost_user::MemoryRegion;
use virtqueue::Memory;
use virtqueue::linear::{Linear, LinearRegion};

const PAGE: u64 = 4096;
/// The first guest physical address that no region may reach.
const MAX_ADDRESS: u64 = 1 << 40;
/// What the start of a table is aligned to: the largest page there is, so that guest physical and own addresses agree in every page size.
const ALIGN: u64 = 1 << 30;

/// Address space that holds the regions, given back when the last copy of the table is gone.
#[derive(Debug)]
struct Reservation {
    start: *mut libc::c_void,
    len: usize,
    /// First address and end of each stretch that is mapped, ascending; neighbours are one.
    extents: Vec<(u64, u64)>,
}

// SAFETY: it holds an address range that belongs to it alone, and its own list; nothing of it is tied to a thread.
unsafe impl Send for Reservation {}
// SAFETY: as for `Send`; nothing changes behind a shared reference.
unsafe impl Sync for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Table::map` and is unmapped once. Whoever has a `Linear` of it has the `Arc`, too.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// A memory table that is mapped: what rings and buffers of the front-end are reached through.
#[derive(Clone, Debug)]
pub struct Table {
    linear: Linear,
    reservation: Arc<Reservation>,
}

impl Table {
    /// Maps the regions. An error names the region by its place, and nothing stays mapped.
    pub fn map(regions: Vec<(MemoryRegion, OwnedFd)>) -> Result<Self, (usize, io::Error)> {
        let mut extents = Vec::new();
        let mut checked = Vec::new();
        for (at, (region, fd)) in regions.into_iter().enumerate() {
            let file = File::from(fd);
            let end = check(&region, &file).map_err(|error| (at, error))?;
            extents.push((region.guest_address, end));
            checked.push((region, file));
        }
        let overlaps = |&(start, end): &(u64, u64)| {
            let same = extents.iter().filter(|&&(s, e)| s < end && start < e);
            same.count() > 1
        };
        if let Some(at) = extents.iter().position(overlaps) {
            return Err((at, invalid("it overlaps another region")));
        }
        let span = extents.iter().map(|&(_, end)| end).max().unwrap_or(0);
        let mut table = Self::reserve(span, merged(extents)).map_err(|error| (0, error))?;
        for (at, (region, file)) in checked.iter().enumerate() {
            table.show(region, file).map_err(|error| (at, error))?;
        }
        Ok(table)
    }

    fn reserve(span: u64, extents: Vec<(u64, u64)>) -> io::Result<Self> {
        let len = usize::try_from(span + ALIGN).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses; it replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let align = usize::try_from(ALIGN).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let base = start.wrapping_byte_add(start.addr().wrapping_neg() % align);
        // SAFETY: the range stays mapped as long as the reservation, which each copy of the table keeps and which only `Table` copies the `Linear` out
        // of. What lies between the regions cannot be accessed and is not: every address that is used went through `contains` or `region` below first.
        // No reference to any of it exists.
        let linear = unsafe { Linear::new(base.cast(), 0, span) };
        Ok(Self {
            linear,
            reservation: Arc::new(Reservation {
                start,
                len,
                extents,
            }),
        })
    }

    /// Maps a region that was checked.
    fn show(&mut self, region: &MemoryRegion, file: &File) -> io::Result<()> {
        let len = usize::try_from(region.size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let offset = libc::off_t::try_from(region.mmap_offset).map_err(io::Error::other)?;
        let to = self
            .linear
            .ptr(region.guest_address, len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in the reservation, which is ours and holds nothing else there (regions do not overlap). The file is sealed, so no
        // access can find it shorter.
        let result = unsafe {
            libc::mmap(
                to.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Where a range that the rings have checked is mapped.
    #[inline]
    pub fn ptr(&self, addr: u64, len: usize) -> Option<*mut u8> {
        self.linear.ptr(addr, len)
    }
}

impl Memory for Table {
    type Region = LinearRegion;

    #[inline]
    fn region(&self, addr: u64, len: usize, align: usize) -> Option<LinearRegion> {
        let inside = self.contains(addr, u32::try_from(len).ok()?);
        inside.then(|| self.linear.region(addr, len, align))?
    }

    #[inline]
    fn contains(&self, addr: u64, len: u32) -> bool {
        let Some(end) = addr.checked_add(len.into()) else {
            return false;
        };
        let extents = &self.reservation.extents;
        extents.iter().any(|&(s, e)| s <= addr && end <= e)
    }
}

/// Neighbours made one: a buffer may cross from one to the other.
fn merged(mut extents: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    extents.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(extents.len());
    for (start, end) in extents {
        match merged.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// The size of a file's pages. A mapping of huge pages is rounded up to whole ones, beyond what was asked for.
fn page_size(file: &File, block: u64) -> io::Result<u64> {
    // SAFETY: integers, for which zeroes are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `stat` is valid for a write.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let huge = stat.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if huge { block.max(PAGE) } else { PAGE })
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

/// Whether a region can be mapped and stays what it is; the end of its guest physical addresses.
fn check(region: &MemoryRegion, file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    // SAFETY: takes no pointers; the descriptor is open. It fails for what has no seals.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if !metadata.file_type().is_file() || seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(invalid(
            "its file is no memfd that is sealed against shrinking (F_SEAL_SHRINK; QEMU: memory-backend-memfd,share=on)",
        ));
    }
    let page = page_size(file, metadata.blksize())?;
    let whole = [region.guest_address, region.size, region.mmap_offset]
        .iter()
        .all(|number| number.is_multiple_of(page));
    if region.size == 0 || !whole {
        return Err(invalid(format!(
            "it is empty or not made of whole pages of {page} bytes"
        )));
    }
    if region
        .mmap_offset
        .checked_add(region.size)
        .is_none_or(|end| end > metadata.len())
    {
        return Err(invalid(format!(
            "it reaches beyond the end of its file at {:#x}",
            metadata.len()
        )));
    }
    region
        .guest_address
        .checked_add(region.size)
        .filter(|&end| end <= MAX_ADDRESS)
        .ok_or_else(|| invalid(format!("it reaches beyond {MAX_ADDRESS:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory_file;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering::Relaxed;
    use virtqueue::Region;

    fn region(guest_address: u64, size: u64, mmap_offset: u64) -> MemoryRegion {
        MemoryRegion {
            guest_address,
            size,
            user_address: 0,
            mmap_offset,
        }
    }

    fn map(file: &File, regions: &[MemoryRegion]) -> Result<Table, (usize, io::Error)> {
        let fds = regions
            .iter()
            .map(|&region| (region, file.try_clone().unwrap().into()));
        Table::map(fds.collect())
    }

    #[test]
    fn what_is_between_two_regions_cannot_be_reached_and_neighbours_are_one() {
        let file = memory_file(0x4000, true).unwrap();
        let table = map(
            &file,
            &[
                region(0x8000, 0x1000, 0x3000),
                region(0x1000, 0x1000, 0),
                region(0x2000, 0x1000, 0x1000),
            ],
        )
        .unwrap();
        for (addr, len, inside) in [
            (0x1000, 0x2000, true),
            (0x1ff8, 16, true),
            (0xff8, 16, false),
            (0x2ff8, 16, false),
            (0x3000, 8, false),
            (0x7ff8, 16, false),
            (0x8000, 0x1000, true),
            (0x8ff8, 16, false),
            (u64::MAX - 7, 16, false),
        ] {
            assert_eq!(table.contains(addr, len), inside, "{addr:#x}");
            let len = usize::try_from(len).unwrap();
            assert_eq!(table.region(addr, len, 8).is_some(), inside, "{addr:#x}");
        }
        let word = table.region(0x8010, 8, 8).unwrap();
        word.store_u64(0, 0x1122_3344_5566_7788, Relaxed);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0x3010).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 0x1122_3344_5566_7788);
    }

    #[test]
    fn a_file_that_could_shrink_and_a_region_that_does_not_fit_are_refused() {
        let sealed = memory_file(0x4000, true).unwrap();
        let error = |file: &File, regions: &[MemoryRegion], part: &str| {
            let (at, error) = map(file, regions).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            at
        };
        let open = memory_file(0x4000, false).unwrap();
        error(&open, &[region(0, 0x1000, 0)], "sealed");
        error(
            &File::open("/dev/zero").unwrap(),
            &[region(0, 0x1000, 0)],
            "sealed",
        );
        error(&sealed, &[region(0, 0, 0)], "whole pages");
        error(&sealed, &[region(0, 0x1000, 8)], "whole pages");
        error(&sealed, &[region(0x800, 0x1000, 0)], "whole pages");
        error(&sealed, &[region(0, 0x5000, 0)], "end of its file");
        let far = u64::MAX - 0xfff;
        error(&sealed, &[region(0, 0x1000, far)], "end of its file");
        error(&sealed, &[region(far, 0x1000, 0)], "beyond");
        error(&sealed, &[region(MAX_ADDRESS, 0x1000, 0)], "beyond");
        let good = region(0x1000, 0x2000, 0);
        error(&sealed, &[good, region(0x2000, 0x1000, 0x3000)], "overlaps");
        let at = error(&sealed, &[good, region(0x8000, 0x1001, 0)], "whole pages");
        assert_eq!(at, 1);
    }
}
