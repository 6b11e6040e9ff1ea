//! The signals that end a VM in good order, as a file descriptor.
#![allow(unsafe_code)] // signal masks and signalfd have no safe wrapper here

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use vmm_sys_util::signal::create_sigset;

use crate::sys::context;

/// Blocks the signals in the calling thread, and in those that it starts, until it is dropped.
pub(crate) struct Signals {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl Signals {
    const SET: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

    pub(crate) fn block() -> io::Result<Self> {
        let set = create_sigset(&Self::SET).map_err(|e| context("signal set", e.into()))?;
        // SAFETY: all bit patterns are valid for a signal set; the call below fills it.
        let mut before: libc::sigset_t = unsafe { mem::zeroed() };
        // SAFETY: both sets are initialised and of the right type.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before) };
        if result != 0 {
            return Err(context(
                "pthread_sigmask",
                io::Error::from_raw_os_error(result),
            ));
        }
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            // SAFETY: `before` was filled by the kernel.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
            return Err(context("signalfd", error));
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Signals { fd, before })
    }

    /// A signal that has arrived.
    pub(crate) fn take(&self) -> Option<i32> {
        // SAFETY: all bit patterns are valid for the structure.
        let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
        let size = size_of_val(&info);
        // SAFETY: the buffer is writable and `size` bytes long.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut info).cast(), size) };
        if usize::try_from(read).ok() != Some(size) {
            return None;
        }
        i32::try_from(info.ssi_signo).ok()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `before` was filled by the kernel when the signals were blocked.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
    }
}

/// Waits until one of the descriptors is readable (or closed at its other end).
pub(crate) fn wait_readable(fds: &[i32], timeout_ms: i32) -> io::Result<()> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(polled.len()).map_err(io::Error::other)?;
    loop {
        // SAFETY: the array has `count` entries.
        if unsafe { libc::poll(polled.as_mut_ptr(), count, timeout_ms) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(context("poll", error));
        }
    }
}

/// Waits until `fd` takes output; returns whether it does (or has failed, which the next write tells).
pub(crate) fn wait_writable(fd: i32, timeout_ms: i32) -> bool {
    let mut polled = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry, and the count says so.
    unsafe { libc::poll(&raw mut polled, 1, timeout_ms) > 0 }
}
