//! The control queue (VIRTIO 1.3, section 5.1.6.5), which the VMM serves itself while a back-end serves the others. It has the
//! layout of the others, split or packed.
//!
//! One command is at work at a time: [`Control::take`] gives none before the last one has its [`Control::answer`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use thiserror::Error;
use virtqueue::packed::Packed;
use virtqueue::rss;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, Layout, Memory, Region, RingConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::{F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC};
use crate::host::Host;
use crate::virtio::{DeviceMemory, F_RING_PACKED, QueueSetup, event};
use crate::virtio_iommu::Endpoint;

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
const OK: u8 = 0;
const ERR: u8 = 1;
/// VIRTIO_NET_CTRL_MQ, and its commands (section 5.1.6.5.5): VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_MQ_RSS_CONFIG.
const MQ: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const RSS_CONFIG: u8 = 1;
/// Class and command, and the longest configuration for RSS.
const LENGTH: usize = 2 + rss::MAX_LEN;

/// What the driver did that only a reset of the device mends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Fault {
    /// The ring breaks a rule.
    #[error("{0}")]
    Ring(virtqueue::Error),
    /// The ring or a buffer is not mapped for what the device does there, or not in memory.
    #[error("it is not mapped for this")]
    Unmapped,
}

impl From<virtqueue::Error> for Fault {
    fn from(error: virtqueue::Error) -> Self {
        Self::Ring(error)
    }
}

/// A command that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Use so many queue pairs.
    Pairs(u16),
    /// Steer what is received so.
    Rss(Box<rss::Config>),
    /// One that there is not, or that is not as the specification wants it.
    Unknown,
}

impl Command {
    /// A command for a device with so many pairs.
    fn parse(bytes: &[u8], pairs: u16) -> Self {
        match *bytes {
            [MQ, VQ_PAIRS_SET, low, high] => Self::Pairs(u16::from_le_bytes([low, high])),
            [MQ, RSS_CONFIG, ref config @ ..] => rss::Config::parse(config, pairs)
                .map_or(Self::Unknown, |config| Self::Rss(Box::new(config))),
            _ => Self::Unknown,
        }
    }
}

/// The chain of a command.
struct Open {
    id: u16,
    /// Where its status goes: the first byte that the device may write. Without one nobody can be told.
    status: Option<u64>,
}

/// The queue at work.
pub(super) struct Control {
    ring: Box<dyn DeviceRing + Send>,
    memory: QueueMemory,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    /// As many as a chain can have.
    buffers: Vec<Buffer>,
    open: Option<Open>,
    /// How many queue pairs the device has.
    pairs: u16,
}

impl Control {
    /// A queue whose place has been checked, with what was negotiated.
    pub(super) fn new(
        setup: &QueueSetup,
        (features, pairs): (u64, u16),
        host: Arc<dyn Host>,
        endpoint: Option<Arc<Endpoint>>,
    ) -> Result<Self, Fault> {
        let memory = QueueMemory {
            host,
            endpoint,
            refused: Arc::default(),
        };
        let config = RingConfig {
            size: setup.size,
            desc: setup.desc,
            driver: setup.driver,
            device: setup.device,
            event_idx: features & F_EVENT_IDX != 0,
            in_order: features & F_IN_ORDER != 0,
            indirect: features & F_INDIRECT_DESC != 0,
        };
        let ring: Box<dyn DeviceRing + Send> = if features & F_RING_PACKED != 0 {
            Box::new(Packed::device(memory.clone(), &config)?)
        } else {
            Box::new(Split::device(memory.clone(), &config)?)
        };
        Ok(Self {
            ring,
            memory,
            kick: setup.kick.clone(),
            call: setup.call.clone(),
            buffers: vec![Buffer::default(); setup.size.into()],
            open: None,
            pairs,
        })
    }

    /// Signalled by the driver's notifications.
    pub(super) fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Whether a command waits for its answer.
    pub(super) fn waits(&self) -> bool {
        self.open.is_some()
    }

    /// The next command; `None` where there is none, or the last one has no answer yet. Behind the last, the driver is asked for
    /// a notification.
    pub(super) fn take(&mut self) -> Result<Option<Command>, Fault> {
        if self.waits() {
            return Ok(None);
        }
        let mut chain = [Chain::default()];
        let mut taken = self.ring.get(&mut chain, &mut self.buffers)?;
        if taken == 0 && self.ring.enable_kicks() {
            taken = self.ring.get(&mut chain, &mut self.buffers)?;
        }
        self.memory.check()?;
        if taken == 0 {
            return Ok(None);
        }
        let [chain] = chain;
        let first = usize::from(chain.first);
        let pieces = self.buffers.get(first..first + usize::from(chain.count));
        let pieces = pieces.unwrap_or_default();
        let status = pieces.iter().find(|p| p.device_writes && p.len > 0);
        let open = Open {
            id: chain.id,
            status: status.map(|piece| piece.addr),
        };
        let command = match open.status {
            Some(_) => Command::parse(&self.memory.read(pieces)?, self.pairs),
            // What nobody can be told of is not done.
            None => Command::Unknown,
        };
        self.open = Some(open);
        Ok(Some(command))
    }

    /// Answers the command that was taken last.
    pub(super) fn answer(&mut self, ok: bool) -> Result<(), Fault> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let mut written = 0;
        if let Some(status) = open.status {
            self.memory.write(status, if ok { OK } else { ERR })?;
            written = 1;
        }
        self.ring.put(open.id, written);
        let call = self.ring.publish();
        self.memory.check()?;
        if call {
            event::signal(&self.call);
        }
        Ok(())
    }
}

/// The driver's memory as the ring code reaches it: each access is translated when it is made, where there is an IOMMU. What it refuses
/// reads as zero and is not written; [`QueueMemory::check`] tells.
#[derive(Clone)]
struct QueueMemory {
    host: Arc<dyn Host>,
    endpoint: Option<Arc<Endpoint>>,
    refused: Arc<AtomicBool>,
}

impl QueueMemory {
    fn view(&self) -> DeviceMemory<'_> {
        DeviceMemory::new(self.host.memory(), self.endpoint.as_deref())
    }

    /// Whether all accesses so far reached memory.
    fn check(&self) -> Result<(), Fault> {
        if self.refused.load(Ordering::Relaxed) {
            return Err(Fault::Unmapped);
        }
        Ok(())
    }

    /// The result of an access; where it was refused, that is noted.
    fn noted<T, E>(&self, result: Result<T, E>) -> Option<T> {
        if result.is_err() {
            self.refused.store(true, Ordering::Relaxed);
        }
        result.ok()
    }

    fn is_there(&self, address: u64, len: usize) -> bool {
        let inside = address.checked_add(len as u64).is_some();
        inside
            && self
                .view()
                .check_range(GuestAddress(address), len, Permissions::No)
    }

    /// What the driver wrote into a chain, as far as a command can be long, and one byte more where there is one.
    fn read(&self, pieces: &[Buffer]) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::with_capacity(LENGTH + 1);
        for piece in pieces.iter().filter(|piece| !piece.device_writes) {
            let at = bytes.len();
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            bytes.resize(at + len.min(LENGTH + 1 - at), 0);
            if let Some(to) = bytes.get_mut(at..).filter(|to| !to.is_empty()) {
                let result = self.view().read_slice(to, GuestAddress(piece.addr));
                result.map_err(|_| Fault::Unmapped)?;
            }
        }
        Ok(bytes)
    }

    fn write(&self, address: u64, byte: u8) -> Result<(), Fault> {
        let result = self.view().write_slice(&[byte], GuestAddress(address));
        result.map_err(|_| Fault::Unmapped)
    }
}

impl Memory for QueueMemory {
    type Region = QueueRegion;

    fn region(&self, address: u64, len: usize, align: usize) -> Option<QueueRegion> {
        let aligned = address.is_multiple_of(align as u64);
        (aligned && self.is_there(address, len)).then(|| QueueRegion {
            memory: self.clone(),
            address,
        })
    }

    fn contains(&self, address: u64, len: u32) -> bool {
        usize::try_from(len).is_ok_and(|len| self.is_there(address, len))
    }
}

/// A part of it that was there when it was made.
struct QueueRegion {
    memory: QueueMemory,
    address: u64,
}

impl QueueRegion {
    fn at(&self, offset: usize) -> GuestAddress {
        // The end of the region has been computed without an overflow.
        GuestAddress(self.address.wrapping_add(offset as u64))
    }
}

/// One load and one store of a width.
macro_rules! access {
    ($load:ident, $store:ident, $int:ty) => {
        fn $load(&self, offset: usize, order: Ordering) -> $int {
            let result = self.memory.view().load::<$int>(self.at(offset), order);
            self.memory.noted(result).map_or(0, <$int>::from_le)
        }

        fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let view = self.memory.view();
            let result = view.store(value.to_le(), self.at(offset), order);
            self.memory.noted(result);
        }
    };
}

impl Region for QueueRegion {
    access!(load_u16, store_u16, u16);
    access!(load_u32, store_u32, u32);
    access!(load_u64, store_u64, u64);

    fn fence(order: Ordering) {
        fence(order);
    }
}
