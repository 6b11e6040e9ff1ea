//! Queues that the VMM itself serves, over the virtio-queue crate.

use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::{QueueSetup, event};

/// The split ring that a driver set up, of at most `max_size` descriptors; `None` where it is not enabled, not aligned, or not in memory
/// (VIRTIO 1.3, section 2.7).
pub(crate) fn control_queue<M: GuestMemory>(
    setup: &QueueSetup,
    max_size: u16,
    memory: &M,
) -> Option<Queue> {
    let mut queue = Queue::new(max_size).ok()?;
    queue.try_set_size(setup.size).ok()?;
    queue
        .try_set_desc_table_address(GuestAddress(setup.desc))
        .ok()?;
    queue
        .try_set_avail_ring_address(GuestAddress(setup.driver))
        .ok()?;
    queue
        .try_set_used_ring_address(GuestAddress(setup.device))
        .ok()?;
    queue.set_ready(true);
    let size = usize::from(setup.size);
    // Both rings end in a 16-bit event index.
    let areas = [
        (setup.desc, 16 * size, Permissions::Read),
        (setup.driver, 6 + 2 * size, Permissions::Read),
        (setup.device, 6 + 8 * size, Permissions::Write),
    ];
    let in_memory = areas.iter().all(|&(start, len, access)| {
        let start = GuestAddress(start);
        start.checked_add(len as u64).is_some() && memory.check_range(start, len, access)
    });
    (setup.enabled && in_memory).then_some(queue)
}

/// What a driver did to a ring that only a reset of the device mends.
#[derive(Debug, Error)]
pub(crate) enum RingFault {
    /// It is no ring.
    #[error("{0} is not enabled, not aligned, or not in memory")]
    Setup(&'static str),
    /// It breaks a rule.
    #[error("{0}: {1}")]
    Ring(&'static str, #[source] virtio_queue::Error),
    /// More is available than there can be.
    #[error("{0}: more buffers are available than it has descriptors")]
    Overrun(&'static str),
    /// The IOMMU refused an access.
    #[error("{0}: the IOMMU maps the ring no more, or not for this access")]
    Unmapped(&'static str),
}

/// Buffers of one kind, in order: where, and how long.
type Buffers = Vec<(GuestAddress, usize)>;

/// The buffers of one chain.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    readable: Buffers,
    writable: Buffers,
    endless: bool,
}

/// Bytes in all.
fn total(buffers: &Buffers) -> usize {
    let lens = buffers.iter().map(|(_, len)| *len);
    lens.fold(0, usize::saturating_add)
}

/// The pieces of `len` bytes from byte `at` on, or fewer where the buffers end before.
fn pieces(buffers: &Buffers, at: usize, len: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (mut skip, mut left) = (at, len);
    buffers.iter().filter_map(move |&(start, size)| {
        let inside = skip.min(size);
        skip -= inside;
        let now = left.min(size - inside);
        left -= now;
        // An address that overflows is in no memory: the last one is not either.
        let start = start.checked_add(inside as u64);
        (now > 0).then(|| (start.unwrap_or(GuestAddress(u64::MAX)), now))
    })
}

impl Chain {
    /// Walks a chain, at most as far as the ring is long (VIRTIO 1.3, section 2.7.5.3.1: no chain may be longer).
    fn new<M: GuestMemory>(mut chain: DescriptorChain<&M>, size: u16) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
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
            endless: chain.next().is_some(),
            readable,
            writable,
        }
    }

    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// Whether it has more buffers than its ring has descriptors.
    pub(crate) fn is_endless(&self) -> bool {
        self.endless
    }

    /// Bytes that the driver wrote.
    pub(crate) fn readable(&self) -> usize {
        total(&self.readable)
    }

    /// Bytes that the device may write.
    pub(crate) fn writable(&self) -> usize {
        total(&self.writable)
    }

    /// Whether all that the device may write is there.
    pub(crate) fn is_there(&self, memory: &impl GuestMemory) -> bool {
        self.writable.iter().all(|&(start, len)| {
            start.checked_add(len as u64).is_some()
                && memory.check_range(start, len, Permissions::Write)
        })
    }

    /// Fills `to` with what the driver wrote, from byte `at` on. `false` where there is less, or it is not in memory; then `to` may hold parts of it.
    pub(crate) fn read(&self, memory: &impl GuestMemory, at: usize, to: &mut [u8]) -> bool {
        let mut rest = to;
        for (start, len) in pieces(&self.readable, at, rest.len()) {
            let (now, later) = rest.split_at_mut(len);
            if memory.read_slice(now, start).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Writes from byte `at` of what the device may write on. `false` where there is less room, or it is not in memory; then parts may be written.
    pub(crate) fn write(&self, memory: &impl GuestMemory, at: usize, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for (start, len) in pieces(&self.writable, at, rest.len()) {
            let (now, later) = rest.split_at(len);
            if memory.write_slice(now, start).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }
}

/// One ring at work, of which several chains may be at work at a time.
pub(crate) struct ControlRing {
    name: &'static str,
    queue: Queue,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    /// Chains that were taken and not put back.
    taken: u16,
}

impl ControlRing {
    /// A ring as its driver set it up, with at most `max_size` descriptors; `name` is for faults.
    pub(crate) fn new<M: GuestMemory>(
        name: &'static str,
        setup: Option<&QueueSetup>,
        max_size: u16,
        event_idx: bool,
        memory: &M,
    ) -> Result<Self, RingFault> {
        let setup = setup.ok_or(RingFault::Setup(name))?;
        let mut queue = control_queue(setup, max_size, memory).ok_or(RingFault::Setup(name))?;
        queue.set_event_idx(event_idx);
        Ok(Self {
            name,
            queue,
            kick: setup.kick.clone(),
            call: setup.call.clone(),
            taken: 0,
        })
    }

    /// Signalled by the driver's notifications.
    pub(crate) fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    fn fault(&self) -> impl Fn(virtio_queue::Error) -> RingFault + use<> {
        let name = self.name;
        move |error| RingFault::Ring(name, error)
    }

    /// Takes the next chain.
    pub(crate) fn take<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, RingFault> {
        let fault = self.fault();
        let chain = self.queue.iter(memory).map_err(fault)?.next();
        let Some(chain) = chain else {
            return Ok(None);
        };
        if self.taken == self.queue.size() {
            return Err(RingFault::Overrun(self.name));
        }
        self.taken += 1;
        Ok(Some(Chain::new(chain, self.queue.size())))
    }

    /// Asks the driver to notify the next chain; returns whether there is one already.
    pub(crate) fn listen<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, RingFault> {
        self.queue.enable_notification(memory).map_err(self.fault())
    }

    /// Gives a chain back, with how much of it was written. [`ControlRing::tell`] is for all that were given back since the last time.
    pub(crate) fn put<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), RingFault> {
        let fault = self.fault();
        self.queue.add_used(memory, head, written).map_err(fault)?;
        self.taken = self.taken.saturating_sub(1);
        Ok(())
    }

    /// Interrupts the driver where it wants that.
    pub(crate) fn tell<M: GuestMemory>(&mut self, memory: &M) -> Result<(), RingFault> {
        let fault = self.fault();
        if self.queue.needs_notification(memory).map_err(fault)? {
            event::signal(&self.call);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(buffers: &[(u64, usize)], at: usize, len: usize) -> Vec<(u64, usize)> {
        let buffers = buffers
            .iter()
            .map(|&(start, len)| (GuestAddress(start), len));
        let buffers: Buffers = buffers.collect();
        pieces(&buffers, at, len)
            .map(|(start, len)| (start.0, len))
            .collect()
    }

    #[test]
    fn a_range_of_a_chain_is_cut_out_of_its_buffers_and_ends_where_they_end() {
        let buffers = [(0x100, 4), (0x200, 0), (0x300, 8)];
        assert_eq!(found(&buffers, 0, 12), [(0x100, 4), (0x300, 8)]);
        assert_eq!(found(&buffers, 2, 4), [(0x102, 2), (0x300, 2)]);
        assert_eq!(found(&buffers, 4, 1), [(0x300, 1)]);
        assert_eq!(found(&buffers, 11, 1), [(0x307, 1)]);
        assert_eq!(found(&buffers, 11, 9), [(0x307, 1)]);
        assert_eq!(found(&buffers, 12, 1), []);
        assert_eq!(found(&buffers, 0, 0), []);
        // No address comes from an overflow.
        assert_eq!(found(&[(u64::MAX, 8)], 4, 2), [(u64::MAX, 2)]);
    }
}
