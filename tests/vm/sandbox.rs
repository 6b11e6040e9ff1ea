//! What a VM's process may do on the host: its threads are confined from the start, it needs no privileges, and it holds no more than it says.
//! (That a forbidden system call ends it is tested where one can be made: vmm/src/sandbox/tests.rs. That nothing needed is forbidden, all of the other tests show.)

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::{machine, start, vm};
use crate::common::{Dir, PATIENCE, Running, run, tool};

/// The most threads of a VM with one vCPU: that, the devices', and the first.
const THREADS: usize = 3;
/// The most descriptors of a VM with one device and one queue pair that is connected, windows included (docs/threat-model.md).
const DESCRIPTORS: usize = 80;

/// A field of /proc/PID/task/TID/status of each thread.
fn of_threads(pid: u32, field: &str) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let value = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        // KVM may have a thread of its own in the process.
        if status.starts_with("Name:\tkvm-") {
            return None;
        }
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let value = line.unwrap_or_else(|| panic!("no {field} in {status}"));
        Some(value.trim().parse().unwrap())
    };
    tasks.filter_map(|task| value(task.unwrap())).collect()
}

fn filters(pid: u32) -> Vec<u32> {
    of_threads(pid, "Seccomp_filters:")
}

/// Two VMs that are connected and exchange frames, with these arguments.
fn pair_of(dir: &Dir, args: &[&str]) -> [Running; 2] {
    let socket = dir.file("s");
    let device = format!("socket={socket}");
    ["--vhost-pci", "--net"].map(|flag| {
        let work = ["--cmdline", "work=both ms=600000"];
        let device = ["run", "--console", "output", flag, &device];
        start(&[&device[..], &work[..], args].concat())
    })
}

fn expect_connected(vms: &mut [Running; 2]) {
    for vm in vms {
        vm.wait_for_stdout("connected");
    }
}

#[test]
fn every_thread_of_a_vm_has_one_filter_and_no_new_privileges_unless_that_is_switched_off() {
    let _machine = machine();
    let own = filters(std::process::id())[0];
    for (mode, added) in [("", 1), ("on", 1), ("log", 1), ("off", 0)] {
        let dir = Dir::new();
        let flag = format!("--seccomp={mode}");
        let args: &[&str] = if mode.is_empty() { &[] } else { &[&flag] };
        let mut vms = pair_of(&dir, args);
        expect_connected(&mut vms);
        for vm in &vms {
            let filters = filters(vm.pid());
            assert_eq!(filters, [own + added; THREADS], "{mode:?}");
            let privileges = of_threads(vm.pid(), "NoNewPrivs:");
            assert!(added == 0 || privileges == [1; THREADS], "{privileges:?}");
        }
        for vm in vms {
            vm.signal("TERM");
            vm.end().expect_code(143);
        }
        assert!(dir.is_empty());
    }
}

#[test]
fn a_mode_that_there_is_not_is_refused() {
    run(&["run", "--seccomp", "maybe"])
        .expect_code(3)
        .expect_one_line(&["--seccomp", "maybe"]);
}

#[test]
fn a_vm_that_dies_of_sigsys_is_told_from_others() {
    let _machine = machine();
    let dir = Dir::new();
    let mut command = tool(&["pair", "--seconds", "600"]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    running.wait_for_stdout("front-end | guest: connected");
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let children = fs::read_to_string(children).unwrap();
    let child = children.split_whitespace().next().unwrap();
    let kill = Command::new("kill").args(["-s", "SYS", child]).status();
    assert!(kill.unwrap().success());
    let ended = running.end();
    ended.expect_code(159);
    assert!(ended.stderr.contains("--seccomp log"), "{ended:?}");
}

#[test]
fn a_vm_holds_no_more_threads_and_descriptors_than_it_says() {
    let _machine = machine();
    let own = filters(std::process::id())[0];
    for (args, threads) in [
        (&[][..], THREADS),
        (&["--metrics", "/dev/null"], THREADS + 1),
    ] {
        let dir = Dir::new();
        let mut vms = pair_of(&dir, args);
        expect_connected(&mut vms);
        for vm in &vms {
            let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.pid()));
            let descriptors = descriptors.unwrap().count();
            assert_eq!(filters(vm.pid()), vec![own + 1; threads], "{args:?}");
            assert!(descriptors <= DESCRIPTORS, "{descriptors}");
        }
    }
}

/// Runs as nobody in particular, but with the group of /dev/kvm.
fn unprivileged(command: &Command) -> Command {
    let kvm = fs::metadata("/dev/kvm").unwrap();
    let mut all = Command::new("setpriv");
    all.args(["--reuid=65534", "--regid=65534", "--bounding-set=-all"])
        .args(["--inh-caps=-all", "--no-new-privs"])
        .arg(format!("--groups={}", kvm.gid()))
        .arg(command.get_program())
        .args(command.get_args());
    all
}

#[test]
fn no_privileges_are_needed_but_access_to_dev_kvm() {
    let _machine = machine();
    let dir = Dir::new();
    let program = dir.file("vhost-pci");
    fs::copy(env!("CARGO_BIN_EXE_vhost-pci"), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["pair", "--count", "20000", "--iommu", "static"]);
    // An ordinary user's machine shows that anyway.
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let mut command = if root {
        unprivileged(&command)
    } else {
        command
    };
    command.env("TMPDIR", "/tmp");
    let ended = Running::start(command).end_within(PATIENCE);
    ended.expect_code(0);
    for end in ["back-end ", "front-end"] {
        let line =
            format!("{end} | guest: both: received 20000 frames, every byte checked: 0 lost");
        assert!(ended.stdout.contains(&line), "{ended:?}");
    }
}

#[test]
fn a_vm_outlives_its_peer_and_finds_the_next_one_through_its_filters() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    // The front-end listens: the back-end has to connect, again and again, with files closed to it.
    let [listen, connect] = ["on", "off"].map(|listen| format!("{socket},listen={listen}"));
    let mut back = vm("--vhost-pci", &connect, "work=both ms=600000");
    for round in 1..=3 {
        let mut front = vm("--net", &listen, "work=both ms=600000");
        front.wait_for_stdout("connected");
        back.wait_for("the next connection", |back| {
            back.stdout().matches("connected").count() == round
        });
        front.signal(if round == 1 { "KILL" } else { "TERM" });
        back.wait_for("the end of this one", |back| {
            back.stdout().matches("guest: the peer is gone").count() == round
        });
    }
    back.signal("TERM");
    back.end().expect_code(143);
    assert!(dir.is_empty(), "a socket is left");
}
