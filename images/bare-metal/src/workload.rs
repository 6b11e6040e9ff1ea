//! The workloads: source, sink, both, echo, round trip. (The responder has a module of its own.)

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use guest_driver::port::{self, MAX_BURST};
use guest_driver::{Frame, Port, Slot};
use virtqueue::rss;

use crate::frame::{EVERY_BYTE, End, FIRST_LINE, Format, IMIX, Kind, MAX_SEGMENT, Seen};
use crate::histogram::Histogram;
use crate::record::{Outcome, Received, Sent};
use crate::respond::respond;
use crate::study::windows::Churned;
use crate::{Payload, Run, Source, Work, flows, paced, pairs};

/// What a workload runs on: a port, and the things that go on beside it.
pub trait Link {
    /// The data path.
    type Port: Port;

    /// Bursts between two looks at the clock: many, unless a burst takes long.
    const CLOCK_EVERY: u32 = 16;

    /// Which end this is.
    fn end(&self) -> End;

    /// The port, while there is a connection.
    fn port(&mut self) -> Option<&mut Self::Port>;

    /// The port of a queue pair that is in use; the first is [`Link::port`].
    #[inline(always)]
    fn pair(&mut self, index: usize) -> Option<&mut Self::Port> {
        if index == 0 { self.port() } else { None }
    }

    /// Puts so many queue pairs into use, or gets ready for as many as the peer puts into use; `false` where there are not so many.
    fn use_pairs(&mut self, count: usize) -> bool {
        count == 1
    }

    /// On which pair a frame that begins so goes to the peer, where the peer's driver has said how frames are to be steered.
    #[inline(always)]
    fn steer(&self, _headers: &[u8]) -> Option<usize> {
        None
    }

    /// How the peer was told to steer frames to this end, where it was.
    fn rss(&self) -> Option<rss::Config> {
        None
    }

    /// Has the peer steer frames to this end so; `false` where that is not possible.
    fn set_rss(&mut self, _config: &rss::Config) -> bool {
        false
    }

    /// Begins to take all pairs of so many but the first out of use, and to put them back, so many times a second beside a workload;
    /// `false` where that is not for this end.
    fn start_flips(&mut self, _pairs: usize, _hz: u64) -> bool {
        false
    }

    /// Ends what [`Link::start_flips`] began: all are in use.
    fn end_flips(&mut self) {}

    /// Deals with whatever else wants attention; called every few bursts. Afterwards the port may be gone.
    fn service(&mut self);

    /// Whether the peer is gone, asked in a turn that found nothing to do. An end whose rings lie in its own memory keeps the port until then: what the
    /// peer did before it left is in them, and counts.
    #[inline(always)]
    fn gone(&mut self) -> bool {
        self.port().is_none()
    }

    /// Whether a command waits, for a workload that has no end of its own.
    fn called(&mut self) -> bool {
        false
    }

    /// Sleeps until an interrupt, or until the clock shows `until`.
    fn sleep(&mut self, until: u64);

    /// The time-stamp counter.
    fn now(&self) -> u64;

    /// How many ticks it makes in a millisecond.
    fn ticks_per_ms(&self) -> u64;

    /// Begins to change windows beside a workload, so many times a second; `false` where this end has none to change.
    fn start_churn(&mut self, _hz: u64) -> bool {
        false
    }

    /// Does what goes on beside a workload without waiting for it; called with the time whenever a workload looks at the clock.
    #[inline(always)]
    fn beside(&mut self, _now: u64) {}

    /// Ends what [`Link::start_churn`] began.
    fn end_churn(&mut self) -> Option<Churned> {
        None
    }
}

/// Why a workload could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The connection went away.
    Down,
    /// The port is of no use any more.
    Port(port::Error),
    /// This end has no windows that could be changed beside a workload.
    NoChurn,
    /// The peer does not let checksums or segments be left to it.
    NoOffload,
    /// There are not so many queue pairs, or not for this workload, or this end does not put them into use.
    NoPairs,
    /// Frames of several lengths are not for this workload.
    NoMix,
    /// Frames at a given rate are not for this workload.
    NoRate,
    /// Frames that are copied are no longer than a segment.
    NoCopy,
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("the peer is gone"),
            Self::Port(error) => error.fmt(f),
            Self::NoChurn => f.write_str("churn is for a front-end behind an IOMMU"),
            Self::NoOffload => f.write_str(
                "the two ends did not agree to leave UDP checksums, or segments, to each other (csum, uso)",
            ),
            Self::NoPairs => f.write_str(
                "not so many queue pairs (several, and flows, are for source, sink and both, flips for a front-end)",
            ),
            Self::NoRate => f.write_str(
                "rate= is for source and round-trip, over one queue pair, of one size, built in place",
            ),
            Self::NoCopy => f.write_str("source=copy is for frames of up to 1518 bytes"),
            Self::NoMix => f.write_str("size=imix is for source, sink and both"),
        }
    }
}

impl core::error::Error for Stopped {}

/// How long an end that found nothing to do looks away, in processor pauses. (One takes 40 to 140 cycles, by processor.)
const PAUSES: u32 = 1;
/// How often that number is doubled at most.
const LONGEST_PAUSE: u32 = 3;
/// Bursts between two looks at the control path.
pub(crate) const SERVICE_EVERY: u32 = 256;

/// Runs a workload to its end.
pub fn execute<L: Link>(link: &mut L, run: &Run) -> Result<Outcome, Stopped> {
    let mut outcome = Outcome::default();
    attempt(link, run, &mut outcome)?;
    Ok(outcome)
}

/// Runs a workload to its end, or as far as it gets: the counts of a `source`, `sink` or `both` that had to stop are in `outcome` all the same.
pub fn attempt<L: Link>(link: &mut L, run: &Run, outcome: &mut Outcome) -> Result<(), Stopped> {
    outcome.stopped = true;
    if run.source == Source::Copy && run.size > MAX_SEGMENT {
        return Err(Stopped::NoCopy);
    }
    let sends = !matches!(run.work, Work::Sink | Work::Respond);
    let may_go = |port: &mut L::Port| format(run, End::FrontEnd, run.size).may_go(port.offloads());
    if sends && !link.port().is_none_or(may_go) {
        return Err(Stopped::NoOffload);
    }
    if run.churn > 0 && !link.start_churn(run.churn) {
        return Err(Stopped::NoChurn);
    }
    let queues = usize::from(run.queues);
    let one = run.queues == 1;
    let alone = one && run.flows == 0;
    let spread = matches!(run.work, Work::Source | Work::Sink | Work::Both);
    let steered = run.flows > 0 && link.rss().is_some();
    let fits = alone || spread || run.work == Work::Respond && run.flows == 0;
    if !fits || !steered && !link.use_pairs(queues) {
        return Err(Stopped::NoPairs);
    }
    if run.imix && !spread {
        return Err(Stopped::NoMix);
    }
    let paced = matches!(run.work, Work::Source | Work::RoundTrip) && alone && !run.imix;
    if run.rate > 0 && (!paced || run.source == Source::Copy) {
        return Err(Stopped::NoRate);
    }
    if run.flips > 0 && (one || !link.start_flips(queues, run.flips)) {
        return Err(Stopped::NoPairs);
    }
    let start = link.now() + run.delay_ms * link.ticks_per_ms();
    while link.now() < start {
        link.service();
        pause(LONGEST_PAUSE);
    }
    let result = match run.payload {
        Payload::EveryByte => work::<L, EVERY_BYTE>(link, run, outcome),
        Payload::Headers => work::<L, FIRST_LINE>(link, run, outcome),
    };
    if run.flips > 0 {
        link.end_flips();
    }
    if run.churn > 0 {
        outcome.churn = link.end_churn();
    }
    if let Some(received) = &mut outcome.received {
        received.ticks = received.ticks.max(1);
    }
    outcome.stopped = result.is_err();
    result
}

/// The workload itself, where the first `MOST` bytes of each frame are written and compared.
fn work<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    outcome: &mut Outcome,
) -> Result<(), Stopped> {
    let mut whole = |result: Result<Outcome, Stopped>| result.map(|whole| *outcome = whole);
    match run.work {
        work if run.flows > 0 => {
            let directions = [work != Work::Sink, work != Work::Source];
            whole(flows::traffic::<L, MOST>(link, run, directions))
        }
        work if run.queues > 1 && work != Work::Respond => {
            let (send, receive) = (work != Work::Sink, work != Work::Source);
            whole(pairs::traffic::<L, MOST>(link, run, send, receive))
        }
        Work::Source if run.rate > 0 => whole(paced::traffic::<L, MOST>(link, run, false)),
        Work::RoundTrip if run.rate > 0 => whole(paced::traffic::<L, MOST>(link, run, true)),
        Work::Echo => whole(echo::<L, MOST>(link, run)),
        Work::RoundTrip => whole(round_trip::<L, MOST>(link, run)),
        Work::Respond => whole(respond(link, run)),
        Work::Source => traffic::<L, MOST>(link, run, (true, false), outcome),
        Work::Sink => traffic::<L, MOST>(link, run, (false, true), outcome),
        Work::Both => traffic::<L, MOST>(link, run, (true, true), outcome),
    }
}

/// Runs `burst` on the port of a link.
#[inline(always)]
pub(crate) fn with_port<L: Link, R>(
    link: &mut L,
    burst: impl FnOnce(&mut L::Port) -> Result<R, port::Error>,
) -> Result<R, Stopped> {
    burst(link.port().ok_or(Stopped::Down)?).map_err(Stopped::Port)
}

/// When a run's parts begin and end, in ticks.
pub(crate) struct Schedule {
    pub(crate) warm: u64,
    pub(crate) end: u64,
}

impl Schedule {
    pub(crate) fn from<L: Link>(link: &L, run: &Run, start: u64) -> Self {
        let warm = start + run.warmup_ms * link.ticks_per_ms();
        Self {
            warm,
            end: warm + run.ms * link.ticks_per_ms(),
        }
    }
}

/// Frames in memory of the sender's own, ready to be copied: those from the next one on, each in its place.
#[derive(Default)]
struct Private {
    /// One a frame of a burst; none where frames are built in place.
    frames: Vec<Room>,
    /// How many are ready.
    ready: usize,
}

/// Room for a frame, on lines of its own.
#[repr(align(64))]
#[derive(Clone)]
struct Room([u8; MAX_SEGMENT]);

/// Bursts of several lengths, in turn.
struct Mix {
    formats: Vec<Format>,
    /// Frames a burst.
    batch: u64,
}

impl Mix {
    /// Of what frame `next` is, and how many of `batch` frames from there on are alike: also where the ring was full in the middle of a burst, there are
    /// as many of a length as the mix says.
    fn at(&self, next: u64, batch: usize) -> Option<(&Format, usize)> {
        let turn = next / self.batch % self.formats.len() as u64;
        let alike = self.batch - next % self.batch;
        let format = self.formats.get(usize::try_from(turn).ok()?)?;
        Some((format, batch.min(usize::try_from(alike).ok()?)))
    }
}

/// The sending half of a run.
pub(crate) struct Sender {
    pub(crate) format: Format,
    /// Absent where all frames are of one length.
    mix: Option<Mix>,
    private: Private,
    next: u64,
    limit: u64,
    schedule: Schedule,
    /// When the timed part began, and the frame that was next then.
    timed_from: Option<(u64, u64)>,
    pub(crate) stats: Sent,
    /// Only the end frame is left to send; it has been sent; the peer has taken it.
    ending: bool,
    pub(crate) ended: bool,
    pub(crate) done: bool,
}

/// The frames of a run that an end sends, of this length.
pub(crate) fn format(run: &Run, from: End, len: usize) -> Format {
    let format = Format::new(from, len, run.id);
    if run.offloads() {
        format.with_offload()
    } else {
        format
    }
}

/// Which end's frames are sent.
pub(crate) fn end<L: Link>(link: &L, run: &Run) -> End {
    run.end.unwrap_or_else(|| link.end())
}

impl Sender {
    pub(crate) fn new<L: Link>(link: &L, run: &Run, flow: u16) -> Self {
        let format = |len| format(run, end(link, run), len).with_flow(flow);
        let copied = match run.source {
            Source::Build => 0,
            Source::Copy => run.batch,
        };
        Self {
            format: format(run.size),
            mix: run.imix.then(|| Mix {
                formats: IMIX.iter().map(|&len| format(len)).collect(),
                batch: run.batch as u64,
            }),
            private: Private {
                frames: vec![Room([0; MAX_SEGMENT]); copied],
                ready: 0,
            },
            next: 0,
            limit: if run.count == 0 { u64::MAX } else { run.count },
            schedule: Schedule::from(link, run, link.now()),
            // A counted run is timed as a whole.
            timed_from: (run.count != 0).then(|| (link.now(), 0)),
            stats: Sent::default(),
            ending: false,
            ended: false,
            done: false,
        }
    }

    /// Looks at the clock: when to begin timing, when to stop.
    pub(crate) fn tick(&mut self, now: u64, run: &Run) {
        if self.timed_from.is_none() && now >= self.schedule.warm {
            self.timed_from = Some((now, self.next));
        }
        let over = if run.count == 0 {
            now >= self.schedule.end
        } else {
            self.next >= self.limit
        };
        if over && !self.ending {
            let (from, first) = self.timed_from.unwrap_or((now, self.next));
            self.stats.ticks = (now - from).max(1);
            self.stats.frames = self.next - first;
            self.ending = true;
        }
    }

    /// Sends a burst; returns how many frames went.
    #[inline(always)]
    pub(crate) fn burst<P: Port, const MOST: usize>(
        &mut self,
        port: &mut P,
        batch: usize,
    ) -> Result<usize, port::Error> {
        let (mut format, next) = (&self.format, self.next);
        if self.ending {
            let sent = format.send(port, 1, |_, slot| {
                format.build::<MOST>(slot, Kind::End, next)
            })?;
            self.ended = sent == 1;
            return Ok(sent);
        }
        let room = self.limit - next;
        let mut batch = usize::try_from(room).map_or(batch, |room| room.min(batch));
        if let Some(mix) = &self.mix {
            (format, batch) = mix.at(next, batch).unwrap_or((format, batch));
        }
        let sent = if self.private.frames.is_empty() {
            format.send(port, batch, |i, slot| {
                format.build::<MOST>(slot, Kind::Data, next + i as u64)
            })?
        } else {
            self.private.burst::<P, MOST>(port, batch, format, next)?
        };
        self.next += sent as u64;
        self.stats.full += u64::from(sent < batch);
        Ok(sent)
    }
}

impl Private {
    /// Makes the frames from `next` on ready, and copies them into slots.
    #[inline(never)]
    fn burst<P: Port, const MOST: usize>(
        &mut self,
        port: &mut P,
        batch: usize,
        format: &Format,
        next: u64,
    ) -> Result<usize, port::Error> {
        let (len, rooms) = (format.len(), self.frames.len());
        let first = usize::try_from(next % rooms as u64).unwrap_or(0);
        let place = |i: usize| {
            let at = first + i;
            if at < rooms { at } else { at - rooms }
        };
        // A frame that the ring had no room for is ready still.
        for i in self.ready..batch {
            if let Some(room) = self.frames.get_mut(place(i)) {
                let mut slot = Slot::of(&mut room.0[..len]);
                format.build::<MOST>(&mut slot, Kind::Data, next + i as u64);
            }
        }
        self.ready = self.ready.max(batch);
        let sent = format.send(port, batch, |i, slot| {
            if let Some(room) = self.frames.get(place(i)) {
                slot.write(0, &room.0[..len]);
            }
        })?;
        self.ready -= sent;
        Ok(sent)
    }
}

/// A hole in a sequence: first number that is missing, and the one behind the last.
type Gap = (u64, u64);
/// Most holes that are remembered; frames of a forgotten hole that come late count as reordered.
const MAX_GAPS: usize = 1024;

/// The receiving half of a run.
pub(crate) struct Receiver {
    pub(crate) format: Format,
    /// Those of other lengths, where there are some.
    others: Vec<Format>,
    next: u64,
    gaps: Vec<Gap>,
    /// When the first frame came, and when the timed part began, with what had been verified then.
    first: Option<u64>,
    timed_from: Option<(u64, u64)>,
    warmup: u64,
    /// How many frames the peer says it sent.
    pub(crate) ended: Option<u64>,
    /// How many frames were corrupted in bursts that were whole.
    sound: u64,
    stats: Received,
}

impl Receiver {
    pub(crate) fn new<L: Link>(link: &L, run: &Run, flow: u16) -> Self {
        let format = |len| format(run, end(link, run).peer(), len).with_flow(flow);
        let mut others = Vec::new();
        for &len in IMIX.iter().filter(|&&len| run.imix && len != run.size) {
            if !others.iter().any(|it: &Format| it.len() == len) {
                others.push(format(len));
            }
        }
        Self {
            format: format(run.size),
            others,
            next: 0,
            gaps: Vec::with_capacity(MAX_GAPS),
            first: None,
            timed_from: None,
            warmup: if run.count == 0 {
                run.warmup_ms * link.ticks_per_ms()
            } else {
                0
            },
            ended: None,
            sound: 0,
            stats: Received::default(),
        }
    }

    /// Takes a frame that arrived; says what it was. A byte is compared once: it lies in memory that may change.
    #[inline(always)]
    pub(crate) fn take<const MOST: usize>(&mut self, frame: &Frame) -> Seen {
        let mut seen = self.format.check::<MOST>(frame);
        if seen == Seen::Corrupt {
            seen = self.of_another_length::<MOST>(frame);
        }
        match seen {
            Seen::Good(Kind::Data, sequence) => {
                self.stats.verified += 1;
                if sequence == self.next {
                    self.next = self.next.wrapping_add(1);
                } else {
                    self.out_of_order(sequence);
                }
            }
            Seen::Good(Kind::End, count) => self.ended = Some(count),
            Seen::Corrupt => self.stats.corrupted += 1,
            Seen::Stale => {}
        }
        seen
    }

    /// What a frame is that is not what most are.
    #[inline(never)]
    fn of_another_length<const MOST: usize>(&self, frame: &Frame) -> Seen {
        let format = self.others.iter().find(|it| it.len() == frame.len());
        format.map_or(Seen::Corrupt, |format| format.check::<MOST>(frame))
    }

    #[cold]
    fn out_of_order(&mut self, sequence: u64) {
        if sequence > self.next {
            if self.gaps.len() < MAX_GAPS {
                self.gaps.push((self.next, sequence));
            }
            // A peer may number its frames as it likes.
            self.next = sequence.wrapping_add(1);
            return;
        }
        let gap = self
            .gaps
            .iter()
            .position(|&(from, to)| (from..to).contains(&sequence));
        match gap {
            Some(at) => {
                let (from, to) = self.gaps.swap_remove(at);
                let parts = [(from, sequence), (sequence + 1, to)];
                self.gaps
                    .extend(parts.into_iter().filter(|(from, to)| from < to));
                self.stats.reordered += 1;
            }
            None if self.gaps.len() == MAX_GAPS => self.stats.reordered += 1,
            None => self.stats.duplicated += 1,
        }
    }

    /// Whether all frames before `sequence` have come, or later ones.
    pub(crate) fn has(&self, sequence: u64) -> bool {
        self.next >= sequence
    }

    /// Looks at the clock: when to begin timing. What begins behind the end is not timed.
    pub(crate) fn tick(&mut self, now: u64) {
        if self.stats.verified > 0 && self.ended.is_none() {
            let first = *self.first.get_or_insert(now);
            if self.timed_from.is_none() && now - first >= self.warmup {
                self.timed_from = Some((now, self.stats.verified));
            }
        }
    }

    /// The run was cut short: of a burst that was not whole, nobody can say which of its frames were there all the time.
    fn tear(&mut self) {
        self.stats.torn = self.stats.corrupted - self.sound;
        self.stats.corrupted = self.sound;
    }

    pub(crate) fn finish(&mut self, now: u64) -> Received {
        let (from, before) = self.timed_from.unwrap_or((now, self.stats.verified));
        self.stats.frames = self.stats.verified - before;
        self.stats.ticks = now.saturating_sub(from);
        // Without an end frame nobody knows how many there were: what is missing in between is lost at least.
        let distinct = self.stats.verified - self.stats.duplicated;
        self.stats.lost = self.ended.unwrap_or(self.next).saturating_sub(distinct);
        self.stats
    }
}

/// Source, sink, and both.
#[inline(never)]
fn traffic<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    (send, receive): (bool, bool),
    outcome: &mut Outcome,
) -> Result<(), Stopped> {
    let mut sender = send.then(|| Sender::new(link, run, 0));
    let mut receiver = receive.then(|| Receiver::new(link, run, 0));
    let result = exchange::<L, MOST>(link, run, &mut sender, &mut receiver);
    let stopped_at = match &result {
        Ok(Ended::Whole(at)) => *at,
        Ok(Ended::Timeout) | Err(_) => link.now(),
    };
    outcome.timeout = matches!(result, Ok(Ended::Timeout));
    outcome.sent = sender.map(|sender| Sent {
        // One that was cut short sent what it sent.
        frames: if result.is_ok() {
            sender.stats.frames
        } else {
            sender.next
        },
        ..sender.stats
    });
    if let (Err(_), Some(receiver)) = (&result, &mut receiver) {
        receiver.tear();
    }
    outcome.received = receiver.map(|mut receiver| receiver.finish(stopped_at));
    result.map(|_| ())
}

/// How an exchange that was not cut short ended.
enum Ended {
    /// Everything was sent, and everything came; the last of it then.
    Whole(u64),
    /// Nothing came for too long.
    Timeout,
}

/// Sends and receives until both are done.
#[inline(always)]
fn exchange<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    sender: &mut Option<Sender>,
    receiver: &mut Option<Receiver>,
) -> Result<Ended, Stopped> {
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut deadline = link.now() + timeout;
    let mut stopped_at = deadline;
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    loop {
        let mut idle = true;
        if let Some(sender) = sender.as_mut().filter(|sender| !sender.done) {
            if sender.ended {
                sender.done = with_port(link, Port::drained)?;
            } else {
                idle &= with_port(link, |port| sender.burst::<_, MOST>(port, run.batch))? == 0;
            }
        }
        if let Some(receiver) = receiver
            .as_mut()
            .filter(|receiver| receiver.ended.is_none())
        {
            let (came, whole) = with_port(link, |port| {
                let came = port.rx_burst(run.batch, |frame| {
                    receiver.take::<MOST>(frame);
                })?;
                Ok((came, came == 0 || port.whole()))
            })?;
            if whole {
                receiver.sound = receiver.stats.corrupted;
            }
            idle &= came == 0;
            if receiver.ended.is_some() {
                stopped_at = link.now();
            }
        }
        let sent = sender.as_ref().is_none_or(|sender| sender.done);
        let received = receiver
            .as_ref()
            .is_none_or(|receiver| receiver.ended.is_some());
        if sent && received {
            return Ok(Ended::Whole(stopped_at));
        }
        if idle && link.gone() {
            return Err(Stopped::Down);
        }
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(L::CLOCK_EVERY) || idle && run.sleeps(idle_turns) {
            let now = link.now();
            link.beside(now);
            if let Some(sender) = sender {
                sender.tick(now, run);
            }
            if let Some(receiver) = receiver {
                receiver.tick(now);
            }
            if !idle {
                deadline = now + timeout;
            } else if now >= deadline {
                return Ok(Ended::Timeout);
            }
        }
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
        }
        if !idle {
            idle_turns = 0;
        } else if run.sleeps(idle_turns) {
            wait(link, !received, !sent, deadline);
        } else {
            pause(idle_turns);
            idle_turns = idle_turns.saturating_add(1);
        }
    }
}

/// Lets the peer get on with its batch: a poll takes the line away that it is about to write. Longer when the last turns were idle, too.
#[inline(always)]
pub(crate) fn pause(idle_turns: u32) {
    for _ in 0..PAUSES << idle_turns.min(LONGEST_PAUSE) {
        core::hint::spin_loop();
    }
}

/// Sleeps until frames arrive (`rx`) or there is room to send (`tx`). Where there is no port any more, the next burst says so.
pub(crate) fn wait<L: Link>(link: &mut L, rx: bool, tx: bool, deadline: u64) {
    if link.port().is_some_and(|port| !port.arm(rx, tx)) {
        link.sleep(deadline);
        link.service();
    }
    if let Some(port) = link.port() {
        port.disarm();
    }
}

/// Frames between receiving and sending them back.
struct Bounce {
    frames: Vec<Vec<u8>>,
    held: usize,
}

/// Sends back what arrives, with this end's addresses, until the end frame has gone back.
#[inline(never)]
fn echo<L: Link, const MOST: usize>(link: &mut L, run: &Run) -> Result<Outcome, Stopped> {
    let back = format(run, end(link, run), run.size);
    let mut bounce = Bounce {
        frames: vec![vec![0; back.len()]; run.batch.min(MAX_BURST)],
        held: 0,
    };
    let mut receiver = Receiver::new(link, run, 0);
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut deadline = link.now() + timeout;
    let mut sent_total = 0u64;
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    let timed_out = 'run: loop {
        let n = with_port(link, |port| {
            port.rx_burst(run.batch, |frame| {
                if matches!(receiver.take::<MOST>(frame), Seen::Good(..))
                    && let Some(room) = bounce.frames.get_mut(bounce.held)
                    && frame.read(0, room)
                {
                    bounce.held += 1;
                }
            })
        })?;
        let mut sent = 0;
        let mut full_turns = 0u32;
        while sent < bounce.held {
            let more = with_port(link, |port| {
                back.send(port, bounce.held - sent, |i, slot| {
                    if let Some(frame) = bounce.frames.get(sent + i) {
                        slot.write(0, frame);
                        back.readdress(slot);
                    }
                })
            })?;
            sent += more;
            if more == 0 {
                if link.gone() {
                    return Err(Stopped::Down);
                }
                if link.now() >= deadline {
                    break 'run true;
                }
                if run.sleeps(full_turns) {
                    wait(link, false, true, deadline);
                }
                full_turns = full_turns.saturating_add(1);
            }
        }
        sent_total += sent as u64;
        bounce.held = 0;
        if receiver.ended.is_some() {
            // The end frame is not counted.
            sent_total = sent_total.saturating_sub(1);
            drain(link, deadline)?;
            break 'run false;
        }
        if n == 0 && link.gone() {
            return Err(Stopped::Down);
        }
        turn = turn.wrapping_add(1);
        idle_turns = if n > 0 {
            0
        } else {
            idle_turns.saturating_add(1)
        };
        if n > 0 {
            if turn.is_multiple_of(L::CLOCK_EVERY) {
                let now = link.now();
                link.beside(now);
                receiver.tick(now);
                deadline = now + timeout;
            }
        } else if turn.is_multiple_of(L::CLOCK_EVERY) || run.sleeps(idle_turns) {
            let now = link.now();
            link.beside(now);
            if now >= deadline {
                break 'run true;
            }
            if run.sleeps(idle_turns) {
                wait(link, true, false, deadline);
                deadline = link.now() + timeout;
            }
        }
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
        }
    };
    Ok(both_ways(link, receiver, sent_total, timed_out))
}

/// Waits until the peer has taken what was sent.
pub(crate) fn drain<L: Link>(link: &mut L, deadline: u64) -> Result<(), Stopped> {
    while !with_port(link, Port::drained)? {
        if link.gone() {
            return Err(Stopped::Down);
        }
        if link.now() >= deadline {
            break;
        }
        link.service();
    }
    Ok(())
}

/// The outcome of a run that sends as it receives, so that one clock times both.
pub(crate) fn both_ways<L: Link>(
    link: &L,
    mut receiver: Receiver,
    sent: u64,
    timeout: bool,
) -> Outcome {
    let received = receiver.finish(link.now());
    Outcome {
        sent: Some(Sent {
            frames: sent,
            ticks: received.ticks,
            full: 0,
        }),
        received: Some(received),
        timeout,
        ..Outcome::default()
    }
}

/// Sends one frame at a time and times its way to an echo and back.
#[inline(never)]
fn round_trip<L: Link, const MOST: usize>(link: &mut L, run: &Run) -> Result<Outcome, Stopped> {
    let format = format(run, end(link, run), run.size);
    let mut receiver = Receiver::new(link, run, 0);
    let mut times = Box::new(Histogram::default());
    let schedule = Schedule::from(link, run, link.now());
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut sequence = 0;
    let mut sent_at = link.now();
    let timed_out = 'run: loop {
        let over = if run.count == 0 {
            sent_at >= schedule.end
        } else {
            sequence >= run.count
        };
        let kind = if over { Kind::End } else { Kind::Data };
        let deadline = sent_at + timeout;
        while with_port(link, |port| {
            format.send(port, 1, |_, slot| {
                format.build::<MOST>(slot, kind, sequence)
            })
        })? == 0
        {
            if link.now() >= deadline {
                break 'run true;
            }
        }
        let seen = receiver.stats.verified;
        let mut turn = 0u32;
        while receiver.stats.verified == seen && receiver.ended.is_none() {
            let n = with_port(link, |port| {
                port.rx_burst(1, |frame| {
                    receiver.take::<MOST>(frame);
                })
            })?;
            if n == 0 && link.gone() {
                return Err(Stopped::Down);
            }
            turn = turn.wrapping_add(1);
            if n == 0 && (turn.is_multiple_of(L::CLOCK_EVERY) || run.sleeps(turn)) {
                if link.now() >= deadline {
                    break 'run true;
                }
                if run.sleeps(turn) {
                    wait(link, true, false, deadline);
                }
            }
            if turn.is_multiple_of(SERVICE_EVERY) {
                link.service();
            }
        }
        if receiver.ended.is_some() {
            drain(link, deadline)?;
            break 'run false;
        }
        let now = link.now();
        link.beside(now);
        receiver.tick(now);
        if now >= schedule.warm || run.count != 0 {
            times.add(now - sent_at);
        }
        sequence += 1;
        sent_at = now;
    };
    Ok(Outcome {
        round_trips: Some(times),
        ..both_ways(link, receiver, sequence, timed_out)
    })
}
