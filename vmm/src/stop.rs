//! How a VM ends: the first reason wins, and everybody hears of it.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::sys::{context, lock};
use crate::{Error, Outcome};

pub(crate) struct Stop {
    event: EventFd,
    requested: AtomicBool,
    first: Mutex<Option<Result<Outcome, Error>>>,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| context("eventfd", e))?;
        Ok(Stop {
            event,
            requested: AtomicBool::new(false),
            first: Mutex::new(None),
        })
    }

    /// Ends the VM for this reason, unless it is ending already.
    pub(crate) fn end(&self, result: Result<Outcome, Error>) {
        lock(&self.first).get_or_insert(result);
        self.requested.store(true, Ordering::Release);
        // It can only fail where the counter is full, and then the event is set.
        let _ = self.event.write(1);
    }

    /// Whether the VM is ending.
    pub(crate) fn requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// Readable from the moment the VM is ending.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// The reason, once.
    pub(crate) fn take(&self) -> Option<Result<Outcome, Error>> {
        lock(&self.first).take()
    }
}
