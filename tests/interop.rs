//! Peers that nobody here wrote: DPDK's testpmd at either end of the socket (docs/interop.md). These need /dev/kvm and Debian's `dpdk-dev`.
//!
//! Our guest sends a million frames; testpmd swaps the addresses and ports of each and sends it back; our guest checks every byte of all.

#![cfg(feature = "interop")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{Dir, PATIENCE, Running, tool};

const FRAMES: u32 = 1_000_000;

/// DPDK's memory is not sealed; this has the kernel seal it, as the window wants it (docs/interop.md).
const SEAL: &str = include_str!("interop/seal.c");

/// One test at a time: guests that poll want both cores.
fn machine() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// testpmd with one port that sends back what it receives. It is killed when the test is done with it.
struct Testpmd(Child);

impl Testpmd {
    fn start(dir: &Dir, vdev: &str, more: &[&str], preload: Option<&str>) -> Self {
        let log = fs::File::create(dir.file("testpmd.log")).unwrap();
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["--lcores", "0@1,1@1", "--no-huge", "-m", "128", "--no-pci"])
            .arg(format!("--file-prefix=vp{}", std::process::id()))
            .args(["--no-telemetry", "--vdev", vdev, "--"])
            .args(["--port-topology=loop", "--total-num-mbufs=8192"])
            .args(["--no-flush-rx", "-i"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("dpdk-testpmd (Debian: dpdk-dev): {error}"));
        let script = "set fwd 5tswap retry\nset burst tx delay 1 retry 1000000000\nstart\n";
        let stdin = child.stdin.as_mut().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        Self(child)
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn wait_for_file(path: &str) {
    let start = Instant::now();
    while !Path::new(path).exists() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {path}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn vm(device: &[&str], words: &str) -> Running {
    let cmdline = format!("work=both count={FRAMES} timeout_ms=10000 {words}");
    let run = ["run", "-vv", "--console", "output", "--cpus", "affinity=0"];
    let all = [&run[..], device, &["--cmdline", &cmdline]].concat();
    Running::start(tool(&all))
}

#[track_caller]
fn expect_all_back(vm: Running, dir: &Dir) {
    let ended = vm.end();
    let log = fs::read_to_string(dir.file("testpmd.log")).unwrap();
    let whole = format!(
        "received {FRAMES} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    );
    assert!(ended.stdout.contains(&whole), "{ended:?}\n{log}");
    ended.expect_code(0);
}

fn sealing_library(dir: &Dir) -> String {
    let (source, library) = (dir.file("seal.c"), dir.file("seal.so"));
    fs::write(&source, SEAL).unwrap();
    let args = ["-shared", "-fPIC", "-o", &library, &source];
    assert!(Command::new("cc").args(args).status().unwrap().success());
    library
}

/// Our back-end VM, DPDK's virtio-user in front.
fn back_end(keys: &str, more: &[&str], words: &str) {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let library = sealing_library(&dir);
    let device = format!("socket={socket}");
    let vm = vm(&["--vhost-pci", &device], words);
    wait_for_file(&socket);
    let vdev = format!("net_virtio_user0,path={socket},queues=1,{keys}");
    let _testpmd = Testpmd::start(&dir, &vdev, more, Some(&library));
    expect_all_back(vm, &dir);
}

/// Our front-end VM, DPDK's vhost port behind.
fn front_end(vhost: &str, keys: &str, machine_args: &[&str], words: &str) {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let vdev = format!("net_vhost0,iface={socket},queues=1{vhost}");
    let _testpmd = Testpmd::start(&dir, &vdev, &[], None);
    wait_for_file(&socket);
    let device = format!("socket={socket}{keys}");
    let vm = vm(&[&["--net", &device], machine_args].concat(), words);
    expect_all_back(vm, &dir);
}

#[test]
fn our_back_end_serves_virtio_user_over_split_rings() {
    for merge in [0, 1] {
        for in_order in [0, 1] {
            let keys = format!("packed_vq=0,mrg_rxbuf={merge},in_order={in_order}");
            back_end(&keys, &[], "");
        }
    }
}

#[test]
fn our_back_end_serves_virtio_user_over_packed_rings() {
    for merge in [0, 1] {
        for in_order in [0, 1] {
            let keys = format!("packed_vq=1,mrg_rxbuf={merge},in_order={in_order}");
            back_end(&keys, &[], "");
        }
    }
}

#[test]
fn our_back_end_serves_virtio_user_whose_frames_span_buffers() {
    let small = ["--mbuf-size=512", "--enable-scatter"];
    let more = [&small[..], &["--tx-offloads=0x8000", "--max-pkt-len=1518"]].concat();
    back_end("packed_vq=0,mrg_rxbuf=1,in_order=0", &more, "size=1518");
}

#[test]
fn virtio_user_whose_memory_could_shrink_is_refused_with_a_reason() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let device = format!("socket={socket}");
    let mut vm = vm(&["--vhost-pci", &device], "");
    wait_for_file(&socket);
    let vdev = format!("net_virtio_user0,path={socket},queues=1");
    let _testpmd = Testpmd::start(&dir, &vdev, &[], None);
    vm.wait_for("the refusal", |vm| {
        vm.stderr().contains("not sealed against shrinking")
    });
    assert!(!vm.stdout().contains("guest: connected"));
}

#[test]
fn dpdk_vhost_serves_our_front_end_over_split_rings() {
    front_end("", "", &[], "");
    front_end("", ",mrg-rxbuf=on", &[], "size=1518");
}

#[test]
fn dpdk_vhost_serves_our_front_end_behind_an_iommu() {
    let iommu = ["--iommu", "range=64G"];
    front_end(",iommu-support=1", "", &iommu, "");
}
