//! Open loop: a frame is sent when it is due, whatever became of those before it, and its round trip is timed from when it was due. A frame
//! that has to wait because others are late counts as late, too: what a closed loop leaves out.

use alloc::boxed::Box;

use guest_driver::Port;
use guest_driver::port::MAX_BURST;

use crate::Run;
use crate::frame::{Kind, Seen};
use crate::histogram::Histogram;
use crate::record::{Outcome, Sent};
use crate::workload::{
    Link, Receiver, SERVICE_EVERY, Schedule, Stopped, both_ways, drain, end, format, wait,
    with_port,
};

/// A tick is so many parts, so that frames are due in the middle of one, too.
const PARTS: u32 = 12;

/// When which frame is due.
#[derive(Clone, Copy, Debug)]
struct Clock {
    start: u64,
    /// From one frame to the next, in parts of a tick.
    step: u64,
}

impl Clock {
    fn new(start: u64, ticks_per_ms: u64, rate: u64) -> Self {
        let second = ticks_per_ms.saturating_mul(1000 << PARTS);
        Self {
            start,
            step: (second / rate.max(1)).max(1),
        }
    }

    /// How many frames are due by then: the first is due at the start.
    fn due(&self, now: u64) -> u64 {
        ((now.saturating_sub(self.start) << PARTS) / self.step).saturating_add(1)
    }

    /// When a frame is due. A peer may number its frames as it likes.
    fn of(&self, sequence: u64) -> u64 {
        self.start
            .wrapping_add(sequence.wrapping_mul(self.step).div_ceil(1 << PARTS))
    }
}

/// The frames of a burst that came back.
struct Came {
    sequences: [u64; MAX_BURST],
    count: usize,
}

/// Sends at `run.rate`, in bursts of up to `run.batch` where more than one frame is due. `back`: to an echo, and times the way there and back.
#[inline(never)]
pub(crate) fn traffic<L: Link, const MOST: usize>(
    link: &mut L,
    run: &Run,
    back: bool,
) -> Result<Outcome, Stopped> {
    let format = format(run, end(link, run), run.size);
    let mut receiver = Receiver::new(link, run, 0);
    let mut times = Box::new(Histogram::default());
    let mut came = Box::new(Came {
        sequences: [0; MAX_BURST],
        count: 0,
    });
    let start = link.now();
    let schedule = Schedule::from(link, run, start);
    let clock = Clock::new(start, link.ticks_per_ms(), run.rate);
    let total = match run.count {
        0 => clock.due(schedule.end.saturating_sub(1)),
        count => count,
    };
    // A counted run is timed as a whole.
    let warm = if run.count == 0 { schedule.warm } else { start };
    let timeout = run.timeout_ms * link.ticks_per_ms();
    let mut deadline = start + timeout;
    let (mut next, mut ended, mut full) = (0, false, 0);
    let mut turn = 0u32;
    let mut idle_turns = 0u32;
    let timed_out = loop {
        let now = link.now();
        let due = clock.due(now).min(total);
        let over = next >= total && (run.count != 0 || now >= schedule.end);
        let mut idle = true;
        if over && !ended {
            let kind = Kind::End;
            let sent = with_port(link, |port| {
                format.send(port, 1, |_, slot| format.build::<MOST>(slot, kind, next))
            })?;
            ended = sent == 1;
            idle = !ended;
        } else if next < due {
            let count = usize::try_from(due - next).map_or(run.batch, |due| due.min(run.batch));
            let sent = with_port(link, |port| {
                format.send(port, count, |i, slot| {
                    format.build::<MOST>(slot, Kind::Data, next + i as u64)
                })
            })?;
            next += sent as u64;
            full += u64::from(sent < count);
            idle = sent == 0;
        }
        if back {
            came.count = 0;
            let frames = with_port(link, |port| {
                port.rx_burst(run.batch, |frame| {
                    if let Seen::Good(Kind::Data, sequence) = receiver.take::<MOST>(frame)
                        && let Some(place) = came.sequences.get_mut(came.count)
                    {
                        *place = sequence;
                        came.count += 1;
                    }
                })
            })?;
            idle &= frames == 0;
            let now = link.now();
            for &sequence in came.sequences.iter().take(came.count) {
                let due = clock.of(sequence);
                if sequence < next && due >= warm {
                    times.add(now.saturating_sub(due));
                }
            }
            if frames > 0 {
                receiver.tick(now);
            }
        }
        if ended && (!back || receiver.ended.is_some()) {
            drain(link, now + timeout)?;
            break false;
        }
        if idle && link.gone() {
            return Err(Stopped::Down);
        }
        link.beside(now);
        let waits_for_peer = over || next < due || back && !receiver.has(next);
        if !idle || !waits_for_peer {
            deadline = now + timeout;
        } else if now >= deadline {
            break true;
        }
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(SERVICE_EVERY) {
            link.service();
        }
        idle_turns = if idle {
            idle_turns.saturating_add(1)
        } else {
            0
        };
        if idle && run.sleeps(idle_turns) {
            // What it waits for next: room for what is due, or the next frame's time, or the end.
            let room = next < due || over && !ended;
            let event = match (room, next < total) {
                (true, _) => deadline,
                (false, true) => clock.of(next),
                (false, false) if over => deadline,
                (false, false) => schedule.end,
            };
            wait(link, back, room, event.min(deadline));
        }
    };
    if back {
        return Ok(Outcome {
            round_trips: Some(times),
            ..both_ways(link, receiver, next, timed_out)
        });
    }
    Ok(Outcome {
        sent: Some(Sent {
            frames: next,
            ticks: (link.now() - start).max(1),
            full,
        }),
        timeout: timed_out,
        ..Outcome::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_due_when_the_clock_says_that_one_more_is() {
        // 40 and 3 million frames a second, one in a second, and more than there are ticks.
        for rate in [40_000_000, 3_000_000, 1, 1_000_000_000] {
            let clock = Clock::new(1_000_000, 2_596_000, rate);
            let an_hour = |&sequence: &u64| sequence / rate <= 3600;
            for sequence in (1..1000).chain([1 << 20, 40_000_000]).filter(an_hour) {
                let at = clock.of(sequence);
                assert!(clock.due(at) > sequence, "{rate} {sequence}");
                assert!(clock.due(at - 1) <= sequence, "{rate} {sequence}");
            }
            assert_eq!((clock.of(0), clock.due(clock.start)), (clock.start, 1));
            // In a minute, within what a part of a tick makes.
            let minute = clock.due(1_000_000 + 60_000 * 2_596_000) - 1;
            let error = minute.abs_diff(60 * rate);
            assert!(error * 2000 <= 60 * rate, "{rate} {minute}");
        }
    }

    #[test]
    fn numbers_that_a_peer_made_up_do_not_panic() {
        let clock = Clock::new(u64::MAX, u64::MAX, 1);
        assert_eq!(clock.due(0), 1);
        let _ = (clock.of(u64::MAX), clock.of(1));
    }
}
