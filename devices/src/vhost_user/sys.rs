//! The system calls that no crate in use offers in the way that a hostile peer requires.
//!
//! Unsafe code is needed here because: the standard library neither receives file descriptors nor connects a Unix socket
//! without blocking on a full backlog, and the receive call of vmm-sys-util leaves descriptors open across `exec`.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::wire::MAX_FDS;

/// The longest path that fits a socket address with its terminating zero.
pub(super) const MAX_PATH: usize = 107;

/// AF_UNIX and the length of its addresses, in the types that `connect` wants; both fit.
#[allow(clippy::cast_possible_truncation)]
const FAMILY: libc::sa_family_t = libc::AF_UNIX as libc::sa_family_t;
#[allow(clippy::cast_possible_truncation)]
const ADDRESS_LEN: libc::socklen_t = mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;

/// Room for one control message with [`MAX_FDS`] descriptors: a 16-byte header and 4 bytes each, and no slack in which
/// the kernel could put another descriptor.
#[repr(C, align(8))]
struct Control([u8; 16 + 4 * MAX_FDS]);

/// What one `recvmsg` brought.
pub(super) struct Received {
    /// Bytes written to the buffer; 0 is the end of the stream.
    pub(super) len: usize,
    /// The descriptors, close-on-exec.
    pub(super) fds: Vec<OwnedFd>,
    /// There were more descriptors than fit; the kernel has closed those.
    pub(super) truncated: bool,
}

/// Receives bytes and descriptors from a stream socket. It never blocks, whatever the open file's flags say: a peer that has sent the socket may
/// still hold it, and could change them.
pub(super) fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = Control([0; 16 + 4 * MAX_FDS]);
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: msghdr is a plain C structure for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = mem::size_of::<Control>();
    // SAFETY: the header points to `iov` and `control`, which live until the end of this function; `iov` describes `buffer`, which
    // is borrowed exclusively.
    let len = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;

    let mut fds = Vec::new();
    // SAFETY: recvmsg succeeded, so the header describes the control messages that the kernel wrote into `control`.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !next.is_null() {
        // SAFETY: a non-null result of CMSG_FIRSTHDR or CMSG_NXTHDR points to a whole header in `control`, which is aligned to 8.
        let message = unsafe { &*next };
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: only computes where the payload of this message starts.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            // SAFETY: only computes a length.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = message.cmsg_len.saturating_sub(head) / mem::size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors at `data`, inside `control`.
                let fd = unsafe { data.add(index).read_unaligned() };
                // SAFETY: the kernel installed this descriptor for this message; nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: `next` points into the control buffer of `header`.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok(Received {
        len,
        fds,
        truncated: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Sends bytes, or as many of them as the socket takes. As [`receive`], it never blocks.
pub(super) fn send(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `bytes`, which is only read during the call.
    let len = unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Connects to the socket at `path` without blocking; `WouldBlock` where the listener's backlog is full. The stream is
/// non-blocking. The path must have at most [`MAX_PATH`] bytes.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: sockaddr_un is a plain C structure for which all zeroes is a valid value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = FAMILY;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    // SAFETY: takes no pointers.
    let fd = unsafe {
        libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is known to nobody else.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    // SAFETY: `address` is a whole sockaddr_un of ADDRESS_LEN bytes, only read during the call.
    let result = unsafe { libc::connect(fd, (&raw const address).cast(), ADDRESS_LEN) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stream)
}

/// Another descriptor of the same open file, close-on-exec.
pub(super) fn duplicate(source: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers; a descriptor that is not open is an error of the call.
    let fd = unsafe { libc::fcntl(source.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is known to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
