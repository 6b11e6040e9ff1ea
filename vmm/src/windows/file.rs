//! Whether a peer's file can be shown: memory of a size that its owner cannot take away any more.
#![allow(unsafe_code)] // F_GET_SEALS and fstatfs

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::{Arc, Weak};

use crate::layout::PAGE_SIZE;
use crate::sys::{context, invalid, size_text};

/// How many files are remembered. A memory table has as many at most as vhost-user has slots in one message; one is usual.
const REMEMBERED: usize = 16;

/// What was found out about a file.
struct Verdict {
    /// It keeps the `Arc`'s address from being used again, though not the file.
    file: Weak<File>,
    /// It is sealed: it can only grow.
    size: u64,
    page: u64,
}

/// The files that were found good, so that a map costs no system calls for what cannot have changed.
#[derive(Default)]
pub(super) struct Verdicts(VecDeque<Verdict>);

impl Verdicts {
    /// The page size of the file, where the range can be shown.
    pub(super) fn check(
        &mut self,
        file: &Arc<File>,
        file_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let end = file_offset
            .checked_add(len)
            .ok_or_else(|| invalid("the range of the peer's file overflows"))?;
        let known = self
            .0
            .iter()
            .position(|v| std::ptr::eq(v.file.as_ptr(), Arc::as_ptr(file)));
        let (size, page) = match known
            .and_then(|at| self.0.get(at))
            .filter(|v| end <= v.size)
        {
            Some(verdict) => (verdict.size, verdict.page),
            None => {
                let (size, page) = examine(file)?;
                if let Some(at) = known {
                    self.0.remove(at);
                }
                self.0.truncate(REMEMBERED - 1);
                self.0.push_front(Verdict {
                    file: Arc::downgrade(file),
                    size,
                    page,
                });
                (size, page)
            }
        };
        if end > size {
            return Err(invalid(format!(
                "the peer's memory ends at {size:#x} of its file and {len:#x} bytes from {file_offset:#x} were to be shown"
            )));
        }
        if !file_offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(invalid(format!(
                "the peer's memory is on huge pages of {}, and {len:#x} bytes from file offset {file_offset:#x} are no whole pages",
                size_text(page)
            )));
        }
        Ok(page)
    }
}

/// Size and page size.
fn examine(file: &File) -> io::Result<(u64, u64)> {
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
    // SAFETY: a fcntl without pointers on a descriptor that `file` owns.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(invalid(
            "the peer's memory is not sealed against shrinking: it must be a memfd with F_SEAL_SHRINK (QEMU: -object memory-backend-memfd,seal=on,share=on)",
        ));
    }
    let block = metadata.blksize();
    let huge = block > PAGE_SIZE && block.is_power_of_two() && is_hugetlb(file);
    Ok((metadata.size(), if huge { block } else { PAGE_SIZE }))
}

fn is_hugetlb(file: &File) -> bool {
    // SAFETY: all bit patterns are valid for the structure, and it is filled by the call below before use.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and of the right type; the descriptor is owned by `file`.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) };
    result == 0 && stat.f_type == libc::HUGETLBFS_MAGIC
}
