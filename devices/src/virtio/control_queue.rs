//! Queues that the VMM itself serves, over the virtio-queue crate.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemory, Permissions};

use super::QueueSetup;

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
