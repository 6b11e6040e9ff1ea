//! The tap interface that the peer's frames end in.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use virtqueue::net::{
    F_GUEST_USO4, F_GUEST_USO6, F_HOST_USO, GUEST_OFFLOADS, HEADER_LEN, HOST_OFFLOADS, Offloads,
};

use crate::sys;

/// Something that carries packets: each a virtio-net header ([`HEADER_LEN`] bytes) and a frame.
pub trait Nic {
    /// Takes one packet; `None` where there is none now. Of a packet that is longer than `packet`, the end is cut off.
    fn read(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;
    /// Hands one packet over.
    fn write(&mut self, packet: &[u8]) -> io::Result<()>;
    /// The longest payload behind the Ethernet header that it takes now; `None` where it does not say.
    fn mtu(&self) -> Option<usize>;
    /// What it takes from a peer that leaves checksums and segmentation to it, and what it can leave to a peer, as feature bits.
    fn offloads(&self) -> u64;
    /// What it may leave to the peer from now on.
    fn set_offloads(&mut self, offloads: Offloads);
    /// Says whether there is somebody at the other end of the cable.
    fn set_carrier(&mut self, up: bool);
    /// What can be read when there is a packet.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No driver.
    #[error("/dev/net/tun: {0}; 'modprobe tun' (as root) makes it where it is missing")]
    Open(#[source] io::Error),
    /// The interface cannot be had.
    #[error("tap {name}: {error}{}", hint(error))]
    Interface {
        /// Its name.
        name: String,
        /// Why.
        error: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            " (needs CAP_NET_ADMIN, or an interface that 'ip tuntap add mode tap user …' made for you)"
        }
        Some(libc::EBUSY) => " (another program has it)",
        Some(libc::EINVAL) => {
            " (an interface of that name is there that is no tap with one queue (with --queues: with several) and packet headers: 'ip tuntap add NAME mode tap vnet_hdr' makes one (with --queues: 'multi_queue' behind it))"
        }
        None if error.kind() == io::ErrorKind::InvalidInput => {
            " (a name has 1 to 15 characters, no blank, slash, colon or percent sign)"
        }
        _ => "",
    }
}

/// A tap interface. One that was not there before goes away with this.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    questions: OwnedFd,
    /// What the kernel can do.
    offloads: u64,
}

impl Tap {
    /// Attaches to the interface `name`, or makes it; `several`: to one of its queues. Of several, the kernel answers a flow on the queue on which it comes.
    pub fn open(name: &str, several: bool) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(Error::Open)?;
        let interface = |error| Error::Interface {
            name: name.into(),
            error,
        };
        sys::make_tap(&file, name, HEADER_LEN, several).map_err(interface)?;
        let all = HOST_OFFLOADS | GUEST_OFFLOADS;
        // Kernels before 6.2 know nothing of UDP.
        let uso = sys::set_offload(&file, Offloads::of_device(all)).is_ok();
        sys::set_offload(&file, Offloads::default()).map_err(interface)?;
        let mut tap = Self {
            offloads: match uso {
                true => all,
                false => all & !(F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6),
            },
            file,
            name: name.into(),
            questions: sys::question_socket().map_err(interface)?,
        };
        tap.set_carrier(false);
        Ok(tap)
    }
}

impl Nic for Tap {
    fn read(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        read(&mut self.file, packet)
    }

    fn write(&mut self, packet: &[u8]) -> io::Result<()> {
        self.file.write(packet).map(|_| ())
    }

    fn mtu(&self) -> Option<usize> {
        sys::mtu(&self.questions, &self.name).ok()
    }

    fn offloads(&self) -> u64 {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) {
        // It took all of them before; without, its packets are whole.
        let _ = sys::set_offload(&self.file, offloads);
    }

    fn set_carrier(&mut self, up: bool) {
        // Kernels before 5.0 have no such call; the interface then looks as if the cable were always in.
        let _ = sys::set_carrier(&self.file, up);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Reads from what does not block.
pub(crate) fn read(from: &mut impl Read, packet: &mut [u8]) -> io::Result<Option<usize>> {
    match from.read(packet) {
        Ok(len) => Ok(Some(len.min(packet.len()))),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests;
