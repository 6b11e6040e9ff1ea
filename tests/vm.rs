//! Real VMs. These tests need /dev/kvm and two cores, and fail with a line that says so where there are none.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{Dir, PATIENCE, Running, processes_with, run, tool};
use serde_json::Value;

/// One test at a time: guests that poll want both cores.
fn machine() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = kvm {
        panic!("this test boots VMs and needs /dev/kvm: {error}");
    }
    guard
}

fn start(args: &[&str]) -> Running {
    Running::start(tool(args))
}

/// One VM with a device on `socket`.
fn vm(flag: &str, socket: &str, cmdline: &str) -> Running {
    let device = format!("socket={socket}");
    start(&[
        "run",
        "--console",
        "output",
        flag,
        &device,
        "--cmdline",
        cmdline,
    ])
}

/// Runs `pair` and expects that `count` frames arrived at each receiver, whole.
#[track_caller]
fn pair(args: &[&str], receivers: usize, count: u64) {
    let count_text = count.to_string();
    let mut all = vec!["pair", "--count", &count_text];
    all.extend(args);
    let ended = run(&all);
    ended.expect_code(0);
    let whole = format!(
        "received {count} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    );
    assert_eq!(ended.stdout.matches(&whole).count(), receivers, "{ended:?}");
    assert!(ended.stdout.contains("back-end  | ") && ended.stdout.contains("front-end | "));
    // Whoever ends last may say that the other is gone; there is nothing else to say.
    let other = ended.stderr.lines().find(|line| !line.contains("is gone"));
    assert_eq!(other, None, "{ended:?}");
}

#[test]
fn frames_go_both_ways_and_none_is_lost_when_the_indices_wrap() {
    let _machine = machine();
    pair(&["--direction", "both"], 2, 200_000);
}

#[test]
fn frames_go_either_way_and_none_is_lost() {
    let _machine = machine();
    pair(
        &["--direction", "be-to-fe", "--queue-size", "64"],
        1,
        100_000,
    );
    pair(
        &["--direction", "fe-to-be", "--queue-size", "64"],
        1,
        100_000,
    );
}

#[test]
fn a_round_trip_brings_every_frame_back() {
    let _machine = machine();
    pair(&["--direction", "round-trip"], 2, 10_000);
}

#[test]
fn the_largest_and_the_smallest_frames_and_batches_arrive() {
    let _machine = machine();
    pair(&["--size", "1518", "--batch", "256"], 2, 20_000);
    pair(&["--size", "60", "--batch", "1"], 2, 20_000);
}

#[test]
fn guests_that_sleep_are_woken_and_lose_none() {
    let _machine = machine();
    pair(&["--mode", "irq", "--direction", "both"], 2, 5_000);
    pair(&["--mode", "irq", "--direction", "round-trip"], 2, 200);
}

/// Frames enough for the indices of a ring to pass 2^16 and for a packed ring of 768 to go round 90 times.
const WRAPPING: u64 = 70_001;

#[test]
fn packed_rings_of_any_size_carry_frames_both_ways_in_order_or_not() {
    let _machine = machine();
    for in_order in ["off", "on"] {
        let rings = ["--ring", "packed", "--in-order", in_order];
        pair(
            &[&rings[..], &["--queue-size", "768"]].concat(),
            2,
            WRAPPING,
        );
        // A ring that is shorter than a burst, of a length that divides nothing.
        pair(&[&rings[..], &["--queue-size", "7"]].concat(), 2, 20_000);
        pair(
            &[&rings[..], &["--direction", "round-trip"]].concat(),
            2,
            2_000,
        );
    }
}

#[test]
fn split_rings_carry_frames_both_ways_in_order_or_not() {
    let _machine = machine();
    for in_order in ["off", "on"] {
        let rings = ["--ring", "split", "--in-order", in_order];
        pair(&rings, 2, WRAPPING);
        pair(&[&rings[..], &["--batch", "1"]].concat(), 2, 20_000);
    }
}

/// Both layouts, with VIRTIO_F_IN_ORDER and without.
const RINGS: [&[&str]; 4] = [
    &["--ring", "split", "--in-order", "off"],
    &["--ring", "split", "--in-order", "on"],
    &["--ring", "packed", "--in-order", "off"],
    &["--ring", "packed", "--in-order", "on"],
];

#[test]
fn frames_that_are_longer_than_a_buffer_arrive_in_several() {
    let _machine = machine();
    for rings in RINGS {
        let merged = ["--mrg-rxbuf", "on", "--rx-buffer", "512", "--size", "1518"];
        pair(&[rings, &merged].concat(), 2, 20_000);
        // As many buffers as a frame can need, and frames that fit exactly: 116 bytes and a header of 12.
        let small = ["--mrg-rxbuf", "on", "--rx-buffer", "128"];
        pair(
            &[rings, &small, &["--size", "1518", "--batch", "3"]].concat(),
            2,
            5_000,
        );
        pair(&[rings, &small, &["--size", "116"]].concat(), 2, 5_000);
    }
}

#[test]
fn frames_in_chains_and_in_indirect_tables_arrive() {
    let _machine = machine();
    for rings in RINGS {
        for size in ["60", "1518"] {
            let frames = ["--size", size, "--tx"];
            pair(&[rings, &frames, &["chain"]].concat(), 2, 20_000);
            let tables = ["indirect", "--indirect", "on"];
            pair(&[rings, &frames, &tables].concat(), 2, 20_000);
        }
    }
}

#[test]
fn guests_that_sleep_are_woken_over_every_ring_with_event_indices_and_without() {
    let _machine = machine();
    for rings in RINGS {
        for event_idx in ["on", "off"] {
            let irq = ["--mode", "irq", "--event-idx", event_idx];
            pair(&[rings, &irq].concat(), 2, 3_000);
            pair(
                &[rings, &irq, &["--direction", "round-trip"]].concat(),
                2,
                100,
            );
        }
    }
}

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

/// What scripts rely on (docs and the tool's module `report`).
fn check_entry(entry: &Value) {
    for key in [
        "frame_size",
        "batch",
        "queue_pairs",
        "frames",
        "lost",
        "duplicated",
        "reordered",
        "corrupted",
    ] {
        assert!(entry[key].is_u64(), "{key}: {entry}");
    }
    for key in ["lost", "duplicated", "reordered", "corrupted"] {
        assert_eq!(entry[key], 0, "{key}: {entry}");
    }
    assert_eq!(entry["path"], "window");
    assert!(entry["ring"] == "split" || entry["ring"] == "packed");
    for key in ["in_order", "event_idx", "mrg_rxbuf", "indirect"] {
        assert!(entry[key].is_boolean(), "{key}: {entry}");
    }
    assert!(entry["queue_size"].is_u64() && entry["tx"].is_string());
    assert!(["off", "static", "dynamic", "batch"].contains(&entry["iommu"].as_str().unwrap()));
    let gated = entry["iommu"] == "off" || entry["iommu"] == "static";
    assert_eq!(entry.get("least_vcpu_share").is_some(), gated, "{entry}");
    // Where no sample was fit to be reported there is no figure at all.
    let Some(distance) = entry.get("distance") else {
        assert!(entry.get("mpps").is_none() && entry.get("ratio").is_none());
        return;
    };
    assert!(distance == "near" || distance == "far", "{entry}");
    assert!(entry["probe_ns"].as_f64().unwrap() > 0.0);
    assert!(entry["ratio"].as_f64().unwrap() > 0.0, "{entry}");
    assert!(
        entry["exits"].is_object() && entry["cpu"].is_object(),
        "{entry}"
    );
    if entry["direction"] == "round-trip" {
        let times =
            ["p50", "p99", "p999", "max"].map(|key| entry["latency_ns"][key].as_f64().unwrap());
        assert!(times[0] > 0.0 && times.is_sorted(), "{entry}");
        assert!(entry.get("mpps").is_none());
        return;
    }
    assert!(entry.get("latency_ns").is_none());
    for key in ["mpps", "gbps", "bound_mpps"] {
        let [median, min, max] =
            ["median", "min", "max"].map(|part| entry[key][part].as_f64().unwrap());
        assert!(
            0.0 < min && min <= median && median <= max,
            "{key}: {entry}"
        );
        assert!(!entry[key]["samples"].as_array().unwrap().is_empty());
    }
    let size = entry["frame_size"].as_f64().unwrap();
    let gbps = entry["mpps"]["median"].as_f64().unwrap() * size * 8.0 / 1000.0;
    assert!((gbps - entry["gbps"]["median"].as_f64().unwrap()).abs() < 0.01 * gbps + 0.001);
}

#[test]
fn bench_writes_the_json_of_the_contract() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let start = Instant::now();
    let ended = run(&[
        "bench",
        "--quick",
        "--ms",
        "20",
        "--samples",
        "1",
        "--json",
        &path,
    ]);
    assert!(start.elapsed() < Duration::from_secs(20));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert!(
        json["command"]
            .as_array()
            .unwrap()
            .iter()
            .any(|word| word == "--quick")
    );
    assert!(json["environment"]["tsc_khz"].as_u64().unwrap() > 0);
    let results = json["results"].as_array().unwrap();
    for direction in ["be-to-fe", "fe-to-be", "both", "round-trip"] {
        for size in [64, 1518] {
            let found = results
                .iter()
                .filter(|entry| entry["direction"] == direction && entry["frame_size"] == size);
            assert!(found.count() >= 1, "no {direction} at {size}: {json}");
        }
    }
    results.iter().for_each(check_entry);
    for entry in results {
        assert_eq!(
            (&entry["ring"], &entry["in_order"]),
            (&"split".into(), &false.into())
        );
    }
    // A host so busy that a figure has no sample at all is a failure, and the only one there may be.
    let complete = results.iter().all(|entry| entry.get("distance").is_some());
    ended.expect_code(if complete { 0 } else { 1 });
    assert!(
        ended
            .stdout
            .contains("0 lost, 0 duplicated, 0 reordered, 0 corrupted"),
        "{ended:?}"
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "only the file is left"
    );
}

#[test]
fn a_sweep_over_the_rings_writes_every_figure_and_can_be_drawn() {
    let _machine = machine();
    let dir = Dir::new();
    let (path, svg) = (dir.file("rings.json"), dir.file("rings.svg"));
    let ended = run(&[
        "bench",
        "--sweep",
        "rings",
        "--ms",
        "3",
        "--samples",
        "1",
        "--batches",
        "1,64",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let results = json["results"].as_array().unwrap();
    results.iter().for_each(check_entry);
    let requests = json["requests"].as_array().unwrap();
    for ring in ["split", "packed"] {
        for in_order in [false, true] {
            for batch in [1, 64] {
                let is = |entry: &&Value| {
                    entry["ring"] == ring
                        && entry["in_order"] == in_order
                        && entry["batch"] == batch
                };
                for direction in ["be-to-fe", "fe-to-be"] {
                    let mut found = results.iter().filter(is);
                    assert!(
                        found.any(|entry| entry["direction"] == direction),
                        "no {ring} {in_order} {batch} {direction}: {json}"
                    );
                }
                for place in ["same-core", "cross-core"] {
                    let mut found = requests.iter().filter(is);
                    let entry = found.find(|entry| entry["where"] == place);
                    let entry = entry.unwrap_or_else(|| panic!("no {ring} {batch} {place}"));
                    if let Some(ns) = entry.get("ns") {
                        assert!(ns["median"].as_f64().unwrap() > 0.0, "{entry}");
                        assert_eq!(entry.get("distance").is_some(), place == "cross-core");
                    }
                }
            }
        }
    }
    assert!(json["counters"].is_string());
    // A host so busy that a figure has no sample at all is a failure, and the only one there may be.
    let complete = results.iter().all(|entry| entry.get("distance").is_some())
        && requests.iter().all(|entry| entry.get("ns").is_some());
    ended.expect_code(if complete { 0 } else { 1 });

    if complete {
        run(&["plot", &path, "--out", &svg]).expect_code(0);
        let svg = fs::read_to_string(&svg).unwrap();
        assert!(svg.starts_with("<svg ") && svg.contains("packed + in-order"));
    }
}

#[test]
fn bench_measures_the_features_that_it_was_asked_for() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let ended = run(&[
        "bench",
        "--ring",
        "packed",
        "--in-order",
        "on",
        "--event-idx",
        "on",
        "--mrg-rxbuf",
        "on",
        "--indirect",
        "on",
        "--queue-size",
        "768",
        "--sizes",
        "64",
        "--batches",
        "32",
        "--directions",
        "both",
        "--ms",
        "10",
        "--samples",
        "1",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let entry = &json["results"][0];
    check_entry(entry);
    assert_eq!(entry["ring"], "packed");
    for key in ["in_order", "event_idx", "mrg_rxbuf", "indirect"] {
        assert_eq!(entry[key], true, "{key}");
    }
    assert_eq!(
        (&entry["queue_size"], &entry["tx"]),
        (&768.into(), &"indirect".into())
    );
}

#[test]
fn frames_arrive_through_windows_that_follow_the_iommu_however_it_is_used() {
    let _machine = machine();
    for iommu in ["static", "dynamic", "batch"] {
        // Where each frame is mapped and unmapped, a frame takes as long as some system calls.
        let count = if iommu == "static" { 50_000 } else { 3_000 };
        for rings in [RINGS[0], RINGS[3]] {
            pair(&[rings, &["--iommu", iommu]].concat(), 2, count);
        }
        pair(&["--iommu", iommu, "--size", "1518"], 2, count);
        pair(&["--iommu", iommu, "--mode", "irq"], 2, 1_000);
    }
}

#[test]
fn both_guests_can_be_behind_an_iommu_at_once() {
    let _machine = machine();
    pair(&["--iommu", "static", "--iommu-back", "on"], 2, 50_000);
    pair(&["--iommu", "batch", "--iommu-back", "on"], 2, 3_000);
    pair(&["--iommu-back", "on"], 2, 50_000);
}

/// Runs the study; its report.
fn isolation(args: &[&str]) -> (i32, Value) {
    let dir = Dir::new();
    let path = dir.file("iso.json");
    let ended = run(&[&["isolation", "--rounds", "500", "--json", &path], args].concat());
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert!(json.get("failed").is_none(), "{json}");
    for attack in json["attacks"].as_array().unwrap() {
        let from = &attack["from"];
        assert!(from == "back-end" || from == "front-end", "{attack}");
        assert!(attack["tries"].as_u64().unwrap() > 0, "{attack}");
        assert!(attack["noticed"].is_string(), "{attack}");
    }
    (ended.code(), json)
}

fn got_through(json: &Value) -> Vec<(&str, u64)> {
    let attacks = json["attacks"].as_array().unwrap().iter();
    attacks
        .map(|attack| {
            (
                attack["name"].as_str().unwrap(),
                attack["got_through"].as_u64().unwrap(),
            )
        })
        .filter(|(_, got)| *got > 0)
        .collect()
}

#[test]
fn nothing_gets_through_windows_that_follow_the_iommu() {
    let _machine = machine();
    let (code, json) = isolation(&[]);
    assert_eq!(got_through(&json), []);
    assert_eq!((code, &json["mode"]), (0, &"windows".into()));
    assert!(json["attacks"].as_array().unwrap().len() >= 40);
}

#[test]
fn the_same_attacks_read_and_write_what_is_shown_as_a_whole() {
    let _machine = machine();
    let memory = [
        "--mode",
        "whole",
        "--only",
        "read",
        "write",
        "page-used-again",
        "race",
    ];
    let (code, json) = isolation(&memory);
    assert_eq!((code, &json["mode"]), (2, &"whole".into()));
    let got = got_through(&json);
    for name in [
        "read-before-attach",
        "read-between-windows",
        "write-read-only",
        "read-after-unmap",
        "write-after-unmap",
        "page-used-again-after-unmap",
        "race-for-an-unmapped-page",
    ] {
        assert!(
            got.iter().any(|(found, _)| *found == name),
            "{name}: {json}"
        );
    }
}

#[test]
fn with_no_front_end_there_is_nothing_to_see() {
    let _machine = machine();
    let (code, json) = isolation(&["--mode", "none", "--only", "read", "write", "sweep"]);
    assert_eq!((code, &json["mode"]), (0, &"none".into()));
    assert_eq!(got_through(&json), []);
}

#[test]
fn bench_compares_an_iommu_with_none_round_by_round() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let ended = run(&[
        "bench",
        "--iommu",
        "off,static,batch",
        "--sizes",
        "64",
        "--batches",
        "32",
        "--directions",
        "be-to-fe",
        "--ms",
        "20",
        "--samples",
        "2",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let results = json["results"].as_array().unwrap();
    results.iter().for_each(check_entry);
    for iommu in ["off", "static", "batch"] {
        assert!(
            results.iter().any(|entry| entry["iommu"] == iommu),
            "{json}"
        );
    }
    // A host so busy that no round was whole has no ratio to show.
    if results.iter().all(|entry| entry.get("distance").is_some()) {
        for entry in json["ratios"].as_array().into_iter().flatten() {
            assert_eq!(entry["over"], "off");
            assert!(entry["ratio"]["median"].as_f64().unwrap() > 0.0, "{entry}");
        }
    }
}

#[test]
fn a_sweep_over_the_windows_times_them_splits_the_time_and_measures_traffic() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("windows.json");
    let ended = run(&[
        "bench",
        "--sweep",
        "windows",
        "--samples",
        "1",
        "--ms",
        "50",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let windows = json["windows"].as_array().unwrap();
    let live: Vec<u64> = windows
        .iter()
        .map(|it| it["live"].as_u64().unwrap())
        .collect();
    assert_eq!(live, [16, 64, 256, 1024, 4096, 8192]);
    for entry in windows {
        for what in ["map", "unmap"] {
            let p50 = entry[what]["p50"]["median"].as_f64().unwrap();
            let p99 = entry[what]["p99"]["median"].as_f64().unwrap();
            assert!(0.0 < p50 && p50 <= p99, "{entry}");
        }
    }
    let split = &json["split"];
    let part = |name: &str| {
        split[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {json}"))
    };
    for name in ["total", "vmm", "wire", "window"] {
        assert!(part(name) > 0.0, "{split}");
    }
    let churn = json["churn"].as_array().unwrap();
    assert_eq!(churn.len(), 2);
    for entry in churn {
        assert_eq!(entry["corrupted"], 0);
        if let Some(ratio) = entry.get("ratio") {
            assert!(ratio["median"].as_f64().unwrap() > 0.0);
        }
    }
    let complete = churn.iter().all(|entry| entry.get("ratio").is_some());
    ended.expect_code(if complete { 0 } else { 1 });
}

#[test]
fn a_study_that_is_interrupted_leaves_no_file_and_no_vm() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("iso.json");
    let mut command = tool(&["isolation", "--json", &path]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    let name = dir.file("vhost-pci-");
    running.wait_for("two VMs", |_| processes_with(&name) == 2);
    running.signal("TERM");
    running.end().expect_code(143);
    assert_eq!(processes_with(&name), 0);
    assert!(dir.is_empty());
}

#[test]
fn bench_that_is_interrupted_leaves_no_file_and_no_vm() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let mut command = tool(&["bench", "--json", &path]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    let name = dir.file("vhost-pci-");
    running.wait_for("two VMs", |_| processes_with(&name) == 2);
    std::thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    running.end().expect_code(143);
    assert_eq!(processes_with(&name), 0);
    assert!(dir.is_empty());
}
