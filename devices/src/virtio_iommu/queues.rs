//! The two rings, and the chains of buffers in them.

use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::wire::{MAX_REQUEST, PROBE_SIZE, TAIL};
use super::{F_EVENT_IDX, QUEUE_SIZE};
use crate::virtio::{QueueSetup, control_queue, event};

/// The most that an answer can be: what lies before its tail is zeroed, so that there is a bound.
const MAX_ANSWER: usize = 4096 + PROBE_SIZE + TAIL;

/// A fault of the guest that only a reset mends.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("{0} is not enabled, not aligned, or not in memory")]
    Setup(&'static str),
    #[error("{0}: {1}")]
    Ring(&'static str, #[source] virtio_queue::Error),
    #[error("{0}: more buffers are available than it has descriptors")]
    Overrun(&'static str),
}

/// The buffers of one chain.
pub(super) struct Chain {
    pub(super) head: u16,
    readable: Vec<(GuestAddress, usize)>,
    writable: Vec<(GuestAddress, usize)>,
    /// Bytes that the device may write.
    room: usize,
    /// It has more buffers than its ring has descriptors.
    endless: bool,
}

impl Chain {
    /// Walks a chain, at most as far as the ring is long (VIRTIO 1.3, section 2.7.5.3.1: no chain may be longer).
    fn new(chain: DescriptorChain<&GuestMemoryMmap>, size: u16) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut chain = chain;
        for descriptor in chain.by_ref().take(size.into()) {
            // A length of 32 bits fits.
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let buffer = (descriptor.addr(), len);
            if descriptor.is_write_only() {
                writable.push(buffer);
            } else {
                readable.push(buffer);
            }
        }
        Self {
            head,
            room: writable
                .iter()
                .fold(0, |sum, (_, len)| sum.saturating_add(*len)),
            endless: chain.next().is_some(),
            readable,
            writable,
        }
    }

    /// Bytes that the device may write, the tail included; `None` where there is no room for a tail, not all of it is memory, or it is
    /// more than any answer: nobody can be told then.
    pub(super) fn answer_room(&self, memory: &GuestMemoryMmap) -> Option<usize> {
        let writable = |&(start, len): &(GuestAddress, usize)| {
            start.checked_add(len as u64).is_some()
                && memory.check_range(start, len, Permissions::Write)
        };
        let fits = (TAIL..=MAX_ANSWER).contains(&self.room) && !self.endless;
        (fits && self.writable.iter().all(writable)).then_some(self.room)
    }

    /// The first bytes that the driver wrote, as many as a request can have; `None` where they are not in memory.
    pub(super) fn request(&self, memory: &GuestMemoryMmap) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(MAX_REQUEST);
        for &(start, len) in &self.readable {
            let at = bytes.len();
            if len == 0 {
                continue;
            }
            if at == MAX_REQUEST {
                break;
            }
            bytes.resize(MAX_REQUEST.min(at.saturating_add(len)), 0);
            memory.read_slice(bytes.get_mut(at..)?, start).ok()?;
        }
        Some(bytes)
    }

    /// Writes at the beginning of what the device may write; returns how much that was, 0 where not all of it could be written.
    pub(super) fn write(&self, bytes: &[u8], memory: &GuestMemoryMmap) -> u32 {
        let mut rest = bytes;
        for &(start, len) in &self.writable {
            let (now, later) = rest.split_at(len.min(rest.len()));
            if memory.write_slice(now, start).is_err() {
                return 0;
            }
            rest = later;
        }
        if rest.is_empty() {
            u32::try_from(bytes.len()).unwrap_or(0)
        } else {
            0
        }
    }
}

/// One ring at work.
pub(super) struct Ring {
    name: &'static str,
    queue: Queue,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    /// Chains that were taken and not put back.
    taken: u16,
}

impl Ring {
    pub(super) fn new(
        name: &'static str,
        setup: &QueueSetup,
        features: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, Fault> {
        let mut queue = control_queue(setup, QUEUE_SIZE, memory).ok_or(Fault::Setup(name))?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        Ok(Self {
            name,
            queue,
            kick: setup.kick.clone(),
            call: setup.call.clone(),
            taken: 0,
        })
    }

    /// Signalled by the driver's notifications.
    pub(super) fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    fn fault(&self) -> impl Fn(virtio_queue::Error) -> Fault + use<> {
        let name = self.name;
        move |error| Fault::Ring(name, error)
    }

    /// Takes the next chain.
    pub(super) fn take(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, Fault> {
        let fault = self.fault();
        let chain = self.queue.iter(memory).map_err(fault)?.next();
        let Some(chain) = chain else {
            return Ok(None);
        };
        if self.taken == self.queue.size() {
            return Err(Fault::Overrun(self.name));
        }
        self.taken += 1;
        Ok(Some(Chain::new(chain, self.queue.size())))
    }

    /// Asks the driver to notify the next chain; returns whether there is one already.
    pub(super) fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        self.queue.enable_notification(memory).map_err(self.fault())
    }

    /// Gives a chain back, with how much of it was written. [`Ring::tell`] is for all that were given back since the last time.
    pub(super) fn put(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), Fault> {
        let fault = self.fault();
        self.queue.add_used(memory, head, written).map_err(fault)?;
        self.taken = self.taken.saturating_sub(1);
        Ok(())
    }

    /// Interrupts the driver where it wants that.
    pub(super) fn tell(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        let fault = self.fault();
        if self.queue.needs_notification(memory).map_err(fault)? {
            event::signal(&self.call);
        }
        Ok(())
    }
}
