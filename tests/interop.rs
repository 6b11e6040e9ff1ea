//! Peers that nobody here wrote: DPDK's testpmd at either end of the socket (docs/interop.md). These need /dev/kvm and Debian's `dpdk-dev`.
//!
//! Our guest sends a million frames; testpmd swaps the addresses and ports of each and sends it back; our guest checks every byte of all.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Dir, PATIENCE, Running, tool};

const FRAMES: u32 = 1_000_000;

/// How long one exchange may take: seconds on a quiet machine.
const EXCHANGE: Duration = Duration::from_secs(240);

/// What testpmd needs to receive long frames in buffers of 512 bytes and to send them from there.
const SMALL_BUFFERS: &[&str] = &[
    "--mbuf-size=512",
    "--enable-scatter",
    "--tx-offloads=0x8000",
    "--max-pkt-len=1518",
];

/// What testpmd needs to use two queue pairs.
const TWO_PAIRS: &[&str] = &["--rxq=2", "--txq=2"];

/// Which end of the socket is ours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Our {
    /// Our back-end serves DPDK's virtio-user.
    BackEnd,
    /// Our front-end is served by DPDK's vhost port.
    FrontEnd,
}

/// One exchange.
struct Run {
    our: Our,
    /// Keys of our device, beside the socket.
    keys: &'static str,
    /// Flags of our VM.
    flags: &'static [&'static str],
    /// Words for our guest.
    guest: &'static str,
    /// Keys of DPDK's device, beside the socket.
    dpdk: &'static str,
    testpmd: &'static [&'static str],
}

const fn back_end(dpdk: &'static str) -> Run {
    Run {
        our: Our::BackEnd,
        keys: "unsealed=on",
        flags: &[],
        guest: "",
        dpdk,
        testpmd: &[],
    }
}

const fn front_end(keys: &'static str) -> Run {
    Run {
        our: Our::FrontEnd,
        keys,
        flags: &[],
        guest: "",
        dpdk: "",
        testpmd: &[],
    }
}

/// A test for each list of exchanges, and all lists by the names of their tests.
macro_rules! exchanges {
    ($($name:ident: $runs:expr;)*) => {
        $(#[test] fn $name() { exchange(&$runs); })*
        const ALL: &[(&str, &[Run])] = &[$((stringify!($name), &$runs)),*];
    };
}

exchanges! {
    our_back_end_serves_virtio_user_over_split_rings: [
        back_end("packed_vq=0,mrg_rxbuf=0,in_order=0"),
        back_end("packed_vq=0,mrg_rxbuf=0,in_order=1"),
        back_end("packed_vq=0,mrg_rxbuf=1,in_order=0"),
        back_end("packed_vq=0,mrg_rxbuf=1,in_order=1"),
    ];
    our_back_end_serves_virtio_user_over_packed_rings: [
        back_end("packed_vq=1,mrg_rxbuf=0,in_order=0"),
        back_end("packed_vq=1,mrg_rxbuf=0,in_order=1"),
        back_end("packed_vq=1,mrg_rxbuf=1,in_order=0"),
        back_end("packed_vq=1,mrg_rxbuf=1,in_order=1"),
    ];
    our_back_end_serves_virtio_user_whose_frames_span_buffers: [
        Run { guest: "size=1518", testpmd: SMALL_BUFFERS, ..back_end("packed_vq=0,mrg_rxbuf=1,in_order=0") },
        // Without indirect tables: see docs/interop.md.
        Run { guest: "indirect=off size=1518", testpmd: SMALL_BUFFERS, ..back_end("packed_vq=1,mrg_rxbuf=1,in_order=0") },
        Run { guest: "indirect=off size=1518", testpmd: SMALL_BUFFERS, ..back_end("packed_vq=1,mrg_rxbuf=1,in_order=1") },
    ];
    // What is in the rings before DPDK's port is started is thrown away: see docs/interop.md.
    our_back_end_serves_two_queue_pairs_of_virtio_user: [
        Run { guest: "queues=2 delay_ms=1000", testpmd: TWO_PAIRS, ..back_end("queues=2,packed_vq=0,mrg_rxbuf=1,in_order=0") },
        Run { guest: "queues=2 delay_ms=1000", testpmd: TWO_PAIRS, ..back_end("queues=2,packed_vq=1,mrg_rxbuf=1,in_order=0") },
    ];
    our_back_end_sleeps_until_virtio_user_kicks: [
        Run { guest: "mode=irq", ..back_end("packed_vq=0,mrg_rxbuf=1,in_order=0") },
        Run { guest: "mode=irq", ..back_end("packed_vq=1,mrg_rxbuf=1,in_order=0") },
    ];
    dpdk_vhost_serves_our_front_end_over_split_rings: [
        front_end("in-order=on,event-idx=on"),
        front_end("in-order=on,event-idx=off"),
        front_end("in-order=off,event-idx=on"),
        front_end("in-order=off,event-idx=off"),
        front_end("mrg-rxbuf=off"),
    ];
    dpdk_vhost_serves_our_front_end_over_packed_rings: [
        front_end("packed=on,in-order=on,event-idx=on"),
        front_end("packed=on,in-order=on,event-idx=off"),
        front_end("packed=on,in-order=off,event-idx=on"),
        front_end("packed=on,in-order=off,event-idx=off"),
        front_end("packed=on,mrg-rxbuf=off"),
    ];
    dpdk_vhost_serves_our_front_end_whose_frames_span_buffers: [
        Run { guest: "size=1518 rx_buffer=512", ..front_end("mrg-rxbuf=on") },
        Run { guest: "size=1518 rx_buffer=512", ..front_end("packed=on,mrg-rxbuf=on") },
    ];
    dpdk_vhost_serves_our_front_end_from_indirect_tables: [
        Run { guest: "tx=indirect", ..front_end("indirect=on") },
        Run { guest: "tx=indirect", ..front_end("packed=on,indirect=on") },
    ];
    dpdk_vhost_serves_two_queue_pairs_of_our_front_end: [
        Run { guest: "queues=2", dpdk: "queues=2", testpmd: TWO_PAIRS, ..front_end("queues=2") },
        Run { guest: "queues=2", dpdk: "queues=2", testpmd: TWO_PAIRS, ..front_end("queues=2,packed=on") },
    ];
    our_front_end_sleeps_until_dpdk_vhost_calls: [
        Run { guest: "mode=irq", ..front_end("event-idx=on") },
        Run { guest: "mode=irq", ..front_end("packed=on,event-idx=on") },
        Run { guest: "mode=irq", ..front_end("event-idx=off") },
    ];
    // A thread of DPDK's that shares a core with one that polls acknowledges late. Packed rings: see docs/interop.md.
    dpdk_vhost_serves_our_front_end_behind_an_iommu: [
        Run { flags: &["--iommu", "range=64G"], dpdk: "iommu-support=1", ..front_end("iotlb-timeout=60000") },
    ];
}

/// What docs/interop.md says of [`ALL`].
fn table() -> String {
    let mut rows = String::new();
    for (test, runs) in ALL {
        for run in *runs {
            let ends = match run.our {
                Our::BackEnd => "back-end | virtio-user",
                Our::FrontEnd => "front-end | vhost",
            };
            let dpdk = [&[run.dpdk], run.testpmd].concat().join(" ");
            let ours = [&[run.keys], run.flags, &[run.guest]].concat().join(" ");
            let (ours, dpdk) = (ours.trim(), dpdk.trim());
            rows += &format!("| {ends} | {ours} | {dpdk} | `{test}` |\n");
        }
    }
    rows
}

#[test]
fn the_table_in_the_documentation_is_what_is_tested() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/interop.md");
    let text = fs::read_to_string(page).unwrap();
    let rows: String = text
        .lines()
        .filter(|line| line.contains("| virtio-user |") || line.contains("| vhost |"))
        .map(|line| format!("{line}\n"))
        .collect();
    let table = table();
    assert!(
        rows == table,
        "the rows of docs/interop.md should be\n{table}"
    );
}

/// One test at a time: guests that poll want both cores.
fn machine() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// testpmd with one port that sends back what it receives. It is killed when the test is done with it.
struct Testpmd(Child);

impl Testpmd {
    fn start(dir: &Dir, vdev: &str, more: &[&str]) -> Self {
        let log = fs::File::create(dir.file("testpmd.log")).unwrap();
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["--lcores", "0@1,1@1", "--no-huge", "-m", "128", "--no-pci"])
            .args(["--no-telemetry", "--vdev", vdev, "--"])
            .args(["--port-topology=loop", "--total-num-mbufs=8192"])
            .args(["--no-flush-rx", "-i"])
            .args(more)
            // What it keeps in files goes with the test.
            .env("RUNTIME_DIRECTORY", dir.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("dpdk-testpmd (Debian: apt-get install dpdk-dev): {error}")
        });
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
    let cmdline = format!("work=both timeout_ms=60000 {words}");
    let run = ["run", "-vv", "--console", "output", "--cpus", "affinity=0"];
    let all = [&run[..], device, &["--cmdline", &cmdline]].concat();
    Running::start(tool(&all))
}

/// Runs them one after the other.
#[track_caller]
fn exchange(runs: &[Run]) {
    let _machine = machine();
    for run in runs {
        let dir = Dir::new();
        let socket = dir.file("s");
        let device = format!("socket={socket},{}", run.keys);
        let comma = if run.dpdk.is_empty() { "" } else { "," };
        let keys = match run.dpdk.starts_with("queues=") {
            true => run.dpdk.to_owned(),
            false => format!("queues=1{comma}{}", run.dpdk),
        };
        // Each of two flows is half of them.
        let count = if keys.starts_with("queues=2") {
            FRAMES / 2
        } else {
            FRAMES
        };
        let guest = format!("count={count} {}", run.guest);
        let (vm, testpmd) = match run.our {
            Our::BackEnd => {
                let vm = vm(&["--vhost-pci", &device], &guest);
                wait_for_file(&socket);
                let vdev = format!("net_virtio_user0,path={socket},{keys}");
                (vm, Testpmd::start(&dir, &vdev, run.testpmd))
            }
            Our::FrontEnd => {
                let vdev = format!("net_vhost0,iface={socket},{keys}");
                let testpmd = Testpmd::start(&dir, &vdev, run.testpmd);
                wait_for_file(&socket);
                let flags = [&["--net", &device], run.flags].concat();
                (vm(&flags, &guest), testpmd)
            }
        };
        let ended = vm.end_within(EXCHANGE);
        drop(testpmd);
        let log = fs::read_to_string(dir.file("testpmd.log")).unwrap();
        let whole = format!(
            "received {FRAMES} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
        );
        let name = format!("{device} {keys}");
        assert!(ended.stdout.contains(&whole), "{name}: {ended:?}\n{log}");
        ended.expect_code(0);
    }
}

#[test]
fn virtio_user_whose_memory_could_be_cut_off_is_refused_with_a_reason_unless_it_is_asked_for() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let device = format!("socket={socket}");
    let mut vm = vm(&["--vhost-pci", &device], "");
    wait_for_file(&socket);
    let vdev = format!("net_virtio_user0,path={socket},queues=1");
    let _testpmd = Testpmd::start(&dir, &vdev, &[]);
    vm.wait_for("the refusal", |vm| {
        let log = vm.stderr();
        log.contains("not sealed against shrinking") && log.contains("unsealed=on")
    });
    assert!(!vm.stdout().contains("guest: connected"));
}
