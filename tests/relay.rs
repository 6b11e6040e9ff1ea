//! Two VMs, both with a virtio-net device, and the relay between them. These tests need /dev/kvm and two cores.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::{Dir, Ended, Running, run, tool};

/// One test at a time: guests that poll want both cores.
fn machine() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(
        Path::new("/dev/kvm").exists(),
        "this test boots VMs and needs /dev/kvm"
    );
    guard
}

/// The relay, with a socket at `a` and one at `b` that it listens on.
fn relay(dir: &Dir, mode: &str) -> Running {
    let ports = ["a", "b"].map(|name| format!("socket={}", dir.file(name)));
    let args = ["-v", "relay", "--a", &ports[0], "--b", &ports[1]];
    let mut relay = Running::start(tool(&[&args[..], &["--mode", mode]].concat()));
    relay.wait_for("its sockets", |_| {
        ["a", "b"]
            .iter()
            .all(|name| Path::new(&dir.file(name)).exists())
    });
    relay
}

/// A VM whose device has these keys beside its socket.
fn vm(dir: &Dir, port: &str, keys: &str, work: &str) -> Running {
    let net = format!("socket={},{keys}", dir.file(port));
    // Frames say which end they come from; the one at `b` plays the back-end.
    let end = match port {
        "a" => "front-end",
        _ => "back-end",
    };
    let cmdline = format!("{work} end={end} timeout_ms=20000");
    Running::start(tool(&[
        "run",
        "--console",
        "output",
        "--net",
        &net,
        "--cmdline",
        &cmdline,
    ]))
}

#[track_caller]
fn expect_whole(ended: &Ended, count: u64) {
    ended.expect_code(0);
    let whole = format!(
        "received {count} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    );
    assert!(ended.stdout.contains(&whole), "{ended:?}");
}

/// Ends the relay; what it says of the frames.
#[track_caller]
fn end(relay: Running) -> Ended {
    relay.signal("TERM");
    let ended = relay.end();
    ended.expect_code(143);
    assert!(ended.stdout.contains(" 0 dropped"), "{ended:?}");
    ended
}

/// Frames enough for the indices of a split ring to pass 2^16.
const WRAPPING: u64 = 70_001;

#[track_caller]
fn both_ways(mode: &str, keys: [&str; 2], count: u64, words: &str) {
    let dir = Dir::new();
    let relay = relay(&dir, mode);
    let work = format!("work=both count={count} {words}");
    let vms = ["a", "b"]
        .into_iter()
        .zip(keys)
        .map(|(port, keys)| vm(&dir, port, keys, &work));
    for vm in vms.collect::<Vec<_>>() {
        expect_whole(&vm.end(), count);
    }
    end(relay);
    assert!(dir.is_empty(), "something is left");
}

#[test]
fn frames_cross_both_ways_whichever_layout_either_side_has() {
    let _machine = machine();
    let (split, packed) = ("packed=off", "packed=on");
    for keys in [[split, split], [packed, packed], [split, packed]] {
        both_ways("poll", keys, WRAPPING, "");
    }
    let out_of_order = "packed=on,in-order=off,size=7";
    both_ways("poll", [out_of_order, "in-order=off"], 20_000, "size=1518");
}

#[test]
fn a_relay_that_sleeps_is_woken_by_either_side() {
    let _machine = machine();
    for keys in ["packed=off", "packed=on,event-idx=off"] {
        both_ways("irq", [keys; 2], 5_000, "mode=irq");
    }
}

#[test]
fn frames_longer_than_a_buffer_and_frames_in_tables_cross() {
    let _machine = machine();
    let words = "size=1518 rx_buffer=512 tx=indirect";
    for packed in ["packed=off", "packed=on"] {
        let keys = format!("{packed},mrg-rxbuf=on,indirect=on");
        both_ways("poll", [&keys; 2], 20_000, words);
    }
    both_ways("poll", ["mrg-rxbuf=off"; 2], 20_000, "size=1518 tx=chain");
}

#[test]
fn a_round_trip_through_the_relay_brings_every_frame_back() {
    let _machine = machine();
    let dir = Dir::new();
    let relay = relay(&dir, "irq");
    let echo = vm(&dir, "a", "packed=off", "work=echo mode=irq");
    let sender = vm(&dir, "b", "packed=on", "work=round-trip count=300 mode=irq");
    sender.end().expect_code(0);
    echo.end().expect_code(0);
    end(relay);
}

#[test]
fn either_vm_may_be_killed_and_the_next_one_in_its_place_is_served() {
    let _machine = machine();
    for packed in ["packed=off", "packed=on"] {
        let dir = Dir::new();
        let mut relay = relay(&dir, "poll");
        for killed in ["a", "b"] {
            let stays = if killed == "a" { "b" } else { "a" };
            // What crosses while one is killed is nobody's; afterwards a fresh pair of guests must find the relay as new.
            let mut vms = [killed, stays].map(|port| vm(&dir, port, packed, "work=both ms=600000"));
            for vm in &mut vms {
                vm.wait_for_stdout("connected");
            }
            std::thread::sleep(std::time::Duration::from_millis(300));
            let [victim, mut survivor] = vms;
            victim.signal("KILL");
            let gone = format!("{killed}: the front-end is gone");
            relay.wait_for(&gone, |relay| relay.stderr().contains(&gone));
            assert!(survivor.is_running());
            let connected = format!(" {killed}: serving ");
            let before = relay.stderr().matches(&connected).count();
            let next = vm(&dir, killed, packed, "work=both ms=600000");
            relay.wait_for("the next", |relay| {
                relay.stderr().matches(&connected).count() > before
            });
            assert!(survivor.is_running());
            drop((next, survivor));
        }
        let work = format!("work=both count={WRAPPING}");
        let vms = ["a", "b"].map(|port| vm(&dir, port, packed, &work));
        for vm in vms {
            expect_whole(&vm.end(), WRAPPING);
        }
        assert!(!relay.stderr().contains("panicked"), "{}", relay.stderr());
        end(relay);
    }
}

#[test]
fn a_relay_that_cannot_work_says_why_in_one_line() {
    let dir = Dir::new();
    let (a, b) = (format!("socket={}", dir.file("a")), "socket=/nonexistent/b");
    let ended = run(&["relay", "--a", &a, "--b", b]);
    ended.expect_code(1).expect_one_line(&["/nonexistent/b"]);
    assert!(dir.is_empty(), "something is left");
    run(&["relay", "--a", &a, "--b", &a])
        .expect_code(3)
        .expect_one_line(&["a socket each"]);
}
