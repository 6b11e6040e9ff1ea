//! What a confined thread can and cannot do, tried in processes of their own.
#![allow(unsafe_code)] // fork, and system calls as an attacker would make them

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use libc::c_long;
use vmm_sys_util::tempdir::TempDir;

use super::*;

const ALL: [Thread; 7] = [
    Thread::Main,
    Thread::Devices,
    Thread::Metrics,
    Thread::Capture,
    Thread::Tap,
    Thread::Disk,
    Thread::Vcpu,
];

/// How a child process ended: by a signal, or by itself with a code.
#[derive(Debug, PartialEq)]
enum End {
    Signal(i32),
    Code(i32),
}

/// Forks a child that enters the filter, makes a system call and ends with code 7 where it is still there then.
fn attempt(mode: Seccomp, thread: Thread, number: c_long, args: [u64; 6]) -> End {
    // What allocates is done before: another thread may hold the allocator's lock when the process is copied.
    let program = mode.program(thread).unwrap();
    // SAFETY: the child makes system calls only, and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let entered = program.is_none_or(|program| seccompiler::apply_filter(&program).is_ok());
        // SAFETY: the calls of the tests touch no memory, or fail before they do; `_exit` runs nothing of the parent's.
        unsafe {
            if entered {
                let [a, b, c, d, e, f] = args;
                libc::syscall(number, a, b, c, d, e, f);
            }
            libc::syscall(libc::SYS_exit_group, if entered { 7 } else { 8 });
        }
    }
    let mut status = 0;
    // SAFETY: `status` can be written; the child is ours.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    match libc::WIFSIGNALED(status) {
        true => End::Signal(libc::WTERMSIG(status)),
        false => End::Code(libc::WEXITSTATUS(status)),
    }
}

fn arg(number: i32) -> u64 {
    u64::from(number.unsigned_abs())
}

/// What nobody may do, with arguments with which the call does no harm where it is carried out.
fn forbidden() -> Vec<(&'static str, c_long, [u64; 6])> {
    let parent = u64::from(std::os::unix::process::parent_id());
    let bad = u64::MAX;
    vec![
        ("execve", libc::SYS_execve, [0; 6]),
        ("open", libc::SYS_open, [0; 6]),
        ("openat", libc::SYS_openat, [bad, 0, 0, 0, 0, 0]),
        ("fork", libc::SYS_clone, [bad, 0, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [bad, 0, 0, 0, 0, 0]),
        ("prctl", libc::SYS_prctl, [bad, 0, 0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
        (
            "a signal to another process",
            libc::SYS_tgkill,
            [parent, parent, 0, 0, 0, 0],
        ),
        (
            "another process' memory",
            libc::SYS_process_vm_writev,
            [parent, 0, 0, 0, 0, 0],
        ),
        (
            "a TCP socket",
            libc::SYS_socket,
            [arg(libc::AF_INET), arg(libc::SOCK_STREAM), 0, 0, 0, 0],
        ),
        (
            "a netlink socket",
            libc::SYS_socket,
            [arg(libc::AF_NETLINK), arg(libc::SOCK_RAW), 0, 0, 0, 0],
        ),
        (
            "memory to run programs from",
            libc::SYS_mmap,
            [0, 4096, arg(libc::PROT_READ | libc::PROT_EXEC), 0, bad, 0],
        ),
        (
            "programs from memory that there is",
            libc::SYS_mprotect,
            [0, 0, arg(libc::PROT_EXEC), 0, 0, 0],
        ),
        // KVM_CREATE_VM, and TIOCSTI: input as if it had been typed.
        ("another VM", libc::SYS_ioctl, [bad, 0xAE01, 0, 0, 0, 0]),
        ("typing", libc::SYS_ioctl, [bad, 0x5412, 0, 0, 0, 0]),
        ("io_uring", libc::SYS_io_uring_setup, [0; 6]),
        ("bpf", libc::SYS_bpf, [bad, 0, 0, 0, 0, 0]),
        ("mount", libc::SYS_mount, [0; 6]),
        ("a namespace", libc::SYS_unshare, [0; 6]),
    ]
}

#[test]
fn a_forbidden_system_call_ends_the_process_with_sigsys_on_every_thread() {
    for thread in ALL {
        for (what, number, args) in forbidden() {
            let end = attempt(Seccomp::On, thread, number, args);
            assert_eq!(end, End::Signal(libc::SIGSYS), "{what} on {thread:?}");
        }
    }
}

#[test]
fn log_and_off_let_the_same_call_through() {
    for mode in [Seccomp::Log, Seccomp::Off] {
        for thread in ALL {
            let end = attempt(mode, thread, libc::SYS_getppid, [0; 6]);
            assert_eq!(end, End::Code(7), "{mode:?} on {thread:?}");
        }
    }
    let end = attempt(Seccomp::On, Thread::Main, libc::SYS_getppid, [0; 6]);
    assert_eq!(end, End::Signal(libc::SIGSYS));
}

#[test]
fn each_thread_may_do_its_own_work_and_not_that_of_the_others() {
    let own = u64::from(std::process::id());
    let unix = [arg(libc::AF_UNIX), arg(libc::SOCK_STREAM), 0, 0, 0, 0];
    let bad = u64::MAX;
    let cases = [
        (
            "run a guest",
            libc::SYS_ioctl,
            [bad, 0xAE80, 0, 0, 0, 0],
            vec![Thread::Vcpu],
        ),
        ("meet a peer", libc::SYS_socket, unix, vec![Thread::Devices]),
        (
            "set a terminal",
            libc::SYS_ioctl,
            [bad, 0x5402, 0, 0, 0, 0],
            ALL.to_vec(),
        ),
        (
            "renew what a device that is reset is notified with",
            libc::SYS_eventfd2,
            [0; 6],
            vec![Thread::Main, Thread::Devices, Thread::Tap, Thread::Vcpu],
        ),
        (
            "set a tap",
            libc::SYS_ioctl,
            [bad, 0x4004_54D0, 0, 0, 0, 0],
            vec![Thread::Tap],
        ),
        (
            "write a disk, or a page of a device's",
            libc::SYS_pwrite64,
            [bad, 0, 0, 0, 0, 0],
            vec![Thread::Disk, Thread::Devices],
        ),
        (
            "copy within the process",
            libc::SYS_process_vm_readv,
            [own, 0, 0, 0, 0, 0],
            vec![Thread::Vcpu],
        ),
        (
            "remove a socket",
            libc::SYS_unlink,
            [0; 6],
            vec![Thread::Main, Thread::Devices, Thread::Metrics, Thread::Vcpu],
        ),
        ("write", libc::SYS_write, [bad, 0, 0, 0, 0, 0], ALL.to_vec()),
    ];
    for (what, number, args, may) in cases {
        for thread in ALL {
            let expected = match may.contains(&thread) {
                true => End::Code(7),
                false => End::Signal(libc::SIGSYS),
            };
            let end = attempt(Seccomp::On, thread, number, args);
            assert_eq!(end, expected, "{what} on {thread:?}");
        }
    }
}

#[test]
fn an_abort_and_a_fault_are_told_from_a_forbidden_call() {
    type Act = unsafe extern "C" fn();
    unsafe extern "C" fn abort() {
        // SAFETY: it ends the process.
        unsafe { libc::abort() }
    }
    unsafe extern "C" fn fault() {
        // SAFETY: it ends the process, which is what is wanted; nothing is at that address.
        unsafe { std::ptr::null_mut::<u8>().wrapping_add(8).write_volatile(1) }
    }
    for (act, signal) in [(abort as Act, libc::SIGABRT), (fault, libc::SIGSEGV)] {
        for thread in ALL {
            // SAFETY: the child enters its filter, which is for its own process number, and dies of `act`. (glibc's allocator works in a copied process.)
            let child = unsafe { libc::fork() };
            if child == 0 {
                let _ = Seccomp::On.enter(thread);
                // SAFETY: it ends the process.
                unsafe { act() };
            }
            let mut status = 0;
            // SAFETY: `status` can be written; the child is ours.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(libc::WTERMSIG(status), signal, "{thread:?}");
        }
    }
}

/// Whether this kernel has Landlock, as its own file says where it has been asked for it.
fn has_landlock() -> bool {
    // SAFETY: with this flag the call takes no structure.
    (unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) }) > 0
}

#[test]
fn files_are_closed_but_for_the_removal_of_the_sockets_and_what_peers_send() {
    let (own, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let socket = own.as_path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let peer = other.as_path().join("peer");
    let _peer = UnixListener::bind(&peer).unwrap();
    let secret = other.as_path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    let memory = crate::testing::memfd(&[0; 2], false);
    let in_thread = (socket.clone(), peer.clone(), secret.clone());
    let confined = thread::spawn(move || {
        let (socket, peer, secret) = in_thread;
        Seccomp::On
            .close_files(std::slice::from_ref(&socket))
            .unwrap();
        if has_landlock() {
            let denied = |what: &str, result: io::Result<()>| {
                let kind = result.map_err(|e| e.kind());
                assert_eq!(kind, Err(ErrorKind::PermissionDenied), "{what}");
            };
            denied("read", File::open(&secret).map(drop));
            denied("write", File::options().write(true).open(&secret).map(drop));
            denied("make", File::create(socket.with_file_name("new")).map(drop));
            denied("remove", std::fs::remove_file(&secret));
            denied(
                "rename",
                std::fs::rename(&socket, socket.with_file_name("t")),
            );
            denied("list", std::fs::read_dir("/").map(drop));
            denied(
                "bind",
                UnixListener::bind(socket.with_file_name("b")).map(drop),
            );
            denied(
                "run",
                std::process::Command::new("/bin/true").spawn().map(drop),
            );
        }
        // A peer is found again, what it sends can be used, and the socket goes at the end.
        UnixStream::connect(&peer)
            .unwrap()
            .write_all(b"hello")
            .unwrap();
        memory.set_len(4096).unwrap();
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
    });
    confined.join().unwrap();
    assert!(secret.exists() && !socket.exists());
}

#[test]
fn a_mode_that_confines_nothing_leaves_files_open() {
    for mode in [Seccomp::Log, Seccomp::Off] {
        let open = thread::spawn(move || {
            mode.close_files(&[]).unwrap();
            File::open("/proc/self/status").map(drop)
        });
        open.join().unwrap().unwrap();
    }
}
