//! The device thread's part: it meets front-ends, moves messages, and takes everything away again.
//!
//! Every event leads to the same [`Worker::run`], which looks at all there is and does a bounded amount of it. Nothing waits: where a
//! side is slow, the other side's messages stay where they are.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{Level, debug, log};
use thiserror::Error;
use vmm_sys_util::timerfd::TimerFd;

use super::backend::{self, Backend, Step};
use super::doorbells::Plumbing;
use super::misses::{self, Channel};
use super::queues::{self, ControlQueues, Sent};
use super::{BACKEND_UP, FRONTEND_UP, Shared, count};
use crate::host::Host;
use crate::vhost_user::{self, Connection, Message, RateLimit, Socket, requests};
use crate::virtio::{DeviceMemory, event};
use crate::virtio_iommu::Endpoint;

/// How many messages of each side one call handles before other devices on the thread have their turn.
const BUDGET: usize = 64;
/// How often an absent front-end is looked for.
const RETRY: Duration = Duration::from_millis(50);
/// How many messages may wait for the driver's buffers before no more are read where some of those that follow may be about translations: these
/// need no buffer, and the front-end's guest waits for them.
const READ_AHEAD: usize = 32;

// What an event is about.
const WAKE: u32 = 0;
const TIMER: u32 = 1;
const LISTENER: u32 = 2;
const RXQ: u32 = 3;
const TXQ: u32 = 4;
const PEER: u32 = 5;
const CHANNEL: u32 = 6;

/// Why a connection ends, other than by the guest's wish.
#[derive(Debug, Error)]
enum End {
    #[error("{0}")]
    Connection(#[from] vhost_user::Error),
    #[error("{0}")]
    Fault(#[from] backend::Fault),
    #[error("the driver: {0}")]
    Guest(#[from] queues::Fault),
}

/// A front-end and what is under way to the guest.
struct Peer {
    connection: Connection,
    backend: Backend,
    /// Where the front-end is asked for translations.
    channel: Option<Channel>,
    /// Read ahead: they have taken effect and wait for receive buffers.
    waiting: VecDeque<Vec<u8>>,
    /// The addresses whose translation came since the accesses that wait were looked at.
    updated: Vec<Range<u64>>,
}

impl Peer {
    /// Whether another message of the front-end may be read.
    fn may_read(&self) -> bool {
        let ahead = if self.backend.translates() {
            READ_AHEAD
        } else {
            1
        };
        self.waiting.len() < ahead && !self.connection.wants_write() && self.backend.accepts()
    }
}

/// What a peer or a guest can make the VMM write, as often as it likes.
struct Log {
    connected: RateLimit,
    gone: RateLimit,
    faults: RateLimit,
    refused: RateLimit,
}

impl Default for Log {
    fn default() -> Self {
        let limit = || RateLimit::new(Duration::from_secs(1));
        Self {
            connected: limit(),
            gone: limit(),
            faults: limit(),
            refused: limit(),
        }
    }
}

fn say(limit: &mut RateLimit, level: Level, socket: &Socket, text: fmt::Arguments) {
    if let Some(missed) = limit.allow(Instant::now()) {
        let more = if missed > 0 {
            format!(" ({missed} more lines like this)")
        } else {
            String::new()
        };
        log!(level, "vhost-pci {}: {text}{more}", socket.path().display());
    }
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    endpoint: Option<Arc<Endpoint>>,
    plumbing: Plumbing,
    window_size: u64,
    max_queues: u16,
    queues: Option<ControlQueues>,
    peer: Option<Peer>,
    /// The listener is left alone until the timer has run.
    pause: bool,
    /// What the event loop watches: descriptor, what it is, and for what.
    watched: Vec<(RawFd, u32, EventSet)>,
    /// Descriptors that the event loop has to forget before they close.
    retired: Vec<Box<dyn AsRawFd + Send>>,
    timer: TimerFd,
    log: Log,
    // Behind everything that might still use it: dropping it removes the socket file.
    socket: Socket,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Arc<dyn Host>,
        endpoint: Option<Arc<Endpoint>>,
        socket: Socket,
        plumbing: Plumbing,
        window_size: u64,
        max_queues: u16,
    ) -> io::Result<Self> {
        Ok(Self {
            plumbing,
            shared,
            host,
            endpoint,
            window_size,
            max_queues,
            queues: None,
            peer: None,
            pause: false,
            watched: Vec::new(),
            retired: Vec::new(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            log: Log::default(),
            socket,
        })
    }

    /// Puts another window in the place of the device's.
    #[cfg(test)]
    pub(super) fn spy(&mut self, window: Arc<dyn crate::host::Window>) {
        self.plumbing.window = window;
    }

    fn warn(&mut self, text: fmt::Arguments) {
        say(&mut self.log.faults, Level::Warn, &self.socket, text);
    }

    fn run(&mut self) {
        let (orders, wanted) = {
            let mut guest = self.shared.guest();
            (
                std::mem::take(&mut guest.orders),
                guest.status & BACKEND_UP != 0,
            )
        };
        if orders.reset {
            self.take_away();
            self.retire_queues();
            self.shared.guest().status = 0;
            if let Some(transport) = self.shared.transport() {
                transport.reset_done();
            }
        }
        if let Some(activation) = orders.activation {
            let memory = DeviceMemory::new(self.host.memory(), self.endpoint.as_deref());
            match ControlQueues::new(&activation, &memory) {
                Ok(queues) => self.queues = Some(queues),
                Err(fault) => self.guest_fault(&fault),
            }
        }
        if orders.close && self.peer.is_some() {
            debug!("vhost-pci: the driver closes the connection");
            self.disconnect();
        }
        if self
            .peer
            .as_ref()
            .is_some_and(|peer| event::hung_up(&peer.connection))
        {
            self.end(&End::Connection(vhost_user::Error::Closed));
        } else if wanted
            && !orders.reset
            && self.queues.is_some()
            && self.peer.is_none()
            && !self.pause
        {
            self.connect();
        }
        if let Err(end) = self.serve() {
            self.end(&end);
        }
        self.ask();
    }

    /// Sees to the accesses that wait for a translation, and to the channel on which front-ends are asked for it.
    fn ask(&mut self) {
        let shared = &self.shared;
        let mut fault = None;
        let mut open = false;
        let mut windows = 0;
        if let Some(peer) = &mut self.peer {
            windows = peer.backend.translations();
            let updated = std::mem::take(&mut peer.updated);
            if let Some(channel) = self.plumbing.take_channel() {
                shared.misses.set_open(false);
                let old = peer.channel.replace(channel);
                self.retired.extend(old.map(|old| Box::new(old) as _));
            }
            if let Some(channel) = &mut peer.channel {
                let result = channel.receive(&shared.misses, BUDGET).and_then(|()| {
                    if peer.backend.translates() {
                        channel.ask(&shared.misses, &peer.backend, &updated, &shared.counters)
                    } else {
                        Ok(())
                    }
                });
                if let Err(error) = result {
                    fault = Some(error);
                    let old = peer.channel.take();
                    self.retired.extend(old.map(|old| Box::new(old) as _));
                }
            }
            open = peer.channel.is_some() && peer.backend.translates();
        }
        shared
            .counters
            .windows
            .store(windows as u64, Ordering::Relaxed);
        shared.misses.set_open(open);
        if let Some(fault) = fault {
            self.channel_closed(&fault);
        }
    }

    fn channel_closed(&mut self, fault: &misses::Fault) {
        let text = format_args!("the channel for requests is closed: {fault}");
        match fault {
            misses::Fault::Connection(error) if error.is_disconnect() => {
                say(&mut self.log.gone, Level::Info, &self.socket, text);
            }
            _ => self.warn(text),
        }
    }

    fn connect(&mut self) {
        match self.socket.try_connect() {
            Ok(Some(connection)) => {
                count(&self.shared.counters.connections);
                let text = format_args!("front-end connected");
                say(&mut self.log.connected, Level::Info, &self.socket, text);
                let backend = Backend::new(self.window_size, self.max_queues, self.plumbing.logs);
                self.peer = Some(Peer {
                    connection,
                    backend,
                    channel: None,
                    waiting: VecDeque::new(),
                    updated: Vec::new(),
                });
                self.shared.guest().status |= FRONTEND_UP;
                self.config_changed();
            }
            Ok(None) if self.socket.listener().is_some() => {}
            Ok(None) => self.retry_later(),
            Err(error) => {
                self.warn(format_args!("{error}"));
                self.retry_later();
            }
        }
    }

    fn retry_later(&mut self) {
        self.pause = true;
        if let Err(error) = self.timer.reset(RETRY, None) {
            self.warn(format_args!("cannot set a timer: {error}"));
        }
    }

    /// Ends the connection with a log line that names the cause.
    fn end(&mut self, end: &End) {
        match end {
            End::Guest(fault) => return self.guest_fault(fault),
            End::Connection(error) if error.is_disconnect() => {
                let text = format_args!("front-end gone: {error}");
                say(&mut self.log.gone, Level::Info, &self.socket, text);
            }
            _ => {
                count(&self.shared.counters.peer_faults);
                self.warn(format_args!("connection closed: {end}"));
            }
        }
        self.disconnect();
    }

    fn guest_fault(&mut self, fault: &queues::Fault) {
        self.warn(format_args!("the driver has to reset the device: {fault}"));
        self.retire_queues();
        self.disconnect();
        if let Some(transport) = self.shared.transport() {
            transport.set_needs_reset();
        }
    }

    fn retire_queues(&mut self) {
        if let Some(queues) = self.queues.take() {
            for kick in queues.kicks() {
                self.retired.push(Box::new(kick.clone()));
            }
        }
    }

    /// The order of docs/device.md, section 3: nothing of the old connection can be reached when the driver learns of its end.
    fn disconnect(&mut self) {
        if self.take_away() {
            self.shared.guest().status &= !(BACKEND_UP | FRONTEND_UP);
            self.config_changed();
        }
    }

    /// Takes away everything that the front-end gave, and the connection. Returns whether there was one.
    fn take_away(&mut self) -> bool {
        let Some(peer) = self.peer.take() else {
            return false;
        };
        self.plumbing.clear();
        self.retired.push(Box::new(peer.connection));
        self.retired
            .extend(peer.channel.map(|channel| Box::new(channel) as _));
        true
    }

    fn config_changed(&self) {
        if let Some(transport) = self.shared.transport() {
            transport.config_changed();
        }
    }

    /// Moves messages as far as both sides let it.
    fn serve(&mut self) -> Result<(), End> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        let memory = &DeviceMemory::new(self.host.memory(), self.endpoint.as_deref());
        let counters = &self.shared.counters;
        let mut left = BUDGET;
        let Some(peer) = &mut self.peer else {
            // Nobody is there to have asked for anything.
            while left > 0 && queues.take(memory)?.is_some() {
                count(&counters.dropped);
                left -= 1;
            }
            if left == 0 {
                event::signal(&self.shared.wake);
            }
            return Ok(());
        };

        peer.connection.flush()?;
        while left > 0 && !peer.connection.wants_write() {
            let Some(sent) = queues.take(memory)? else {
                break;
            };
            left -= 1;
            let reply = match sent {
                Sent::Message(bytes) => peer.backend.driver(&bytes),
                Sent::TooLong => Err(backend::Dropped::Header),
            };
            match reply {
                Ok(message) => {
                    peer.connection.send(&message)?;
                    count(&counters.messages_to_peer);
                }
                Err(dropped) => {
                    debug!("vhost-pci: dropped a message of the driver: {dropped}");
                    count(&counters.dropped);
                }
            }
            answer(peer, counters)?;
        }
        if left == 0 {
            event::signal(&self.shared.wake);
        }

        for _ in 0..BUDGET {
            deliver(peer, queues, memory, counters)?;
            if !peer.may_read() {
                break;
            }
            let Some(message) = peer.connection.receive()? else {
                break;
            };
            match peer.backend.front_end(message, &mut self.plumbing)? {
                Step::Pass(message) => peer.waiting.push_back(bytes(&message)),
                Step::Done => {}
                Step::Refused(request, why) => {
                    // The front-end gets a number; what it means can only be said here.
                    let text = format_args!("refused {}: {why}", requests::name(request));
                    say(&mut self.log.refused, Level::Warn, &self.socket, text);
                }
                Step::Updated(range) => {
                    count(&counters.updates);
                    peer.updated.push(range);
                }
                Step::Invalidated => count(&counters.invalidates),
            }
            answer(peer, counters)?;
        }
        // The budget may have ended with a message in hand; the socket alone would not bring it back to mind.
        deliver(peer, queues, memory, counters)
    }

    /// What the event loop has to watch now.
    fn interests(&self) -> Vec<(RawFd, u32, EventSet)> {
        let mut list = vec![
            (self.shared.wake.as_raw_fd(), WAKE, EventSet::IN),
            (self.timer.as_raw_fd(), TIMER, EventSet::IN),
        ];
        let Some(queues) = &self.queues else {
            return list;
        };
        for (kick, what) in queues.kicks().into_iter().zip([RXQ, TXQ]) {
            list.push((kick.as_raw_fd(), what, EventSet::IN));
        }
        if let Some(peer) = &self.peer {
            let mut events = EventSet::empty();
            if peer.may_read() {
                events |= EventSet::IN;
            }
            if peer.connection.wants_write() {
                events |= EventSet::OUT;
            }
            list.push((peer.connection.as_raw_fd(), PEER, events));
            if let Some(channel) = &peer.channel {
                let mut events = EventSet::IN;
                if channel.wants_write() {
                    events |= EventSet::OUT;
                }
                list.push((channel.as_raw_fd(), CHANNEL, events));
            }
        } else if let Some(listener) = self.socket.listener()
            && !self.pause
            && self.shared.guest().status & BACKEND_UP != 0
        {
            list.push((listener, LISTENER, EventSet::IN));
        }
        list
    }

    fn watch(&mut self, ops: &mut EventOps) {
        let wanted = self.interests();
        let old = std::mem::take(&mut self.watched);
        let event =
            |&(fd, what, events): &(RawFd, u32, EventSet)| Events::with_data_raw(fd, what, events);
        let mut failed = None;
        for entry in &old {
            if !wanted
                .iter()
                .any(|(fd, what, _)| (*fd, *what) == (entry.0, entry.1))
            {
                failed = ops.remove(event(entry)).err().or(failed);
            }
        }
        for entry in &wanted {
            let result = match old
                .iter()
                .find(|(fd, what, _)| (*fd, *what) == (entry.0, entry.1))
            {
                Some(same) if same.2 == entry.2 => Ok(()),
                Some(_) => ops.modify(event(entry)),
                None => ops.add(event(entry)),
            };
            failed = result.err().or(failed);
        }
        self.watched = wanted;
        self.retired.clear();
        if let Some(error) = failed {
            self.warn(format_args!("event loop: {error}"));
        }
    }
}

/// Sends the device's own answers whose turn it is; at most as many as may be outstanding.
fn answer(peer: &mut Peer, counters: &super::Counters) -> Result<(), End> {
    while let Some(message) = peer.backend.answer() {
        peer.connection.send(&message)?;
        count(&counters.messages_to_peer);
    }
    Ok(())
}

/// Gives the driver the messages that wait, as far as it has buffers for them.
fn deliver(
    peer: &mut Peer,
    queues: &mut ControlQueues,
    memory: &DeviceMemory,
    counters: &super::Counters,
) -> Result<(), End> {
    while let Some(bytes) = peer.waiting.front() {
        if !queues.deliver(memory, bytes)? {
            break;
        }
        peer.waiting.pop_front();
        count(&counters.messages_to_guest);
    }
    Ok(())
}

/// A message as it lies in a buffer.
fn bytes(message: &Message) -> Vec<u8> {
    [&message.header()[..], &message.payload].concat()
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => event::clear(&self.shared.wake),
            TIMER => {
                self.pause = false;
                // Setting the timer also makes it unreadable; reading it could block.
                if let Err(error) = self.timer.clear() {
                    self.warn(format_args!("cannot clear a timer: {error}"));
                }
            }
            what @ (RXQ | TXQ) => {
                if let Some(queues) = &self.queues {
                    let [rx, tx] = queues.kicks();
                    event::clear(if what == RXQ { rx } else { tx });
                }
            }
            _ => {}
        }
        self.run();
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.run();
        self.watch(ops);
    }
}
