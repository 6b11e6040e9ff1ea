//! The loop: the driver's control path, work on its port, and sleeping where there is nothing to do.

use std::io;
use std::time::{Duration, Instant};

use guest_driver::Port;
use guest_driver::port::Either;
use guest_driver::vhost_pci::{Link, VhostPci, VhostPciPort};
use guest_driver::virtio_pci;

use crate::stats::{Report, Stats};
use crate::wait::Waiter;
use crate::work::{Stop, Work};

/// Turns between two looks at the clock while there is something to do.
const CLOCK_EVERY: u32 = 64;
/// From one look at signals and the device's configuration to the next, while the loop does not sleep. A look at the device's registers leaves the guest, which
/// takes tens of microseconds: without interrupts this is longer.
const LOOK: Duration = Duration::from_millis(1);
const LOOK_AT_REGISTERS: Duration = Duration::from_millis(10);
/// How long adaptive mode polls for more.
const SPIN: Duration = Duration::from_micros(100);
/// The window of a peer that is gone reads as a broken ring, a moment before the device says so.
const GRACE: Duration = Duration::from_millis(100);
/// A sleep that only the clock ends: without interrupts, adaptive mode looks at the peer's rings so often.
const NAP: Duration = Duration::from_millis(1);
/// A sleep ends at least this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How to wait for frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Look again and again
    Poll,
    /// Sleep until an interrupt
    Irq,
    /// Look again for 100 µs, then sleep until an interrupt; where there are none, for a millisecond
    Adaptive,
}

/// When to stop, and what to report.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How to wait.
    pub mode: Mode,
    /// For how long to serve; `None`: until told to stop, or the work is done.
    pub time: Option<Duration>,
    /// From one report to the next; `None`: only one, at the end.
    pub report: Option<Duration>,
}

/// Why serving ended in failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device.
    #[error("vhost-pci: {0}")]
    Device(#[from] virtio_pci::Error),
    /// The interface.
    #[error("the tap: {0}")]
    Nic(#[source] io::Error),
    /// Waiting.
    #[error("cannot wait: {0}")]
    Wait(#[from] io::Error),
    /// Sleeping needs interrupts.
    #[error(
        "no interrupts arrive from this device: --mode irq does not work (--via vfio has interrupts)"
    )]
    NoInterrupts,
}

/// A back-end device as the loop sees it.
pub trait Device {
    /// Its data path.
    type Port: Port;
    /// Deals with what has come on the control path; `look`: at the device's configuration too.
    fn service(&mut self, look: bool) -> Result<Link, virtio_pci::Error>;
    /// The data path, while the peer's rings can be used.
    fn port(&mut self) -> Option<&mut Self::Port>;
    /// Takes the rings out of use because the peer broke a rule, and tells it.
    fn give_up(&mut self);
    /// Packets that the present data path found to be no frames, or to have no room.
    fn malformed(&mut self) -> u64;
}

impl Device for VhostPci {
    type Port = VhostPciPort;

    fn service(&mut self, look: bool) -> Result<Link, virtio_pci::Error> {
        VhostPci::service(self, look)
    }

    fn port(&mut self) -> Option<&mut VhostPciPort> {
        VhostPci::port(self)
    }

    fn give_up(&mut self) {
        VhostPci::give_up(self);
    }

    fn malformed(&mut self) -> u64 {
        match VhostPci::port(self) {
            Some(Either::Split(port)) => port.dropped(),
            Some(Either::Packed(port)) => port.dropped(),
            None => 0,
        }
    }
}

/// Serves until the work is done, the time is over, or a signal comes. Every report, the last one too, goes to `report`; `note` gets a line for whoever watches when the
/// link changes.
pub fn serve<D: Device, W: Work>(
    device: &mut D,
    work: &mut W,
    waiter: &Waiter,
    options: &Options,
    mut report: impl FnMut(&Report),
    mut note: impl FnMut(&str),
) -> Result<Stats, Error> {
    if options.mode == Mode::Irq && !waiter.has_interrupts() {
        return Err(Error::NoInterrupts);
    }
    let mut served = Served {
        device,
        work,
        waiter,
        stats: Stats::default(),
        malformed: 0,
        up: false,
    };
    let start = Instant::now();
    let result = served.run(options, start, &mut report, &mut note);
    served.count_malformed();
    let up = served.up;
    served.set_link(false, &mut |_| ());
    let stats = served.stats;
    report(&Report::new(&stats, start.elapsed(), up, true));
    result.map(|()| stats)
}

struct Served<'a, D, W> {
    device: &'a mut D,
    work: &'a mut W,
    waiter: &'a Waiter,
    stats: Stats,
    /// What earlier data paths found malformed.
    malformed: u64,
    up: bool,
}

impl<D: Device, W: Work> Served<'_, D, W> {
    fn run(
        &mut self,
        options: &Options,
        start: Instant,
        report: &mut impl FnMut(&Report),
        note: &mut impl FnMut(&str),
    ) -> Result<(), Error> {
        let end = options.time.map(|time| start + time);
        let mut next_report = options.report.map(|every| start + every);
        let mut next_refresh = start + LONGEST_SLEEP;
        let look_every = if self.waiter.has_interrupts() {
            LOOK
        } else {
            LOOK_AT_REGISTERS
        };
        let mut next_look = start;
        let mut idle_since = None;
        let mut look = true;
        let mut turn = 0u32;
        loop {
            // The port goes with its counters.
            if look {
                self.count_malformed();
            }
            let link = self.device.service(std::mem::take(&mut look))?;
            self.follow(link, note);
            let moved = self.turn(note)?;
            if self.work.done(&self.stats) {
                return Ok(());
            }
            turn = turn.wrapping_add(1);
            if moved {
                idle_since = None;
                if !turn.is_multiple_of(CLOCK_EVERY) {
                    continue;
                }
            }
            let now = Instant::now();
            if end.is_some_and(|end| now >= end) {
                return Ok(());
            }
            if let (Some(at), Some(every)) = (&mut next_report, options.report)
                && now >= *at
            {
                *at = now + every;
                self.count_malformed();
                report(&Report::new(&self.stats, now - start, self.up, false));
            }
            if now >= next_refresh {
                next_refresh = now + LONGEST_SLEEP;
                self.work.refresh();
            }
            let sleep =
                !moved && self.may_sleep(options.mode, now - *idle_since.get_or_insert(now));
            if sleep || now >= next_look {
                let until = [end, next_report].into_iter().flatten().min();
                let longest = until.map_or(LONGEST_SLEEP, |at| {
                    LONGEST_SLEEP.min(at.saturating_duration_since(now))
                });
                let woken = match sleep {
                    true if self.waiter.has_interrupts() => self.sleep(longest)?,
                    true => self.nap(longest)?,
                    false => self.waiter.wait(Duration::ZERO, None)?,
                };
                if woken.stop {
                    return Ok(());
                }
                let now = Instant::now();
                // An interrupt says when to look.
                if self.waiter.has_interrupts() || now >= next_look {
                    look = woken.config;
                    next_look = now + look_every;
                }
                if sleep {
                    idle_since = None;
                }
            } else if !moved {
                std::hint::spin_loop();
                // There may be one processor for this, and for whoever has something to send.
                std::thread::yield_now();
            }
        }
    }

    /// Whether to sleep, after so long without anything to do.
    fn may_sleep(&mut self, mode: Mode, idle: Duration) -> bool {
        match mode {
            Mode::Poll => self.device.port().is_none(),
            Mode::Irq => true,
            Mode::Adaptive => idle >= SPIN || self.device.port().is_none(),
        }
    }

    /// Sleeps until what the work waits for is there.
    fn sleep(&mut self, longest: Duration) -> io::Result<crate::wait::Woken> {
        let Self {
            device,
            work,
            waiter,
            stats,
            ..
        } = self;
        let Some(port) = device.port() else {
            return waiter.wait(longest, None);
        };
        let wants = work.wants();
        if port.arm(wants.frames, wants.room) {
            port.disarm();
            return waiter.wait(Duration::ZERO, None);
        }
        stats.sleeps += 1;
        let woken = waiter.wait(longest, wants.fd);
        port.disarm();
        woken
    }

    /// Sleeps for a moment, or until there is something to read: nothing of the device's ends a sleep without interrupts.
    fn nap(&mut self, longest: Duration) -> io::Result<crate::wait::Woken> {
        if self.device.port().is_none() {
            return self.waiter.wait(longest.min(LOOK_AT_REGISTERS), None);
        }
        self.stats.sleeps += 1;
        self.waiter.wait(longest.min(NAP), self.work.wants().fd)
    }

    /// A turn of the work, where there is a port; returns whether anything moved.
    fn turn(&mut self, note: &mut impl FnMut(&str)) -> Result<bool, Error> {
        let Some(port) = self.device.port() else {
            return Ok(false);
        };
        match self.work.turn(port, &mut self.stats) {
            Ok(moved) => Ok(moved),
            Err(Stop::Nic(error)) => Err(Error::Nic(error)),
            Err(Stop::Port(why)) => {
                self.count_malformed();
                let until = Instant::now() + GRACE;
                while self.device.port().is_some() && Instant::now() < until {
                    // A signal that comes meanwhile is still there afterwards.
                    self.waiter.wait(Duration::from_millis(1), None)?;
                    let link = self.device.service(true)?;
                    self.follow(link, note);
                    if link != Link::Same {
                        return Ok(true);
                    }
                }
                self.device.give_up();
                self.stats.broken += 1;
                note(&format!(
                    "the peer broke a rule of its rings ({why}); they are out of use until it starts them anew"
                ));
                self.set_link(false, note);
                Ok(true)
            }
        }
    }

    /// Tells the work what became of the link.
    fn follow(&mut self, link: Link, note: &mut impl FnMut(&str)) {
        match link {
            Link::Same => {}
            Link::Down => self.set_link(false, note),
            Link::Up => {
                self.set_link(false, note);
                self.set_link(true, note);
            }
        }
    }

    fn set_link(&mut self, up: bool, note: &mut impl FnMut(&str)) {
        if self.up == up {
            return;
        }
        self.up = up;
        self.stats.links += u64::from(up);
        self.malformed = self.stats.dropped.malformed;
        self.work.link(up, &mut self.stats);
        note(if up { "link up" } else { "link down" });
    }

    fn count_malformed(&mut self) {
        self.stats.dropped.malformed = self.malformed + self.device.malformed();
    }
}

#[cfg(test)]
mod tests;
