//! A VM whose network device is a tap of the host. These need /dev/kvm, /dev/net/tun and root: each works in a network namespace of its own.
#![allow(unsafe_code)] // system calls that the standard library has no safe form of

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::told::Told;
use crate::common::{Running, run, tool};

const TAP: &str = "vptap0";
/// linux/if_packet.h; the libc crate does not have it.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

#[track_caller]
fn check(what: &str, result: i64) -> i32 {
    let error = io::Error::last_os_error();
    assert!(
        result >= 0,
        "{what} (is this root, with /dev/net/tun?): {error}"
    );
    i32::try_from(result).unwrap()
}

/// Runs a test on a thread that has a network namespace of its own, as have the processes that it starts.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // SAFETY: no pointers; it changes the namespace of this thread alone.
        check(
            "unshare",
            unsafe { libc::unshare(libc::CLONE_NEWNET) }.into(),
        );
        // Nobody but the guest and the test is to send anything.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn request() -> libc::ifreq {
    // SAFETY: integers, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// Makes a tap that stays, as `ip tuntap add` does, with a queue that holds all frames of a test.
fn make_tap() {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let tun = tun.unwrap_or_else(|error| panic!("/dev/net/tun: {error}"));
    let mut tap = request();
    tap.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    let mut queue = request();
    queue.ifr_ifru.ifru_metric = 100_000;
    // SAFETY: each call's argument is what its request takes: a valid `ifreq`, or a number.
    unsafe {
        let (fd, tap, queue) = (tun.as_raw_fd(), &raw mut tap, &raw mut queue);
        check(
            "TUNSETIFF",
            libc::ioctl(fd, libc::TUNSETIFF as _, tap).into(),
        );
        check(
            "TUNSETPERSIST",
            libc::ioctl(fd, libc::TUNSETPERSIST as _, 1).into(),
        );
        let socket = check(
            "socket",
            libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).into(),
        );
        let socket = OwnedFd::from_raw_fd(socket);
        let result = libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFTXQLEN as _, queue);
        check("SIOCSIFTXQLEN", result.into());
    }
}

/// The host's end of the tap: it sends back what the guest sent, addresses exchanged.
struct Echo(OwnedFd);

impl Echo {
    fn new() -> Self {
        let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        let name = CString::new(TAP).unwrap();
        // SAFETY: a name that ends, numbers, and structures with their sizes; the descriptor is new and nobody else's.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, protocol.into());
            let socket = OwnedFd::from_raw_fd(check("socket", fd.into()));
            let fd = socket.as_raw_fd();
            let set = |level, option, value: *const libc::c_void, len: usize| {
                let len = u32::try_from(len).unwrap();
                check(
                    "setsockopt",
                    libc::setsockopt(fd, level, option, value, len).into(),
                );
            };
            let room = 256i32 << 20;
            set(
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const room).cast(),
                4,
            );
            let yes = 1i32;
            set(
                libc::SOL_PACKET,
                PACKET_IGNORE_OUTGOING,
                (&raw const yes).cast(),
                4,
            );
            let wait = libc::timeval {
                tv_sec: 0,
                tv_usec: 50_000,
            };
            set(
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const wait).cast(),
                size_of_val(&wait),
            );
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            address.sll_protocol = protocol;
            address.sll_ifindex = i32::try_from(libc::if_nametoindex(name.as_ptr())).unwrap();
            assert_ne!(address.sll_ifindex, 0, "no {TAP}");
            let len = u32::try_from(size_of_val(&address)).unwrap();
            check(
                "bind",
                libc::bind(fd, (&raw const address).cast(), len).into(),
            );
            Self(socket)
        }
    }

    /// Until `done`; returns how many frames went back.
    fn serve(&self, done: &AtomicBool) -> u32 {
        let mut frame = [0u8; 2048];
        let mut count = 0;
        while !done.load(Ordering::Acquire) {
            let fd = self.0.as_raw_fd();
            // SAFETY: a valid buffer and its length.
            let got = unsafe { libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), 0) };
            // Nothing came, or the interface is not up yet.
            let Ok(got) = usize::try_from(got) else {
                continue;
            };
            let frame = &mut frame[..got];
            frame[..12].rotate_left(6);
            frame[26..34].rotate_left(4);
            // SAFETY: as above.
            let sent = unsafe { libc::send(fd, frame.as_ptr().cast(), frame.len(), 0) };
            check("send", sent.try_into().unwrap());
            count += 1;
        }
        count
    }
}

const FRAMES: u32 = 20_000;

fn vm(keys: &str, words: &str) -> Running {
    let device = format!("tap={TAP}{keys}");
    let cmdline = format!("work=both count={FRAMES} timeout_ms=20000 {words}");
    let run = ["run", "-vv", "--console", "output", "--net", &device];
    Running::start(tool(&[&run[..], &["--cmdline", &cmdline]].concat()))
}

/// All frames of a guest come back to it, whole and in order.
fn all_come_back(keys: &str, words: &str) {
    let (keys, words) = (keys.to_owned(), words.to_owned());
    in_a_namespace(move || {
        make_tap();
        let echo = Echo::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let echo = scope.spawn(|| echo.serve(&done));
            let ended = vm(&keys, &words).end();
            done.store(true, Ordering::Release);
            let whole = format!(
                "received {FRAMES} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
            );
            assert!(ended.stdout.contains(&whole), "{ended:?}");
            ended.expect_code(0);
            // The end frame, too.
            assert_eq!(echo.join().unwrap(), FRAMES + 1);
        });
    });
}

#[test]
fn frames_go_to_a_tap_and_back_over_split_rings() {
    all_come_back("", "");
    all_come_back(
        ",mrg-rxbuf=on,event-idx=on",
        "size=1514 rx_buffer=512 tx=indirect",
    );
    all_come_back(",event-idx=off,in-order=off", "mode=irq");
}

#[test]
fn frames_go_to_a_tap_and_back_over_packed_rings() {
    all_come_back(",packed=on", "");
    all_come_back(
        ",packed=on,size=100",
        "size=1514 rx_buffer=512 tx=chain mode=irq",
    );
}

/// What a confined thread of the VMM does on a reset, and what comes after it.
#[test]
fn a_driver_resets_its_rings_or_the_device_and_goes_on() {
    in_a_namespace(|| {
        make_tap();
        let echo = Echo::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| echo.serve(&done));
            let mut vm = Told::start("--net", &format!("tap={TAP}"), "");
            vm.next("ready");
            for (id, reset) in ["", "reset-rings", "reset-device", "reset-device"]
                .into_iter()
                .enumerate()
            {
                if !reset.is_empty() {
                    vm.send(reset);
                    vm.next("ready");
                }
                vm.send(&format!(
                    "run id={id} work=both count={FRAMES} timeout_ms=20000"
                ));
                let result = vm.next("result");
                assert_eq!(result["verified"], FRAMES, "{result}");
                for key in ["lost", "duplicated", "reordered", "corrupted", "timeout"] {
                    assert_eq!(result[key], 0, "{key}: {result}");
                }
            }
            done.store(true, Ordering::Release);
        });
    });
}

#[test]
fn the_kernel_serves_the_rings_where_it_can_and_says_so_where_not() {
    if Path::new("/dev/vhost-net").exists() {
        all_come_back(",vhost=kernel", "");
        return;
    }
    in_a_namespace(|| {
        make_tap();
        let device = format!("tap={TAP},vhost=kernel");
        let ended = run(&["run", "--console", "output", "--net", &device]);
        ended.expect_code(1);
        ended.expect_one_line(&[TAP, "/dev/vhost-net", "modprobe vhost_net"]);
    });
}

#[test]
fn a_tap_that_another_has_is_busy_and_one_that_the_vm_made_goes_with_it() {
    in_a_namespace(|| {
        let device = format!("tap={TAP}");
        let words = "work=sink timeout_ms=30000";
        let args = [
            "run",
            "--console",
            "output",
            "--net",
            &device,
            "--cmdline",
            words,
        ];
        let mut first = Running::start(tool(&args));
        first.wait_for("the guest", |vm| vm.stdout().contains("guest: "));
        let there = || {
            let name = CString::new(TAP).unwrap();
            // SAFETY: a name that ends.
            unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
        };
        assert!(there());
        let second = run(&["run", "--console", "output", "--net", &device]);
        second.expect_code(1);
        second.expect_one_line(&[TAP, "busy"]);
        first.signal("TERM");
        first.end();
        assert!(!there());
    });
}
