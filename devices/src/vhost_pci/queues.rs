//! The control queues: messages to and from the guest's driver.

use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::QUEUE_SIZE;
use crate::virtio::{Activation, DeviceMemory, QueueSetup, control_queue, event};

/// The longest message, header included; also what a receive buffer must hold.
pub(super) const MAX_MESSAGE: usize = 4096;

/// A fault of the guest. Only a reset mends it.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("{0} is not enabled, not aligned, or not in memory")]
    Setup(&'static str),
    #[error("{0}: {1}")]
    Ring(&'static str, #[source] virtio_queue::Error),
    #[error("{0}: a buffer is not in memory")]
    Buffer(&'static str),
    #[error("{0}: the IOMMU maps a ring or a buffer no more, or not for this access")]
    Unmapped(&'static str),
    #[error("a receive buffer of {have} bytes is too small for a message of {need}")]
    TooSmall { need: usize, have: usize },
}

/// What the driver sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// The bytes of one buffer.
    Message(Vec<u8>),
    /// A buffer that is longer than any message.
    TooLong,
}

struct Ring {
    name: &'static str,
    queue: Queue,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

impl Ring {
    fn new(name: &'static str, setup: &QueueSetup, memory: &DeviceMemory) -> Result<Self, Fault> {
        let queue = control_queue(setup, QUEUE_SIZE, memory).ok_or(Fault::Setup(name))?;
        Ok(Self {
            name,
            queue,
            kick: setup.kick.clone(),
            call: setup.call.clone(),
        })
    }

    fn next<'m>(
        &mut self,
        memory: &'m DeviceMemory<'m>,
    ) -> Result<Option<DescriptorChain<&'m DeviceMemory<'m>>>, Fault> {
        let chains = self.queue.iter(memory);
        let chain = chains
            .map_err(|error| Fault::Ring(self.name, error))?
            .next();
        self.check(memory)?;
        Ok(chain)
    }

    /// A buffer could not be reached.
    fn buffer(&self, memory: &DeviceMemory) -> Fault {
        self.check(memory).err().unwrap_or(Fault::Buffer(self.name))
    }

    /// Whether the IOMMU has let everything through: the virtio-queue crate takes what it cannot read for the end of a chain or of the ring.
    fn check(&self, memory: &DeviceMemory) -> Result<(), Fault> {
        if memory.refused() {
            Err(Fault::Unmapped(self.name))
        } else {
            Ok(())
        }
    }

    fn put(&mut self, memory: &DeviceMemory, head: u16, written: u32) -> Result<(), Fault> {
        let ring = |error| Fault::Ring(self.name, error);
        self.queue.add_used(memory, head, written).map_err(ring)?;
        if self.queue.needs_notification(memory).map_err(ring)? {
            event::signal(&self.call);
        }
        Ok(())
    }
}

/// `rxq` and `txq`.
pub(super) struct ControlQueues {
    rx: Ring,
    tx: Ring,
}

impl ControlQueues {
    pub(super) fn new(activation: &Activation, memory: &DeviceMemory) -> Result<Self, Fault> {
        let [rx, tx] = activation.queues.as_slice() else {
            return Err(Fault::Setup("rxq"));
        };
        Ok(Self {
            rx: Ring::new("rxq", rx, memory)?,
            tx: Ring::new("txq", tx, memory)?,
        })
    }

    /// The eventfds that the driver's notifications of `rxq` and `txq` signal.
    pub(super) fn kicks(&self) -> [&Arc<EventFd>; 2] {
        [&self.rx.kick, &self.tx.kick]
    }

    /// Puts a message in the next receive buffer; returns whether there was one.
    pub(super) fn deliver(&mut self, memory: &DeviceMemory, message: &[u8]) -> Result<bool, Fault> {
        let Some(chain) = self.rx.next(memory)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let need = message.len();
        let mut rest = message;
        for buffer in chain.writable() {
            let room = usize::try_from(buffer.len()).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at(rest.len().min(room));
            memory
                .write_slice(part, buffer.addr())
                .map_err(|_| self.rx.buffer(memory))?;
            rest = behind;
        }
        self.rx.check(memory)?;
        if !rest.is_empty() {
            let have = need - rest.len();
            return Err(Fault::TooSmall { need, have });
        }
        // A message is at most `MAX_MESSAGE` long.
        self.rx
            .put(memory, head, u32::try_from(need).unwrap_or(0))?;
        Ok(true)
    }

    /// Takes the next message of the driver.
    pub(super) fn take(&mut self, memory: &DeviceMemory) -> Result<Option<Sent>, Fault> {
        let Some(chain) = self.tx.next(memory)? else {
            return Ok(None);
        };
        let head = chain.head_index();
        let mut bytes = Vec::new();
        let mut too_long = false;
        for buffer in chain.readable() {
            let start = bytes.len();
            let len = usize::try_from(buffer.len()).unwrap_or(usize::MAX);
            too_long = len > MAX_MESSAGE - start;
            if too_long {
                break;
            }
            bytes.resize(start + len, 0);
            let part = bytes.get_mut(start..).unwrap_or_default();
            memory
                .read_slice(part, buffer.addr())
                .map_err(|_| self.tx.buffer(memory))?;
        }
        self.tx.check(memory)?;
        let sent = if too_long {
            Sent::TooLong
        } else {
            Sent::Message(bytes)
        };
        self.tx.put(memory, head, 0)?;
        Ok(Some(sent))
    }
}
