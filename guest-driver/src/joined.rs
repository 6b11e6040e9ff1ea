//! Both data paths over one piece of memory, without devices: what two VMs do through a window, in one process. This is the
//! upper bound that benchmarks compare with, and the bed of tests.

use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use crate::net_port::{BUFFER_STRIDE, NetPort, Shape};
use crate::peer::{PeerPort, Vring};
use crate::port::Either;
use crate::virtio_pci::{Error, Notify};

/// Notifies nobody: both ends poll.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Notify for Silent {
    fn notify(&self) {}
}

/// What was negotiated, so to say.
#[derive(Clone, Copy, Debug)]
pub struct JoinConfig {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// Descriptors of each ring.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// How frames are laid out in buffers, and VIRTIO_NET_F_MRG_RXBUF.
    pub shape: Shape,
}

impl Default for JoinConfig {
    fn default() -> Self {
        Self {
            packed: false,
            size: 256,
            event_idx: false,
            in_order: false,
            indirect: false,
            shape: Shape::default(),
        }
    }
}

/// The front-end of a joined pair over one layout.
pub type FrontEnd<L, N> = NetPort<<L as Layout>::Driver<Linear>, N>;
/// The back-end of a joined pair over one layout.
pub type BackEnd<L, N> = PeerPort<<L as Layout>::Device<Linear>, N>;
/// Both ends over one layout.
type Ends<L, C, K> = (FrontEnd<L, K>, BackEnd<L, C>);
/// The front-end of a joined pair.
pub type JoinedFrontEnd<N> = Either<FrontEnd<Split, N>, FrontEnd<Packed, N>>;
/// The back-end of a joined pair.
pub type JoinedBackEnd<N> = Either<BackEnd<Split, N>, BackEnd<Packed, N>>;

const PAGE: u64 = 4096;

/// Bytes that [`join`] needs; `None` for a size that the layout does not have.
#[must_use]
pub fn memory_needed(config: &JoinConfig) -> Option<u64> {
    let areas = if config.packed {
        Packed::area_sizes(config.size)
    } else {
        Split::area_sizes(config.size)
    }?;
    let pool = usize::from(config.size) * BUFFER_STRIDE;
    let ring: u64 = areas.into_iter().chain([pool]).map(pages).sum();
    Some(2 * ring)
}

fn pages(len: usize) -> u64 {
    u64::try_from(len)
        .unwrap_or(u64::MAX)
        .next_multiple_of(PAGE)
}

/// Builds both ends in the memory from device address `start` (page-aligned) on, which must be zeroed, [`memory_needed`] long, and theirs
/// alone. `calls` notify the front-end, `kicks` the back-end; where there are none, [`Silent`] does.
pub fn join<C: Notify + Clone, K: Notify + Clone>(
    memory: Linear,
    start: u64,
    config: &JoinConfig,
    kicks: K,
    calls: C,
    interrupts: bool,
) -> Result<(JoinedFrontEnd<K>, JoinedBackEnd<C>), Error> {
    Ok(if config.packed {
        let (front, back) =
            join_layout::<Packed, C, K>(memory, start, config, kicks, calls, interrupts)?;
        (Either::Packed(front), Either::Packed(back))
    } else {
        let (front, back) =
            join_layout::<Split, C, K>(memory, start, config, kicks, calls, interrupts)?;
        (Either::Split(front), Either::Split(back))
    })
}

fn join_layout<L: Layout, C: Notify + Clone, K: Notify + Clone>(
    memory: Linear,
    start: u64,
    join: &JoinConfig,
    kicks: K,
    calls: C,
    interrupts: bool,
) -> Result<Ends<L, C, K>, Error> {
    let mut next = start;
    let mut area = |len| {
        let addr = next;
        next += pages(len);
        addr
    };
    let sizes = L::area_sizes(join.size).ok_or(virtqueue::Error::Config)?;
    let mut ring = || {
        let config = RingConfig {
            size: join.size,
            desc: area(sizes[0]),
            driver: area(sizes[1]),
            device: area(sizes[2]),
            event_idx: join.event_idx,
            in_order: join.in_order,
            indirect: join.indirect,
        };
        (config, area(usize::from(join.size) * BUFFER_STRIDE))
    };
    let (rx, tx) = (ring(), ring());
    let driver = |(config, pool): &(RingConfig, u64)| {
        Ok::<_, Error>((L::driver(memory, config)?, *pool, kicks.clone()))
    };
    let mut front = NetPort::new(memory, join.shape, driver(&rx)?, driver(&tx)?)?;
    let device = |(config, _): &(RingConfig, u64)| {
        let (ring, call) = (L::device(memory, config)?, calls.clone());
        Ok::<_, Error>(Vring {
            ring,
            call,
            kicks: interrupts,
        })
    };
    let back = PeerPort::new(memory, join.shape.mergeable, device(&rx)?, device(&tx)?);
    front.fill();
    Ok((front, back))
}
