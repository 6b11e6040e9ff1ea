//! System calls that the standard library does not offer: mappings, `poll`, signals as a descriptor, control of a tap.
//!
//! Unsafe code: each of these is a C call.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::time::Duration;

use virtqueue::net::Offloads;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn mmap(len: usize, flags: c_int, fd: c_int, offset: u64) -> io::Result<NonNull<u8>> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: without MAP_FIXED a mapping replaces nothing; the kernel checks the rest.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, fd, offset) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Maps a part of a file to be read and written, for ever.
pub(crate) fn map_file(file: &impl AsRawFd, offset: u64, len: u64) -> io::Result<NonNull<u8>> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    mmap(len, libc::MAP_SHARED, file.as_raw_fd(), offset)
}

/// Zeroed memory that stays in place, for ever; `huge`: in pages of 2 MiB.
pub(crate) fn map_locked(len: usize, huge: bool) -> io::Result<NonNull<u8>> {
    let pages = if huge {
        libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
    } else {
        0
    };
    // Shared: a page of it never moves because a process forked.
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | pages;
    let base = mmap(len, flags, -1, 0)?;
    // SAFETY: the range was just mapped; locking changes nothing in it.
    check(unsafe { libc::mlock(base.as_ptr().cast(), len) })?;
    Ok(base)
}

/// Waits until one of the descriptors can be read (or has failed), or the time is over; `None` waits for ever. Says which can be.
pub(crate) fn poll<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    // The kernel passes over negative descriptors.
    let mut set = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    // Rounded up: a wait of less than a millisecond must not become a busy loop.
    let timeout = timeout.map_or(-1, |time| {
        c_int::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
    });
    // SAFETY: the pointer and the length describe `set`; the descriptors are borrowed for the call.
    let result = unsafe { libc::poll(set.as_mut_ptr(), N as libc::nfds_t, timeout) };
    match check(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok([false; N]),
        Ok(_) => Ok(set.map(|entry| entry.revents != 0)),
    }
}

/// A descriptor that can be read once SIGINT, SIGTERM or SIGHUP has come. They do nothing else in this thread and those that it starts.
pub(crate) fn stop_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset changes it; the numbers are valid.
    let set = unsafe {
        check(libc::sigemptyset(set.as_mut_ptr()))?;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            check(libc::sigaddset(set.as_mut_ptr(), signal))?;
        }
        set.assume_init()
    };
    // SAFETY: the set is initialised, and nobody wants the old one.
    let blocked =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let fd = check(unsafe {
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An empty request about the interface `name`; `None` for what cannot be a name.
fn request(name: &str) -> Option<libc::ifreq> {
    // SAFETY: a structure of integers, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let bytes = name.as_bytes();
    // The last byte stays zero. A percent sign would make the kernel choose a name.
    let usual = |byte: &u8| byte.is_ascii_graphic() && !b"/%:".contains(byte);
    if bytes.is_empty()
        || bytes.len() >= request.ifr_name.len()
        || [".", ".."].contains(&name)
        || !bytes.iter().all(usual)
    {
        return None;
    }
    for (to, &byte) in request.ifr_name.iter_mut().zip(bytes) {
        *to = byte.cast_signed();
    }
    Some(request)
}

/// Makes an open `/dev/net/tun` the interface `name`, whose packets have headers of `header` bytes; `several`: one of its queues.
pub(crate) fn make_tap(
    tun: &impl AsRawFd,
    name: &str,
    header: usize,
    several: bool,
) -> io::Result<()> {
    let mut request = request(name).ok_or(io::ErrorKind::InvalidInput)?;
    let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    let header = c_int::try_from(header).map_err(|_| io::ErrorKind::InvalidInput)?;
    let fd = tun.as_raw_fd();
    // SAFETY: the request and the integer outlive their calls, and are what these ioctls take.
    unsafe {
        check(libc::ioctl(fd, libc::TUNSETIFF, &raw mut request))?;
        check(libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header))?;
    }
    Ok(())
}

/// What a tap's packets may leave to who reads them.
pub(crate) fn set_offload(tap: &impl AsRawFd, offloads: Offloads) -> io::Result<()> {
    // linux/if_tun.h; the last two are since Linux 6.2.
    const CSUM: c_int = 0x01;
    const TSO4: c_int = 0x02;
    const TSO6: c_int = 0x04;
    const USO: c_int = 0x20 | 0x40;
    let bits = [
        (offloads.csum(), CSUM),
        (offloads.tso4(), TSO4),
        (offloads.tso6(), TSO6),
        (offloads.uso(), USO),
    ];
    let on = bits.iter().filter(|(on, _)| *on);
    let flags = on.fold(0, |all, (_, bit)| all | bit);
    // SAFETY: this ioctl takes an integer.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })?;
    Ok(())
}

/// Whether a tap's interface has a carrier.
pub(crate) fn set_carrier(tap: &impl AsRawFd, up: bool) -> io::Result<()> {
    let up = c_int::from(up);
    // SAFETY: the integer outlives the call, and is what this ioctl takes.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETCARRIER, &raw const up) })?;
    Ok(())
}

/// A socket for questions about interfaces.
pub(crate) fn question_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes integers and touches no memory.
    let fd =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The MTU of the interface `name`, in bytes behind the Ethernet header.
pub(crate) fn mtu(socket: &impl AsRawFd, name: &str) -> io::Result<usize> {
    let mut request = request(name).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the request outlives the call; the kernel fills the integer in.
    let mtu = unsafe {
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFMTU,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_mtu
    };
    usize::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
}
