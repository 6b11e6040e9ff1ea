//! Two things about descriptors that the standard library leaves to the caller.
//!
//! Unsafe code: a C call, and a raw descriptor whose owner is known.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Makes reads and writes of an open file return at once, whoever shares it.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes no pointers, and the descriptor is open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; it sets flags of the open file only.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The descriptor that `of` says is `owner`'s, lent for as long as the owner is.
pub fn lend<'a, T>(owner: &'a T, of: impl FnOnce(&'a T) -> RawFd) -> BorrowedFd<'a> {
    let fd = of(owner);
    // SAFETY: it is open as long as the owner is borrowed: those that are asked (connections and listeners) close theirs when they are dropped.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
