//! Records: one JSON object a line (docs/bare-metal.md).

use core::fmt;

use crate::Run;
use crate::histogram::Histogram;

/// What a sender did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Frames of the timed part.
    pub frames: u64,
    /// Length of the timed part in ticks.
    pub ticks: u64,
    /// Bursts that found the ring full.
    pub full: u64,
}

/// What a receiver saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Frames of the timed part.
    pub frames: u64,
    /// Length of the timed part in ticks.
    pub ticks: u64,
    /// All frames whose every byte was checked, and right.
    pub verified: u64,
    /// Sent, but never seen.
    pub lost: u64,
    /// Seen before.
    pub duplicated: u64,
    /// Seen behind a later one.
    pub reordered: u64,
    /// With a wrong byte, or a wrong length.
    pub corrupted: u64,
}

/// How a run went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The sender's half, where there is one.
    pub sent: Option<Sent>,
    /// The receiver's half, where there is one.
    pub received: Option<Received>,
    /// Round-trip times in ticks, where they were measured.
    pub round_trips: Option<alloc::boxed::Box<Histogram>>,
    /// Nothing came for too long.
    pub timeout: bool,
}

impl Outcome {
    /// Whether everything that was sent arrived once, in order, whole, and in time.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let whole = self
            .received
            .is_none_or(|r| r.lost + r.duplicated + r.reordered + r.corrupted == 0);
        whole && !self.timeout
    }
}

/// The record of a run, as it goes out.
#[derive(Debug)]
pub struct ResultRecord<'a>(pub &'a Run, pub &'a Outcome);

impl fmt::Display for ResultRecord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(run, outcome) = self;
        let size = run.size as u64;
        write!(
            f,
            "{{\"record\":\"result\",\"id\":{},\"work\":\"{}\"",
            run.id,
            run.work.name()
        )?;
        if let Some(sent) = outcome.sent {
            let Sent {
                frames,
                ticks,
                full,
            } = sent;
            let bytes = frames * size;
            write!(
                f,
                ",\"tx_frames\":{frames},\"tx_bytes\":{bytes},\"tx_ticks\":{ticks},\"tx_full\":{full}"
            )?;
        }
        if let Some(received) = outcome.received {
            let Received {
                frames,
                ticks,
                verified,
                lost,
                duplicated,
                reordered,
                corrupted,
            } = received;
            let bytes = frames * size;
            write!(
                f,
                ",\"rx_frames\":{frames},\"rx_bytes\":{bytes},\"rx_ticks\":{ticks},\"verified\":{verified}"
            )?;
            write!(f, ",\"lost\":{lost},\"duplicated\":{duplicated}")?;
            write!(f, ",\"reordered\":{reordered},\"corrupted\":{corrupted}")?;
        }
        if let Some(times) = &outcome.round_trips {
            let q = |per_mille| times.quantile(per_mille);
            write!(
                f,
                ",\"rtt\":{{\"count\":{},\"p50\":{},\"p90\":{}",
                times.count(),
                q(500),
                q(900)
            )?;
            write!(
                f,
                ",\"p99\":{},\"p999\":{},\"max\":{}}}",
                q(990),
                q(999),
                times.max()
            )?;
        }
        write!(f, ",\"timeout\":{}}}", u8::from(outcome.timeout))
    }
}
