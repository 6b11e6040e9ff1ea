//! The peer's eventfds and memory on their way to the transport and the window.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::backend::{Line, Machine};
use super::misses::Channel;
use super::{FIRST_SPECIAL, Shared, count};
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
    channel: Option<Channel>,
}

impl Plumbing {
    pub(super) fn new(window: Arc<dyn Window>, shared: Arc<Shared>, queues: u16) -> Self {
        Self {
            window,
            shared,
            queues,
            channel: None,
        }
    }

    /// The channel that came since the last call.
    pub(super) fn take_channel(&mut self) -> Option<Channel> {
        self.channel.take()
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
        self.channel = None;
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
    fn map(
        &mut self,
        offset: u64,
        region: &SharedRegion,
        permission: Permission,
    ) -> io::Result<()> {
        let since = Instant::now();
        let result = self.window.map(offset, region, permission);
        let counters = &self.shared.counters;
        took(since, &counters.maps, &counters.map_ns);
        result
    }

    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let since = Instant::now();
        let result = self.window.unmap(offset, len);
        let counters = &self.shared.counters;
        took(since, &counters.unmaps, &counters.unmap_ns);
        result
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
    fn set_channel(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.channel = Some(Channel::new(socket)?);
        Ok(())
    }
}

/// One more of these, and how long it took.
fn took(since: Instant, calls: &AtomicU64, nanoseconds: &AtomicU64) {
    count(calls);
    let ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
    nanoseconds.fetch_add(ns, Ordering::Relaxed);
}
