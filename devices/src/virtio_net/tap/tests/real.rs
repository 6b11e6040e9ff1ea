//! The device over a tap of this host: its network stack leaves checksums to the guest, and takes the guest's. Needs root and /dev/net/tun.
#![allow(unsafe_code)] // unshare(2) and ioctl(2) have no safe form

use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use virtqueue::net::{HDR_F_NEEDS_CSUM, Header};

use super::*;

const NAME: &str = "vpunit0";
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 255);
const PORT: u16 = 4789;
/// Where parts of a frame are: Ethernet, IPv4, UDP.
const IP: usize = 14;
const UDP: usize = 34;
const PAYLOAD: usize = 42;
const CHECKSUM: usize = 6;

/// The tap, with an address.
fn tap() -> Port {
    // SAFETY: no pointers; it changes the network namespace of this thread alone.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "not root? {}", io::Error::last_os_error());
    let port = Port::open(NAME).unwrap();
    // SAFETY: integers, for which zeroes are valid.
    let (mut request, mut address): (libc::ifreq, libc::sockaddr_in) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    address.sin_family = u16::try_from(libc::AF_INET).unwrap();
    address.sin_addr.s_addr = u32::from(HOST).to_be();
    // SAFETY: both are 16 bytes of integers.
    request.ifr_ifru.ifru_addr =
        unsafe { mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: the request's argument is a valid `ifreq`.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFADDR as _,
            &raw const request,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    port
}

/// The sum of 16-bit words, carries added in (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// The sum over what UDP's checksum covers beside the datagram.
fn pseudo_header(source: Ipv4Addr, target: Ipv4Addr, len: usize) -> u32 {
    let addresses = [source.octets(), target.octets()].concat();
    u32::from(sum(&addresses, 17 + u32::try_from(len).unwrap()))
}

/// A datagram of the guest to everybody, with the checksum not computed: the pseudo header's sum is in its place.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 1, 2, 3, 8, 0]);
    frame.extend([0x45, 0]);
    frame.extend(u16::try_from(20 + udp_len).unwrap().to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(GUEST.octets());
    frame.extend(EVERYBODY.octets());
    let checksum = !sum(&frame[IP..], 0);
    frame[IP + 10..IP + 12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend(u16::try_from(udp_len).unwrap().to_be_bytes());
    let pseudo = sum(&[], pseudo_header(GUEST, EVERYBODY, udp_len));
    frame.extend(pseudo.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Turns the device until something is there.
fn wait<T>(world: &mut World, mut what: impl FnMut(&mut World) -> Option<T>) -> T {
    for _ in 0..3000 {
        world.manager.run_with_timeout(10).unwrap();
        if let Some(there) = what(world) {
            return there;
        }
    }
    panic!("it never comes");
}

fn checksums_are_left_to_the_other_side() {
    let (peer, _) = UnixDatagram::pair().unwrap();
    let mut world = World::with_port(RingFeatures::default(), u64::MAX, tap(), peer);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();

    // To the guest. The host may have other things to say.
    for _ in 0..64 {
        world.offer(2048);
    }
    let sent = frame(999);
    socket.send_to(&sent, (EVERYBODY, PORT)).unwrap();
    let (header, got) = wait(&mut world, |world| {
        world
            .received()
            .filter(|(_, got)| got.get(PAYLOAD..) == Some(&sent[..]))
    });
    assert_eq!(header.flags & HDR_F_NEEDS_CSUM, HDR_F_NEEDS_CSUM);
    assert_eq!(usize::from(header.csum_start), UDP);
    assert_eq!(usize::from(header.csum_offset), CHECKSUM);
    let pseudo = pseudo_header(HOST, EVERYBODY, got.len() - UDP);
    let there = u16::from_be_bytes([got[UDP + CHECKSUM], got[UDP + CHECKSUM + 1]]);
    assert_eq!(there, sum(&[], pseudo));
    // Loopback of what was sent to everybody.
    let mut buffer = [0; 2048];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((len, from.ip()), (sent.len(), HOST.into()));

    // From the guest: first one that claims to be complete and is wrong, which the host throws away.
    world.send(Header::default(), &datagram(b"wrong"));
    let partial = Header {
        flags: HDR_F_NEEDS_CSUM,
        csum_start: u16::try_from(UDP).unwrap(),
        csum_offset: u16::try_from(CHECKSUM).unwrap(),
        ..Header::default()
    };
    world.send(partial, &datagram(b"right"));
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from.ip()), (&b"right"[..], GUEST.into()));
    assert_eq!(world.net.stats().sent_dropped, 0);
}

#[test]
fn host_and_guest_leave_checksums_to_each_other() {
    // A thread of its own, for the namespace.
    let thread = thread::spawn(checksums_are_left_to_the_other_side);
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
