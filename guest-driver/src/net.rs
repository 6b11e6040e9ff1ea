//! The virtio-net driver (VIRTIO 1.3, section 5.1): one queue pair or several.

use alloc::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::net::{
    F_CSUM, F_CTRL_VQ, F_MAC, F_MQ, F_MRG_RXBUF, F_RSS, F_STATUS, GUEST_LARGE, GUEST_OFFLOADS,
    HOST_OFFLOADS, consistent, features,
};
use virtqueue::packed::Packed;
use virtqueue::rss;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use crate::Platform;
use crate::mapper::{Fixed, Mapper};
use crate::net_control::ControlQueue;
use crate::net_port::offload::{MAX_DESCRIPTORS, buffers_of_longest};
use crate::net_port::{NetPort, Shape};
use crate::pci::Function;
use crate::port::Either;
use crate::virtio_pci::{Doorbell, Error, Transport};

/// Device type of virtio-net.
pub const DEVICE_TYPE: u16 = 1;
/// Offset of le16 `status` in the device configuration.
const CONFIG_STATUS: usize = 6;
const STATUS_LINK_UP: u16 = 1;
/// Offset of le16 `max_virtqueue_pairs`.
const CONFIG_MAX_PAIRS: usize = 8;

/// The features that this driver can use, beside VERSION_1, which it needs.
const USABLE: u64 = features::VERSION_1
    | features::EVENT_IDX
    | features::IN_ORDER
    | features::INDIRECT_DESC
    | features::RING_PACKED
    | features::RING_RESET
    | features::ACCESS_PLATFORM
    | F_MAC
    | F_MRG_RXBUF
    | F_STATUS;
/// The same for a driver that wants several pairs.
const USABLE_MQ: u64 = F_CTRL_VQ | F_MQ;

/// What a ring's memory and settings depend on.
const RING_BITS: u64 =
    features::EVENT_IDX | features::IN_ORDER | features::INDIRECT_DESC | features::RING_PACKED;

/// The data path over rings of one layout.
pub type Ports<L, M = Fixed> = NetPort<<L as Layout>::Driver<Linear>, Doorbell, M>;
/// The data path over rings of the layout that was negotiated.
pub type NetDevicePort<M = Fixed> = Either<Ports<Split, M>, Ports<Packed, M>>;

/// A ring and where its pool is.
type RingAndPool = (RingConfig, u64);
/// The rings of a pair: receive, transmit.
type PairRings = [RingAndPool; 2];

/// What a device was set up with before it was reset.
struct Earlier {
    features: u64,
    pairs: Vec<PairRings>,
    control: Option<ControlQueue>,
}

/// The driver of a virtio-net device.
#[derive(Debug)]
pub struct NetDevice<M = Fixed> {
    transport: Transport,
    features: u64,
    memory: Linear,
    shape: Shape,
    mapper: M,
    /// The rings of each pair, at least one.
    pairs: Vec<PairRings>,
    /// How many pairs the device uses.
    in_use: usize,
    /// How many it may have at most, as the caller wants it.
    wanted: u16,
    control: Option<ControlQueue>,
    /// How the device steers what is received, where it was told.
    rss: Option<rss::Config>,
    /// The data paths, one a pair.
    ports: Vec<NetDevicePort<M>>,
}

impl<M: Mapper> NetDevice<M> {
    /// Sets the device up, with rings as large as it offers, and starts it.
    ///
    /// `memory` is how the driver reaches the memory that [`Platform::dma`] gives, by device address; `shape` is how frames are laid out in buffers;
    /// `mapper` maps those that are not mapped for ever. Of several queue pairs, at most `pairs` are set up, and the first is used:
    /// [`NetDevice::use_pairs`].
    pub fn new<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
        (shape, mapper): (Shape, M),
        pairs: u16,
    ) -> Result<Self, Error> {
        let transport = Transport::new(platform, function)?;
        Self::set_up(platform, transport, memory, (shape, mapper), pairs, None)
    }

    /// Resets the device and sets it up anew, as it asks for (DEVICE_NEEDS_RESET) when it lost its place in the rings. What was in them is lost.
    pub fn restart<P: Platform>(self, platform: &P) -> Result<Self, Error> {
        let Self {
            transport,
            features,
            memory,
            shape,
            mapper,
            pairs,
            in_use,
            wanted,
            control,
            rss,
            ..
        } = self;
        transport.reset()?;
        transport.connect_config_vector()?;
        let earlier = Some(Earlier {
            features,
            pairs,
            control,
        });
        let parts = (shape, mapper);
        let mut device = Self::set_up(platform, transport, memory, parts, wanted, earlier)?;
        match rss {
            Some(config) => device.set_rss(&config)?,
            None => device.use_pairs(in_use.min(device.pairs.len()))?,
        }
        Ok(device)
    }

    /// Whether the device asks to be reset. Reading it leaves the guest: to be asked when the configuration changed.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.transport.needs_reset()
    }

    /// From a device that was reset to one that runs. The rings of an earlier life are used again where they have the same layout.
    fn set_up<P: Platform>(
        platform: &P,
        transport: Transport,
        memory: Linear,
        (shape, mapper): (Shape, M),
        wanted: u16,
        earlier: Option<Earlier>,
    ) -> Result<Self, Error> {
        let usable = if wanted > 1 {
            USABLE | USABLE_MQ | F_RSS
        } else {
            USABLE
        };
        let features = transport.negotiate(|offered| {
            // Several pairs are of no use without the queue that puts them into use.
            let mq = if offered & USABLE_MQ == USABLE_MQ {
                usable
            } else {
                USABLE
            };
            let offloads = usable_offloads::<M>(&transport, offered, &shape);
            (offered & features::VERSION_1 != 0).then_some(offered & (mq | offloads))
        })?;
        let shape = Shape {
            mergeable: features & F_MRG_RXBUF != 0,
            offloads: features & (HOST_OFFLOADS | GUEST_OFFLOADS),
            ..shape
        };
        if let Some(earlier) = &earlier {
            clear(&mapper, &earlier.pairs)?;
        }
        let most = if features & F_MQ != 0 {
            transport.device().read_u16(CONFIG_MAX_PAIRS).max(1)
        } else {
            1
        };
        let count = most.min(wanted.max(1));
        let same = |earlier: &Earlier| {
            let bits = (earlier.features ^ features) & (RING_BITS | F_MQ);
            bits == 0 && earlier.pairs.len() == usize::from(count)
        };
        let (pairs, control) = match earlier.filter(same) {
            Some(earlier) => {
                enable(&transport, &earlier.pairs)?;
                (earlier.pairs, earlier.control)
            }
            None => {
                let add = |index| add_ring::<P, M>(platform, &transport, features, index);
                let pairs = (0..count).map(|pair| Ok([add(2 * pair)?, add(2 * pair + 1)?]));
                (pairs.collect::<Result<Vec<_>, Error>>()?, None)
            }
        };
        // Behind all pairs that the device has, not those that are set up.
        let index = most.checked_mul(2).ok_or(Error::Queue(most))?;
        let control = match control {
            _ if features & F_MQ == 0 => None,
            Some(control) => Some(control.again(&transport, memory, features, index)?),
            None => Some(ControlQueue::new(
                platform, &transport, memory, features, index,
            )?),
        };
        let ports = make_all(&transport, memory, features, shape, &mapper, &pairs)?;
        transport.start();
        let mut device = Self {
            transport,
            features,
            memory,
            shape,
            mapper,
            pairs,
            in_use: 1,
            wanted,
            control,
            rss: None,
            ports,
        };
        device.fill()?;
        Ok(device)
    }

    /// Has the device use this many of the pairs that are set up, and waits for that. Nothing may be sent on the others
    /// (section 5.1.6.5.6): [`NetDevice::pair`] does not show them. What is in their rings stays there.
    pub fn use_pairs(&mut self, count: usize) -> Result<(), Error> {
        if count == self.in_use && self.rss.is_none() {
            return Ok(());
        }
        let pairs = u16::try_from(count)
            .ok()
            .filter(|_| (1..=self.pairs.len()).contains(&count));
        let (Some(pairs), Some(control)) = (pairs, &mut self.control) else {
            return Err(Error::Features);
        };
        control.use_pairs(&self.transport, self.memory, pairs)?;
        self.in_use = count;
        self.rss = None;
        Ok(())
    }

    /// Has the device steer what is received by RSS (section 5.1.6.5.7) until the next [`NetDevice::use_pairs`], and waits for that. The pairs that this takes are in use
    /// then.
    pub fn set_rss(&mut self, config: &rss::Config) -> Result<(), Error> {
        let pairs = usize::from(config.pairs());
        let fits = self.features & F_RSS != 0 && pairs <= self.pairs.len();
        let (true, Some(control)) = (fits, &mut self.control) else {
            return Err(Error::Features);
        };
        control.set_rss(&self.transport, self.memory, config)?;
        self.in_use = pairs;
        self.rss = Some(*config);
        Ok(())
    }

    /// How the device steers what is received, where it was told.
    #[must_use]
    pub fn rss(&self) -> Option<&rss::Config> {
        self.rss.as_ref()
    }

    /// How many pairs are set up.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// The data path of the first pair.
    pub fn port(&mut self) -> Option<&mut NetDevicePort<M>> {
        self.ports.first_mut()
    }

    /// The data path of a pair that is in use.
    pub fn pair(&mut self, index: usize) -> Option<&mut NetDevicePort<M>> {
        if index < self.in_use {
            self.ports.get_mut(index)
        } else {
            None
        }
    }

    /// Resets all rings of the data paths and starts them anew (VIRTIO_F_RING_RESET); what was in them is lost.
    pub fn reset_rings(&mut self) -> Result<(), Error> {
        if self.features & features::RING_RESET == 0 {
            return Err(Error::Features);
        }
        for (index, _) in (0..).zip(self.pairs.iter().flatten()) {
            self.transport.reset_queue(index)?;
        }
        clear(&self.mapper, &self.pairs)?;
        self.ports = make_all(
            &self.transport,
            self.memory,
            self.features,
            self.shape,
            &self.mapper,
            &self.pairs,
        )?;
        enable(&self.transport, &self.pairs)?;
        self.fill()?;
        Ok(())
    }

    /// Gives the receive buffers to the device.
    fn fill(&mut self) -> Result<(), Error> {
        for port in &mut self.ports {
            match port {
                Either::Split(port) => port.fill(),
                Either::Packed(port) => port.fill(),
            }?;
        }
        Ok(())
    }

    /// Where the rings of the first pair are: receive, transmit.
    #[must_use]
    pub fn rings(&self) -> Option<[RingConfig; 2]> {
        let first = self.pairs.first()?;
        Some(first.map(|(config, _)| config))
    }

    /// How the driver reaches its rings and buffers, by device address.
    #[must_use]
    pub fn memory(&self) -> Linear {
        self.memory
    }

    /// The register that notifies a ring: 2p for the receive ring of pair p, 2p + 1 for its transmit ring.
    pub fn doorbell(&self, ring: u16) -> Result<Doorbell, Error> {
        self.transport.doorbell(ring)
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the back-end is there. Reading it leaves the guest: to be asked when the configuration changed.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.features & F_STATUS == 0
            || self.transport.device().read_u16(CONFIG_STATUS) & STATUS_LINK_UP != 0
    }
}

/// What is used of the offloads that are offered: what the caller can make use of. No side leaves anything to the other where each buffer is mapped by itself, or segments of which
/// a ring does not hold one.
fn usable_offloads<M: Mapper>(transport: &Transport, offered: u64, shape: &Shape) -> u64 {
    if M::DYNAMIC {
        return 0;
    }
    let holds = |ring, descriptors| usize::from(transport.largest_queue(ring)) >= descriptors;
    let mut usable = offered & shape.offloads & (HOST_OFFLOADS | GUEST_OFFLOADS);
    if offered & F_MRG_RXBUF == 0 || !holds(0, buffers_of_longest(shape.rx_buffer)) {
        usable &= !GUEST_LARGE;
    }
    if !holds(1, MAX_DESCRIPTORS) {
        usable &= !HOST_OFFLOADS | F_CSUM;
    }
    consistent(usable)
}

/// Takes back the buffers that the device had when it was reset: they are still mapped.
fn clear<M: Mapper>(mapper: &M, pairs: &[PairRings]) -> Result<(), Error> {
    for (config, pool) in pairs.iter().flatten() {
        mapper.clone().clear(*pool, config.size)?;
    }
    Ok(())
}

/// Tells a device that was reset, or whose queues were, where they are.
fn enable(transport: &Transport, pairs: &[PairRings]) -> Result<(), Error> {
    for (index, (config, _)) in (0..).zip(pairs.iter().flatten()) {
        transport.enable_queue(index, config)?;
    }
    Ok(())
}

/// Allocates a ring and its pool, and tells the device.
fn add_ring<P: Platform, M: Mapper>(
    platform: &P,
    transport: &Transport,
    features: u64,
    index: u16,
) -> Result<(RingConfig, u64), Error> {
    let config = if features & features::RING_PACKED != 0 {
        transport.add_queue::<P, Packed>(platform, index, u16::MAX)
    } else {
        transport.add_queue::<P, Split>(platform, index, u16::MAX)
    }?;
    let pool = platform
        .pool(usize::from(config.size) * M::STRIDE, 64)
        .ok_or(Error::Memory)?;
    let config = RingConfig {
        event_idx: features & features::EVENT_IDX != 0,
        in_order: features & features::IN_ORDER != 0,
        indirect: features & features::INDIRECT_DESC != 0,
        ..config
    };
    Ok((config, pool.addr))
}

/// The data paths over fresh rings.
fn make_all<M: Mapper>(
    transport: &Transport,
    memory: Linear,
    features: u64,
    shape: Shape,
    mapper: &M,
    pairs: &[PairRings],
) -> Result<Vec<NetDevicePort<M>>, Error> {
    let parts = (transport, memory, shape, mapper);
    let ports = (0..).step_by(2).zip(pairs).map(|(first, rings)| {
        Ok(if features & features::RING_PACKED != 0 {
            Either::Packed(make_ports::<Packed, M>(parts, first, rings)?)
        } else {
            Either::Split(make_ports::<Split, M>(parts, first, rings)?)
        })
    });
    ports.collect()
}

/// The data path over fresh rings, whose first has this index.
fn make_ports<L: Layout, M: Mapper>(
    (transport, memory, shape, mapper): (&Transport, Linear, Shape, &M),
    first: u16,
    [rx, tx]: &PairRings,
) -> Result<Ports<L, M>, Error> {
    let half = |index, (config, pool): &RingAndPool| {
        let ring = L::driver(memory, config)?;
        Ok::<_, Error>((ring, *pool, transport.doorbell(index)?))
    };
    let (rx, tx) = (half(first, rx)?, half(first + 1, tx)?);
    NetPort::with_mapper(memory, shape, rx, tx, mapper.clone())
}
