//! A script plays testpmd: it notes its arguments and what it is told, and counts.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// Not written by the tests: a program cannot be started while a thread that forks has it open to write.
const PLAYER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/testpmd/player.sh");

/// The player, and where it writes.
fn player() -> (Programs, TempDir) {
    let directory = TempDir::new().unwrap();
    symlink(PLAYER, directory.path().join("dpdk-testpmd")).unwrap();
    let usual = std::env::var_os("PATH").unwrap();
    let path = std::env::join_paths(
        std::iter::once(directory.path().to_owned()).chain(std::env::split_paths(&usual)),
    );
    (Programs::find(Some(&path.unwrap())).unwrap(), directory)
}

fn config() -> Config {
    let core = sys::allowed_cores().unwrap()[0];
    Config {
        cores: [core, core],
        ring: 512,
        huge: false,
        length: Duration::from_millis(50),
        warmup: Duration::from_millis(1),
    }
}

const CASE: PeerCase = PeerCase {
    way: Way::BeToFe,
    size: 128,
    batch: 16,
};

fn lines(directory: &TempDir, name: &str) -> Vec<String> {
    let text = fs::read_to_string(directory.path().join(name)).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn is_running(pid: &str) -> bool {
    // A zombie has no command line.
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|text| !text.is_empty())
}

#[test]
fn the_sender_and_the_receiver_are_told_what_the_case_says_and_swap_ends_with_the_direction() {
    let (programs, directory) = player();
    let mut pair = Pair::start(&programs, PeerName::DpdkVhost, config(), None).unwrap();
    let sample = pair.sample(&CASE).unwrap();
    let other_way = PeerCase {
        way: Way::FeToBe,
        ..CASE
    };
    pair.sample(&other_way).unwrap();
    let back_again = PeerCase {
        way: Way::Echo,
        ..CASE
    };
    pair.sample(&back_again).unwrap();
    let commands = pair.commands();
    drop(pair);

    assert_eq!(sample.frames, 250_000);
    // It waited 50 ms at least, and some seconds at most.
    assert!(sample.mpps <= 5.0 && sample.mpps > 0.01, "{sample:?}");
    let told = |mode: &str, receives: bool| {
        let mut told = vec![format!("set fwd {mode}")];
        told.extend(["set burst 16", "set txpkts 128", "start"].map(str::to_owned));
        let looks = if receives { 2 } else { 0 };
        told.extend(vec!["show port stats 0".to_owned(); looks]);
        told.push("stop".to_owned());
        told
    };
    for (side, modes) in [
        (
            "back",
            [("txonly", false), ("rxonly", true), ("flowgen", true)],
        ),
        (
            "front",
            [("rxonly", true), ("txonly", false), ("macswap", false)],
        ),
    ] {
        let mut want = vec!["show port info 0".to_owned()];
        want.extend(
            modes
                .iter()
                .flat_map(|&(mode, receives)| told(mode, receives)),
        );
        want.extend(["stop", "quit"].map(str::to_owned));
        assert_eq!(lines(&directory, &format!("told.{side}")), want, "{side}");
    }
    for (args, command) in lines(&directory, "args").iter().zip(&commands) {
        assert!(command.ends_with(args.as_str()), "{command}");
    }
    let core = config().cores[0];
    for (command, device) in commands.iter().zip([
        "net_vhost0,iface=",
        "queues=1,queue_size=512,packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1 --",
    ]) {
        assert!(command.contains(device), "{command}");
        assert!(command.contains(&format!(" --lcores 0@{core},1@{core} ")));
        assert!(command.contains(" --no-huge ") && command.contains(" --txd=512 --rxd=512 "));
    }
}

#[test]
fn memif_has_a_server_at_the_back_end_and_zero_copy_where_it_was_asked_for() {
    let socket = Path::new("/run/s");
    let [server, client] = devices(PeerName::Memif, socket, 256).ends;
    assert!(server.contains("role=server,") && server.ends_with(",rsize=8"));
    assert!(client.contains("role=client,") && !client.contains("zero-copy"));
    let [server, client] = devices(PeerName::MemifZc, socket, 1024).ends;
    assert!(client.contains("role=client,zero-copy=yes,") && client.ends_with(",rsize=10"));
    assert!(!server.contains("zero-copy"));
}

#[test]
fn a_switch_listens_on_both_cores_for_two_ends_and_forwards_while_they_send() {
    let (programs, directory) = player();
    let mut pair = Pair::start(&programs, PeerName::DpdkSwitch, config(), None).unwrap();
    let sample = pair.sample(&CASE).unwrap();
    let (commands, inputs) = (pair.commands(), Rival::inputs(&pair, &CASE));
    drop(pair);

    assert!(
        sample.frames == 250_000 && sample.shares.is_none(),
        "{sample:?}"
    );
    let told = [
        "set fwd io",
        "set burst 16",
        "set txpkts 128",
        "start",
        "stop",
        "stop",
        "quit",
    ];
    assert_eq!(lines(&directory, "told.switch"), told);
    assert_eq!(inputs.len(), 3);
    assert_eq!(inputs[2], told[..4]);
    let args = lines(&directory, "args");
    let core = config().cores[0];
    assert!(args[0].starts_with(&format!("--lcores 0@({core},{core}),1@({core},{core}) ")));
    for (port, end) in [(0, 1), (1, 2)] {
        assert!(args[0].contains(&format!("--vdev net_vhost{port},iface=")));
        let path = format!("/s.{port},queues=1");
        assert!(
            args[0].contains(&path) && args[end].contains(&path),
            "{args:?}"
        );
        assert!(args[end].contains("net_virtio_user0,path="));
    }
    // As they are reported: the ends first.
    assert!(commands[2].ends_with(&args[0]), "{commands:?}");
    assert_eq!(lines(&directory, "pids").len(), 3);
}

#[test]
fn with_huge_pages_there_is_no_file_of_them() {
    let config = Config {
        huge: true,
        ..config()
    };
    let args = args(Place::Back, &["x".to_owned()], &config);
    assert!(args.contains(&"--in-memory".to_owned()) && !args.contains(&"--no-huge".to_owned()));
}

#[test]
fn none_is_left_when_the_pair_is_dropped() {
    let (programs, directory) = player();
    let pair = Pair::start(&programs, PeerName::Memif, config(), None).unwrap();
    let pids = lines(&directory, "pids");
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| is_running(pid)));
    let runtime = pair._directory.path().to_owned();
    drop(pair);
    assert!(!pids.iter().any(|pid| is_running(pid)));
    assert!(!runtime.exists());
}

#[test]
fn one_that_loses_its_input_ends_by_itself() {
    let (programs, directory) = player();
    let mut pair = Pair::start(&programs, PeerName::Memif, config(), None).unwrap();
    for one in [&mut pair.back, &mut pair.front] {
        drop(one.stdin.take());
        assert!(one.child.wait().unwrap().success());
    }
    for side in ["told.back", "told.front"] {
        assert_eq!(lines(&directory, side).last().unwrap(), "end of input");
    }
}

#[test]
fn one_that_cannot_start_says_why_and_the_other_does_not_stay() {
    let (programs, directory) = player();
    fs::write(directory.path().join("broken"), "role=client").unwrap();
    let error = Pair::start(&programs, PeerName::MemifZc, config(), None)
        .err()
        .unwrap();
    let text = crate::exit::explain(&error);
    assert!(
        text.contains("--peers memif-zc") && text.contains("EAL: no such driver"),
        "{text}"
    );
    assert!(!lines(&directory, "pids").iter().any(|pid| is_running(pid)));
}

#[test]
fn a_refused_line_and_a_sudden_end_are_errors() {
    let (programs, _directory) = player();
    let mut pair = Pair::start(&programs, PeerName::Memif, config(), None).unwrap();
    let mut refused = |batch| {
        let error = pair.sample(&PeerCase { batch, ..CASE }).unwrap_err();
        crate::exit::explain(&error)
    };
    assert!(refused(7).contains("does not know 'set burst 7'"));
    let text = refused(8);
    assert!(text.contains("dpdk-testpmd ended"), "{text}");
}

#[test]
fn what_is_not_installed_is_named_with_its_package() {
    let empty = TempDir::new().unwrap();
    let missing = |path: Option<&OsStr>| Programs::find(path).unwrap_err().to_string();
    for path in [None, Some(empty.path().as_os_str())] {
        let text = missing(path);
        assert!(
            text.contains("no dpdk-testpmd in PATH (Debian: apt install dpdk)"),
            "{text}"
        );
    }
    // A file that nobody may execute is no program.
    fs::write(empty.path().join("dpdk-testpmd"), "").unwrap();
    assert!(missing(Some(empty.path().as_os_str())).contains("dpdk-testpmd"));
}

#[test]
fn counters_are_found_in_what_testpmd_writes() {
    let text = "\n  ####### NIC statistics for port 0  ####\n  RX-packets: 984352     RX-missed: 0          RX-bytes:  62998528\n";
    assert_eq!(counter(text, "RX-packets:"), Some(984_352));
    assert_eq!(counter(text, "TX-packets:"), None);
    assert_eq!(counter("RX-packets: many", "RX-packets:"), None);
}

fn look(frames: u64, at_ms: u64, took_us: u64, cpu_ms: [u64; 2]) -> Look {
    let at = *START_OF_TIME + Duration::from_millis(at_ms);
    Look {
        frames,
        at,
        took: Duration::from_micros(took_us),
        cpu: [cpu_ms[0], cpu_ms[1], 0].map(|ms| ms * 1_000_000),
        cpu_at: at,
    }
}

static START_OF_TIME: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);

#[test]
fn the_rate_is_what_the_receiver_counted_in_the_time_between_two_looks() {
    let first = look(5_000_000, 10, 100, [7, 3]);
    let sample = first.until(&look(9_000_000, 110, 100, [107, 93]), Way::BeToFe);
    assert!(
        (sample.mpps - 40.0).abs() < 1e-9 && sample.timed,
        "{sample:?}"
    );
    let near = |shares: Option<[f64; 2]>, want: [f64; 2]| {
        let shares = shares.unwrap();
        (shares[0] - want[0]).abs() < 1e-9 && (shares[1] - want[1]).abs() < 1e-9
    };
    assert!(near(sample.shares, [1.0, 0.9]));
    assert!((sample.busy_cores - 1.9).abs() < 1e-9);
    // Back-end first, whichever end sent.
    let sample = first.until(&look(9_000_000, 110, 100, [107, 93]), Way::FeToBe);
    assert!(near(sample.shares, [0.9, 1.0]));
    // An answer that took long leaves open when it was counted; and nothing is no rate.
    assert!(
        !first
            .until(&look(9_000_000, 110, 5000, [107, 93]), Way::BeToFe)
            .timed
    );
    assert!(
        !first
            .until(&look(5_000_000, 110, 100, [107, 93]), Way::BeToFe)
            .timed
    );
}
