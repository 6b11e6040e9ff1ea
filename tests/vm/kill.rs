//! VMs that are killed at random moments with traffic running both ways, and what that does to the other VM: it carries on, receives nothing that
//! is corrupt, duplicated or out of order, and has no more memory and descriptors in the end than in the beginning.
//!
//! 50 kills for each kind of ring and of window, and of packed rings whose place in them is lost with the back-end; `VHOST_PCI_SEED` repeats a run, as far as chance lets it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::machine;
use crate::common::{Dir, tool};

/// How soon frames have to flow again, and anything else has to happen.
const SOON: Duration = Duration::from_secs(30);
/// Kills of one VM over its peer's life: 13, 13, 12 and 12 make 50 a test, 250 in all.
const KILLS: [u32; 4] = [13, 13, 12, 12];
/// Frames each way that show that the connection works.
const FRAMES: u64 = 2000;
/// One kill of so many comes at any moment since the start of the VM, without waiting for a connection.
const EARLY: u64 = 4;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound
    }

    fn micros(&mut self, bound: Duration) -> Duration {
        Duration::from_micros(self.below(bound.as_micros().try_into().unwrap()))
    }
}

pub(crate) fn seed() -> u64 {
    match std::env::var("VHOST_PCI_SEED") {
        Ok(text) => text.parse().expect("VHOST_PCI_SEED is a number"),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xf_ffff
        }
    }
}

/// A VM that is driven over its control channel. Dropping it kills it.
pub(crate) struct Vm {
    child: Child,
    commands: UnixStream,
    records: Receiver<Value>,
    messages: Receiver<String>,
    log: String,
}

impl Vm {
    fn start(args: &[String]) -> Self {
        let (commands, theirs) = UnixStream::pair().unwrap();
        let mut child = tool(&["run", "-v", "--console", "output", "--control-fd", "0"])
            .args(args)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, records) = channel();
        let lines = BufReader::new(commands.try_clone().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let record = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if send.send(record).is_err() {
                    break;
                }
            }
        });
        let (send, messages) = channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().unwrap()),
            Box::new(child.stderr.take().unwrap()),
        ];
        for stream in streams {
            let send = send.clone();
            thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if send.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Self {
            child,
            commands,
            records,
            messages,
            log: String::new(),
        }
    }

    pub(crate) fn send(&mut self, command: &str) {
        // A VM that is being killed may not take it any more.
        let _ = self.commands.write_all(format!("{command}\n").as_bytes());
    }

    /// The next record of one of these names that is about this run, if it says of which it is.
    #[track_caller]
    pub(crate) fn record(&mut self, names: &[&str], id: Option<u64>) -> Value {
        let end = Instant::now() + SOON;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let record = match self.records.recv_timeout(left) {
                Ok(record) => record,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no {names:?} of run {id:?} came: {}", self.log())
                }
                Err(RecvTimeoutError::Disconnected) => panic!("the VM is gone: {}", self.log()),
            };
            self.log += &format!("{record}\n");
            let named = names.iter().any(|&name| record["record"] == name);
            if named && id.is_none_or(|id| record["id"] == id) {
                return record;
            }
        }
    }

    /// What it said so far.
    pub(crate) fn log(&mut self) -> &str {
        self.log
            .extend(self.messages.try_iter().map(|line| line + "\n"));
        &self.log
    }

    /// Ends it in good order.
    pub(crate) fn end(&mut self) {
        let pid = self.child.id().to_string();
        let term = Command::new("kill").args(["-s", "TERM", &pid]).status();
        assert!(term.unwrap().success());
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(143), "{}", self.log());
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What it has of the host.
    pub(crate) fn holdings(&self) -> Holdings {
        let proc = |name: &str| format!("/proc/{}/{name}", self.child.id());
        let status = fs::read_to_string(proc("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok())
                .unwrap_or_else(|| panic!("no {name} in {status}"))
        };
        Holdings {
            resident: field("VmRSS:"),
            size: field("VmSize:"),
            maps: fs::read_to_string(proc("maps")).unwrap().lines().count(),
            descriptors: fs::read_dir(proc("fd")).unwrap().count(),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has of the host: KiB, and numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holdings {
    resident: u64,
    size: u64,
    maps: usize,
    descriptors: usize,
}

impl Holdings {
    /// Memory of a guest that it touches for the first time, and what an allocator keeps, may come on top: 2 MiB and 4 mappings. What a
    /// connection leaves behind would come once for each of a dozen: memory is 64 MiB, and of descriptors none may be left at all.
    #[track_caller]
    pub(crate) fn expect_no_more_than(&self, before: &Self, what: &str) {
        assert!(
            self.resident <= before.resident + (2 << 10)
                && self.size <= before.size + (2 << 10)
                && self.maps <= before.maps + 4
                && self.descriptors <= before.descriptors,
            "{what}: {before:?} has become {self:?}"
        );
    }
}

/// Which rings and windows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) packed: bool,
    pub(crate) iommu: bool,
    /// A back-end records where it stands in packed rings, for the next one.
    pub(crate) inflight: bool,
}

/// Guests poll in some runs and sleep in others, so that notifications count, too.
fn mode(id: u64) -> &'static str {
    if id.is_multiple_of(3) { "irq" } else { "poll" }
}

/// One VM that lives on, and its peers, which do not.
pub(crate) struct Life {
    pub(crate) kind: Kind,
    /// The front-end is killed, not the back-end.
    pub(crate) kills_front: bool,
    /// The front-end listens, not the back-end.
    pub(crate) front_listens: bool,
    pub(crate) socket: String,
}

impl Life {
    pub(crate) fn start(&self, front: bool) -> Vm {
        let listens = if front == self.front_listens {
            "on"
        } else {
            "off"
        };
        let socket = format!("socket={},listen={listens}", self.socket);
        let mut args = if front {
            let packed = if self.kind.packed { "on" } else { "off" };
            vec!["--net".to_owned(), format!("{socket},packed={packed}")]
        } else {
            let inflight = if self.kind.inflight { "on" } else { "off" };
            vec![
                "--vhost-pci".to_owned(),
                format!("{socket},inflight={inflight}"),
            ]
        };
        if front && self.kind.iommu {
            args.push("--iommu".to_owned());
        }
        args.extend(["--memory".to_owned(), "size=64M".to_owned()]);
        Vm::start(&args)
    }

    /// Frames flow both ways, and arrive all, once, whole and in order. A run that began before an end had seen the new connection is tried again.
    #[track_caller]
    pub(crate) fn expect_traffic(&self, vms: [&mut Vm; 2], id: &mut u64, what: &str) {
        let [survivor, victim] = vms;
        let start = Instant::now();
        loop {
            *id += 1;
            let mode = mode(*id);
            let run = format!("run id={id} work=both count={FRAMES} timeout_ms=1000 mode={mode}");
            survivor.send(&run);
            victim.send(&run);
            let results =
                [&mut *survivor, victim].map(|vm| vm.record(&["result", "stopped"], Some(*id)));
            for result in &results {
                assert_eq!(result["corrupted"], 0, "{what}: {results:?}");
            }
            let whole = |result: &Value| {
                result["record"] == "result"
                    && result["timeout"] == 0
                    && result["verified"] == FRAMES
                    && ["lost", "duplicated", "reordered"]
                        .iter()
                        .all(|&name| result[name] == 0)
            };
            if results.iter().all(whole) {
                return;
            }
            assert!(
                start.elapsed() < SOON,
                "{what}: no traffic: {results:?}\n{}\n{}",
                survivor.log(),
                victim.log()
            );
        }
    }

    fn live(&self, kills: u32, random: &mut Random) {
        let what = format!(
            "{:?}, {} killed, {} listens",
            self.kind,
            if self.kills_front {
                "front-end"
            } else {
                "back-end"
            },
            if self.front_listens {
                "front-end"
            } else {
                "back-end"
            },
        );
        let mut survivor = self.start(!self.kills_front);
        let mut id = 0;
        let mut before = None;
        let mut frames = 0;
        let start = Instant::now();
        for kill in 0..=kills {
            let mut victim = self.start(self.kills_front);
            // Not the first and not the last, from which something is to be learned.
            if (1..kills).contains(&kill) && random.below(EARLY) == 0 {
                thread::sleep(random.micros(Duration::from_millis(150)));
                victim.kill();
                continue;
            }
            victim.record(&["ready"], None);
            self.expect_traffic([&mut survivor, &mut victim], &mut id, &what);
            let now = survivor.holdings();
            if kill == kills {
                now.expect_no_more_than(&before.unwrap_or(now), &what);
                break;
            }
            if kill > 0 {
                before.get_or_insert(now);
            }
            id += 1;
            let mode = mode(id);
            let run = format!("run id={id} work=both ms=600000 timeout_ms=600000 mode={mode}");
            survivor.send(&run);
            victim.send(&run);
            thread::sleep(random.micros(Duration::from_millis(30)));
            victim.kill();
            let stopped = survivor.record(&["stopped"], Some(id));
            for count in ["corrupted", "lost", "duplicated", "reordered"] {
                assert_eq!(stopped[count], 0, "{what}: {stopped}\n{}", survivor.log());
            }
            // A back-end may be looking at a frame when its window goes: one at most changes between two looks, and it knows.
            let torn = stopped["torn"].as_u64().unwrap();
            let most = u64::from(self.kills_front);
            assert!(torn <= most, "{what}: {stopped}\n{}", survivor.log());
            frames += stopped["verified"].as_u64().unwrap();
        }
        // Without the record a packed ring ends with its back-end.
        let resets = survivor.log().contains("has to reset the device");
        let expected = self.kind.packed && !self.kind.inflight && !self.kills_front;
        assert_eq!(resets, expected, "{what}: {}", survivor.log());
        println!(
            "{what}: {kills} kills in {:.1?}, {frames} frames",
            start.elapsed()
        );
    }
}

/// 50 kills: either side, with either side listening.
fn kill_50(kind: Kind) {
    let _machine = machine();
    let seed = seed();
    println!("VHOST_PCI_SEED={seed}");
    let mut random = Random(seed);
    let lives = [(true, true), (true, false), (false, true), (false, false)];
    for ((kills_front, front_listens), kills) in lives.into_iter().zip(KILLS) {
        let dir = Dir::new();
        let life = Life {
            kind,
            kills_front,
            front_listens,
            socket: dir.file("s"),
        };
        life.live(kills, &mut random);
    }
}

#[test]
fn a_vm_outlives_50_kills_of_its_peer_with_split_rings() {
    kill_50(Kind {
        packed: false,
        iommu: false,
        inflight: true,
    });
}

#[test]
fn a_vm_outlives_50_kills_of_its_peer_with_packed_rings_that_go_on() {
    kill_50(Kind {
        packed: true,
        iommu: false,
        inflight: true,
    });
}

#[test]
fn a_vm_outlives_50_kills_of_its_peer_with_split_rings_behind_an_iommu() {
    kill_50(Kind {
        packed: false,
        iommu: true,
        inflight: true,
    });
}

#[test]
fn a_vm_outlives_50_kills_of_its_peer_with_packed_rings_behind_an_iommu_that_go_on() {
    kill_50(Kind {
        packed: true,
        iommu: true,
        inflight: true,
    });
}

#[test]
fn a_vm_outlives_50_kills_of_its_peer_with_packed_rings_that_are_reset() {
    kill_50(Kind {
        packed: true,
        iommu: false,
        inflight: false,
    });
}
