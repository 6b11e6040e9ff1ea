//! The queue pairs in use: what the driver's commands ask for, and what the back-end has to say to it.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, EventSet, Events};
use log::{debug, error, warn};
use virtqueue::rss;

use super::control::{self, Command, Control};
use super::worker::{Active, CONTROL, Worker};
use super::{F_MQ, F_RSS};
use crate::virtio::{QueueSetup, event};

/// How many commands of the control queue are served before others on the thread have their turn.
const MAX_COMMANDS: usize = 16;

impl Worker {
    pub(super) fn is_control(&self, index: u16) -> bool {
        let active = self.active.as_ref();
        active.is_some_and(|active| active.control() == Some(index))
    }

    pub(super) fn open_control(&mut self, setup: &QueueSetup, ops: &mut EventOps) {
        self.close_control(ops);
        let Some(active) = &self.active else { return };
        if let Err(error) = self.check(setup, active.packed()) {
            return self.refuse(error, ops);
        }
        let endpoint = self.follower.as_ref().map(|f| f.endpoint.clone());
        let negotiated = (active.features, self.shared.pairs);
        let control = Control::new(setup, negotiated, self.host.clone(), endpoint);
        let control = match control {
            Ok(control) => control,
            Err(fault) => return self.control_fault(fault, ops),
        };
        let events = Events::with_data_raw(control.kick().as_raw_fd(), CONTROL, EventSet::IN);
        if let Err(error) = ops.add(events) {
            error!("{}: cannot watch the control queue: {error}", self.path());
            return self.give_up(ops);
        }
        self.control = Some(control);
        self.serve_control(ops);
    }

    pub(super) fn close_control(&mut self, ops: &mut EventOps) {
        if let Some(control) = self.control.take()
            && let Err(error) = ops.remove(Events::empty(&**control.kick()))
        {
            error!("{}: cannot forget the control queue: {error}", self.path());
        }
    }

    fn control_fault(&mut self, fault: control::Fault, ops: &mut EventOps) {
        if self.may_log() {
            warn!("{}: the driver's control queue: {fault}", self.path());
        }
        self.give_up(ops);
    }

    /// Does what the control queue asks for, up to a command that takes longer.
    pub(super) fn serve_control(&mut self, ops: &mut EventOps) {
        if let Some(control) = &self.control {
            event::clear(control.kick());
        }
        for _ in 0..MAX_COMMANDS {
            let Some(control) = &mut self.control else {
                return;
            };
            let done = match control.take() {
                Ok(Some(Command::Pairs(pairs))) => self.use_pairs(pairs, F_MQ, None, ops),
                Ok(Some(Command::Rss(config))) => {
                    self.use_pairs(config.pairs(), F_RSS, Some(config), ops)
                }
                Ok(Some(Command::Unknown)) => Some(false),
                Ok(None) => return,
                Err(fault) => return self.control_fault(fault, ops),
            };
            if let Some(ok) = done {
                self.answer_control(ok, ops);
            }
        }
        // Not all in one turn.
        if let Some(control) = &self.control {
            event::signal(control.kick());
        }
    }

    /// Answers the command that waits, if there is one, and has the next looked at.
    pub(super) fn answer_control(&mut self, ok: bool, ops: &mut EventOps) {
        let Some(control) = self.control.as_mut().filter(|control| control.waits()) else {
            return;
        };
        match control.answer(ok) {
            Ok(()) => event::signal(control.kick()),
            Err(fault) => self.control_fault(fault, ops),
        }
    }

    /// Puts so many pairs into use, with RSS or without, where `feature` was negotiated; returns whether that is possible, or `None` where the back-end has to say so first.
    fn use_pairs(
        &mut self,
        pairs: u16,
        feature: u64,
        config: Option<Box<rss::Config>>,
        ops: &mut EventOps,
    ) -> Option<bool> {
        let negotiated = |active: &&mut Active| active.features & feature != 0;
        let Some(active) = self.active.as_mut().filter(negotiated) else {
            return Some(false);
        };
        if !(1..=self.shared.pairs).contains(&pairs) {
            return Some(false);
        }
        let before = std::mem::replace(&mut active.pairs, pairs);
        let ready = active.enabled().filter(|(i, _)| u16::from(*i) < 2 * pairs);
        if ready.count() != 2 * usize::from(pairs) {
            active.pairs = before;
            return Some(false);
        }
        let steers = active.rss.is_some() || config.is_some();
        active.rss = config;
        let Some(peer) = self.peer.as_mut().filter(|p| p.frontend.is_started()) else {
            return Some(true);
        };
        let changes: Vec<_> = (2 * before.min(pairs)..2 * before.max(pairs))
            .filter_map(|index| u8::try_from(index).ok())
            .filter(|&index| peer.frontend.has_vring(index))
            .map(|index| (index, active.in_use(index)))
            .collect();
        if changes.is_empty() && !steers {
            return Some(true);
        }
        debug!("{pairs} queue pairs are used in place of {before}");
        self.enabling += 1;
        // First: no pair is steered to any more when it goes out of use, and until it is in use the back-end has another for its frames.
        let told = peer.frontend.steer(active.rss.as_deref());
        match told.and_then(|()| peer.frontend.enable_vrings(&changes)) {
            Ok(()) => {
                self.arm_deadline(ops);
            }
            Err(error) => self.lost(&error, ops),
        }
        None
    }

    /// The back-end uses the pairs that it was told to.
    pub(super) fn pairs_changed(&mut self, ops: &mut EventOps) {
        self.enabling = self.enabling.saturating_sub(1);
        if !self.resetting {
            self.rearm_deadline(ops);
        }
        if self.enabling == 0 {
            self.answer_control(true, ops);
        }
    }
}
