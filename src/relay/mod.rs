//! `relay`: a process that is the vhost-user back-end of two front-ends and carries frames from each to the other: the generic path through the host that
//! the window replaces, over the same ring core.
//!
//! One thread does everything. A frame is copied once, from the buffer that one guest wrote into the buffer that the other offered; where there is none, it
//! waits where it is.

mod fds;
mod link;
mod memory;
mod path;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_driver::bulk;

use crate::cli::Mode;
use crate::cli::relay::RelayArgs;
use crate::exit;
use crate::sys::{self, Signals};
use link::{Link, Lost};
use path::{Armed, Broken, Lane, Stop};

/// How often the sockets are looked at while frames go over.
const CONTROL: Duration = Duration::from_millis(1);
/// How long to sleep where nobody will say when there is something to do.
const NAP: Duration = Duration::from_millis(1);
/// Turns without a frame after which whoever else wants the core gets it.
const IDLE: u32 = 256;
/// Turns between two looks at the clock.
const TURNS: u32 = 64;

/// Both front-ends and both directions.
struct Relay {
    links: [Link; 2],
    /// From a to b, from b to a.
    lanes: [Lane; 2],
}

/// Joins the two front-ends until a signal ends it; returns the exit code.
pub fn run(args: &RelayArgs) -> Result<u8> {
    if let Some(parent) = args.parent {
        sys::die_with_parent(parent)?;
    }
    let [a, b] = args.ports()?;
    if let Some(core) = args.core {
        let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
        if !allowed.contains(&core) {
            let why = format!("--core {core}: this process may run on {allowed:?}");
            return Err(exit::usage(why).into());
        }
        sys::pin_to(core).with_context(|| format!("--core {core}"))?;
    }
    let signals = Signals::install().context("cannot handle signals")?;
    bulk::detect();
    let mut relay = Relay {
        links: [Link::new("a", a)?, Link::new("b", b)?],
        lanes: [Lane::new(), Lane::new()],
    };
    let number = relay.serve(args.mode, &signals)?;
    let [there, back] = &relay.lanes;
    println!(
        "relay: {} frames from a to b, {} from b to a, {} dropped",
        there.frames,
        back.frames,
        there.dropped + back.dropped
    );
    Ok(exit::of_signal(number))
}

impl Relay {
    /// Serves until a signal comes; its number.
    fn serve(&mut self, mode: Mode, signals: &Signals) -> Result<i32> {
        let mut idle = 0_u32;
        loop {
            if let Some(number) = signals.caught() {
                return Ok(number);
            }
            self.links.iter_mut().for_each(Link::service);
            let start = Instant::now();
            let mut stops = None;
            while start.elapsed() < CONTROL {
                for _ in 0..TURNS {
                    let before = self.frames();
                    stops = self.turn();
                    let moved = self.frames() != before;
                    idle = if moved { 0 } else { idle.saturating_add(1) };
                    if stops.is_none() || idle > IDLE {
                        break;
                    }
                }
                if stops.is_none() || idle > IDLE {
                    break;
                }
            }
            match (mode, stops) {
                (_, None) => self.wait(signals, false, Some(link::RETRY))?,
                (Mode::Poll, Some(_)) if idle > IDLE => {
                    idle = 0;
                    std::thread::yield_now();
                }
                // It looks for more for a while in either.
                (Mode::Irq | Mode::Adaptive, Some(stops)) if idle > IDLE => {
                    idle = 0;
                    self.sleep(stops, signals)?;
                }
                _ => {}
            }
        }
    }

    /// One burst each way; why it was no longer. `None` where a front-end is missing.
    fn turn(&mut self) -> Option<[Stop; 2]> {
        let [a, b] = &mut self.links;
        let [there, back] = &mut self.lanes;
        let (rings_a, rings_b) = (a.rings()?, b.rings()?);
        let result = there
            .forward(rings_a, rings_b)
            .map_err(|broken| (0, broken))
            .and_then(|there| {
                let back = back.forward(rings_b, rings_a);
                back.map(|back| [there, back]).map_err(|broken| (1, broken))
            });
        match result {
            Ok(stops) => Some(stops),
            Err((lane, broken)) => {
                let (side, error) = match broken {
                    Broken::Sender(error) => (lane, error),
                    Broken::Receiver(error) => (1 - lane, error),
                };
                self.links[side].lose(&Lost::Broken(error));
                None
            }
        }
    }

    /// Asks for kicks, and sleeps if none is owed.
    fn sleep(&mut self, [there, back]: [Stop; 2], signals: &Signals) -> Result<()> {
        let [a, b] = &mut self.links;
        let (Some(rings_a), Some(rings_b)) = (a.rings(), b.rings()) else {
            return Ok(());
        };
        let armed = Lane::arm(there, rings_a, rings_b).min(Lane::arm(back, rings_b, rings_a));
        let timeout = match armed {
            Armed::Ready => None,
            Armed::Nap => Some(Some(NAP)),
            Armed::Sleep => Some(None),
        };
        if let Some(timeout) = timeout {
            self.wait(signals, true, timeout)?;
        }
        for link in &mut self.links {
            if let Some(rings) = link.rings() {
                rings.disarm();
            }
        }
        Ok(())
    }

    /// Sleeps until a message, a signal or, where it is waited for, a kick comes, or the time is over.
    fn wait(&self, signals: &Signals, kicks: bool, timeout: Option<Duration>) -> Result<()> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![signals.as_fd()];
        let mut blind = false;
        for link in &self.links {
            match link.control() {
                Some(fd) => fds.push(fd),
                None => blind = true,
            }
            if kicks {
                fds.extend(link.kicks());
            }
        }
        let timeout = match (timeout, blind) {
            (None, true) => Some(link::RETRY),
            (timeout, _) => timeout,
        };
        sys::poll(&fds, timeout).context("poll")?;
        Ok(())
    }

    fn frames(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.frames).sum()
    }
}
