//! What a host does to a VM when it is in trouble, and what a guest does that has gone wrong: each ends as documented, with an exit code and at most one
//! line, and nothing that was promised is lost. (Processes that are killed: kill.rs.)

use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{kernel, machine, start, vm};
use crate::common::{Dir, Ended, Running, run};

/// How long a VM is stopped: longer than anything waits for anything, but for what is told to.
const STOPPED: Duration = Duration::from_secs(3);

#[test]
fn a_vm_that_is_stopped_for_seconds_goes_on_and_no_frame_is_lost() {
    let _machine = machine();
    for stopped in 0..2 {
        let dir = Dir::new();
        let socket = dir.file("s");
        let work = "work=both count=3000000 timeout_ms=60000";
        let mut vms = ["--vhost-pci", "--net"].map(|flag| vm(flag, &socket, work));
        for vm in &mut vms {
            vm.wait_for_stdout("connected");
        }
        vms[stopped].signal("STOP");
        thread::sleep(STOPPED);
        vms[stopped].signal("CONT");
        for vm in vms {
            let ended = vm.end();
            ended.expect_code(0);
            let line = "received 3000000 frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted";
            assert!(ended.stdout.contains(line), "{ended:?}");
        }
    }
}

/// Passes what comes from one end on to the other, in pieces of `piece` bytes with the descriptors at the first, until `messages` whole messages have gone
/// through. Returns whether it came to that.
fn pass(from: &UnixStream, to: &UnixStream, piece: usize, messages: usize) -> bool {
    for _ in 0..messages {
        let mut message = [0; 4096 + 12];
        let mut fds = [0; 32];
        let (mut have, mut want, mut passed) = (0, 12, 0);
        let mut kept: Vec<OwnedFd> = Vec::new();
        while have < want {
            let mut part = [libc_iovec(&mut message[have..want])];
            // SAFETY: the vector describes a part of `message`, which is borrowed for the call.
            #[allow(unsafe_code)]
            let got = unsafe { from.recv_with_fds(&mut part, &mut fds) };
            let Ok((got @ 1.., count)) = got else {
                return false;
            };
            // SAFETY: the kernel has just made these descriptors for this process.
            #[allow(unsafe_code)]
            kept.extend(
                fds[..count]
                    .iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
            );
            have += got;
            if have == 12 {
                let size: [u8; 4] = message[8..12].try_into().unwrap();
                want = 12 + usize::try_from(u32::from_le_bytes(size)).unwrap();
                assert!(want <= message.len());
            }
        }
        let raw: Vec<i32> = kept.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
        while passed < want {
            let end = want.min(passed + piece);
            let fds = if passed == 0 { &raw[..] } else { &[] };
            if to.send_with_fds(&[&message[passed..end]], fds).is_err() {
                return false;
            }
            passed = end;
        }
    }
    true
}

fn libc_iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// Between a front-end that connects to `listener` and the back-end that listens at `back`: the first `messages` of the front-end go through in pieces, and
/// as many of the back-end's as it likes. Returns whether there were so many.
fn between(listener: &UnixListener, back: &str, piece: usize, messages: usize) -> bool {
    let (front, _) = listener.accept().unwrap();
    let back = loop {
        match UnixStream::connect(back) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    };
    // A conversation that has come to its end before is quiet.
    front
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    thread::scope(|scope| {
        scope.spawn(|| pass(&back, &front, piece, usize::MAX));
        let all = pass(&front, &back, piece, messages);
        for end in [&front, &back] {
            let _ = end.shutdown(std::net::Shutdown::Both);
        }
        all
    })
}

#[test]
fn a_socket_that_closes_behind_any_message_costs_both_ends_the_connection_and_nothing_else() {
    let _machine = machine();
    for iommu in [false, true] {
        let dir = Dir::new();
        let (wire, socket) = (dir.file("wire"), dir.file("s"));
        let listener = UnixListener::bind(&wire).unwrap();
        let mut back = vm("--vhost-pci", &socket, "work=both ms=600000");
        let device = format!("socket={wire}");
        let more: &[&str] = if iommu { &["--iommu"] } else { &[] };
        let args = ["run", "--console", "output", "--net", &device];
        let work = ["--cmdline", "work=both ms=600000"];
        let mut front = start(&[&args[..], &work[..], more].concat());
        let mut cuts = 0;
        // Every byte is a read of its own in each third conversation.
        while between(
            &listener,
            &socket,
            if cuts % 3 == 0 { 1 } else { 4096 },
            cuts,
        ) {
            cuts += 1;
            assert!(cuts < 1000, "the conversation has no end");
            for vm in [&mut back, &mut front] {
                assert!(vm.is_running(), "{cuts}: {}", vm.stderr());
            }
        }
        assert!(cuts > 10, "{cuts}");
        for vm in [back, front] {
            assert!(!vm.stderr().contains("panicked"), "{}", vm.stderr());
            vm.signal("TERM");
            vm.end().expect_code(143);
        }
    }
}

/// Runs the tool in a shell with a limit of the shell's `ulimit`.
fn limited(limit: &str, args: &[&str]) -> Running {
    let mut command = Command::new("sh");
    let script = format!("ulimit {limit} && exec \"$@\"");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_vhost-pci")]);
    command.args(args);
    Running::start(command)
}

/// It could not be had, and that is said in one line; or it could.
#[track_caller]
fn expect_one_line_or_success(ended: &Ended, what: &str) -> bool {
    match ended.status.code() {
        Some(0) => true,
        Some(1) => {
            let lines: Vec<&str> = ended.stderr.lines().collect();
            let told = lines.len() == 1 && lines[0].starts_with("vhost-pci: ");
            assert!(told, "{what}: {ended:?}");
            false
        }
        _ => panic!("{what}: {ended:?}"),
    }
}

#[test]
fn a_vm_that_runs_out_of_descriptors_says_so_and_ends_or_runs() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let device = format!("socket={socket}");
    let mut ran = 0;
    // From enough for the program and its libraries to enough for everything.
    for files in (4..48).step_by(2) {
        let limit = format!("-n {files}");
        let args = ["run", "--console", "output", "--net", &device];
        let work = ["--cmdline", "work=source count=100"];
        // Its back-end is there, and takes whatever front-end there is.
        let back = vm("--vhost-pci", &socket, "work=sink timeout_ms=60000");
        let mut front = limited(&limit, &[&args[..], &work[..]].concat());
        front.wait_for("an end, of either", |front| {
            !front.is_running()
                || front.stderr().contains("descriptor")
                || front.stderr().contains("open files")
        });
        // One that has too few to talk to its back-end waits for better times.
        if front.is_running() {
            front.signal("TERM");
        }
        let ended = front.end();
        if ended.status.code() == Some(143) {
            assert!(ended.stderr.contains("open files"), "{files}: {ended:?}");
        } else if expect_one_line_or_success(&ended, &limit) {
            ran += 1;
        } else {
            assert!(ended.stderr.contains("open files"), "{files}: {ended:?}");
        }
        drop(back);
    }
    assert!(ran > 0, "no limit was enough");
}

#[test]
fn a_vm_that_gets_no_address_space_says_so_and_ends() {
    let _machine = machine();
    let dir = Dir::new();
    // mov al, 0; out 0xf4, al
    let kernel = kernel(&dir, &[0xb0, 0, 0xe6, 0xf4]);
    let mut ran = 0;
    // From too little for the memory to enough for all, in KiB.
    for size in [60, 66, 70, 80, 100, 200, 400] {
        let limit = format!("-v {}", size << 10);
        let memory = ["--memory", "size=64M", "--kernel", &kernel];
        let args = [&["run", "--console", "output"][..], &memory].concat();
        let ended = limited(&limit, &args).end();
        ran += usize::from(expect_one_line_or_success(&ended, &limit));
    }
    assert!((1..7).contains(&ran), "{ran} of 7 were enough");
    // The window takes addresses only, but many.
    let socket = dir.file("s");
    let device = format!("socket={socket}");
    let args = ["run", "--console", "output", "--vhost-pci", &device];
    limited(&format!("-v {}", 8 << 20), &args)
        .end()
        .expect_code(1)
        .expect_one_line(&["window"]);
    assert!(fs::metadata(&socket).is_err(), "a socket is left");
}

#[test]
fn a_full_disk_under_json_is_one_line_and_the_figures_are_shown_all_the_same() {
    let _machine = machine();
    let args = ["bench", "--quick", "--json", "/dev/full"];
    let ended = run(&args);
    ended
        .expect_code(1)
        .expect_one_line(&["--json", "/dev/full"]);
    assert!(
        ended.stdout.contains("frames verified: 0 lost"),
        "{ended:?}"
    );
    let args = ["isolation", "--only", "call-flood", "--json", "/dev/full"];
    let ended = run(&args);
    ended
        .expect_code(1)
        .expect_one_line(&["--json", "/dev/full"]);
    assert!(ended.stdout.contains("nothing got through"), "{ended:?}");
    assert!(fs::metadata("/dev/full").is_ok());
}

#[test]
fn a_report_into_a_pipe_leaves_the_pipe() {
    let _machine = machine();
    let args = ["isolation", "--only", "call-flood", "--json", "/dev/stdout"];
    let ended = run(&args);
    ended.expect_code(0);
    assert!(ended.stdout.contains("\"schema_version\": 1"), "{ended:?}");
}

#[test]
fn a_guest_that_triple_faults_is_exit_code_4_and_one_line() {
    let _machine = machine();
    let dir = Dir::new();
    // ud2: an exception, and there is no table for those.
    let kernel = kernel(&dir, &[0x0f, 0x0b]);
    run(&["run", "--console", "output", "--kernel", &kernel])
        .expect_code(4)
        .expect_one_line(&["triple fault"]);
}

#[test]
fn a_guest_that_resets_itself_is_exit_code_4_and_one_line() {
    let _machine = machine();
    let dir = Dir::new();
    // mov al, 0xfe; out 0x64, al; hlt
    let kernel = kernel(&dir, &[0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
    run(&["run", "--console", "output", "--kernel", &kernel])
        .expect_code(4)
        .expect_one_line(&["reset"]);
}

#[test]
fn a_guest_that_stops_or_spins_for_ever_still_ends_on_sigterm() {
    let _machine = machine();
    // cli; hlt; jmp back. cli; jmp self. And exits without end: in al, 0x80; jmp back.
    for code in [
        &[0xfa, 0xf4, 0xeb, 0xfd][..],
        &[0xfa, 0xeb, 0xfe],
        &[0xe4, 0x80, 0xeb, 0xfc],
    ] {
        let dir = Dir::new();
        let kernel = kernel(&dir, code);
        let mut vm = start(&["run", "--console", "output", "--kernel", &kernel]);
        thread::sleep(Duration::from_millis(300));
        assert!(vm.is_running(), "{}", vm.stderr());
        vm.signal("TERM");
        let ended = vm.end_within(Duration::from_secs(10));
        ended.expect_code(143);
        assert!(ended.stderr.is_empty(), "{ended:?}");
    }
}
