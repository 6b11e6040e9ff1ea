//! Commands: the kernel command line, and lines on the control channel (docs/bare-metal.md).

use guest_driver::net_port::{Shape, TxShape};

/// Smallest receive buffer.
const MIN_RX_BUFFER: u16 = 128;

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
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [
            Self::Source,
            Self::Sink,
            Self::Both,
            Self::Echo,
            Self::RoundTrip,
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
        }
    }
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
    /// Power off with an exit code.
    Exit(u8),
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
            Some("reset-rings") => match words.next() {
                None => Ok(Some(Self::ResetRings)),
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
            Some(word) => Err(BadWord(word)),
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
            "timeout_ms" => self.timeout_ms = within(1..=86_400_000)?,
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
#[derive(Clone, Copy, Debug, Default)]
pub struct Boot {
    /// Frequency of the time-stamp counter.
    pub tsc_khz: u64,
    /// Where PCI configuration space is.
    pub ecam: u64,
    /// How the front-end lays out frames in buffers.
    pub shape: Shape,
    /// A workload to run at once; otherwise commands are read from the control channel.
    pub run: Option<Run>,
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
                Some(("tx", shape)) => tx_shape(shape).map(|tx| boot.shape.tx = tx).is_some(),
                Some(("rx_buffer", value)) => number(value)
                    .and_then(|n| u16::try_from(n).ok())
                    .filter(|n| (MIN_RX_BUFFER..=Shape::default().rx_buffer).contains(n))
                    .map(|n| boot.shape.rx_buffer = n)
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
        let line = "run id=7 work=round-trip size=1518 batch=8 ms=20 warmup_ms=1 count=9 mode=irq timeout_ms=30";
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
        };
        assert_eq!(Command::parse(line), Ok(Some(Command::Run(want))));
        assert_eq!(Command::parse("exit code=9"), Ok(Some(Command::Exit(9))));
        assert_eq!(Command::parse("reset-rings"), Ok(Some(Command::ResetRings)));
        assert_eq!(Command::parse("  "), Ok(None));
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
            ("exit code=256", "code=256"),
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
    }
}
