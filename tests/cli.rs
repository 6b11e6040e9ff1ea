//! The command line: what it refuses, what it explains, and `doctor`. No VM is booted.

use crate::common::{Dir, Running, run, tool};

#[test]
fn each_wrong_argument_is_one_line_that_names_it_and_exit_code_3() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["run", "--memory", "size=12Q"], &["--memory", "size=12Q"]),
        (
            &["run", "--memory", "sise=1G"],
            &["--memory", "'sise'", "size, hugepages, prefault"],
        ),
        (
            &["run", "--memory", "size=1G,size=2G"],
            &["--memory", "'size'", "twice"],
        ),
        (&["run", "--memory", "size=0"], &["--memory", "size=0"]),
        (
            &["run", "--memory", "size"],
            &["--memory", "'size'", "key=value"],
        ),
        (&["run", "--memory", "size="], &["--memory", "size="]),
        (
            &["run", "--memory", "hugepages=3M"],
            &["--memory", "hugepages=3M", "off, 2M or 1G"],
        ),
        (
            &["run", "--memory", "prefault=1"],
            &["--memory", "prefault=1", "on or off"],
        ),
        (
            &["run", "--memory", "size=64M,dma=16Q"],
            &["--memory", "dma=16Q"],
        ),
        (
            &["run", "--memory", "size=64M,dma=4097"],
            &["--memory", "dma=4097", "a multiple of 4096 bytes"],
        ),
        (
            &["pair", "--memory", "size=64M,hugepages=2M,dma=1M"],
            &["--memory", "dma=1M", "a multiple of 2097152 bytes"],
        ),
        (
            &["run", "--cpus", "count=0"],
            &["--cpus", "count=0", "1 to 8"],
        ),
        (
            &["run", "--cpus", "affinity=99999"],
            &["--cpus", "affinity=99999"],
        ),
        (
            &["run", "--net", "listen=on"],
            &["--net", "'socket'", "'tap'"],
        ),
        (&["run", "--net", "tap=a,socket=b"], &["--net", "'socket'"]),
        (&["run", "--net", "tap=a/b"], &["--net", "tap=a/b"]),
        (&["run", "--net", "tap=a", "--iommu"], &["tap=a", "--iommu"]),
        (&["run", "--net", "socket=x,mac=zz"], &["--net", "mac=zz"]),
        (
            &["run", "--net", "socket=x,size=100"],
            &["--net", "size=100", "power of two"],
        ),
        (
            &["run", "--net", "socket=x,port=1"],
            &[
                "--net",
                "'port'",
                "socket, listen, mac, size, queues, packed",
            ],
        ),
        (
            &["run", "--vhost-pci", "socket=x,window=7"],
            &["--vhost-pci", "window=7"],
        ),
        (
            &["run", "--vhost-pci", "socket=x,uuid=1"],
            &["--vhost-pci", "uuid=1"],
        ),
        (
            &["run", "--vhost-pci", "socket=x,quues=1"],
            &[
                "--vhost-pci",
                "'quues'",
                "socket, listen, window, queues, uuid, miss-timeout",
            ],
        ),
        (
            &["run", "--net", "socket=x", "--vhost-pci", "socket=x"],
            &["share the socket x"],
        ),
        (
            &["run", "--console", "vga"],
            &["--console", "vga", "stdio, output"],
        ),
        (&["run", "--kernl", "x"], &["--kernl"]),
        (&["run", "--control-fd", "99"], &["--control-fd 99"]),
        (&["pair", "--size", "59"], &["--size", "59", "60..=65549"]),
        (
            &["pair", "--direction", "up"],
            &["--direction", "up", "be-to-fe, fe-to-be, both, round-trip"],
        ),
        (&["pair", "--cores", "0:0"], &["--cores", "0:0"]),
        (
            &["pair", "--queue-size", "3"],
            &["--queue-size", "3", "power of two"],
        ),
        (
            &["pair", "--queue-size", "32769", "--ring", "packed"],
            &["--queue-size", "32769", "1 to 32768"],
        ),
        (
            &["pair", "--ring", "round"],
            &["--ring", "round", "split, packed"],
        ),
        (
            &["pair", "--tx", "indirect", "--indirect", "off"],
            &["--tx indirect", "--indirect on"],
        ),
        (
            &["pair", "--rx-buffer", "127"],
            &["--rx-buffer", "127", "128..=1530"],
        ),
        (&["pair", "--count", "0"], &["--count", "0"]),
        (
            &["pair", "--seccomp", "maybe"],
            &["--seccomp", "maybe", "on, log, off"],
        ),
        (
            &["bench", "--seccomp", "maybe"],
            &["--seccomp", "maybe", "on, log, off"],
        ),
        (&["pair", "--metrics", "unix:"], &["--metrics", "unix:PATH"]),
        (
            &["bench", "--metrics", "d,interval=9"],
            &["--metrics", "interval=9"],
        ),
        (
            &["isolation", "--metrics", "d,interval=9"],
            &["--metrics", "interval=9"],
        ),
        (
            &["pair", "--capture", "frames=5"],
            &["--capture", "back=FILE or front=FILE"],
        ),
        (
            &["pair", "--linux", "--capture", "back=f"],
            &["--capture", "--linux"],
        ),
        (
            &["run", "--capture", "f,count=5"],
            &["--capture", "'count'"],
        ),
        (&["bench", "--sizes", "64,65550"], &["--sizes", "65550"]),
        (&["bench", "--batches", "257"], &["--batches", "257"]),
        (
            &["bench", "--directions", "sideways"],
            &["--directions", "sideways"],
        ),
        (&["bench", "--samples", "0"], &["--samples", "0"]),
        (
            &["bench", "--ring", "packed,split", "--queue-size", "768"],
            &["--queue-size", "768", "split"],
        ),
        (&["bench", "--in-order", "maybe"], &["--in-order", "maybe"]),
        (
            &["bench", "--sweep", "rings", "--quick"],
            &["--sweep", "--quick"],
        ),
        (&["bench", "--sweep", "sizes"], &["--sweep", "sizes"]),
        (&["run", "--iommu", "range=3G"], &["--iommu", "range=3G"]),
        (
            &["run", "--iommu", "size=1"],
            &["--iommu", "'size'", "range, mappings, domains, bypass"],
        ),
        (
            &["run", "--net", "socket=x,iotlb-timeout=0"],
            &["--net", "iotlb-timeout=0", "1 to 60000"],
        ),
        (
            &["run", "--vhost-pci", "socket=x,miss-timeout=x"],
            &["--vhost-pci", "miss-timeout=x", "0 to 60000"],
        ),
        (
            &["pair", "--iommu", "manual"],
            &["--iommu", "manual", "off, static, dynamic, batch"],
        ),
        (&["pair", "--iommu-back", "yes"], &["--iommu-back", "yes"]),
        (&["bench", "--iommu", "off,on"], &["--iommu", "on"]),
        (
            &["bench", "--sweep", "windows", "--iommu", "dynamic"],
            &["--sweep windows", "--iommu static"],
        ),
        (
            &["bench", "--sweep", "windows", "--ring", "split,packed"],
            &["--sweep windows", "one kind of rings"],
        ),
        (
            &["isolation", "--mode", "half"],
            &["--mode", "half", "none, whole, windows"],
        ),
        (&["isolation", "--rounds", "0"], &["--rounds", "0"]),
        (
            &["isolation", "--only", "tickle"],
            &["--only tickle", "no such attack", "read-after-unmap"],
        ),
        (&["isolation", "--cores", "0:0"], &["--cores", "0:0"]),
        (
            &["bench", "--peers", "ovs"],
            &["--peers", "ovs", "dpdk-vhost, dpdk-switch"],
        ),
        (
            &["bench", "--peer-ring", "100"],
            &["--peer-ring", "100", "power of two"],
        ),
        (
            &[
                "bench",
                "--peers",
                "memif",
                "--directions",
                "both,round-trip",
            ],
            &["--peers", "be-to-fe"],
        ),
        (
            &["bench", "--vs", "--mode irq"],
            &["--vs '--mode irq'", "--mode cannot differ"],
        ),
        (
            &[
                "bench",
                "--ring",
                "split,packed",
                "--vs",
                "--queue-size 512",
            ],
            &["--vs", "one of --ring"],
        ),
        (&["plot", "x.json"], &["--out"]),
        (&["bench", "--memory", "sise=1"], &["--memory", "'sise'"]),
        (&["launch"], &["launch"]),
    ];
    for (args, parts) in cases {
        let ended = run(args);
        ended.expect_code(3).expect_one_line(parts);
        assert!(ended.stdout.is_empty(), "{ended:?}");
    }
}

#[test]
fn no_arguments_at_all_are_answered_with_the_help() {
    let ended = run(&[]);
    ended.expect_code(3);
    assert!(ended.stderr.contains("Usage:"), "{ended:?}");
}

#[test]
fn the_help_names_every_key_and_its_default() {
    let help = run(&["run", "--help"]);
    help.expect_code(0);
    for key in [
        "size=SIZE",
        "[default: 256M]",
        "hugepages=off|2M|1G",
        "prefault=on|off",
        "count=N",
        "affinity=CORE:CORE",
        "socket=PATH",
        "listen=on|off",
        "mac=ADDRESS",
        "size=N",
        "packed=on|off",
        "in-order=on|off",
        "event-idx=on|off",
        "mrg-rxbuf=on|off",
        "indirect=on|off",
        "[default: 256]",
        "window=SIZE",
        "[default: 64G]",
        "queues=N",
        "[default: 32]",
        "uuid=UUID",
        "iotlb-timeout=MS",
        "[default: 1000]",
        "miss-timeout=MS",
        "[default: 50]",
        "--iommu",
        "range=SIZE",
        "mappings=N",
        "[default: 16384]",
        "domains=N",
        "bypass=on|off",
        "--kernel",
        "[default: builtin]",
        "--initrd",
        "--cmdline",
        "--console",
        "[default: stdio]",
        "--metrics",
        "interval=MS",
        "format=lines|prometheus",
        "--capture",
        "frames=N",
        "[default: 1000]",
        "snaplen=BYTES",
        "--seccomp",
        "Exit status:",
    ] {
        assert!(help.stdout.contains(key), "no {key} in:\n{}", help.stdout);
    }
    assert!(!help.stdout.contains("control-fd"), "{}", help.stdout);
}

#[test]
fn every_command_explains_its_flags_and_exit_codes() {
    let cases: &[(&str, &[&str])] = &[
        (
            "pair",
            &[
                "--direction",
                "--count",
                "--seconds",
                "--size",
                "--batch",
                "--mode",
                "--cores",
                "--ring",
                "--in-order",
                "--event-idx",
                "--mrg-rxbuf",
                "--indirect",
                "--tx",
                "--rx-buffer",
                "--iommu",
                "--iommu-back",
                "--capture",
                "back=FILE",
                "--metrics",
                "unix:DIR",
                "--seccomp",
            ],
        ),
        (
            "bench",
            &[
                "--quick",
                "--sizes",
                "--batches",
                "--directions",
                "--samples",
                "--ms",
                "--mode",
                "--queue-size",
                "--memory",
                "--cores",
                "--json",
                "--metrics",
                "--seccomp",
                "--ring",
                "--in-order",
                "--event-idx",
                "--mrg-rxbuf",
                "--indirect",
                "--sweep",
                "--iommu",
                "--iommu-back",
                "--peers",
                "--peer-ring",
                "--vs",
            ],
        ),
        (
            "isolation",
            &["--mode", "--rounds", "--only", "--cores", "--json"],
        ),
        ("plot", &["REPORT.json", "--out", "--html"]),
        ("top", &["SOCKET"]),
        ("doctor", &["--json"]),
    ];
    for (command, flags) in cases {
        let help = run(&[command, "--help"]);
        help.expect_code(0);
        for text in flags.iter().chain(&["Exit status:", "128+n"]) {
            assert!(help.stdout.contains(text), "no {text} in:\n{}", help.stdout);
        }
    }
    run(&["--version"]).expect_code(0);
}

#[test]
fn a_json_file_that_cannot_be_written_is_said_before_anything_is_measured() {
    let dir = Dir::new();
    let path = dir.file("no/such/out.json");
    let ended = run(&["bench", "--json", &path]);
    ended.expect_code(1).expect_one_line(&["--json", &path]);
    let path = dir.path().to_str().unwrap();
    let ended = run(&["bench", "--json", path]);
    ended.expect_code(1).expect_one_line(&["--json", path]);
}

#[test]
fn a_peer_that_is_not_installed_is_said_before_anything_is_measured() {
    let dir = Dir::new();
    let json = dir.file("out.json");
    let mut command = tool(&["bench", "--peers", "dpdk-vhost", "--json", &json]);
    command.env("PATH", dir.path());
    let ended = Running::start(command).end();
    ended
        .expect_code(1)
        .expect_one_line(&["--peers", "dpdk-testpmd", "apt install dpdk"]);
    assert!(ended.stdout.is_empty() && dir.is_empty(), "{ended:?}");
}

#[test]
fn a_report_that_is_missing_or_none_is_one_line() {
    let dir = Dir::new();
    let (missing, foreign) = (dir.file("missing.json"), dir.file("foreign.json"));
    std::fs::write(&foreign, "{\"schema_version\": 1}").unwrap();
    let out = dir.file("out.svg");
    run(&["plot", &missing, "--out", &out])
        .expect_code(1)
        .expect_one_line(&[&missing]);
    run(&["plot", &foreign, "--out", &out])
        .expect_code(3)
        .expect_one_line(&[&foreign, "no report"]);
    assert!(!std::path::Path::new(&out).exists());
}

#[test]
fn doctor_looks_at_everything_and_says_how_to_mend_what_is_wrong() {
    let ended = run(&["doctor"]);
    assert!([0, 1].contains(&ended.code()), "{ended:?}");
    let mut missing = false;
    for line in ended.stdout.lines() {
        let state = line.split_whitespace().next().unwrap();
        assert!(["ok", "slow", "missing"].contains(&state), "{line}");
        assert_eq!(state != "ok", line.contains(" -> "), "{line}");
        missing |= state == "missing";
    }
    assert_eq!(ended.code() == 1, missing, "{ended:?}");

    let json = run(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["schema_version"], 1);
    let checks = json["checks"].as_array().unwrap();
    assert_eq!(checks.len(), ended.stdout.lines().count());
    let names: Vec<&str> = checks
        .iter()
        .filter_map(|check| check["name"].as_str())
        .collect();
    for name in ["kvm", "cores", "huge pages", "memfd sealing", "open files"] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
}
