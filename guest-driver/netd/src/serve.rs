//! The loop: the driver's control path, work on its port, and sleeping where there is nothing to do.

use std::io;
use std::time::{Duration, Instant};

use guest_driver::Port;
use guest_driver::port::{self, Either};
use guest_driver::vhost_pci::{Link, VhostPci, VhostPciPort};
use guest_driver::virtio_pci;
use guest_driver::watch::Watched;

use crate::capture::Capture;
use crate::stats::{Queue, Report, Stats};
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
    /// The data path of a pair, while its rings can be used: that of the first as long as the peer is there, the others as its driver likes.
    fn pair(&mut self, index: usize) -> Option<&mut Self::Port>;
    /// Takes the rings out of use because the peer broke a rule, and tells it.
    fn give_up(&mut self);
    /// The Ethernet address of a peer that has moved, which the work's network is to hear of; once each time.
    fn announcement(&mut self) -> Option<[u8; 6]>;
    /// Packets that the present data paths found to be no frames, or to have no room.
    fn malformed(&mut self) -> u64;
}

impl Device for VhostPci {
    type Port = VhostPciPort;

    fn service(&mut self, look: bool) -> Result<Link, virtio_pci::Error> {
        VhostPci::service(self, look)
    }

    fn pair(&mut self, index: usize) -> Option<&mut VhostPciPort> {
        VhostPci::pair(self, index)
    }

    fn give_up(&mut self) {
        VhostPci::give_up(self);
    }

    fn announcement(&mut self) -> Option<[u8; 6]> {
        self.take_announcement()
    }

    fn malformed(&mut self) -> u64 {
        let ports = (0..self.pairs()).map(|index| match VhostPci::pair(self, index) {
            Some(Either::Split(port)) => port.dropped(),
            Some(Either::Packed(port)) => port.dropped(),
            None => 0,
        });
        ports.sum()
    }
}

/// Serves each queue pair with the work of its number, until that is done, the time is over, or a signal comes. Every report, the last one too, goes to `report`; `note` gets a line for whoever watches when the
/// link changes, or the capture fails, which ends it and nothing else.
pub fn serve<D: Device, W: Work>(
    device: &mut D,
    works: &mut [W],
    waiter: &Waiter,
    options: &Options,
    capture: Option<Capture>,
    mut report: impl FnMut(&Report),
    mut note: impl FnMut(&str),
) -> Result<Stats, Error> {
    if options.mode == Mode::Irq && !waiter.has_interrupts() {
        return Err(Error::NoInterrupts);
    }
    let queues = vec![Queue::default(); works.len()];
    let mut served = Served {
        device,
        works,
        waiter,
        capture,
        stats: Stats::default(),
        queues,
        malformed: 0,
        up: false,
    };
    let start = Instant::now();
    let result = served.run(options, start, &mut report, &mut note);
    served.count_malformed();
    let up = served.up;
    served.set_link(false, &mut |_| ());
    if let Some(Err(why)) = served.capture.take().map(Capture::finish) {
        note(&lost_capture(&why));
    }
    let stats = served.stats;
    let counters = (&stats, &served.queues[..]);
    report(&Report::new(counters, start.elapsed(), up, true));
    result.map(|()| stats)
}

struct Served<'a, D, W> {
    device: &'a mut D,
    works: &'a mut [W],
    waiter: &'a Waiter,
    capture: Option<Capture>,
    stats: Stats,
    /// What each pair moved.
    queues: Vec<Queue>,
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
            // One frame is enough, from whichever pair.
            if let (Some(address), Some(work)) =
                (self.device.announcement(), self.works.first_mut())
            {
                work.announce(address);
            }
            let moved = self.turn(note)?;
            if self.works.iter().any(|work| work.done(&self.stats)) {
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
                let counters = (&self.stats, &self.queues[..]);
                report(&Report::new(counters, now - start, self.up, false));
            }
            if now >= next_refresh {
                next_refresh = now + LONGEST_SLEEP;
                for work in &mut *self.works {
                    work.refresh();
                }
                if let Some(capture) = &mut self.capture {
                    capture.flush();
                }
            }
            self.look_after_capture(note);
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
                    false => self.waiter.wait(Duration::ZERO, [])?,
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
            Mode::Poll => !self.has_ports(),
            Mode::Irq => true,
            Mode::Adaptive => idle >= SPIN || !self.has_ports(),
        }
    }

    fn has_ports(&mut self) -> bool {
        self.device.pair(0).is_some()
    }

    /// Sleeps until what the work waits for is there.
    fn sleep(&mut self, longest: Duration) -> io::Result<crate::wait::Woken> {
        let mut ready = false;
        for (index, work) in self.works.iter().enumerate() {
            if let Some((_, port)) = port_for(self.device, index) {
                let wants = work.wants();
                ready |= port.arm(wants.frames, wants.room);
            }
        }
        let longest = if ready { Duration::ZERO } else { longest };
        if !ready && self.has_ports() {
            self.stats.sleeps += 1;
        }
        let woken = self.wait(longest);
        for index in 0..self.works.len() {
            if let Some(port) = self.device.pair(index) {
                port.disarm();
            }
        }
        woken
    }

    /// Sleeps for a moment, or until there is something to read: nothing of the device's ends a sleep without interrupts.
    fn nap(&mut self, longest: Duration) -> io::Result<crate::wait::Woken> {
        if !self.has_ports() {
            return self.wait(longest.min(LOOK_AT_REGISTERS));
        }
        self.stats.sleeps += 1;
        self.wait(longest.min(NAP))
    }

    /// Waits for what ends a sleep; without a peer, nothing that is there to read does.
    fn wait(&mut self, longest: Duration) -> io::Result<crate::wait::Woken> {
        let reads = self.has_ports();
        let wants = self.works.iter().filter_map(|work| work.wants().fd);
        self.waiter.wait(longest, wants.filter(|_| reads))
    }

    /// A turn of each work that has a port; returns whether anything moved.
    fn turn(&mut self, note: &mut impl FnMut(&str)) -> Result<bool, Error> {
        let mut moved = false;
        for index in 0..self.works.len() {
            let (Some(work), Some((pair, port))) =
                (self.works.get_mut(index), port_for(self.device, index))
            else {
                break;
            };
            let before = (self.stats, port.notices());
            let turn = match &mut self.capture {
                None => work.turn(port, &mut self.stats),
                Some(watch) => work.turn(
                    &mut Watched {
                        port: &mut *port,
                        watch,
                    },
                    &mut self.stats,
                ),
            };
            if let Some(queue) = self.queues.get_mut(pair) {
                queue.add((&before.0, &self.stats), before.1, port.notices());
            }
            match turn {
                Ok(any) => moved |= any,
                Err(Stop::Nic(error)) => return Err(Error::Nic(error)),
                Err(Stop::Port(why)) => return self.doubt(why, note),
            }
        }
        Ok(moved)
    }

    /// Ends a capture that has all frames, or cannot go on.
    fn look_after_capture(&mut self, note: &mut impl FnMut(&str)) {
        let Some(capture) = &mut self.capture else {
            return;
        };
        let ended = match capture.check() {
            Ok(true) => return,
            Ok(false) => self.capture.take().map_or(Ok(()), Capture::finish),
            Err(why) => Err(why),
        };
        self.capture = None;
        if let Err(why) = ended {
            note(&lost_capture(&why));
        }
    }

    /// Rings that make no sense: the peer is gone, as the device is about to say, or has broken a rule.
    fn doubt(&mut self, why: port::Error, note: &mut impl FnMut(&str)) -> Result<bool, Error> {
        self.count_malformed();
        let until = Instant::now() + GRACE;
        while self.has_ports() && Instant::now() < until {
            // A signal that comes meanwhile is still there afterwards.
            self.waiter.wait(Duration::from_millis(1), [])?;
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
        for work in &mut *self.works {
            work.link(up, &mut self.stats);
        }
        note(if up { "link up" } else { "link down" });
    }

    fn count_malformed(&mut self) {
        // Never backwards: a pair that is taken out of use takes its count along.
        let malformed = &mut self.stats.dropped.malformed;
        *malformed = (self.malformed + self.device.malformed()).max(*malformed);
    }
}

fn lost_capture(why: &io::Error) -> String {
    format!("--capture: {why}; there are no more frames in it")
}

/// The data path for the work of a pair, and which pair that is. What comes for a pair that is not in use goes over the first.
fn port_for<D: Device>(device: &mut D, index: usize) -> Option<(usize, &mut D::Port)> {
    let index = if device.pair(index).is_some() {
        index
    } else {
        0
    };
    device.pair(index).map(|port| (index, port))
}

#[cfg(test)]
mod tests;
