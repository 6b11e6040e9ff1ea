//! The device thread's part: requests, their completion, and faults.
//!
//! Every event leads to the same [`Worker::run`], which does a bounded amount of what there is to do.
//!
//! A request takes effect when it is taken off the queue, and is completed when all who had been handed the address space have followed:
//! so the revocations of many requests overlap, and each is a fact when its request completes. Completions keep the order of requests.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{error, warn};
use vm_memory::GuestMemoryMmap;

use super::domains::{Domains, Ticket};
use super::endpoint::{self, Endpoint};
use super::queues;
use super::wire::{self, Kind, Request, Status};
use super::{F_BYPASS_CONFIG, F_EVENT_IDX, F_MAP_UNMAP, QUEUE_SIZE, Shared, count};
use crate::host::Host;
use crate::vhost_user::RateLimit;
use crate::virtio::{Activation, Chain, ControlRing, RingFault, event};

/// How many requests, and how many fault reports, one call handles before other devices on the thread have their turn.
const BUDGET: usize = 256;
/// With so many changes that an endpoint's follower has not carried out, no further request is taken: a request can make as many
/// changes as there are mappings.
const MAX_OUTSTANDING: u64 = 1024;

// What an event is about; from `ENDPOINT` on, an endpoint's attention.
const WAKE: u32 = 0;
const REQUESTQ: u32 = 1;
const EVENTQ: u32 = 2;
const ENDPOINT: u32 = 3;

/// A request that has taken effect, and has not been completed.
struct Pending {
    head: u16,
    written: u32,
    tickets: Vec<Ticket>,
    kind: Option<Kind>,
    /// When it was taken off the queue.
    taken: Instant,
    /// When it had taken effect here; from then on it waits for followers only.
    handled: Instant,
}

struct Live {
    requests: ControlRing,
    events: ControlRing,
    features: u64,
    pending: VecDeque<Pending>,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    domains: Domains,
    live: Option<Live>,
    /// The transport waits for `reset_done`, and that for these.
    resetting: Option<Vec<Ticket>>,
    /// Changes that no request asked for: the next request waits for them.
    loose: Vec<Ticket>,
    /// Waits for a buffer, with the endpoint's index.
    fault: Option<(usize, endpoint::Fault)>,
    /// The endpoint whose turn it is to report a fault.
    turn: usize,
    /// How many endpoints are watched.
    watched: usize,
    limit: RateLimit,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, host: Arc<dyn Host>, domains: Domains) -> Self {
        Self {
            shared,
            host,
            domains,
            live: None,
            resetting: None,
            loose: Vec::new(),
            fault: None,
            turn: 0,
            watched: 0,
            limit: RateLimit::new(Duration::from_secs(1)),
        }
    }

    pub(super) fn add(&mut self, id: u32, endpoint: Arc<Endpoint>) {
        self.domains.add(id, endpoint);
    }

    fn watch(fd: &impl AsRawFd, what: u32, ops: &mut EventOps) {
        let events = Events::with_data_raw(fd.as_raw_fd(), what, EventSet::IN);
        if let Err(error) = ops.add(events) {
            error!("virtio-iommu: cannot watch a descriptor: {error}");
        }
    }

    fn watch_endpoints(&mut self, ops: &mut EventOps) {
        for index in self.watched..self.domains.len() {
            let what = u32::try_from(index)
                .ok()
                .and_then(|i| i.checked_add(ENDPOINT));
            if let (Some(endpoint), Some(what)) = (self.domains.endpoint(index), what) {
                Self::watch(endpoint.attention(), what, ops);
            }
        }
        self.watched = self.domains.len();
    }

    fn run(&mut self, ops: &mut EventOps) {
        self.watch_endpoints(ops);
        let orders = self.shared.orders.take();
        if orders.reset {
            self.reset(ops);
        }
        if let Some(activation) = orders.activation {
            self.activate(&activation, ops);
        }
        self.follow_bypass();
        if self
            .resetting
            .take_if(|tickets| self.domains.is_done(tickets))
            .is_some()
            && let Some(transport) = self.shared.orders.transport()
        {
            transport.reset_done();
        }
        if let Err(fault) = self.serve() {
            self.broken(&fault, ops);
        }
        let mapped = u64::try_from(self.domains.mapped()).unwrap_or(u64::MAX);
        let counters = &self.shared.counters;
        counters.mappings.store(mapped, Ordering::Relaxed);
    }

    // ---- what the driver does to the device ----

    fn reset(&mut self, ops: &mut EventOps) {
        self.stop(ops);
        let mut tickets = std::mem::take(&mut self.loose);
        self.domains.reset(&mut tickets);
        // The next driver is not told what the last one's devices did.
        let lost = &self.shared.counters.faults_lost;
        if self.fault.take().is_some() {
            count(lost);
        }
        for endpoint in self.domains.endpoints() {
            while let Some((_, before)) = endpoint.take_fault() {
                lost.fetch_add(before + 1, Ordering::Relaxed);
            }
        }
        self.resetting = Some(tickets);
    }

    fn activate(&mut self, activation: &Activation, ops: &mut EventOps) {
        match Live::new(activation, self.host.memory()) {
            Ok(live) => {
                Self::watch(live.requests.kick(), REQUESTQ, ops);
                Self::watch(live.events.kick(), EVENTQ, ops);
                self.live = Some(live);
            }
            Err(fault) => self.broken(&fault, ops),
        }
    }

    /// Forgets the rings and what is in them; what requests have done stays.
    fn stop(&mut self, ops: &mut EventOps) {
        let Some(live) = self.live.take() else {
            return;
        };
        for kick in [live.requests.kick(), live.events.kick()] {
            if let Err(error) = ops.remove(Events::empty(kick)) {
                error!("virtio-iommu: cannot forget a descriptor: {error}");
            }
        }
    }

    fn broken(&mut self, fault: &RingFault, ops: &mut EventOps) {
        self.warn(format_args!("the driver has to reset the device: {fault}"));
        self.stop(ops);
        if let Some(transport) = self.shared.orders.transport() {
            transport.set_needs_reset();
        }
    }

    fn warn(&mut self, text: fmt::Arguments) {
        if self.limit.allow(Instant::now()).is_some() {
            warn!("virtio-iommu: {text}");
        }
    }

    /// The `bypass` field as the driver left it takes effect.
    fn follow_bypass(&mut self) {
        let bypass = self.shared.bypass.load(Ordering::Acquire);
        self.domains.set_bypass(bypass, &mut self.loose);
    }

    // ---- the queues ----

    fn serve(&mut self) -> Result<(), RingFault> {
        self.take_requests()?;
        self.complete()?;
        self.report_faults()
    }

    fn overtaxed(&self) -> bool {
        let mut endpoints = self.domains.endpoints();
        endpoints.any(|endpoint| endpoint.outstanding() > MAX_OUTSTANDING)
    }

    fn take_requests(&mut self) -> Result<(), RingFault> {
        let host = Arc::clone(&self.host);
        let memory = host.memory();
        let taken = Instant::now();
        let mut left = BUDGET;
        loop {
            if self.overtaxed() {
                // Each change that is carried out brings this back.
                break;
            }
            let Some(live) = &mut self.live else {
                return Ok(());
            };
            let Some(chain) = live.requests.take(memory)? else {
                if live.requests.listen(memory)? {
                    continue;
                }
                break;
            };
            let (features, head) = (live.features, chain.head());
            // What the driver wrote before it made this request available holds for it.
            self.follow_bypass();
            let mut tickets = std::mem::take(&mut self.loose);
            let (kind, written) = self.handle(&chain, features, memory, &mut tickets);
            if let Some(live) = &mut self.live {
                live.pending.push_back(Pending {
                    head,
                    written,
                    tickets,
                    kind,
                    taken,
                    handled: taken,
                });
            }
            left -= 1;
            if left == 0 {
                if let Some(live) = &self.live {
                    event::signal(live.requests.kick());
                }
                break;
            }
        }
        let new = BUDGET - left;
        if new > 0
            && let Some(live) = &mut self.live
        {
            let handled = Instant::now();
            for pending in live.pending.iter_mut().rev().take(new) {
                pending.handled = handled;
            }
        }
        Ok(())
    }

    /// Carries out a request and writes its answer; returns what it was, and how much was written.
    fn handle(
        &mut self,
        chain: &Chain,
        features: u64,
        memory: &GuestMemoryMmap,
        tickets: &mut Vec<Ticket>,
    ) -> (Option<Kind>, u32) {
        let Some(room) = queues::answer_room(chain, memory) else {
            count(&self.shared.counters.malformed);
            return (None, 0);
        };
        let bytes = queues::request(chain, memory);
        let kind = bytes.as_deref().and_then(Kind::of);
        let status = match (&bytes, kind) {
            (None, _) => Status::IoErr,
            (Some(_), None) => Status::Invalid,
            (Some(bytes), Some(kind)) => {
                count(self.shared.counters.requests(kind));
                self.carry_out(kind, bytes, features, room, tickets)
            }
        };
        if status != Status::Ok {
            count(&self.shared.counters.errors);
        }
        // The tail is what comes last; what comes before it are properties, where there are any.
        let mut answer = vec![0; room];
        if (kind, status) == (Some(Kind::Probe), Status::Ok) {
            let properties = wire::properties();
            for (to, from) in answer.iter_mut().zip(properties) {
                *to = from;
            }
        }
        if let Some(tail) = answer.get_mut(room - wire::TAIL) {
            *tail = status as u8;
        }
        (kind, queues::write(chain, &answer, memory))
    }

    fn carry_out(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        features: u64,
        room: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Status {
        if matches!(kind, Kind::Map | Kind::Unmap) && features & F_MAP_UNMAP == 0 {
            return Status::Unsupported;
        }
        match Request::parse(kind, bytes) {
            // The flag is as unknown as any where its feature was not accepted.
            Ok(Request::Attach { bypass: true, .. }) if features & F_BYPASS_CONFIG == 0 => {
                Status::Invalid
            }
            Ok(Request::Probe { .. }) if room < wire::PROBE_SIZE + wire::TAIL => Status::Invalid,
            Ok(request) => self.domains.handle(&request, tickets),
            Err(status) => status,
        }
    }

    /// Completes what has been followed, in order, with one interrupt for all.
    fn complete(&mut self) -> Result<(), RingFault> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        let memory = self.host.memory();
        let counters = &self.shared.counters;
        let mut now = None;
        while let Some(pending) = live.pending.front()
            && self.domains.is_done(&pending.tickets)
        {
            let now = *now.get_or_insert_with(Instant::now);
            live.requests.put(memory, pending.head, pending.written)?;
            if let Some(timer) = pending.kind.and_then(|kind| counters.timer(kind)) {
                timer.add(now - pending.taken, now - pending.handled);
            }
            live.pending.pop_front();
        }
        if now.is_some() {
            live.requests.tell(memory)?;
        }
        Ok(())
    }

    /// The next fault to report, of one endpoint after the other.
    fn next_fault(&mut self) -> Option<(usize, endpoint::Fault)> {
        if self.fault.is_some() {
            return self.fault.take();
        }
        let len = self.domains.len();
        for step in 0..len {
            let index = (self.turn + step) % len;
            let endpoint = self.domains.endpoint(index)?;
            if let Some((fault, lost)) = endpoint.take_fault() {
                let counters = &self.shared.counters;
                counters.faults_lost.fetch_add(lost, Ordering::Relaxed);
                self.turn = index + 1;
                return Some((index, fault));
            }
        }
        None
    }

    /// Puts faults where the driver has left room for them.
    fn report_faults(&mut self) -> Result<(), RingFault> {
        let host = Arc::clone(&self.host);
        let memory = host.memory();
        let (mut left, mut used) = (BUDGET, false);
        while left > 0
            && self.live.is_some()
            && let Some(fault) = self.next_fault()
        {
            self.fault = Some(fault);
            let Some(live) = &mut self.live else { break };
            let Some(chain) = live.events.take(memory)? else {
                if live.events.listen(memory)? {
                    continue;
                }
                break;
            };
            let (index, fault) = fault;
            let report = match self.domains.identity(index) {
                Some((id, attached)) => wire::fault(id, attached, fault.iova, fault.access),
                None => break,
            };
            // One that is too small goes back empty, and the next is tried.
            let written = queues::write(&chain, &report, memory);
            live.events.put(memory, chain.head(), written)?;
            let counters = &self.shared.counters;
            if written > 0 {
                self.fault = None;
                count(&counters.faults_reported);
            } else {
                count(&counters.malformed);
            }
            (left, used) = (left - 1, true);
        }
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        if left == 0 {
            event::signal(live.events.kick());
        }
        if used {
            live.events.tell(memory)?;
        }
        Ok(())
    }
}

impl Live {
    fn new(activation: &Activation, memory: &GuestMemoryMmap) -> Result<Self, RingFault> {
        let features = activation.features;
        let ring = |name, index: usize| {
            let event_idx = features & F_EVENT_IDX != 0;
            let setup = activation.queues.get(index);
            ControlRing::new(name, setup, QUEUE_SIZE, event_idx, memory)
        };
        Ok(Self {
            requests: ring("requestq", 0)?,
            events: ring("eventq", 1)?,
            features,
            pending: VecDeque::new(),
        })
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        Self::watch(self.shared.orders.wake(), WAKE, ops);
        self.run(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match (events.data(), &self.live) {
            (WAKE, _) => event::clear(self.shared.orders.wake()),
            (REQUESTQ, Some(live)) => event::clear(live.requests.kick()),
            (EVENTQ, Some(live)) => event::clear(live.events.kick()),
            (what, _) => {
                let index = what.checked_sub(ENDPOINT).map(usize::try_from);
                let endpoint = index.and_then(|i| self.domains.endpoint(i.ok()?));
                endpoint.inspect(|endpoint| event::clear(endpoint.attention()));
            }
        }
        self.run(ops);
    }
}
