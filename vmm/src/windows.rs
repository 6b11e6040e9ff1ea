//! Windows: parts of a BAR that show other processes' memory, one memory slot each.
#![allow(unsafe_code)] // mmap of a peer's file, and memory slots over it

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr;
use std::sync::{Arc, Mutex};

use devices::host::{SharedRegion, Window};
use log::error;

use crate::layout::PAGE_SIZE;
use crate::slots::Slots;
use crate::sys::{context, invalid, lock, size_text};

/// A window over memory slots.
pub struct SlotWindow {
    slots: Arc<Slots>,
    size: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Guest physical address of the BAR.
    base: Option<u64>,
    /// By offset; they do not overlap.
    mappings: BTreeMap<u64, Mapping>,
}

struct Mapping {
    memory: Mapped,
    slot: u32,
    shown: bool,
}

impl SlotWindow {
    /// A window of `size` bytes, a power of two and at least a page, not placed, showing nothing.
    pub fn new(slots: Arc<Slots>, size: u64) -> io::Result<Self> {
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(invalid(format!(
                "a window of {size:#x} bytes: it must be a power of two, at least {PAGE_SIZE:#x}"
            )));
        }
        Ok(SlotWindow {
            slots,
            size,
            state: Mutex::default(),
        })
    }

    /// Makes the mapping reachable at `base`.
    fn show(&self, base: u64, offset: u64, mapping: &mut Mapping) -> io::Result<()> {
        let gpa = base
            .checked_add(offset)
            .ok_or_else(|| invalid("the window does not fit the address space"))?;
        // SAFETY: `mapping.memory` stays mapped until `hide` has taken the slot away (see `retire` for where that fails).
        unsafe {
            self.slots
                .show(mapping.slot, gpa, mapping.memory.hva(), mapping.memory.len)?
        };
        mapping.shown = true;
        Ok(())
    }

    fn hide(&self, mapping: &mut Mapping) -> io::Result<()> {
        if mapping.shown {
            self.slots.hide(mapping.slot)?;
            mapping.shown = false;
        }
        Ok(())
    }

    /// Ends a mapping. Where KVM does not give the slot back, the memory under it is replaced by nothing at all, and both are
    /// kept for ever: the guest cannot reach what was shown in either case.
    fn retire(&self, mut mapping: Mapping) {
        match self.hide(&mut mapping) {
            Ok(()) => {
                drop(mapping.memory);
                self.slots.release(mapping.slot);
            }
            Err(error) => {
                error!(
                    "a window's memory slot could not be taken away ({error}); its memory is withdrawn instead"
                );
                mapping.memory.withdraw();
            }
        }
    }
}

impl Window for SlotWindow {
    fn place(&self, gpa: Option<u64>) -> io::Result<()> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if state.base == gpa {
            return Ok(());
        }
        if let Some(base) = gpa {
            if !base.is_multiple_of(PAGE_SIZE) {
                return Err(invalid(format!(
                    "a window cannot lie at {base:#x}: it is not page aligned"
                )));
            }
            base.checked_add(self.size - 1).ok_or_else(|| {
                invalid(format!(
                    "a window of {:#x} bytes at {base:#x} passes the end of the address space",
                    self.size
                ))
            })?;
        }
        state.base = None;
        for mapping in state.mappings.values_mut() {
            self.hide(mapping)?;
        }
        let Some(base) = gpa else {
            return Ok(());
        };
        let mut result = Ok(());
        for (offset, mapping) in &mut state.mappings {
            result = self.show(base, *offset, mapping);
            if result.is_err() {
                break;
            }
        }
        if result.is_err() {
            for mapping in state.mappings.values_mut() {
                self.hide(mapping)?;
            }
        } else {
            state.base = Some(base);
        }
        result
    }

    fn map(&self, offset: u64, region: &SharedRegion) -> io::Result<()> {
        let len = region.len;
        if len == 0
            || !offset.is_multiple_of(PAGE_SIZE)
            || !len.is_multiple_of(PAGE_SIZE)
            || !region.file_offset.is_multiple_of(PAGE_SIZE)
        {
            return Err(invalid(format!(
                "a mapping of {len:#x} bytes at offset {offset:#x} from file offset {:#x}: all three must be multiples of the page size, and the length not zero",
                region.file_offset
            )));
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.size).ok_or_else(|| {
            invalid(format!("a mapping of {len:#x} bytes at offset {offset:#x} lies beyond the window of {}", size_text(self.size)))
        })?;
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some((at, before)) = state.mappings.range(..end).next_back()
            && at + before.memory.len > offset
        {
            return Err(invalid(format!(
                "a mapping of {len:#x} bytes at offset {offset:#x} overlaps the one of {:#x} bytes at {at:#x}",
                before.memory.len
            )));
        }
        let memory = Mapped::new(region)?;
        let mut mapping = Mapping {
            memory,
            slot: self.slots.allocate()?,
            shown: false,
        };
        if let Some(base) = state.base
            && let Err(error) = self.show(base, offset, &mut mapping)
        {
            self.slots.release(mapping.slot);
            return Err(error);
        }
        state.mappings.insert(offset, mapping);
        Ok(())
    }

    fn unmap(&self, offset: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        let mapping = state
            .mappings
            .remove(&offset)
            .ok_or_else(|| invalid(format!("nothing is mapped at offset {offset:#x}")))?;
        self.retire(mapping);
        Ok(())
    }

    fn clear(&self) {
        let mut state = lock(&self.state);
        while let Some((_, mapping)) = state.mappings.pop_first() {
            self.retire(mapping);
        }
    }
}

impl Drop for SlotWindow {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A mapping of a peer's memory in this process.
struct Mapped {
    address: *mut libc::c_void,
    len: u64,
    bytes: usize,
}

impl Mapped {
    /// Checks the file and maps the range of it.
    fn new(region: &SharedRegion) -> io::Result<Self> {
        check_file(&region.file, region.file_offset, region.len)?;
        let bytes = usize::try_from(region.len).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(region.file_offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses; nothing in this process is replaced. The
        // memory is never borrowed by Rust code: only the guest reaches it.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                region.file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EACCES) => context(
                    "the peer's memory cannot be mapped, its file must be open for reading and writing",
                    error,
                ),
                _ => context("the peer's memory cannot be mapped", error),
            });
        }
        Ok(Mapped {
            address,
            len: region.len,
            bytes,
        })
    }

    /// Puts inaccessible memory where the peer's was and keeps the addresses for ever. Where not even that can be had, the
    /// process ends: what a peer has taken back must not stay reachable.
    fn withdraw(self) {
        // SAFETY: it replaces exactly the mapping that `self` owns, which no Rust code refers to.
        let result = unsafe {
            libc::mmap(
                self.address,
                self.bytes,
                libc::PROT_NONE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if result == libc::MAP_FAILED {
            error!(
                "the peer's memory cannot be withdrawn: {}",
                io::Error::last_os_error()
            );
            std::process::abort();
        }
        std::mem::forget(self);
    }

    /// The address as KVM takes it.
    fn hva(&self) -> u64 {
        // usize has 64 bits wherever KVM has these interfaces.
        self.address.expose_provenance() as u64
    }
}

// SAFETY: the address is only handed to KVM and the kernel's mapping calls, which may be called from any thread.
unsafe impl Send for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `self` owns the mapping, no memory slot shows it any more, and no Rust code refers to it.
        if unsafe { libc::munmap(self.address, self.bytes) } != 0 {
            error!("munmap: {}", io::Error::last_os_error());
        }
    }
}

/// Whether a peer's file can be shown: memory of a size that its owner cannot take away any more.
fn check_file(file: &File, file_offset: u64, len: u64) -> io::Result<()> {
    let metadata = file
        .metadata()
        .map_err(|e| context("the peer's memory", e))?;
    if !metadata.file_type().is_file() {
        let kind = if metadata.file_type().is_char_device() {
            "a character device"
        } else {
            "no regular file"
        };
        return Err(invalid(format!(
            "the peer's memory must be a memfd, this is {kind}"
        )));
    }
    let end = file_offset
        .checked_add(len)
        .ok_or_else(|| invalid("the range of the peer's file overflows"))?;
    if end > metadata.size() {
        return Err(invalid(format!(
            "the peer's memory ends at {:#x} of its file and {len:#x} bytes from {file_offset:#x} were to be shown",
            metadata.size()
        )));
    }
    // SAFETY: a fcntl without pointers on a descriptor that `file` owns.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(invalid(
            "the peer's memory is not sealed against shrinking: it must be a memfd with F_SEAL_SHRINK (QEMU: -object memory-backend-memfd,seal=on,share=on)",
        ));
    }
    let page = metadata.blksize();
    if page > PAGE_SIZE
        && page.is_power_of_two()
        && is_hugetlb(file)
        && !(file_offset.is_multiple_of(page) && len.is_multiple_of(page))
    {
        return Err(invalid(format!(
            "the peer's memory is on huge pages of {}, and {len:#x} bytes from file offset {file_offset:#x} are no whole pages",
            size_text(page)
        )));
    }
    Ok(())
}

fn is_hugetlb(file: &File) -> bool {
    // SAFETY: all bit patterns are valid for the structure, and it is filled by the call below before use.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and of the right type; the descriptor is owned by `file`.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) };
    result == 0 && stat.f_type == libc::HUGETLBFS_MAGIC
}

#[cfg(test)]
mod tests;
