//! Commands: lines on the control channel, and the kernel command line (docs/bare-metal.md).

mod boot;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use guest_driver::vhost_pci::Junk;
use guest_driver::virtio_iommu::access;
use virtqueue::rss::{self, types};

use crate::frame::{End, IMIX, MAX_FRAME, MAX_SEGMENT, MIN_FRAME};
use crate::study::Sweep;
use crate::study::race::MAX_ROUNDS;
use crate::study::scribble::Scribble;
use crate::study::windows::MAX_LIVE;

pub use boot::{Boot, IommuMode};

/// Most flows of a workload.
const MAX_FLOWS: u64 = 64;

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

/// Which bytes of a frame are written and compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Payload {
    /// All of them.
    #[default]
    EveryByte,
    /// Those of its first line: headers, sequence number, and what else is there.
    Headers,
}

/// Where the frames that are sent come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// They are written where the peer will find them.
    #[default]
    Build,
    /// They are written in memory of the sender's own, and copied as a whole from there.
    Copy,
}

/// How an end waits for something to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It polls.
    #[default]
    Poll,
    /// It sleeps until an interrupt.
    Irq,
    /// It polls, and sleeps when it has found nothing to do for so long that the interrupt costs little beside it.
    Adaptive,
}

/// So many turns in a row with nothing to do, of up to some microseconds each, and an adaptive end sleeps.
pub const ADAPTIVE_TURNS: u32 = 256;

/// One run of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Comes back in the records and in every frame.
    pub id: u16,
    /// What to do.
    pub work: Work,
    /// Bytes of a frame.
    pub size: usize,
    /// Frames of three lengths instead, the simple Internet mix.
    pub imix: bool,
    /// Which bytes of a frame are written and compared.
    pub payload: Payload,
    /// Where the frames that are sent come from.
    pub source: Source,
    /// Frames a burst.
    pub batch: usize,
    /// How long to send, in milliseconds.
    pub ms: u64,
    /// How long before the timed part, in milliseconds.
    pub warmup_ms: u64,
    /// Frames to send, whatever `ms` says; 0: no limit.
    pub count: u64,
    /// How to wait for something to do.
    pub mode: Mode,
    /// Source and round trip: send when a frame is due, so many in a second, and time it from then; 0: as fast as they go.
    pub rate: u64,
    /// How long to wait before the first frame is sent or looked for, in milliseconds: a peer may throw away what comes before it is ready.
    pub delay_ms: u64,
    /// A receiver gives up after so long without a frame, in milliseconds.
    pub timeout_ms: u64,
    /// Windows a second that come and go beside it.
    pub churn: u64,
    /// Over how many queue pairs, one flow of frames each.
    pub queues: u16,
    /// How often a second all pairs but the first go out of use or come back (front-end).
    pub flips: u64,
    /// How many flows there are, where they are not one a pair.
    pub flows: u16,
    /// How often a second the RSS table is turned round (front-end, with flows).
    pub turns: u64,
    /// Leave the UDP checksum to the peer. Frames that are longer than a segment leave it and their segmentation to it in any case.
    pub offload: bool,
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
            imix: false,
            payload: Payload::default(),
            source: Source::default(),
            batch: 32,
            ms: 100,
            warmup_ms: 5,
            count: 0,
            mode: Mode::default(),
            rate: 0,
            delay_ms: 0,
            timeout_ms: 2000,
            churn: 0,
            queues: 1,
            flips: 0,
            flows: 0,
            turns: 0,
            offload: false,
            end: None,
            address: Address::default(),
        }
    }
}

impl Run {
    /// Whether its frames leave anything to the peer.
    #[must_use]
    pub fn offloads(&self) -> bool {
        self.offload || self.size > MAX_SEGMENT
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a workload.
    Run(Run),
    /// Reset the rings and start them anew (front-end).
    ResetRings,
    /// Reset the device and set it up anew (front-end).
    ResetDevice,
    /// Have the device steer what is received by RSS (front-end).
    Rss(Box<rss::Config>),
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
            Some("rss") => rss_config(line).map(|config| Some(Self::Rss(Box::new(config)))),
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

/// `rss table=0,1,… types=… key=… unclassified=…`: queue pairs, a mask of hash types, hexadecimal digits, a pair. As many transmit queues are used as there are pairs
/// in it.
fn rss_config(line: &str) -> Result<rss::Config, BadWord<'_>> {
    let words = Words(line);
    words.only(&["table", "types", "key", "unclassified"])?;
    let pairs = |text: &str| {
        let entries = text.split(',').map(|entry| entry.parse().ok());
        entries.collect::<Option<Vec<u16>>>()
    };
    let table = words.named("table", pairs)?;
    let types = match words.has("types") {
        true => words.within("types", 0..=u32::MAX.into())?,
        false => types::ALL.into(),
    };
    let unclassified = match words.has("unclassified") {
        true => words.within("unclassified", 0..=u16::MAX.into())?,
        false => 0,
    };
    let key = words.named("key", bytes)?;
    let bad = BadWord(line);
    let types = u32::try_from(types).map_err(|_| bad)?;
    let unclassified = u16::try_from(unclassified).map_err(|_| bad)?;
    let last = table.iter().copied().max().unwrap_or(0).max(unclassified);
    let pairs = last
        .checked_add(1)
        .filter(|&pairs| pairs <= MAX_QUEUES)
        .ok_or(bad)?;
    rss::Config::new(types, unclassified, &table, pairs, &key, pairs).ok_or(bad)
}

/// Bytes as hexadecimal digits, two each.
fn bytes(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digits = text.bytes().all(|digit| digit.is_ascii_hexdigit());
    let byte = |pair: &[u8; 2]| u8::from_str_radix(core::str::from_utf8(pair).ok()?, 16).ok();
    let bytes = pairs.iter().map(byte).collect::<Option<_>>();
    bytes.filter(|_| digits && rest.is_empty())
}

impl Run {
    /// Whether to sleep until an interrupt, after so many turns in a row with nothing to do.
    #[inline(always)]
    #[must_use]
    pub fn sleeps(&self, idle_turns: u32) -> bool {
        match self.mode {
            Mode::Poll => false,
            Mode::Irq => true,
            Mode::Adaptive => idle_turns >= ADAPTIVE_TURNS,
        }
    }

    /// Bytes of so many frames; of a mix, on average.
    #[must_use]
    pub fn bytes(&self, frames: u64) -> u64 {
        match self.imix {
            true => {
                let unit: usize = IMIX.iter().sum();
                frames.saturating_mul(unit as u64) / IMIX.len() as u64
            }
            false => frames.saturating_mul(self.size as u64),
        }
    }

    /// Takes one `key=value` word.
    fn set<'a>(&mut self, word: &'a str) -> Result<(), BadWord<'a>> {
        let bad = BadWord(word);
        let (key, value) = word.split_once('=').ok_or(bad)?;
        let within = |range: core::ops::RangeInclusive<u64>| {
            number(value).filter(|n| range.contains(n)).ok_or(bad)
        };
        match key {
            "id" => self.id = value.parse().map_err(|_| bad)?,
            "size" => {
                let sizes = MIN_FRAME as u64..=MAX_FRAME as u64;
                self.imix = value == "imix";
                self.size = match self.imix {
                    true => IMIX[0],
                    false => usize::try_from(within(sizes)?).map_err(|_| bad)?,
                }
            }
            "payload" => {
                self.payload = match value {
                    "every-byte" => Payload::EveryByte,
                    "headers" => Payload::Headers,
                    _ => return Err(bad),
                }
            }
            "source" => {
                self.source = match value {
                    "build" => Source::Build,
                    "copy" => Source::Copy,
                    _ => return Err(bad),
                }
            }
            "batch" => self.batch = usize::try_from(within(1..=256)?).map_err(|_| bad)?,
            "ms" => self.ms = within(0..=86_400_000)?,
            "warmup_ms" => self.warmup_ms = within(0..=86_400_000)?,
            "count" => self.count = within(0..=u64::MAX)?,
            "churn" => self.churn = within(0..=100_000)?,
            "rate" => self.rate = within(0..=1_000_000_000)?,
            "queues" => self.queues = queues(value).ok_or(bad)?,
            "flips" => self.flips = within(0..=1000)?,
            "flows" => self.flows = u16::try_from(within(0..=MAX_FLOWS)?).map_err(|_| bad)?,
            "turns" => self.turns = within(0..=1000)?,
            "delay_ms" => self.delay_ms = within(0..=60_000)?,
            "offload" => self.offload = on_off(value).ok_or(bad)?,
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
                self.mode = match value {
                    "poll" => Mode::Poll,
                    "irq" => Mode::Irq,
                    "adaptive" => Mode::Adaptive,
                    _ => return Err(bad),
                }
            }
            _ => return Err(bad),
        }
        Ok(())
    }
}

/// A number of queue pairs.
fn queues(text: &str) -> Option<u16> {
    let pairs = number(text).and_then(|n| u16::try_from(n).ok())?;
    (1..=MAX_QUEUES).contains(&pairs).then_some(pairs)
}

fn on_off(text: &str) -> Option<bool> {
    match text {
        "on" => Some(true),
        "off" => Some(false),
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
mod tests;
