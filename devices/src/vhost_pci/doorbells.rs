//! The peer's eventfds and memory on their way to the transport and the window.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::backend::{Line, Machine};
use super::{FIRST_SPECIAL, Shared};
use crate::host::{Permission, SharedRegion, Window};
use crate::virtio::{Transport, event};

/// The index of the kick and the call of a queue (docs/device.md, section 6).
fn kick_and_call(queue: u16) -> u16 {
    FIRST_SPECIAL + 2 * queue
}

/// The index of the error eventfd of a queue.
fn error(queue: u16) -> u16 {
    kick_and_call(queue) + 1
}

/// What a peer can reach through the device.
pub(super) struct Plumbing {
    window: Arc<dyn Window>,
    shared: Arc<Shared>,
    queues: u16,
}

impl Plumbing {
    pub(super) fn new(window: Arc<dyn Window>, shared: Arc<Shared>, queues: u16) -> Self {
        Self {
            window,
            shared,
            queues,
        }
    }

    fn transport(&self) -> io::Result<Arc<dyn Transport>> {
        self.shared
            .transport
            .get()
            .and_then(Weak::upgrade)
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Takes everything away: first the memory, so that nothing that a doorbell or a kick starts can reach it.
    pub(super) fn clear(&mut self) {
        self.window.clear();
        let Ok(transport) = self.transport() else {
            return;
        };
        for queue in 0..self.queues {
            let index = kick_and_call(queue);
            // Taking something away fails for no index that there is.
            let _ = transport.set_kick(index, None);
            let _ = transport.set_doorbell(index, None);
            let _ = transport.set_doorbell(error(queue), None);
        }
    }
}

impl Machine for Plumbing {
    fn map(&mut self, offset: u64, region: &SharedRegion) -> io::Result<()> {
        self.window.map(offset, region, Permission::READ_WRITE)
    }

    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.window.unmap(offset, len)
    }

    fn connect(&mut self, what: Line, queue: u16, fd: Option<OwnedFd>) -> io::Result<()> {
        let transport = self.transport()?;
        let event = fd.map(|fd| Arc::new(event::from_owned(fd)));
        match what {
            Line::Kick => transport.set_kick(kick_and_call(queue), event),
            Line::Call => transport.set_doorbell(kick_and_call(queue), event),
            Line::Error => transport.set_doorbell(error(queue), event),
        }
    }
}
