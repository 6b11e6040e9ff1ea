//! A real tap, in a network namespace of the test's own.
#![allow(unsafe_code)] // a namespace, and a packet socket

use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// An Ethernet type for experiments (IEEE 802).
const KIND: u16 = 0x88b5;

/// Gives this thread a network of its own, which goes away with it.
fn own_network() {
    // SAFETY: takes flags and touches no memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        result,
        0,
        "this test needs root, for a network namespace: {}",
        io::Error::last_os_error()
    );
}

fn open(name: &str) -> Tap {
    Tap::open(name).expect("this test needs root and /dev/net/tun")
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("this test needs 'ip' (package iproute2)");
    assert!(status.success(), "ip {arguments}");
}

/// A packet socket: what a program on this machine sees of the interface.
fn packet_socket(name: &str) -> File {
    let kind = KIND.to_be();
    // SAFETY: socket takes integers; the descriptor is new and owned by nobody else.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK,
            kind.into(),
        );
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the string ends with a zero; all zeroes is a valid address, which outlives the call.
    let bound = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = kind;
        address.sll_ifindex = i32::try_from(libc::if_nametoindex(name.as_ptr())).unwrap();
        let len = u32::try_from(size_of_val(&address)).unwrap();
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len)
    };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    socket
}

fn frame(number: u8, len: usize) -> Vec<u8> {
    let kind = KIND.to_be_bytes();
    let mut frame = [&[0xff; 12][..], &kind].concat();
    frame.resize(len, number);
    frame
}

/// What `attempt` finds within half a minute.
fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < end, "nothing came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn frames_pass_a_real_tap_both_ways_with_empty_headers() {
    own_network();
    let mut tap = open("vpci-t0");
    ip("link set vpci-t0 up");
    tap.set_carrier(true);
    let mut program = packet_socket("vpci-t0");
    for number in 0..50 {
        let out = frame(number, 60 + 29 * usize::from(number));
        tap.write(&crate::testing::packet(&out)).unwrap();
        let mut bytes = [0; 2048];
        let len = soon(|| program.read(&mut bytes).ok());
        assert_eq!(&bytes[..len], out);

        soon(|| program.write(&out).ok());
        let mut packet = [0xaa; 2048];
        let len = soon(|| {
            // The kernel's own neighbour discovery comes this way too.
            let len = tap.read(&mut packet).unwrap()?;
            (packet[24..26] == KIND.to_be_bytes()).then_some(len)
        });
        assert_eq!(&packet[..len], crate::testing::packet(&out));
    }
}

#[test]
fn the_mtu_and_the_carrier_are_those_of_the_interface() {
    own_network();
    let mut tap = open("vpci-t1");
    assert_eq!(tap.mtu(), Some(1500));
    ip("link set vpci-t1 mtu 900 up");
    assert_eq!(tap.mtu(), Some(900));
    let show = || {
        let output = Command::new("ip")
            .args(["link", "show", "vpci-t1"])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert!(show().contains("NO-CARRIER"), "no peer at first");
    tap.set_carrier(true);
    soon(|| (!show().contains("NO-CARRIER")).then_some(()));
    tap.set_carrier(false);
    soon(|| show().contains("NO-CARRIER").then_some(()));
    drop(tap);
    soon(|| show().is_empty().then_some(()));
}

#[test]
fn what_is_wrong_with_an_interface_is_said() {
    own_network();
    let _taken = open("vpci-t2");
    let text = |name: &str| Tap::open(name).unwrap_err().to_string();
    assert!(text("vpci-t2").contains("another program has it"));
    assert!(text("lo").contains("no tap with one queue"));
    for name in ["", "a b", "x/y", "tap%d", "sixteen-letters-"] {
        assert!(
            text(name).contains("a name has 1 to 15 characters"),
            "{name}"
        );
    }
}
