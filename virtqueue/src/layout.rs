//! What the layouts have in common, for users that are generic over them and for users that learn the layout from a feature bit.

use crate::{
    Buffer, Chain, DeviceRing, DriverRing, Error, Memory, RingConfig, Used, packed, split,
};

/// A ring layout: [`split::Split`] (VIRTIO 1.3 section 2.7) or [`packed::Packed`] (section 2.8).
pub trait Layout {
    /// The driver's side.
    type Driver<M: Memory>: DriverRing;
    /// The device's side.
    type Device<M: Memory>: DeviceRing;

    /// Alignment in bytes of the descriptor, driver and device area.
    const ALIGN: [usize; 3];
    /// The position of a ring that was reset.
    const FRESH: u32;

    /// Bytes of the descriptor, driver and device area of a ring of `size` descriptors; `None` for a size that the layout does not
    /// have (sections 2.7 and 2.8.10.1).
    fn area_sizes(size: u16) -> Option<[usize; 3]>;

    /// The driver's side of a fresh ring, which it initialises.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a size that the layout does not have, and for an area that is not aligned or not in memory.
    fn driver<M: Memory>(memory: M, config: &RingConfig) -> Result<Self::Driver<M>, Error> {
        Self::driver_at(memory, config, Self::FRESH)
    }

    /// The driver's side of a fresh ring, which it initialises so that both sides start at the position `base`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Layout::driver`], and where `base` is no position at which a ring is empty.
    fn driver_at<M: Memory>(
        memory: M,
        config: &RingConfig,
        base: u32,
    ) -> Result<Self::Driver<M>, Error>;

    /// The device's side of a fresh ring.
    ///
    /// # Errors
    ///
    /// As for [`Layout::driver`].
    fn device<M: Memory>(memory: M, config: &RingConfig) -> Result<Self::Device<M>, Error>;

    /// The device's side of a ring that goes on at a position that [`DeviceRing::base`] or VHOST_USER_SET_VRING_BASE gave.
    /// Split: the next available index (16 bits). Packed: bits 0-14 are the place of the next
    /// available descriptor, bit 15 its wrap counter, bits 16-30 the place of the next used descriptor, bit 31 its wrap counter.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Layout::device`], and where `base` is no position.
    fn device_at<M: Memory>(
        memory: M,
        config: &RingConfig,
        base: u32,
    ) -> Result<Self::Device<M>, Error>;
}

/// Either layout behind one type, chosen at run time by VIRTIO_F_RING_PACKED. Each call is one branch, always the same.
#[derive(Debug)]
pub enum Either<S, P> {
    /// VIRTIO 1.3 section 2.7.
    Split(S),
    /// VIRTIO 1.3 section 2.8.
    Packed(P),
}

/// The driver's side of either layout.
pub type AnyDriver<M> = Either<split::Driver<M>, packed::Driver<M>>;
/// The device's side of either layout.
pub type AnyDevice<M> = Either<split::Device<M>, packed::Device<M>>;

impl<M: Memory> AnyDriver<M> {
    /// The driver's side of a fresh ring; `packed` says whether VIRTIO_F_RING_PACKED was negotiated.
    ///
    /// # Errors
    ///
    /// As for [`Layout::driver`].
    pub fn new(packed: bool, memory: M, config: &RingConfig) -> Result<Self, Error> {
        if packed {
            packed::Packed::driver(memory, config).map(Self::Packed)
        } else {
            split::Split::driver(memory, config).map(Self::Split)
        }
    }
}

impl<M: Memory> AnyDevice<M> {
    /// The device's side of a fresh ring; `packed` says whether VIRTIO_F_RING_PACKED was negotiated.
    ///
    /// # Errors
    ///
    /// As for [`Layout::device`].
    pub fn new(packed: bool, memory: M, config: &RingConfig) -> Result<Self, Error> {
        if packed {
            packed::Packed::device(memory, config).map(Self::Packed)
        } else {
            split::Split::device(memory, config).map(Self::Split)
        }
    }

    /// The device's side of a ring that goes on at `base`.
    ///
    /// # Errors
    ///
    /// As for [`Layout::device_at`].
    pub fn with_base(
        packed: bool,
        memory: M,
        config: &RingConfig,
        base: u32,
    ) -> Result<Self, Error> {
        if packed {
            packed::Packed::device_at(memory, config, base).map(Self::Packed)
        } else {
            split::Split::device_at(memory, config, base).map(Self::Split)
        }
    }
}

/// The same for whichever it is.
macro_rules! either {
    ($value:expr, $ring:ident => $act:expr) => {
        match $value {
            Either::Split($ring) => $act,
            Either::Packed($ring) => $act,
        }
    };
}

impl<S: DriverRing, P: DriverRing> DriverRing for Either<S, P> {
    #[inline]
    fn free(&self) -> u16 {
        either!(self, ring => ring.free())
    }

    #[inline]
    fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        either!(self, ring => ring.add(buffers))
    }

    #[inline]
    fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        either!(self, ring => ring.add_indirect(table, buffers))
    }

    #[inline]
    fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    #[inline]
    fn take(&mut self, out: &mut [Used]) -> Result<usize, Error> {
        either!(self, ring => ring.take(out))
    }

    #[inline]
    fn disable_calls(&mut self) {
        either!(self, ring => ring.disable_calls());
    }

    #[inline]
    fn enable_calls(&mut self) -> bool {
        either!(self, ring => ring.enable_calls())
    }
}

impl<S: DeviceRing, P: DeviceRing> DeviceRing for Either<S, P> {
    #[inline]
    fn get(&mut self, chains: &mut [Chain], buffers: &mut [Buffer]) -> Result<usize, Error> {
        either!(self, ring => ring.get(chains, buffers))
    }

    #[inline]
    fn unget(&mut self, n: usize) {
        either!(self, ring => ring.unget(n));
    }

    #[inline]
    fn put(&mut self, id: u16, written: u32) {
        either!(self, ring => ring.put(id, written));
    }

    #[inline]
    fn put_read(&mut self, chains: &[Chain]) {
        either!(self, ring => ring.put_read(chains));
    }

    #[inline]
    fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    #[inline]
    fn disable_kicks(&mut self) {
        either!(self, ring => ring.disable_kicks());
    }

    #[inline]
    fn enable_kicks(&mut self) -> bool {
        either!(self, ring => ring.enable_kicks())
    }

    #[inline]
    fn base(&self) -> u32 {
        either!(self, ring => ring.base())
    }
}
