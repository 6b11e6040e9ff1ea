//! Source, sink and both over several queue pairs: flow f goes over pair f, in its own sequence, and what arrives on a pair is checked as
//! the frames of its flow. One processor looks at one pair after the other.

use alloc::vec::Vec;

use guest_driver::Port;
use guest_driver::port::Notices;

use crate::Run;
use crate::record::{Outcome, Received, Sent};
use crate::workload::{Link, Receiver, SERVICE_EVERY, Sender, Stopped, pause};

/// One flow's part of a run.
pub(crate) struct Flow {
    pub(crate) sender: Option<Sender>,
    pub(crate) receiver: Option<Receiver>,
    /// When the end of what is received was seen.
    pub(crate) stopped_at: Option<u64>,
}

impl Flow {
    pub(crate) fn new<L: Link>(
        link: &L,
        run: &Run,
        number: u16,
        [send, receive]: [bool; 2],
    ) -> Self {
        Self {
            sender: send.then(|| Sender::new(link, run, number)),
            receiver: receive.then(|| Receiver::new(link, run, number)),
            stopped_at: None,
        }
    }

    pub(crate) fn sends(&self) -> bool {
        self.sender.as_ref().is_some_and(|sender| !sender.done)
    }

    pub(crate) fn receives(&self) -> bool {
        let receiver = self.receiver.as_ref();
        receiver.is_some_and(|receiver| receiver.ended.is_none())
    }

    /// A burst each way; returns whether there was nothing to do.
    #[inline(always)]
    fn turn<L: Link, const MOST: usize>(
        &mut self,
        link: &mut L,
        pair: usize,
        run: &Run,
    ) -> Result<bool, Stopped> {
        let Some(port) = link.pair(pair) else {
            // The others of a connection that is up are out of use, and come back.
            return if pair == 0 {
                Err(Stopped::Down)
            } else {
                Ok(true)
            };
        };
        let mut idle = true;
        if let Some(sender) = self.sender.as_mut().filter(|sender| !sender.done) {
            if sender.ended {
                sender.done = port.drained().map_err(Stopped::Port)?;
            } else {
                idle &= sender
                    .burst::<_, MOST>(port, run.batch)
                    .map_err(Stopped::Port)?
                    == 0;
            }
        }
        if let Some(receiver) = self.receiver.as_mut().filter(|r| r.ended.is_none()) {
            let frames = port.rx_burst(run.batch, |frame| {
                receiver.take::<MOST>(frame);
            });
            idle &= frames.map_err(Stopped::Port)? == 0;
            if receiver.ended.is_some() {
                self.stopped_at = Some(link.now());
            }
        }
        Ok(idle)
    }

    pub(crate) fn tick(&mut self, now: u64, run: &Run) {
        if let Some(sender) = &mut self.sender {
            sender.tick(now, run);
        }
        if let Some(receiver) = &mut self.receiver {
            receiver.tick(now);
        }
    }
}

/// As over one pair.
#[inline(never)]
pub(crate) fn traffic<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    send: bool,
    receive: bool,
) -> Result<Outcome, Stopped> {
    let flow = |number| Flow::new(link, run, number, [send, receive]);
    let mut flows: Vec<Flow> = (0..run.queues).map(flow).collect();
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut deadline = link.now() + timeout;
    let mut timed_out = false;
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    // Whether anything was done since the last look at the clock.
    let mut busy = false;
    loop {
        let mut idle = true;
        for (pair, flow) in flows.iter_mut().enumerate() {
            idle &= flow.turn::<L, MOST>(link, pair, run)?;
        }
        if !flows.iter().any(|flow| flow.sends() || flow.receives()) {
            break;
        }
        if idle && link.gone() {
            return Err(Stopped::Down);
        }
        busy |= !idle;
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(L::CLOCK_EVERY) || idle && run.sleeps(idle_turns) {
            let now = link.now();
            link.beside(now);
            for flow in &mut flows {
                flow.tick(now, run);
            }
            if core::mem::take(&mut busy) {
                deadline = now + timeout;
            } else if now >= deadline {
                timed_out = true;
                break;
            }
        }
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
        }
        if !idle {
            idle_turns = 0;
        } else if run.sleeps(idle_turns) {
            wait(link, &flows, deadline);
        } else {
            pause(idle_turns);
            idle_turns = idle_turns.saturating_add(1);
        }
    }
    Ok(outcome(flows, timed_out, link.now()))
}

/// Sleeps until there is something to do on any pair.
fn wait<L: Link>(link: &mut L, flows: &[Flow], deadline: u64) {
    let mut ready = false;
    for (pair, flow) in flows.iter().enumerate() {
        if let Some(port) = link.pair(pair) {
            ready |= port.arm(flow.receives(), flow.sends());
        }
    }
    if !ready {
        link.sleep(deadline);
        link.service();
    }
    for pair in 0..flows.len() {
        if let Some(port) = link.pair(pair) {
            port.disarm();
        }
    }
}

/// All flows together: what they did is added up, and they took as long as the longest.
pub(crate) fn outcome(flows: Vec<Flow>, timeout: bool, now: u64) -> Outcome {
    let mut outcome = Outcome {
        timeout,
        ..Outcome::default()
    };
    for flow in flows {
        if let Some(sender) = flow.sender {
            let all = outcome.sent.get_or_insert_with(Sent::default);
            all.frames += sender.stats.frames;
            all.full += sender.stats.full;
            all.ticks = all.ticks.max(sender.stats.ticks);
        }
        if let Some(mut receiver) = flow.receiver {
            let one = receiver.finish(flow.stopped_at.unwrap_or(now));
            let all = outcome.received.get_or_insert_with(Received::default);
            all.frames += one.frames;
            all.ticks = all.ticks.max(one.ticks);
            all.verified += one.verified;
            all.lost += one.lost;
            all.duplicated += one.duplicated;
            all.reordered += one.reordered;
            all.corrupted += one.corrupted;
        }
    }
    outcome
}

/// What became of the notifications of each of so many queue pairs (of the ring that sends, of the one that receives) since its port was made.
pub fn notices<L: Link>(link: &mut L, queues: u16) -> Vec<[Notices; 2]> {
    let pairs = 0..usize::from(queues);
    let of = |pair| link.pair(pair).map(|port| port.notices());
    pairs.map(of).map(Option::unwrap_or_default).collect()
}
