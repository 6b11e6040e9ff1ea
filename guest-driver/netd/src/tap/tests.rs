//! A real tap, in a network namespace of the test's own.
#![allow(unsafe_code)] // a namespace, and a packet socket

use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use guest_driver::Port;
use guest_driver::joined::{JoinConfig, Silent};

use super::*;
use crate::stats::Stats;
use crate::testing::{configs, join, receive, send};
use crate::work::{Bridge, Work};

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
    Tap::open(name, false).expect("this test needs root and /dev/net/tun")
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

/// Whether a frame is one of the test's: the kernel's neighbour discovery comes this way too, and so do the frames of [`warm_up`].
fn is_ours(frame: &[u8]) -> bool {
    frame[12..14] == KIND.to_be_bytes() && frame[14] != WARM
}

const WARM: u8 = 0xff;

/// Sends until something arrives: for a moment after the carrier is there, the kernel still throws away what it is given.
fn warm_up(program: &mut File, mut arrived: impl FnMut() -> bool) {
    soon(|| {
        let _ = program.write(&frame(WARM, 60));
        arrived().then_some(())
    });
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
    warm_up(&mut program, || tap.read(&mut [0; 2048]).unwrap().is_some());
    for number in 0..50 {
        let out = frame(number, 60 + 29 * usize::from(number));
        tap.write(&crate::testing::packet(&out)).unwrap();
        let mut bytes = [0; 2048];
        let len = soon(|| program.read(&mut bytes).ok());
        assert_eq!(&bytes[..len], out);

        soon(|| program.write(&out).ok());
        let mut packet = [0xaa; 2048];
        let len = soon(|| {
            let len = tap.read(&mut packet).unwrap()?;
            is_ours(&packet[HEADER_LEN..]).then_some(len)
        });
        assert_eq!(&packet[..len], crate::testing::packet(&out));
    }
}

#[test]
fn a_bridge_carries_frames_between_a_peer_and_a_real_tap_whatever_the_rings() {
    own_network();
    for (number, config) in configs().enumerate() {
        // A name of its own: a process that another test is starting may hold the last one's for a moment.
        let name = format!("vpci-t3-{number}");
        let tap = open(&name);
        ip(&format!("link set {name} up"));
        let mut program = packet_socket(&name);
        let (mut front, mut back) = join(&config, Silent, Silent);
        let mut stats = Stats::default();
        let mut bridge = Bridge::new(tap, None);
        bridge.link(true, &mut stats);
        warm_up(&mut program, || {
            bridge.turn(&mut back, &mut stats).unwrap();
            !receive(&mut front).is_empty()
        });
        for number in 0..100 {
            let sent = frame(number, 60 + 14 * usize::from(number));
            assert_eq!(send(&mut front, std::slice::from_ref(&sent)), 1);
            let mut bytes = [0; 2048];
            let len = soon(|| {
                bridge.turn(&mut back, &mut stats).unwrap();
                program.read(&mut bytes).ok()
            });
            assert_eq!(&bytes[..len], sent, "{config:?}");

            soon(|| program.write(&sent).ok());
            let got = soon(|| {
                bridge.turn(&mut back, &mut stats).unwrap();
                let mut frames = receive(&mut front).into_iter();
                frames.find(|frame| is_ours(frame))
            });
            assert_eq!(got, sent, "{config:?}");
        }
        assert_eq!(
            (stats.from_peer.frames, stats.dropped),
            (100, Default::default())
        );

        // The interface goes down: its frames are lost and counted, and the bridge goes on.
        ip(&format!("link set {name} down"));
        assert_eq!(send(&mut front, &[frame(1, 60)]), 1);
        while !front.drained().unwrap() {
            bridge.turn(&mut back, &mut stats).unwrap();
        }
        assert_eq!((stats.from_peer.frames, stats.dropped.refused), (100, 1));
    }
}

/// An echo request (RFC 792) from 10.77.0.2 to 10.77.0.1, in Ethernet and IPv4.
fn echo_request(to: [u8; 6], sequence: u16, payload: usize) -> Vec<u8> {
    let checksum = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        let sum: u64 = words.map(u64::from).sum();
        let fold = |sum: u64| (sum & 0xffff) + (sum >> 16);
        !u16::try_from(fold(fold(sum))).unwrap()
    };
    let mut icmp = vec![8, 0, 0, 0, 0x12, 0x34];
    icmp.extend(sequence.to_be_bytes());
    icmp.extend((0..payload).map(|at| at.to_le_bytes()[0]));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = u16::try_from(20 + icmp.len()).unwrap().to_be_bytes();
    let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 1, 0, 0];
    header.extend([10, 77, 0, 2, 10, 77, 0, 1]);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&to[..], &[2, 0, 0, 0, 0, 2], &[8, 0], &header, &icmp].concat()
}

#[test]
fn the_kernel_behind_the_tap_answers_the_peer() {
    own_network();
    let tap = open("vpci-t4");
    for arguments in [
        "link set vpci-t4 address 02:00:00:00:00:01 up",
        "addr add 10.77.0.1/24 dev vpci-t4",
        "neigh add 10.77.0.2 lladdr 02:00:00:00:00:02 dev vpci-t4",
    ] {
        ip(arguments);
    }
    let (mut front, mut back) = join(&JoinConfig::default(), Silent, Silent);
    let mut stats = Stats::default();
    let mut bridge = Bridge::new(tap, None);
    bridge.link(true, &mut stats);
    for (sequence, payload) in [(1, 56), (2, 1400), (3, 0)] {
        let request = echo_request([2, 0, 0, 0, 0, 1], sequence, payload);
        let reply = soon(|| {
            // Again and again: the interface's address takes a moment.
            send(&mut front, std::slice::from_ref(&request));
            bridge.turn(&mut back, &mut stats).unwrap();
            let mut frames = receive(&mut front).into_iter();
            frames.find(|frame| {
                frame.len() == request.len() && frame[23] == 1 && frame[40..42] == request[40..42]
            })
        });
        assert_eq!(reply[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        assert_eq!(reply[34], 0, "an echo reply");
        assert_eq!(reply[38..], request[38..]);
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
    let text = |name: &str| Tap::open(name, false).unwrap_err().to_string();
    assert!(text("vpci-t2").contains("another program has it"));
    assert!(text("lo").contains("no tap with one queue"));
    for name in ["", "a b", "x/y", "tap%d", "sixteen-letters-"] {
        assert!(
            text(name).contains("a name has 1 to 15 characters"),
            "{name}"
        );
    }
}
