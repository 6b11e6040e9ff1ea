//! A tap interface of the host, as the VMM holds it.
//!
//! Unsafe code: ioctl(2), read(2) and write(2) on the descriptor of a tap, which the standard library has no safe form of.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;
use virtqueue::net::{F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, HEADER_LEN};

/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// Offloads of TUNSETOFFLOAD (linux/if_tun.h).
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;

/// Why there is no tap.
#[derive(Debug, Error)]
pub enum Error {
    /// No interface can have that name.
    #[error("{0:?} is no name of an interface: 1 to 15 bytes without spaces, '/', ':' and '%'")]
    Name(String),
    /// The host has no taps.
    #[error("there is no {TUN}: load the tun module (modprobe tun)")]
    NoTun,
    /// The host does not let this process use taps.
    #[error("cannot open {TUN}: {0}")]
    Open(#[source] io::Error),
    /// The tap is there and not this user's, or is not there and this user may make none.
    #[error(
        "no permission to use or make the tap: run with CAP_NET_ADMIN, or have it made for you (ip tuntap add dev NAME mode tap user USER)"
    )]
    Permission,
    /// Another process has it.
    #[error("the tap is busy: another process has it open")]
    Busy,
    /// It is something else.
    #[error("an interface of that name is there and is no tap with a single queue")]
    NotATap,
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, #[source] io::Error),
}

/// Whether an interface can be called that; a '%' would have the kernel choose a number.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let bytes = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    (1..libc::IFNAMSIZ).contains(&name.len())
        && name.bytes().all(bytes)
        && name != "."
        && name != ".."
}

/// An open tap, which never blocks: every read and write is one frame behind a virtio-net header of [`HEADER_LEN`] bytes.
#[derive(Debug)]
pub(super) struct Port {
    file: File,
    /// It is a tap, and not what stands in for one in a test.
    offloads: bool,
}

/// An interface request (netdevice(7)) with this name and nothing else. The name was checked.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: a structure of integers and a union of such, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// An ioctl whose argument is an interface request.
fn ioctl(fd: RawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the requests this is called with read and write no more than one `ifreq`, which is valid for both.
    let result = unsafe { libc::ioctl(fd, number as _, std::ptr::from_mut(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Port {
    /// Opens the tap of that name, or makes it: then it is gone with the last descriptor. Sets it up where that is allowed.
    pub(super) fn open(name: &str) -> Result<Self, Error> {
        if !is_interface_name(name) {
            return Err(Error::Name(name.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NoTun,
                _ => Error::Open(error),
            })?;
        let mut wanted = request(name);
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // Three of sixteen bits.
        wanted.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
        ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut wanted).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EPERM) => Error::Permission,
                Some(libc::EBUSY) => Error::Busy,
                Some(libc::EINVAL) => Error::NotATap,
                _ => Error::System("TUNSETIFF", error),
            }
        })?;
        let port = Self {
            file,
            offloads: true,
        };
        let size = libc::c_int::try_from(HEADER_LEN).unwrap_or_default();
        // SAFETY: TUNSETVNETHDRSZ reads one int, which is valid.
        if unsafe {
            libc::ioctl(
                port.as_raw_fd(),
                libc::TUNSETVNETHDRSZ as _,
                &raw const size,
            )
        } < 0
        {
            return Err(Error::System("TUNSETVNETHDRSZ", io::Error::last_os_error()));
        }
        port.set_offloads(0)
            .map_err(|error| Error::System("TUNSETOFFLOAD", error))?;
        if let Err(error) = set_up(name) {
            log::warn!("tap {name}: cannot set it up ({error}): ip link set {name} up");
        }
        Ok(port)
    }

    /// Any descriptor that carries one frame a read and a write.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn stand_in(fd: OwnedFd) -> Self {
        Self {
            file: fd.into(),
            offloads: false,
        }
    }

    /// Lets the host hand over what a driver with these features takes: partial checksums, and segments as one frame.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let on = |bit: u64, flag| if features & bit == 0 { 0 } else { flag };
        let flags = on(F_GUEST_CSUM, TUN_F_CSUM)
            | on(F_GUEST_TSO4, TUN_F_TSO4)
            | on(F_GUEST_TSO6, TUN_F_TSO6);
        if !self.offloads {
            return Ok(());
        }
        let flags = libc::c_ulong::from(flags);
        // SAFETY: TUNSETOFFLOAD takes a number.
        if unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD as _, flags) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The next frame with its header; what does not fit is cut off.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Sends a frame with its header.
    pub(super) fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }

    /// The descriptor, for the kernel's back-end.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

impl AsRawFd for Port {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Sets an interface up, where it is not yet.
fn set_up(name: &str) -> io::Result<()> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut flags = request(name);
    ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut flags)?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union; it is an integer anyway.
    let now = unsafe { flags.ifr_ifru.ifru_flags };
    let up = i16::try_from(libc::IFF_UP).unwrap_or_default();
    if now & up != 0 {
        return Ok(());
    }
    flags.ifr_ifru.ifru_flags = now | up;
    ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_before_the_host_is_asked() {
        for name in [
            "",
            "sixteen-letters-",
            "a/b",
            "a:1",
            "tap%d",
            "a b",
            ".",
            "..",
            "täp",
        ] {
            assert!(!is_interface_name(name), "{name:?}");
            assert!(matches!(Port::open(name), Err(Error::Name(_))), "{name:?}");
        }
        assert!(is_interface_name("fifteen-letters"));
    }
}
