//! Records: one JSON object a line (docs/bare-metal.md).

use alloc::vec::Vec;
use core::fmt;

use guest_driver::port::Notices;

use crate::Run;
use crate::histogram::Histogram;
use crate::study::windows::Churned;

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
    /// All frames that were checked, and right.
    pub verified: u64,
    /// Sent, but never seen.
    pub lost: u64,
    /// Seen before.
    pub duplicated: u64,
    /// Seen behind a later one.
    pub reordered: u64,
    /// With a wrong byte, or a wrong length.
    pub corrupted: u64,
    /// The same, where a run was cut short while the back-end's end looked at its last burst: a window that is taken away reads as ones from
    /// one byte to the next.
    pub torn: u64,
}

/// What a responder saw and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Responded {
    /// Frames that came, dropped ones too.
    pub rx_frames: u64,
    /// Those of them that came on other pairs than the first.
    pub other_pairs: u64,
    /// Frames that were sent.
    pub tx_frames: u64,
    /// Frames that are too short or too long for Ethernet and IP.
    pub dropped: u64,
    /// Frames whose checksum was left to this end.
    pub partial: u64,
    /// Frames that are longer than a segment: their segmentation was left to this end.
    pub large: u64,
    /// TCP connections.
    pub connections: u64,
    /// Bytes that came on them.
    pub rx_bytes: u64,
    /// Bytes that were sent on them.
    pub tx_bytes: u64,
}

/// Where the frames of several flows came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Landed {
    /// How many, by flow and by queue pair.
    pub frames: Vec<Vec<u64>>,
    /// Those of which the driver's RSS configuration says on which pair they should.
    pub placed: u64,
    /// Those of these that came in on another.
    pub strays: u64,
    /// How often the table was changed meanwhile.
    pub turns: u64,
}

impl fmt::Display for Landed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{\"frames\":[")?;
        for (flow, pairs) in self.frames.iter().enumerate() {
            f.write_str(if flow > 0 { ",[" } else { "[" })?;
            for (pair, frames) in pairs.iter().enumerate() {
                write!(f, "{}{frames}", if pair > 0 { "," } else { "" })?;
            }
            f.write_str("]")?;
        }
        let Self {
            placed,
            strays,
            turns,
            ..
        } = self;
        write!(
            f,
            "],\"placed\":{placed},\"strays\":{strays},\"turns\":{turns}}}"
        )
    }
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
    /// Windows that came and went beside it, where that was asked for.
    pub churn: Option<Churned>,
    /// Where frames came in, where there were more flows than pairs.
    pub landed: Option<Landed>,
    /// The responder's account, where there was one.
    pub responded: Option<Responded>,
    /// What became of the notifications of each queue pair: of the ring that sends, of the one that receives.
    pub notices: Vec<[Notices; 2]>,
    /// Nothing came for too long.
    pub timeout: bool,
    /// It was cut short: the peer was gone, or broke a rule.
    pub stopped: bool,
}

impl Outcome {
    /// Whether everything that was sent arrived once, in order, whole, and in time.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let whole = self
            .received
            .is_none_or(|r| r.lost + r.duplicated + r.reordered + r.corrupted == 0);
        whole && !self.timeout && !self.stopped
    }
}

/// A histogram in a record.
struct Quantiles<'a>(&'a Histogram);

impl fmt::Display for Quantiles<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let q = |per_mille| self.0.quantile(per_mille);
        write!(
            f,
            "{{\"count\":{},\"p50\":{},\"p90\":{}",
            self.0.count(),
            q(500),
            q(900)
        )?;
        write!(
            f,
            ",\"p99\":{},\"p999\":{},\"max\":{}}}",
            q(990),
            q(999),
            self.0.max()
        )
    }
}

/// What stands in a field of a [`Done`] record.
#[derive(Clone, Copy, Debug)]
pub enum Field<'a> {
    /// A number.
    Number(u64),
    /// Latencies.
    Times(&'a Histogram),
}

/// The record that answers a command of the study.
#[derive(Debug)]
pub struct Done<'a> {
    /// The command's name.
    pub command: &'a str,
    /// What else there is to say.
    pub fields: &'a [(&'a str, Field<'a>)],
}

impl fmt::Display for Done<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"record\":\"done\",\"command\":\"{}\"", self.command)?;
        for (name, field) in self.fields {
            match field {
                Field::Number(number) => write!(f, ",\"{name}\":{number}")?,
                Field::Times(times) => write!(f, ",\"{name}\":{}", Quantiles(times))?,
            }
        }
        f.write_str("}")
    }
}

/// Notifications: of all pairs together, and, where there are several, of each.
fn notified(f: &mut fmt::Formatter<'_>, pairs: &[[Notices; 2]]) -> fmt::Result {
    let mut all = [Notices::default(); 2];
    for pair in pairs {
        for (sum, &one) in all.iter_mut().zip(pair) {
            *sum += one;
        }
    }
    let fields = |f: &mut fmt::Formatter<'_>, pair: &[Notices; 2]| {
        for (i, (ring, notices)) in ["tx", "rx"].iter().zip(pair).enumerate() {
            let Notices { given, suppressed } = notices;
            f.write_str(if i > 0 { "," } else { "" })?;
            write!(
                f,
                "\"{ring}_notified\":{given},\"{ring}_suppressed\":{suppressed}"
            )?;
        }
        Ok(())
    };
    if !pairs.is_empty() {
        f.write_str(",")?;
        fields(f, &all)?;
    }
    if pairs.len() > 1 {
        f.write_str(",\"queues\":[")?;
        for (i, pair) in pairs.iter().enumerate() {
            f.write_str(if i > 0 { ",{" } else { "{" })?;
            fields(f, pair)?;
            f.write_str("}")?;
        }
        f.write_str("]")?;
    }
    Ok(())
}

/// The record of a run, as it goes out: `result`, or `stopped` where it was cut short.
#[derive(Debug)]
pub struct ResultRecord<'a>(pub &'a Run, pub &'a Outcome);

impl fmt::Display for ResultRecord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(run, outcome) = self;
        let name = if outcome.stopped { "stopped" } else { "result" };
        write!(
            f,
            "{{\"record\":\"{name}\",\"id\":{},\"work\":\"{}\"",
            run.id,
            run.work.name()
        )?;
        if let Some(sent) = outcome.sent {
            let Sent {
                frames,
                ticks,
                full,
            } = sent;
            let bytes = run.bytes(frames);
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
                torn,
            } = received;
            let bytes = run.bytes(frames);
            write!(
                f,
                ",\"rx_frames\":{frames},\"rx_bytes\":{bytes},\"rx_ticks\":{ticks},\"verified\":{verified}"
            )?;
            write!(f, ",\"lost\":{lost},\"duplicated\":{duplicated}")?;
            write!(f, ",\"reordered\":{reordered},\"corrupted\":{corrupted}")?;
            if outcome.stopped {
                write!(f, ",\"torn\":{torn}")?;
            }
        }
        if let Some(times) = &outcome.round_trips {
            write!(f, ",\"rtt\":{}", Quantiles(times))?;
        }
        if let Some(Churned { times, failed }) = &self.1.churn {
            write!(
                f,
                ",\"churn\":{{\"count\":{},\"failed\":{failed},\"p50\":{},\"p99\":{},\"max\":{}}}",
                times.count(),
                times.quantile(500),
                times.quantile(990),
                times.max()
            )?;
        }
        if let Some(landed) = &outcome.landed {
            write!(f, ",\"landed\":{landed}")?;
        }
        if let Some(responded) = outcome.responded {
            let Responded {
                rx_frames,
                other_pairs,
                tx_frames,
                dropped,
                partial,
                large,
                connections,
                rx_bytes,
                tx_bytes,
            } = responded;
            write!(
                f,
                ",\"responded\":{{\"rx_frames\":{rx_frames},\"other_pairs\":{other_pairs},\"tx_frames\":{tx_frames},\"dropped\":{dropped},\"partial\":{partial},\"large\":{large}"
            )?;
            write!(
                f,
                ",\"connections\":{connections},\"rx_bytes\":{rx_bytes},\"tx_bytes\":{tx_bytes}}}"
            )?;
        }
        notified(f, &outcome.notices)?;
        write!(f, ",\"timeout\":{}}}", u8::from(outcome.timeout))
    }
}
