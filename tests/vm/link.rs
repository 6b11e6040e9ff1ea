//! Two VMs that find, lose and find each other again, and front-ends that are none.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::{machine, vm};
use crate::common::{Dir, PATIENCE, Running, run};

#[test]
fn a_second_vm_joins_the_first_whichever_starts_first() {
    let _machine = machine();
    for back_first in [true, false] {
        let dir = Dir::new();
        let socket = dir.file("s");
        let back = || vm("--vhost-pci", &socket, "work=sink");
        let front = || vm("--net", &socket, "work=source count=5000");
        let (back, front) = if back_first {
            let mut back = back();
            back.wait_for("the socket", |_| Path::new(&socket).exists());
            (back, front())
        } else {
            let front = front();
            std::thread::sleep(Duration::from_millis(300));
            (back(), front)
        };
        front.end().expect_code(0);
        let back = back.end();
        back.expect_code(0);
        assert!(back.stdout.contains("received 5000 frames"), "{back:?}");
        assert!(
            dir.is_empty(),
            "something is left in {}",
            dir.path().display()
        );
    }
}

#[test]
fn a_back_end_outlives_a_front_end_that_is_killed_and_serves_the_next() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let mut back = vm("--vhost-pci", &socket, "work=both ms=600000");
    let mut front = vm("--net", &socket, "work=both ms=600000");
    front.wait_for_stdout("connected");
    back.wait_for_stdout("connected");
    std::thread::sleep(Duration::from_millis(300));
    front.signal("KILL");
    back.wait_for_stdout("the peer is gone");
    assert!(back.is_running());

    let mut next = vm("--net", &socket, "work=both ms=600000");
    next.wait_for_stdout("connected");
    back.wait_for("the next connection", |back| {
        back.stdout().matches("connected").count() == 2
    });
    next.signal("TERM");
    next.end().expect_code(143);
    back.signal("TERM");
    back.end().expect_code(143);
    assert!(
        dir.is_empty(),
        "something is left in {}",
        dir.path().display()
    );
}

#[test]
fn a_front_end_outlives_a_back_end_that_ends() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let mut back = vm("--vhost-pci", &socket, "work=both ms=600000");
    let mut front = vm("--net", &socket, "work=both ms=600000");
    front.wait_for_stdout("connected");
    back.wait_for_stdout("connected");
    back.signal("TERM");
    back.end().expect_code(143);
    assert!(
        dir.is_empty(),
        "something is left in {}",
        dir.path().display()
    );
    front.wait_for_stdout("the peer is gone");
    assert!(front.is_running());
    front.signal("TERM");
    front.end().expect_code(143);
}

/// A vhost-user message: GET_FEATURES with this size field and payload.
fn message(request: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, 1, size] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Connects as a front-end would, as soon as the device takes one.
#[track_caller]
fn connect(back: &mut Running, socket: &str) -> UnixStream {
    let mut stream = None;
    back.wait_for("its socket", |_| {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    let stream = stream.unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_front_end_that_sends_garbage_or_leaves_in_mid_message_harms_nobody() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let mut back = vm("--vhost-pci", &socket, "work=sink timeout_ms=60000");
    let garbage: [(&str, Vec<u8>); 4] = [
        ("no message at all", vec![0xff; 4096]),
        ("a payload of 4 GiB", message(1, u32::MAX, &[])),
        ("a memory table of nonsense", message(5, 40, &[0xff; 40])),
        ("an unknown request", message(0xdead, 0, &[])),
    ];
    for (what, bytes) in garbage {
        let mut stream = connect(&mut back, &socket);
        // The device may close the connection before everything is written.
        let _ = stream.write_all(&bytes);
        if what == "an unknown request" {
            // The guest is the back-end, and may ignore or refuse what it does not know.
            continue;
        }
        let mut reply = Vec::new();
        let closed = stream.read_to_end(&mut reply);
        let reset = closed
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(closed.is_ok() || reset, "{what}: {closed:?}");
        assert!(back.is_running(), "{what}: {}", back.stderr());
    }
    for bytes in [message(1, 0, &[])[..7].to_vec(), message(8, 8, &[0; 3])] {
        connect(&mut back, &socket).write_all(&bytes).unwrap();
    }
    assert!(back.is_running(), "{}", back.stderr());
    assert!(!back.stderr().contains("panicked"), "{}", back.stderr());

    // And a proper front-end is served as if nothing had been.
    let front = vm("--net", &socket, "work=source count=5000");
    front.end().expect_code(0);
    let back = back.end();
    back.expect_code(0);
    assert!(back.stdout.contains("received 5000 frames"), "{back:?}");
}

#[test]
fn a_socket_that_is_in_use_is_refused_and_left_alone() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    for flag in ["--vhost-pci", "--net"] {
        let device = format!("socket={socket},listen=on");
        let ended = run(&["run", "--console", "output", flag, &device]);
        ended
            .expect_code(1)
            .expect_one_line(&[&socket, "another process"]);
        assert!(Path::new(&socket).exists());
    }
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    drop(UnixListener::bind(&socket).unwrap());
    let mut back = vm("--vhost-pci", &socket, "work=sink timeout_ms=60000");
    drop(connect(&mut back, &socket));
    back.signal("TERM");
    back.end().expect_code(143);
    assert!(dir.is_empty());
}
