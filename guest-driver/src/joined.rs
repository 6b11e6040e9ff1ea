//! Both data paths over one piece of memory, without devices: what two VMs do through a window, in one process. This is the
//! upper bound that benchmarks compare with, and the bed of tests.

use virtqueue::linear::Linear;
use virtqueue::net::F_MRG_RXBUF;
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

/// Both ends in the memory from device address `start` (page-aligned) on, which must be zeroed, [`memory_needed`] long, and theirs
/// alone: [`front_end`], then [`back_end`].
///
/// For measurements, [`front_end`] and [`back_end`] are better called by the threads that use them: what the two allocate then
/// does not share cache lines.
pub fn join<C: Notify + Clone, K: Notify + Clone>(
    memory: Linear,
    start: u64,
    config: &JoinConfig,
    kicks: K,
    calls: C,
    interrupts: bool,
) -> Result<(JoinedFrontEnd<K>, JoinedBackEnd<C>), Error> {
    let front = front_end(memory, start, config, kicks)?;
    let back = back_end(memory, start, config, calls, interrupts)?;
    Ok((front, back))
}

/// The front-end, which initialises the rings. `kicks` notify the back-end; where nobody is to be notified, [`Silent`] does.
pub fn front_end<K: Notify + Clone>(
    memory: Linear,
    start: u64,
    config: &JoinConfig,
    kicks: K,
) -> Result<JoinedFrontEnd<K>, Error> {
    Ok(if config.packed {
        Either::Packed(front::<Packed, K>(memory, start, config, kicks)?)
    } else {
        Either::Split(front::<Split, K>(memory, start, config, kicks)?)
    })
}

/// The back-end, for rings that [`front_end`] has initialised. `calls` notify the front-end; `interrupts` says whether kicks arrive.
pub fn back_end<C: Notify + Clone>(
    memory: Linear,
    start: u64,
    config: &JoinConfig,
    calls: C,
    interrupts: bool,
) -> Result<JoinedBackEnd<C>, Error> {
    Ok(if config.packed {
        Either::Packed(back::<Packed, C>(memory, start, config, calls, interrupts)?)
    } else {
        Either::Split(back::<Split, C>(memory, start, config, calls, interrupts)?)
    })
}

fn front<L: Layout, K: Notify + Clone>(
    memory: Linear,
    start: u64,
    join: &JoinConfig,
    kicks: K,
) -> Result<FrontEnd<L, K>, Error> {
    let half = |(config, pool): (RingConfig, u64)| {
        Ok::<_, Error>((L::driver(memory, &config)?, pool, kicks.clone()))
    };
    let [rx, tx] = rings::<L>(start, join)?;
    let mut front = NetPort::new(memory, join.shape, half(rx)?, half(tx)?)?;
    front.fill()?;
    Ok(front)
}

fn back<L: Layout, C: Notify + Clone>(
    memory: Linear,
    start: u64,
    join: &JoinConfig,
    calls: C,
    interrupts: bool,
) -> Result<BackEnd<L, C>, Error> {
    let vring = |(config, _): (RingConfig, u64)| {
        Ok::<_, Error>(Vring {
            ring: L::device(memory, &config)?,
            call: calls.clone(),
            kicks: interrupts,
            record: None,
        })
    };
    let [rx, tx] = rings::<L>(start, join)?;
    let mergeable = if join.shape.mergeable { F_MRG_RXBUF } else { 0 };
    let features = mergeable | join.shape.offloads;
    Ok(PeerPort::new(memory, features, vring(rx)?, vring(tx)?))
}

/// Where the two rings and their pools are: receive, transmit.
fn rings<L: Layout>(start: u64, join: &JoinConfig) -> Result<[(RingConfig, u64); 2], Error> {
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
    Ok([ring(), ring()])
}
