//! The host addresses behind a window, and the software path into a peer's file.
#![allow(unsafe_code)] // mmap over a reservation, process_vm_readv and process_vm_writev

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use devices::host::Permission;
use log::error;

use super::books::Piece;
use crate::sys::{context, invalid};

/// Where a window can have pages of 2 MiB or 1 GiB, its host address can too.
const ALIGNMENT: std::ops::RangeInclusive<u64> = 2 << 20..=1 << 30;

/// Host addresses for the whole of a window, most of them without memory. Only the guest reaches what is mapped here: no Rust code
/// ever borrows it.
pub(super) struct Area {
    /// What was reserved: the window and what aligns it.
    reserved: *mut libc::c_void,
    reserved_len: usize,
    /// The window's first byte.
    start: *mut libc::c_void,
    len: u64,
}

// SAFETY: the addresses are only handed to KVM and the kernel's mapping calls, which may be called from any thread.
unsafe impl Send for Area {}
// SAFETY: as above; two threads that change the same part see one after the other.
unsafe impl Sync for Area {}

fn usize_of(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}

impl Area {
    /// Reserves `len` bytes, a power of two. A reservation costs neither memory nor commit charge.
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let align = len.clamp(*ALIGNMENT.start(), *ALIGNMENT.end());
        let total = len
            .checked_add(align)
            .ok_or_else(|| invalid("a window of half the address space"))?;
        let reserved_len = usize_of(total)?;
        // SAFETY: a new mapping at an address that the kernel chooses; nothing in this process is replaced.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(context(
                "address space for a window",
                io::Error::last_os_error(),
            ));
        }
        let first = reserved.expose_provenance();
        let skip = first.next_multiple_of(usize_of(align)?) - first;
        Ok(Area {
            reserved,
            reserved_len,
            start: reserved.wrapping_byte_add(skip),
            len,
        })
    }

    /// The host address of `offset`, as KVM takes it.
    pub(super) fn hva(&self, offset: u64) -> u64 {
        // usize has 64 bits wherever KVM has these interfaces.
        self.start.expose_provenance() as u64 + offset
    }

    /// The address and length of a range, where it lies in the window.
    fn range(&self, offset: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid("a range beyond the window"));
        }
        Ok((
            self.start.wrapping_byte_add(usize_of(offset)?),
            usize_of(len)?,
        ))
    }

    /// Shows part of a file. KVM's MMU notifier sees to it that every vCPU takes the new page from the next access on.
    pub(super) fn map(
        &self,
        offset: u64,
        len: u64,
        file: &File,
        file_offset: u64,
        permission: Permission,
    ) -> io::Result<()> {
        let (address, bytes) = self.range(offset, len)?;
        let at = libc::off_t::try_from(file_offset).map_err(io::Error::other)?;
        let write = if permission.write {
            libc::PROT_WRITE
        } else {
            0
        };
        // SAFETY: the range lies in the reservation that `self` owns, which no Rust code refers to.
        let result = unsafe {
            libc::mmap(
                address,
                bytes,
                libc::PROT_READ | write,
                libc::MAP_FIXED | libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                at,
            )
        };
        if result != libc::MAP_FAILED {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(match error.raw_os_error() {
            Some(libc::EACCES) => context(
                "the peer's memory cannot be mapped, its file must be open for reading and writing",
                error,
            ),
            Some(libc::ENOMEM) => context(
                "the peer's memory cannot be mapped (the host's memory, or vm.max_map_count, is used up)",
                error,
            ),
            _ => context("the peer's memory cannot be mapped", error),
        })
    }

    /// Puts inaccessible memory where anything was. When it returns, no vCPU can reach what was there: before the kernel takes the old
    /// mapping down, it calls KVM's MMU notifier, which drops the pages from all of the guest's page tables and waits for every vCPU to have
    /// left them. The guest's other page tables stay.
    pub(super) fn blank(&self, offset: u64, len: u64) -> io::Result<()> {
        self.anonymous(offset, len, libc::PROT_NONE)
    }

    /// One private page of all-ones that can be read.
    pub(super) fn ones(&self, offset: u64, len: u64) -> io::Result<()> {
        let (address, bytes) = self.range(offset, len)?;
        self.anonymous(offset, len, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the range was mapped writable by the call above, and nothing else in this process refers to it.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0xFF, bytes) };
        // SAFETY: it changes the protection of exactly that range.
        if unsafe { libc::mprotect(address, bytes, libc::PROT_READ) } != 0 {
            let error = io::Error::last_os_error();
            self.blank(offset, len)?;
            return Err(error);
        }
        Ok(())
    }

    fn anonymous(&self, offset: u64, len: u64, protection: libc::c_int) -> io::Result<()> {
        let (address, bytes) = self.range(offset, len)?;
        // SAFETY: the range lies in the reservation that `self` owns, which no Rust code refers to.
        let result = unsafe {
            libc::mmap(
                address,
                bytes,
                protection,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Area {
    /// The window has taken its memory slots away before.
    fn drop(&mut self) {
        // SAFETY: `self` owns the reservation, no memory slot shows it any more, and no Rust code refers to it.
        if unsafe { libc::munmap(self.reserved, self.reserved_len) } != 0 {
            error!("munmap: {}", io::Error::last_os_error());
        }
    }
}

/// Which way bytes go.
pub(super) enum Copy<'a> {
    /// Out of the file.
    Read(&'a mut [u8]),
    /// Into the file.
    Write(&'a [u8]),
}

/// Copies between a part of a peer's file and a buffer of the same length, through a mapping that lives as long as the call. The kernel does
/// the copying: where the host has no memory for the page, that is an error and not a signal.
pub(super) fn copy(piece: &Piece, copy: Copy) -> io::Result<()> {
    let start = piece.file_offset - piece.file_offset % piece.page;
    let end = (piece.file_offset + piece.len).next_multiple_of(piece.page);
    let bytes = usize_of(end - start)?;
    let protection = match copy {
        Copy::Read(_) => libc::PROT_READ,
        Copy::Write(_) => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: a new mapping at an address that the kernel chooses; nothing in this process is replaced.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            piece.file.as_raw_fd(),
            libc::off_t::try_from(start).map_err(io::Error::other)?,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let remote = libc::iovec {
        iov_base: address.wrapping_byte_add(usize_of(piece.file_offset - start)?),
        iov_len: usize_of(piece.len)?,
    };
    // SAFETY: a call without arguments.
    let pid = unsafe { libc::getpid() };
    let copied = match copy {
        Copy::Read(data) => {
            let local = libc::iovec {
                iov_base: data.as_mut_ptr().cast(),
                iov_len: data.len().min(remote.iov_len),
            };
            // SAFETY: the kernel writes to `data`, which is borrowed mutably, within its length; the other range is the new mapping.
            unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) }
        }
        Copy::Write(data) => {
            let local = libc::iovec {
                iov_base: data.as_ptr().cast_mut().cast(),
                iov_len: data.len().min(remote.iov_len),
            };
            // SAFETY: the kernel only reads `data`, within its length; the other range is the new mapping, shared memory that no Rust code
            // borrows.
            unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) }
        }
    };
    let result = match usize::try_from(copied) {
        Ok(n) if n == remote.iov_len => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    };
    // SAFETY: the mapping was made above and nothing refers to it any more.
    if unsafe { libc::munmap(address, bytes) } != 0 {
        error!("munmap: {}", io::Error::last_os_error());
    }
    result
}
