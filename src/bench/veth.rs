//! A pair of veth devices, an end in each of two network namespaces, and a plain UDP socket at either end: what the kernel's network stack does.
//!
//! The namespaces have no names: they are there as long as the sockets are.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::Setup;
use super::peers::{PeerCase, PeerSample, Rival};
use super::plan::Way;
use crate::cli::bench::PeerName;
use crate::cli::frames::How;
use crate::exit::Failure;
use crate::sys::{self, Signals};

/// Headers of Ethernet, IPv4 and UDP.
const HEADERS: u32 = 42;
/// Long enough for the longest frame.
const MTU: &str = "1504";
/// How long a receiver sleeps at most before it looks whether it is to end.
const NAP: Duration = Duration::from_millis(5);
const PORT: u16 = 9;
/// Most frames that are on their way there and back: as many as a socket has room for, in any case.
const WINDOW: u32 = 64;
const ENDS: [(&str, Ipv4Addr); 2] = [
    ("back", Ipv4Addr::new(10, 0, 0, 2)),
    ("front", Ipv4Addr::new(10, 0, 0, 1)),
];

/// Both ends, back-end first.
pub struct Veth {
    sockets: [UdpSocket; 2],
    cores: [usize; 2],
    length: Duration,
    warmup: Duration,
    signals: Option<Rc<Signals>>,
}

/// Has `ip` do something in the calling thread's namespace.
fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(words.split(' '))
        .stdin(Stdio::null())
        .output()
        .context("cannot start ip (Debian: apt install iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "'ip {words}' failed: {}",
        said.trim()
    );
    Ok(())
}

fn open(end: usize) -> Result<UdpSocket> {
    let (name, address) = ENDS[end];
    ip(&format!("address add {address}/24 dev {name}"))?;
    ip(&format!("link set {name} up"))?;
    let socket = UdpSocket::bind((address, PORT)).context("cannot bind a socket")?;
    socket.set_read_timeout(Some(NAP)).context("SO_RCVTIMEO")?;
    Ok(socket)
}

/// Two threads, a namespace each: one of them makes the devices, each opens its socket, and then they end.
fn sockets() -> Result<[UdpSocket; 2]> {
    let own =
        || sys::own_network().context("a network namespace of its own needs root (CAP_SYS_ADMIN)");
    let (say, hear) = mpsc::channel();
    let (made, wait) = mpsc::channel();
    thread::scope(|scope| {
        let front = scope.spawn(move || -> Result<UdpSocket> {
            own()?;
            say.send(sys::thread_id())?;
            wait.recv().context("the devices were not made")?;
            open(1)
        });
        let back = scope.spawn(move || -> Result<UdpSocket> {
            own()?;
            let other = hear.recv().context("the other namespace was not made")?;
            let [(back, _), (front, _)] = ENDS;
            ip(&format!(
                "link add {back} mtu {MTU} type veth peer name {front} mtu {MTU} netns {other}"
            ))?;
            made.send(())?;
            open(0)
        });
        let lost = |_| anyhow!("a thread was lost");
        Ok([back.join().map_err(lost)??, front.join().map_err(lost)??])
    })
}

impl Veth {
    /// Makes the namespaces, the devices and the sockets.
    pub fn start(setup: &Setup, signals: Option<&Rc<Signals>>) -> Result<Self> {
        let sockets = sockets().context("--peers veth")?;
        for (end, socket) in sockets.iter().enumerate() {
            socket
                .connect((ENDS[1 - end].1, PORT))
                .context("--peers veth: cannot connect a socket")?;
        }
        Ok(Self {
            sockets,
            cores: setup.cores,
            length: Duration::from_millis(setup.ms),
            warmup: Duration::from_millis(setup.warmup_ms),
            signals: signals.cloned(),
        })
    }

    /// Sleeps that long. A signal is an error.
    fn wait(&self, length: Duration) -> Result<()> {
        let end = Instant::now() + length;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let fds: Vec<_> = self.signals.iter().map(AsFd::as_fd).collect();
            sys::poll(&fds, Some(left)).context("poll")?;
            if let Some(number) = self.signals.as_deref().and_then(Signals::caught) {
                return Err(Failure::Signal(number).into());
            }
        }
        Ok(())
    }

    fn traffic(&self, case: &PeerCase) -> Result<PeerSample> {
        let len = case.size.saturating_sub(HEADERS) as usize;
        let (stop, came) = (&AtomicBool::new(false), &AtomicU64::new(0));
        let [back, front] = &self.sockets;
        let [back, front]: [Box<dyn FnMut() + Send + '_>; 2] = match case.way {
            Way::BeToFe => [
                Box::new(source(back, len)),
                Box::new(sink(front, len, came)),
            ],
            Way::FeToBe => [
                Box::new(sink(back, len, came)),
                Box::new(source(front, len)),
            ],
            Way::Echo => [Box::new(window(back, len, came)), Box::new(echo(front))],
        };
        let [back_core, front_core] = self.cores;
        thread::scope(|scope| {
            let back = scope.spawn(move || work(back_core, stop, back));
            let front = scope.spawn(move || work(front_core, stop, front));
            let look = || (came.load(Ordering::Relaxed), Instant::now());
            let looks = self.wait(self.warmup).and_then(|()| {
                let first = look();
                self.wait(self.length)?;
                Ok((first, look()))
            });
            stop.store(true, Ordering::Relaxed);
            let lost = |_| anyhow!("a thread was lost");
            let busy = [back.join().map_err(lost)??, front.join().map_err(lost)??];
            let ((before, began), (after, ended)) = looks?;
            let frames = after - before;
            Ok(PeerSample {
                mpps: frames as f64 / (ended - began).as_secs_f64().max(1e-9) / 1e6,
                frames,
                shares: None,
                busy_cores: busy.iter().sum(),
                timed: frames > 0,
            })
        })
    }
}

/// Sends a frame after the other. Where the queues are full, the kernel drops or refuses.
fn source(socket: &UdpSocket, len: usize) -> impl FnMut() {
    let mut frame = vec![0; len];
    let mut sequence = 0_u64;
    move || {
        if let Some(room) = frame.first_chunk_mut() {
            *room = sequence.to_le_bytes();
        }
        sequence += u64::from(socket.send(&frame).is_ok());
    }
}

/// Whether a frame of that length came. What is not there yet, or was sent to nobody, is no frame.
fn receive(socket: &UdpSocket, len: usize) -> bool {
    let mut frame = [0; 2048];
    socket.recv(&mut frame).is_ok_and(|got| got == len)
}

/// Counts what comes.
fn sink<'a>(socket: &'a UdpSocket, len: usize, came: &'a AtomicU64) -> impl FnMut() + 'a {
    move || {
        came.fetch_add(u64::from(receive(socket, len)), Ordering::Relaxed);
    }
}

/// Sends while few are on their way, and counts what comes back.
fn window<'a>(socket: &'a UdpSocket, len: usize, came: &'a AtomicU64) -> impl FnMut() + 'a {
    let mut send = source(socket, len);
    let mut out = 0;
    move || {
        if out < WINDOW {
            send();
            out += 1;
        } else if receive(socket, len) {
            came.fetch_add(1, Ordering::Relaxed);
            out -= 1;
        } else {
            // Nothing came for long: those were dropped.
            out = 0;
        }
    }
}

/// Sends back what comes.
fn echo(socket: &UdpSocket) -> impl FnMut() {
    let mut frame = [0; 2048];
    move || {
        if let Ok(got) = socket.recv(&mut frame) {
            // Where the queues are full, the kernel drops or refuses.
            let _ = socket.send(&frame[..got]);
        }
    }
}

/// Does it again and again on a core; how much of the core that took.
fn work(core: usize, stop: &AtomicBool, mut turn: impl FnMut()) -> Result<f64> {
    sys::pin_to(core).with_context(|| format!("cannot pin a thread to core {core}"))?;
    let (wall, cpu) = (Instant::now(), sys::thread_cpu_ns()?);
    while !stop.load(Ordering::Relaxed) {
        turn();
    }
    let used = sys::thread_cpu_ns()?.saturating_sub(cpu);
    Ok(used as f64 / wall.elapsed().as_nanos().max(1) as f64)
}

impl Rival for Veth {
    fn name(&self) -> PeerName {
        PeerName::Veth
    }

    fn how(&self) -> How {
        self.name().how()
    }

    fn ring(&self) -> Option<u16> {
        None
    }

    fn sample(&mut self, case: &PeerCase) -> Result<PeerSample> {
        self.traffic(case).context("--peers veth")
    }

    fn commands(&self) -> Vec<String> {
        let end = |(name, address): (&str, Ipv4Addr)| {
            format!(
                "veth {name}, mtu {MTU}, UDP {}",
                SocketAddrV4::new(address, PORT)
            )
        };
        ENDS.map(end).to_vec()
    }

    fn inputs(&self, _: &PeerCase) -> Vec<Vec<String>> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::setup;

    #[test]
    fn frames_of_every_length_arrive_either_way_or_one_line_says_what_is_missing() {
        let core = sys::allowed_cores().unwrap()[0];
        let setup = Setup {
            ms: 50,
            cores: [core, core],
            ..setup()
        };
        let mut veth = match Veth::start(&setup, None) {
            Ok(veth) => veth,
            Err(why) => {
                let why = format!("{why:#}");
                assert!(
                    why.contains("needs root") || why.contains("iproute2"),
                    "{why}"
                );
                return;
            }
        };
        for way in [Way::BeToFe, Way::FeToBe, Way::Echo] {
            for size in [60, 64, 1518] {
                let case = PeerCase {
                    way,
                    size,
                    batch: 32,
                };
                // On a busy host an end may hardly run in so short a time.
                let timed = (0..20).find_map(|_| {
                    let sample = veth.sample(&case).unwrap();
                    (sample.timed && sample.frames > 0).then_some(sample)
                });
                let sample = timed.unwrap_or_else(|| panic!("{case:?}: not one of 20 has a time"));
                assert!(sample.mpps > 0.0, "{case:?} {sample:?}");
                assert!(sample.busy_cores > 0.0 && sample.busy_cores <= 2.0);
                // So many were there in that time: it was not less than asked for.
                assert!(sample.frames as f64 / sample.mpps / 1e6 >= 0.05);
            }
        }
        let names = || std::fs::read_dir("/sys/class/net").unwrap();
        assert!(
            names().all(|it| it.unwrap().file_name() != "front"),
            "it is nobody else's"
        );
    }
}
