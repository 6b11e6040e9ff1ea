//! The virtio-net driver (VIRTIO 1.3, section 5.1): one queue pair.

use virtqueue::linear::Linear;
use virtqueue::net::{F_MAC, F_MRG_RXBUF, F_STATUS, features};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use crate::Platform;
use crate::mapper::{Fixed, Mapper};
use crate::net_port::{NetPort, Shape};
use crate::pci::Function;
use crate::port::Either;
use crate::virtio_pci::{Doorbell, Error, Transport};

/// Device type of virtio-net.
pub const DEVICE_TYPE: u16 = 1;
/// Offset of le16 `status` in the device configuration.
const CONFIG_STATUS: usize = 6;
const STATUS_LINK_UP: u16 = 1;

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

/// What a ring's memory and settings depend on.
const RING_BITS: u64 =
    features::EVENT_IDX | features::IN_ORDER | features::INDIRECT_DESC | features::RING_PACKED;

/// The data path over rings of one layout.
pub type Ports<L, M = Fixed> = NetPort<<L as Layout>::Driver<Linear>, Doorbell, M>;
/// The data path over rings of the layout that was negotiated.
pub type NetDevicePort<M = Fixed> = Either<Ports<Split, M>, Ports<Packed, M>>;

/// The driver of a virtio-net device.
#[derive(Debug)]
pub struct NetDevice<M = Fixed> {
    transport: Transport,
    features: u64,
    memory: Linear,
    shape: Shape,
    mapper: M,
    /// Where the rings and their pools are: receive, transmit.
    rings: [(RingConfig, u64); 2],
    /// The data path.
    pub port: NetDevicePort<M>,
}

impl<M: Mapper> NetDevice<M> {
    /// Sets the device up, with rings as large as it offers, and starts it.
    ///
    /// `memory` is how the driver reaches the memory that [`Platform::dma`] gives, by device address; `shape` is how frames are laid out in buffers;
    /// `mapper` maps those that are not mapped for ever.
    pub fn new<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
        shape: Shape,
        mapper: M,
    ) -> Result<Self, Error> {
        let transport = Transport::new(platform, function)?;
        Self::set_up(platform, transport, memory, shape, mapper, None)
    }

    /// Resets the device and sets it up anew, as it asks for (DEVICE_NEEDS_RESET) when it lost its place in the rings. What was in them is lost.
    pub fn restart<P: Platform>(self, platform: &P) -> Result<Self, Error> {
        let Self {
            transport,
            features,
            memory,
            shape,
            mapper,
            rings,
            ..
        } = self;
        transport.reset()?;
        transport.connect_config_vector()?;
        let earlier = Some((features, rings));
        Self::set_up(platform, transport, memory, shape, mapper, earlier)
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
        shape: Shape,
        mapper: M,
        earlier: Option<(u64, [(RingConfig, u64); 2])>,
    ) -> Result<Self, Error> {
        let features = transport.negotiate(|offered| {
            (offered & features::VERSION_1 != 0).then_some(offered & USABLE)
        })?;
        let shape = Shape {
            mergeable: features & F_MRG_RXBUF != 0,
            ..shape
        };
        if let Some((_, rings)) = &earlier {
            clear(&mapper, rings)?;
        }
        let rings = match earlier {
            Some((before, rings)) if (before ^ features) & RING_BITS == 0 => {
                for (index, (config, _)) in (0..).zip(&rings) {
                    transport.enable_queue(index, config)?;
                }
                rings
            }
            _ => [
                add_ring::<P, M>(platform, &transport, features, 0)?,
                add_ring::<P, M>(platform, &transport, features, 1)?,
            ],
        };
        let port = make_port(&transport, memory, features, shape, &mapper, &rings)?;
        transport.start();
        let mut device = Self {
            transport,
            features,
            memory,
            shape,
            mapper,
            rings,
            port,
        };
        device.fill()?;
        Ok(device)
    }

    /// Resets both rings and starts them anew (VIRTIO_F_RING_RESET); what was in them is lost.
    pub fn reset_rings(&mut self) -> Result<(), Error> {
        if self.features & features::RING_RESET == 0 {
            return Err(Error::Features);
        }
        for index in 0..2 {
            self.transport.reset_queue(index)?;
        }
        clear(&self.mapper, &self.rings)?;
        self.port = make_port(
            &self.transport,
            self.memory,
            self.features,
            self.shape,
            &self.mapper,
            &self.rings,
        )?;
        for (index, (config, _)) in (0..).zip(&self.rings) {
            self.transport.enable_queue(index, config)?;
        }
        self.fill()?;
        Ok(())
    }

    /// Gives the receive buffers to the device.
    fn fill(&mut self) -> Result<(), Error> {
        match &mut self.port {
            Either::Split(port) => port.fill(),
            Either::Packed(port) => port.fill(),
        }?;
        Ok(())
    }

    /// Where the rings are: receive, transmit.
    #[must_use]
    pub fn rings(&self) -> [RingConfig; 2] {
        self.rings.map(|(config, _)| config)
    }

    /// How the driver reaches its rings and buffers, by device address.
    #[must_use]
    pub fn memory(&self) -> Linear {
        self.memory
    }

    /// The register that notifies a ring (0 or 1).
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

/// Takes back the buffers that the device had when it was reset: they are still mapped.
fn clear<M: Mapper>(mapper: &M, rings: &[(RingConfig, u64); 2]) -> Result<(), Error> {
    for (config, pool) in rings {
        mapper.clone().clear(*pool, config.size)?;
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

fn make_port<M: Mapper>(
    transport: &Transport,
    memory: Linear,
    features: u64,
    shape: Shape,
    mapper: &M,
    rings: &[(RingConfig, u64); 2],
) -> Result<NetDevicePort<M>, Error> {
    let parts = (transport, memory, shape, mapper);
    Ok(if features & features::RING_PACKED != 0 {
        Either::Packed(make_ports::<Packed, M>(parts, rings)?)
    } else {
        Either::Split(make_ports::<Split, M>(parts, rings)?)
    })
}

/// The data path over fresh rings.
fn make_ports<L: Layout, M: Mapper>(
    (transport, memory, shape, mapper): (&Transport, Linear, Shape, &M),
    [rx, tx]: &[(RingConfig, u64); 2],
) -> Result<Ports<L, M>, Error> {
    let half = |index, (config, pool): &(RingConfig, u64)| {
        let ring = L::driver(memory, config)?;
        Ok::<_, Error>((ring, *pool, transport.doorbell(index)?))
    };
    NetPort::with_mapper(memory, shape, half(0, rx)?, half(1, tx)?, mapper.clone())
}
