//! Source, sink and both with more flows than queue pairs, for receive-side scaling: where the front-end's driver has configured it the back-end sends each flow on the pair
//! that the driver's table says, elsewhere flow f goes over pair f modulo their number. The receiver tells flows by their ports, whatever pair they come in on, and keeps count.

use alloc::vec;
use alloc::vec::Vec;

use guest_driver::{Frame, Port, steering};
use virtqueue::rss;

use crate::Run;
use crate::frame::{Kind, Seen};
use crate::pairs::{Flow, outcome};
use crate::record::{Landed, Outcome};
use crate::workload::{Link, SERVICE_EVERY, Stopped, pause};

/// Where the UDP target port is in a frame.
const TARGET_PORT: usize = 36;
/// Frames that are taken at the end, at most, to see that no more are there.
const REST: usize = 1 << 16;

/// The receiving half's account.
struct Tally {
    landed: Landed,
    /// What the device was told, and the pair of each flow by it.
    config: Option<(rss::Config, Vec<usize>)>,
    /// By pair, how many frames at most are still to come that were sent before the last change of the table.
    old: Vec<usize>,
    /// Ticks from one change of the table to the next, and when that is.
    turns: Option<(u64, u64)>,
}

impl Tally {
    fn new<L: Link>(link: &L, run: &Run, flows: &[Flow]) -> Self {
        let pairs = usize::from(run.queues);
        let every = (run.turns > 0).then(|| 1000 * link.ticks_per_ms() / run.turns);
        Self {
            landed: Landed {
                frames: vec![vec![0; pairs]; flows.len()],
                ..Landed::default()
            },
            config: link.rss().map(|config| expected(config, flows)),
            old: vec![0; pairs],
            turns: every.map(|every| (every, link.now() + every)),
        }
    }

    /// A burst from a pair; returns whether it was empty.
    fn turn<L: Link, const MOST: usize>(
        &mut self,
        link: &mut L,
        pair: usize,
        flows: &mut [Flow],
        run: &Run,
    ) -> Result<bool, Stopped> {
        let now = link.now();
        let Some(port) = link.pair(pair) else {
            return if pair == 0 {
                Err(Stopped::Down)
            } else {
                Ok(true)
            };
        };
        let frames = port.rx_burst(run.batch, |frame| {
            let number = flow_of(frame).filter(|&number| number < flows.len());
            let Some(flow) = flows.get_mut(number.unwrap_or(0)) else {
                return;
            };
            let Some(receiver) = &mut flow.receiver else {
                return;
            };
            let seen = receiver.take::<MOST>(frame);
            if receiver.ended.is_some() {
                flow.stopped_at.get_or_insert(now);
            }
            let (Some(number), Seen::Good(Kind::Data, _)) = (number, seen) else {
                return;
            };
            let row = self.landed.frames.get_mut(number);
            if let Some(count) = row.and_then(|row| row.get_mut(pair)) {
                *count += 1;
            }
            match (&self.config, self.old.get_mut(pair)) {
                (Some((_, expected)), Some(0)) => {
                    self.landed.placed += 1;
                    self.landed.strays += u64::from(expected.get(number) != Some(&pair));
                }
                (_, Some(old)) => *old = old.saturating_sub(1),
                _ => {}
            }
        });
        let frames = frames.map_err(Stopped::Port)?;
        // What was there when the table was changed has been taken.
        if frames < run.batch
            && let Some(old) = self.old.get_mut(pair)
        {
            *old = 0;
        }
        Ok(frames == 0)
    }

    /// Turns the table round by an entry, where it is time for that.
    fn beside<L: Link>(&mut self, link: &mut L, flows: &[Flow], now: u64) -> Result<(), Stopped> {
        let (Some((every, next)), Some((config, _))) = (&mut self.turns, &self.config) else {
            return Ok(());
        };
        if now < *next {
            return Ok(());
        }
        let config = config.turned();
        if !link.set_rss(&config) {
            return Err(Stopped::NoPairs);
        }
        *next = link.now() + *every;
        self.config = Some(expected(config, flows));
        for (pair, old) in self.old.iter_mut().enumerate() {
            *old = link.pair(pair).map_or(0, |port| port.rx_room());
        }
        self.landed.turns += 1;
        Ok(())
    }
}

/// The pair of each flow that comes from the peer.
fn expected(config: rss::Config, flows: &[Flow]) -> (rss::Config, Vec<usize>) {
    let pair = |flow: &Flow| {
        let headers = flow
            .receiver
            .as_ref()
            .map(|receiver| receiver.format.headers());
        steering::pair(&config, headers.unwrap_or(&[])).into()
    };
    (config, flows.iter().map(pair).collect())
}

/// The number of a frame's flow.
fn flow_of(frame: &Frame) -> Option<usize> {
    let mut port = [0; 2];
    let read = frame.read(TARGET_PORT, &mut port);
    let number = u16::from_be_bytes(port).checked_sub(crate::frame::PORT)?;
    read.then_some(number.into())
}

/// Sends a burst of a flow; returns whether nothing was sent.
fn send<L: Link, const MOST: usize>(
    link: &mut L,
    number: usize,
    flow: &mut Flow,
    run: &Run,
) -> Result<bool, Stopped> {
    let Some(sender) = flow.sender.as_mut().filter(|sender| !sender.done) else {
        return Ok(true);
    };
    let own = number % usize::from(run.queues);
    let pair = link.steer(sender.format.headers()).unwrap_or(own);
    // A pair that is out of use is on its way in or out: the first one takes its frames meanwhile.
    let pair = if link.pair(pair).is_some() { pair } else { 0 };
    let port = link.pair(pair).ok_or(Stopped::Down)?;
    if sender.ended {
        sender.done = port.drained().map_err(Stopped::Port)?;
        return Ok(true);
    }
    Ok(sender
        .burst::<_, MOST>(port, run.batch)
        .map_err(Stopped::Port)?
        == 0)
}

/// As over one pair, without sleeping.
#[inline(never)]
pub(crate) fn traffic<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    directions: [bool; 2],
) -> Result<Outcome, Stopped> {
    let flow = |number| Flow::new(link, run, number, directions);
    let mut flows: Vec<Flow> = (0..run.flows).map(flow).collect();
    let [_, receive] = directions;
    let mut tally = receive.then(|| Tally::new(link, run, &flows));
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut deadline = link.now() + timeout;
    let mut timed_out = false;
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    loop {
        let mut idle = true;
        for (number, flow) in flows.iter_mut().enumerate() {
            idle &= send::<L, MOST>(link, number, flow, run)?;
        }
        for pair in 0..run.queues {
            if let Some(tally) = &mut tally {
                idle &= tally.turn::<L, MOST>(link, pair.into(), &mut flows, run)?;
            }
        }
        if !flows.iter().any(|flow| flow.sends() || flow.receives()) {
            break;
        }
        if idle && link.gone() {
            return Err(Stopped::Down);
        }
        turn = turn.wrapping_add(1);
        let now = link.now();
        for flow in &mut flows {
            flow.tick(now, run);
        }
        if let Some(tally) = &mut tally {
            tally.beside(link, &flows, now)?;
        }
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
        }
        if idle {
            if now >= deadline {
                timed_out = true;
                break;
            }
            pause(idle_turns);
            idle_turns = idle_turns.saturating_add(1);
        } else {
            deadline = now + timeout;
            idle_turns = 0;
        }
    }
    // A flow that changed pairs may have frames in one behind those of its end in another.
    if let Some(tally) = &mut tally {
        for pair in 0..run.queues {
            for _ in 0..REST / run.batch.max(1) {
                if tally.turn::<L, MOST>(link, pair.into(), &mut flows, run)? {
                    break;
                }
            }
        }
    }
    let mut outcome = outcome(flows, timed_out, link.now());
    outcome.landed = tally.map(|tally| tally.landed);
    Ok(outcome)
}
