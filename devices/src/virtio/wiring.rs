//! What connects a function to the machine without a VMM thread in between: doorbells, interrupt sources, and the windows.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::event;
use crate::host::{Host, Window};
use crate::pci::Msix;
use crate::vhost_user::RateLimit;

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// One queue index: its notify address and its vector.
struct Line {
    /// Signalled by a write to the notify address.
    doorbell: Option<Arc<EventFd>>,
    /// Where the host signals `doorbell` now.
    registered: Option<u64>,
    /// `doorbell` is known to be an eventfd: it is the VMM's own, or the host has taken it once.
    genuine: bool,
    /// Raises the vector.
    source: Option<Arc<EventFd>>,
    /// What the driver chose; `source` is attached to it.
    vector: u16,
}

/// The doorbells, sources and windows of one function.
pub(super) struct Wiring {
    host: Arc<dyn Host>,
    lines: Vec<Line>,
    /// How many of `lines` are virtqueues; the rest are special.
    queues: usize,
    /// Where the notify area is on the bus.
    notify: Option<u64>,
    notify_stride: u64,
    /// The windows, and where each is on the bus.
    windows: Vec<(Arc<dyn Window>, Option<u64>)>,
    log: RateLimit,
}

impl Wiring {
    pub(super) fn new(
        host: Arc<dyn Host>,
        queues: usize,
        special: usize,
        notify_stride: u64,
        windows: impl Iterator<Item = Arc<dyn Window>>,
    ) -> io::Result<Self> {
        let mut lines = Vec::with_capacity(queues + special);
        for index in 0..queues + special {
            let make = || {
                (index < queues)
                    .then(|| event::new().map(Arc::new))
                    .transpose()
            };
            lines.push(Line {
                doorbell: make()?,
                registered: None,
                genuine: index < queues,
                source: make()?,
                vector: NO_VECTOR,
            });
        }
        Ok(Self {
            host,
            lines,
            queues,
            notify: None,
            notify_stride,
            windows: windows.map(|window| (window, None)).collect(),
            log: RateLimit::new(Duration::from_secs(1)),
        })
    }

    fn warn(&mut self, what: &str, error: &io::Error) {
        if self.log.allow(Instant::now()).is_some() {
            warn!("cannot {what}: {error}");
        }
    }

    /// The eventfds (kick, call) of a virtqueue.
    pub(super) fn events(&self, queue: usize) -> Option<(Arc<EventFd>, Arc<EventFd>)> {
        let line = self.lines.get(queue)?;
        Some((line.doorbell.clone()?, line.source.clone()?))
    }

    /// What a write to the notify address of `index` signals. A descriptor of a peer that has not been shown to be an
    /// eventfd is not written to.
    pub(super) fn doorbell(&self, index: usize) -> Option<Arc<EventFd>> {
        self.lines
            .get(index)
            .filter(|line| line.genuine)?
            .doorbell
            .clone()
    }

    pub(super) fn vector(&self, index: u16) -> u16 {
        self.lines
            .get(usize::from(index))
            .map_or(NO_VECTOR, |line| line.vector)
    }

    /// Moves the sources of `index` to another vector. One that is not there, or that the host refuses, becomes
    /// [`NO_VECTOR`], which the driver reads back (VIRTIO 1.3, section 4.1.5.1.2).
    pub(super) fn set_vector(&mut self, index: u16, vector: u16, msix: &Msix) {
        let Some(line) = self.lines.get_mut(usize::from(index)) else {
            return;
        };
        if let (Some(interrupt), Some(source)) = (msix.interrupt(line.vector), &line.source) {
            interrupt.detach(source);
        }
        line.vector = NO_VECTOR;
        let Some(interrupt) = msix.interrupt(vector) else {
            return;
        };
        match line
            .source
            .as_ref()
            .map_or(Ok(()), |source| interrupt.attach(source))
        {
            Ok(()) => line.vector = vector,
            Err(error) => self.warn("connect a queue to its vector", &error),
        }
    }

    /// The line of a special index.
    fn special(&mut self, index: u16) -> io::Result<&mut Line> {
        let index = usize::from(index);
        let special = self.lines.get_mut(index).filter(|_| index >= self.queues);
        special.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    pub(super) fn set_kick(
        &mut self,
        index: u16,
        source: Option<Arc<EventFd>>,
        msix: &Msix,
    ) -> io::Result<()> {
        let line = self.special(index)?;
        let interrupt = msix.interrupt(line.vector);
        if let (Some(interrupt), Some(old)) = (interrupt, line.source.take()) {
            interrupt.detach(&old);
        }
        if let (Some(interrupt), Some(new)) = (interrupt, &source) {
            interrupt.attach(new)?;
        }
        line.source = source;
        Ok(())
    }

    pub(super) fn set_doorbell(
        &mut self,
        index: u16,
        doorbell: Option<Arc<EventFd>>,
    ) -> io::Result<()> {
        self.special(index)?;
        self.replace_doorbell(usize::from(index), doorbell)
    }

    fn replace_doorbell(&mut self, index: usize, doorbell: Option<Arc<EventFd>>) -> io::Result<()> {
        self.unregister(index);
        let Some(line) = self.lines.get_mut(index) else {
            return Ok(());
        };
        line.doorbell = doorbell;
        line.genuine = false;
        self.register(index).inspect_err(|_| {
            if let Some(line) = self.lines.get_mut(index) {
                line.doorbell = None;
            }
        })
    }

    fn unregister(&mut self, index: usize) {
        let Some(line) = self.lines.get_mut(index) else {
            return;
        };
        if let (Some(gpa), Some(doorbell)) = (line.registered.take(), &line.doorbell)
            && let Err(error) = self.host.remove_doorbell(gpa, doorbell)
        {
            self.warn("remove a doorbell", &error);
        }
    }

    fn register(&mut self, index: usize) -> io::Result<()> {
        let Some(line) = self.lines.get_mut(index) else {
            return Ok(());
        };
        if let (Some(notify), Some(doorbell)) = (self.notify, &line.doorbell) {
            let gpa = notify + self.notify_stride * index as u64;
            self.host.add_doorbell(gpa, doorbell)?;
            line.registered = Some(gpa);
            line.genuine = true;
        }
        Ok(())
    }

    /// Follows the BAR with the notify area.
    pub(super) fn place(&mut self, notify: Option<u64>) {
        if notify == self.notify {
            return;
        }
        for index in 0..self.lines.len() {
            self.unregister(index);
        }
        self.notify = notify;
        for index in 0..self.lines.len() {
            // The doorbell then works all the same, by way of an MMIO exit.
            if let Err(error) = self.register(index) {
                self.warn("add a doorbell", &error);
            }
        }
    }

    /// Follows the BAR of a window, where there is one with this number. A place beyond the physical address space is none.
    pub(super) fn place_window(&mut self, number: usize, bar: Option<Range<u64>>) {
        let end = 1u64
            .checked_shl(self.host.physical_address_bits().into())
            .unwrap_or(u64::MAX);
        let at = bar
            .filter(|range| range.end <= end)
            .map(|range| range.start);
        let Some((window, place)) = self.windows.get_mut(number) else {
            return;
        };
        if at == *place {
            return;
        }
        let window = window.clone();
        let placed = window.place(at);
        *place = at.filter(|_| placed.is_ok());
        if let Err(error) = placed {
            self.warn("place a window", &error);
            if at.is_some()
                && let Err(error) = window.place(None)
            {
                self.warn("take a window off the bus", &error);
            }
        }
    }

    /// Gives a virtqueue that has no vector new eventfds: whoever was handed the old ones can neither signal nor steal from what
    /// comes next.
    pub(super) fn renew(&mut self, queue: usize) {
        match event::new().and_then(|kick| Ok((Arc::new(kick), Arc::new(event::new()?)))) {
            Ok((kick, call)) => {
                self.unregister(queue);
                if let Some(line) = self.lines.get_mut(queue) {
                    line.doorbell = Some(kick);
                    line.source = Some(call);
                }
                if let Err(error) = self.register(queue) {
                    self.warn("add a doorbell", &error);
                }
            }
            Err(error) => self.warn("make new eventfds for a queue", &error),
        }
    }

    /// Back to the state after power-on, except for where the BARs are. `renew` gives the virtqueues new eventfds.
    pub(super) fn reset(&mut self, msix: &Msix, renew: bool) {
        for (at, index) in (0..self.lines.len()).zip(0u16..) {
            self.set_vector(index, NO_VECTOR, msix);
            if at < self.queues {
                if renew {
                    self.renew(at);
                }
            } else {
                self.unregister(at);
                self.lines[at].doorbell = None;
                self.lines[at].source = None;
            }
        }
    }
}
