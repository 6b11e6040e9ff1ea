//! What starts and ends a VM: bad files, signals, exit codes.

use std::fs;
use std::path::Path;

use super::{machine, vm};
use crate::common::{Dir, Running, processes_with, run, tool};

#[test]
fn a_kernel_that_is_none_is_named_in_one_line() {
    let _machine = machine();
    let dir = Dir::new();
    let text = dir.file("text");
    fs::write(&text, "this is no kernel\n".repeat(1000)).unwrap();
    let empty = dir.file("empty");
    fs::write(&empty, "").unwrap();
    let missing = dir.file("missing");
    for path in [&text, &empty, &missing, dir.path().to_str().unwrap()] {
        let ended = run(&["run", "--console", "output", "--kernel", path]);
        ended.expect_code(1).expect_one_line(&[path]);
    }
    let ended = run(&["run", "--console", "output", "--initrd", &missing]);
    ended.expect_code(1).expect_one_line(&[&missing]);
}

#[test]
fn memory_that_cannot_be_had_is_one_line() {
    let _machine = machine();
    let pool = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    let free = fs::read_to_string(pool).map_or(0, |text| text.trim().parse().unwrap_or(0));
    let size = format!("size={}G,hugepages=1G", free + 1);
    run(&["run", "--console", "output", "--memory", &size])
        .expect_code(1)
        .expect_one_line(&["memory"]);
    let ended = run(&["run", "--console", "output", "--memory", "size=1000000T"]);
    assert!([1, 3].contains(&ended.code()), "{ended:?}");
    ended.expect_one_line(&["memory"]);
}

#[test]
fn sigterm_leaves_no_socket_and_is_exit_code_143() {
    let _machine = machine();
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let dir = Dir::new();
        let socket = dir.file("s");
        let mut back = vm("--vhost-pci", &socket, "");
        back.wait_for("the socket", |_| Path::new(&socket).exists());
        back.signal(signal);
        back.end().expect_code(code);
        assert!(dir.is_empty(), "{signal}");
    }
}

#[test]
fn ctrl_c_ends_both_vms_of_a_pair_and_leaves_nothing() {
    let _machine = machine();
    let dir = Dir::new();
    let mut command = tool(&["pair", "--seconds", "600"]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    running.wait_for_stdout("front-end | guest: connected");
    let name = dir.path().to_str().unwrap();
    assert_eq!(processes_with(name), 2);
    running.signal("INT");
    running.end().expect_code(130);
    assert_eq!(processes_with(name), 0);
    assert!(dir.is_empty());
}

#[test]
fn the_vms_of_a_pair_that_is_killed_do_not_live_on() {
    let _machine = machine();
    let dir = Dir::new();
    let mut command = tool(&["pair", "--seconds", "600"]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    running.wait_for_stdout("front-end | guest: connected");
    running.signal("KILL");
    let name = dir.path().to_str().unwrap();
    running.wait_for("the end of both VMs", |_| processes_with(name) == 0);
}

#[test]
fn the_code_that_a_guest_powers_off_with_is_passed_through() {
    let _machine = machine();
    // A sink whose peer never sends gives up, which is no success.
    let dir = Dir::new();
    let socket = dir.file("s");
    let back = vm("--vhost-pci", &socket, "work=sink timeout_ms=300");
    let mut front = vm("--net", &socket, "work=sink timeout_ms=60000");
    let back = back.end();
    assert_eq!(back.code(), 2, "{back:?}");
    front.signal("TERM");
    front.wait_for("its end", |front| !front.is_running());
}
