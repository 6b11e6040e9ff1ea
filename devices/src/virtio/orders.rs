//! What vCPU threads leave for the thread of a device whose queues cannot be reset one by one.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Transport, event};

/// What the driver wants.
#[derive(Default)]
pub(crate) struct Order {
    /// Stop everything; what was activated before is void. [`Transport::reset_done`] is to be called when that is done.
    pub(crate) reset: bool,
    /// Start with this, after the reset where there is one.
    pub(crate) activation: Option<Activation>,
}

/// Both ends: [`VirtioDevice`](super::VirtioDevice)'s calls go in, the device thread takes them out.
pub(crate) struct Orders {
    order: Mutex<Order>,
    wake: EventFd,
    transport: OnceLock<Weak<dyn Transport>>,
}

impl Orders {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            order: Mutex::default(),
            wake: event::new()?,
            transport: OnceLock::new(),
        })
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device has one transport for life: a second call does not come.
    pub(crate) fn bind(&self, transport: Weak<dyn Transport>) {
        let _ = self.transport.set(transport);
    }

    pub(crate) fn transport(&self) -> Option<Arc<dyn Transport>> {
        self.transport.get().and_then(Weak::upgrade)
    }

    pub(crate) fn activate(&self, activation: Activation) {
        self.order().activation = Some(activation);
        self.signal();
    }

    pub(crate) fn reset(&self) {
        *self.order() = Order {
            reset: true,
            activation: None,
        };
        self.signal();
    }

    /// Wakes the device thread.
    pub(crate) fn signal(&self) {
        event::signal(&self.wake);
    }

    /// What wakes it.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// What there is to do, which is then somebody's.
    pub(crate) fn take(&self) -> Order {
        std::mem::take(&mut *self.order())
    }
}
