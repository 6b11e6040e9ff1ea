//! The tap's thread: starts and stops queues as the driver wants it.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{error, warn};

use super::super::rings::{self, Space};
use super::{Engine, Fault, QueueOrder, Shared};
use crate::host::Host;
use crate::vhost_user::RateLimit;
use crate::virtio::{Activation, F_RING_PACKED, QueueSetup, event};

/// What an event is about, where it is about the driver's orders. The other numbers are the engine's.
pub(super) const WAKE: u32 = 0;

pub(super) struct Worker {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    engine: Box<dyn Engine>,
    queue_size: u16,
    /// What was negotiated, while the device is at work.
    features: Option<u64>,
    limit: RateLimit,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Arc<dyn Host>,
        engine: Box<dyn Engine>,
        queue_size: u16,
    ) -> Self {
        Self {
            shared,
            host,
            engine,
            queue_size,
            features: None,
            limit: RateLimit::new(Duration::from_secs(1)),
        }
    }

    /// Does what vCPU threads have left in the mailbox.
    fn commands(&mut self, ops: &mut EventOps) -> Result<(), Fault> {
        let mail = std::mem::take(&mut *self.shared.mailbox());
        if mail.reset {
            self.stop(ops);
            if let Some(transport) = self.shared.transport() {
                transport.reset_done();
            }
        }
        if let Some(activation) = mail.activation {
            self.activate(&activation, ops)?;
        }
        for order in mail.queues {
            match order {
                QueueOrder::Reset(index) => {
                    self.engine.stop(index, ops);
                    if let Some(transport) = self.shared.transport() {
                        transport.queue_reset_done(index);
                    }
                }
                QueueOrder::Enable(index, queue) => self.start(index, &queue, ops)?,
            }
        }
        Ok(())
    }

    fn stop(&mut self, ops: &mut EventOps) {
        self.features = None;
        for index in 0..2 {
            self.engine.stop(index, ops);
        }
    }

    fn activate(&mut self, activation: &Activation, ops: &mut EventOps) -> Result<(), Fault> {
        self.engine.configure(activation.features)?;
        self.features = Some(activation.features);
        for (index, queue) in (0..2).zip(&activation.queues) {
            if queue.enabled {
                self.start(index, queue, ops)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, index: u16, queue: &QueueSetup, ops: &mut EventOps) -> Result<(), Fault> {
        // Where there are none, the device needs a reset already.
        let Some(features) = self.features else {
            return Ok(());
        };
        let space = Space {
            regions: self.host.memory_regions(),
            endpoint: None,
        };
        let packed = features & F_RING_PACKED != 0;
        rings::check(queue, packed, self.queue_size, space)?;
        self.engine.start(index, queue, ops)
    }

    fn failed(&mut self, fault: &Fault, ops: &mut EventOps) {
        self.stop(ops);
        let name = &self.shared.name;
        let transport = self.shared.transport();
        if matches!(fault, Fault::Tap(_)) {
            // Once: a driver may try again as often as it likes.
            if self.shared.link_up.swap(false, Ordering::AcqRel) {
                error!("tap {name}: {fault}: the link is down");
                if let Some(transport) = transport {
                    transport.config_changed();
                }
            }
            return;
        }
        if self.limit.allow(Instant::now()).is_some() {
            warn!("tap {name}: the driver has to reset the device: {fault}");
        }
        if let Some(transport) = transport {
            transport.set_needs_reset();
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        let wake = self.shared.wake.as_raw_fd();
        if let Err(error) = ops.add(Events::with_data_raw(wake, WAKE, EventSet::IN)) {
            let name = &self.shared.name;
            error!("tap {name}: cannot watch a descriptor: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let result = match events.data() {
            WAKE => {
                event::clear(&self.shared.wake);
                self.commands(ops)
            }
            what => self.engine.event(what, ops),
        };
        if let Err(fault) = result {
            self.failed(&fault, ops);
        }
    }
}
