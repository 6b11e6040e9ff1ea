//! Behind an IOMMU: the back-end is told of every change of the device's translations, and asks for those that it lacks.
//!
//! Changes wait in the [`Endpoint`] until the back-end has room for them ([`Frontend::has_iotlb_room`]), so that a guest which maps faster than
//! a back-end acknowledges, or comes with thousands of mappings when one connects, costs no memory here.
//!
//! [`Frontend::has_iotlb_room`]: crate::vhost_user::frontend::Frontend::has_iotlb_room

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use log::{Level, error, warn};
use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use super::rings::Space;
use super::worker::{CHANNEL, Worker};
use crate::host::Access;
use crate::vhost_user::channel::{self, Ask, Channel};
use crate::vhost_user::frontend::{self, IotlbDone, MAX_IOTLB_OWED, Violation};
use crate::vhost_user::{Iotlb, RateLimit, requests};
use crate::virtio::event;
use crate::virtio_iommu::{Change, Endpoint, Mapping};

/// How many requests of the back-end are served before everything else has its turn.
const MAX_ASKED: usize = 64;
/// How often what a back-end asks for may be logged.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time that a timer is set to: zero would disarm it.
const TICK: Duration = Duration::from_millis(1);

/// What has happened between a device and its back-ends on behalf of the IOMMU, since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Translations sent, those included that answer a miss or a new back-end's needs.
    pub updates: u64,
    /// Invalidations sent.
    pub invalidates: u64,
    /// How many of both were answered. (Without REPLY_ACK: invalidations only.)
    pub answered: u64,
    /// From sending to the answer, nanoseconds added up over those: the wire and the back-end.
    pub answered_ns: u64,
    /// How many a back-end refused, and was cut off.
    pub refused: u64,
    /// How often a back-end was cut off because it did not answer in time.
    pub timeouts: u64,
    /// Translations that back-ends asked for.
    pub misses: u64,
    /// Those of them that there were none for, or not for that access.
    pub misses_refused: u64,
    /// Accesses that back-ends reported as refused.
    pub access_fails: u64,
}

/// [`Stats`] as they grow.
#[derive(Default)]
pub(super) struct Counters {
    updates: AtomicU64,
    invalidates: AtomicU64,
    answered: AtomicU64,
    answered_ns: AtomicU64,
    refused: AtomicU64,
    timeouts: AtomicU64,
    misses: AtomicU64,
    misses_refused: AtomicU64,
    access_fails: AtomicU64,
}

impl Counters {
    pub(super) fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            updates: get(&self.updates),
            invalidates: get(&self.invalidates),
            answered: get(&self.answered),
            answered_ns: get(&self.answered_ns),
            refused: get(&self.refused),
            timeouts: get(&self.timeouts),
            misses: get(&self.misses),
            misses_refused: get(&self.misses_refused),
            access_fails: get(&self.access_fails),
        }
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The device's place behind the IOMMU.
pub(super) struct Follower {
    pub(super) endpoint: Arc<Endpoint>,
    timeout: Duration,
    timer: TimerFd,
    /// The timer will fire. It is set once for many changes and looks at the oldest that is there by then.
    armed: bool,
    /// A back-end holds translations.
    following: bool,
    /// The change that had no room.
    held: Option<(u64, Change)>,
    /// Since when it has had none, where no answer is owed that would make some.
    stalled: Option<Instant>,
    limit: RateLimit,
}

impl Follower {
    pub(super) fn new(endpoint: Arc<Endpoint>, timeout: Duration) -> Result<Self, errno::Error> {
        Ok(Self {
            endpoint,
            timeout,
            timer: TimerFd::new()?,
            armed: false,
            following: false,
            held: None,
            stalled: None,
            limit: RateLimit::new(LOG_INTERVAL),
        })
    }

    /// What the event manager watches for it: the endpoint, and the timer.
    pub(super) fn sources(&self) -> [RawFd; 2] {
        [self.endpoint.changed().as_raw_fd(), self.timer.as_raw_fd()]
    }

    fn follow(&mut self) {
        if !self.following {
            self.following = true;
            self.endpoint.follow();
        }
    }

    /// The connection is closed: there is nobody to wait for.
    pub(super) fn unfollow(&mut self) {
        if self.following {
            self.following = false;
            self.held = None;
            self.stalled = None;
            self.endpoint.unfollow();
        }
    }

    fn next_change(&mut self) -> Option<(u64, Change)> {
        self.held.take().or_else(|| self.endpoint.next_change())
    }

    fn may_log(&mut self) -> bool {
        self.limit.allow(Instant::now()).is_some()
    }
}

/// The channel on which the back-end asks, and what the event manager watches it for.
pub(super) struct Watched {
    channel: Channel,
    interest: EventSet,
}

impl Worker {
    // ---- from the IOMMU to the back-end ----

    /// Gives the back-end everything but the rings, and returns whether it has been told of all translations that there are. Where not,
    /// `start_waits` is set, or it is lost.
    pub(super) fn tell_translations(&mut self, features: u64, ops: &mut EventOps) -> bool {
        let (Some(peer), Some(follower)) = (&mut self.peer, &mut self.follower) else {
            return false;
        };
        let result = peer.frontend.set_up(features, self.host.memory_regions());
        if let Err(error) = result {
            self.lost(&error, ops);
            return false;
        }
        // From here on the back-end can be told, and from here on it has to be.
        follower.follow();
        if let Some(channel) = peer.frontend.take_channel() {
            self.open_channel(channel, ops);
        }
        let told = self.send_changes(ops);
        self.start_waits = !told && self.peer.is_some();
        told
    }

    /// The endpoint says that there are changes.
    pub(super) fn changed(&mut self, ops: &mut EventOps) {
        if let Some(follower) = &self.follower {
            event::clear(follower.endpoint.changed());
        }
        self.carry_on(ops);
    }

    /// Does what waits for room at the back-end.
    pub(super) fn carry_on(&mut self, ops: &mut EventOps) {
        if self.start_waits {
            self.try_start(ops);
        }
        self.send_changes(ops);
    }

    /// Sends changes while there is room for them, a bounded number at a time. Returns whether the back-end has been told of all.
    fn send_changes(&mut self, ops: &mut EventOps) -> bool {
        let (Some(peer), Some(follower)) = (&mut self.peer, &mut self.follower) else {
            return false;
        };
        if !follower.following {
            return false;
        }
        let space = Space {
            regions: self.host.memory_regions(),
            endpoint: None,
        };
        let mut sent = 0;
        let told = loop {
            let Some((number, change)) = follower.next_change() else {
                break true;
            };
            if sent == MAX_IOTLB_OWED || !peer.frontend.has_iotlb_room() {
                follower.held = Some((number, change));
                break false;
            }
            sent += 1;
            match change {
                // Nothing that the back-end could be shown.
                Change::Map(mapping) if !space.has(mapping.gpa, mapping.len) => {
                    peer.frontend.pass(number);
                    continue;
                }
                Change::Map(_) => count(&self.shared.counters.updates, 1),
                Change::Unmap { .. } => count(&self.shared.counters.invalidates, 1),
            }
            if let Err(error) = peer.frontend.iotlb(&change, number) {
                self.lost(&error, ops);
                return false;
            }
        };
        if let Err(error) = peer.frontend.flush() {
            self.lost(&error, ops);
            return false;
        }
        if told || sent > 0 {
            follower.stalled = None;
        } else if peer.frontend.oldest_iotlb().is_none() {
            follower.stalled.get_or_insert_with(Instant::now);
        }
        if !told && peer.frontend.has_iotlb_room() {
            // Not all in one turn.
            event::signal(follower.endpoint.changed());
        }
        if let Some(done) = peer.frontend.take_iotlb_done() {
            self.changes_done(&done);
        }
        self.arm_iotlb_deadline(ops);
        told && self.peer.is_some()
    }

    /// The back-end has carried out changes.
    pub(super) fn changes_done(&self, done: &IotlbDone) {
        let counters = &self.shared.counters;
        count(&counters.answered, done.answers);
        let ns = u64::try_from(done.waited.as_nanos()).unwrap_or(u64::MAX);
        count(&counters.answered_ns, ns);
        if let Some(follower) = &self.follower {
            follower.endpoint.done(done.number);
        }
    }

    /// Counts the end of a conversation if it is that the back-end refused a change.
    pub(super) fn count_refusal(&self, error: &frontend::Error) {
        if let frontend::Error::Violation(Violation::Refused { request, .. }) = error
            && *request == requests::IOTLB_MSG
        {
            count(&self.shared.counters.refused, 1);
        }
    }

    // ---- a back-end that does not answer ----

    /// Since when the back-end has been waited for.
    fn waits_since(&self) -> Option<Instant> {
        let peer = self.peer.as_ref()?;
        let stalled = self.follower.as_ref()?.stalled;
        peer.frontend.oldest_iotlb().or(stalled)
    }

    fn arm_iotlb_deadline(&mut self, ops: &mut EventOps) {
        let since = self.waits_since();
        let (Some(since), Some(follower)) = (since, &mut self.follower) else {
            return;
        };
        if follower.armed {
            return;
        }
        let left = follower.timeout.saturating_sub(since.elapsed()).max(TICK);
        match follower.timer.reset(left, None) {
            Ok(()) => follower.armed = true,
            Err(error) => {
                let why = format_args!("was cut off: cannot arm a timer: {error}");
                self.drop_peer(Level::Error, why, ops);
            }
        }
    }

    pub(super) fn iotlb_deadline_passed(&mut self, ops: &mut EventOps) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        let timeout = follower.timeout;
        // As for the other timer: setting it anew is what makes it unreadable.
        let _ = follower.timer.clear();
        follower.armed = false;
        // Answers that are there count.
        self.drive(ops);
        if self
            .waits_since()
            .is_some_and(|since| since.elapsed() >= timeout)
        {
            count(&self.shared.counters.timeouts, 1);
            let why = format_args!(
                "was cut off: it did not acknowledge an IOTLB message within {timeout:?}"
            );
            self.drop_peer(Level::Warn, why, ops);
        }
    }

    // ---- what the back-end asks ----

    fn open_channel(&mut self, channel: Channel, ops: &mut EventOps) {
        let interest = EventSet::IN;
        let events = Events::with_data_raw(channel.as_raw_fd(), CHANNEL, interest);
        if let Err(error) = ops.add(events) {
            error!(
                "{}: cannot watch the back-end's channel: {error}",
                self.path()
            );
        } else if let Some(peer) = &mut self.peer {
            peer.channel = Some(Watched { channel, interest });
        }
    }

    /// Closes the channel, and nothing else: the back-end goes on without it.
    pub(super) fn close_channel(&mut self, ops: &mut EventOps) {
        let watched = self.peer.as_mut().and_then(|peer| peer.channel.take());
        if let Some(watched) = watched
            && let Err(error) = ops.remove(Events::empty(&watched.channel))
        {
            error!(
                "{}: cannot forget the back-end's channel: {error}",
                self.path()
            );
        }
    }

    /// Serves a bounded number of the back-end's requests, while there is room for what they may make this side send.
    pub(super) fn serve_channel(&mut self, events: EventSet, ops: &mut EventOps) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        for _ in 0..MAX_ASKED {
            let Some(peer) = &mut self.peer else { return };
            let room = peer.frontend.has_iotlb_room();
            let Some(watched) = &mut peer.channel else {
                return;
            };
            if !room {
                if gone {
                    // Its end cannot be left unwatched; nobody would read the answers.
                    self.close_channel(ops);
                }
                return;
            }
            let asked = match watched.channel.receive() {
                Ok(Some(asked)) => asked,
                Ok(None) => return,
                Err(error) => return self.end_channel(&error, ops),
            };
            let done = match asked.ask {
                Ask::Miss(miss) => self.miss(&miss, ops),
                Ask::AccessFail(fail) => self.access_fail(&fail),
                Ask::Unknown => {
                    self.log_ask(format_args!("asks what it cannot ask ({})", asked.request));
                    false
                }
            };
            let Some(peer) = &mut self.peer else { return };
            if let Some(watched) = &mut peer.channel
                && let Err(error) = watched.channel.answer(&asked, done)
            {
                return self.end_channel(&error, ops);
            }
        }
    }

    fn end_channel(&mut self, error: &channel::Error, ops: &mut EventOps) {
        self.log_ask(format_args!("loses the channel for its requests: {error}"));
        self.close_channel(ops);
    }

    fn log_ask(&mut self, what: fmt::Arguments) {
        let may_log = self.follower.as_mut().is_some_and(Follower::may_log);
        if may_log {
            warn!("{}: the back-end {what}", self.path());
        }
    }

    /// The back-end lacks a translation; returns whether it is on its way.
    fn miss(&mut self, miss: &Iotlb, ops: &mut EventOps) -> bool {
        count(&self.shared.counters.misses, 1);
        let space = self.space();
        let Some(follower) = &self.follower else {
            return false;
        };
        let mapping = follower.endpoint.lookup(miss.iova);
        let mapping = mapping.filter(|mapping| space.has(mapping.gpa, mapping.len));
        let allows = |access| mapping.is_some_and(|m: Mapping| m.permission.allows(access));
        let refused = wanted(miss).find(|&access| !allows(access));
        match (mapping, refused) {
            (Some(mapping), None) => {
                count(&self.shared.counters.updates, 1);
                let Some(peer) = &mut self.peer else {
                    return false;
                };
                // A change of this mapping that still waits comes behind this message, and so has the last word.
                let result = peer.frontend.iotlb(&Change::Map(mapping), 0);
                match result.and_then(|()| peer.frontend.flush()) {
                    Ok(()) => self.arm_iotlb_deadline(ops),
                    Err(error) => self.lost(&error, ops),
                }
                true
            }
            (_, refused) => {
                let access = refused.unwrap_or(Access::Read);
                follower.endpoint.report(miss.iova, access);
                count(&self.shared.counters.misses_refused, 1);
                let iova = miss.iova;
                self.log_ask(format_args!(
                    "asks for {iova:#x}, which is not mapped for this ({access:?})"
                ));
                false
            }
        }
    }

    /// The back-end was refused an access.
    fn access_fail(&mut self, fail: &Iotlb) -> bool {
        count(&self.shared.counters.access_fails, 1);
        if let Some(follower) = &self.follower {
            let access = wanted(fail).next().unwrap_or(Access::Read);
            follower.endpoint.report(fail.iova, access);
        }
        true
    }

    /// Lets the event manager watch for what the channel wants.
    pub(super) fn watch_channel(&mut self, ops: &mut EventOps) {
        let Some(peer) = &mut self.peer else { return };
        let room = peer.frontend.has_iotlb_room();
        let Some(watched) = &mut peer.channel else {
            return;
        };
        let interest = match (room, watched.channel.wants_write()) {
            (false, _) => EventSet::empty(),
            (true, true) => EventSet::OUT,
            (true, false) => EventSet::IN,
        };
        if interest == watched.interest {
            return;
        }
        watched.interest = interest;
        let fd = watched.channel.as_raw_fd();
        if let Err(error) = ops.modify(Events::with_data_raw(fd, CHANNEL, interest)) {
            error!(
                "{}: cannot watch the back-end's channel: {error}",
                self.path()
            );
            self.close_channel(ops);
        }
    }
}

/// What a back-end wants to do: writes first, which more mappings refuse. One that does not say wants to read.
fn wanted(iotlb: &Iotlb) -> impl Iterator<Item = Access> {
    let write = iotlb.write.then_some(Access::Write);
    let read = (iotlb.read || !iotlb.write).then_some(Access::Read);
    write.into_iter().chain(read)
}
