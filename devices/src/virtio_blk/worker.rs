//! The device thread's part: requests off the queue, and their answers.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{error, warn};
use thiserror::Error;

use super::disk::{Disk, Done, Job, Work};
use super::request::{Limits, Request, Status};
use super::{
    F_EVENT_IDX, F_FLUSH, ID_LENGTH, MAX_BYTES, MAX_DATA, MAX_REQUESTS, QUEUE_SIZE, Shared,
};
use crate::host::Host;
use crate::vhost_user::RateLimit;
use crate::virtio::{Activation, Chain, ControlRing, DeviceMemory, RingFault, event};
use crate::virtio_iommu::Endpoint;

/// How many requests one call takes, and how many it answers, before other devices on the thread have their turn.
const BUDGET: usize = 16;

// What an event is about.
const WAKE: u32 = 0;
const QUEUE: u32 = 1;
const DONE: u32 = 2;

/// A fault of the guest that only a reset mends.
#[derive(Debug, Error)]
enum Fault {
    #[error(transparent)]
    Ring(#[from] RingFault),
    #[error("a request has no place for its status")]
    NoStatus,
}

/// A chain, cut into its parts.
struct Open {
    chain: Chain,
    /// Bytes in front of the status.
    room: usize,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    endpoint: Option<Arc<Endpoint>>,
    disk: Disk,
    pub(super) limits: Limits,
    ring: Option<ControlRing>,
    /// Requests that the disk is at work on, by their tags. A reset forgets them.
    open: BTreeMap<u64, Open>,
    /// The next tag.
    tag: u64,
    /// Jobs that the disk has, those that were forgotten included, and their data.
    jobs: usize,
    bytes: usize,
    limit: RateLimit,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Arc<dyn Host>,
        endpoint: Option<Arc<Endpoint>>,
        disk: Disk,
        limits: Limits,
    ) -> Self {
        Self {
            shared,
            host,
            endpoint,
            disk,
            limits,
            ring: None,
            open: BTreeMap::new(),
            tag: 0,
            jobs: 0,
            bytes: 0,
            limit: RateLimit::new(Duration::from_secs(1)),
        }
    }

    fn watch(&self, fd: &impl AsRawFd, what: u32, ops: &mut EventOps) {
        let events = Events::with_data_raw(fd.as_raw_fd(), what, EventSet::IN);
        if let Err(error) = ops.add(events) {
            self.error(format_args!("cannot watch a descriptor: {error}"));
        }
    }

    fn error(&self, text: fmt::Arguments) {
        error!("disk {}: {text}", self.shared.name);
    }

    // ---- what the driver does to the device ----

    fn orders(&mut self, ops: &mut EventOps) -> Result<(), Fault> {
        let order = self.shared.orders.take();
        if order.reset {
            self.stop(ops);
            if let Some(transport) = self.shared.orders.transport() {
                transport.reset_done();
            }
        }
        match order.activation {
            Some(activation) => self.activate(&activation, ops),
            None => Ok(()),
        }
    }

    fn activate(&mut self, activation: &Activation, ops: &mut EventOps) -> Result<(), Fault> {
        let host = Arc::clone(&self.host);
        let memory = DeviceMemory::new(host.memory(), self.endpoint.as_deref());
        let features = activation.features;
        let event_idx = features & F_EVENT_IDX != 0;
        let ring = ControlRing::new(
            "requestq",
            activation.queues.first(),
            QUEUE_SIZE,
            event_idx,
            &memory,
        )?;
        self.watch(ring.kick(), QUEUE, ops);
        self.ring = Some(ring);
        self.limits.durably = features & F_FLUSH == 0;
        Ok(())
    }

    /// Forgets the ring and the requests in it; what the disk is at work on is done all the same, and before what comes next.
    fn stop(&mut self, ops: &mut EventOps) {
        self.open.clear();
        if let Some(ring) = self.ring.take()
            && let Err(error) = ops.remove(Events::empty(ring.kick()))
        {
            self.error(format_args!("cannot forget a descriptor: {error}"));
        }
    }

    fn broken(&mut self, fault: &Fault, ops: &mut EventOps) {
        if self.limit.allow(Instant::now()).is_some() {
            let name = &self.shared.name;
            warn!("disk {name}: the driver has to reset the device: {fault}");
        }
        self.stop(ops);
        if let Some(transport) = self.shared.orders.transport() {
            transport.set_needs_reset();
        }
    }

    // ---- requests ----

    /// A bounded amount of what there is to do.
    fn serve(&mut self) -> Result<(), Fault> {
        let host = Arc::clone(&self.host);
        let endpoint = self.endpoint.clone();
        let memory = DeviceMemory::new(host.memory(), endpoint.as_deref());
        // Data has a view of its own: where it is refused, that is the request's matter and not the ring's.
        let data = DeviceMemory::new(host.memory(), endpoint.as_deref());
        let mut used = self.finish(&memory, &data)?;
        used |= self.take(&memory, &data)?;
        if let (true, Some(ring)) = (used, &mut self.ring) {
            ring.tell(&memory)?;
            memory.check("requestq")?;
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.jobs < MAX_REQUESTS && self.bytes + MAX_DATA <= MAX_BYTES
    }

    /// Takes requests; returns whether one was answered at once.
    fn take(&mut self, memory: &DeviceMemory, data: &DeviceMemory) -> Result<bool, Fault> {
        let mut used = false;
        // Where there is no room, the next job that is done brings this back.
        for _ in 0..BUDGET {
            if !self.has_room() {
                return Ok(used);
            }
            let Some(ring) = &mut self.ring else {
                return Ok(used);
            };
            let chain = match ring.take(memory)? {
                Some(chain) => chain,
                None if ring.listen(memory)? => continue,
                None => {
                    memory.check("requestq")?;
                    return Ok(used);
                }
            };
            memory.check("requestq")?;
            let room = chain.writable().checked_sub(1).ok_or(Fault::NoStatus)?;
            if chain.is_endless() {
                return Err(Fault::NoStatus);
            }
            let open = Open { chain, room };
            match Request::parse(&open.chain, room, data, self.limits) {
                Request::Disk(work, offset, bytes) => self.submit(open, work, offset, bytes),
                Request::Id => {
                    let id = self.id();
                    self.answer(&open, &id, Status::Ok, memory, data)?;
                    used = true;
                }
                Request::Fails(status) => {
                    self.answer(&open, &[], status, memory, data)?;
                    used = true;
                }
            }
        }
        if let Some(ring) = &self.ring {
            // Not all in one turn.
            event::signal(ring.kick());
        }
        Ok(used)
    }

    fn submit(&mut self, open: Open, work: Work, offset: u64, data: Vec<u8>) {
        let tag = self.tag;
        self.tag = self.tag.wrapping_add(1);
        self.jobs += 1;
        self.bytes += data.len();
        self.open.insert(tag, open);
        self.disk.submit(Job {
            tag,
            work,
            offset,
            data,
        });
    }

    /// The disk's name, as much as there is room for.
    fn id(&self) -> [u8; ID_LENGTH] {
        let mut id = [0; ID_LENGTH];
        for (to, from) in id.iter_mut().zip(self.shared.name.bytes()) {
            *to = from;
        }
        id
    }

    /// Answers requests that the disk is done with; returns whether there were any.
    fn finish(&mut self, memory: &DeviceMemory, data: &DeviceMemory) -> Result<bool, Fault> {
        let mut used = false;
        for _ in 0..BUDGET {
            let Some(Done { job, result }) = self.disk.done() else {
                return Ok(used);
            };
            self.jobs -= 1;
            self.bytes -= job.data.len();
            let Some(open) = self.open.remove(&job.tag) else {
                continue;
            };
            if let Err(error) = &result
                && self.limit.allow(Instant::now()).is_some()
            {
                self.error(format_args!(
                    "{:?} at byte {}: {error}",
                    job.work, job.offset
                ));
            }
            let status = result.map_or(Status::IoErr, |()| Status::Ok);
            let bytes = if job.work == Work::Read {
                &job.data[..]
            } else {
                &[]
            };
            let status = self.answer(&open, bytes, status, memory, data)?;
            if status == Status::Ok {
                let counters = &self.shared.counters;
                count(match job.work {
                    Work::Read => &counters.reads,
                    Work::Write { .. } => &counters.writes,
                    Work::Flush => &counters.flushes,
                });
            }
            used = true;
        }
        event::signal(self.disk.ready());
        Ok(used)
    }

    /// Writes data and status of a request, and gives its chain back. Returns the status, which is another where the data could not be written.
    fn answer(
        &mut self,
        open: &Open,
        bytes: &[u8],
        status: Status,
        memory: &DeviceMemory,
        data: &DeviceMemory,
    ) -> Result<Status, Fault> {
        let delivered = open.chain.write(data, 0, bytes);
        let status = if delivered { status } else { Status::IoErr };
        if status != Status::Ok {
            count(&self.shared.counters.errors);
        }
        if !open.chain.write(data, open.room, &[status as u8]) {
            return Err(Fault::NoStatus);
        }
        let written = if delivered { bytes.len() + 1 } else { 1 };
        if let Some(ring) = &mut self.ring {
            // At most what a request has room for.
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            ring.put(memory, open.chain.head(), written)?;
            memory.check("requestq")?;
        }
        Ok(status)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch(self.shared.orders.wake(), WAKE, ops);
        self.watch(self.disk.ready(), DONE, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match (events.data(), &self.ring) {
            (WAKE, _) => event::clear(self.shared.orders.wake()),
            (DONE, _) => event::clear(self.disk.ready()),
            (_, Some(ring)) => event::clear(ring.kick()),
            (_, None) => {}
        }
        let result = self.orders(ops).and_then(|()| self.serve());
        if let Err(fault) = result {
            self.broken(&fault, ops);
        }
    }
}
