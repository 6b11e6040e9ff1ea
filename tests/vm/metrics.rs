//! `--metrics` and `top`: what a VM says of itself while it runs.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde_json::Value;

use super::{machine, start};
use crate::common::{Dir, PATIENCE, Running, run};

/// A connected pair whose VMs have these metrics.
fn pair_with(dir: &Dir, metrics: [&str; 2]) -> [Running; 2] {
    let socket = format!("socket={}", dir.file("s"));
    let mut vms = [["--vhost-pci", metrics[0]], ["--net", metrics[1]]].map(|[flag, metrics]| {
        let device = ["run", "--console", "output", flag, &socket];
        let more = ["--cmdline", "work=both ms=600000", "--metrics", metrics];
        start(&[&device[..], &more].concat())
    });
    for vm in &mut vms {
        vm.wait_for_stdout("connected");
    }
    vms
}

fn expect_clean_end(vms: [Running; 2]) {
    for vm in vms {
        vm.signal("TERM");
        let ended = vm.end();
        ended.expect_code(143);
        assert!(ended.stderr.is_empty(), "{ended:?}");
    }
}

fn connect(socket: &str) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_socket_gives_a_line_at_once_and_one_each_interval_to_every_reader() {
    let _machine = machine();
    let dir = Dir::new();
    let [back, front] = ["b", "f"].map(|name| dir.file(name));
    let targets = [&back, &front].map(|path| format!("unix:{path},interval=50"));
    let vms = pair_with(&dir, [&targets[0], &targets[1]]);
    for (socket, kind) in [(&back, "window"), (&front, "net")] {
        for mut lines in [connect(socket), connect(socket)].map(|s| BufReader::new(s).lines()) {
            let mut next =
                || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
            // The first comes at once, maybe right before the next.
            let (first, _, third) = (next(), next(), next());
            for line in [&first, &third] {
                assert_eq!(line["schema_version"], 1);
                assert_eq!(line["devices"][0]["kind"], kind);
                assert!(line["vcpus"][0]["exits"]["mmio_write"].as_u64().unwrap() > 0);
            }
            assert!(third["uptime_ms"].as_u64() > first["uptime_ms"].as_u64());
        }
    }
    let line = BufReader::new(connect(&back))
        .lines()
        .next()
        .unwrap()
        .unwrap();
    let line: Value = serde_json::from_str(&line).unwrap();
    let window = &line["devices"][0];
    assert_eq!(window["connections"], 1, "{window}");
    let classes = window["map"]["up_to_1024ns_doubling"].as_array().unwrap();
    let sum: u64 = classes.iter().map(|class| class.as_u64().unwrap()).sum();
    assert!(sum > 0 && window["map"]["count"] == sum, "{window}");
    assert_eq!(window["maps"], sum);

    let ended = run(&["top", &back, &front]);
    ended.expect_code(0);
    for text in [&*back, &*front, "vcpu0  exits/s", "window ", "net "] {
        assert!(ended.stdout.contains(text), "no {text} in {ended:?}");
    }
    expect_clean_end(vms);
    assert!(dir.is_empty(), "a socket is left");
    run(&["top", &back])
        .expect_code(1)
        .expect_one_line(&[&back, "--metrics"]);
}

#[test]
fn prometheus_is_answered_by_http_and_a_rude_client_harms_nobody() {
    let _machine = machine();
    let dir = Dir::new();
    let [back, front] = ["b", "f"].map(|name| dir.file(name));
    let targets = [&back, &front].map(|path| format!("unix:{path},format=prometheus"));
    let vms = pair_with(&dir, [&targets[0], &targets[1]]);
    // One that says nothing, one that never stops, and one that leaves.
    let silent = connect(&back);
    let _ = connect(&back).write_all(&[b'x'; 100_000]);
    drop(connect(&back));
    for (socket, sample) in [
        (&back, "vhost_pci_window_map_seconds_count{device="),
        (&front, "vhost_pci_net_updates_total{device="),
    ] {
        let mut stream = connect(socket);
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{head}"
        );
        for start in [
            sample,
            "vhost_pci_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"} ",
        ] {
            assert!(body.lines().any(|line| line.starts_with(start)), "{body}");
        }
    }
    silent.shutdown(Shutdown::Both).unwrap();
    expect_clean_end(vms);
    assert!(dir.is_empty(), "a socket is left");
}

#[test]
fn a_file_gets_lines_until_the_end_and_what_the_guest_reports() {
    let _machine = machine();
    let dir = Dir::new();
    let [back, front] = ["b", "f"].map(|name| dir.file(name));
    let socket = format!("socket={}", dir.file("s"));
    let vms = [("--vhost-pci", &back), ("--net", &front)].map(|(flag, file)| {
        let metrics = format!("{file},interval=20");
        let device = ["run", "--console", "output", flag, &socket];
        let more = ["--cmdline", "work=both count=30000", "--metrics", &metrics];
        start(&[&device[..], &more].concat())
    });
    for vm in vms {
        vm.end().expect_code(0);
    }
    for file in [&back, &front] {
        let text = fs::read_to_string(file).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert!(lines.len() > 1);
        let guest = &lines.last().unwrap()["guest"];
        assert_eq!((&guest["runs"], &guest["lost"]), (&1.into(), &0.into()));
        assert!(guest["rx_frames"].as_u64().unwrap() > 0, "{guest}");
    }
}

#[test]
fn both_vms_of_a_pair_can_be_watched_and_are_confined_as_asked_for() {
    let _machine = machine();
    // What the kernel calls a filter, and none.
    for (seccomp, mode) in [("on", 2), ("off", 0)] {
        let dir = Dir::new();
        let target = format!("unix:{},interval=50", dir.path().display());
        let flags = ["--metrics", &target, "--seccomp", seccomp];
        let mut running = start(&[&["pair", "--seconds", "600"], &flags[..]].concat());
        running.wait_for_stdout("front-end | guest: connected");
        let [back, front] = ["back.metrics", "front.metrics"].map(|name| dir.file(name));
        for (socket, kind) in [(&back, "window"), (&front, "net")] {
            let line = BufReader::new(connect(socket)).lines().next().unwrap();
            let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
            assert_eq!(line["devices"][0]["kind"], kind);
            let thread = &line["vcpus"][0]["tid"];
            let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap();
            let expected = format!("\nSeccomp:\t{mode}\n");
            assert!(status.contains(&expected), "{seccomp}: {status}");
        }
        run(&["top", &back, &front]).expect_code(0);
        running.signal("TERM");
        running.end().expect_code(143);
        assert!(dir.is_empty(), "a socket is left");
    }
}

#[test]
fn every_pair_of_a_bench_has_metrics_of_its_own() {
    let _machine = machine();
    let dir = Dir::new();
    let directory = dir.path().to_str().unwrap();
    let figures = [
        "--sizes",
        "64",
        "--batches",
        "32",
        "--samples",
        "1",
        "--ms",
        "20",
    ];
    let pairs = ["--directions", "be-to-fe", "--iommu", "off,static"];
    let watched = ["bench", "--metrics", directory];
    // On a busy host no sample may be good enough for a figure.
    run(&[&watched[..], &figures, &pairs].concat());
    for name in ["back", "front", "back-2", "front-2"] {
        let text = fs::read_to_string(dir.file(&format!("{name}.metrics"))).unwrap();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let guest = &last["guest"];
        let count = |field: &str| guest[field].as_u64().unwrap();
        assert!(
            count("tx_frames") + count("rx_frames") > 0,
            "{name}: {last}"
        );
        let bursts = [
            "tx_notified",
            "tx_suppressed",
            "rx_notified",
            "rx_suppressed",
        ];
        assert!(bursts.map(count).iter().sum::<u64>() > 0, "{name}: {last}");
    }
}

#[test]
fn a_full_disk_costs_the_metrics_and_not_the_vm() {
    let _machine = machine();
    let dir = Dir::new();
    let vms = pair_with(&dir, ["/dev/full", "/dev/full,interval=10"]);
    for mut vm in vms {
        vm.wait_for("the warning", |vm| vm.stderr().contains("--metrics"));
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(vm.is_running());
        vm.signal("TERM");
        let ended = vm.end();
        ended.expect_code(143).expect_one_line(&["--metrics"]);
    }
}

#[test]
fn a_place_where_metrics_cannot_go_is_one_line() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("no/such/place");
    for target in [path.clone(), format!("unix:{path}")] {
        let ended = run(&["run", "--console", "output", "--metrics", &target]);
        ended.expect_code(1).expect_one_line(&["--metrics", &path]);
    }
}
