//! The device thread's part: finding a back-end, starting and stopping the rings, and starting over.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, error, info, warn};
use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use super::rings::{self, RingError};
use super::{OWN_FEATURES, Shared, offered};
use crate::host::Host;
use crate::vhost_user::frontend::{self, Event, Frontend, Offer, Vring};
use crate::vhost_user::{Connection, RateLimit, Socket};
use crate::virtio::{Activation, F_VERSION_1, event};

/// How often a back-end that is not there is looked for.
const RECONNECT: Duration = Duration::from_millis(100);
/// How long a back-end may take to stop. There is no such bound on a handshake: a connection can wait long in the
/// backlog of a back-end that is not up yet, and nobody waits for it but the one who started it.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(1);
/// How often something that a peer or a guest can bring about may be logged.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// What an event of the device thread is about.
const WAKE: u32 = 0;
const LISTENER: u32 = 1;
const PEER: u32 = 2;
const RECONNECT_TIMER: u32 = 3;
const DEADLINE_TIMER: u32 = 4;

/// What the driver asked for.
struct Active {
    activation: Activation,
    /// A back-end has had these rings: the next one goes on where it stopped.
    served: bool,
}

struct Peer {
    frontend: Frontend,
    /// What the event manager watches its socket for.
    interest: EventSet,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    socket: Socket,
    queue_size: u16,
    reconnect: TimerFd,
    deadline: TimerFd,
    peer: Option<Peer>,
    active: Option<Active>,
    /// The transport waits for `reset_done`, and that for the back-end.
    resetting: bool,
    limit: RateLimit,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Arc<dyn Host>,
        socket: Socket,
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
            active: None,
            resetting: false,
            limit: RateLimit::new(LOG_INTERVAL),
        })
    }

    fn path(&self) -> std::path::Display<'_> {
        self.socket.path().display()
    }

    fn may_log(&mut self) -> bool {
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
        self.peer = Some(Peer { frontend, interest });
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
    fn lost(&mut self, error: &frontend::Error, ops: &mut EventOps) {
        if self.may_log() {
            let what = if error.is_disconnect() {
                "the back-end is gone"
            } else {
                "the back-end was cut off"
            };
            warn!("{}: {what}: {error}; waiting for another", self.path());
        }
        self.disconnect(ops);
    }

    fn disconnect(&mut self, ops: &mut EventOps) {
        if let Some(peer) = self.peer.take() {
            // Before the descriptor closes: the event manager must not know numbers that may mean something else by then.
            if let Err(error) = ops.remove(Events::empty(&peer.frontend)) {
                error!("{}: cannot forget the connection: {error}", self.path());
            }
        }
        self.update_link();
        if self.resetting {
            self.finish_reset();
        }
        if self.socket.listener().is_none() {
            self.retry_later();
        }
    }

    // ---- talking to it ----

    /// Does what the connection has to offer.
    fn drive(&mut self, ops: &mut EventOps) {
        while let Some(peer) = &mut self.peer {
            match peer.frontend.process() {
                Ok(Some(Event::Ready(offer))) => self.handshake_done(offer, ops),
                Ok(Some(Event::Started)) => debug!("{}: the rings are started", self.path()),
                Ok(Some(Event::Stopped(bases))) => {
                    debug!("{}: the rings stopped at {bases:?}", self.path());
                    self.finish_reset();
                    self.try_start(ops);
                }
                Ok(None) => return,
                Err(error) => return self.lost(&error, ops),
            }
        }
    }

    fn handshake_done(&mut self, offer: Offer, ops: &mut EventOps) {
        debug!("{}: the back-end offers {:#x}", self.path(), offer.features);
        self.shared
            .features
            .store(offered(offer.features), Ordering::Release);
        self.try_start(ops);
        self.update_link();
        if let Err(error) = self.shared.ready.write(1) {
            error!("{}: cannot signal readiness: {error}", self.path());
        }
    }

    /// What the driver uses, or would have to use, and the back-end does not offer.
    fn missing(&self, offer: Offer) -> u64 {
        let accepted = self.active.as_ref().map_or(0, |a| a.activation.features);
        ((accepted & !OWN_FEATURES) | F_VERSION_1) & !offer.features
    }

    /// The link is up while there is a back-end that serves the driver, or could.
    fn update_link(&self) {
        let offer = self.peer.as_ref().and_then(|peer| peer.frontend.offer());
        let up = offer.is_some_and(|offer| self.missing(offer) == 0);
        if self.shared.link_up.swap(up, Ordering::AcqRel) != up
            && let Some(transport) = self.shared.transport()
        {
            transport.config_changed();
        }
    }

    /// Starts the rings where the driver wants it and the back-end can.
    fn try_start(&mut self, ops: &mut EventOps) {
        let Some(peer) = &self.peer else { return };
        let Some(offer) = peer.frontend.offer() else {
            return;
        };
        if peer.frontend.is_started() || self.resetting {
            return;
        }
        let missing = self.missing(offer);
        if missing != 0 {
            if self.may_log() {
                let path = self.path();
                warn!("{path}: the back-end lacks features {missing:#x}: the link stays down");
            }
            return;
        }
        let Some(active) = &self.active else { return };
        let vrings = match self.vrings(active) {
            Ok(vrings) => vrings,
            Err(error) => return self.refuse(error),
        };
        let features = active.activation.features;
        let (Some(peer), Some(active)) = (&mut self.peer, &mut self.active) else {
            return;
        };
        let result = peer
            .frontend
            .start(features, self.host.memory_regions(), &vrings);
        let again = std::mem::replace(&mut active.served, true);
        if let Err(error) = result {
            return self.lost(&error, ops);
        }
        if again {
            // The last back-end may have taken a kick and died, or used buffers and died before its call.
            for vring in &vrings {
                event::signal(&vring.kick);
                event::signal(&vring.call);
            }
        }
    }

    /// The enabled queues as vrings.
    fn vrings(&self, active: &Active) -> Result<Vec<Vring>, RingError> {
        (0u8..)
            .zip(&active.activation.queues)
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, queue)| {
                let base = if active.served {
                    rings::used_index(queue, self.host.memory())?
                } else {
                    0
                };
                Ok(Vring {
                    index,
                    size: queue.size,
                    desc: queue.desc,
                    driver: queue.driver,
                    device: queue.device,
                    base,
                    kick: queue.kick.clone(),
                    call: queue.call.clone(),
                })
            })
            .collect()
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
    }

    fn activate(&mut self, activation: Activation, ops: &mut EventOps) {
        let memory = self.host.memory_regions();
        let enabled = activation.queues.iter().filter(|queue| queue.enabled);
        for queue in enabled {
            if let Err(error) = rings::check(queue, self.queue_size, memory) {
                return self.refuse(error);
            }
        }
        self.active = Some(Active {
            activation,
            served: false,
        });
        self.try_start(ops);
        self.update_link();
    }

    /// The guest's driver has set up what cannot be.
    fn refuse(&mut self, error: RingError) {
        if self.may_log() {
            warn!("{}: the driver set up {error}", self.path());
        }
        self.active = None;
        if let Some(transport) = self.shared.transport() {
            transport.set_needs_reset();
        }
    }

    fn reset(&mut self, ops: &mut EventOps) {
        self.active = None;
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
        if let Err(error) = self.deadline.reset(STOP_DEADLINE, None) {
            error!("{}: cannot arm a timer: {error}", self.path());
            return self.disconnect(ops);
        }
        self.drive(ops);
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
        if self.resetting {
            if self.may_log() {
                warn!(
                    "{}: the back-end was cut off: it did not stop within {STOP_DEADLINE:?}",
                    self.path()
                );
            }
            self.disconnect(ops);
        }
    }

    /// Lets the event manager watch for what the connection wants.
    fn watch_peer(&mut self, ops: &mut EventOps) {
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
            error!("{}: cannot watch the connection: {error}", self.path());
            self.disconnect(ops);
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        let sources: [(RawFd, u32); 3] = [
            (self.shared.wake.as_raw_fd(), WAKE),
            (self.reconnect.as_raw_fd(), RECONNECT_TIMER),
            (self.deadline.as_raw_fd(), DEADLINE_TIMER),
        ];
        let listener = self.socket.listener().map(|fd| (fd, LISTENER));
        for (fd, what) in sources.into_iter().chain(listener) {
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
            _ => {}
        }
        self.watch_peer(ops);
    }
}
