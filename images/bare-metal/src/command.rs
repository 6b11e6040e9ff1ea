//! Commands: the kernel command line, and lines on the control channel (docs/bare-metal.md).

use core::net::Ipv4Addr;

use guest_driver::net_port::{Shape, TxShape};
use guest_driver::vhost_pci::Junk;
use guest_driver::virtio_iommu::access;

use crate::frame::End;
use crate::study::Sweep;
use crate::study::race::MAX_ROUNDS;
use crate::study::scribble::Scribble;
use crate::study::windows::MAX_LIVE;

/// Smallest receive buffer.
const MIN_RX_BUFFER: u16 = 128;

/// Most queue pairs that a workload uses.
const MAX_QUEUES: u16 = 16;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Send.
    Source,
    /// Receive and check.
    Sink,
    /// Both at once.
    Both,
    /// Send back what arrives.
    Echo,
    /// Send one frame at a time to an echo and time it.
    RoundTrip,
    /// Be a host that answers.
    Respond,
}

impl Work {
    /// Its name in commands and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Sink => "sink",
            Self::Both => "both",
            Self::Echo => "echo",
            Self::RoundTrip => "round-trip",
            Self::Respond => "respond",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [
            Self::Source,
            Self::Sink,
            Self::Both,
            Self::Echo,
            Self::RoundTrip,
            Self::Respond,
        ]
        .into_iter()
        .find(|work| work.name() == name)
    }
}

/// One run of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Comes back in the records and in every frame.
    pub id: u16,
    /// What to do.
    pub work: Work,
    /// Bytes of a frame.
    pub size: usize,
    /// Frames a burst.
    pub batch: usize,
    /// How long to send, in milliseconds.
    pub ms: u64,
    /// How long before the timed part, in milliseconds.
    pub warmup_ms: u64,
    /// Frames to send, whatever `ms` says; 0: no limit.
    pub count: u64,
    /// Sleep until an interrupt instead of polling.
    pub interrupts: bool,
    /// A receiver gives up after so long without a frame, in milliseconds.
    pub timeout_ms: u64,
    /// Windows a second that come and go beside it.
    pub churn: u64,
    /// Over how many queue pairs, one flow of frames each.
    pub queues: u16,
    /// How often a second all pairs but the first go out of use or come back (front-end).
    pub flips: u64,
    /// Which end to be, where it is not the device that says so: two front-ends that a switch joins are one of each.
    pub end: Option<End>,
    /// Who a responder is.
    pub address: Address,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            id: 0,
            work: Work::Source,
            size: 64,
            batch: 32,
            ms: 100,
            warmup_ms: 5,
            count: 0,
            interrupts: false,
            timeout_ms: 2000,
            churn: 0,
            queues: 1,
            flips: 0,
            end: None,
            address: Address::default(),
        }
    }
}

/// Who a responder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Ethernet address: of one station.
    pub mac: [u8; 6],
    /// IPv4 address: of one host.
    pub ip: [u8; 4],
    /// Bits of the network.
    pub prefix: u8,
}

impl Default for Address {
    fn default() -> Self {
        Self {
            mac: [0x02, 0, 0, 0, 0, 0x01],
            ip: [10, 0, 0, 1],
            prefix: 24,
        }
    }
}

/// An Ethernet address that one station can have, `02:00:00:00:00:01`.
fn mac(text: &str) -> Option<[u8; 6]> {
    let mut parts = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits)?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// An IPv4 address that one host can have, and the bits of its network, `10.0.0.1/24`.
fn network(text: &str) -> Option<([u8; 4], u8)> {
    let (ip, prefix) = text.split_once('/')?;
    let ip: Ipv4Addr = ip.parse().ok()?;
    let prefix = prefix.parse().ok().filter(|bits| (1..=32).contains(bits))?;
    let host = !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast();
    host.then_some((ip.octets(), prefix))
}

/// A word that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord<'a>(pub &'a str);

/// A line on the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a workload.
    Run(Run),
    /// Reset the rings and start them anew (front-end).
    ResetRings,
    /// Reset the device and set it up anew (front-end).
    ResetDevice,
    /// Power off with an exit code.
    Exit(u8),
    /// A step of the isolation study.
    Study(Study),
}

/// A step of the isolation study. Addresses and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Study {
    /// Take pages for experiments (either end; as all up to [`Study::Kicks`] the others are the front-end's, but for fill and check).
    Pages {
        /// How many.
        count: u64,
    },
    /// Attach the endpoint.
    Attach,
    /// Detach it.
    Detach,
    /// One MAP request.
    Map {
        /// First device address.
        iova: u64,
        /// First guest physical address.
        gpa: u64,
        /// Length.
        len: u64,
        /// Of [`access`].
        flags: u32,
    },
    /// One UNMAP request.
    Unmap {
        /// First device address.
        iova: u64,
        /// Length.
        len: u64,
    },
    /// Write words that can be recognised.
    Fill {
        /// Guest physical address.
        gpa: u64,
        /// Length.
        len: u64,
        /// Of the words.
        seed: u64,
    },
    /// Compare with what [`Study::Fill`] wrote.
    Check {
        /// Guest physical address.
        gpa: u64,
        /// Length.
        len: u64,
        /// Of the words.
        seed: u64,
    },
    /// Report the faults since the last time.
    Faults,
    /// Set the network device up.
    Start,
    /// Time changes of windows.
    Windows {
        /// How many others are there.
        live: u64,
        /// How many changes of each kind.
        count: u64,
    },
    /// Play the victim of the race.
    Victim {
        /// How many rounds.
        rounds: u64,
        /// Device address of the page.
        iova: u64,
        /// Its guest physical address.
        gpa: u64,
        /// That of the sync page.
        sync: u64,
    },
    /// Notify the device.
    Kicks {
        /// How often.
        count: u64,
    },
    /// Write nonsense into rings (either end).
    Scribble {
        /// Which part.
        what: Scribble,
        /// How often.
        count: u64,
        /// Of the nonsense.
        seed: u64,
    },
    /// Read the window (back-end, as all from here on).
    Peek(Sweep),
    /// Write into the window.
    Poke(Sweep),
    /// Play the attacker of the race.
    Attacker {
        /// Offset of the page.
        offset: u64,
        /// Offset of the sync page.
        sync: u64,
        /// For how long at most.
        ms: u64,
    },
    /// Interrupt the front-end.
    Calls {
        /// How often.
        count: u64,
    },
    /// Send messages that nobody asked for.
    Messages {
        /// Of which kind.
        what: Junk,
        /// How many.
        count: u64,
    },
}

impl Study {
    /// Its name in commands and records.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pages { .. } => "pages",
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::Map { .. } => "map",
            Self::Unmap { .. } => "unmap",
            Self::Fill { .. } => "fill",
            Self::Check { .. } => "check",
            Self::Faults => "faults",
            Self::Start => "start",
            Self::Windows { .. } => "windows",
            Self::Victim { .. } | Self::Attacker { .. } => "race",
            Self::Kicks { .. } => "kicks",
            Self::Scribble { .. } => "scribble",
            Self::Peek(_) => "peek",
            Self::Poke(_) => "poke",
            Self::Calls { .. } => "calls",
            Self::Messages { .. } => "messages",
        }
    }

    /// Parses a line whose first word is `name`; `None` where that names no step.
    fn parse<'a>(name: &str, line: &'a str) -> Option<Result<Self, BadWord<'a>>> {
        let words = Words(line);
        let parsed = match name {
            "pages" => words.only(&["count"]).and_then(|()| {
                Ok(Self::Pages {
                    count: words.within("count", 1..=1 << 20)?,
                })
            }),
            "attach" => words.only(&[]).map(|()| Self::Attach),
            "detach" => words.only(&[]).map(|()| Self::Detach),
            "faults" => words.only(&[]).map(|()| Self::Faults),
            "start" => words.only(&[]).map(|()| Self::Start),
            "map" => words.only(&["iova", "gpa", "len", "perm"]).and_then(|()| {
                Ok(Self::Map {
                    iova: words.number("iova")?,
                    gpa: words.number("gpa")?,
                    len: words.within("len", 1..=u64::MAX)?,
                    flags: words.named("perm", permission)?,
                })
            }),
            "unmap" => words.only(&["iova", "len"]).and_then(|()| {
                Ok(Self::Unmap {
                    iova: words.number("iova")?,
                    len: words.within("len", 1..=u64::MAX)?,
                })
            }),
            "fill" => words
                .filled()
                .map(|(gpa, len, seed)| Self::Fill { gpa, len, seed }),
            "check" => words
                .filled()
                .map(|(gpa, len, seed)| Self::Check { gpa, len, seed }),
            "windows" => words.only(&["live", "count"]).and_then(|()| {
                Ok(Self::Windows {
                    live: words.within("live", 0..=MAX_LIVE)?,
                    count: words.within("count", 1..=1 << 20)?,
                })
            }),
            "race" if words.has("rounds") => words
                .only(&["rounds", "iova", "gpa", "sync"])
                .and_then(|()| {
                    Ok(Self::Victim {
                        rounds: words.within("rounds", 1..=MAX_ROUNDS)?,
                        iova: words.number("iova")?,
                        gpa: words.number("gpa")?,
                        sync: words.number("sync")?,
                    })
                }),
            "race" => words.only(&["offset", "sync", "ms"]).and_then(|()| {
                Ok(Self::Attacker {
                    offset: words.number("offset")?,
                    sync: words.number("sync")?,
                    ms: words.within("ms", 1..=600_000)?,
                })
            }),
            "kicks" => words.counted(&[]).map(|count| Self::Kicks { count }),
            "calls" => words.counted(&[]).map(|count| Self::Calls { count }),
            "scribble" => words.counted(&["what", "seed"]).and_then(|count| {
                Ok(Self::Scribble {
                    what: words.named("what", Scribble::parse)?,
                    count,
                    seed: words.number("seed")?,
                })
            }),
            "peek" => words.sweep().map(Self::Peek),
            "poke" => words.sweep().map(Self::Poke),
            "messages" => words.counted(&["what"]).and_then(|count| {
                Ok(Self::Messages {
                    what: words.named("what", junk)?,
                    count,
                })
            }),
            _ => return None,
        };
        Some(parsed)
    }
}

/// Most repetitions that a command takes.
const MAX_COUNT: u64 = 10_000_000;

/// The `key=value` words of a line, behind its first word.
#[derive(Clone, Copy)]
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn iter(self) -> impl Iterator<Item = (&'a str, Option<(&'a str, &'a str)>)> {
        let words = self.0.split_ascii_whitespace().skip(1);
        words.map(|word| (word, word.split_once('=')))
    }

    /// The first word whose key is none that is `known`.
    fn stranger(self, known: impl Fn(&str) -> bool) -> Option<&'a str> {
        let mut words = self.iter();
        let (word, _) = words.find(|(_, pair)| !pair.is_some_and(|(key, _)| known(key)))?;
        Some(word)
    }

    /// That there are no other keys than these.
    fn only(self, keys: &[&str]) -> Result<(), BadWord<'a>> {
        match self.stranger(|key| keys.contains(&key)) {
            Some(word) => Err(BadWord(word)),
            None => Ok(()),
        }
    }

    fn has(self, key: &str) -> bool {
        self.iter()
            .any(|(_, pair)| pair.is_some_and(|(k, _)| k == key))
    }

    /// What `parse` makes of a value. A word that is missing is the fault of the whole line.
    fn named<T>(
        self,
        key: &str,
        parse: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<T, BadWord<'a>> {
        let mut words = self.iter();
        let (word, value) = words
            .find_map(|(word, pair)| Some((word, pair.filter(|&(k, _)| k == key)?.1)))
            .ok_or(BadWord(self.0))?;
        parse(value).ok_or(BadWord(word))
    }

    fn number(self, key: &str) -> Result<u64, BadWord<'a>> {
        self.named(key, number)
    }

    fn within(self, key: &str, range: core::ops::RangeInclusive<u64>) -> Result<u64, BadWord<'a>> {
        self.named(key, |value| number(value).filter(|n| range.contains(n)))
    }

    /// `count`, with these keys beside it.
    fn counted(self, others: &[&str]) -> Result<u64, BadWord<'a>> {
        match self.stranger(|key| key == "count" || others.contains(&key)) {
            Some(word) => Err(BadWord(word)),
            None => self.within("count", 1..=MAX_COUNT),
        }
    }

    /// Of `fill` and `check`: address, length, seed.
    fn filled(self) -> Result<(u64, u64, u64), BadWord<'a>> {
        self.only(&["gpa", "len", "seed"])?;
        Ok((
            self.number("gpa")?,
            self.within("len", 1..=u64::MAX)?,
            self.number("seed")?,
        ))
    }

    /// Of `peek` and `poke`.
    fn sweep(self) -> Result<Sweep, BadWord<'a>> {
        self.only(&["offset", "len", "step", "width", "seed"])?;
        let width = match self.has("width") {
            true => self.named("width", |value| {
                number(value).filter(|n| matches!(n, 1 | 2 | 4 | 8 | 16 | 32 | 64))
            })?,
            false => 8,
        };
        Ok(Sweep {
            offset: self.number("offset")?,
            len: self.within("len", 1..=u64::MAX)?,
            step: match self.has("step") {
                true => self.within("step", 1..=u64::MAX)?,
                false => width,
            },
            width: usize::try_from(width).map_err(|_| BadWord(self.0))?,
            seed: match self.has("seed") {
                true => self.number("seed")?,
                false => 0,
            },
        })
    }
}

/// What a mapping allows, by name.
fn permission(name: &str) -> Option<u32> {
    match name {
        "none" => Some(0),
        "r" => Some(access::READ),
        "w" => Some(access::WRITE),
        "rw" => Some(access::READ | access::WRITE),
        _ => None,
    }
}

/// Messages that nobody asked for, by name.
fn junk(name: &str) -> Option<Junk> {
    match name {
        "reply" => Some(Junk::Reply),
        "request" => Some(Junk::Request),
        "short" => Some(Junk::Short),
        "long" => Some(Junk::Long),
        "garbage" => Some(Junk::Garbage),
        _ => None,
    }
}

impl Command {
    /// Parses a line; an empty one is no command.
    pub fn parse(line: &str) -> Result<Option<Self>, BadWord<'_>> {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            None => Ok(None),
            Some("run") => {
                let mut run = Run::default();
                let mut work = None;
                for word in words {
                    match word.split_once('=') {
                        Some(("work", name)) => {
                            work = Some(Work::parse(name).ok_or(BadWord(word))?)
                        }
                        _ => run.set(word)?,
                    }
                }
                run.work = work.ok_or(BadWord(line))?;
                Ok(Some(Self::Run(run)))
            }
            Some(name @ ("reset-rings" | "reset-device")) => match words.next() {
                None if name == "reset-rings" => Ok(Some(Self::ResetRings)),
                None => Ok(Some(Self::ResetDevice)),
                Some(word) => Err(BadWord(word)),
            },
            Some("exit") => {
                let mut code = 0;
                for word in words {
                    code = match word.split_once('=') {
                        Some(("code", value)) => value.parse().map_err(|_| BadWord(word))?,
                        _ => return Err(BadWord(word)),
                    };
                }
                Ok(Some(Self::Exit(code)))
            }
            Some(word) => match Study::parse(word, line) {
                Some(study) => study.map(|study| Some(Self::Study(study))),
                None => Err(BadWord(word)),
            },
        }
    }
}

impl Run {
    /// Takes one `key=value` word.
    fn set<'a>(&mut self, word: &'a str) -> Result<(), BadWord<'a>> {
        let bad = BadWord(word);
        let (key, value) = word.split_once('=').ok_or(bad)?;
        let within = |range: core::ops::RangeInclusive<u64>| {
            number(value).filter(|n| range.contains(n)).ok_or(bad)
        };
        match key {
            "id" => self.id = value.parse().map_err(|_| bad)?,
            "size" => self.size = usize::try_from(within(60..=1518)?).map_err(|_| bad)?,
            "batch" => self.batch = usize::try_from(within(1..=256)?).map_err(|_| bad)?,
            "ms" => self.ms = within(0..=86_400_000)?,
            "warmup_ms" => self.warmup_ms = within(0..=86_400_000)?,
            "count" => self.count = within(0..=u64::MAX)?,
            "churn" => self.churn = within(0..=100_000)?,
            "queues" => self.queues = queues(value).ok_or(bad)?,
            "flips" => self.flips = within(0..=1000)?,
            "timeout_ms" => self.timeout_ms = within(1..=86_400_000)?,
            "end" => {
                self.end = match value {
                    "front-end" => Some(End::FrontEnd),
                    "back-end" => Some(End::BackEnd),
                    _ => return Err(bad),
                }
            }
            "mac" => self.address.mac = mac(value).ok_or(bad)?,
            "addr" => (self.address.ip, self.address.prefix) = network(value).ok_or(bad)?,
            "mode" => {
                self.interrupts = match value {
                    "poll" => false,
                    "irq" => true,
                    _ => return Err(bad),
                }
            }
            _ => return Err(bad),
        }
        Ok(())
    }
}

/// What the kernel command line says.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Frequency of the time-stamp counter.
    pub tsc_khz: u64,
    /// Where PCI configuration space is.
    pub ecam: u64,
    /// Memory for devices apart from the RAM: its address, and its length; a length of zero where there is none.
    pub dma: (u64, u64),
    /// How the front-end lays out frames in buffers.
    pub shape: Shape,
    /// How many queue pairs the front-end sets up.
    pub queues: u16,
    /// A workload to run at once; otherwise commands are read from the control channel.
    pub run: Option<Run>,
    /// How the front-end's buffers are mapped where there is a virtio-iommu.
    pub iommu: IommuMode,
    /// What is added to a guest physical address to make the device address under which it is mapped.
    pub iova: u64,
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            tsc_khz: 0,
            ecam: 0,
            dma: (0, 0),
            shape: Shape::default(),
            queues: 1,
            run: None,
            iommu: IommuMode::default(),
            iova: 1 << 32,
        }
    }
}

/// How a front-end uses its virtio-iommu.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IommuMode {
    /// Rings and buffers are mapped once.
    #[default]
    Static,
    /// Each buffer is mapped while the device has it, one request at a time.
    Dynamic,
    /// The same, one notification for all buffers of a burst.
    Batch,
    /// As [`IommuMode::Static`], but nothing is attached or mapped until a command says so.
    Manual,
}

impl IommuMode {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "static" => Some(Self::Static),
            "dynamic" => Some(Self::Dynamic),
            "batch" => Some(Self::Batch),
            "manual" => Some(Self::Manual),
            _ => None,
        }
    }
}

impl Boot {
    /// Parses the command line; each word that is not understood is handed to `unknown`.
    pub fn parse<'a>(line: &'a str, mut unknown: impl FnMut(&'a str)) -> Self {
        let mut boot = Self::default();
        let mut run = Run::default();
        let mut work = None;
        for word in line.split_ascii_whitespace() {
            let understood = match word.split_once('=') {
                Some(("tsc_khz", value)) => number(value).map(|n| boot.tsc_khz = n).is_some(),
                Some(("ecam", value)) => number(value).map(|n| boot.ecam = n).is_some(),
                Some(("dma", value)) => number(value).map(|n| boot.dma.0 = n).is_some(),
                Some(("dma_len", value)) => number(value).map(|n| boot.dma.1 = n).is_some(),
                Some(("tx", shape)) => tx_shape(shape).map(|tx| boot.shape.tx = tx).is_some(),
                Some(("rx_buffer", value)) => number(value)
                    .and_then(|n| u16::try_from(n).ok())
                    .filter(|n| (MIN_RX_BUFFER..=Shape::default().rx_buffer).contains(n))
                    .map(|n| boot.shape.rx_buffer = n)
                    .is_some(),
                Some(("iommu", mode)) => IommuMode::parse(mode)
                    .map(|mode| boot.iommu = mode)
                    .is_some(),
                Some(("iova", value)) => number(value).map(|n| boot.iova = n).is_some(),
                Some(("queues", value)) => queues(value)
                    .map(|n| (boot.queues, run.queues) = (n, n))
                    .is_some(),
                Some(("work", "control")) => true,
                Some(("work", name)) => Work::parse(name)
                    .map(|parsed| work = Some(parsed))
                    .is_some(),
                _ => run.set(word).is_ok(),
            };
            if !understood {
                unknown(word);
            }
        }
        boot.run = work.map(|work| Run { work, ..run });
        boot
    }
}

/// A number of queue pairs.
fn queues(text: &str) -> Option<u16> {
    let pairs = number(text).and_then(|n| u16::try_from(n).ok())?;
    (1..=MAX_QUEUES).contains(&pairs).then_some(pairs)
}

/// How frames to send are given to the device, by name.
fn tx_shape(name: &str) -> Option<TxShape> {
    match name {
        "direct" => Some(TxShape::Direct),
        "chain" => Some(TxShape::Chain),
        "indirect" => Some(TxShape::Indirect),
        _ => None,
    }
}

/// A decimal number, or a hexadecimal one behind `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_run_command_takes_every_key() {
        let line = "run id=7 work=round-trip size=1518 batch=8 ms=20 warmup_ms=1 count=9 mode=irq timeout_ms=30 churn=1000 end=back-end queues=16 flips=50 mac=02:00:00:00:0a:ff addr=192.168.7.9/16";
        let want = Run {
            id: 7,
            work: Work::RoundTrip,
            size: 1518,
            batch: 8,
            ms: 20,
            warmup_ms: 1,
            count: 9,
            interrupts: true,
            timeout_ms: 30,
            churn: 1000,
            queues: 16,
            flips: 50,
            end: Some(End::BackEnd),
            address: Address {
                mac: [2, 0, 0, 0, 0x0a, 0xff],
                ip: [192, 168, 7, 9],
                prefix: 16,
            },
        };
        assert_eq!(Command::parse(line), Ok(Some(Command::Run(want))));
        assert_eq!(Command::parse("exit code=9"), Ok(Some(Command::Exit(9))));
        assert_eq!(Command::parse("reset-rings"), Ok(Some(Command::ResetRings)));
        assert_eq!(
            Command::parse("reset-device"),
            Ok(Some(Command::ResetDevice))
        );
        assert_eq!(Command::parse("  "), Ok(None));
    }

    #[test]
    fn every_step_of_the_study_is_understood_and_keeps_its_name() {
        let sweep = Sweep {
            offset: 0x1000,
            len: 64,
            step: 16,
            width: 4,
            seed: 9,
        };
        for (line, want) in [
            ("pages count=16", Study::Pages { count: 16 }),
            ("attach", Study::Attach),
            ("detach", Study::Detach),
            (
                "map iova=0x1000 gpa=0x2000 len=4096 perm=rw",
                Study::Map {
                    iova: 0x1000,
                    gpa: 0x2000,
                    len: 4096,
                    flags: 3,
                },
            ),
            (
                "map perm=none len=1 gpa=2 iova=3",
                Study::Map {
                    iova: 3,
                    gpa: 2,
                    len: 1,
                    flags: 0,
                },
            ),
            (
                "unmap iova=0x1000 len=0xffffffffffffffff",
                Study::Unmap {
                    iova: 0x1000,
                    len: u64::MAX,
                },
            ),
            (
                "fill gpa=1 len=2 seed=3",
                Study::Fill {
                    gpa: 1,
                    len: 2,
                    seed: 3,
                },
            ),
            (
                "check gpa=1 len=2 seed=3",
                Study::Check {
                    gpa: 1,
                    len: 2,
                    seed: 3,
                },
            ),
            ("faults", Study::Faults),
            ("start", Study::Start),
            (
                "windows live=8192 count=100",
                Study::Windows {
                    live: 8192,
                    count: 100,
                },
            ),
            (
                "race rounds=10 iova=1 gpa=2 sync=3",
                Study::Victim {
                    rounds: 10,
                    iova: 1,
                    gpa: 2,
                    sync: 3,
                },
            ),
            ("kicks count=7", Study::Kicks { count: 7 }),
            (
                "peek offset=0x1000 len=64 step=16 width=4 seed=9",
                Study::Peek(sweep),
            ),
            (
                "poke offset=0x1000 len=64",
                Study::Poke(Sweep {
                    step: 8,
                    width: 8,
                    seed: 0,
                    ..sweep
                }),
            ),
            (
                "race offset=1 sync=2 ms=3",
                Study::Attacker {
                    offset: 1,
                    sync: 2,
                    ms: 3,
                },
            ),
            ("calls count=7", Study::Calls { count: 7 }),
            (
                "messages what=garbage count=2",
                Study::Messages {
                    what: Junk::Garbage,
                    count: 2,
                },
            ),
        ] {
            assert_eq!(Command::parse(line), Ok(Some(Command::Study(want))));
            assert!(line.starts_with(want.name()));
        }
        for device in [false, true] {
            for &what in Scribble::of(device) {
                let line = std::format!("scribble what={} count=5 seed=1", what.name());
                let want = Study::Scribble {
                    what,
                    count: 5,
                    seed: 1,
                };
                assert_eq!(Command::parse(&line), Ok(Some(Command::Study(want))));
            }
        }
    }

    #[test]
    fn the_command_line_says_how_the_iommu_is_used() {
        for (word, mode) in [
            ("", IommuMode::Static),
            ("iommu=static", IommuMode::Static),
            ("iommu=dynamic", IommuMode::Dynamic),
            ("iommu=batch", IommuMode::Batch),
            ("iommu=manual", IommuMode::Manual),
        ] {
            let boot = Boot::parse(word, |word| panic!("{word}"));
            assert_eq!((boot.iommu, boot.iova), (mode, 0x1_0000_0000));
        }
        let boot = Boot::parse("iova=0x200000000", |word| panic!("{word}"));
        assert_eq!(boot.iova, 0x2_0000_0000);
        let mut unknown = Vec::new();
        Boot::parse("iommu=perhaps iova=far", |word| unknown.push(word));
        assert_eq!(unknown, ["iommu=perhaps", "iova=far"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in [
            ("run work=source size=59", "size=59"),
            ("run work=source batch=0", "batch=0"),
            ("run work=source batch=257", "batch=257"),
            ("run work=dance", "work=dance"),
            ("run work=source mode=maybe", "mode=maybe"),
            ("run work=source id=65536", "id=65536"),
            ("run size=64", "run size=64"),
            ("stop", "stop"),
            ("exit now", "now"),
            ("reset-rings now", "now"),
            ("reset-device now", "now"),
            ("exit code=256", "code=256"),
            ("attach now", "now"),
            ("map iova=0 gpa=0 len=0 perm=r", "len=0"),
            ("map iova=0 gpa=0 len=1 perm=x", "perm=x"),
            ("map iova=0 gpa=0 len=1", "map iova=0 gpa=0 len=1"),
            ("peek offset=0 len=8 width=3", "width=3"),
            ("peek offset=0 len=8 step=0", "step=0"),
            ("poke offset=0 len=8 color=red", "color=red"),
            ("windows live=8193 count=1", "live=8193"),
            ("race rounds=1048577 iova=0 gpa=0 sync=0", "rounds=1048577"),
            ("race offset=0 sync=0", "race offset=0 sync=0"),
            ("scribble what=nothing count=1 seed=0", "what=nothing"),
            ("kicks count=0", "count=0"),
            ("kicks count=1 seed=0", "seed=0"),
            ("messages what=reply", "messages what=reply"),
            ("run work=source churn=100001", "churn=100001"),
            ("run work=source end=middle", "end=middle"),
            ("run work=respond addr=10.0.0.1", "addr=10.0.0.1"),
            ("run work=respond addr=10.0.0.1/33", "addr=10.0.0.1/33"),
            ("run work=respond addr=10.0.0/24", "addr=10.0.0/24"),
            ("run work=respond addr=0.0.0.0/8", "addr=0.0.0.0/8"),
            ("run work=respond addr=224.0.0.1/8", "addr=224.0.0.1/8"),
            (
                "run work=respond mac=01:00:00:00:00:01",
                "mac=01:00:00:00:00:01",
            ),
            (
                "run work=respond mac=00:00:00:00:00:00",
                "mac=00:00:00:00:00:00",
            ),
            ("run work=respond mac=02:00:00:00:01", "mac=02:00:00:00:01"),
            (
                "run work=respond mac=02:00:00:00:00:+1",
                "mac=02:00:00:00:00:+1",
            ),
            ("run work=source queues=0", "queues=0"),
            ("run work=source queues=17", "queues=17"),
            ("run work=source flips=1001", "flips=1001"),
        ] {
            assert_eq!(Command::parse(line), Err(BadWord(word)));
        }
    }

    #[test]
    fn the_command_line_keeps_what_it_knows_and_reports_the_rest() {
        let mut unknown = Vec::new();
        let boot = Boot::parse(
            "work=sink quiet ms=5 ecam=0xe0000000 tsc_khz=2596000 size=1",
            |word| unknown.push(word),
        );
        assert_eq!((boot.ecam, boot.tsc_khz), (0xe000_0000, 2_596_000));
        assert_eq!(
            boot.run,
            Some(Run {
                work: Work::Sink,
                ms: 5,
                ..Run::default()
            })
        );
        assert_eq!(unknown, ["quiet", "size=1"]);
        let boot = Boot::parse("tx=indirect rx_buffer=512", |word| panic!("{word}"));
        assert_eq!(
            (boot.shape.tx, boot.shape.rx_buffer),
            (TxShape::Indirect, 512)
        );
        let mut unknown = Vec::new();
        Boot::parse("tx=fast rx_buffer=127 rx_buffer=1531", |word| {
            unknown.push(word)
        });
        assert_eq!(unknown, ["tx=fast", "rx_buffer=127", "rx_buffer=1531"]);
        assert_eq!(Boot::parse("work=control", |_| ()).run, None);
        let boot = Boot::parse("queues=4 work=both", |word| panic!("{word}"));
        assert_eq!((boot.queues, boot.run.map(|run| run.queues)), (4, Some(4)));
    }
}
