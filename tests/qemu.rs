//! A stock Linux in a stock QEMU, and behind its network device a guest of ours (docs/interop.md). These tests need /dev/kvm, Debian's
//! `qemu-system-x86`, and what tests/common/linux.rs names. QEMU runs under TCG: it needs no KVM that can nest.

mod migration;

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::linux::{self, Kernel};
use crate::common::{Collected, Dir, Running, tool};

/// Bytes that go to the echo port and back.
const SENT: u64 = 1 << 20;
/// Bytes that come from the source port.
const PATTERN: u64 = 1_500_000;
/// Memory as the window wants it.
const SEALED: &str = "memory-backend-memfd";
/// Frames each way, at least.
const FRAMES: u64 = 1000;

/// VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4.
const OFFLOADS: [usize; 4] = [0, 1, 7, 11];
/// VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MQ, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED.
const MRG_RXBUF: usize = 15;
const MQ: usize = 22;
const ACCESS_PLATFORM: usize = 33;
const RING_PACKED: usize = 34;

/// What the Linux guest does. It says each figure in a line of its own, and waits for a line before it goes. `again`: its driver leaves the device
/// between the pings and the rest, and sets it up anew. `mq`: each of two processors has a queue pair, and the first does the pings, the second the rest.
fn script(again: bool, mq: bool) -> String {
    let up = "ip addr add 10.0.0.2/24 dev eth0
        ip link set eth0 up";
    let again = if again {
        format!("rmmod virtio_net\ninsmod /modules/virtio_net.ko\n{up}")
    } else {
        String::new()
    };
    let (first, last) = if mq {
        ("taskset 1", "taskset 2")
    } else {
        ("", "")
    };
    let services = format!(
        "dd if=/dev/urandom of=/sent bs=1024 count={} 2>/dev/null
        {last} nc 10.0.0.1 7 </sent >/back
        {last} nc 10.0.0.1 19 </dev/null >/pattern
        {last} nc 10.0.0.1 9 </sent
        echo result discard $?",
        SENT / 1024
    );
    format!(
        "echo result features $(cat /sys/class/net/eth0/device/features)
        ip link set lo up
        {up}
        echo stage up
        {first} ping -c 20 -i 0.2 10.0.0.1 | sed 's/^/ping: /'
        echo stage pinged
        {again}
        {services}
        for file in sent back pattern; do echo result $file $(sha256sum </$file) $(wc -c </$file); done
        cd /sys/class/net/eth0/statistics
        for name in *; do echo result $name $(cat $name); done
        echo stage done
        read line"
    )
}

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

/// What one pairing is made of.
#[derive(Clone, Copy, Debug, Default)]
struct Pairing {
    packed: bool,
    mergeable: bool,
    /// QEMU waits for the back-end, not the other way round.
    qemu_listens: bool,
    /// QEMU's machine has an IOMMU, and its device is behind it.
    iommu: bool,
    /// Checksums and the segmentation of TCP are left to the other side.
    offload: bool,
    /// QEMU's guest has two processors, and two queue pairs for them.
    mq: bool,
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

/// A test's place: the kernel, the disk, the socket.
struct Place {
    _machine: MutexGuard<'static, ()>,
    kernel: Kernel,
    dir: Dir,
}

impl Place {
    fn new(again: bool, mq: bool) -> Self {
        Self::with(&script(again, mq))
    }

    /// With another script for QEMU's guest.
    fn with(script: &str) -> Self {
        let _machine = machine();
        let kernel = linux::kernel();
        let dir = Dir::new();
        kernel.initrd(dir.path(), script);
        Self {
            _machine,
            kernel,
            dir,
        }
    }

    /// Our VM, whose device connects or waits as QEMU does not, with the control channel on its standard input.
    fn back_end(&self, qemu_listens: bool, words: &str) -> (Running, Control) {
        self.back_end_at("s", &format!("listen={}", on(!qemu_listens)), words)
    }

    /// The same at a socket of this name, with these keys.
    fn back_end_at(&self, name: &str, keys: &str, words: &str) -> (Running, Control) {
        let device = format!("socket={},{keys}", self.dir.file(name));
        let args = ["run", "-v", "--console", "output", "--control-fd", "0"];
        let more = ["--vhost-pci", &device, "--cmdline", words];
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stdin = Stdio::from(OwnedFd::from(theirs));
        let vm = Running::with_stdin(tool(&[&args[..], &more].concat()), stdin);
        let control = Control {
            records: Collected::new(ours.try_clone().unwrap()),
            socket: ours,
        };
        (vm, control)
    }

    /// QEMU, with memory of this kind. Without `vectors=0` the one in Debian 12 ends with a signal (docs/interop.md).
    fn qemu(&self, pairing: Pairing, memory: &str) -> Qemu {
        let emulator = Command::new("qemu-system-x86_64");
        self.qemu_at("s", emulator, pairing, memory, &[])
    }

    /// The same at a socket of this name, run by this command with more arguments.
    fn qemu_at(
        &self,
        name: &str,
        mut command: Command,
        pairing: Pairing,
        memory: &str,
        more: &[String],
    ) -> Qemu {
        let Pairing {
            packed,
            mergeable,
            qemu_listens,
            iommu,
            offload,
            mq,
        } = pairing;
        let pairs = if mq { "2" } else { "1" };
        let server = if qemu_listens { ",server=on" } else { "" };
        let chardev = format!("socket,id=c,path={}{server}", self.dir.file(name));
        let mut net = format!(
            "virtio-net-pci,netdev=n,romfile=,vectors=0,packed={},mrg_rxbuf={},mq={}",
            on(packed),
            on(mergeable),
            on(mq)
        );
        for key in [
            "csum",
            "guest_csum",
            "host_tso4",
            "host_tso6",
            "guest_tso4",
            "guest_tso6",
        ] {
            let _ = write!(net, ",{key}={}", on(offload));
        }
        // On a busy machine emulated interrupts of a timer come later than the kernel expects when it tries them.
        let mut append = "console=ttyS0 quiet panic=-1 no_timer_check".to_owned();
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot", "-accel", "tcg"])
            .args(["-machine", "q35,memory-backend=m", "-cpu", "max"])
            .args(["-smp", pairs, "-m", "256", "-object"])
            .arg(format!("{memory},id=m,size=256M,share=on"));
        if iommu {
            command.args(["-device", "intel-iommu,intremap=off,device-iotlb=on"]);
            net += ",iommu_platform=on,ats=on,disable-legacy=on";
            append += " intel_iommu=on iommu.strict=1";
        }
        command
            .args(["-chardev", &chardev, "-netdev"])
            .arg(format!("vhost-user,id=n,chardev=c,queues={pairs}"))
            .args(["-device", &net])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .args(["-initrd", &self.dir.file("initrd"), "-append", &append])
            .args(more);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stdin = Stdio::from(OwnedFd::from(theirs));
        Qemu {
            pairing,
            running: Running::with_stdin(command, stdin),
            input: ours,
        }
    }

    /// The checksum of what the source port sends, as docs/bare-metal.md says, made by the host's own tool.
    fn pattern_sum(&self) -> String {
        let mix = |x: u64| {
            let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        };
        let bytes: Vec<u8> = (0..PATTERN / 8)
            .flat_map(|i| mix(i).to_le_bytes())
            .collect();
        let path = self.dir.file("pattern");
        fs::write(&path, bytes).unwrap();
        let output = Command::new("sha256sum").arg(&path).output().unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        line.split(' ').next().unwrap().to_owned()
    }
}

/// The control channel of our guest.
struct Control {
    socket: UnixStream,
    records: Collected,
}

impl Control {
    fn send(&mut self, line: &str) {
        self.socket
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    /// The first record that has `part`.
    #[track_caller]
    fn record(&self, vm: &mut Running, part: &str) -> String {
        let find = || {
            let text = self.records.text();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let mut lines = whole.lines();
            lines.find(|line| line.contains(part)).map(str::to_owned)
        };
        vm.wait_for(part, |_| find().is_some());
        find().unwrap()
    }
}

/// A number in a record.
#[track_caller]
fn number(record: &str, field: &str) -> u64 {
    let (_, rest) = record
        .split_once(&format!("\"{field}\":"))
        .unwrap_or_else(|| panic!("no {field} in {record}"));
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
    rest[..end].parse().unwrap()
}

struct Qemu {
    pairing: Pairing,
    running: Running,
    input: UnixStream,
}

impl Qemu {
    /// Waits until the guest has done everything; it is still there then.
    #[track_caller]
    fn traffic(&mut self) {
        for stage in ["up", "pinged", "done"] {
            let line = format!("stage {stage}");
            self.running.wait_for_stdout(&line);
        }
    }

    /// Lets the guest power off, and looks at what it said.
    #[track_caller]
    fn end(mut self, pattern: &str) {
        self.input.write_all(b"\n").unwrap();
        let ended = self.running.end();
        ended.expect_code(0);
        let result = |name: &str| {
            let mut lines = ended.stdout.lines().map(str::trim_end);
            let found = lines.find_map(|line| line.strip_prefix("result ")?.strip_prefix(name));
            let text = found.unwrap_or_else(|| panic!("no {name}: {ended:?}"));
            text.trim().to_owned()
        };
        let features = result("features ");
        let pairing = self.pairing;
        let rings = [
            (MRG_RXBUF, pairing.mergeable),
            (MQ, pairing.mq),
            (ACCESS_PLATFORM, pairing.iommu),
            (RING_PACKED, pairing.packed),
        ];
        let offloads = OFFLOADS.map(|bit| (bit, pairing.offload));
        for (bit, want) in rings.into_iter().chain(offloads) {
            let want = if want { b'1' } else { b'0' };
            assert_eq!(features.as_bytes()[bit], want, "bit {bit}: {features}");
        }
        let pings = "20 packets transmitted, 20 packets received, 0% packet loss";
        assert!(ended.stdout.contains(pings), "{ended:?}");
        let mut want = String::new();
        let sent = result("sent ");
        let _ = write!(want, "{pattern} - {PATTERN}");
        assert!(sent.ends_with(&format!(" - {SENT}")), "{ended:?}");
        assert_eq!(result("back "), sent, "{ended:?}");
        assert_eq!(result("pattern "), want, "{ended:?}");
        assert_eq!(result("discard "), "0", "{ended:?}");
        for direction in ["rx", "tx"] {
            let count =
                |what: &str| -> u64 { result(&format!("{direction}_{what} ")).parse().unwrap() };
            // Of those that leave segmentation to us, one is dozens.
            let least = match pairing.offload && direction == "tx" {
                true => FRAMES / 20,
                false => FRAMES,
            };
            assert!(count("packets") >= least, "{ended:?}");
            assert_eq!((count("errors"), count("dropped")), (0, 0), "{ended:?}");
        }
    }
}

/// Our guest answers one QEMU after the other, over the same device, which each guest's driver sets up twice.
#[track_caller]
fn served(words: &str, pairings: &[Pairing]) {
    let mq = pairings[0].mq;
    let place = Place::new(true, mq);
    let pattern = place.pattern_sum();
    let words = format!("work=respond addr=10.0.0.1/24 count={PATTERN} {words}");
    let listens = pairings[0].qemu_listens;
    let (mut vm, control) = place.back_end(listens, &words);
    if !listens {
        vm.wait_for("its socket", |_| Path::new(&place.dir.file("s")).exists());
    }
    for (nth, &pairing) in (1..).zip(pairings) {
        let mut qemu = place.qemu(pairing, SEALED);
        qemu.traffic();
        qemu.end(&pattern);
        vm.wait_for("the peer's leave", |vm| {
            vm.stdout().matches("guest: the peer is gone").count() == 2 * nth
        });
    }
    let records = control.records.text();
    let results: Vec<&str> = records
        .lines()
        .filter(|line| line.contains("\"work\":\"respond\""))
        .collect();
    assert_eq!(results.len(), 2 * pairings.len(), "{records}");
    let sum = |field| -> u64 { results.iter().map(|record| number(record, field)).sum() };
    let each = u64::try_from(pairings.len()).unwrap();
    assert_eq!((sum("connections"), sum("dropped")), (3 * each, 0));
    assert_eq!(sum("rx_bytes"), 2 * SENT * each);
    assert_eq!(sum("tx_bytes"), (SENT + PATTERN) * each);
    assert!(sum("tx_frames") >= FRAMES * each, "{records}");
    // The services' frames at least, and of one pair none.
    let others = sum("other_pairs");
    assert_eq!(others > 0, mq, "{records}");
    assert!(!mq || others >= FRAMES / 2 * each, "{records}");
    let left = pairings.iter().filter(|pairing| pairing.offload).count() as u64;
    assert!(sum("rx_frames") >= FRAMES * (each - left), "{records}");
    // A partial checksum is completed here and then verified: where it was wrong, nothing would have arrived.
    for frames in ["partial", "large"] {
        let seen = sum(frames);
        assert_eq!(seen > 0, left > 0, "{records}");
        assert!(seen >= FRAMES / 50 * left, "{records}");
    }
}

#[test]
fn a_qemu_guest_leaves_checksums_and_segmentation_to_our_back_end() {
    let offload = Pairing {
        mergeable: true,
        offload: true,
        ..Pairing::default()
    };
    let packed = Pairing {
        packed: true,
        ..offload
    };
    // Its receive buffers are then chains of 64 KiB.
    let unmerged = Pairing {
        mergeable: false,
        ..offload
    };
    served("", &[offload, unmerged]);
    served("mode=irq", &[packed]);
}

#[test]
fn a_qemu_guest_pings_and_runs_tcp_over_split_rings_and_so_does_the_next() {
    let mergeable = Pairing {
        mergeable: true,
        ..Pairing::default()
    };
    served("", &[mergeable, Pairing::default()]);
}

#[test]
fn a_qemu_guest_pings_and_runs_tcp_over_packed_rings_and_so_does_the_next() {
    let packed = Pairing {
        packed: true,
        ..Pairing::default()
    };
    let mergeable = Pairing {
        mergeable: true,
        ..packed
    };
    served("mode=irq", &[packed, mergeable]);
}

#[test]
fn each_of_two_processors_of_a_qemu_guest_has_a_queue_pair() {
    let split = Pairing {
        mergeable: true,
        mq: true,
        ..Pairing::default()
    };
    let packed = Pairing {
        packed: true,
        ..split
    };
    served("queues=2", &[split, packed]);
}

#[test]
fn our_back_end_connects_to_a_qemu_that_listens() {
    let listens = Pairing {
        mergeable: true,
        qemu_listens: true,
        ..Pairing::default()
    };
    served("", &[listens]);
}

/// Runs the traffic, then has our guest read a word of each MiB of where QEMU's guest has its memory, without the IOMMU; returns
/// how many reads there were, and how many found nothing there.
#[track_caller]
fn looked_around(pairing: Pairing) -> (u64, u64) {
    let place = Place::new(false, false);
    let pattern = place.pattern_sum();
    let (mut vm, mut control) = place.back_end(false, "work=control");
    vm.wait_for("its socket", |_| Path::new(&place.dir.file("s")).exists());
    let mut qemu = place.qemu(pairing, SEALED);
    control.record(&mut vm, "\"record\":\"ready\"");
    control.send(&format!("run work=respond count={PATTERN}"));
    qemu.traffic();
    control.send("peek offset=0 len=0x10000000 step=0x100000");
    let record = control.record(&mut vm, "\"command\":\"peek\"");
    qemu.end(&pattern);
    (number(&record, "reads"), number(&record, "ones"))
}

#[test]
fn behind_qemus_iommu_the_window_shows_what_is_mapped_and_nothing_else() {
    for packed in [false, true] {
        let pairing = Pairing {
            packed,
            mergeable: true,
            iommu: true,
            ..Pairing::default()
        };
        // IO virtual addresses are handed out from 4 GiB down: nothing is mapped where the memory is.
        assert_eq!(looked_around(pairing), (256, 256));
    }
}

#[test]
fn without_an_iommu_the_same_look_finds_the_guests_memory() {
    let (reads, ones) = looked_around(Pairing {
        mergeable: true,
        ..Pairing::default()
    });
    assert_eq!(reads, 256);
    assert!(ones < 32, "{ones}: most of 256 MiB of RAM is not all-ones");
}

#[test]
fn a_qemu_whose_memory_could_shrink_is_refused_with_a_reason_and_the_next_is_served() {
    let place = Place::new(false, false);
    let pattern = place.pattern_sum();
    let words = format!("work=respond count={PATTERN}");
    let (mut vm, _control) = place.back_end(false, &words);
    vm.wait_for("its socket", |_| Path::new(&place.dir.file("s")).exists());
    let file = format!("memory-backend-file,mem-path={}", place.dir.file("ram"));
    let pairing = Pairing {
        mergeable: true,
        ..Pairing::default()
    };
    let refused = place.qemu(pairing, &file);
    vm.wait_for("the refusal", |vm| {
        let stderr = vm.stderr();
        stderr.contains("refused ADD_MEM_REG") && stderr.contains("not sealed against shrinking")
    });
    drop(refused);
    assert!(!vm.stdout().contains("guest: connected"));
    let mut qemu = place.qemu(pairing, SEALED);
    qemu.traffic();
    qemu.end(&pattern);
}
