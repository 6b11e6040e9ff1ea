//! Sleeping until something happens.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use guest_driver::vhost_pci::MAX_PAIRS;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sys;

/// What the device's interrupts raise.
#[derive(Debug)]
pub struct Interrupts {
    /// The configuration changed.
    pub config: EventFd,
    /// A ring made progress.
    pub queue: EventFd,
}

impl Interrupts {
    /// Two counters at zero.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            config: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            queue: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }
}

/// What a wait found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// It is time to stop.
    pub stop: bool,
    /// The device's configuration is to be looked at.
    pub config: bool,
}

/// A descriptor that can be read once SIGINT, SIGTERM or SIGHUP has come; they end the process no more.
pub fn stop_signals() -> io::Result<OwnedFd> {
    sys::stop_signals()
}

/// All that can end a sleep.
#[derive(Debug)]
pub struct Waiter {
    stop: OwnedFd,
    interrupts: Option<Interrupts>,
}

impl Waiter {
    /// `stop` can be read once it is time to stop. Without interrupts, every wait says that the configuration is to be looked at.
    #[must_use]
    pub fn new(stop: OwnedFd, interrupts: Option<Interrupts>) -> Self {
        Self { stop, interrupts }
    }

    /// Whether interrupts arrive.
    #[must_use]
    pub fn has_interrupts(&self) -> bool {
        self.interrupts.is_some()
    }

    /// Waits until there is an interrupt, something to read from one of `beside` (of which there are at most [`MAX_PAIRS`]), a reason to stop, or the time is over. Interrupts count once: what they announce is
    /// to be looked at after this.
    pub fn wait<'a>(
        &'a self,
        timeout: Duration,
        beside: impl IntoIterator<Item = BorrowedFd<'a>>,
    ) -> io::Result<Woken> {
        let fd = |event: &EventFd| {
            #[allow(unsafe_code)] // one block: the type does not lend its descriptor otherwise
            // SAFETY: the descriptor is open as long as `self` lives, which is longer than the wait.
            unsafe {
                BorrowedFd::borrow_raw(event.as_raw_fd())
            }
        };
        let interrupts = self.interrupts.as_ref();
        let mut fds = [None; 3 + MAX_PAIRS];
        let own = [
            Some(self.stop.as_fd()),
            interrupts.map(|interrupts| fd(&interrupts.config)),
            interrupts.map(|interrupts| fd(&interrupts.queue)),
        ];
        let all = own.into_iter().chain(beside.into_iter().map(Some));
        for (slot, fd) in fds.iter_mut().zip(all) {
            *slot = fd;
        }
        let [stop, config, queue, ..] = sys::poll(fds, Some(timeout))?;
        if let Some(interrupts) = interrupts {
            for (event, raised) in [(&interrupts.config, config), (&interrupts.queue, queue)] {
                if raised {
                    event.read()?;
                }
            }
        }
        Ok(Woken {
            stop,
            config: config || interrupts.is_none(),
        })
    }
}
