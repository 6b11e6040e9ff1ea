//! A QEMU whose network device is served by a VM of ours moves to another QEMU, which is served by another VM of ours, while its guest exchanges frames.
//!
//! What our guest writes to the memory of QEMU's guest is known to QEMU by the dirty log alone: a page that is missing there is stale after the move. What the
//! protocols of a guest make good by themselves shows nothing, so it holds data, received late and read only after the move: they come out as they were sent, or not.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use devices::vhost_user::{Connection, Payload, U64, requests};

use super::{Pairing, Place, Qemu, RING_PACKED, SEALED};
use crate::common::{Collected, PATIENCE, Running, linux};

/// VIRTIO_NET_F_GUEST_ANNOUNCE.
const GUEST_ANNOUNCE: usize = 21;
/// VHOST_F_LOG_ALL.
const F_LOG_ALL: u64 = 1 << 26;
/// Transfers that have to come out whole, before the move and behind it.
const ROUNDS: usize = 3;
/// Echo requests a second, and how many may be lost in the move.
const PINGS: u32 = 10;
const LOST: u32 = 30;
/// Connections whose data is received before the move and read behind it, and bytes of each: as much as the guest takes without reading, and all of them no more
/// than half a ring of frames.
const HELD: usize = 3;
const HELD_BYTES: usize = 40_000;
/// Passes over the memory before these are opened: their buffers have been sent then.
const PASSES: u32 = 3;

/// What QEMU's guest does: it pings all the time, and has the echo port send a file back again and again. A transfer that is cut off counts as broken, one
/// that comes back whole and is not what was sent, as wrong. Something of its memory changes all the time, so that QEMU has something to send as long as it is to.
///
/// Told to `hold`, it opens connections whose data stays in the kernel, because the pipe behind them is full; told that it has `moved`, it reads them.
fn script() -> String {
    format!(
        "echo result features $(cat /sys/class/net/eth0/device/features)
        ip link set lo up
        ip addr add 10.0.0.2/24 dev eth0
        ip link set eth0 up
        dd if=/dev/urandom of=/sent bs=1024 count=512 2>/dev/null
        nc 10.0.0.1 19 </dev/null >/pattern
        echo result pattern $(wc -c </pattern)
        ping -i 0.{} 10.0.0.1 >/pings &
        ping=$!
        (while read word; do touch /told-$word; done </dev/console) &
        for i in $(seq 16); do cat /sent; done >/random
        (while [ ! -e /told-moved ]; do
            dd if=/random of=/changes bs=65536 conv=notrunc 2>/dev/null
            sleep 0.1
        done) &
        good=0; broken=0; wrong=0
        rounds() {{
            while [ ! -e /told-$1 ]; do
                timeout 20 nc 10.0.0.1 7 </sent >/back
                if cmp -s /sent /back; then good=$((good+1))
                elif [ $(wc -c </back) = $(wc -c </sent) ]; then wrong=$((wrong+1))
                else broken=$((broken+1)); fi
                echo round good $good broken $broken wrong $wrong
            done
        }}
        hold() {{
            {{ dd if=/dev/zero bs=65536 count=1 2>/dev/null; nc 10.0.0.1 19 </dev/null; }} | {{
                while [ ! -e /told-moved ]; do sleep 0.1; done
                cat >/full-$1
                tail -c +65537 /full-$1 >/held-$1
                cmp -s /pattern /held-$1 && touch /same-$1
                touch /read-$1
            }}
        }}
        rounds hold
        sleep 2
        for i in $(seq {HELD}); do hold $i & done
        sleep 2
        echo result holding
        rounds moved
        (while [ $(ls /read-* 2>/dev/null | wc -l) != {HELD} ]; do sleep 0.1; done
        echo result bytes $(cat /held-* | wc -c)
        echo result held $(ls /same-* 2>/dev/null | wc -l)) &
        rounds stop
        kill -INT $ping
        wait $ping
        sed 's/^/ping: /' /pings | tail -n 3
        cd /sys/class/net/eth0/statistics
        for name in rx_errors rx_dropped tx_errors; do echo result $name $(cat $name); done
        echo result done",
        10 / PINGS
    )
}

/// QEMU's monitor.
struct Monitor {
    socket: UnixStream,
    said: Collected,
}

impl Monitor {
    fn connect(path: &str, qemu: &mut Running) -> Self {
        // Its socket is there before it listens.
        let mut socket = None;
        qemu.wait_for("the monitor", |_| {
            socket = UnixStream::connect(path).ok();
            socket.is_some()
        });
        let socket = socket.unwrap();
        let said = Collected::new(socket.try_clone().unwrap());
        Self { socket, said }
    }

    fn send(&mut self, command: &str) {
        self.socket
            .write_all(format!("{command}\n").as_bytes())
            .unwrap();
    }

    /// Waits until QEMU says of the move what is looked for.
    #[track_caller]
    fn wait_for(&mut self, what: &str, holds: impl Fn(&str) -> bool) {
        let start = Instant::now();
        loop {
            self.send("info migrate");
            thread::sleep(Duration::from_millis(100));
            let said = self.said.text();
            if holds(&said) {
                return;
            }
            let last = said.rsplit("Migration status").next();
            assert!(
                !said.contains("failed") && !said.contains("Error") && start.elapsed() < PATIENCE,
                "waited in vain for {what}: {last:?}"
            );
        }
    }

    /// Starts a move that does not end, and waits for some passes over the memory.
    #[track_caller]
    fn begin(&mut self, to: &str) {
        // Slower than the guest changes its memory.
        self.send("migrate_set_parameter max-bandwidth 12M");
        self.send("migrate_set_parameter downtime-limit 1");
        self.send(&format!("migrate -d unix:{to}"));
        self.wait_for("some passes", |said| passes(said) >= PASSES);
    }

    /// Lets it end.
    #[track_caller]
    fn finish(&mut self) {
        self.send("migrate_set_parameter max-bandwidth 1G");
        self.send("migrate_set_parameter downtime-limit 2000");
        self.wait_for("the end of the move", |said| {
            said.contains("Migration status: completed")
        });
    }
}

/// How often the memory was gone through, by the last `info migrate`.
fn passes(said: &str) -> u32 {
    let (_, rest) = said.rsplit_once("dirty sync count: ").unwrap_or_default();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
    rest[..end].parse().unwrap_or(0)
}

/// How many transfers came back whole, by the guest's last line.
fn good(qemu: &Qemu) -> usize {
    let text = qemu.running.stdout();
    let mut lines = text.lines().rev();
    let last = lines.find_map(|line| line.trim_end().strip_prefix("round good "));
    last.and_then(|rest| rest.split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

/// Waits until so many have.
#[track_caller]
fn rounds(qemu: &mut Qemu, count: usize) {
    let start = Instant::now();
    while good(qemu) < count {
        assert!(
            qemu.running.is_running() && start.elapsed() < PATIENCE,
            "no {count} whole transfers: {}\n{}",
            qemu.running.stdout(),
            qemu.running.stderr(),
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// The number in front of `text`.
#[track_caller]
fn before(line: &str, text: &str) -> u32 {
    let (rest, _) = line
        .split_once(text)
        .unwrap_or_else(|| panic!("no {text} in {line}"));
    let (_, number) = rest.rsplit_once(' ').unwrap_or(("", rest));
    number.parse().unwrap()
}

/// Stands between a front-end that connects to `from` and a back-end that waits at `to`, and keeps VHOST_F_LOG_ALL to itself: the front-end believes that what is
/// written is logged.
fn forget_the_log(from: &str, to: &str) {
    let front = UnixListener::bind(from).unwrap();
    let back = UnixStream::connect(to).unwrap();
    thread::spawn(move || {
        let (front, _) = front.accept().unwrap();
        let mut front = Connection::new(front).unwrap();
        let mut back = Connection::new(back).unwrap();
        loop {
            let (Ok(asked), Ok(answered)) = (front.receive(), back.receive()) else {
                return;
            };
            let idle = asked.is_none() && answered.is_none();
            if let Some(mut message) = asked {
                if message.request == requests::SET_FEATURES {
                    let U64(features) = U64::decode(&message.payload).unwrap();
                    message.payload = U64(features & !F_LOG_ALL).encode();
                }
                back.send(&message).unwrap();
            }
            if let Some(message) = answered {
                front.send(&message).unwrap();
            }
            if idle {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

/// A guest that has moved.
struct Moved {
    target: Qemu,
    /// Transfers before that.
    there: usize,
    _backs: [(Running, super::Control); 2],
    _place: Place,
}

/// Moves a guest; where the source's back-end does not log, that is not told to QEMU.
#[track_caller]
fn moved(pairing: Pairing, logs: bool) -> Moved {
    let place = Place::with(&script());
    let words = format!("work=respond addr=10.0.0.1/24 mode=irq count={HELD_BYTES}");
    let backs = ["s", "t"].map(|name| {
        let (mut vm, control) = place.back_end_at(name, "log=on", &words);
        vm.wait_for("its socket", |_| Path::new(&place.dir.file(name)).exists());
        (vm, control)
    });
    let front = if logs { "s" } else { "between" };
    if !logs {
        forget_the_log(&place.dir.file(front), &place.dir.file("s"));
    }
    let monitor = place.dir.file("monitor");
    let more = [
        "-monitor".to_owned(),
        format!("unix:{monitor},server=on,wait=off"),
    ];
    let mut source = place.qemu_at(front, linux::emulator(), pairing, SEALED, &more);
    let mut monitor = Monitor::connect(&monitor, &mut source.running);
    let way = place.dir.file("way");
    let more = ["-incoming".to_owned(), format!("unix:{way}")];
    let mut target = place.qemu_at("t", linux::emulator(), pairing, SEALED, &more);
    target
        .running
        .wait_for("the way", |_| Path::new(&way).exists());

    source.running.wait_for_stdout("round good");
    let said = source.running.stdout();
    assert!(said.contains(&format!("result pattern {HELD_BYTES}")));
    let (_, features) = said.split_once("result features ").unwrap();
    assert_eq!(features.as_bytes()[GUEST_ANNOUNCE], b'1', "{features}");
    let packed = if pairing.packed { b'1' } else { b'0' };
    assert_eq!(features.as_bytes()[RING_PACKED], packed, "{features}");
    rounds(&mut source, ROUNDS);
    monitor.begin(&way);
    source.input.write_all(b"hold\n").unwrap();
    monitor.wait_for("the data", |_| {
        source.running.stdout().contains("result holding")
    });
    let there = good(&source);
    rounds(&mut source, there + 1);
    monitor.finish();
    let there = good(&source);
    monitor.send("quit");
    source.running.end().expect_code(0);
    target.input.write_all(b"moved\n").unwrap();
    Moved {
        target,
        there,
        _backs: backs,
        _place: place,
    }
}

/// What the guest says where it has read all that it held.
fn all_bytes() -> String {
    format!("result bytes {}", HELD * HELD_BYTES)
}

#[track_caller]
fn goes_on(pairing: Pairing) {
    let Moved {
        mut target,
        there,
        _backs,
        _place,
    } = moved(pairing, true);
    // The guest goes on where it was, over rings that another VM serves now.
    target.running.wait_for_stdout("result held");
    rounds(&mut target, there + ROUNDS);
    // More pings than may be lost: that they are answered again shows.
    thread::sleep(Duration::from_secs((LOST / PINGS + 1).into()));
    target.input.write_all(b"stop\n").unwrap();
    let ended = target.running.end();
    ended.expect_code(0);
    let held = format!("result held {HELD}");
    assert!(ended.stdout.contains(&held), "{ended:?}");
    assert!(ended.stdout.contains(&all_bytes()), "{ended:?}");
    let last = ended
        .stdout
        .lines()
        .rev()
        .find(|line| line.contains("round good"));
    let last = last.unwrap().trim_end();
    assert!(last.ends_with(" wrong 0"), "{last}");
    let pings = ended
        .stdout
        .lines()
        .find(|line| line.contains("packets transmitted"));
    let pings = pings.unwrap_or_else(|| panic!("no pings: {ended:?}"));
    let (sent, came) = (
        before(pings, " packets transmitted"),
        before(pings, " packets received"),
    );
    assert!(
        came > 3 * PINGS && came <= sent && sent - came < LOST,
        "{pings}"
    );
    for name in ["rx_errors", "tx_errors", "rx_dropped"] {
        assert!(
            ended.stdout.contains(&format!("result {name} 0")),
            "{ended:?}"
        );
    }
    println!("{pairing:?}: {there} transfers before the move; {last}; {pings}");
}

#[test]
fn a_qemu_guest_moves_to_another_qemu_with_traffic_running_over_split_rings() {
    goes_on(Pairing {
        mergeable: true,
        ..Pairing::default()
    });
}

#[test]
fn a_qemu_guest_moves_to_another_qemu_with_traffic_running_over_packed_rings() {
    goes_on(Pairing {
        packed: true,
        ..Pairing::default()
    });
}

/// That the tests above can fail: with a back-end that logs nothing the guest does not find what it held, or stops altogether.
#[test]
fn without_the_log_a_moved_guest_reads_something_else_than_it_received() {
    let mut moved = moved(
        Pairing {
            mergeable: true,
            ..Pairing::default()
        },
        false,
    );
    let whole = format!("result held {HELD}");
    let start = Instant::now();
    while start.elapsed() < PATIENCE / 3 && moved.target.running.is_running() {
        let said = moved.target.running.stdout();
        assert!(!said.contains(&whole), "{said}");
        if said.contains("result held") {
            // As many bytes, and other ones.
            assert!(said.contains(&all_bytes()), "{said}");
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    println!("{}", moved.target.running.stdout());
}
