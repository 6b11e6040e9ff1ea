//! DPDK's `dpdk-testpmd`: two of them, joined by vhost-user or memif, one on each core; or a third between them, on both.
//!
//! They are told what to do on their standard input and sleep between samples. One that loses its standard input ends by itself,
//! so none outlives this program, however that ends.

use std::ffi::OsStr;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::peers::{PeerCase, PeerSample, Rival};
use super::plan::Way;
use crate::cli::bench::PeerName;
use crate::cli::frames::How;
use crate::exit::Failure;
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;

/// How long one may take to start, and both to find each other.
const START: Duration = Duration::from_secs(30);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long one may take to end.
const GRACE: Duration = Duration::from_secs(3);
/// What stands behind every answer.
const PROMPT: &[u8] = b"testpmd> ";
/// No answer is longer.
const ANSWER_LIMIT: usize = 1 << 20;
/// How much of what it said last is in an error.
const LAST_LINES: usize = 3;
/// A look at the counters that takes more than this of a sample leaves open when it was.
const LONGEST_LOOK: f64 = 0.02;

/// What has to be installed.
#[derive(Clone, Debug)]
pub struct Programs {
    /// testpmd writes to a pipe only when its buffer is full; `stdbuf` has it write every line.
    stdbuf: PathBuf,
    testpmd: PathBuf,
}

impl Programs {
    /// Looks for them in the directories of `path`, the environment's PATH.
    pub fn find(path: Option<&OsStr>) -> Result<Self> {
        let find = |name: &str, package: &str| {
            std::env::split_paths(path.unwrap_or_default())
                .map(|directory| directory.join(name))
                .find(|file| is_program(file))
                .with_context(|| format!("--peers: there is no {name} in PATH (Debian: {package})"))
        };
        Ok(Self {
            testpmd: find("dpdk-testpmd", "apt install dpdk")?,
            stdbuf: find("stdbuf", "coreutils")?,
        })
    }
}

fn is_program(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}

/// How the two are set up.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The back-end's core, the front-end's.
    pub cores: [usize; 2],
    /// Entries of a ring, a power of two.
    pub ring: u16,
    /// Whether their memory is of 2 MiB pages.
    pub huge: bool,
    /// Length of the part of a sample that counts.
    pub length: Duration,
    /// How long is sent before it.
    pub warmup: Duration,
}

/// Two of them. The one that answers to the back-end VM: DPDK's vhost port or memif's server.
pub struct Pair {
    // Dropped first: who connects leaves first.
    front: Testpmd,
    back: Testpmd,
    /// Who forwards from one to the other.
    switch: Option<Testpmd>,
    name: PeerName,
    config: Config,
    // Dropped last: sockets are in it, and what DPDK writes at run time.
    _directory: TempDir,
}

impl Pair {
    /// Starts both and waits until they see each other.
    pub fn start(
        programs: &Programs,
        name: PeerName,
        config: Config,
        signals: Option<&Rc<Signals>>,
    ) -> Result<Self> {
        let directory = TempDir::new().context("cannot make a directory for the socket")?;
        let devices = devices(name, &directory.path().join("s"), config.ring);
        let start = |place: Place, devices: &[String]| {
            let args = args(place, devices, &config);
            Testpmd::start(programs, args, directory.path(), signals.cloned())
                .with_context(|| format!("--peers {}", name.name()))
        };
        // Who listens is first.
        let switch = match &devices.switch[..] {
            [] => None,
            ports => Some(start(Place::Switch, ports)?),
        };
        let [back, front] = &devices.ends;
        let back = start(Place::Back, std::slice::from_ref(back))?;
        let front = start(Place::Front, std::slice::from_ref(front))?;
        let mut pair = Self {
            front,
            back,
            switch,
            name,
            config,
            _directory: directory,
        };
        pair.wait_for_link()
            .with_context(|| format!("--peers {}", name.name()))?;
        Ok(pair)
    }

    fn wait_for_link(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        for one in [&mut self.back, &mut self.front] {
            loop {
                let info = one.ask("show port info 0")?;
                ensure!(
                    !info.contains("Invalid port"),
                    "dpdk-testpmd has no port: {}",
                    one.first_words
                );
                if info.contains("Link status: up") {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "the two dpdk-testpmd do not find each other: {}",
                    one.first_words
                );
                sys::poll(&[], Some(Duration::from_millis(50))).context("poll")?;
            }
        }
        Ok(())
    }

    fn traffic(&mut self, case: &PeerCase) -> Result<PeerSample> {
        let Config { length, warmup, .. } = self.config;
        let [back_input, front_input, switch_input] = &Self::inputs(case);
        let (from, to, from_input, to_input) = match case.way {
            Way::BeToFe => (&mut self.back, &mut self.front, back_input, front_input),
            Way::FeToBe | Way::Echo => (&mut self.front, &mut self.back, front_input, back_input),
        };
        let switch = &mut self.switch;
        if let Some(switch) = switch {
            for line in switch_input {
                switch.ask(line)?;
            }
        }
        // The receiver first: then the sender does not start against a full ring.
        for line in to_input {
            to.ask(line)?;
        }
        for line in from_input {
            from.ask(line)?;
        }
        from.wait(warmup)?;
        let first = Look::take(from, to, switch.as_ref())?;
        from.wait(length)?;
        let second = Look::take(from, to, switch.as_ref())?;
        for one in [Some(from), Some(to), switch.as_mut()]
            .into_iter()
            .flatten()
        {
            one.ask("stop")?;
        }
        let sample = first.until(&second, case.way);
        Ok(match switch {
            None => sample,
            // Three on two cores: that none has one to itself is part of the figure.
            Some(_) => PeerSample {
                shares: None,
                ..sample
            },
        })
    }

    /// What each is told before a sample: back-end, front-end, and who is between them.
    fn inputs(case: &PeerCase) -> [Vec<String>; 3] {
        let modes = match case.way {
            Way::BeToFe => ["txonly", "rxonly", "io"],
            Way::FeToBe => ["rxonly", "txonly", "io"],
            // It sends and takes what comes; the other swaps the addresses and sends back what there is room for.
            Way::Echo => ["flowgen", "macswap", "io"],
        };
        modes.map(|mode| {
            vec![
                format!("set fwd {mode}"),
                format!("set burst {}", case.batch),
                format!("set txpkts {}", case.size),
                "start".to_owned(),
            ]
        })
    }
}

impl Rival for Pair {
    fn name(&self) -> PeerName {
        self.name
    }

    fn how(&self) -> How {
        self.name.how()
    }

    fn ring(&self) -> Option<u16> {
        Some(self.config.ring)
    }

    fn sample(&mut self, case: &PeerCase) -> Result<PeerSample> {
        self.traffic(case)
            .with_context(|| format!("--peers {}", self.name.name()))
    }

    fn commands(&self) -> Vec<String> {
        let all = [Some(&self.back), Some(&self.front), self.switch.as_ref()];
        all.into_iter()
            .flatten()
            .map(|one| one.command.clone())
            .collect()
    }

    fn inputs(&self, case: &PeerCase) -> Vec<Vec<String>> {
        let mut inputs = Self::inputs(case).to_vec();
        inputs.truncate(self.commands().len());
        inputs
    }
}

/// What the receiver has counted, and what each process has used, at an instant.
struct Look {
    frames: u64,
    at: Instant,
    took: Duration,
    /// Sender, receiver, and who is between them.
    cpu: [u64; 3],
    cpu_at: Instant,
}

impl Look {
    fn take(from: &Testpmd, to: &mut Testpmd, switch: Option<&Testpmd>) -> Result<Self> {
        let begin = Instant::now();
        let stats = to.ask("show port stats 0")?;
        let took = begin.elapsed();
        let cpu = |one: &Testpmd| {
            sys::process_cpu_ns(one.child.id()).context("the CPU time of dpdk-testpmd")
        };
        Ok(Self {
            frames: counter(&stats, "RX-packets:").ok_or_else(|| {
                anyhow!(
                    "dpdk-testpmd does not say what it received: {}",
                    tail(stats.as_bytes())
                )
            })?,
            at: begin + took / 2,
            took,
            cpu: [cpu(from)?, cpu(to)?, switch.map_or(Ok(0), cpu)?],
            cpu_at: Instant::now(),
        })
    }

    fn until(&self, later: &Self, way: Way) -> PeerSample {
        let length = (later.at - self.at).as_secs_f64();
        let wall = (later.cpu_at - self.cpu_at).as_nanos().max(1) as f64;
        let [from, to, switch] =
            [0, 1, 2].map(|one| later.cpu[one].saturating_sub(self.cpu[one]) as f64 / wall);
        let frames = later.frames.saturating_sub(self.frames);
        let exact = self.took.max(later.took).as_secs_f64() <= LONGEST_LOOK * length;
        PeerSample {
            mpps: frames as f64 / length.max(1e-9) / 1e6,
            frames,
            shares: Some(match way {
                Way::BeToFe => [from, to],
                Way::FeToBe | Way::Echo => [to, from],
            }),
            busy_cores: from + to + switch,
            timed: frames > 0 && exact,
        }
    }
}

/// The ports of each process.
#[derive(Default)]
struct Devices {
    /// The back-end's, the front-end's.
    ends: [String; 2],
    /// Those of who forwards between them, where somebody does.
    switch: Vec<String>,
}

/// Those of a peer; of one that is no testpmd, none.
fn devices(name: PeerName, socket: &Path, ring: u16) -> Devices {
    let socket = socket.display();
    let memif = |role: &str| {
        format!(
            "net_memif0,role={role},socket={socket},socket-abstract=no,rsize={}",
            ring.trailing_zeros()
        )
    };
    let vhost =
        |port: usize, suffix: &str| format!("net_vhost{port},iface={socket}{suffix},queues=1");
    let virtio_user = |suffix: &str| {
        format!(
            "net_virtio_user0,path={socket}{suffix},queues=1,queue_size={ring},packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1"
        )
    };
    let (ends, switch) = match name {
        PeerName::DpdkVhost => ([vhost(0, ""), virtio_user("")], Vec::new()),
        PeerName::DpdkSwitch => (
            [".0", ".1"].map(virtio_user),
            vec![vhost(0, ".0"), vhost(1, ".1")],
        ),
        PeerName::Memif => ([memif("server"), memif("client")], Vec::new()),
        PeerName::MemifZc => ([memif("server"), memif("client,zero-copy=yes")], Vec::new()),
        PeerName::Relay | PeerName::Veth => Default::default(),
    };
    Devices { ends, switch }
}

/// Which of the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Back,
    Front,
    Switch,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Back => "back",
            Self::Front => "front",
            Self::Switch => "switch",
        }
    }

    /// Where its threads may run, as `--lcores` has it. The thread that is told and the one that polls share the core.
    fn cores(self, [back, front]: [usize; 2]) -> String {
        match self {
            Self::Back => back.to_string(),
            Self::Front => front.to_string(),
            Self::Switch => format!("({back},{front})"),
        }
    }
}

/// Everything behind the program's name.
fn args(place: Place, devices: &[String], config: &Config) -> Vec<String> {
    let Config { ring, huge, .. } = *config;
    let cores = place.cores(config.cores);
    let memory: &[&str] = if huge {
        &["--in-memory"]
    } else {
        &["--no-huge", "-m", "256"]
    };
    let mut args = vec!["--lcores".to_owned(), format!("0@{cores},1@{cores}")];
    args.extend(memory.iter().map(|&arg| arg.to_owned()));
    args.extend(
        [
            "--single-file-segments",
            "--no-pci",
            "--no-telemetry",
            "--force-max-simd-bitwidth=512",
        ]
        .map(str::to_owned),
    );
    args.push(format!("--file-prefix={}", place.name()));
    for device in devices {
        args.extend(["--vdev".to_owned(), device.clone()]);
    }
    args.push("--".to_owned());
    // Both directions of a ring full of each port, what is on its way, and the caches of two threads.
    let rings = 4 * u32::from(ring) * u32::try_from(devices.len()).unwrap_or(1);
    args.push(format!("--total-num-mbufs={}", 4096 + rings));
    args.extend([format!("--txd={ring}"), format!("--rxd={ring}")]);
    args.push("-i".to_owned());
    args
}

/// The number behind the first `key`.
fn counter(text: &str, key: &str) -> Option<u64> {
    let (_, rest) = text.split_once(key)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The last lines of what it said, in one.
fn tail(said: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(said)
        .chars()
        .map(|c| if c.is_control() { '\n' } else { c })
        .collect();
    let prompt = String::from_utf8_lossy(PROMPT);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && *line != prompt.trim())
        .collect();
    if lines.is_empty() {
        return "it said nothing".to_owned();
    }
    lines[lines.len().saturating_sub(LAST_LINES)..].join("; ")
}

/// One process. Dropping it ends it.
struct Testpmd {
    child: Child,
    pidfd: OwnedFd,
    /// Absent when it is being ended.
    stdin: Option<ChildStdin>,
    output: PipeReader,
    signals: Option<Rc<Signals>>,
    /// How it was called.
    command: String,
    /// What it said last before the first prompt.
    first_words: String,
}

impl Testpmd {
    /// Starts it and waits until it is ready. What it writes at run time goes below `directory`.
    fn start(
        programs: &Programs,
        args: Vec<String>,
        directory: &Path,
        signals: Option<Rc<Signals>>,
    ) -> Result<Self> {
        let (output, input) = std::io::pipe().context("pipe")?;
        let mut command = Command::new(&programs.stdbuf);
        command
            .arg("-oL")
            .arg(&programs.testpmd)
            .args(args)
            .env("RUNTIME_DIRECTORY", directory)
            .stdin(Stdio::piped())
            .stdout(input.try_clone().context("dup")?)
            .stderr(input)
            // Ctrl-C is for this program alone.
            .process_group(0);
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", programs.stdbuf.display()))?;
        // The pipe's other end is closed with it: then only the child holds it.
        drop(command);
        let pidfd = match sys::pidfd(child.id()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error).context("pidfd_open (it needs Linux 5.3)");
            }
        };
        let mut testpmd = Self {
            stdin: child.stdin.take(),
            child,
            pidfd,
            output,
            signals,
            command: words.join(" "),
            first_words: String::new(),
        };
        let said = testpmd.answer(START).context("it did not start")?;
        testpmd.first_words = tail(said.as_bytes());
        Ok(testpmd)
    }

    /// Gives it a line and returns what it says to it.
    fn ask(&mut self, line: &str) -> Result<String> {
        let stdin = self.stdin.as_mut().context("dpdk-testpmd is being ended")?;
        match stdin.write_all(format!("{line}\n").as_bytes()) {
            Ok(()) => {}
            // Its last words follow.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error).context("cannot write to dpdk-testpmd"),
        }
        let said = self.answer(ANSWER)?;
        for refusal in ["Bad arguments", "Command not found", "Ambiguous command"] {
            ensure!(
                !said.contains(refusal),
                "dpdk-testpmd does not know '{line}': {refusal}"
            );
        }
        Ok(said)
    }

    /// What it says until it is ready for the next line.
    fn answer(&mut self, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let mut said = Vec::new();
        loop {
            if said.ends_with(PROMPT) {
                return Ok(String::from_utf8_lossy(&said).into_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero() && said.len() < ANSWER_LIMIT,
                "dpdk-testpmd gives no answer; it said: {}",
                tail(&said)
            );
            if !self.readable(left)? {
                continue;
            }
            let mut chunk = [0; 4096];
            match self.output.read(&mut chunk) {
                Ok(0) => bail!("dpdk-testpmd ended: {}", tail(&said)),
                Ok(got) => said.extend(chunk.iter().take(got)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read from dpdk-testpmd"),
            }
        }
    }

    /// Waits for output. A signal is an error.
    fn readable(&self, patience: Duration) -> Result<bool> {
        let mut fds = vec![self.output.as_fd()];
        fds.extend(self.signals.as_ref().map(AsFd::as_fd));
        let ready = sys::poll(&fds, Some(patience)).context("poll")?;
        match self.signals.as_deref().and_then(Signals::caught) {
            Some(number) => Err(Failure::Signal(number).into()),
            None => Ok(ready[0]),
        }
    }

    /// Sleeps that long. A signal is an error.
    fn wait(&self, length: Duration) -> Result<()> {
        let end = Instant::now() + length;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let signals = self.signals.as_ref().map(AsFd::as_fd);
            let fds: Vec<_> = signals.into_iter().collect();
            sys::poll(&fds, Some(left)).context("poll")?;
            if let Some(number) = self.signals.as_deref().and_then(Signals::caught) {
                return Err(Failure::Signal(number).into());
            }
        }
        Ok(())
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = stdin.write_all(b"stop\nquit\n");
        }
        let ended = sys::poll(&[self.pidfd.as_fd()], Some(GRACE)).is_ok_and(|ready| ready[0]);
        if !ended {
            log::warn!("dpdk-testpmd did not end; killing it");
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests;
