//! The device thread's part: finding a back-end, starting and stopping the rings, and starting over.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{Level, debug, error, info, log, warn};
use virtqueue::rss;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use super::control::Control;
use super::iotlb::{Follower, Watched};
use super::names::Names;
use super::rings::{self, RingError, Space};
use super::{F_CTRL_VQ, F_MQ, F_RSS, OWN_FEATURES_MQ, QueueOrder, Shared};
use crate::host::Host;
use crate::vhost_user::frontend::{self, Event, Frontend, Offer, PACKED_BASE, Vring};
use crate::vhost_user::{Connection, InflightArea, RateLimit, Socket};
use crate::virtio::{Activation, F_RING_PACKED, F_VERSION_1, QueueSetup, event};

/// How often a back-end that is not there is looked for.
const RECONNECT: Duration = Duration::from_millis(100);
/// How long a back-end may take to stop, or to stop the next of several vrings that the driver resets. There is no such bound on a
/// handshake: a connection can wait long in the backlog of a back-end that is not up yet, and nobody waits for it but the one who
/// started it.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(1);
/// The same where it is still taking up the rings that it was given before: a process that shares its processor with one that polls may need seconds to map memory.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(10);
/// How often something that a peer or a guest can bring about may be logged.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// What an event of the device thread is about.
const WAKE: u32 = 0;
const LISTENER: u32 = 1;
const PEER: u32 = 2;
const RECONNECT_TIMER: u32 = 3;
const DEADLINE_TIMER: u32 = 4;
const CHANGED: u32 = 5;
pub(super) const CHANNEL: u32 = 6;
const IOTLB_TIMER: u32 = 7;
pub(super) const CONTROL: u32 = 8;

/// One queue as the driver wants it.
pub(super) struct Queue {
    setup: QueueSetup,
    /// A back-end has had this ring: the next one goes on where it stopped.
    served: bool,
}

/// What the driver asked for.
pub(super) struct Active {
    pub(super) features: u64,
    queues: Vec<Queue>,
    /// How many of the queues are a back-end's: those before them.
    vrings: u16,
    /// How many pairs of these are in use.
    pub(super) pairs: u16,
    /// How received frames are steered, where the driver has said so.
    pub(super) rss: Option<Box<rss::Config>>,
    /// What the last back-end left for the next; while one is at work, its [`Frontend`] knows better.
    inflight: Option<InflightArea>,
}

impl Active {
    /// What a driver of a device with so many pairs has set up. One pair is in use at first (section 5.1.5).
    fn new(activation: Activation, pairs: u16) -> Self {
        let Activation { features, queues } = activation;
        let queues = queues.into_iter().map(|setup| Queue {
            setup,
            served: false,
        });
        Self {
            features,
            queues: queues.collect(),
            vrings: if features & (F_MQ | F_RSS) != 0 {
                2 * pairs
            } else {
                2
            },
            pairs: 1,
            rss: None,
            inflight: None,
        }
    }

    /// The index of the control queue: behind those that the features give a meaning (section 5.1.2).
    pub(super) fn control(&self) -> Option<u16> {
        (self.features & F_CTRL_VQ != 0).then_some(self.vrings)
    }

    /// Whether a vring is of a pair in use.
    pub(super) fn in_use(&self, vring: u8) -> bool {
        u16::from(vring) < 2 * self.pairs
    }

    pub(super) fn packed(&self) -> bool {
        self.features & F_RING_PACKED != 0
    }

    /// The enabled queues that are a back-end's, with their vring indices.
    pub(super) fn enabled(&mut self) -> impl Iterator<Item = (u8, &mut Queue)> {
        let queues = self.queues.iter_mut().take(self.vrings.into());
        let queues = (0u8..).zip(queues);
        queues.filter(|(_, queue)| queue.setup.enabled)
    }
}

pub(super) struct Peer {
    pub(super) frontend: Frontend,
    /// What the event manager watches its socket for.
    interest: EventSet,
    /// Where it asks.
    pub(super) channel: Option<Watched>,
}

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) host: Arc<dyn Host>,
    socket: Socket,
    queue_size: u16,
    reconnect: TimerFd,
    deadline: TimerFd,
    pub(super) peer: Option<Peer>,
    /// Where the device is behind an IOMMU.
    pub(super) follower: Option<Follower>,
    /// The rings are to be started when the back-end has been told of all translations.
    pub(super) start_waits: bool,
    pub(super) active: Option<Active>,
    pub(super) control: Option<Control>,
    /// How many answers the back-end owes to changes of the pairs in use; a command waits for the last.
    pub(super) enabling: usize,
    /// The device needs a reset: nothing is started before.
    broken: bool,
    /// The transport waits for `reset_done`, and that for the back-end.
    pub(super) resetting: bool,
    /// The vrings of the queues for which the transport waits for `queue_reset_done`, and that for the back-end.
    queue_resets: Vec<u8>,
    limit: RateLimit,
    lacking: RateLimit,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Arc<dyn Host>,
        socket: Socket,
        follower: Option<Follower>,
        queue_size: u16,
    ) -> Result<Self, errno::Error> {
        Ok(Self {
            shared,
            host,
            socket,
            queue_size,
            reconnect: TimerFd::new()?,
            deadline: TimerFd::new()?,
            peer: None,
            follower,
            start_waits: false,
            active: None,
            control: None,
            enabling: 0,
            broken: false,
            resetting: false,
            queue_resets: Vec::new(),
            limit: RateLimit::new(LOG_INTERVAL),
            lacking: RateLimit::new(LOG_INTERVAL),
        })
    }

    pub(super) fn path(&self) -> std::path::Display<'_> {
        self.socket.path().display()
    }

    pub(super) fn may_log(&mut self) -> bool {
        self.limit.allow(Instant::now()).is_some()
    }

    // ---- finding a back-end ----

    /// Looks for a back-end; where there is none, arranges to look again.
    fn connect(&mut self, ops: &mut EventOps) {
        match self.socket.try_connect() {
            Ok(Some(connection)) => self.connected(connection, ops),
            Ok(None) => {
                if self.socket.listener().is_none() {
                    self.retry_later();
                }
            }
            Err(error) => {
                if self.may_log() {
                    error!("{error}");
                }
                // A listener stays readable while the host cannot accept: watching it would turn the thread in circles.
                self.watch_listener(EventSet::empty(), ops);
                self.retry_later();
            }
        }
    }

    fn retry_later(&mut self) {
        if let Err(error) = self.reconnect.reset(RECONNECT, None) {
            error!("{}: cannot arm a timer: {error}", self.path());
        }
    }

    fn watch_listener(&self, interest: EventSet, ops: &mut EventOps) {
        if let Some(fd) = self.socket.listener()
            && let Err(error) = ops.modify(Events::with_data_raw(fd, LISTENER, interest))
        {
            error!("{}: cannot watch the socket: {error}", self.path());
        }
    }

    fn connected(&mut self, connection: Connection, ops: &mut EventOps) {
        let frontend = match Frontend::new(connection) {
            Ok(frontend) => frontend,
            Err(error) => return self.lost(&error, ops),
        };
        let interest = EventSet::IN;
        if let Err(error) = ops.add(Events::with_data_raw(frontend.as_raw_fd(), PEER, interest)) {
            error!("{}: cannot watch the connection: {error}", self.path());
            return self.retry_later();
        }
        debug!("{}: connected to a back-end", self.path());
        self.peer = Some(Peer {
            frontend,
            interest,
            channel: None,
        });
    }

    /// Somebody waits at the listener.
    fn accept(&mut self, ops: &mut EventOps) {
        // The end of the old connection may be in the same batch of events, behind the new one.
        self.drive(ops);
        if self.peer.is_none() {
            return self.connect(ops);
        }
        match self.socket.try_connect() {
            Ok(Some(_)) => {
                if self.may_log() {
                    warn!(
                        "{}: a second back-end was turned away: one is connected",
                        self.path()
                    );
                }
            }
            Ok(None) => {}
            Err(error) => {
                if self.may_log() {
                    error!("{error}");
                }
                self.watch_listener(EventSet::empty(), ops);
                self.retry_later();
            }
        }
    }

    /// The connection is of no more use: drops it and everything that hangs on it.
    pub(super) fn lost(&mut self, error: &frontend::Error, ops: &mut EventOps) {
        self.count_refusal(error);
        // A peer that ends is no fault: of two VMs one ends first.
        let (level, what) = if error.is_disconnect() {
            (Level::Info, "is gone")
        } else {
            (Level::Warn, "was cut off")
        };
        self.drop_peer(level, format_args!("{what}: {error}"), ops);
    }

    /// Drops the connection, with one line that says why and what comes of it.
    pub(super) fn drop_peer(&mut self, level: Level, why: fmt::Arguments, ops: &mut EventOps) {
        let stranded = self.strand(ops);
        if self.may_log() {
            let then = if stranded {
                "where it stood in the packed rings is not known, the driver has to reset the device"
            } else {
                "waiting for another"
            };
            log!(level, "{}: the back-end {why}; {then}", self.path());
        }
        self.disconnect(ops);
        if stranded && let Some(transport) = self.shared.transport() {
            transport.set_needs_reset();
        }
    }

    /// Gives up packed rings that no other back-end could go on with; returns whether there are any. One goes on where the last one has left word of what
    /// was in flight, and a ring that the driver has not put anything into can be started anew.
    fn strand(&mut self, ops: &mut EventOps) -> bool {
        let frontend = self.peer.as_mut().map(|peer| &mut peer.frontend);
        let started = frontend.filter(|frontend| frontend.is_started());
        let (Some(frontend), Some(active)) = (started, &mut self.active) else {
            return false;
        };
        active.inflight = frontend.take_inflight();
        active.packed() && active.inflight.is_none() && self.forfeit(ops)
    }

    /// Gives up rings of which nobody knows where they stand; returns whether there are any.
    fn forfeit(&mut self, ops: &mut EventOps) -> bool {
        let memory = self.host.memory();
        let space = space(&*self.host, self.follower.as_ref());
        let Some(active) = &mut self.active else {
            return false;
        };
        let stranded = active
            .enabled()
            .any(|(_, queue)| !rings::is_blank(&queue.setup, space, memory));
        if stranded {
            self.close_control(ops);
            self.active = None;
            self.broken = true;
        }
        stranded
    }

    fn disconnect(&mut self, ops: &mut EventOps) {
        self.close_channel(ops);
        if let Some(peer) = self.peer.take() {
            // Before the descriptor closes: the event manager must not know numbers that may mean something else by then.
            if let Err(error) = ops.remove(Events::empty(&peer.frontend)) {
                error!("{}: cannot forget the connection: {error}", self.path());
            }
        }
        self.start_waits = false;
        if let Some(follower) = &mut self.follower {
            follower.unfollow();
        }
        self.update_link();
        for index in std::mem::take(&mut self.queue_resets) {
            self.queue_reset_done(index);
        }
        // Nobody is left who could use a pair.
        self.enabling = 0;
        self.answer_control(true, ops);
        if self.resetting {
            self.finish_reset();
        }
        if self.socket.listener().is_none() {
            self.retry_later();
        }
    }

    // ---- talking to it ----

    /// Does what the connection has to offer.
    pub(super) fn drive(&mut self, ops: &mut EventOps) {
        while let Some(peer) = &mut self.peer {
            match peer.frontend.process() {
                Ok(Some(Event::Ready(offer))) => self.handshake_done(offer, ops),
                Ok(Some(Event::Started)) => {
                    debug!("{}: the rings are started", self.path());
                    if !self.resetting {
                        self.rearm_deadline(ops);
                    }
                }
                Ok(Some(Event::Stopped(bases))) => {
                    debug!("{}: the rings stopped at {bases:?}", self.path());
                    self.finish_reset();
                    self.try_start(ops);
                }
                Ok(Some(Event::VringStopped(index, base))) => {
                    debug!("{}: vring {index} stopped at {base:#x}", self.path());
                    self.vring_stopped(index, ops);
                }
                Ok(Some(Event::Enabled)) => self.pairs_changed(ops),
                Ok(Some(Event::Iotlb(done))) => self.changes_done(&done),
                Ok(None) => break,
                Err(error) => return self.lost(&error, ops),
            }
        }
        self.carry_on(ops);
    }

    fn handshake_done(&mut self, offer: Offer, ops: &mut EventOps) {
        debug!("{}: the back-end offers {:#x}", self.path(), offer.features);
        let features = self.backend_features(offer);
        if self.shared.pairs > 1 && features & F_MQ == 0 && self.may_log() {
            let (path, pairs, has) = (self.path(), self.shared.pairs, offer.queues);
            let mq = if offer.features & F_MQ == 0 {
                " without VIRTIO_NET_F_MQ"
            } else {
                ""
            };
            warn!(
                "{path}: {pairs} queue pairs were asked for and the back-end serves {has}{mq}: there is one"
            );
        }
        let offered = self.shared.offered(features);
        self.shared.features.store(offered, Ordering::Release);
        self.try_start(ops);
        self.update_link();
        if let Err(error) = self.shared.ready.write(1) {
            error!("{}: cannot signal readiness: {error}", self.path());
        }
    }

    /// What a back-end offers: several pairs only where it serves all that were asked for, and RSS with those where it knows SET_RSS (which the specification
    /// does not, so that the feature bit by itself promises nothing).
    fn backend_features(&self, offer: Offer) -> u64 {
        let several = offer.queues >= self.shared.pairs.into() && offer.features & F_MQ != 0;
        match (several, offer.rss) {
            (true, true) => offer.features | F_RSS,
            (true, false) => offer.features & !F_RSS,
            (false, _) => offer.features & !(F_MQ | F_RSS),
        }
    }

    /// What the driver uses, or would have to use, and the back-end does not offer.
    fn missing(&self, offer: Offer) -> u64 {
        let accepted = self.active.as_ref().map_or(0, |active| active.features);
        let needed = (accepted & !OWN_FEATURES_MQ) | F_VERSION_1 | self.shared.required;
        needed & !self.backend_features(offer)
    }

    /// The link is up while there is a back-end that serves the driver, or could.
    fn update_link(&self) {
        let offer = self.peer.as_ref().and_then(|peer| peer.frontend.offer());
        let up = !self.broken && offer.is_some_and(|offer| self.missing(offer) == 0);
        if self.shared.link_up.swap(up, Ordering::AcqRel) != up
            && let Some(transport) = self.shared.transport()
        {
            transport.config_changed();
        }
    }

    /// Starts the rings where the driver wants it and the back-end can. Behind an IOMMU the back-end is told of the translations first;
    /// where it cannot take them all at once, this is called again.
    pub(super) fn try_start(&mut self, ops: &mut EventOps) {
        self.start_waits = false;
        let Some(peer) = &self.peer else { return };
        let Some(offer) = peer.frontend.offer() else {
            return;
        };
        if peer.frontend.is_started() || self.resetting {
            return;
        }
        let missing = self.missing(offer);
        if missing != 0 {
            // By a limit of its own: the line about the end of the last back-end has just been written.
            if self.lacking.allow(Instant::now()).is_some() {
                let (path, names) = (self.path(), Names(missing));
                warn!(
                    "{path}: the back-end lacks {names}, which the driver uses: the link stays down"
                );
            }
            return;
        }
        let keeps = peer.frontend.keeps_inflight();
        let lost = |active: &Active| active.packed() && active.inflight.is_some() && !keeps;
        if self.active.as_ref().is_some_and(lost) && self.forfeit(ops) {
            if self.may_log() {
                let path = self.path();
                warn!(
                    "{path}: the back-end cannot go on where the last one stood in the packed rings (INFLIGHT_SHMFD): the driver has to reset the device"
                );
            }
            return self.ask_for_reset();
        }
        let Some(active) = &mut self.active else {
            return;
        };
        let packed = active.packed();
        let space = space(&*self.host, self.follower.as_ref());
        let vrings = active
            .enabled()
            .map(|(index, queue)| vring(index, queue, packed, space, self.host.memory()))
            .collect::<Result<Vec<_>, _>>();
        let mut vrings = match vrings {
            Ok(vrings) => vrings,
            Err(error) => return self.refuse(error, ops),
        };
        for vring in &mut vrings {
            vring.enabled = active.in_use(vring.index);
        }
        let features = active.features;
        if self.follower.is_some() && !self.tell_translations(features, ops) {
            return;
        }
        let Some(active) = &mut self.active else {
            return;
        };
        let again = active.enabled().filter(|(_, queue)| queue.served);
        let again: Vec<_> = again.map(|(_, queue)| queue.setup.clone()).collect();
        for (_, queue) in active.enabled() {
            queue.served = true;
        }
        let inflight = active.inflight.clone().filter(|_| keeps);
        let Some(peer) = &mut self.peer else { return };
        if let Some(inflight) = inflight {
            peer.frontend.resume(inflight);
        }
        let result = peer.frontend.steer(active.rss.as_deref()).and_then(|()| {
            let memory = self.host.memory_regions();
            peer.frontend.start(features, memory, &vrings)
        });
        if let Err(error) = result {
            return self.lost(&error, ops);
        }
        for queue in again {
            // The last back-end may have taken a kick and died, or used buffers and died before its call.
            event::signal(&queue.kick);
            event::signal(&queue.call);
        }
    }

    // ---- what the driver wants ----

    /// Does what vCPU threads have left in the mailbox.
    fn commands(&mut self, ops: &mut EventOps) {
        let mail = std::mem::take(&mut *self.shared.mailbox());
        if mail.reset {
            self.reset(ops);
        }
        if let Some(activation) = mail.activation {
            self.activate(activation, ops);
        }
        for order in mail.queues {
            match order {
                QueueOrder::Reset(index) => self.reset_queue(index, ops),
                QueueOrder::Enable(index, queue) => self.enable_queue(index, queue, ops),
            }
        }
    }

    fn activate(&mut self, activation: Activation, ops: &mut EventOps) {
        let mut active = Active::new(activation, self.shared.pairs);
        let packed = active.packed();
        for (_, queue) in active.enabled() {
            if let Err(error) = self.check(&queue.setup, packed) {
                return self.refuse(error, ops);
            }
        }
        let control = active.control();
        let control = control.and_then(|index| active.queues.get(usize::from(index)));
        let control = control.map(|queue| queue.setup.clone());
        self.active = Some(active);
        if let Some(setup) = control.filter(|setup| setup.enabled) {
            self.open_control(&setup, ops);
        }
        self.try_start(ops);
        self.update_link();
    }

    /// What the driver's addresses mean.
    pub(super) fn space(&self) -> Space<'_> {
        space(&*self.host, self.follower.as_ref())
    }

    pub(super) fn check(&self, queue: &QueueSetup, packed: bool) -> Result<(), RingError> {
        rings::check(queue, packed, self.queue_size, self.space())
    }

    /// The driver resets one queue.
    fn reset_queue(&mut self, index: u16, ops: &mut EventOps) {
        let Ok(index) = u8::try_from(index) else {
            return;
        };
        if self.is_control(index.into()) {
            self.close_control(ops);
        }
        let queue = self
            .active
            .as_mut()
            .and_then(|active| active.queues.get_mut(usize::from(index)));
        if let Some(queue) = queue {
            queue.setup.enabled = false;
            queue.served = false;
        }
        let running = self.peer.as_mut().filter(|p| p.frontend.has_vring(index));
        let Some(peer) = running else {
            self.spoil_inflight(ops);
            return self.queue_reset_done(index);
        };
        let result = peer.frontend.stop_vring(index);
        self.queue_resets.push(index);
        if let Err(error) = result {
            return self.lost(&error, ops);
        }
        if self.arm_deadline(ops) {
            self.drive(ops);
        }
    }

    /// A queue was reset: what the last back-end left is about all of them, and right no more. While one is at work that is its front-end's matter.
    fn spoil_inflight(&mut self, ops: &mut EventOps) {
        let started = self.peer.as_ref().is_some_and(|p| p.frontend.is_started());
        let Some(active) = self.active.as_mut().filter(|_| !started) else {
            return;
        };
        let had = active.inflight.take().is_some();
        if had && active.packed() && self.forfeit(ops) {
            self.ask_for_reset();
        }
    }

    /// The back-end has stopped a vring; where it was not asked any more, a device reset came in between.
    fn vring_stopped(&mut self, index: u8, ops: &mut EventOps) {
        let Some(at) = self.queue_resets.iter().position(|&i| i == index) else {
            return;
        };
        self.queue_resets.swap_remove(at);
        self.queue_reset_done(index);
        self.rearm_deadline(ops);
    }

    fn queue_reset_done(&self, index: u8) {
        if let Some(transport) = self.shared.transport() {
            transport.queue_reset_done(index.into());
        }
    }

    /// The driver enables one queue while the others are at work.
    fn enable_queue(&mut self, index: u16, setup: QueueSetup, ops: &mut EventOps) {
        // Where there is none, the device needs a reset already.
        let Some(active) = &self.active else { return };
        let packed = active.packed();
        if let Err(error) = self.check(&setup, packed) {
            return self.refuse(error, ops);
        }
        if self.is_control(index) {
            self.open_control(&setup, ops);
        }
        let queues = self.active.as_mut().map(|active| &mut active.queues);
        let (Some(queue), Ok(index)) = (
            queues.and_then(|queues| queues.get_mut(usize::from(index))),
            u8::try_from(index),
        ) else {
            return;
        };
        *queue = Queue {
            setup,
            served: false,
        };
        // Where the others have not been started, this one comes with them.
        let running = self.peer.as_mut().filter(|p| p.frontend.is_started());
        let (Some(peer), Some(active)) = (running, &mut self.active) else {
            return;
        };
        let enabled = active.in_use(index);
        let space = space(&*self.host, self.follower.as_ref());
        let Some((_, queue)) = active.enabled().find(|(i, _)| *i == index) else {
            return;
        };
        let mut vring = match vring(index, queue, packed, space, self.host.memory()) {
            Ok(vring) => vring,
            Err(error) => return self.refuse(error, ops),
        };
        vring.enabled = enabled;
        queue.served = true;
        if let Err(error) = peer.frontend.start_vring(&vring) {
            self.lost(&error, ops);
        }
    }

    /// The guest's driver has set up what cannot be.
    pub(super) fn refuse(&mut self, error: RingError, ops: &mut EventOps) {
        if self.may_log() {
            warn!("{}: the driver set up {error}", self.path());
        }
        if let (RingError::Unmapped { iova, access }, Some(follower)) = (error, &self.follower) {
            follower.endpoint.report(iova, access);
        }
        self.give_up(ops);
    }

    /// Nothing goes on before the driver has reset the device.
    pub(super) fn give_up(&mut self, ops: &mut EventOps) {
        self.close_control(ops);
        self.active = None;
        self.broken = true;
        self.start_waits = false;
        self.ask_for_reset();
    }

    /// Nothing works before the driver has reset the device.
    fn ask_for_reset(&self) {
        self.update_link();
        if let Some(transport) = self.shared.transport() {
            transport.set_needs_reset();
        }
    }

    fn reset(&mut self, ops: &mut EventOps) {
        self.close_control(ops);
        self.active = None;
        self.broken = false;
        self.start_waits = false;
        self.queue_resets.clear();
        if self.resetting {
            return;
        }
        self.resetting = true;
        match &mut self.peer {
            Some(peer) if peer.frontend.is_started() => {
                if let Err(error) = peer.frontend.stop() {
                    return self.lost(&error, ops);
                }
            }
            _ => return self.finish_reset(),
        }
        if self.arm_deadline(ops) {
            self.drive(ops);
        }
    }

    /// Gives the back-end time to stop; returns whether there still is one.
    pub(super) fn arm_deadline(&mut self, ops: &mut EventOps) -> bool {
        let starting = |peer: &Peer| peer.frontend.is_starting();
        let time = match self.peer.as_ref().is_some_and(starting) {
            true => START_DEADLINE,
            false => STOP_DEADLINE,
        };
        let result = self.deadline.reset(time, None);
        if let Err(error) = &result {
            let why = format_args!("was cut off: cannot arm a timer: {error}");
            self.drop_peer(Level::Error, why, ops);
        }
        result.is_ok()
    }

    /// As [`Worker::arm_deadline`], where the back-end still owes something; otherwise it has all the time that there is.
    pub(super) fn rearm_deadline(&mut self, ops: &mut EventOps) {
        if self.queue_resets.is_empty() && self.enabling == 0 {
            let _ = self.deadline.clear();
        } else {
            self.arm_deadline(ops);
        }
    }

    fn finish_reset(&mut self) {
        self.resetting = false;
        // Disarming a timer cannot fail, and one that fires all the same finds nothing to do.
        let _ = self.deadline.clear();
        self.update_link();
        if let Some(transport) = self.shared.transport() {
            transport.reset_done();
        }
    }

    fn deadline_passed(&mut self, ops: &mut EventOps) {
        // Setting the timer anew is what makes it unreadable; there is nothing to read from it.
        let _ = self.deadline.clear();
        self.drive(ops);
        if self.resetting || !self.queue_resets.is_empty() || self.enabling > 0 {
            let why = format_args!(
                "was cut off: it did not stop, enable or disable a vring within {STOP_DEADLINE:?}, or {START_DEADLINE:?} at its start"
            );
            self.drop_peer(Level::Warn, why, ops);
        }
    }

    /// Lets the event manager watch for what the connection wants.
    fn watch_peer(&mut self, ops: &mut EventOps) {
        self.watch_channel(ops);
        let Some(peer) = &mut self.peer else { return };
        let interest = if peer.frontend.wants_write() {
            EventSet::IN | EventSet::OUT
        } else {
            EventSet::IN
        };
        if interest == peer.interest {
            return;
        }
        peer.interest = interest;
        let fd = peer.frontend.as_raw_fd();
        if let Err(error) = ops.modify(Events::with_data_raw(fd, PEER, interest)) {
            let why = format_args!("was cut off: cannot watch the connection: {error}");
            self.drop_peer(Level::Error, why, ops);
        }
    }
}

/// What the driver's addresses mean.
fn space<'a>(host: &'a dyn Host, follower: Option<&'a Follower>) -> Space<'a> {
    Space {
        regions: host.memory_regions(),
        endpoint: follower.map(|follower| &*follower.endpoint),
    }
}

/// A queue as a back-end gets it.
fn vring(
    index: u8,
    queue: &Queue,
    packed: bool,
    space: Space,
    memory: &GuestMemoryMmap,
) -> Result<Vring, RingError> {
    let setup = &queue.setup;
    let base = match (packed, queue.served) {
        (true, _) => PACKED_BASE,
        (false, true) => rings::used_index(setup, space, memory)?.into(),
        (false, false) => 0,
    };
    Ok(Vring {
        index,
        size: setup.size,
        desc: setup.desc,
        driver: setup.driver,
        device: setup.device,
        base,
        kick: setup.kick.clone(),
        call: setup.call.clone(),
        enabled: true,
    })
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        let sources: [(RawFd, u32); 3] = [
            (self.shared.wake.as_raw_fd(), WAKE),
            (self.reconnect.as_raw_fd(), RECONNECT_TIMER),
            (self.deadline.as_raw_fd(), DEADLINE_TIMER),
        ];
        let listener = self.socket.listener().map(|fd| (fd, LISTENER));
        let follower = self.follower.as_ref().map(Follower::sources);
        let follower = follower.into_iter().flatten();
        let follower = follower.zip([CHANGED, IOTLB_TIMER]);
        for (fd, what) in sources.into_iter().chain(listener).chain(follower) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, what, EventSet::IN)) {
                error!("{}: cannot watch a descriptor: {error}", self.path());
            }
        }
        self.connect(ops);
        if self.peer.is_none() {
            info!("waiting for a back-end at {}", self.path());
        }
        self.watch_peer(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                // Non-blocking and ours alone; the count does not matter.
                let _ = self.shared.wake.read();
                self.commands(ops);
            }
            LISTENER => self.accept(ops),
            PEER => self.drive(ops),
            RECONNECT_TIMER => {
                let _ = self.reconnect.clear();
                self.watch_listener(EventSet::IN, ops);
                if self.peer.is_none() {
                    self.connect(ops);
                }
            }
            DEADLINE_TIMER => self.deadline_passed(ops),
            CHANGED => self.changed(ops),
            CHANNEL => self.serve_channel(events.event_set(), ops),
            IOTLB_TIMER => self.iotlb_deadline_passed(ops),
            CONTROL => self.serve_control(ops),
            _ => {}
        }
        self.watch_peer(ops);
    }
}
