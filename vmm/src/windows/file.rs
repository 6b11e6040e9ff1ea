//! Whether a peer's file can be shown: memory, and of a size that its owner cannot take away any more, unless the user lets it.
#![allow(unsafe_code)] // F_GET_SEALS and fstatfs

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::{Arc, Weak};

use devices::host::Files;

use crate::layout::PAGE_SIZE;
use crate::sys::{context, invalid, size_text};

/// How many files are remembered. A memory table has as many at most as vhost-user has slots in one message; one is usual.
const REMEMBERED: usize = 16;

/// What was found out about a file.
#[derive(Clone, Copy)]
pub(super) struct Facts {
    /// In bytes.
    size: u64,
    /// The page size.
    pub(super) page: u64,
    /// It can only grow.
    pub(super) sealed: bool,
}

struct Verdict {
    /// It keeps the `Arc`'s address from being used again, though not the file.
    file: Weak<File>,
    facts: Facts,
}

/// The sealed files that were found good, so that a map costs no system calls for what cannot have changed.
#[derive(Default)]
pub(super) struct Verdicts(VecDeque<Verdict>);

impl Verdicts {
    /// What is known of the file, where it is one of `files` and the range can be shown.
    pub(super) fn check(
        &mut self,
        files: Files,
        file: &Arc<File>,
        file_offset: u64,
        len: u64,
    ) -> io::Result<Facts> {
        let end = file_offset
            .checked_add(len)
            .ok_or_else(|| invalid("the range of the peer's file overflows"))?;
        let known = self
            .0
            .iter()
            .position(|v| std::ptr::eq(v.file.as_ptr(), Arc::as_ptr(file)));
        let facts = match known
            .and_then(|at| self.0.get(at))
            .filter(|v| end <= v.facts.size.next_multiple_of(v.facts.page))
        {
            Some(verdict) => verdict.facts,
            None => {
                let facts = examine(file, files)?;
                if let Some(at) = known {
                    self.0.remove(at);
                }
                if facts.sealed {
                    self.0.truncate(REMEMBERED - 1);
                    self.0.push_front(Verdict {
                        file: Arc::downgrade(file),
                        facts,
                    });
                }
                facts
            }
        };
        let Facts { size, page, .. } = facts;
        // Behind the end of a file, its last page reads as zeros.
        if end > size.next_multiple_of(page) {
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
        Ok(facts)
    }
}

/// How much of `len` bytes from `file_offset` on the file still has, in whole pages.
pub(super) fn remaining(file: &File, file_offset: u64, len: u64, page: u64) -> io::Result<u64> {
    let end = file.metadata()?.size().next_multiple_of(page);
    Ok(end.saturating_sub(file_offset).min(len))
}

fn examine(file: &File, files: Files) -> io::Result<Facts> {
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
    let sealed = seals >= 0 && seals & libc::F_SEAL_SHRINK != 0;
    let kind = file_system(file);
    match files {
        _ if sealed => {}
        Files::Sealed => {
            return Err(invalid(
                "the peer's memory is not sealed against shrinking: it must be a memfd with F_SEAL_SHRINK (QEMU: -object memory-backend-memfd,seal=on,share=on), or --vhost-pci needs unsealed=on",
            ));
        }
        // Behind other files there may be a process that answers late or never.
        Files::Unsealed if kind == Some(libc::TMPFS_MAGIC) => {}
        Files::Unsealed if kind == Some(libc::HUGETLBFS_MAGIC) => {}
        Files::Unsealed => {
            return Err(invalid(
                "the peer's memory must be a memfd or a file of tmpfs or hugetlbfs",
            ));
        }
    }
    let block = metadata.blksize();
    let huge = block > PAGE_SIZE && block.is_power_of_two() && kind == Some(libc::HUGETLBFS_MAGIC);
    Ok(Facts {
        size: metadata.size(),
        page: if huge { block } else { PAGE_SIZE },
        sealed,
    })
}

/// The magic number of the file system that it is on.
fn file_system(file: &File) -> Option<libc::c_long> {
    // SAFETY: all bit patterns are valid for the structure, and it is filled by the call below before use.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and of the right type; the descriptor is owned by `file`.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) };
    (result == 0).then_some(stat.f_type)
}
