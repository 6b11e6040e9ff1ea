//! What requests and their answers are in the rings.

use vm_memory::GuestMemoryMmap;

use super::wire::{MAX_REQUEST, PROBE_SIZE, TAIL};
use crate::virtio::Chain;

/// The most that an answer can be: what lies before its tail is zeroed, so that there is a bound.
const MAX_ANSWER: usize = 4096 + PROBE_SIZE + TAIL;

/// Bytes that the device may write, the tail included; `None` where there is no room for a tail, not all of it is memory, or it is
/// more than any answer: nobody can be told then.
pub(super) fn answer_room(chain: &Chain, memory: &GuestMemoryMmap) -> Option<usize> {
    let room = chain.writable();
    let fits = (TAIL..=MAX_ANSWER).contains(&room) && !chain.is_endless();
    (fits && chain.is_there(memory)).then_some(room)
}

/// The first bytes that the driver wrote, as many as a request can have; `None` where they are not in memory.
pub(super) fn request(chain: &Chain, memory: &GuestMemoryMmap) -> Option<Vec<u8>> {
    let mut bytes = vec![0; chain.readable().min(MAX_REQUEST)];
    chain.read(memory, 0, &mut bytes).then_some(bytes)
}

/// Writes at the beginning of what the device may write; returns how much that was, 0 where not all of it could be written.
pub(super) fn write(chain: &Chain, bytes: &[u8], memory: &GuestMemoryMmap) -> u32 {
    if chain.write(memory, 0, bytes) {
        u32::try_from(bytes.len()).unwrap_or(0)
    } else {
        0
    }
}
