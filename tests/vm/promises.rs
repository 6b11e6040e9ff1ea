//! What SPECIFICATION.md promises of a VM's process, as numbers. `--nocapture` shows what was measured.

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{kernel, machine, vm};
use crate::common::{Dir, tool};

/// Resident memory of a process that is not a guest's, its own or its peer's, in KiB.
fn beside_guests(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut guest = false;
    let mut sum = 0;
    for line in maps.lines() {
        let (first, rest) = line.split_once(' ').unwrap();
        if !first.ends_with(':') {
            guest = rest.contains("/memfd:vhost-pci");
        } else if first == "Rss:" && !guest {
            let number = rest.trim().trim_end_matches(" kB");
            sum += number.parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn a_vm_process_takes_less_than_16_mib_beside_its_guest() {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let work = "work=both ms=600000";
    let mut vms = ["--vhost-pci", "--net"].map(|flag| vm(flag, &socket, work));
    for vm in &mut vms {
        vm.wait_for_stdout("connected");
    }
    std::thread::sleep(Duration::from_millis(500));
    for (vm, name) in vms.iter().zip(["back-end", "front-end"]) {
        let kib = beside_guests(vm.pid());
        println!("{name}: {kib} KiB resident beside guest memory");
        assert!((1..16 << 10).contains(&kib), "{name}: {kib} KiB");
    }
}

#[test]
fn the_guest_runs_within_60_ms_of_exec_in_the_median_of_20_starts() {
    let _machine = machine();
    let dir = Dir::new();
    // mov dx, 0x3f8; mov al, '!'; out dx, al; mov al, 0; out 0xf4, al
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xb0, 0, 0xe6, 0xf4,
    ];
    let kernel = kernel(&dir, &code);
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let start = Instant::now();
            let mut child = tool(&["run", "--console", "output", "--memory", "size=256M"])
                .args(["--kernel", &kernel])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut byte = [0];
            child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
            let time = start.elapsed();
            assert_eq!(byte, *b"!");
            assert!(child.wait().unwrap().success());
            time
        })
        .collect();
    times.sort();
    let median = times[10];
    println!(
        "from exec to the guest's first byte: {:?} .. {median:?} .. {:?}",
        times[0], times[19]
    );
    assert!(median < Duration::from_millis(60), "{times:?}");
}
