//! Both data paths over one piece of memory, without devices: what two VMs do through a window, in one process. This is the
//! upper bound that benchmarks compare with, and the bed of tests.

use virtqueue::linear::Linear;
use virtqueue::{RingConfig, split};

use crate::net::{BUFFER_STRIDE, NetPort};
use crate::peer::{PeerPort, Vring};
use crate::virtio_pci::{Error, Notify};

/// Notifies nobody: both ends poll.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Notify for Silent {
    fn notify(&self) {}
}

/// The front-end of a joined pair.
pub type JoinedFrontEnd = NetPort<split::Driver<Linear>, Silent>;
/// The back-end of a joined pair.
pub type JoinedBackEnd = PeerPort<split::Device<Linear>, Silent>;

const PAGE: u64 = 4096;

/// Bytes that [`join`] needs for rings of `size`.
#[must_use]
pub fn memory_needed(size: u16) -> u64 {
    2 * (ring_bytes(size) + pool_bytes(size))
}

fn ring_bytes(size: u16) -> u64 {
    let n = u64::from(size);
    [16 * n, 6 + 2 * n, 6 + 8 * n]
        .iter()
        .map(|len| len.next_multiple_of(PAGE))
        .sum()
}

fn pool_bytes(size: u16) -> u64 {
    (u64::from(size) * BUFFER_STRIDE as u64).next_multiple_of(PAGE)
}

/// Builds both ends in the memory from device address `start` (page-aligned) on, which must be zeroed, [`memory_needed`] long, and theirs alone.
pub fn join(
    memory: Linear,
    start: u64,
    size: u16,
    event_idx: bool,
) -> Result<(JoinedFrontEnd, JoinedBackEnd), Error> {
    let mut next = start;
    let mut area = |len: u64| {
        let addr = next;
        next += len.next_multiple_of(PAGE);
        addr
    };
    let n = u64::from(size);
    let mut ring = || {
        let config = RingConfig {
            size,
            desc: area(16 * n),
            driver: area(6 + 2 * n),
            device: area(6 + 8 * n),
            event_idx,
            in_order: false,
        };
        (config, area(pool_bytes(size)))
    };
    let ((rx, rx_pool), (tx, tx_pool)) = (ring(), ring());
    let driver = |config| split::Driver::new(memory, config);
    let device = |config| {
        Ok::<_, Error>(Vring {
            ring: split::Device::new(memory, config)?,
            call: Silent,
            kicks: false,
        })
    };
    let mut front = NetPort::new(
        memory,
        (driver(&rx)?, rx_pool, Silent),
        (driver(&tx)?, tx_pool, Silent),
    )?;
    let back = PeerPort::new(memory, device(&rx)?, device(&tx)?);
    front.fill();
    Ok((front, back))
}
