//! Counters, and the line of JSON that shows them.

use std::time::Duration;

use guest_driver::port::Notices;
use serde::Serialize;

/// Frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// How many.
    pub frames: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
}

impl Flow {
    /// Counts a frame.
    #[inline]
    pub fn add(&mut self, len: usize) {
        self.frames += 1;
        self.bytes += len as u64;
    }
}

/// Frames that went no further.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Longer than what they were to be handed to takes.
    pub too_long: u64,
    /// Taken from the tap, but its header asks for an offload that was not agreed on, or there is no frame behind it.
    pub bad_header: u64,
    /// The tap did not take them: it is down, or has no memory.
    pub refused: u64,
    /// Were on the way to the peer when it left.
    pub no_peer: u64,
    /// The peer left while they were looked at: perhaps they were not whole any more.
    pub torn: u64,
    /// The peer's buffers held no frame, or none that fits them.
    pub malformed: u64,
}

/// What a sink saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Frames of the sequence whose every byte is right.
    pub verified: u64,
    /// Among these, frames that are not the one behind the last: something was lost, doubled or overtaken.
    pub out_of_sequence: u64,
    /// Frames of another length, or with a wrong byte.
    pub corrupted: u64,
    /// Frames of something else.
    pub other: u64,
}

/// Everything that is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// From the peer, and taken.
    pub from_peer: Flow,
    /// Put into the peer's buffers.
    pub to_peer: Flow,
    /// Gone.
    pub dropped: Dropped,
    /// What a sink saw; absent in other modes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checked: Option<Checked>,
    /// How often the peer's rings came up.
    pub links: u64,
    /// How often the peer broke a rule of its rings.
    pub broken: u64,
    /// How often this process slept.
    pub sleeps: u64,
}

/// One ring of the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ring {
    /// Its frames, as in [`Stats`].
    #[serde(flatten)]
    pub flow: Flow,
    /// How often this end notified the peer.
    pub notified: u64,
    /// Bursts behind which the peer had asked for no notification.
    pub suppressed: u64,
}

/// One queue pair of the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Queue {
    /// From the peer, and taken.
    pub from_peer: Ring,
    /// Put into the peer's buffers.
    pub to_peer: Ring,
}

impl Queue {
    /// Adds what came between two looks at all counters, and at those of its data path (of the ring that sends, of the one that receives).
    pub(crate) fn add(
        &mut self,
        (before, after): (&Stats, &Stats),
        old: [Notices; 2],
        new: [Notices; 2],
    ) {
        let [to_old, from_old] = old;
        let [to_new, from_new] = new;
        let (to_peer, from_peer) = (&mut self.to_peer, &mut self.from_peer);
        to_peer.add([before.to_peer, after.to_peer], to_new.since(to_old));
        from_peer.add(
            [before.from_peer, after.from_peer],
            from_new.since(from_old),
        );
    }
}

impl Ring {
    fn add(&mut self, [before, after]: [Flow; 2], notices: Notices) {
        self.flow.frames += after.frames - before.frames;
        self.flow.bytes += after.bytes - before.bytes;
        self.notified += notices.given;
        self.suppressed += notices.suppressed;
    }
}

/// One line of output.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema_version: u32,
    /// Since the start.
    pub seconds: f64,
    /// Whether the peer's rings are there.
    pub link_up: bool,
    /// Whether this is the last.
    pub last: bool,
    /// The counters.
    #[serde(flatten)]
    pub stats: Stats,
    /// What each queue pair moved.
    pub queues: Vec<Queue>,
}

impl Report {
    /// What there is to say now.
    #[must_use]
    pub fn new(
        (stats, queues): (&Stats, &[Queue]),
        elapsed: Duration,
        link_up: bool,
        last: bool,
    ) -> Self {
        Self {
            schema_version: 1,
            seconds: (elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
            link_up,
            last,
            stats: *stats,
            queues: queues.to_vec(),
        }
    }
}
