//! The peer's eventfds and memory on their way to the transport and the window.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::backend::{Line, Machine};
use super::misses::Channel;
use super::records::Records;
use super::{FIRST_SPECIAL, Shared};
use crate::host::{Permission, SharedRegion, Window};
use crate::vhost_user::{Inflight, Log};
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
    pub(super) window: Arc<dyn Window>,
    records: Records,
    /// [`VhostPciConfig::log`](super::VhostPciConfig::log).
    pub(super) logs: bool,
    shared: Arc<Shared>,
    queues: u16,
    channel: Option<Channel>,
}

impl Plumbing {
    pub(super) fn new(
        window: Arc<dyn Window>,
        records: Records,
        logs: bool,
        shared: Arc<Shared>,
        queues: u16,
    ) -> Self {
        Self {
            window,
            records,
            logs,
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
        self.records.turn();
        self.window.clear();
        // What is no whole pages is refused, and these are.
        let _ = self.records.take_log();
        let _ = self.records.take_inflight();
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
        counters.map.add(since.elapsed());
        result
    }

    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let since = Instant::now();
        let result = self.window.unmap(offset, len);
        let counters = &self.shared.counters;
        counters.unmap.add(since.elapsed());
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

    fn set_log(&mut self, file: OwnedFd, log: Log) -> io::Result<()> {
        self.records.set_log(&Arc::new(File::from(file)), log)
    }

    fn new_inflight(&mut self, wanted: Inflight) -> io::Result<Option<(Inflight, OwnedFd)>> {
        let made = self.records.new_inflight(wanted)?;
        Ok(made.map(|(area, file)| (area, file.into())))
    }

    fn set_inflight(&mut self, file: OwnedFd, area: Inflight) -> io::Result<()> {
        self.records.set_inflight(&Arc::new(File::from(file)), area)
    }
}
